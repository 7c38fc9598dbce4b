//! Sessions end to end, over Unix sockets instead of vsock: real commands run on this machine.
//!
//! The tests need what a build machine has: /bin/sh, coreutils, /proc and /dev/pts. They start
//! processes through sessions or [`run_outside`] only, because the reaper takes every child of the test
//! process.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use agent::protocol::{
    self, Exec, ExitStatus, FromSession, Open, Refusal, StreamKind, ToSession, WindowSize,
};

use crate::forward;
use crate::process;
use crate::reap::Reaper;
use crate::root::{Missing, Prepared};
use crate::serve::{self, Machine};
use crate::tree::Tree;

/// Long enough for a loaded machine; a test that gets here has failed.
const PATIENCE: Duration = Duration::from_secs(60);

fn machine() -> &'static Arc<Machine> {
    static MACHINE: OnceLock<Arc<Machine>> = OnceLock::new();
    MACHINE.get_or_init(|| {
        inherited();
        let root = Prepared {
            tree: Tree::own().unwrap(),
            missing: Missing::Nothing,
        };
        let power_off = |_: &Machine, _| panic!("no test asks for power-off");
        let (initramfs, forwarder) = (Tree::own().unwrap(), forward::Handle::new().unwrap());
        let machine = Machine::new(root, initramfs, Reaper::default(), forwarder, power_off);
        let machine = Arc::new(machine);
        let reaping = Arc::clone(&machine);
        thread::spawn(move || reaping.reaper.run());
        machine
    })
}

/// Runs a program that is no session's; gives how it ended and what it printed.
pub fn run_outside(command: &mut Command) -> std::io::Result<(ExitStatus, String)> {
    let (spawned, child) = machine().reaper.spawn(command.stdout(Stdio::piped()))?;
    let mut printed = String::new();
    if let Some(mut stdout) = spawned.stdout {
        stdout.read_to_string(&mut printed)?;
    }
    Ok((child.exit.wait(PATIENCE)?, printed))
}

/// A connection from the host that has said nothing yet.
fn connect_silently() -> UnixStream {
    static DOOR: OnceLock<SocketAddr> = OnceLock::new();
    let door = DOOR.get_or_init(|| {
        let machine = machine();
        let (handle, root) = (machine.forwarder.clone(), Tree::own().unwrap());
        let hand_on = |connection, open| serve::start(machine, connection, open);
        forward::tests::start(handle, root, hand_on)
    });
    let host = UnixStream::connect_addr(door).unwrap();
    host.set_read_timeout(Some(PATIENCE)).unwrap();
    host
}

pub fn connect(open: &Open) -> UnixStream {
    let host = connect_silently();
    protocol::send(&host, open).unwrap();
    host
}

fn shell(script: &str) -> Exec {
    exec(&["/bin/sh", "-c", script])
}

fn exec(argv: &[&str]) -> Exec {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    // Root by default, as in a machine; where somebody else runs the tests, that user.
    let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
    let user = (!uid.is_root()).then(|| format!("{uid}:{gid}"));
    Exec {
        session: NEXT.fetch_add(1, Ordering::Relaxed),
        argv: argv.iter().map(|text| text.as_bytes().to_vec()).collect(),
        env: Vec::new(),
        clear_env: false,
        cwd: Some(b"/".to_vec()),
        user,
        terminal: None,
        stdin: false,
        cwd_or_home: false,
        in_initramfs: false,
    }
}

/// The host's side of a session.
struct Session {
    control: UnixStream,
    stdin: Option<UnixStream>,
    stdout: UnixStream,
    stderr: Option<UnixStream>,
}

/// What a command did.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

impl Session {
    fn open(exec: Exec) -> Self {
        let session = exec.session;
        let (has_terminal, has_stdin) = (exec.terminal.is_some(), exec.stdin);
        let stream = |kind| connect(&Open::Stream { session, kind });
        let control = connect(&Open::Exec(exec));
        if has_terminal {
            let stdout = stream(StreamKind::Terminal);
            return Self {
                control,
                stdin: Some(stdout.try_clone().unwrap()),
                stdout,
                stderr: None,
            };
        }
        Self {
            control,
            stdin: has_stdin.then(|| stream(StreamKind::Stdin)),
            stdout: stream(StreamKind::Stdout),
            stderr: Some(stream(StreamKind::Stderr)),
        }
    }

    /// Waits for the first message; panics where the command was refused.
    fn started(&self) -> u32 {
        match self.receive() {
            FromSession::Started { pid } => pid,
            other => panic!("the command did not start: {other:?}"),
        }
    }

