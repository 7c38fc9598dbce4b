//! A network card on a TAP interface, in a network namespace of the test's own.

use tests::{host, image};

#[test]
fn a_tap_carries_pings_and_100_mb_both_ways() {
    const TEST: &str = "a_tap_carries_pings_and_100_mb_both_ways";
    if !host::is_emulated() && !host::is_root() {
        host::skipped(TEST, "only root can make a TAP interface");
        return;
    }
    host::tool("ip", "iproute2");
    let dir = tempfile::tempdir().unwrap();
    let sent = image::random(dir.path(), 100_000_000);
    let guest = "ip link set lo up; ip addr add 10.98.0.2/24 dev eth0 && ip link set eth0 up && \
         ping -c 3 -W 20 10.98.0.1 >/dev/null && echo ping works; \
         nc 10.98.0.1 9000 </dev/null | sha256sum; \
         head -c 100000000 /dev/zero | tr '\\0' 'x' >/tmp/up; sha256sum </tmp/up; \
         nc 10.98.0.1 9001 </tmp/up";
    let script = format!(
        "ip link set lo up; ip tuntap add dev mvmtap mode tap && \
         ip addr add 10.98.0.1/24 dev mvmtap && ip link set mvmtap up || exit 100; \
         {busybox} nc -l -p 9000 <{sent} >/dev/null & down=$!; \
         {busybox} nc -l -p 9001 </dev/null | sha256sum >{received} & up=$!; \
         {mvm} run --boot-timeout 170s --memory 1G --net tap=mvmtap -- sh -c \"$GUEST\"; code=$?; \
         kill $down 2>/dev/null; [ $code = 0 ] && wait $up; exit $code",
        busybox = image::busybox().display(),
        sent = sent.display(),
        received = dir.path().join("received").display(),
        mvm = host::mvm_beside_machines(),
    );
    let mut command = host::command_beside_machines("exec unshare --net sh -c \"$SCRIPT\"");
    command.env("SCRIPT", script).env("GUEST", guest);
    let output = tests::Running::start(command, Vec::new()).wait_at_most(3 * host::LIMIT);
    output.expect_code(0).expect_in_stdout("ping works\n");
    output.expect_in_stdout(&image::sha256(&sent));
    let received = std::fs::read_to_string(dir.path().join("received")).unwrap();
    let uploaded = output.text().lines().last().unwrap_or_default().to_owned();
    assert_eq!(
        received.trim(),
        uploaded.trim(),
        "what the host received; the guest: {output}"
    );
    output.expect_nothing_left();
}
