//! The registers, driven as a driver would and as none should.

use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET;

use super::*;
use crate::testing::{HIGH_REGION, MockDriver, REGION_SIZE};
use crate::virtio::{ActivateError, read_config_bytes};

/// What the transport did with the device.
#[derive(Default)]
struct Record {
    activations: Mutex<Vec<Activation>>,
    resets: AtomicUsize,
    config_writes: Mutex<Vec<(u64, Vec<u8>)>>,
}

struct Probe {
    record: Arc<Record>,
    fails: bool,
}

const OFFERED: u64 = 1 << 5 | 1 << 40;
const CONFIG_BYTES: [u8; 6] = [1, 2, 3, 4, 5, 6];

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        OFFERED
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[16, 256]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&CONFIG_BYTES, offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut writes = self.record.config_writes.lock().unwrap();
        writes.push((offset, data.to_vec()));
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.fails {
            return Err(ActivateError::QueueMissing(1));
        }
        self.record.activations.lock().unwrap().push(activation);
        Ok(())
    }
    fn reset(&mut self) {
        self.record.activations.lock().unwrap().clear();
        self.record.resets.fetch_add(1, Ordering::SeqCst);
    }
}

fn probe() -> (MockDriver, Arc<Record>) {
    let record = Arc::new(Record::default());
    let device = Probe {
        record: record.clone(),
        fails: false,
    };
    (MockDriver::new(Box::new(device)), record)
}

/// Reads a register as a guest does that has the page as memory.
fn page32(driver: &MockDriver, register: u32) -> u32 {
    let page = ptr::from_ref(&**driver.transport().page()).cast::<u8>();
    // SAFETY: the page is PAGE_SIZE bytes from an address that is a multiple of that, all of it lives as
    // long as the transport, and it ends in aligned words that are only accessed as atomics.
    let word = unsafe {
        &*page
            .add(PAGE_OFFSET as usize + register as usize)
            .cast::<AtomicU32>()
    };
    word.load(Ordering::Acquire)
}

/// That an exit reads what is in the page, register by register.
fn assert_page_is_read(driver: &MockDriver, when: &str) {
    for register in (0..VIRTIO_MMIO_CONFIG).step_by(4) {
        assert_eq!(
            driver.read32(register),
            page32(driver, register),
            "register {register:#x} {when}"
        );
    }
}

#[test]
fn the_page_is_one_page_with_the_registers_at_its_end() {
    let (driver, _) = probe();
    let page = &**driver.transport().page();
    assert_eq!(size_of_val(page) as u64, PAGE_SIZE);
    assert_eq!(ptr::from_ref(page) as u64 % PAGE_SIZE, 0);
    assert_eq!(PAGE_OFFSET + u64::from(VIRTIO_MMIO_CONFIG), PAGE_SIZE);
    // SAFETY: these bytes of the page, which lives as long as the driver, never change.
    let before = unsafe {
        std::slice::from_raw_parts(ptr::from_ref(page).cast::<u8>(), PAGE_OFFSET as usize)
    };
    assert!(before.iter().all(|byte| *byte == 0));
}

