//! The forwarder under load: nothing is lost, mixed up, kept waiting for others, or left behind.
//!
//! Sizes are such that an emulated guest is done in minutes; MVM_TEST_STRESS=1 makes them those that
//! the forwarder is meant for.

use std::env;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_linger;
use tests::host::{self, eventually};
use tests::net::{
    Digest, connect, connect_eventually, cpu_time, descriptors, exchange, free_port, is_refused,
    raise_descriptor_limit, read_digest, resident, write_pattern,
};
use tests::{Guest, Machine, Machines};

/// The value for a test run, or the one for a stress run.
fn either<T>(bounded: T, full: T) -> T {
    match env::var_os("MVM_TEST_STRESS") {
        Some(_) => full,
        None => bounded,
    }
}

/// A machine with the tests' server, and the host port of port 7000 in it.
fn machine(machines: &Machines) -> (Machine<'_>, u16) {
    let port = free_port();
    let guest = Guest::new()
        .memory("1G")
        .option("-p", format!("{port}:7000"));
    let machine = machines.idle(guest);
    machine.plant_peer();
    (machine, port)
}

#[test]
fn a_large_stream_arrives_whole_either_way_and_half_closed() {
    let len: u64 = either(256 << 20, 1 << 30);
    let machines = Machines::new();
    let (machine, port) = machine(&machines);
    let second = free_port();
    machine
        .mvm("port add", &[&format!("{second}:7001")])
        .expect_code(0);
    let _sink = machine.peer("sink", "127.0.0.1:7000");
    let mut stream = connect_eventually(port);
    let sent = write_pattern(&stream, len).unwrap();
    // The answer comes after our end, by what is left of the connection.
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, sent.line(), "what the guest has received");

    let _source = machine.peer("source", "127.0.0.1:7001");
    let mut stream = connect_eventually(second);
    stream.write_all(format!("{len}\n").as_bytes()).unwrap();
    let received = read_digest(&stream).unwrap();
    assert_eq!(received.line(), sent.line(), "what the host has received");
}

#[test]
fn ends_and_resets_are_passed_on_as_what_they_are() {
    let machines = Machines::new();
    let (machine, port) = machine(&machines);
    assert!(is_refused(port), "refused while nobody listens");

    // The guest ends first, and reads what still comes.
    let early = machine.peer("early", "127.0.0.1:7000");
    let mut stream = connect_eventually(port);
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    assert_eq!(said, "early\n");
    stream.write_all(&[b'x'; 100_000]).unwrap();
    drop(stream);
    early.expect_stdout("read 100000\n");
    drop(early);
    eventually("refused again", || is_refused(port).then_some(()));

    // The guest resets.
    let reset = machine.peer("reset", "127.0.0.1:7000");
    let mut stream = connect_eventually(port);
    stream.write_all(b"!").unwrap();
    let error = stream.read(&mut [0]).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    drop(reset);
    eventually("refused again", || is_refused(port).then_some(()));

    // The host resets; and it ends in an orderly way.
    let watch = machine.peer("watch", "127.0.0.1:7000");
    let mut stream = connect_eventually(port);
    stream.read_exact(&mut [0]).unwrap();
    set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    drop(stream);
    watch.expect_stdout("failed ConnectionReset\n");
    let mut stream = connect(port).unwrap();
    stream.read_exact(&mut [0]).unwrap();
    drop(stream);
    watch.expect_stdout("ended\n");
}

#[test]
fn thousands_of_connections_are_open_at_once() {
    const TEST: &str = "thousands_of_connections_are_open_at_once";
    const WANTED: u64 = 10_000;
    // The forwarder has the client's socket and one towards the guest for each.
    let possible = (raise_descriptor_limit().saturating_sub(500) / 2).min(WANTED);
    if possible < WANTED {
        host::warn(&format!(
            "{TEST}: {possible} rather than {WANTED}, for the limit of descriptors"
        ));
    }
    let machines = Machines::new();
    let (machine, port) = machine(&machines);
    let _echo = machine.peer("echo", "127.0.0.1:7000");
    drop(connect_eventually(port));
    let before = descriptors(machine.supervisor());
    let mut connections: Vec<TcpStream> = Vec::new();
    for number in 0..possible {
        let mut stream = connect(port).unwrap_or_else(|error| panic!("number {number}: {error}"));
        stream.write_all(&number.to_le_bytes()).unwrap();
        connections.push(stream);
    }
    for (number, stream) in (0u64..).zip(&mut connections) {
        let mut answer = [0; 8];
        let read = stream.read_exact(&mut answer);
        read.unwrap_or_else(|error| panic!("the answer of number {number}: {error}"));
        assert_eq!(u64::from_le_bytes(answer), number);
    }
    // All are still there, and each is its own.
    for (number, mut stream) in (0u64..).zip(&connections).step_by(97) {
        stream.write_all(&(!number).to_le_bytes()).unwrap();
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(u64::from_le_bytes(answer), !number);
    }
    machine.exec("echo alive").expect_stdout("alive\n");
    drop(connections);
    eventually("the forwarder has closed its descriptors", || {
        (descriptors(machine.supervisor()) <= before + 50).then_some(())
    });
    assert_eq!(
        exchange(connect(port).unwrap(), b"after").unwrap(),
        b"after"
    );
}

