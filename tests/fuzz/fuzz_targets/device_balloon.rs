//! A hostile driver of the memory balloon.

#![no_main]

use devices::testing::fuzz_device;
use devices::virtio::balloon::{Balloon, BalloonConfig};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (balloon, handle) = Balloon::new(BalloonConfig {
        target_mib: 8,
        deflate_on_oom: true,
        free_page_reporting: true,
    });
    fuzz_device(Box::new(balloon), data);
    // Whatever the driver claimed, the host can still ask.
    handle.set_target_mib(handle.actual_mib());
});
