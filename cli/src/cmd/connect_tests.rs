//! Connections through an agent that is this process.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::sync::mpsc;

use super::*;

/// Long enough for the slowest machine; only a failing test waits for it.
const GENEROUS: Duration = Duration::from_secs(60);

/// An agent that answers the first connection with `answer`, and gives the next one away when it has been
/// attached.
fn agent(
    answer: Option<Result<(), DialError>>,
) -> (
    impl Fn() -> Result<UnixStream>,
    mpsc::Receiver<(Target, UnixStream)>,
) {
    let (sender, attached) = mpsc::channel();
    let asked: Mutex<Option<mpsc::Receiver<(u64, Target)>>> = Mutex::new(None);
    let open = move || {
        let (near, far) = UnixStream::pair()?;
        let mut asked = asked.lock().unwrap();
        if let Some(asked) = asked.take() {
            let sender = sender.clone();
            thread::spawn(move || {
                let (token, target) = asked.recv().unwrap();
                assert_eq!(
                    protocol::receive(&far).unwrap(),
                    Some(Open::Attach { token })
                );
                sender.send((target, far)).unwrap();
            });
            return Ok(near);
        }
        let (tell, told) = mpsc::channel();
        *asked = Some(told);
        let answer = answer.clone();
        thread::spawn(move || {
            assert_eq!(protocol::receive(&far).unwrap(), Some(Open::Forward));
            let Some(ToForwarder::Dial { token, target }) = protocol::receive(&far).unwrap() else {
                panic!("something else was asked for");
            };
            let Some(result) = answer else { return };
            protocol::send(&far, &FromForwarder::Dialed { token, result }).unwrap();
            // Nobody listens where it was refused.
            let _ = tell.send((token, target));
            // Held until the caller has gone.
            assert_eq!((&far).read(&mut [0]).unwrap(), 0);
        });
        Ok(near)
    };
    (open, attached)
}

/// A pipe whose reading end lives as long as the process, as standard input does.
fn input() -> (BorrowedFd<'static>, std::fs::File) {
    let (read, write) = rustix::pipe::pipe().unwrap();
    let read: &'static OwnedFd = Box::leak(Box::new(read));
    (read.as_fd(), write.into())
}

#[test]
fn input_and_its_end_reach_the_guest_and_output_comes_back() {
    let (open, attached) = agent(Some(Ok(())));
    let connection = dial(open, Target::Loopback(22)).unwrap().unwrap();
    let (target, mut guest) = attached.recv_timeout(GENEROUS).unwrap();
    assert_eq!(target, Target::Loopback(22));

    let (input, mut typed) = input();
    let (output, shown) = rustix::pipe::pipe().unwrap();
    let pumped = thread::spawn(move || pump(&connection, input, shown.as_fd()));
    typed.write_all(b"request").unwrap();
    drop(typed);
    let mut got = Vec::new();
    guest.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"request");
    guest.write_all(b"answer").unwrap();
    drop(guest);
    pumped.join().unwrap().unwrap();
    let mut got = Vec::new();
    std::fs::File::from(output).read_to_end(&mut got).unwrap();
    assert_eq!(got, b"answer");
}

#[test]
fn it_ends_with_the_guest_though_input_goes_on() {
    let (open, attached) = agent(Some(Ok(())));
    let connection = dial(open, Target::Loopback(22)).unwrap().unwrap();
    let (_, mut guest) = attached.recv_timeout(GENEROUS).unwrap();
    let (input, _typed) = input();
    let (output, shown) = rustix::pipe::pipe().unwrap();
    guest.write_all(b"bye").unwrap();
    guest.shutdown(Shutdown::Write).unwrap();
    pump(&connection, input, shown.as_fd()).unwrap();
    drop(shown);
    let mut got = Vec::new();
    std::fs::File::from(output).read_to_end(&mut got).unwrap();
    assert_eq!(got, b"bye");
    // And in an orderly way, before the process ends.
    assert_eq!(guest.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_reader_that_is_gone_ends_it() {
    let (open, attached) = agent(Some(Ok(())));
    let connection = dial(open, Target::Loopback(22)).unwrap().unwrap();
    let (_, mut guest) = attached.recv_timeout(GENEROUS).unwrap();
    let (input, _typed) = input();
    let (output, shown) = rustix::pipe::pipe().unwrap();
    drop(output);
    guest.write_all(b"for nobody").unwrap();
    let ended = pump(&connection, input, shown.as_fd());
    assert!(matches!(ended, Err(OutputError::Unwritten(_))), "{ended:?}");
}

#[test]
fn a_refusal_is_told_with_the_ports_number() {
    let (open, _) = agent(Some(Err(DialError::Refused)));
    let error = dial(open, Target::Loopback(22)).unwrap().unwrap_err();
    assert_eq!(error, DialError::Refused);
    assert_eq!(
        explain(&error, "box", 22),
        "cannot connect to port 22 of machine box: nobody listens there"
    );
    let (open, _) = agent(Some(Err(DialError::Refused)));
    let code = run(open, "box", 22).unwrap();
    assert_eq!(code, ExitCode::from(1));
}

#[test]
fn the_guests_words_do_not_steer_a_terminal() {
    let error = DialError::Other("\x1b]0;owned\x07\n".repeat(1000));
    let told = explain(&error, "box", 22);
    assert!(!told.contains(char::is_control), "{told}");
    assert!(told.len() < 500);
}

#[test]
fn an_agent_that_says_nothing_is_an_error() {
    let (open, _) = agent(None);
    let error = dial(open, Target::Loopback(22)).unwrap_err();
    assert_eq!(error.to_string(), "the machine's agent gave no answer");
}
