//! What host and agent say to each other: each side reads any bytes as each kind of message.

#![no_main]

use agent::protocol::{
    self, Datagram, Done, FromForwarder, FromSession, FromUnpack, Hello, Open, Report, ToForwarder,
    ToSession,
};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

fuzz_target!(|data: &[u8]| {
    read_all::<Hello>(data);
    read_all::<Open>(data);
    read_all::<ToSession>(data);
    read_all::<FromSession>(data);
    read_all::<Done>(data);
    read_all::<Report>(data);
    read_all::<FromUnpack>(data);
    read_all::<ToForwarder>(data);
    read_all::<FromForwarder>(data);
    read_all::<Datagram>(data);
});

/// Reads messages until there is none, and says each again: it comes back as it was.
fn read_all<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(mut data: &[u8]) {
    while let Ok(Some(message)) = protocol::receive::<T>(&mut data) {
        let mut wire = Vec::new();
        protocol::send(&mut wire, &message).expect("a message that was received");
        let again = protocol::receive(&mut wire.as_slice()).expect("a message that was sent");
        assert_eq!(again, Some(message));
    }
}
