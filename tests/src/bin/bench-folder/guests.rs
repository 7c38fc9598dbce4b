//! The guests in which folders are measured: one that mvm runs, with its share and a disk, and one that QEMU runs,
//! with virtiofs and 9p. Both have the same kernel, the same root and as much memory.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use tests::host::{self, eventually, must_succeed, tool_command};
use tests::process::Input;
use tests::{Running, image, kernel};

/// What each guest has of memory.
const MEMORY: &str = "3G";

/// What one piece of work may take: unpacking 40,000 files where machines are emulated.
const PATIENCE: Duration = Duration::from_secs(3 * 3600);

/// Between an event that was heard of and the next one.
const BETWEEN_EVENTS: Duration = Duration::from_millis(100);

/// A guest that does what it is told, by `peer files`.
#[derive(Debug)]
pub struct Guest {
    process: Running,
    lines: usize,
}

impl Guest {
    fn start(command: Command) -> Self {
        let process = Running::start(command, Input::Open);
        let mut guest = Self { process, lines: 0 };
        guest.expect("listening");
        guest
    }

    /// Its next line.
    pub fn line(&mut self) -> String {
        let line = self.process.expect_line_within(self.lines, PATIENCE);
        self.lines += 1;
        line.trim_end_matches('\r').to_owned()
    }

    /// Waits for this line. What the kernel has to say may come before it.
    pub fn expect(&mut self, wanted: &str) {
        while self.line() != wanted {}
    }

    /// When it has heard of a file, in seconds since 1970 by its own clock.
    fn heard(&mut self, name: &str) -> f64 {
        loop {
            let line = self.line();
            if let Some((found, when)) = line
                .strip_prefix("+ ")
                .and_then(|rest| rest.split_once(' '))
                && found == name
            {
                return when.parse().expect("a time is a number");
            }
        }
    }

    /// Tells it to do something, and does not wait.
    pub fn tell(&mut self, work: &str) {
        self.process.write(format!("{work}\n").as_bytes());
    }

    /// How long something takes it, in seconds; why it cannot be done.
    pub fn work(&mut self, work: &str) -> Result<f64, String> {
        self.tell(work);
        self.done()
    }

    /// Waits until what it was told last is done: how long it took, or why it cannot be done.
    fn done(&mut self) -> Result<f64, String> {
        loop {
            let line = self.line();
            if let Some(reason) = line.strip_prefix("! ") {
                return Err(reason.to_owned());
            }
            if let Some(seconds) = line.strip_prefix("= ") {
                return seconds.parse().map_err(|_| line);
            }
        }
    }

    /// Ends it without a farewell.
    pub fn end(self) {
        self.process.signal(rustix::process::Signal::TERM);
        self.process.wait();
    }
}

