//! What a client of the proxy says before it has a connection, cut anywhere, and its datagrams.
//!
//! The parsers belong to a program, not to a library, and depend on nothing else of it: their files are
//! modules here too.

#![no_main]

#[path = "../../../cli/src/forward/proxy/handshake.rs"]
mod handshake;
#[path = "../../../cli/src/forward/proxy/http.rs"]
mod http;
#[path = "../../../cli/src/forward/proxy/socks.rs"]
mod socks;
#[path = "../../../cli/src/forward/proxy/target.rs"]
mod target;

use agent::protocol::{DialError, Target};
use handshake::{Handshake, MAX_BYTES, Next};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((step, said)) = data.split_first() else {
        return;
    };
    let step = usize::from(*step).max(1);
    let said = said.get(..MAX_BYTES).unwrap_or(said);
    let (out, next) = shake(said, step);
    let (whole_out, whole_next) = shake(said, said.len().max(1));
    assert_eq!((out, next), (whole_out, whole_next));

    if let Some((to, payload)) = socks::datagram(said) {
        check(&to);
        let from = ([127, 0, 0, 1], 53).into();
        let answer = socks::put_datagram(from, payload);
        let again = socks::datagram(&answer).expect("a datagram of our own");
        assert_eq!(again.1, payload);
    }
});

/// What is said to a client that says `said` in pieces of `step` bytes, and what it is for.
fn shake(said: &[u8], step: usize) -> (Vec<u8>, Next) {
    let mut handshake = Handshake::new();
    let mut out = Vec::new();
    for piece in said.chunks(step) {
        let piece = piece.get(..handshake.room()).unwrap_or(piece);
        match handshake.advance(piece, &mut out) {
            Next::Read => assert!(handshake.room() > 0),
            Next::Close => {
                assert!(!out.is_empty());
                return (out, Next::Close);
            }
            next => {
                if let Next::Dial(target) = &next {
                    check(target);
                }
                out.extend(handshake.connected());
                out.extend(handshake.associated(([127, 0, 0, 1], 1).into()));
                out.extend(handshake.failed(&DialError::Refused));
                assert!(handshake.into_early().len() <= MAX_BYTES + 1024);
                return (out, next);
            }
        }
    }
    out.extend(handshake.timed_out());
    (out, Next::Read)
}

/// A target is one that the agent's protocol allows.
fn check(target: &Target) {
    match target {
        Target::Loopback(port) => assert_ne!(*port, 0),
        Target::Host { host, port } => {
            assert_ne!(*port, 0);
            assert!((1..=255).contains(&host.len()));
            assert!(!host.contains(char::is_control));
        }
        Target::Unix(_) => panic!("no client names a path"),
    }
}
