//! Kernels put into guest memory: ELF files and bzImages.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm::boot::kernel;

/// Bytes of guest memory.
const RAM: u64 = 64 << 20;

fuzz_target!(|data: &[u8]| {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)])
        .expect("room for guest memory");
    let file = fuzz::file_of(data).expect("room for a kernel");
    if let Ok(loaded) = kernel::load(&memory, &fuzz::path_of(&file), RAM) {
        assert!(loaded.end <= RAM, "a kernel was loaded past the memory");
        assert!(
            loaded.initrd_ceiling <= RAM,
            "an initrd may go past the memory"
        );
    }
});