/// Where everything is on the host of the guests, in memory.
#[derive(Debug)]
pub struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// A new one, with `tree` unpacked in what is shared.
    pub fn new(tree: &Path) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in memory can be made");
        let place = Self { dir };
        for name in ["shared", "run", "state"] {
            fs::create_dir_all(place.path(name)).expect("a directory can be made");
        }
        let private = fs::Permissions::from_mode(0o700);
        fs::set_permissions(place.path("run"), private).expect("a mode can be set");
        let mut command = Command::new("tar");
        command.arg("xf").arg(tree);
        command.arg("-C").arg(place.path("shared"));
        must_succeed(command);
        fs::copy(host::peer(), place.path("shared/peer")).expect("the peer can be copied");
        place
    }

    /// A file or directory there.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The guest of mvm: its share is at `/share`, and a disk of its own at `/disk`.
    pub fn mvm(&self, root: &Path) -> Guest {
        let disk = self.path("disk.ext4");
        must_succeed({
            let mut command = tool_command("mkfs.ext4", "e2fsprogs");
            let at_once = "lazy_itable_init=0,lazy_journal_init=0";
            command.args(["-q", "-F", "-E", at_once]).arg(&disk);
            command.arg("6G");
            command
        });
        let mut command = Command::new(host::mvm());
        command
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("XDG_STATE_HOME", self.path("state"));
        command.args(["run", "-i", "--memory", MEMORY, "--boot-timeout", "170s"]);
        command.arg("--kernel").arg(built_kernel());
        command
            .arg("--rootfs")
            .arg(format!("{}:ro", root.display()));
        command.arg("--disk").arg(disk);
        let shared = self.path("shared");
        command
            .arg("-v")
            .arg(format!("{}:/share", shared.display()));
        let script = "mkdir -p /disk && mount /dev/vdb /disk && cp /share/peer /tmp/peer && exec /tmp/peer files";
        command.args(["--", "sh", "-c", script]);
        Guest::start(command)
    }

    /// The guest of QEMU: virtiofs is at `/tmp/virtiofs`, where there is a virtiofsd, and 9p at `/tmp/9p`.
    pub fn qemu(&self, root: &Path) -> (Guest, Option<Running>) {
        const INIT: &str = "\
            mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev\n\
            mkdir /new; mount -o ro,noload /dev/vda /new; mount -t tmpfs tmp /new/tmp\n\
            mkdir /new/tmp/virtiofs /new/tmp/9p\n\
            mount -t virtiofs virtiofs /new/tmp/virtiofs 2>/dev/null\n\
            mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,cache=mmap 9p /new/tmp/9p\n\
            for dir in proc sys dev; do mount --bind /$dir /new/$dir; done\n\
            cp /new/tmp/9p/peer /new/tmp/peer\n\
            exec </dev/ttyS0 >/dev/ttyS0 2>&1\n\
            stty raw -echo; echo\n\
            exec chroot /new /tmp/peer files\n";
        let daemon = self.virtiofsd();
        let shared = self.path("shared");
        let mut command = tool_command("qemu-system-x86_64", "qemu-system-x86");
        command.args("-accel kvm -M q35,memory-backend=memory -cpu host".split(' '));
        command.args("-nodefaults -no-reboot -nographic -serial stdio".split(' '));
        command.args(["-append", "console=ttyS0 quiet loglevel=0 panic=-1"]);
        command.args(["-m", MEMORY, "-object"]);
        command.arg(format!(
            "memory-backend-memfd,id=memory,share=on,size={MEMORY}"
        ));
        command.arg("-kernel").arg(built_kernel());
        command
            .arg("-initrd")
            .arg(image::initramfs(self.dir.path(), INIT));
        command.arg("-drive");
        command.arg(format!(
            "file={},if=virtio,format=raw,readonly=on",
            root.display()
        ));
        command.arg("-virtfs");
        command.arg(format!(
            "local,id=shared,path={},mount_tag=9p,security_model=none,multidevs=remap",
            shared.display()
        ));
        if daemon.is_some() {
            let socket = self.path("virtiofs.sock");
            let chardev = format!("socket,id=virtiofs,path={}", socket.display());
            let device = "vhost-user-fs-pci,chardev=virtiofs,tag=virtiofs,queue-size=1024";
            command.args(["-chardev", &chardev, "-device", device]);
        }
        (Guest::start(command), daemon)
    }

    fn virtiofsd(&self) -> Option<Running> {
        let program = find_virtiofsd()?;
        let help = Command::new(&program).arg("--help").output().ok()?;
        let socket = self.path("virtiofs.sock");
        let shared = self.path("shared");
        let mut command = Command::new(program);
        command.arg(format!("--socket-path={}", socket.display()));
        match String::from_utf8_lossy(&help.stdout).contains("--shared-dir") {
            true => {
                command.arg("--shared-dir").arg(&shared);
                command.args(["--cache", "auto", "--sandbox", "none"]);
            }
            // The one that came with QEMU before it was a program of its own.
            false => {
                command.args(["-o", &format!("source={}", shared.display())]);
                command.args(["-o", "cache=auto,sandbox=chroot"]);
            }
        }
        let daemon = Running::start(command, Vec::new());
        eventually("virtiofsd listens", || socket.exists().then_some(()));
        Some(daemon)
    }
}

fn find_virtiofsd() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = env::split_paths(&path).chain(["/usr/libexec".into(), "/usr/lib/qemu".into()]);
    let mut programs = dirs.map(|dir| dir.join("virtiofsd"));
    programs.find(|program| program.is_file())
}

fn built_kernel() -> PathBuf {
    let name = kernel::built("bench-folder").expect("the kernel of `mvm kernel build` is measured");
    kernel::cache_dir().join(name).join("vmlinux")
}

/// How long it takes from a file's appearance on the host to the event in the guest, in seconds, at most.
///
/// Host and guest have clocks of their own, which differ by some amount. No news of an event is on the host before the event
/// is in the guest, so the least of what that seems to take is more than they differ by.
///
/// The files are in a directory of their own, which nobody has watched, and there is some time between two, as where
/// somebody saves them.
pub fn event_delays(guest: &mut Guest, place: &Place, count: usize) -> Vec<f64> {
    let dir = tempfile::tempdir_in(place.path("shared")).expect("a directory can be made");
    let name = dir.path().file_name().unwrap_or_default();
    guest.tell(&format!("events /share/{}", name.display()));
    guest.expect("listening");
    let now = || {
        UNIX_EPOCH
            .elapsed()
            .expect("it is after 1970")
            .as_secs_f64()
    };
    // The first ones have the guest's watch found.
    let mut there = Vec::new();
    let mut back = f64::INFINITY;
    for number in 0..count {
        let name = format!("file{number}");
        let start = now();
        fs::write(dir.path().join(&name), "x").expect("a file can be written");
        let heard = guest.heard(&name);
        there.push(heard - start);
        back = back.min(now() - heard);
        thread::sleep(BETWEEN_EVENTS);
    }
    fs::write(dir.path().join("stop"), "").expect("a file can be written");
    guest.heard("stop");
    guest.done().expect("the watch ends");
    there.into_iter().map(|seems| seems + back).collect()
}
