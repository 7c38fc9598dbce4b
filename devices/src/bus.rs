//! An address space of devices: a sorted table that is frozen before the first vCPU runs.
//!
//! Lookups take no lock: topology never changes while the machine runs, and each device guards
//! its own registers. The same type serves port I/O and memory-mapped I/O.

use std::fmt;
use std::sync::Arc;

use thiserror::Error;

/// What a vCPU's access reaches: a block of registers.
///
/// Called on vCPU threads, so an implementation must return promptly and must never panic,
/// whatever `offset` and the length of `data` are.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` from the start of the device's range.
    ///
    /// What the device does not implement is left as it came, zeroed by the bus.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes `data` at `offset` from the start of the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a device could not be placed on a [`Bus`].
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or runs past the end of the address space.
    #[error("the range {base:#x}+{len:#x} is empty or wraps around")]
    BadRange {
        /// First address asked for.
        base: u64,
        /// Length in bytes asked for.
        len: u64,
    },
    /// The range touches one that is taken.
    #[error("the range {base:#x}+{len:#x} overlaps the device at {other:#x}")]
    Overlap {
        /// First address asked for.
        base: u64,
        /// Length in bytes asked for.
        len: u64,
        /// First address of the device that is there.
        other: u64,
    },
}

struct Slot {
    base: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// A sorted table of address ranges and the devices behind them.
#[derive(Default)]
pub struct Bus {
    slots: Vec<Slot>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.slots.iter().map(|s| (s.base, s.len)))
            .finish()
    }
}

impl Bus {
    /// An address space with nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Places `device` at `base`, `len` bytes long.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let end = base
            .checked_add(len)
            .filter(|_| len > 0)
            .ok_or(BusError::BadRange { base, len })?;
        if let Some(other) = self
            .slots
            .iter()
            .find(|s| s.base < end && base < s.base + s.len)
        {
            return Err(BusError::Overlap {
                base,
                len,
                other: other.base,
            });
        }
        let at = self.slots.partition_point(|s| s.base < base);
        self.slots.insert(at, Slot { base, len, device });
        Ok(())
    }

    /// Reads at `addr`; false when no device holds the whole access (then `data` is all ones, as
    /// on an empty bus).
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        match self.find(addr, data.len()) {
            Some((device, offset)) => {
                data.fill(0);
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes at `addr`; false when no device holds the whole access (then nothing happens).
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        match self.find(addr, data.len()) {
            Some((device, offset)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, addr: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let after = self.slots.partition_point(|s| s.base <= addr);
        let slot = self.slots.get(after.checked_sub(1)?)?;
        let offset = addr - slot.base;
        let end = offset.checked_add(len as u64)?;
        (end <= slot.len).then_some((&*slot.device, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Register(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Register {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_reaches_the_device_with_its_own_offset() {
        let mut bus = Bus::new();
        let low = Arc::new(Register::default());
        bus.insert(0x200, 0x10, Arc::new(Register::default()))
            .unwrap();
        bus.insert(0x100, 0x10, low.clone()).unwrap();
        let mut byte = [0u8];
        assert!(bus.read(0x20f, &mut byte));
        assert_eq!(byte, [0xf]);
        assert!(bus.write(0x104, &[1, 2]));
        assert_eq!(*low.0.lock().unwrap(), vec![(4, vec![1, 2])]);
    }

    #[test]
    fn an_access_outside_or_across_a_range_reads_all_ones() {
        let mut bus = Bus::new();
        bus.insert(0x100, 0x10, Arc::new(Register::default()))
            .unwrap();
        for addr in [0, 0xff, 0x10e, 0x110, u64::MAX] {
            let mut data = [0u8; 4];
            assert!(!bus.read(addr, &mut data), "{addr:#x}");
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(addr, &data));
        }
    }

    #[test]
    fn overlaps_and_impossible_ranges_are_refused() {
        let mut bus = Bus::new();
        let device = || Arc::new(Register::default());
        bus.insert(0x100, 0x10, device()).unwrap();
        for base in [0xf1, 0x100, 0x10f] {
            assert!(matches!(
                bus.insert(base, 0x10, device()),
                Err(BusError::Overlap { other: 0x100, .. })
            ));
        }
        assert!(bus.insert(0, 0, device()).is_err());
        assert!(bus.insert(u64::MAX, 2, device()).is_err());
        bus.insert(0x110, 1, device()).unwrap();
    }
}
