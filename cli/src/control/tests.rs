//! A control socket whose owner has no machine: what clients ask for, what they send instead, how slow they are.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use std::{fs, io};

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::client::{self, Client};
use super::protocol::*;
use super::server::Limits;
use super::{Latch, Owner, Server};
use crate::store::{Bytes, Claim, Definition, Ending, Name, Store, Timestamp};

/// Longer than anything takes that works.
const LONG: Duration = Duration::from_secs(60);

/// Limits that no test runs into unless it means to.
const WIDE: Limits = Limits {
    connections: 256,
    message: LONG,
    idle: LONG,
};

/// An owner that notes what it was asked for.
struct Fake {
    latch: Latch,
    asked: Mutex<Vec<String>>,
    command: Mutex<Vec<Bytes>>,
}

impl Fake {
    fn note(&self, what: impl Into<String>) -> Result<(), ControlError> {
        self.asked.lock().unwrap().push(what.into());
        Ok(())
    }
}

impl Owner for Fake {
    fn inspect(&self) -> Inspection {
        Inspection {
            name: name("web"),
            state: State::Running,
            pid: 1,
            mvm: "0".to_owned(),
            started: Timestamp::now(),
            accel: "kvm".to_owned(),
            kernel: None,
            cpus: 2,
            memory: 1 << 29,
            command: self.command.lock().unwrap().clone(),
            terminal: false,
            user: None,
            env: Vec::new(),
            workdir: None,
            disks: Vec::new(),
            tap: None,
            mounts: Vec::new(),
            forwards: Vec::new(),
            auto: false,
            exclude: Vec::new(),
            socks: None,
            ssh_agent: None,
            notes: Default::default(),
        }
    }

    fn stats(&self) -> Result<Stats, ControlError> {
        Ok(Stats {
            at_ns: 1,
            cpus: 2,
            cpu_ns: 1_500_000_000,
            disks: vec![DiskStats {
                name: "a\"b\\c\nd".to_owned(),
                reads: 7,
                ..DiskStats::default()
            }],
            ..Stats::default()
        })
    }

    fn stop(&self, grace: Duration) -> Result<(), ControlError> {
        self.note(format!("stop {}", grace.as_secs()))?;
        self.latch.announce(Ending::exited(143));
        Ok(())
    }

    fn kill(&self, signal: i32) -> Result<(), ControlError> {
        self.note(format!("kill {signal}"))
    }

    fn pause(&self) -> Result<(), ControlError> {
        Err(ControlError::failed("it cannot be paused"))
    }

    fn resume(&self) -> Result<(), ControlError> {
        self.note("resume")
    }

    fn rename(&self, to: &Name) -> Result<(), ControlError> {
        self.note(format!("rename {to}"))
    }

    /// Its guest gives everything back.
    fn connect(&self, port: u32, stream: OwnedFd) -> io::Result<()> {
        let mut stream = UnixStream::from(stream);
        thread::spawn(move || {
            stream.write_all(format!("port {port}\n").as_bytes())?;
            io::copy(&mut stream.try_clone()?, &mut stream)
        });
        Ok(())
    }

    fn forward(&self, op: Op) -> Result<Answer, ControlError> {
        self.note(format!("{op:?}"))?;
        Ok(Answer::Forwards(Vec::new()))
    }

    fn mount(&self, op: Op) -> Result<Answer, ControlError> {
        self.note(format!("{op:?}"))?;
        Ok(Answer::Mounts(Vec::new()))
    }

    fn ended(&self) -> &Latch {
        &self.latch
    }
}

/// A machine named `web` whose owner is a fake.
struct Machine {
    _dir: TempDir,
    store: Store,
    fake: Arc<Fake>,
    server: Option<Server>,
    claim: Option<Claim>,
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn owned() -> (TempDir, Store, Claim) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::at(&dir.path().join("state"), &dir.path().join("run")).unwrap();
    let definition = Definition::new(&[], Vec::new()).unwrap();
    let claim = store.create(Some(&name("web")), &definition).unwrap();
    claim.started().unwrap();
    (dir, store, claim)
}