#[test]
fn the_page_shows_the_registers_in_each_state_of_the_handshake() {
    let (mut driver, _) = probe();
    assert_page_is_read(&driver, "before anything was written");
    assert_eq!(page32(&driver, VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(page32(&driver, VIRTIO_MMIO_DEVICE_ID), 42);
    assert_eq!(page32(&driver, VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    assert_eq!(page32(&driver, VIRTIO_MMIO_QUEUE_NUM_MAX), 16);

    let offered = OFFERED | TRANSPORT_FEATURES;
    for (sel, features) in [(1, (offered >> 32) as u32), (2, 0), (0, offered as u32)] {
        driver.write32(VIRTIO_MMIO_DEVICE_FEATURES_SEL, sel);
        assert_eq!(page32(&driver, VIRTIO_MMIO_DEVICE_FEATURES), features);
        assert_page_is_read(&driver, "with features selected");
    }
    driver.negotiate(0);
    assert_eq!(
        page32(&driver, VIRTIO_MMIO_STATUS),
        ACKNOWLEDGE | DRIVER | FEATURES_OK
    );
    assert_page_is_read(&driver, "at FEATURES_OK");

    driver.setup_queue(1, None);
    for (sel, max_size, ready) in [(0, 16, 0), (2, 0, 0), (1, 256, 1)] {
        driver.write32(VIRTIO_MMIO_QUEUE_SEL, sel);
        assert_eq!(page32(&driver, VIRTIO_MMIO_QUEUE_NUM_MAX), max_size);
        assert_eq!(page32(&driver, VIRTIO_MMIO_QUEUE_READY), ready);
        assert_page_is_read(&driver, "with a queue selected");
    }
    driver.write32(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(page32(&driver, VIRTIO_MMIO_QUEUE_READY), 0);
    driver.driver_ok();
    assert_eq!(
        page32(&driver, VIRTIO_MMIO_STATUS),
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    );
    assert_page_is_read(&driver, "at DRIVER_OK");

    let generation = page32(&driver, VIRTIO_MMIO_CONFIG_GENERATION);
    driver.interrupt().signal_queue();
    driver.interrupt().signal_needs_reset();
    assert_eq!(page32(&driver, VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    assert_ne!(page32(&driver, VIRTIO_MMIO_STATUS) & NEEDS_RESET, 0);
    assert_ne!(page32(&driver, VIRTIO_MMIO_CONFIG_GENERATION), generation);
    assert_page_is_read(&driver, "of a device that needs a reset");

    driver.write32(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    driver.reset();
    for (register, value) in [
        (VIRTIO_MMIO_STATUS, 0),
        (VIRTIO_MMIO_INTERRUPT_STATUS, 0),
        (VIRTIO_MMIO_DEVICE_FEATURES, offered as u32),
        (VIRTIO_MMIO_QUEUE_NUM_MAX, 16),
        (VIRTIO_MMIO_QUEUE_READY, 0),
    ] {
        assert_eq!(page32(&driver, register), value, "{register:#x}");
    }
    assert_page_is_read(&driver, "after a reset");
}

#[test]
fn the_identity_registers_read_as_the_specification_says() {
    let (driver, _) = probe();
    assert_eq!(driver.read32(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(driver.read32(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.read32(VIRTIO_MMIO_DEVICE_ID), 42);
    for sel in 0..4 {
        driver.write32(VIRTIO_MMIO_SHM_SEL, sel);
        assert_eq!(driver.read32(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
        assert_eq!(driver.read32(VIRTIO_MMIO_SHM_LEN_HIGH), u32::MAX);
    }
}

#[test]
fn a_driver_reaches_driver_ok_and_the_device_gets_what_was_negotiated() {
    let (mut driver, record) = probe();
    driver.start(1 << 5);
    let activations = record.activations.lock().unwrap();
    let [activation] = &activations[..] else {
        panic!("{} activations", activations.len());
    };
    assert_eq!(activation.features, 1 << 5 | VERSION_1);
    assert!(activation.has_feature(5) && !activation.has_feature(40));
    for (index, active) in activation.queues.iter().enumerate() {
        assert_eq!(active.queue.size(), driver.queue(index).size);
        assert_eq!(active.queue.desc_table(), driver.queue(index).desc_table);
        assert_eq!(active.queue.avail_ring(), driver.queue(index).avail_ring);
        assert_eq!(active.queue.used_ring(), driver.queue(index).used_ring);
        assert!(active.queue.ready() && !active.queue.event_idx_enabled());
    }
}

#[test]
fn event_idx_is_on_where_it_was_accepted() {
    let (mut driver, record) = probe();
    driver.start(u64::MAX);
    assert_eq!(driver.features(), OFFERED | TRANSPORT_FEATURES);
    let activations = record.activations.lock().unwrap();
    assert!(activations[0].queues[0].queue.event_idx_enabled());
}

#[test]
fn features_that_were_not_offered_or_lack_version_1_are_refused() {
    for features in [0, OFFERED, VERSION_1 | 1 << 6, u64::MAX] {
        let (mut driver, _) = probe();
        driver.reset();
        driver.add_status(ACKNOWLEDGE);
        driver.add_status(DRIVER);
        driver.write_features(features);
        driver.add_status(FEATURES_OK);
        assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER, "{features:#x}");
    }
}

#[test]
fn features_cannot_change_after_features_ok() {
    let (mut driver, record) = probe();
    driver.negotiate(0);
    driver.write_features(u64::MAX);
    driver.driver_ok();
    assert_eq!(record.activations.lock().unwrap()[0].features, VERSION_1);
}

#[test]
fn status_bits_are_accepted_only_in_order_and_never_taken_back() {
    let (mut driver, record) = probe();
    driver.reset();
    for status in [DRIVER, FEATURES_OK, DRIVER_OK, DRIVER | DRIVER_OK] {
        driver.write32(VIRTIO_MMIO_STATUS, status);
        assert_eq!(driver.status(), 0, "after {status:#x}");
    }
    driver.write32(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER);
    driver.write32(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER);
    driver.add_status(FAILED);
    driver.write_features(VERSION_1);
    driver.add_status(FEATURES_OK);
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER | FAILED);
    assert!(record.activations.lock().unwrap().is_empty());
    driver.start(0);
    assert_eq!(record.activations.lock().unwrap().len(), 1);
}

#[test]
fn driver_ok_written_twice_activates_once() {
    let (mut driver, record) = probe();
    driver.start(0);
    driver.driver_ok();
    assert_eq!(record.activations.lock().unwrap().len(), 1);
}

#[test]
fn queue_sizes_that_are_not_allowed_are_refused() {
    let (mut driver, _) = probe();
    driver.negotiate(0);
    for size in [0, 3, 32, 0xffff, 0x1_0010, u32::MAX] {
        driver.write_queue_registers(0, size, [0x1000, 0x2000, 0x3000]);
        driver.write32(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(driver.read32(VIRTIO_MMIO_QUEUE_READY), 0, "size {size}");
    }
    driver.write_queue_registers(0, 16, [0x1000, 0x2000, 0x3000]);
    driver.write32(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(driver.read32(VIRTIO_MMIO_QUEUE_READY), 1);
}

#[test]
fn misaligned_rings_are_refused() {
    let (mut driver, _) = probe();
    driver.negotiate(0);
    for rings in [
        [0x1008, 0x2000, 0x3000],
        [0x1000, 0x2001, 0x3000],
        [0x1000, 0x2000, 0x3002],
    ] {
        driver.write_queue_registers(0, 16, rings);
        driver.write32(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(driver.read32(VIRTIO_MMIO_QUEUE_READY), 0, "{rings:x?}");
    }
}

#[test]
fn a_queue_that_does_not_exist_reads_as_absent_and_takes_no_setup() {
    let (mut driver, _) = probe();
    driver.negotiate(0);
    for index in [2, 0x1_0000, u32::MAX as usize] {
        driver.write_queue_registers(index, 16, [0x1000, 0x2000, 0x3000]);
        driver.write32(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(driver.read32(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
        assert_eq!(driver.read32(VIRTIO_MMIO_QUEUE_READY), 0);
    }
}

#[test]
fn a_ready_queue_keeps_its_parameters_and_an_active_one_stays_ready() {
    let (mut driver, record) = probe();
    driver.negotiate(0);
    driver.setup_queue(0, Some(8));
    let table = driver.queue(0).desc_table;
    driver.write_queue_registers(0, 4, [0x1000, 0x2000, 0x3000]);
    driver.driver_ok();
    driver.write32(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(driver.read32(VIRTIO_MMIO_QUEUE_READY), 1);
    driver.write_queue_registers(1, 16, [0x1000, 0x2000, 0x3000]);
    driver.write32(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(driver.read32(VIRTIO_MMIO_QUEUE_READY), 0);
    let activations = record.activations.lock().unwrap();
    let [first, second] = &activations[0].queues[..] else {
        panic!("two queues");
    };
    assert_eq!((first.queue.size(), first.queue.desc_table()), (8, table));
    assert!(!second.queue.ready());
}

#[test]
fn rings_outside_of_memory_ask_for_a_reset_and_start_nothing() {
    let end = REGION_SIZE as u64;
    for rings in [
        [end - 128, 0x2000, 0x3000],
        [0x1000, end, 0x3000],
        [0x1000, 0x2000, end - 64],
        [0x1000, 0x2000, HIGH_REGION - 0x1000],
        [u64::MAX - 15, 0x2000, 0x3000],
        [0x1000, u64::MAX - 1, u64::MAX - 3],
    ] {
        let (mut driver, record) = probe();
        driver.negotiate(0);
        driver.write_queue_registers(0, 16, rings);
        driver.write32(VIRTIO_MMIO_QUEUE_READY, 1);
        driver.driver_ok();
        assert_ne!(driver.status() & NEEDS_RESET, 0, "{rings:x?}");
        assert!(record.activations.lock().unwrap().is_empty(), "{rings:x?}");
        assert_ne!(driver.read32(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
        driver.start(0);
        assert_eq!(record.activations.lock().unwrap().len(), 1, "{rings:x?}");
    }
}

#[test]
fn a_device_that_cannot_start_asks_for_a_reset() {
    let record = Arc::new(Record::default());
    let device = Probe {
        record: record.clone(),
        fails: true,
    };
    let mut driver = MockDriver::new(Box::new(device));
    driver.negotiate(0);
    driver.driver_ok();
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    driver.reset();
    assert_eq!(driver.status(), 0);
}

#[test]
fn a_reset_stops_the_device_and_clears_everything() {
    let (mut driver, record) = probe();
    driver.start(u64::MAX);
    driver.interrupt().signal_queue();
    driver.interrupt().signal_needs_reset();
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    driver.reset();
    assert_eq!(record.resets.load(Ordering::SeqCst), 1);
    assert_eq!(driver.read32(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    for index in 0..2 {
        driver.write32(VIRTIO_MMIO_QUEUE_SEL, index);
        assert_eq!(driver.read32(VIRTIO_MMIO_QUEUE_READY), 0);
    }
    driver.reset();
    assert_eq!(
        record.resets.load(Ordering::SeqCst),
        1,
        "an idle device needs no reset"
    );
}

#[test]
fn needs_reset_read_back_into_the_status_does_no_harm() {
    let (mut driver, record) = probe();
    driver.negotiate(0);
    driver.interrupt().signal_needs_reset();
    driver.add_status(DRIVER_OK);
    assert_eq!(record.activations.lock().unwrap().len(), 1);
    driver.interrupt().reset();
    assert_eq!(driver.status() & NEEDS_RESET, 0);
}

#[test]
fn dropping_the_transport_stops_the_device() {
    let (mut driver, record) = probe();
    driver.start(0);
    drop(driver);
    assert_eq!(record.resets.load(Ordering::SeqCst), 1);
}

#[test]
fn a_notification_reaches_the_kick_of_its_queue_only() {
    let (mut driver, record) = probe();
    driver.start(0);
    for queue in [1, 2, 0x1_0001, u32::MAX] {
        driver.write32(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
    }
    let activations = record.activations.lock().unwrap();
    assert_eq!(activations[0].queues[1].kick.read().unwrap(), 1);
    assert!(activations[0].queues[0].kick.read().is_err());
}

#[test]
fn interrupt_bits_are_shown_and_acknowledged() {
    let (driver, _) = probe();
    driver.interrupt().signal_queue();
    driver.interrupt().signal_config();
    assert_eq!(driver.read32(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    driver.write32(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    assert_eq!(
        driver.read32(VIRTIO_MMIO_INTERRUPT_STATUS),
        VIRTIO_MMIO_INT_CONFIG
    );
}

#[test]
fn what_is_acknowledged_together_is_cleared_together() {
    let (driver, _) = probe();
    driver.interrupt().signal_queue();
    driver.interrupt().signal_config();
    driver.write32(VIRTIO_MMIO_INTERRUPT_ACK, 3);
    assert_eq!(driver.read32(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

/// What a guest sees whose acknowledgements of used buffers go to an ioeventfd.
#[test]
fn a_used_buffer_bit_that_stays_hides_no_event() {
    let (mut driver, _) = probe();
    driver.start(0);
    let line = || driver.interrupt().line().read().unwrap_or(0);
    driver.interrupt().signal_queue();
    assert_eq!(line(), 1);
    driver.interrupt().signal_queue();
    assert_eq!(line(), 1, "buffers while the bit is set");
    driver.interrupt().signal_config();
    assert_eq!(line(), 1, "a configuration while the bit is set");
    assert_eq!(driver.read32(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    // Signalled again between what the driver read and what it writes: there is one more edge.
    driver.interrupt().signal_config();
    driver.write32(VIRTIO_MMIO_INTERRUPT_ACK, 3);
    assert_eq!(line(), 1);
    assert_eq!(driver.read32(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    driver.interrupt().signal_queue();
    driver.reset();
    assert_eq!(driver.read32(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn the_config_generation_moves_when_the_configuration_does() {
    let (driver, _) = probe();
    let before = driver.read32(VIRTIO_MMIO_CONFIG_GENERATION);
    assert_eq!(driver.read32(VIRTIO_MMIO_CONFIG_GENERATION), before);
    driver.interrupt().signal_config();
    assert_ne!(driver.read32(VIRTIO_MMIO_CONFIG_GENERATION), before);
}

#[test]
fn the_configuration_space_takes_any_width_and_ends_in_zeroes() {
    let (mut driver, record) = probe();
    assert_eq!(driver.config(1, 1), [2]);
    assert_eq!(driver.config(0, 8), [1, 2, 3, 4, 5, 6, 0, 0]);
    assert_eq!(driver.config(0xe00, 4), [0; 4]);
    let config = u64::from(VIRTIO_MMIO_CONFIG);
    driver.transport().write(config + 2, &[9]);
    driver.negotiate(0);
    driver.transport().write(config + 3, &[7, 8]);
    assert_eq!(
        *record.config_writes.lock().unwrap(),
        [(3, vec![7, 8])],
        "writes before DRIVER are ignored"
    );
}

#[test]
fn accesses_of_any_offset_and_width_are_harmless() {
    let (mut driver, record) = probe();
    driver.negotiate(0);
    for offset in (0..MMIO_SIZE).chain([u64::MAX - 8, u64::MAX]) {
        for width in [0, 1, 2, 3, 4, 8, 16] {
            let mut data = vec![0xaa; width];
            driver.transport().read(offset, &mut data);
            let shown: Vec<_> = (offset..offset.saturating_add(width as u64))
                .take_while(|at| *at < CONFIG)
                .map(|at| page32(&driver, at as u32 / 4 * 4).to_le_bytes()[at as usize % 4])
                .collect();
            assert_eq!(data[..shown.len()], shown, "{offset:#x}, {width} bytes");
            // Not the status register: a stray reset would hide the rest.
            if offset / 4 != u64::from(VIRTIO_MMIO_STATUS) / 4 {
                driver.transport().write(offset, &vec![0xff; width]);
            }
        }
    }
    assert!(record.activations.lock().unwrap().is_empty());
    driver.start(0);
}

#[test]
fn a_device_with_an_impossible_queue_is_refused() {
    struct Impossible;
    impl VirtioDevice for Impossible {
        fn device_type(&self) -> u32 {
            1
        }
        fn features(&self) -> u64 {
            0
        }
        fn queue_max_sizes(&self) -> &[u16] {
            &[24]
        }
        fn read_config(&self, _: u64, _: &mut [u8]) {}
        fn activate(&mut self, _: Activation) -> Result<(), ActivateError> {
            Ok(())
        }
        fn reset(&mut self) {}
    }
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    let line = EventFd::new(0).unwrap();
    let error = MmioTransport::new(Box::new(Impossible), memory, line).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
}
