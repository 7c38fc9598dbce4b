//! `--vsock-uds`: the guest's vsock ports at a Unix socket of the host, and the host's for the guest.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use tests::host::LIMIT;
use tests::{Guest, Machines};

#[test]
fn vsock_ports_of_guest_and_host_are_unix_sockets() {
    let machines = Machines::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let machine = machines.idle(Guest::new().option("--vsock-uds", &path));
    machine.plant_peer();
    let _echo = machine.peer("echo", "vsock:5000");

    // From the host into the guest.
    let stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    (&stream).write_all(b"CONNECT 5000\n").unwrap();
    let mut answers = BufReader::new(&stream);
    let mut line = String::new();
    answers.read_line(&mut line).unwrap();
    assert!(line.starts_with("OK "), "{line:?}");
    (&stream).write_all(b"there and back").unwrap();
    let mut back = [0; 14];
    answers.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"there and back");

    // From the guest to the host.
    let listener = UnixListener::bind(dir.path().join("vsock_6000")).unwrap();
    let serving = thread::spawn(move || {
        let mut questions = Vec::new();
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            let mut question = String::new();
            stream.read_to_string(&mut question).unwrap();
            stream.write_all(b"the answer").unwrap();
            questions.push(question);
        }
        questions
    });
    for _ in 0..2 {
        let asked = machine.exec("/tmp/peer ask vsock-host:6000 'what is it?'");
        asked.expect_code(0).expect_stdout("the answer\n");
    }
    assert_eq!(serving.join().unwrap(), ["what is it?"; 2]);

    // Where nobody listens, and where somebody did.
    for port in [6000, 6001] {
        let refused = machine.exec(&format!("/tmp/peer ask vsock-host:{port} anybody"));
        refused.expect_code(1).expect_in_stderr("reset by peer");
    }
}