impl Machine {
    fn start(limits: Limits) -> Self {
        let (dir, store, claim) = owned();
        let fake = Arc::new(Fake {
            latch: Latch::new().unwrap(),
            asked: Mutex::default(),
            command: Mutex::default(),
        });
        let listener = claim.bind().unwrap();
        let server = Server::start_within(limits, listener, fake.clone()).unwrap();
        Self {
            _dir: dir,
            store,
            fake,
            server: Some(server),
            claim: Some(claim),
        }
    }

    /// A connection on which nothing is waited for for ever.
    fn connect(&self) -> UnixStream {
        let stream = self.store.connect(&name("web"), LONG).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.set_write_timeout(Some(LONG)).unwrap();
        stream
    }

    fn client(&self) -> Client {
        Client::connect_within(&self.store, &name("web"), LONG).unwrap()
    }

    fn asked(&self) -> Vec<String> {
        self.fake.asked.lock().unwrap().clone()
    }
}

/// A message as bytes.
fn message(value: &Value) -> Vec<u8> {
    frame(value).unwrap()
}

fn receive_value(stream: &UnixStream) -> Value {
    receive(stream).unwrap().expect("an answer")
}

fn ask(stream: &UnixStream, value: &Value) -> Value {
    let mut to = stream;
    to.write_all(&message(value)).unwrap();
    receive_value(stream)
}

/// Everything until the other end closes, which it has to.
fn rest(mut stream: &UnixStream) -> Vec<u8> {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        // It was closed with something left unread.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
        ended => drop(ended.expect("the connection is not closed")),
    }
    rest
}

fn inspect() -> Value {
    json!({"version": 1, "op": "inspect"})
}

fn assert_served(stream: &UnixStream) {
    let answer = ask(stream, &inspect());
    assert_eq!(answer["ok"]["inspection"]["name"], "web", "{answer}");
}

#[test]
fn one_connection_carries_several_requests_and_their_answers() {
    let machine = Machine::start(WIDE);
    let mut client = machine.client();
    let inspection = client.ask(Op::Inspect).unwrap();
    assert!(
        matches!(&inspection, Answer::Inspection(found) if found.cpus == 2),
        "{inspection:?}"
    );
    assert!(matches!(client.ask(Op::Stats).unwrap(), Answer::Stats(_)));
    for op in [
        Op::Kill { signal: 15 },
        Op::Resume,
        Op::Rename { to: name("b") },
    ] {
        assert_eq!(client.ask(op).unwrap(), Answer::Done);
    }
    let error = client.ask(Op::Pause).unwrap_err().to_string();
    assert_eq!(error, "machine web: it cannot be paused");
    let publish = vec![Bytes(b"8080:80".to_vec()), Bytes(vec![0xff])];
    let added = client.ask(Op::PortAdd { publish }).unwrap();
    assert_eq!(added, Answer::Forwards(Vec::new()));
    let ended = client.ask(Op::Stop { timeout: 3 }).unwrap();
    assert!(
        matches!(&ended, Answer::Ended(ending) if ending.code == 143),
        "{ended:?}"
    );
    let expected = [
        "kill 15",
        "resume",
        "rename b",
        "PortAdd { publish: [Bytes([56, 48, 56, 48, 58, 56, 48]), Bytes([255])] }",
        "stop 3",
    ];
    assert_eq!(machine.asked(), expected);
}

