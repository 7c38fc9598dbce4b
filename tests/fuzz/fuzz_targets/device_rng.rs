//! A hostile driver of the entropy source.

#![no_main]

use devices::testing::fuzz_device;
use devices::virtio::rng::Rng;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzz_device(Box::new(Rng::new()), data));