    fn receive(&self) -> FromSession {
        let message = protocol::receive(&self.control).expect("the control connection broke");
        message.expect("the control connection ended early")
    }

    fn exited(&self) -> ExitStatus {
        match self.receive() {
            FromSession::Exited(status) => status,
            other => panic!("expected the exit, got {other:?}"),
        }
    }

    fn say(&self, message: &ToSession) {
        protocol::send(&self.control, message).unwrap();
    }

    /// Reads both outputs to their ends, then the exit status.
    fn finish(self) -> Outcome {
        let stdout = read_all(self.stdout.try_clone().unwrap());
        let stderr = self
            .stderr
            .as_ref()
            .map(|stream| read_all(stream.try_clone().unwrap()));
        let text =
            |reading: JoinHandle<Vec<u8>>| String::from_utf8(reading.join().unwrap()).unwrap();
        Outcome {
            stdout: text(stdout),
            stderr: stderr.map(text).unwrap_or_default(),
            status: self.exited(),
        }
    }
}

fn read_all(mut stream: UnixStream) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        stream
            .read_to_end(&mut bytes)
            .expect("the stream did not end");
        bytes
    })
}

fn run(exec: Exec) -> Outcome {
    let session = Session::open(exec);
    session.started();
    session.finish()
}

fn stdout_of(exec: Exec) -> String {
    let outcome = run(exec);
    assert_eq!(
        (outcome.status, outcome.stderr.as_str()),
        (ExitStatus::Code(0), "")
    );
    outcome.stdout
}