#[test]
fn what_makes_no_sense_is_refused_and_ends_no_other_connection() {
    let machine = Machine::start(WIDE);
    let steady = machine.connect();
    assert_served(&steady);
    let whole = message(&inspect());
    let broken: &[&[u8]] = &[
        b"",
        b"\x01",
        &whole[..3],
        &whole[..whole.len() - 1],
        // 4 GiB, and one byte more than there may be.
        &[0xff; 64],
        &0x0010_0001_u32.to_le_bytes(),
        &[0; 64],
        b"\x02\0\0\0{}",
        b"\x04\0\0\0null",
        b"\x05\0\0\0\xff\xfe\xfd\xfc\xfb",
        b"POST /metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n",
    ];
    for bytes in broken {
        let mut stream = machine.connect();
        stream.write_all(bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let answer = rest(&stream);
        if let Some(mut told) = answer.get(4..).filter(|told| !told.is_empty()) {
            let told: Value = serde_json::from_reader(&mut told).unwrap();
            assert_eq!(told["error"]["kind"], "malformed", "{bytes:?}: {told}");
        }
        assert_served(&steady);
    }
}

#[test]
fn a_length_of_4_gib_is_refused_before_anything_of_it_has_come() {
    let machine = Machine::start(WIDE);
    let mut stream = machine.connect();
    stream.write_all(&[0xff; 4]).unwrap();
    let told = receive_value(&stream);
    assert_eq!(told["error"]["kind"], "malformed", "{told}");
    assert_eq!(rest(&stream), b"");
}

#[test]
fn json_that_is_nested_without_end_is_refused() {
    let machine = Machine::start(WIDE);
    let text = format!(
        "{{\"version\":1,\"op\":\"inspect\",\"x\":{}",
        "[".repeat(900_000)
    );
    let mut stream = machine.connect();
    stream
        .write_all(&(text.len() as u32).to_le_bytes())
        .unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    let told = receive_value(&stream);
    assert_eq!(told["error"]["kind"], "malformed", "{told}");
    assert_served(&machine.connect());
}

#[test]
fn what_is_of_another_time_is_told_and_the_connection_goes_on() {
    let machine = Machine::start(WIDE);
    let stream = machine.connect();
    for (sent, kind) in [
        (json!({"version": 2, "op": "inspect"}), "version"),
        (json!({"version": 1, "op": "make-coffee"}), "unknown-op"),
        (json!({"version": 1}), "unknown-op"),
        (json!({"version": 1, "op": "stop"}), "unknown-op"),
        (
            json!({"version": 1, "op": "rename", "to": "../up"}),
            "unknown-op",
        ),
        (json!({"version": 1, "op": "kill", "signal": 0}), "failed"),
        (json!({"version": 1, "op": "kill", "signal": 65}), "failed"),
    ] {
        let told = ask(&stream, &sent);
        assert_eq!(told["error"]["kind"], kind, "{sent}: {told}");
        assert_eq!(told["version"], 1);
    }
    let more = json!({"version": 1, "op": "inspect", "since": "later"});
    assert!(ask(&stream, &more)["ok"].is_object());
    assert_eq!(machine.asked(), [""; 0]);
}

#[test]
fn half_a_message_is_not_waited_for_for_ever_however_it_trickles() {
    let machine = Machine::start(Limits {
        message: Duration::from_millis(300),
        ..WIDE
    });
    let whole = message(&inspect());
    let mut stalls = machine.connect();
    stalls.write_all(&whole[..6]).unwrap();
    let mut trickles = machine.connect();
    let trickling = thread::spawn({
        let mut stream = trickles.try_clone().unwrap();
        move || {
            // The length of a message that takes a minute in this way.
            let mut all = vec![0xff, 0x0f, 0, 0];
            all.resize(1200, b' ');
            all.iter().all(|byte| {
                thread::sleep(Duration::from_millis(50));
                stream.write_all(&[*byte]).is_ok()
            })
        }
    });
    for stream in [&mut stalls, &mut trickles] {
        let told = receive_value(stream);
        assert_eq!(told["error"]["kind"], "malformed", "{told}");
        assert_eq!(rest(stream), b"");
    }
    drop(trickles);
    assert!(!trickling.join().unwrap(), "a minute of it was taken");
}

#[test]
fn who_does_not_read_its_answers_is_let_go() {
    let machine = Machine::start(Limits {
        message: Duration::from_millis(300),
        connections: 1,
        ..WIDE
    });
    // Answers that fill the socket's buffer.
    *machine.fake.command.lock().unwrap() = vec![Bytes(vec![b'x'; 500_000])];
    let mut stream = machine.connect();
    for _ in 0..20 {
        stream.write_all(&message(&inspect())).unwrap();
    }
    await_seat(&machine);
}

#[test]
fn an_answer_that_is_too_long_is_an_error_and_not_the_end() {
    let machine = Machine::start(WIDE);
    *machine.fake.command.lock().unwrap() = vec![Bytes(vec![b'x'; MAX_FRAME])];
    let stream = machine.connect();
    let told = ask(&stream, &inspect());
    assert_eq!(told["error"]["kind"], "failed", "{told}");
    machine.fake.command.lock().unwrap().clear();
    assert_served(&stream);
}

#[test]
fn a_connection_without_a_request_is_closed() {
    let machine = Machine::start(Limits {
        idle: Duration::from_millis(100),
        ..WIDE
    });
    let stream = machine.connect();
    assert_eq!(rest(&stream), b"");
}

/// A connection that is served, as soon as there is room for one more.
fn await_seat(machine: &Machine) -> UnixStream {
    let deadline = Instant::now() + LONG;
    loop {
        let mut stream = machine.connect();
        // It may have been told already that there is no room.
        let _ = stream.write_all(&message(&json!({"version": 1, "op": "stats"})));
        let answer = receive_value(&stream);
        if answer["ok"].is_object() {
            return stream;
        }
        assert_eq!(answer["error"]["kind"], "busy", "{answer}");
        assert!(Instant::now() < deadline, "no connection has become free");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn there_are_so_many_connections_and_no_more() {
    let machine = Machine::start(Limits {
        connections: 3,
        ..WIDE
    });
    let served: Vec<_> = (0..3).map(|_| machine.connect()).collect();
    served.iter().for_each(assert_served);
    let refused = machine.connect();
    let told = receive_value(&refused);
    assert_eq!(told["error"]["kind"], "busy", "{told}");
    assert_eq!(rest(&refused), b"");
    let error = machine.client().ask(Op::Inspect).unwrap_err();
    assert!(error.to_string().contains("try again later"), "{error}");
    served.iter().for_each(assert_served);
    drop(served);
    await_seat(&machine);
}

#[test]
fn who_waits_and_goes_away_makes_room() {
    let machine = Machine::start(Limits {
        connections: 1,
        ..WIDE
    });
    for _ in 0..4 {
        let mut stream = await_seat(&machine);
        let wait = message(&json!({"version": 1, "op": "wait"}));
        stream.write_all(&wait).unwrap();
    }
}

#[test]
fn all_who_wait_hear_of_the_end_though_the_server_ends_with_it() {
    let mut machine = Machine::start(WIDE);
    let waiting: Vec<_> = (0..20)
        .map(|_| {
            let mut stream = machine.connect();
            let wait = message(&json!({"version": 1, "op": "wait"}));
            stream.write_all(&wait).unwrap();
            // No more to ask, and still there to listen.
            stream.shutdown(Shutdown::Write).unwrap();
            stream
        })
        .collect();
    let idle = machine.connect();
    assert_served(&idle);
    // Connections are taken in the order in which they came.
    machine.fake.latch.announce(Ending::exited(7));
    machine.fake.latch.announce(Ending::exited(8));
    drop(machine.server.take());
    for stream in waiting {
        let told = receive_value(&stream);
        assert_eq!(told["ok"]["ended"]["code"], 7, "{told}");
    }
    assert_eq!(rest(&idle), b"");
}

#[test]
fn a_server_that_ends_before_the_machine_does_lets_go_of_those_who_wait() {
    let mut machine = Machine::start(WIDE);
    let stream = machine.connect();
    let mut to = &stream;
    to.write_all(&message(&json!({"version": 1, "op": "wait"})))
        .unwrap();
    drop(machine.server.take());
    assert_eq!(rest(&stream), b"");
}

#[test]
fn a_connection_that_is_turned_over_is_the_guests_from_the_next_byte_on() {
    let machine = Machine::start(Limits {
        connections: 1,
        ..WIDE
    });
    let mut stream = machine.connect();
    let mut sent = message(&json!({"version": 1, "op": "connect", "port": 99}));
    sent.extend_from_slice(b"early");
    stream.write_all(&sent).unwrap();
    let told = receive_value(&stream);
    assert!(told["ok"]["connected"]["agent"].is_u64(), "{told}");
    // It takes no one's place.
    await_seat(&machine);
    stream.write_all(b" and late").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest(&stream), b"port 99\nearly and late");

    let machine = Machine::start(WIDE);
    let mut guest = machine.client().into_guest(1024).unwrap();
    guest.shutdown(Shutdown::Write).unwrap();
    let mut said = String::new();
    guest.read_to_string(&mut said).unwrap();
    assert_eq!(said, "port 1024\n");
}

#[test]
fn metrics_are_served_over_http() {
    let machine = Machine::start(WIDE);
    let fetch = |request: &str| {
        let mut stream = machine.connect();
        stream.write_all(request.as_bytes()).unwrap();
        String::from_utf8(rest(&stream)).unwrap()
    };
    let page = fetch("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = page.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    let length = format!("Content-Length: {}\r\n", body.len());
    assert!(head.contains(&length), "{head}");
    for line in [
        "# TYPE mvm_cpu_seconds_total counter",
        "mvm_cpu_seconds_total{machine=\"web\"} 1.5",
        "mvm_disk_reads_total{machine=\"web\",disk=\"a\\\"b\\\\c\\nd\"} 7",
    ] {
        assert!(body.lines().any(|found| found == line), "{line}\n{body}");
    }
    let missing = fetch("GET /other HTTP/1.0\r\n\r\n");
    assert!(missing.starts_with("HTTP/1.1 404 "), "{missing}");
    let endless = fetch(&format!("GET /{}", "x".repeat(20_000)));
    assert_eq!(endless, "");
}

/// The error of asking about the machine `web`.
fn error_of(store: &Store, patience: Duration) -> String {
    let asked = Client::connect_within(store, &name("web"), patience)
        .and_then(|mut client| client.ask(Op::Inspect));
    format!("{:#}", asked.unwrap_err())
}

#[test]
fn a_machine_that_does_not_run_is_told_with_what_to_do() {
    let mut machine = Machine::start(WIDE);
    let error = client::ask(&machine.store, &name("wbe"), Op::Inspect).unwrap_err();
    assert!(error.to_string().contains("did you mean web?"), "{error}");
    drop(machine.server.take());
    let claim = machine.claim.take().unwrap();
    claim.ended(&Ending::exited(0)).unwrap();
    drop(claim);
    let error = error_of(&machine.store, LONG);
    assert_eq!(
        error,
        "machine web has ended: start it with `mvm start web`"
    );
    let claim = machine.store.claim(&name("web")).unwrap();
    claim.started().unwrap();
    drop(claim);
    let error = error_of(&machine.store, LONG);
    assert_eq!(
        error,
        "machine web was killed: start it with `mvm start web`"
    );
    let claim = machine.store.claim(&name("web")).unwrap();
    claim.ended(&Ending::failed("no memory")).unwrap();
    drop(claim);
    let error = error_of(&machine.store, LONG);
    assert_eq!(
        error,
        "machine web has failed: start it with `mvm start web`"
    );
}

#[test]
fn an_owner_that_does_not_answer_is_given_up() {
    let patience = Duration::from_millis(200);
    let (_dir, store, claim) = owned();
    let error = error_of(&store, patience);
    assert!(error.contains("starting or ending"), "{error}");
    // Nobody accepts, and the kernel takes the connection and the request all the same.
    let _listener = claim.bind().unwrap();
    let error = error_of(&store, patience);
    assert!(error.contains("does not answer"), "{error}");
    assert!(error.contains("mvm rm -f web"), "{error}");
}

/// Answers every request with `reply`.
fn answering(listener: UnixListener, reply: Value) {
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream?;
            drop(receive::<Value>(&stream)?);
            send(&stream, &reply)?;
        }
        Ok::<(), io::Error>(())
    });
}