#[test]
fn two_hundred_connections_a_second_are_served_and_leave_nothing() {
    const RATE: u32 = 200;
    const CLIENTS: u32 = 8;
    let seconds = either(10, 60);
    let machines = Machines::new();
    let (machine, port) = machine(&machines);
    let _echo = machine.peer("echo", "127.0.0.1:7000");
    drop(connect_eventually(port));
    let supervisor = machine.supervisor();
    let count = |machine: &Machine<'_>| -> u32 {
        let text = machine.exec("ls /proc/1/fd | wc -l").text();
        text.trim().parse().unwrap()
    };
    let (before, before_inside) = (descriptors(supervisor), count(&machine));
    let start = Instant::now();
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            scope.spawn(move || {
                for number in (client..RATE * seconds).step_by(CLIENTS as usize) {
                    // Not faster than this; slower where the machine is.
                    let due = start + Duration::from_secs(1) / RATE * number;
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    let sent = number.to_le_bytes();
                    let came = connect(port).and_then(|stream| exchange(stream, &sent));
                    assert_eq!(came.unwrap(), sent, "connection {number}");
                }
            });
        }
    });
    eventually("all descriptors are closed, here and in the guest", || {
        let here = descriptors(supervisor);
        (here <= before + 5 && count(&machine) <= before_inside + 5).then_some(())
    });
}

#[test]
fn slow_readers_take_bounded_memory_and_hold_up_nobody() {
    const READERS: usize = 50;
    const LEN: u64 = 8 << 20;
    let machines = Machines::new();
    let (machine, port) = machine(&machines);
    let _source = machine.peer("source", "127.0.0.1:7000");
    drop(connect_eventually(port));
    let before = resident(machine.supervisor());
    let request = format!("{LEN}\n");
    let ask = || {
        let mut stream = connect(port).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream
    };
    let slow: Vec<TcpStream> = (0..READERS).map(|_| ask()).collect();
    let wanted = {
        let mut digest = Digest::default();
        // What the guest's end sends, too.
        let mut all = Vec::new();
        write_pattern(&mut all, LEN).unwrap();
        digest.update(&all);
        digest.line()
    };
    for _ in 0..3 {
        assert_eq!(read_digest(ask()).unwrap().line(), wanted, "one that reads");
    }
    let grown = resident(machine.supervisor()).saturating_sub(before);
    assert!(
        grown < 64 << 20,
        "{} MiB are held for {READERS} connections that nobody reads",
        grown >> 20
    );
    for stream in slow.into_iter().step_by(10) {
        assert_eq!(
            read_digest(stream).unwrap().line(),
            wanted,
            "one that was slow"
        );
    }
}

/// Clients that connect again and again. What they may meet is an answer, a refusal, or a reset.
struct Hammer {
    ended: AtomicBool,
    served: AtomicU64,
}

impl Hammer {
    fn client(&self, port: u16) {
        while !self.ended.load(Ordering::Relaxed) {
            match connect(port).and_then(|stream| exchange(stream, b"knock")) {
                Ok(answer) if answer == b"knock" => {
                    self.served.fetch_add(1, Ordering::Relaxed);
                }
                // The server was killed between our end and its answer.
                Ok(answer) => assert!(answer.is_empty(), "{answer:?}"),
                Err(error) => assert!(
                    matches!(
                        error.kind(),
                        ErrorKind::ConnectionRefused
                            | ErrorKind::ConnectionReset
                            | ErrorKind::BrokenPipe
                            | ErrorKind::NotConnected
                    ),
                    "{error}"
                ),
            }
        }
    }

