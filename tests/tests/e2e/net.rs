//! A network card on a TAP interface of the host's, in a network namespace of the test's own.

use std::process::Command;

use tests::{host, image};

#[test]
fn a_tap_carries_pings_and_100_mb_both_ways() {
    const TEST: &str = "a_tap_carries_pings_and_100_mb_both_ways";
    if !host::is_root() {
        host::skipped(TEST, "only root can make a TAP interface");
        return;
    }
    host::tool("ip", "iproute2");
    // The outer Linux, where there is one, is not to be started within the namespace.
    host::is_emulated();
    let dir = tempfile::tempdir().unwrap();
    let sent = image::random(dir.path(), 100_000_000);
    // busybox's nc ends when its peer has nothing more to say: whoever receives keeps its own input
    // open, by a FIFO that it may write to itself.
    let guest = "ip link set lo up; ip addr add 10.98.0.2/24 dev eth0 && ip link set eth0 up && \
         ping -c 3 -W 20 10.98.0.1 >/dev/null && echo ping works; mkfifo /tmp/silence; \
         nc 10.98.0.1 9000 <>/tmp/silence | sha256sum; \
         head -c 100000000 /dev/zero | tr '\\0' 'x' >/tmp/up; sha256sum </tmp/up; \
         nc 10.98.0.1 9001 </tmp/up";
    let script = format!(
        "ip link set lo up; ip tuntap add dev mvmtap mode tap && \
         ip addr add 10.98.0.1/24 dev mvmtap && ip link set mvmtap up && \
         mkfifo {silence} || exit 100; \
         {busybox} nc -l -p 9000 <{sent} >/dev/null & down=$!; \
         {busybox} nc -l -p 9001 <>{silence} | sha256sum >{received} & up=$!; \
         {mvm} run --rootfs none --boot-timeout 170s --memory 1G --net tap=mvmtap -- sh -c \"$GUEST\"; code=$?; \
         kill $down 2>/dev/null; [ $code = 0 ] && wait $up; exit $code",
        busybox = image::busybox().display(),
        silence = dir.path().join("silence").display(),
        sent = sent.display(),
        received = dir.path().join("received").display(),
        mvm = host::mvm().display(),
    );
    let mut command = Command::new("unshare");
    command
        .args(["--net", "sh", "-c", &script])
        .env("GUEST", guest);
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

#[test]
fn a_tap_that_does_not_exist_is_refused_with_how_to_make_it() {
    let output = host::run_mvm(&["run", "--net", "tap=nosuch0", "--", "true"]);
    output.expect_code(125);
    output.expect_in_stderr("ip tuntap add dev nosuch0 mode tap");
}