fn refusal(exec: Exec) -> (Refusal, String) {
    match Session::open(exec).receive() {
        FromSession::Refused { reason, message } => (reason, message),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

/// Waits for something that happens soon, or fails the test with `what`.
pub fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !happened() {
        assert!(Instant::now() < deadline, "this did not happen: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn is_running(pid: i32) -> bool {
    let is_it = |process: &process::Process| process.pid == pid && process.state != b'Z';
    process::list().unwrap().iter().any(is_it)
}

#[test]
fn output_error_and_exit_code_come_back_apart() {
    let outcome = run(shell("echo out; echo err >&2; exit 7"));
    let expected = Outcome {
        status: ExitStatus::Code(7),
        stdout: "out\n".to_owned(),
        stderr: "err\n".to_owned(),
    };
    assert_eq!(outcome, expected);
}

#[test]
fn a_command_that_kills_itself_reports_the_signal() {
    let outcome = run(shell("kill -KILL $$"));
    assert_eq!(outcome.status, ExitStatus::Signal(libc::SIGKILL));
    assert_eq!(outcome.status.shell_code(), 137);
}

#[test]
fn a_signal_from_the_host_reaches_the_whole_process_group() {
    let session = Session::open(shell(
        "trap 'echo caught; exit 3' USR1; sleep 1000 & echo ready; wait",
    ));
    session.started();
    let mut ready = [0; 6];
    (&session.stdout).read_exact(&mut ready).unwrap();
    session.say(&ToSession::Signal(libc::SIGUSR1));
    let outcome = session.finish();
    assert_eq!(
        (outcome.status, outcome.stdout.as_str()),
        (ExitStatus::Code(3), "caught\n")
    );
}

#[test]
fn a_signal_number_that_does_not_exist_changes_nothing() {
    let mut exec = exec(&["cat"]);
    exec.stdin = true;
    let mut session = Session::open(exec);
    session.started();
    for signal in [0, -1, 65, i32::MAX, i32::MIN] {
        session.say(&ToSession::Signal(signal));
    }
    drop(session.stdin.take());
    assert_eq!(session.finish().status, ExitStatus::Code(0));
}

#[test]
fn the_commands_signals_are_all_at_their_defaults() {
    let status = stdout_of(exec(&["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"]));
    for line in status.lines() {
        let mask = line.split_whitespace().last().unwrap();
        assert_eq!(
            u64::from_str_radix(mask, 16),
            Ok(0),
            "left over from the agent: {line}"
        );
    }
}

/// The descriptors that whoever started the tests left open for every child.
fn inherited() -> &'static [String] {
    static INHERITED: OnceLock<Vec<String>> = OnceLock::new();
    INHERITED.get_or_init(|| {
        let is_inherited = |name: &String| {
            let info = fs::read_to_string(format!("/proc/self/fdinfo/{name}")).unwrap_or_default();
            let flags = info
                .lines()
                .find_map(|line| line.strip_prefix("flags:"))
                .unwrap_or("0");
            i32::from_str_radix(flags.trim(), 8).unwrap() & libc::O_CLOEXEC == 0
        };
        let names = fs::read_dir("/proc/self/fd").unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(is_inherited).collect()
    })
}

#[test]
fn no_descriptor_of_the_agent_leaks_into_a_command() {
    let inherited = inherited();
    let mut others: Vec<Session> = Vec::new();
    for _ in 0..4 {
        let session = Session::open(exec(&["sleep", "1000"]));
        session.started();
        others.push(session);
    }
    let listing = stdout_of(shell("ls /proc/$$/fd"));
    // The shell keeps one for itself, from 10 on.
    let leaked = |name: &&str| {
        !["0", "1", "2", "10"].contains(name) && !inherited.iter().any(|known| known == name)
    };
    let leaked: Vec<&str> = listing.lines().filter(leaked).collect();
    assert!(leaked.is_empty(), "the command has {leaked:?} open");
}

#[test]
fn the_end_of_the_hosts_input_is_the_commands_end_of_file() {
    let mut exec = shell("cat; echo done");
    exec.stdin = true;
    let session = Session::open(exec);
    session.started();
    let mut stdin = session.stdin.as_ref().unwrap();
    stdin.write_all(b"some input\n").unwrap();
    stdin.shutdown(Shutdown::Write).unwrap();
    assert_eq!(session.finish().stdout, "some input\ndone\n");
}

#[test]
fn without_input_a_command_reads_dev_null() {
    assert_eq!(
        stdout_of(shell("cat; readlink /proc/self/fd/0")),
        "/dev/null\n"
    );
}

#[test]
fn a_quarter_gibibyte_comes_back_through_cat_unchanged() {
    const BLOCK: usize = 1 << 20;
    const BLOCKS: u64 = 256;
    let mut exec = exec(&["cat"]);
    exec.stdin = true;
    let mut session = Session::open(exec);
    session.started();
    let mut stdin = session.stdin.take().unwrap();
    let block = |number: u64| -> Vec<u8> {
        let words = (0..BLOCK as u64 / 8)
            .map(|word| (number * 131_071 + word).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        words.flat_map(u64::to_le_bytes).collect()
    };
    let writer = thread::spawn(move || {
        for number in 0..BLOCKS {
            stdin.write_all(&block(number)).unwrap();
        }
    });
    let mut received = vec![0; BLOCK];
    for number in 0..BLOCKS {
        (&session.stdout).read_exact(&mut received).unwrap();
        assert!(received == block(number), "block {number} differs");
    }
    writer.join().unwrap();
    let outcome = session.finish();
    assert_eq!(
        (outcome.status, outcome.stdout.len()),
        (ExitStatus::Code(0), 0)
    );
}

#[test]
fn a_command_that_closes_its_input_goes_on() {
    let mut exec = shell("exec <&-; sleep 0.1; echo alive");
    exec.stdin = true;
    let session = Session::open(exec);
    session.started();
    let mut stdin = session.stdin.as_ref().unwrap().try_clone().unwrap();
    let writer = thread::spawn(move || while stdin.write_all(&[0; 65536]).is_ok() {});
    let outcome = session.finish();
    assert_eq!(
        (outcome.status, outcome.stdout.as_str()),
        (ExitStatus::Code(0), "alive\n")
    );
    writer.join().unwrap();
}

#[test]
fn a_host_that_stops_reading_output_gives_the_command_a_broken_pipe() {
    let session = Session::open(exec(&["yes"]));
    session.started();
    session.stdout.shutdown(Shutdown::Both).unwrap();
    assert_eq!(session.exited(), ExitStatus::Signal(libc::SIGPIPE));
}

#[test]
fn output_ends_with_the_command_even_where_a_descendant_holds_the_pipe() {
    let session = Session::open(shell("echo before; sleep 1000 & echo $!"));
    session.started();
    let outcome = session.finish();
    let (text, pid) = outcome.stdout.trim_end().rsplit_once('\n').unwrap();
    assert_eq!((outcome.status, text), (ExitStatus::Code(0), "before"));
    let pid: i32 = pid.parse().unwrap();
    assert!(
        is_running(pid),
        "the command's end took its descendant with it"
    );
    stdout_of(exec(&["kill", &pid.to_string()]));
}

#[test]
fn a_descendant_that_writes_for_ever_does_not_keep_the_stream_open() {
    let outcome = run(shell("yes & echo $! >&2; exec sleep 0.2"));
    assert_eq!(outcome.status, ExitStatus::Code(0));
    // `yes` itself ends with SIGPIPE, as nobody reads any more.
    let pid = outcome.stderr.trim().parse().unwrap();
    eventually("the writer ends", || !is_running(pid));
}

#[test]
fn output_written_just_before_the_end_is_all_there() {
    for _ in 0..20 {
        let outcome = run(exec(&["head", "-c", "200000", "/dev/zero"]));
        assert_eq!(outcome.stdout.len(), 200_000);
    }
}

#[test]
fn a_terminal_has_the_size_that_was_asked_for_and_follows_it() {
    let mut exec =
        shell("stty size; trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.05; done");
    exec.terminal = Some(WindowSize {
        rows: 33,
        cols: 101,
    });
    let session = Session::open(exec);
    session.started();
    let mut ready = [0; 15];
    (&session.stdout).read_exact(&mut ready).unwrap();
    assert_eq!(&ready, b"33 101\r\nready\r\n");
    session.say(&ToSession::Resize(WindowSize {
        rows: 50,
        cols: 132,
    }));
    assert_eq!(session.finish().stdout, "50 132\r\n");
}

#[test]
fn a_terminal_is_the_controlling_one_and_ctrl_c_interrupts() {
    let mut exec = exec(&["cat", "/dev/tty"]);
    exec.terminal = Some(WindowSize { rows: 24, cols: 80 });
    let session = Session::open(exec);
    session.started();
    session.stdin.as_ref().unwrap().write_all(&[3]).unwrap();
    assert_eq!(session.exited(), ExitStatus::Signal(libc::SIGINT));
}

#[test]
fn the_end_of_input_on_a_terminal_is_typed_as_ctrl_d() {
    let mut exec = shell("stty -echo; echo ready; cat; echo end");
    exec.terminal = Some(WindowSize { rows: 24, cols: 80 });
    let session = Session::open(exec);
    session.started();
    let mut ready = [0; 7];
    (&session.stdout).read_exact(&mut ready).unwrap();
    let mut stdin = session.stdin.as_ref().unwrap();
    stdin.write_all(b"line\n").unwrap();
    stdin.shutdown(Shutdown::Write).unwrap();
    assert_eq!(session.finish().stdout, "line\r\nend\r\n");
}

#[test]
fn a_signal_on_a_terminal_goes_to_its_foreground_group() {
    let mut exec = shell(
        "set -m; sh -c 'trap \"echo job; exit\" USR1; echo ready; while :; do sleep 0.05; done'; echo shell",
    );
    exec.terminal = Some(WindowSize { rows: 24, cols: 80 });
    let session = Session::open(exec);
    session.started();
    let mut ready = [0; 7];
    (&session.stdout).read_exact(&mut ready).unwrap();
    session.say(&ToSession::Signal(libc::SIGUSR1));
    // The inner shell may mention the sleep that the signal ended, too.
    let stdout = session.finish().stdout;
    assert!(stdout.ends_with("job\r\nshell\r\n"), "{stdout:?}");
}

#[test]
fn a_host_that_goes_away_ends_the_command_with_all_of_its_session() {
    let session = Session::open(shell("sleep 1000 & echo $!; trap '' HUP; wait; sleep 1000"));
    let pid = i32::try_from(session.started()).unwrap();
    let mut line = [0; 16];
    let length = (&session.stdout).read(&mut line).unwrap();
    let descendant: i32 = std::str::from_utf8(&line[..length])
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    drop(session);
    eventually("the command ends", || !is_running(pid));
    eventually("its descendant ends", || !is_running(descendant));
}

#[test]
fn a_command_that_ignores_the_hang_up_is_killed() {
    let session = Session::open(shell(
        "trap '' HUP TERM; echo ready; while :; do sleep 0.1; done",
    ));
    let pid = i32::try_from(session.started()).unwrap();
    (&session.stdout).read_exact(&mut [0; 6]).unwrap();
    drop(session);
    eventually("the command is killed", || !is_running(pid));
}

#[test]
fn what_cannot_run_is_refused_with_its_reason() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &str, mode| {
        let path = directory.path().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let plain = write("plain", "echo hi\n", 0o644);
    let no_format = write("no-format", "echo hi\n", 0o755);
    let no_interpreter = write("no-interpreter", "#!/no/such/interpreter\n", 0o755);
    for (program, expected) in [
        ("no-such-program", Refusal::NotFound),
        ("/no/such/program", Refusal::NotFound),
        ("/etc/passwd/below", Refusal::NotFound),
        ("", Refusal::NotFound),
        ("/etc", Refusal::NotExecutable),
        (plain.as_str(), Refusal::NotExecutable),
        (no_format.as_str(), Refusal::NotExecutable),
        (no_interpreter.as_str(), Refusal::NotExecutable),
    ] {
        let (reason, message) = refusal(exec(&[program]));
        assert_eq!(reason, expected, "{program:?}: {message}");
        assert!(
            message.starts_with(program),
            "{program:?} is not named: {message}"
        );
    }
}

#[test]
fn a_program_of_a_later_directory_in_path_is_found() {
    let mut exec = exec(&["true"]);
    exec.env = vec![(
        b"PATH".to_vec(),
        b"/no/such:/etc/passwd:/usr/bin:/bin".to_vec(),
    )];
    assert_eq!(stdout_of(exec), "");
}

#[test]
fn an_unknown_user_or_directory_is_refused() {
    let mut unknown = exec(&["true"]);
    unknown.user = Some("no-such-user".to_owned());
    let (reason, message) = refusal(unknown);
    assert_eq!(reason, Refusal::Other);
    assert!(message.contains("no-such-user"), "{message}");

    let mut nowhere = exec(&["true"]);
    nowhere.cwd = Some(b"/no/such/directory".to_vec());
    let (reason, message) = refusal(nowhere);
    assert_eq!(reason, Refusal::Other);
    assert!(message.contains("/no/such/directory"), "{message}");
}

#[test]
fn a_command_runs_as_the_user_in_the_directory_and_environment_asked_for() {
    if !rustix::process::getuid().is_root() {
        return; // Only root can become another user.
    }
    let mut exec = shell("id -u; id -g; id -G; pwd; echo $A; touch /dev/stdout");
    exec.user = Some("4242:77".to_owned());
    exec.cwd = Some(b"/usr".to_vec());
    exec.env = vec![(b"A".to_vec(), b"one two".to_vec())];
    assert_eq!(stdout_of(exec), "4242\n77\n77\n/usr\none two\n");
}

#[test]
fn an_empty_request_is_a_login_shell() {
    let mut exec = exec(&[]);
    exec.stdin = true;
    let session = Session::open(exec);
    session.started();
    let mut stdin = session.stdin.as_ref().unwrap();
    stdin.write_all(b"echo $0; exit 5\n").unwrap();
    let outcome = session.finish();
    assert_eq!(outcome.status, ExitStatus::Code(5));
    assert!(
        outcome.stdout.starts_with('-'),
        "not a login shell: {}",
        outcome.stdout
    );
}

#[test]
fn many_sessions_one_after_the_other_leave_nothing_behind() {
    run(exec(&["true"]));
    for number in 0..200 {
        let outcome = run(shell(&format!("echo {number}")));
        assert_eq!(outcome.stdout, format!("{number}\n"));
    }
    // Other tests run meanwhile, so only a count that grows by hundreds is a leak.
    eventually("descriptors are closed", || {
        fs::read_dir("/proc/self/fd").unwrap().count() < 300
    });
    eventually("threads end", || {
        fs::read_dir("/proc/self/task").unwrap().count() < 150
    });
}

#[test]
fn many_sessions_at_one_time_do_not_mix() {
    let run_one = |number: usize| {
        let mut exec = shell("read line; sleep 0.1; echo $line; echo $line >&2; exit 9");
        exec.stdin = true;
        let session = Session::open(exec);
        session.started();
        let line = format!("session {number}\n");
        session
            .stdin
            .as_ref()
            .unwrap()
            .write_all(line.as_bytes())
            .unwrap();
        let outcome = session.finish();
        let status = ExitStatus::Code(9);
        assert_eq!(
            outcome,
            Outcome {
                status,
                stdout: line.clone(),
                stderr: line
            }
        );
    };
    thread::scope(|scope| {
        for number in 0..64 {
            scope.spawn(move || run_one(number));
        }
    });
}

#[test]
fn orphans_do_not_stay_as_zombies() {
    // The test process is no PID 1, so it asks for orphans itself, as the kernel gives them to PID 1.
    // SAFETY: prctl(PR_SET_CHILD_SUBREAPER) takes no memory.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    let listed = stdout_of(shell("for i in 1 2 3 4 5; do (sleep 0.1 & echo $!); done"));
    for pid in listed.lines().map(|pid| pid.parse::<i32>().unwrap()) {
        eventually("an orphan is reaped", || {
            !fs::exists(format!("/proc/{pid}")).unwrap()
        });
    }
}

#[test]
fn garbage_and_silence_end_a_connection_and_nothing_else() {
    let mut host = connect_silently();
    host.write_all(&[0xff; 64]).unwrap();
    let mut rest = Vec::new();
    // Unread bytes may turn the end into a reset; both are an end.
    let _ = host.read_to_end(&mut rest);
    assert!(rest.is_empty(), "garbage was answered with {rest:?}");
    assert_eq!(stdout_of(shell("echo still here")), "still here\n");
}
