//! A machine's control socket: who may use it, and that nothing that is sent there disturbs a machine.

use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::{fs, thread};

use serde_json::Value;
use tests::host::{self, LIMIT};
use tests::net::curl;
use tests::{Guest, Machines, Running};

fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Sends one message, and reads the answer.
fn ask(stream: &mut UnixStream, message: &str) -> Value {
    let len = u32::try_from(message.len()).unwrap();
    stream.write_all(&len.to_le_bytes()).unwrap();
    stream.write_all(message.as_bytes()).unwrap();
    let mut len = [0; 4];
    stream.read_exact(&mut len).unwrap();
    let mut answer = vec![0; u32::from_le_bytes(len) as usize];
    stream.read_exact(&mut answer).unwrap();
    serde_json::from_slice(&answer).unwrap()
}

/// Sends bytes and the end, and reads until the other end closes, which it must.
fn throw(socket: &Path, bytes: &[u8]) -> Vec<u8> {
    let mut stream = connect(socket);
    // It may close before it has read everything.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    }
    answer
}

#[test]
fn whatever_is_sent_to_a_control_socket_disturbs_no_machine() {
    let machines = Machines::new();
    let machine = machines.idle(Guest::new());
    let other = machines.idle(Guest::new());
    let steady = other.start(&["sh", "-c", "echo up; read x; echo down"]);
    steady.expect_stdout("up\n");
    let socket = machine.control_socket();
    let meta = fs::metadata(&socket).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);

    let request = br#"{"version":1,"op":"inspect"}"#;
    let mut whole = u32::try_from(request.len()).unwrap().to_le_bytes().to_vec();
    whole.extend_from_slice(request);
    let mut garbage = vec![0x5a; 100_000];
    garbage[..4].copy_from_slice(&1000u32.to_le_bytes());
    throw(&socket, b"");
    throw(&socket, b"\x01");
    throw(&socket, &whole[..whole.len() / 2]);
    throw(&socket, &[0xff; 4096]);
    throw(&socket, &[0; 4096]);
    throw(&socket, &garbage);
    throw(&socket, b"GET / HTTP/1.1\r\n\r\n");
    throw(&socket, b"GET /metrics HTTP/9\r\nnonsense");
    throw(&socket, b"POST /metrics HTTP/1.1\r\n\r\n");
    assert!(!throw(&socket, &whole).is_empty());

    // Half a message that stays half, from as many as there may be, keeps no one else out for ever.
    let held: Vec<_> = (0..50)
        .map(|_| {
            let mut stream = connect(&socket);
            let _ = stream.write_all(&whole[..6]);
            stream
        })
        .collect();
    machine
        .exec("echo alive")
        .expect_code(0)
        .expect_stdout("alive\n");
    drop(held);

    let mut stream = connect(&socket);
    let unknown = ask(&mut stream, r#"{"version":1,"op":"make-coffee"}"#);
    assert_eq!(unknown["error"]["kind"], "unknown-op", "{unknown}");
    let future = ask(&mut stream, r#"{"version":99,"op":"inspect"}"#);
    assert_eq!(future["error"]["kind"], "version", "{future}");
    let told = ask(&mut stream, r#"{"version":1,"op":"inspect","more":[1,2]}"#);
    assert_eq!(told["ok"]["inspection"]["name"], machine.name(), "{told}");

    machine.expect_state("running");
    other.expect_state("running");
    other
        .exec("echo undisturbed")
        .expect_stdout("undisturbed\n");
}

#[test]
fn metrics_are_read_over_http() {
    let machines = Machines::new();
    let machine = machines.idle(Guest::new().cpus(2));
    let socket = machine.control_socket();
    let fetch = || {
        let output = curl(&[
            "--unix-socket",
            socket.to_str().unwrap(),
            "http://localhost/metrics",
        ]);
        output.expect_code(0);
        output.text()
    };
    let value = |text: &str, name: &str| -> f64 {
        let line = text
            .lines()
            .find(|line| line.starts_with(name) && !line.starts_with('#'))
            .unwrap_or_else(|| panic!("no {name} in\n{text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let before = fetch();
    assert!(before.contains("# TYPE "), "{before}");
    assert!(before.contains(machine.name()), "{before}");
    machine
        .exec("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")
        .expect_code(0);
    let after = fetch();
    let name = "mvm_cpu_seconds_total";
    assert!(
        value(&after, name) > value(&before, name),
        "{name} does not grow:\n{before}\n{after}"
    );
    let stats = machine.mvm("stats", &["--no-stream", "--format", "json"]);
    stats.expect_code(0);
    let stats: Value = serde_json::from_slice(&stats.stdout).unwrap();
    let stats = match &stats {
        Value::Array(list) => list[0].clone(),
        other => other.clone(),
    };
    assert!(stats["cpu_ns"].as_u64().is_some_and(|ns| ns > 0), "{stats}");
    assert_eq!(stats["cpus"], 2, "{stats}");
}

#[test]
fn another_user_gets_nowhere_near_a_machine() {
    const TEST: &str = "another_user_gets_nowhere_near_a_machine";
    if !host::is_root() {
        host::skipped(TEST, "only root can be another user, too");
        return;
    }
    let machines = Machines::new();
    let machine = machines.idle(Guest::new());
    let home = tempfile::tempdir().unwrap();
    let program = home.path().join("mvm");
    fs::copy(host::mvm(), &program).unwrap();
    let mut own = Command::new("chown");
    own.args(["-R", "4321:4321"]).arg(home.path());
    host::must_succeed(own);
    let as_other = |state: &Path, words: &[&str]| {
        let mut command = host::tool_command("setpriv", "util-linux");
        command
            .args(["--reuid=4321", "--regid=4321", "--clear-groups"])
            .arg(&program)
            .args(words)
            .env("HOME", home.path())
            .env_remove("XDG_RUNTIME_DIR")
            .env("XDG_STATE_HOME", state)
            .current_dir("/");
        Running::start(command, Vec::new()).wait()
    };
    // In their own state directory there is no such machine; in ours they have no business.
    let own = home.path().join("state");
    as_other(&own, &["exec", machine.name(), "--", "true"])
        .expect_code(125)
        .expect_in_stderr("no machine named");
    for verb in ["exec", "stop", "inspect", "logs"] {
        let output = as_other(machines.state_dir(), &[verb, machine.name()]);
        assert_ne!(output.code(), 0, "{output}");
        assert_ne!(output.errors(), "", "{output}");
    }
    let mut socat = host::tool_command("setpriv", "util-linux");
    socat
        .args([
            "--reuid=4321",
            "--regid=4321",
            "--clear-groups",
            "curl",
            "-sS",
        ])
        .arg("--unix-socket")
        .arg(machine.control_socket())
        .arg("http://localhost/metrics");
    let output = Running::start(socat, Vec::new()).wait();
    assert_ne!(output.code(), 0, "{output}");
    machine.expect_state("running");
}

#[test]
fn many_verbs_at_once_are_all_answered() {
    let machines = Machines::new();
    let machine = machines.idle(Guest::new());
    thread::scope(|scope| {
        for number in 0..8 {
            let machine = &machine;
            scope.spawn(move || {
                for round in 0..5 {
                    let text = format!("{number}.{round}\n");
                    machine
                        .exec(&format!("echo {number}.{round}"))
                        .expect_code(0)
                        .expect_stdout(&text);
                    assert_eq!(machine.inspect()["name"], machine.name());
                }
            });
        }
    });
}
