//! A hostile driver of the disk.

#![no_main]

use devices::testing::fuzz_device;
use devices::virtio::block::engine::EngineKind;
use devices::virtio::block::{Block, BlockConfig};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((choice, program)) = data.split_first() else {
        return;
    };
    let engine = match choice & 1 {
        0 => EngineKind::Auto,
        _ => EngineKind::Threads,
    };
    let config = BlockConfig {
        file: fuzz::file_of(&[0xab; 64 << 10]).expect("room for an image"),
        read_only: choice & 2 != 0,
        serial: "fuzz".to_owned(),
        queues: 2,
    };
    let block = Block::with_engine(config, engine).expect("a disk of good parts");
    fuzz_device(Box::new(block), program);
});
