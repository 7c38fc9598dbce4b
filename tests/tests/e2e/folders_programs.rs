//! What programs do in a shared folder of a guest, and what the host does to it meanwhile.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::fs::{CWD, RenameFlags};
use tempfile::TempDir;
use tests::host::{self, eventually};
use tests::{Guest, Machines};

/// Says that something is over when it is dropped.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn shared(dir: &TempDir, options: &str) -> Guest {
    Guest::new().option("-v", format!("{}:/project{options}", dir.path().display()))
}

#[test]
fn shells_append_unpack_rename_and_remove_in_a_folder() {
    for options in ["", ":cache=private"] {
        let dir = tempfile::tempdir().unwrap();
        let script = "set -e; cd /project
            for w in 1 2 3; do (for n in $(seq 15); do echo $w $n >>log; done) & done; wait
            sort -u log | wc -l
            for d in 1 2 3 4; do mkdir -p tree/$d; for f in $(seq 25); do echo $d $f >tree/$d/$f; done; done
            tar cf tree.tar tree; rm -r tree; tar xf tree.tar; cat tree/*/* | wc -l
            mv tree/3 moved; exec 3<moved/9; echo new >other; mv other moved/9; cat <&3; cat moved/9
            exec 4<>gone; rm gone; echo still >&4; ls gone 2>/dev/null || echo unlinked
            dd if=/dev/zero of=sparse bs=1 count=1 seek=5000000000 2>/dev/null
            stat -c '%s' sparse; [ $(stat -c '%b' sparse) -lt 100 ] && echo holes
            touch -d '1969-12-31 23:59:58' old; stat -c '%Y' old
            rm -r tree moved; ls | tr '\\n' ' '";
        shared(&dir, options)
            .run(script)
            .expect_code(0)
            .expect_stdout(
                "45\n100\n3 9\nnew\nunlinked\n5000000001\nholes\n-2\nlog old sparse tree.tar ",
            );
    }
}

#[test]
fn what_the_host_swaps_for_a_link_is_neither_read_nor_written_through_it() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "outside\n").unwrap();
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("swap")).unwrap();
    fs::write(dir.path().join("swap/secret"), "inside\n").unwrap();
    symlink(outside.path(), dir.path().join("link")).unwrap();
    let done = AtomicBool::new(false);
    let output = thread::scope(|scope| {
        // However the guest ends.
        let ends = Ends(&done);
        scope.spawn(|| {
            let (one, other) = (dir.path().join("swap"), dir.path().join("link"));
            while !done.load(Ordering::Relaxed) {
                rustix::fs::renameat_with(CWD, &one, CWD, &other, RenameFlags::EXCHANGE).unwrap();
                thread::sleep(Duration::from_millis(1));
            }
        });
        let script = "cd /project; for n in $(seq 40); do
            cat swap/secret 2>/dev/null; echo x >swap/new$n; rm -f swap/new$n; mkdir swap/dir; rmdir swap/dir
            chmod 600 swap/secret; mv swap/secret swap/moved; mv swap/moved swap/secret; done 2>/dev/null | sort -u; echo end";
        let output = shared(&dir, ":cache=strict").run(script);
        drop(ends);
        output
    });
    output.expect_code(0).expect_stdout("inside\nend\n");
    let left: Vec<_> = fs::read_dir(outside.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["secret"]);
    let secret = outside.path().join("secret");
    assert_eq!(fs::read_to_string(&secret).unwrap(), "outside\n");
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(
        fs::metadata(&secret).unwrap().permissions().mode() & 0o777,
        0o644
    );
}

#[test]
fn a_guest_gets_nowhere_by_links_devices_and_fifos() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("shared")).unwrap();
    fs::write(dir.path().join("beside"), "beside\n").unwrap();
    symlink("../beside", dir.path().join("shared/up")).unwrap();
    let magic = format!("/proc/self/root{}/beside", dir.path().display());
    symlink(magic, dir.path().join("shared/magic")).unwrap();
    let mut fifo = std::process::Command::new("mkfifo");
    fifo.arg(dir.path().join("shared/fifo"));
    host::must_succeed(fifo);
    let script = "cd /project; cat up ../beside 2>/dev/null; cat magic 2>/dev/null
        mknod null c 1 3; echo x >null || echo no device; ln -s ../../beside link; cat link 2>/dev/null
        cp /bin/busybox su; chmod 4755 su; stat -c %a su
        (echo through >fifo) & cat fifo; wait
        ls /project/.. | grep beside; echo end";
    let folder = format!("{}:/project", dir.path().join("shared").display());
    let output = Guest::new().option("-v", folder).run(script);
    output
        .expect_code(0)
        .expect_in_stdout("4755\nthrough\nend\n")
        .expect_in_stdout("no device\n");
    assert!(!output.text().contains("beside"), "{output}");
    use std::os::unix::fs::MetadataExt;
    let about = |name: &str| fs::symlink_metadata(dir.path().join("shared").join(name)).unwrap();
    assert!(about("null").is_file() && about("null").len() == 0);
    assert_eq!(about("su").mode() & 0o7777, 0o755);
}

#[test]
fn a_folder_that_is_deleted_on_the_host_is_empty_in_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("file"), "data\n").unwrap();
    let machines = Machines::new();
    let machine =
        machines.idle(Guest::new().option("-v", format!("{}:/project", shared.display())));
    machine.exec("cat /project/file").expect_stdout("data\n");
    fs::remove_dir_all(&shared).unwrap();
    eventually("the guest sees an empty directory", || {
        (machine.exec("ls -A /project").text().is_empty()).then_some(())
    });
    machine
        .exec("(echo x >/project/new) 2>&1 | grep -o 'nonexistent directory\\|No such file'; mkdir /project/d 2>/dev/null || echo no")
        .expect_in_stdout("no\n");
    machine
        .exec("cd /project && pwd")
        .expect_stdout("/project\n");
}
