//! Wrong words for machines that run and for the forwarder: one sentence, an exit code, and every other
//! machine and connection undisturbed.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;

use tests::net::{connect, connect_eventually, curl, exchange, free_port};
use tests::{Guest, Machines, Output, Running, host};

/// Refused with this code and one sentence that has all of `texts` in it.
#[track_caller]
fn expect_refused(output: &Output, code: i32, texts: &[&str]) {
    output.expect_code(code).expect_stdout("");
    for text in texts {
        output.expect_in_stderr(text);
    }
    if code == 125 {
        assert_eq!(output.errors().lines().count(), 1, "one sentence: {output}");
    }
}

#[test]
fn machines_that_are_none_or_do_not_run_are_told() {
    let machines = Machines::new();
    let name = machines.fresh_name("webserver");
    let machine = {
        machines
            .guest(Guest::new())
            .option("--name", &name)
            .exec(&["true"])
            .expect_code(0);
        machines.named(&name)
    };
    machine.mvm("wait", &[]).expect_code(0);
    let near = format!("{name}x");
    let long = "n".repeat(300);
    for verb in [
        "exec",
        "shell",
        "logs",
        "stop",
        "kill",
        "wait",
        "start",
        "restart",
        "rm",
        "inspect",
        "stats",
        "pause",
        "resume",
        "port ls",
        "connect",
        "ssh-config",
    ] {
        let run = |name: &str| {
            let mut words: Vec<&str> = verb.split(' ').collect();
            words.push(name);
            match verb {
                "exec" => words.extend(["--", "true"]),
                "connect" => words.push("22"),
                _ => {}
            }
            machines.mvm(&words)
        };
        expect_refused(&run(&near), 125, &[&near, &name]);
        expect_refused(&run("a/b"), 2, &["a/b"]);
        expect_refused(&run(&long), 2, &["63"]);
        if !matches!(
            verb,
            "logs" | "stop" | "wait" | "start" | "restart" | "rm" | "inspect" | "ssh-config"
        ) {
            expect_refused(&run(&name), 125, &[&name, "mvm start"]);
        }
    }
    let to = machines.fresh_name("other");
    expect_refused(&machines.mvm(&["rename", &near, &to]), 125, &[&near]);
    expect_refused(&machines.mvm(&["rename", &name, "a/b"]), 2, &["a/b"]);
    expect_refused(
        &machines.mvm(&["cp", &format!("{near}:/etc/passwd"), "/dev/null"]),
        125,
        &[&near],
    );
    for bad in ["a/b", &long, "", "-x", ".."] {
        let word = format!("--name={bad}");
        expect_refused(
            &machines.mvm(&["run", "-d", &word, "--", "true"]),
            2,
            &["name"],
        );
    }
    assert_eq!(machines.listed(true).len(), 1);
}

#[test]
fn ports_that_cannot_be_are_usage_errors() {
    let machines = Machines::new();
    for (option, bad) in [
        ("-p", "0"),
        ("-p", "70000"),
        ("-p", "8080:0"),
        ("-p", "8080:70000"),
        ("-p", "-1:80"),
        ("-p", "x:80"),
        ("-p", ""),
        ("-p", "9-8:9-8"),
        ("-p", "1000-1010:8000-8001"),
        ("-p", "300.0.0.1:80:80"),
        ("-p", "80:80/sctp"),
        ("-R", "0:127.0.0.1:80"),
        ("-R", "80"),
        ("-R", "80:localhost:70000"),
        ("--socks", "70000"),
        ("--socks", "x"),
    ] {
        let word = match option {
            "--socks" => format!("{option}={bad}"),
            _ => format!("{option}{bad}"),
        };
        let words = match bad {
            "" => vec!["run", "-d", option, "", "--", "true"],
            _ => vec!["run", "-d", &word, "--", "true"],
        };
        let long = match option {
            "-p" => "--publish",
            "-R" => "--reverse",
            long => long,
        };
        expect_refused(&machines.mvm(&words), 2, &[long]);
    }
    assert_eq!(machines.listed(true), []);
}

#[test]
fn ports_that_cannot_be_had_are_told_with_who_has_them() {
    let machines = Machines::new();
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let publish = format!("{port}:80");
    let me = std::process::id().to_string();
    // At the start of a machine, which is then none.
    let output = machines
        .guest(Guest::new())
        .option("-p", &publish)
        .exec(&["true"]);
    expect_refused(&output, 125, &[&port.to_string(), "in use by", &me]);
    assert_eq!(machines.listed(true), []);

    // By another machine, and in one that runs.
    let first = machines.idle(Guest::new().option("-p", "80"));
    let second = machines.idle(Guest::new());
    first.plant_peer();
    let _echo = first.peer("echo", "127.0.0.1:80");
    let host = first.port_of("80");
    let mut kept = connect_eventually(host);
    expect_refused(
        &second.mvm("port add", &[&format!("{host}:80")]),
        125,
        &[&host.to_string(), "in use by", "mvm"],
    );
    expect_refused(
        &second.mvm("port add", &[&publish]),
        125,
        &["in use by", &me],
    );
    expect_refused(&second.mvm("port add", &["70000"]), 2, &["70000"]);
    expect_refused(
        &second.mvm("port add", &["192.0.2.1:8080:80"]),
        125,
        &["192.0.2.1"],
    );
    assert_eq!(second.ports(), Vec::<serde_json::Value>::new());

    // The connection of the first has not noticed.
    kept.write_all(b"undisturbed").unwrap();
    let mut answer = [0; 11];
    kept.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"undisturbed");
}

