//! Numbers of CPUs and amounts of memory.

use tests::Guest;

#[test]
fn a_machine_has_the_cpus_it_was_given() {
    for count in [1, 2, 4] {
        let output = Guest::new().cpus(count).run(
            "nproc; grep -c ^processor /proc/cpuinfo; \
             for cpu in $(seq 0 $(($(nproc) - 1))); do taskset $(printf %x $((1 << cpu))) true || echo no $cpu; done",
        );
        output
            .expect_code(0)
            .expect_stdout(&format!("{count}\n{count}\n"))
            .expect_stderr("");
    }
}

#[test]
fn a_machine_has_the_memory_it_was_given() {
    for (size, mib) in [
        ("128M", 128u64),
        ("1G", 1024),
        ("3584M", 3584),
        ("6G", 6144),
    ] {
        let output = Guest::new().memory(size).run("grep MemTotal /proc/meminfo");
        output.expect_code(0);
        let text = output.text();
        let kib = text
            .split_whitespace()
            .nth(1)
            .and_then(|number| number.parse::<u64>().ok());
        let total = kib.unwrap_or_else(|| panic!("no MemTotal in {output}")) / 1024;
        // The kernel keeps its own image, its page descriptors and its crash reserve out of it.
        assert!(
            total < mib && total > mib * 9 / 10 - 40,
            "a machine with {size} says that it has {total} MiB: {output}"
        );
    }
}

#[test]
fn memory_above_the_hole_holds_what_is_written() {
    let output = Guest::new().cpus(2).memory("5G").run(
        "mount -o remount,size=4500M /dev/shm && \
         dd if=/dev/urandom of=/tmp/block bs=1M count=8 2>/dev/null && \
         for i in $(seq 24); do cat /tmp/block; done >/dev/shm/file && \
         for i in $(seq 24); do cat /tmp/block; done | cmp - /dev/shm/file && echo same",
    );
    output.expect_code(0).expect_stdout("same\n");
}
