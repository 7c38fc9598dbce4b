//! Further disks: written, read-only, checked with fio, and with a host that runs out of room.

use std::fs::File;
use std::io::{Read, Write};

use tests::image::{self, Filesystem};
use tests::{Guest, host};

#[test]
fn what_is_written_to_a_disk_is_in_its_image() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    let content = image::random(dir.path(), 8 << 20);
    let file = File::create(&image).unwrap();
    file.set_len(16 << 20).unwrap();
    let output = Guest::new()
        .disk(&image)
        .input(tests::process::Input::File(File::open(&content).unwrap()))
        .run(
            "dd of=/dev/vda bs=64k iflag=fullblock conv=fsync 2>/dev/null; \
             echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda bs=1M count=8 2>/dev/null | sha256sum",
        );
    output
        .expect_code(0)
        .expect_in_stdout(&image::sha256(&content));
    let mut written = vec![0; 8 << 20];
    File::open(&image)
        .unwrap()
        .read_exact(&mut written)
        .unwrap();
    assert!(
        written == std::fs::read(&content).unwrap(),
        "the image is not what the guest wrote"
    );
}

#[test]
fn disks_come_in_their_order_and_read_only_ones_refuse_writes() {
    let dir = tempfile::tempdir().unwrap();
    let images = [1u64, 2, 3].map(|mib| {
        let image = dir.path().join(format!("{mib}.img"));
        let mut file = File::create(&image).unwrap();
        writeln!(file, "disk {mib}").unwrap();
        file.set_len(mib << 20).unwrap();
        image
    });
    let output = Guest::new()
        .disk(&images[0])
        .disk_read_only(&images[1])
        .disk(&images[2])
        .run(
            "for disk in vda vdb vdc; do \
               echo $(cat /sys/block/$disk/size /sys/block/$disk/ro /sys/block/$disk/serial) $(head -n 1 /dev/$disk); \
             done; \
             dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=fsync 2>/dev/null && echo written",
        );
    output.expect_stdout(
        "2048 0 mvm-disk0 disk 1\n4096 1 mvm-disk1 disk 2\n6144 0 mvm-disk2 disk 3\n",
    );
}

#[test]
fn fio_finds_all_it_wrote() {
    let Some(root) = image::debian(Filesystem::Squashfs, "fio_finds_all_it_wrote") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.img");
    File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let output = Guest::new()
        .cpus(2)
        .memory("1G")
        .rootfs(&root)
        .disk(&disk)
        .exec(&[
            "fio",
            "--name=verify",
            "--filename=/dev/vdb",
            "--rw=randrw",
            "--bsrange=512-64k",
            "--direct=1",
            "--ioengine=libaio",
            "--iodepth=16",
            "--io_size=16M",
            "--size=32M",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_fatal=1",
        ]);
    output.expect_code(0).expect_in_stdout("err= 0");
}

#[test]
fn a_full_host_is_an_error_for_the_guest_which_lives() {
    const TEST: &str = "a_full_host_is_an_error_for_the_guest_which_lives";
    if !host::is_emulated() && !host::is_root() {
        host::skipped(TEST, "only root can mount a small tmpfs");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let small = dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let output = host::run_beside_machines(&format!(
        "set -e; mount -t tmpfs -o size=8m small {small}; trap 'umount {small}' EXIT; \
         truncate -s 64M {small}/disk.img; \
         {mvm} run --boot-timeout 170s --disk {small}/disk.img -- sh -c \
           'dd if=/dev/zero of=/dev/vda bs=1M count=32 conv=fsync && echo all written; \
            head -c 4096 /dev/vda | wc -c; echo alive; exit 9'",
        small = small.display(),
        mvm = host::mvm_beside_machines(),
    ));
    output.expect_code(9).expect_stdout("4096\nalive\n");
    let errors = output.errors();
    assert!(
        errors.contains("No space left") || errors.contains("I/O error"),
        "the guest's dd says nothing of the failure: {output}"
    );
}