#[test]
fn an_owner_of_another_version_is_told_as_such() {
    let failure = |kind: &str| json!({"version": 9, "error": {"kind": kind, "message": "so"}});
    for (reply, expected) in [
        (
            failure("version"),
            "another version of mvm, which speaks version 9",
        ),
        (failure("unknown-op"), "another version of mvm"),
        (failure("a-kind-of-the-future"), "machine web: so"),
        (
            json!({"version": 1, "ok": "done"}),
            "answered something else",
        ),
        (json!({"ok": {}}), "the connection to machine web broke"),
    ] {
        let (_dir, store, claim) = owned();
        answering(claim.bind().unwrap(), reply);
        let client = Client::connect_within(&store, &name("web"), LONG).unwrap();
        let error = format!("{:#}", client.into_guest(1024).unwrap_err());
        assert!(error.contains(expected), "{error}");
    }
    let (_dir, store, claim) = owned();
    let reply = json!({"version": 1, "ok": {"connected": {"agent": 999}}});
    answering(claim.bind().unwrap(), reply);
    let connect = || Client::connect_within(&store, &name("web"), LONG).unwrap();
    let error = format!("{:#}", connect().into_guest(1024).unwrap_err());
    assert!(error.contains("mvm restart web"), "{error}");
    // Other ports are nobody's business.
    connect().into_guest(80).unwrap();
}