#[test]
fn a_host_that_is_not_found_is_told_and_disturbs_nobody() {
    let machines = Machines::new();
    let nobody = free_port();
    let guest = Guest::new()
        .option("-R", "6000:no-such-host.invalid:80")
        .option("-R", format!("6001:127.0.0.1:{nobody}"));
    let machine = machines.idle(guest);
    let told = host::eventually("both failures are told", || {
        // The guest's ports are opened while its command begins.
        for port in [6000, 6001] {
            machine
                .exec(&format!("echo hello | nc 127.0.0.1 {port}"))
                .expect_stdout("");
        }
        let told = machine.mvm("logs", &[]).errors();
        (told.contains("no-such-host.invalid:80") && told.contains(&format!(":{nobody}")))
            .then_some(told)
    });
    assert!(told.contains("no such name"), "{told}");
    assert!(told.contains("refused"), "{told}");
    machine.exec("echo alive").expect_stdout("alive\n");
}

#[test]
fn a_privileged_port_is_told_with_how_to_get_it() {
    const TEST: &str = "a_privileged_port_is_told_with_how_to_get_it";
    let output = if host::is_root() {
        // The test's machines are root's; this one's port is refused before there is a machine.
        let machines = Machines::new();
        let machine = machines.guest(Guest::new()).option("-p", "81:80");
        let mut command = host::tool_command("setpriv", "util-linux");
        command
            .args([
                "--bounding-set=-net_bind_service",
                "--inh-caps=-net_bind_service",
            ])
            .arg(host::mvm())
            .args(machine.arguments(&["true"]))
            .env("XDG_STATE_HOME", machines.state_dir());
        let output = Running::start(command, Vec::new()).wait();
        assert_eq!(machines.listed(true), []);
        output
    } else if fs_says_privileged() {
        let machines = Machines::new();
        machines
            .guest(Guest::new())
            .option("-p", "81:80")
            .exec(&["true"])
    } else {
        host::skipped(TEST, "every user of this host may take port 81");
        return;
    };
    expect_refused(&output, 125, &["81", "privileged", "sysctl"]);
}

fn fs_says_privileged() -> bool {
    let start = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    start.is_ok_and(|start| start.trim().parse().is_ok_and(|start: u16| start > 81))
}

#[test]
fn garbage_at_the_proxy_disturbs_nobody() {
    let machines = Machines::new();
    let proxy = free_port();
    let machine = machines.idle(Guest::new().option("--socks", proxy.to_string()));
    machine.plant_peer();
    let _echo = machine.peer("http", "127.0.0.1:80");
    let socks = format!("127.0.0.1:{proxy}");
    let page = |name: &str| curl(&["--socks5-hostname", &socks, &format!("http://{name}/")]);
    assert_eq!(page("localhost").code(), 0);

    let mut long = b"GET http://localhost/".to_vec();
    long.resize(1 << 20, b'a');
    let throws: &[&[u8]] = &[
        b"",
        b"\x05",
        b"\x05\x00",
        b"\x05\x01\x02",
        b"\x05\x01\x00\x05\x01\x00\x07garbage",
        b"\x05\x01\x00\x05\x09\x00\x01\x7f\x00\x00\x01\x00\x50",
        b"\x05\x01\x00\x05\x01\x00\x03\xff",
        b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00",
        &[0xff; 70_000],
        &[0; 70_000],
        b"CONNECT localhost:99999 HTTP/1.1\r\n\r\n",
        b"CONNECT / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\r\n\r\n\r\n",
        &long,
    ];
    let mut idle = Vec::new();
    for bytes in throws {
        let stream = connect(proxy).unwrap();
        // It may be closed before all is read: with an answer or a reset, but not with silence for ever.
        let _ = exchange(stream, bytes);
        // One that says this and then nothing keeps nobody waiting.
        let mut stream = connect(proxy).unwrap();
        let _ = stream.write_all(bytes);
        idle.push(stream);
    }
    assert_eq!(page("localhost").code(), 0);

    // What the guest cannot reach is told as what it is: curl's 97 is a refusal by the proxy.
    let unknown = page("no-such-host.invalid");
    unknown.expect_code(97);
    let refused = page("localhost:81");
    refused.expect_code(97);
    let http = |url: &str| {
        let mut command: Command = host::tool_command("curl", "curl");
        command
            .args(["-sS", "-o", "/dev/null", "-w", "%{http_code}", "-x"])
            .arg(format!("http://{socks}"))
            .arg(url);
        Running::start(command, Vec::new()).wait().text()
    };
    assert_eq!(http("http://localhost/"), "200");
    assert_eq!(http("http://localhost:81/"), "502");
    assert_eq!(http("http://no-such-host.invalid/"), "502");
    drop(idle);
    machine.expect_state("running");
}
