//! A hostile driver of the vsock device, with a service to connect to and a connection under way.

#![no_main]

use devices::testing::fuzz_device;
use devices::virtio::vsock::{Vsock, VsockConfig};
use libfuzzer_sys::fuzz_target;

/// A port that has a service; packets with small numbers reach it.
const PORT: u32 = 1;

fuzz_target!(|data: &[u8]| {
    let mut config = VsockConfig::new(3);
    config.max_connections = 8;
    let (vsock, handle) = Vsock::new(config).expect("a device of good parts");
    let mut accepted = Vec::new();
    handle
        .listen(PORT, move |stream| accepted.push(stream))
        .expect("a device that takes commands");
    let _host_end = handle.connect(PORT).expect("a device that takes commands");
    fuzz_device(Box::new(vsock), data);
});
