//! A hostile driver of the network card, whose TAP is a pair of sockets with frames waiting.

#![no_main]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use devices::testing::fuzz_device;
use devices::virtio::net::{Net, NetConfig, Tap};
use libfuzzer_sys::fuzz_target;

/// Pairs of queues: more than one, so that there is a control queue.
const PAIRS: u16 = 2;

fuzz_target!(|data: &[u8]| {
    let mut hosts = Vec::new();
    let mut queues = Vec::new();
    for _ in 0..PAIRS {
        let (device, host) = UnixDatagram::pair().expect("a pair of sockets");
        device.set_nonblocking(true).expect("a socket");
        for len in [12, 60, 1514, 9000] {
            host.send(&vec![0; len]).expect("room for a frame");
        }
        queues.push(OwnedFd::from(device));
        hosts.push(host);
    }
    let config = NetConfig {
        tap: Tap::from_sockets(queues, Some(1500)),
        mac: Some([2, 0, 0, 0, 0, 1]),
        queue_pairs: PAIRS,
    };
    let net = Net::new(config).expect("a card of good parts");
    fuzz_device(Box::new(net), data);
});