#[test]
fn the_messages_in_the_documentation_are_messages() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/control.md");
    let text = fs::read_to_string(path).unwrap();
    let fail = |error: serde_json::Error, line: &str| -> Value { panic!("{error}: {line}") };
    let mut ops = BTreeSet::new();
    let mut replies = 0;
    for line in text.lines().filter(|line| line.starts_with("{\"version\"")) {
        let shown: Value = serde_json::from_str(line).unwrap();
        let read = match shown.get("op") {
            Some(op) => {
                ops.insert(op.to_string());
                serde_json::from_str(line).map(|read: Request| json!(read))
            }
            None => {
                replies += 1;
                serde_json::from_str(line).map(|read: Reply| json!(read))
            }
        };
        // What is shown is all there is, and by the names it has.
        let read = read.unwrap_or_else(|error| fail(error, line));
        assert_eq!(read_as_shown(&read, &shown), shown, "{line}");
    }
    assert_eq!(ops.len(), 19, "{ops:?}");
    assert!(replies > ops.len());
}

/// Those members of `read` that `shown` has, too: others have their default.
fn read_as_shown(read: &Value, shown: &Value) -> Value {
    match (read, shown) {
        (Value::Object(read), Value::Object(shown)) => {
            let members = shown.iter().filter_map(|(name, shown)| {
                let read = read.get(name)?;
                Some((name.clone(), read_as_shown(read, shown)))
            });
            Value::Object(members.collect())
        }
        _ => read.clone(),
    }
}

proptest! {
    #[test]
    fn whatever_bytes_a_message_holds_it_is_refused_or_understood(body in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut sent = (body.len() as u32).to_le_bytes().to_vec();
        sent.extend_from_slice(&body);
        let read = receive::<Request>(sent.as_slice());
        prop_assert!(read.is_err() || serde_json::from_slice::<Request>(&body).is_ok());
        for cut in 1..sent.len() {
            prop_assert!(receive::<Value>(&sent[..cut]).is_err());
        }
    }
}