    #[track_caller]
    fn expect_service(&self) {
        let before = self.served.load(Ordering::Relaxed);
        eventually("clients are served", || {
            (self.served.load(Ordering::Relaxed) > before + 20).then_some(())
        });
    }

    /// Runs `body` with four clients at `port`.
    fn run(port: u16, body: impl FnOnce(&Self)) {
        let hammer = Self {
            ended: AtomicBool::new(false),
            served: AtomicU64::new(0),
        };
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| hammer.client(port));
            }
            let ended = EndOnDrop(&hammer.ended);
            body(&hammer);
            drop(ended);
        });
    }
}

/// Ends the clients also where the test fails.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_service_that_is_restarted_and_a_port_that_is_removed_under_load() {
    let machines = Machines::new();
    let (machine, port) = machine(&machines);
    Hammer::run(port, |hammer| {
        for _ in 0..3 {
            let echo = machine.peer("echo", "127.0.0.1:7000");
            hammer.expect_service();
            machine.exec("kill -KILL $(pidof peer)").expect_code(0);
            assert_eq!(echo.wait().code(), 137);
        }
        let _echo = machine.peer("echo", "127.0.0.1:7000");
        hammer.expect_service();
        for _ in 0..3 {
            machine.mvm("port rm", &[&port.to_string()]).expect_code(0);
            assert!(is_refused(port), "removed, and not refused");
            machine
                .mvm("port add", &[&format!("{port}:7000")])
                .expect_code(0);
            hammer.expect_service();
        }
    });
    let _echo = machine.peer("echo", "127.0.0.1:7000");
    let stream = connect_eventually(port);
    assert_eq!(exchange(stream, b"after").unwrap(), b"after");
}

#[test]
fn a_machine_that_is_killed_under_load_leaves_nobody_waiting() {
    let machines = Machines::new();
    let (machine, port) = machine(&machines);
    let _echo = machine.peer("echo", "127.0.0.1:7000");
    let mut open = connect_eventually(port);
    open.write_all(b"!").unwrap();
    open.read_exact(&mut [0]).unwrap();
    Hammer::run(port, |hammer| {
        hammer.expect_service();
        machine.mvm("kill", &[]).expect_code(0);
        eventually("its port is nobody's", || is_refused(port).then_some(()));
    });
    assert!(
        matches!(open.read(&mut [0]), Ok(0) | Err(_)),
        "a connection to a machine that has ended"
    );
    machine.mvm("wait", &[]).expect_stdout("137\n");
    // It is as new when it is started again.
    machine.mvm("start", &[]).expect_code(0);
    machine.plant_peer();
    let _echo = machine.peer("echo", "127.0.0.1:7000");
    let stream = connect_eventually(port);
    assert_eq!(exchange(stream, b"again").unwrap(), b"again");
}

#[test]
fn idle_connections_take_no_processor_time() {
    let machines = Machines::new();
    let (machine, port) = machine(&machines);
    let _echo = machine.peer("echo", "127.0.0.1:7000");
    let mut streams = vec![connect_eventually(port)];
    streams.extend((1..100).map(|_| connect(port).unwrap()));
    for stream in &mut streams {
        stream.write_all(b"!").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }
    let supervisor = machine.supervisor();
    let inside = || -> u64 {
        let text = machine.exec("cut -d' ' -f14,15 /proc/1/stat").text();
        text.split_whitespace()
            .map(|ticks| ticks.parse::<u64>().unwrap())
            .sum()
    };
    // Asking costs something itself, which is not counted as idleness: its price is taken off.
    let price = {
        let first = inside();
        inside() - first
    };
    let before_inside = inside();
    let before = cpu_time(supervisor);
    let start = Instant::now();
    thread::sleep(Duration::from_secs(10));
    let (used, passed) = (cpu_time(supervisor) - before, start.elapsed());
    let used_inside = (inside() - before_inside).saturating_sub(price);
    // 0.5 % of what passed, and one tick of the kernel's accounting.
    let allowed = passed / 200 + Duration::from_millis(10);
    assert!(
        used <= allowed,
        "{used:?} in {passed:?} with idle connections"
    );
    assert!(
        used_inside <= 5 + 2 * price,
        "{used_inside} ticks of the agent, {price} for asking"
    );
    drop(streams);
}
