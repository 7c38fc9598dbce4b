//! The device against a mock driver, on sockets that stand for a TAP and, where the kernel permits
//! it, on a real TAP in a network namespace of the test's own.

use super::*;
use crate::testing::{Buffer, HIGH_REGION, MockDriver, NEXT, PATIENCE, WRITE};
use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::thread;
use virtio_queue::desc::split::Descriptor;

const RX: usize = 0;
const TX: usize = 1;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const HEADER: [u8; 12] = [0; 12];

/// A device whose TAP is a socket per pair, and the host's ends of these.
fn fake(pairs: u16) -> (Net, Vec<UnixDatagram>) {
    let (devices, hosts): (Vec<_>, Vec<_>) = (0..pairs)
        .map(|_| {
            let (device, host) = UnixDatagram::pair().unwrap();
            device.set_nonblocking(true).unwrap();
            host.set_read_timeout(Some(PATIENCE)).unwrap();
            (OwnedFd::from(device), host)
        })
        .unzip();
    let config = NetConfig {
        tap: Tap::from_sockets(devices, None),
        mac: Some(MAC),
        queue_pairs: pairs,
    };
    (Net::new(config).unwrap(), hosts)
}

fn started(pairs: u16) -> (MockDriver, Vec<UnixDatagram>, Arc<NetCounters>) {
    let (net, hosts) = fake(pairs);
    let counters = net.counters().remove(0);
    (MockDriver::started(Box::new(net)), hosts, counters)
}

/// A header and a recognizable frame of `len` bytes behind it.
fn frame(len: usize) -> Vec<u8> {
    let body = (0..len).map(|i| (i * 7 + i / 256) as u8);
    HEADER.into_iter().chain(body).collect()
}

/// Offers `count` receive buffers of `len` bytes from the high region on.
fn offer(driver: &mut MockDriver, first: u64, count: u64, len: u32) {
    for i in first..first + count {
        let addr = HIGH_REGION + i * 0x1000;
        driver.submit(RX, &[Buffer::writable(addr, len)]);
    }
    driver.kick(RX);
}

/// Takes one frame off the receive queue, whose buffers begin with number `first`: the header's
/// num_buffers and what came after the header.
fn take_frame(driver: &mut MockDriver, first: u64) -> (u16, Vec<u8>) {
    let used = driver.wait_used(RX);
    let mut bytes = driver.read(HIGH_REGION + first * 0x1000, used.len as usize);
    let count = u16::from_le_bytes([bytes[10], bytes[11]]);
    for i in 1..u64::from(count) {
        let used = driver
            .pop_used(RX)
            .expect("all buffers of a frame must be used together");
        bytes.extend(driver.read(HIGH_REGION + (first + i) * 0x1000, used.len as usize));
    }
    (count, bytes.split_off(12))
}

#[test]
fn the_configuration_space_shows_mac_link_and_pairs() {
    let (net, _hosts) = fake(3);
    let driver = MockDriver::new(Box::new(net));
    assert_eq!(driver.config(0, 6), MAC);
    assert_eq!(driver.config(6, 4), [1, 0, 3, 0]);
    assert_eq!(driver.config(8, 8)[4..], [0; 4], "past the end");
    let features = driver.offered_features();
    for bit in [VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MAC] {
        assert_ne!(features & (1 << bit), 0, "feature {bit}");
    }
    let (net, _hosts) = fake(1);
    assert_eq!(net.features() & (1 << VIRTIO_NET_F_MQ), 0);
    assert_eq!(net.features() & (1 << VIRTIO_NET_F_GUEST_UFO), 0);
}

#[test]
fn impossible_devices_are_refused() {
    let made = |mac, queue_pairs| {
        let (_, host) = UnixDatagram::pair().unwrap();
        let tap = Tap::from_sockets(vec![OwnedFd::from(host)], None);
        let config = NetConfig {
            tap,
            mac,
            queue_pairs,
        };
        Net::new(config).map(drop)
    };
    assert!(matches!(made(None, 0), Err(NetError::QueuePairs { .. })));
    assert!(matches!(made(None, 2), Err(NetError::QueuePairs { .. })));
    let group = made(Some([1, 2, 3, 4, 5, 6]), 1).unwrap_err().to_string();
    assert!(
        group.starts_with("01:02:03:04:05:06 is no address"),
        "{group}"
    );
    assert!(made(Some([0; 6]), 1).is_err());
    assert!(made(Some(MAC), 1).is_ok());
}

#[test]
fn a_frame_from_the_guest_reaches_the_host_with_its_header() {
    let (mut driver, hosts, counters) = started(1);
    let sent = frame(3000);
    let addr = driver.alloc_with(&sent);
    // In pieces that cut the header.
    let pieces = [(0, 5), (5, 100), (105, 2907)];
    let buffers = pieces.map(|(at, len)| Buffer::readable(addr + at, len));
    assert_eq!(driver.request(TX, &buffers), 0);
    let mut received = vec![0; 4096];
    let len = hosts[0].recv(&mut received).unwrap();
    assert_eq!(received[..len], sent);
    assert_eq!(counters.tx_frames.load(Ordering::Relaxed), 1);
    assert_eq!(counters.tx_bytes.load(Ordering::Relaxed), 3000);
}

#[test]
fn more_frames_than_a_batch_all_reach_the_host_in_order() {
    let (mut driver, hosts, _) = started(1);
    let host = hosts.into_iter().next().unwrap();
    // A socket holds few datagrams, a TAP many: what is not read in time would be dropped.
    for round in 0..50_u32 {
        for i in 0..5 {
            let mut sent = frame(60);
            sent[12..16].copy_from_slice(&(round * 5 + i).to_le_bytes());
            let addr = HIGH_REGION + u64::from(i) * 4096;
            driver.write(addr, &sent);
            driver.submit(TX, &[Buffer::readable(addr, 72)]);
        }
        driver.kick(TX);
        for i in 0..5 {
            driver.wait_used(TX);
            let mut received = [0; 128];
            assert_eq!(host.recv(&mut received).unwrap(), 72);
            let number = u32::from_le_bytes(received[12..16].try_into().unwrap());
            assert_eq!(number, round * 5 + i);
        }
    }
}

#[test]
fn a_host_without_room_holds_the_guests_frames_up_and_loses_none() {
    let (mut driver, hosts, counters) = started(1);
    // More than any socket holds.
    let (count, len) = (100_u64, 16_000);
    for i in 0..count {
        let mut sent = frame(len);
        sent[12] = i as u8;
        let addr = HIGH_REGION + 0x1000 + i * 16;
        driver.write(addr, &sent[..13]);
        let body = HIGH_REGION + 0x10000;
        let pieces = [
            Buffer::readable(addr, 13),
            Buffer::readable(body, len as u32 - 1),
        ];
        driver.submit(TX, &pieces);
    }
    driver.kick(TX);
    let mut received = vec![0; 2 * len];
    for i in 0..count {
        let got = hosts[0].recv(&mut received).unwrap();
        assert_eq!((got, received[12]), (12 + len, i as u8), "frame {i}");
    }
    for _ in 0..count {
        driver.wait_used(TX);
    }
    assert_eq!(counters.tx_frames.load(Ordering::Relaxed), count);
    assert_eq!(counters.tx_dropped.load(Ordering::Relaxed), 0);
}

#[test]
fn a_frame_that_waits_for_the_host_goes_back_when_the_host_is_gone() {
    let (mut driver, hosts, counters) = started(1);
    for _ in 0..100 {
        let body = Buffer::readable(HIGH_REGION, 16_000);
        driver.submit(TX, &[body]);
    }
    driver.kick(TX);
    driver.wait_used(TX);
    drop(hosts);
    for _ in 1..100 {
        driver.wait_used(TX);
    }
    assert_ne!(counters.tx_dropped.load(Ordering::Relaxed), 0);
}

#[test]
fn a_frame_for_the_guest_takes_the_buffers_it_needs_and_no_more() {
    // With 64 buffers the longest frame fits at once, with 41 it goes through the host's buffer.
    for offered in [64, 41] {
        let (mut driver, hosts, counters) = started(1);
        offer(&mut driver, 0, offered, 1526);
        let sent = frame(60_000);
        hosts[0].send(&sent).unwrap();
        let (count, received) = take_frame(&mut driver, 0);
        assert_eq!(count, 40, "60,012 bytes in buffers of 1,526");
        assert!(received == sent[12..], "the frame changed on its way");
        hosts[0].send(&frame(60)).unwrap();
        let (count, received) = take_frame(&mut driver, 40);
        assert_eq!((count, received), (1, frame(60).split_off(12)));
        assert_eq!(driver.pop_used(RX), None);
        assert_eq!(counters.rx_frames.load(Ordering::Relaxed), 2);
        assert_eq!(counters.rx_bytes.load(Ordering::Relaxed), 60_060);
    }
}

#[test]
fn a_frame_waits_until_there_are_buffers_for_all_of_it() {
    let (mut driver, hosts, counters) = started(1);
    let sent = frame(6000);
    hosts[0].send(&sent).unwrap();
    offer(&mut driver, 0, 2, 1526);
    offer(&mut driver, 2, 1, 1526);
    offer(&mut driver, 3, 1, 1526);
    let (count, received) = take_frame(&mut driver, 0);
    assert_eq!(count, 4);
    assert!(received == sent[12..], "the frame changed on its way");
    assert_eq!(counters.rx_dropped.load(Ordering::Relaxed), 0);
}

#[test]
fn a_frame_that_no_offer_can_hold_is_dropped_and_the_next_one_comes() {
    let (net, hosts) = fake(1);
    let counters = net.counters().remove(0);
    let mut driver = MockDriver::new(Box::new(net));
    driver.negotiate(u64::MAX);
    driver.setup_queue(RX, Some(4));
    driver.setup_queue(TX, Some(4));
    driver.driver_ok();
    offer(&mut driver, 0, 4, 1000);
    hosts[0].send(&frame(5000)).unwrap();
    hosts[0].send(&frame(100)).unwrap();
    let (count, received) = take_frame(&mut driver, 0);
    assert_eq!((count, received), (1, frame(100).split_off(12)));
    assert_eq!(counters.rx_dropped.load(Ordering::Relaxed), 1);
}

#[test]
fn without_mergeable_buffers_a_frame_takes_one_chain_or_none() {
    let (net, hosts) = fake(1);
    let counters = net.counters().remove(0);
    let wanted = !(1 << VIRTIO_NET_F_MRG_RXBUF);
    let mut driver = MockDriver::started_with(Box::new(net), wanted);
    let pieces = [0, 1].map(|i| Buffer::writable(HIGH_REGION + i * 0x1000, 0x1000));
    driver.submit(RX, &pieces);
    driver.kick(RX);
    hosts[0].send(&frame(9000)).unwrap();
    let sent = frame(5000);
    hosts[0].send(&sent).unwrap();
    let used = driver.wait_used(RX);
    assert_eq!(used.len, 5012);
    let received = driver.read(HIGH_REGION, 5012);
    assert_eq!(received[10..12], [1, 0], "num_buffers");
    assert!(received[12..] == sent[12..], "the frame changed on its way");
    assert_eq!(counters.rx_dropped.load(Ordering::Relaxed), 1);
}

#[test]
fn frames_that_cannot_be_right_come_back_and_reach_nobody() {
    let (mut driver, hosts, counters) = started(1);
    let cases: [&[Descriptor]; 6] = [
        // Too short for a frame, no frame, too long.
        &[Descriptor::new(HIGH_REGION, 11, 0, 0)],
        &[Descriptor::new(HIGH_REGION, 12, 0, 0)],
        &[Descriptor::new(HIGH_REGION, 1 << 20, 0, 0)],
        // Not for reading, outside memory, a loop.
        &[Descriptor::new(HIGH_REGION, 100, WRITE, 0)],
        &[Descriptor::new(64 << 20, 100, 0, 0)],
        &[Descriptor::new(HIGH_REGION, 100, NEXT, 0)],
    ];
    for case in cases {
        driver.submit_raw(TX, case, 0);
        driver.kick(TX);
        assert_eq!(driver.wait_used(TX).len, 0);
    }
    assert_eq!(counters.tx_dropped.load(Ordering::Relaxed), 6);
    driver.write(HIGH_REGION, &frame(50));
    driver.submit_raw(TX, &[Descriptor::new(HIGH_REGION, 62, 0, 0)], 0);
    driver.kick(TX);
    driver.wait_used(TX);
    let mut received = [0; 128];
    assert_eq!(hosts[0].recv(&mut received).unwrap(), 62, "the good frame");
}

#[test]
fn receive_buffers_that_cannot_be_right_come_back_empty_and_good_ones_are_filled() {
    let (mut driver, hosts, _) = started(1);
    let cases: [&[Descriptor]; 4] = [
        &[Descriptor::new(HIGH_REGION, 11, WRITE, 0)],
        &[Descriptor::new(HIGH_REGION, 2000, 0, 0)],
        &[Descriptor::new(u64::MAX - 100, 2000, WRITE, 0)],
        &[Descriptor::new(HIGH_REGION, 2000, WRITE | NEXT, 0)],
    ];
    for case in cases {
        driver.submit_raw(RX, case, 0);
        driver.kick(RX);
        assert_eq!(driver.wait_used(RX).len, 0);
    }
    driver.submit_raw(RX, &[Descriptor::new(HIGH_REGION, 2000, WRITE, 0)], 0);
    driver.kick(RX);
    hosts[0].send(&frame(100)).unwrap();
    assert_eq!(driver.wait_used(RX).len, 112);
}

#[test]
fn nonsense_in_a_ring_needs_a_reset_and_a_reset_heals() {
    for queue in [RX, TX] {
        let (mut driver, hosts, _) = started(1);
        driver.set_avail_idx(queue, 4000);
        driver.notify(queue);
        assert!(driver.wait_needs_reset(PATIENCE), "queue {queue}");
        driver.start(u64::MAX);
        offer(&mut driver, 0, 1, 2000);
        hosts[0].send(&frame(100)).unwrap();
        assert_eq!(take_frame(&mut driver, 0).1.len(), 100);
    }
}

#[test]
fn nonsense_in_the_rings_stalls_the_guest_only() {
    for seed in 1..12 {
        let (mut driver, hosts, _) = started(2);
        for host in &hosts {
            host.set_nonblocking(true).unwrap();
            // Frames for the guest to choke on; what does not fit the socket is left out.
            while host.send(&frame(3000)).is_ok() {}
        }
        crate::virtio::ring::tests::hammer(&mut driver, 5, seed * 0x5851_f42d);
    }
}

#[test]
fn a_reset_with_buffers_and_frames_outstanding_forgets_them() {
    let (mut driver, hosts, _) = started(1);
    offer(&mut driver, 0, 3, 1526);
    hosts[0].send(&frame(9000)).unwrap();
    driver.start(u64::MAX);
    offer(&mut driver, 0, 64, 1526);
    // The big frame was taken by the first driver or is still there for the second.
    hosts[0].send(&frame(77)).unwrap();
    let mut at = 0;
    loop {
        let (count, received) = take_frame(&mut driver, at);
        at += u64::from(count);
        if received.len() == 77 {
            break;
        }
        assert_eq!(received.len(), 9000);
    }
}

#[test]
fn the_control_queue_sets_the_number_of_pairs_and_refuses_all_else() {
    let (mut driver, hosts, _) = started(2);
    let control = 4;
    let command = driver.alloc(64);
    let ack = driver.alloc(1);
    let mut run = |bytes: &[u8]| {
        driver.write(command, bytes);
        driver.write(ack, &[9]);
        let buffers = [
            Buffer::readable(command, 2),
            Buffer::readable(command + 2, bytes.len() as u32 - 2),
            Buffer::writable(ack, 1),
        ];
        assert_eq!(driver.request(control, &buffers), 1);
        driver.read(ack, 1)[0]
    };
    assert_eq!(run(&[4, 0, 2, 0]), 0);
    assert_eq!(run(&[4, 0, 1, 0]), 0);
    for bad in [
        [4, 0, 0, 0],
        [4, 0, 3, 0],
        [4, 0, 255, 255],
        [4, 1, 1, 0],
        [0, 0, 1, 0],
    ] {
        assert_eq!(run(&bad), 1, "{bad:?}");
    }
    assert_eq!(run(&[4, 0, 1]), 1, "a command that is cut");
    assert_eq!(driver.request(control, &[Buffer::readable(command, 4)]), 0);

    // The second pair works as the first.
    let addr = driver.alloc(2000);
    driver.submit(2, &[Buffer::writable(addr, 2000)]);
    driver.kick(2);
    hosts[1].send(&frame(100)).unwrap();
    assert_eq!(driver.wait_used(2).len, 112);
}

#[test]
fn a_driver_without_mq_finds_the_control_queue_after_the_first_pair() {
    let (net, _hosts) = fake(2);
    let mut driver = MockDriver::started_with(Box::new(net), !(1 << VIRTIO_NET_F_MQ));
    let command = driver.alloc_with(&[4, 0, 1, 0]);
    let ack = driver.alloc(1);
    let buffers = [Buffer::readable(command, 4), Buffer::writable(ack, 1)];
    assert_eq!(driver.request(2, &buffers), 1);
}

/// Runs `test` as root in a network namespace of its own; says so on stderr where it cannot.
fn in_namespace(test: fn()) {
    let body = move || {
        // SAFETY: no memory is involved; only this thread changes its namespace.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 || File::open("/dev/net/tun").is_err()
        {
            eprintln!("SKIPPED: this needs root and /dev/net/tun");
            return;
        }
        test();
    };
    thread::spawn(body)
        .join()
        .expect("the test failed, see above");
}

fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .expect("the `ip` command");
    assert!(status.success(), "ip {arguments}");
}

#[test]
fn opening_a_tap_tells_what_is_wrong() {
    in_namespace(|| {
        for bad in ["", "a b", "tap%d", "a/b", "sixteen-bytes-xx"] {
            assert!(
                matches!(Tap::open(bad, 1), Err(TapError::BadName(_))),
                "{bad}"
            );
        }
        let missing = Tap::open("nosuch0", 2).unwrap_err().to_string();
        assert!(missing.contains("ip tuntap add dev nosuch0 mode tap user $USER multi_queue"));
        assert!(matches!(Tap::open("lo", 1), Err(TapError::NotATap(_))));
        ip("tuntap add dev one0 mode tap");
        ip("tuntap add dev two0 mode tap multi_queue");
        assert!(matches!(
            Tap::open("one0", 2),
            Err(TapError::NotMultiQueue(_))
        ));
        let one = Tap::open("one0", 1).unwrap();
        assert!(matches!(Tap::open("one0", 1), Err(TapError::Busy(_))));
        drop(one);
        assert!(Tap::open("one0", 1).is_ok(), "after the other has gone");
        assert_eq!(Tap::open("two0", 1).unwrap().queue_count(), 1);
        let two = Tap::open("two0", 2).unwrap();
        assert_eq!(two.queue_count(), 2);
        for pairs in [1, 2, 2, 1] {
            two.attach_queues(pairs).unwrap();
        }
        assert_eq!(two.mtu(), Some(1500));
    });
}

const ARP: [u8; 2] = [0x08, 0x06];
const IPV4: [u8; 2] = [0x08, 0x00];

#[test]
fn a_real_tap_carries_frames_both_ways() {
    in_namespace(|| {
        ip("tuntap add dev tap0 mode tap");
        ip("addr add 10.9.0.1/24 dev tap0");
        ip("link set tap0 up");
        let config = NetConfig {
            tap: Tap::open("tap0", 1).unwrap(),
            mac: Some(MAC),
            queue_pairs: 1,
        };
        let mut driver = MockDriver::started(Box::new(Net::new(config).unwrap()));
        assert_eq!(driver.config(10, 2), 1500_u16.to_le_bytes());
        offer(&mut driver, 0, 200, 1526);
        let host = UdpSocket::bind("10.9.0.1:7000").unwrap();
        host.set_read_timeout(Some(PATIENCE)).unwrap();
        host.send_to(b"from the host", "10.9.0.2:7001").unwrap();

        // The host asks who has 10.9.0.2; the guest answers.
        let mut at = 0;
        let request = take_matching(&mut driver, &mut at, |f| {
            f[12..14] == ARP && f[38..42] == [10, 9, 0, 2]
        });
        let mut reply = HEADER.to_vec();
        reply.extend(&request[6..12]);
        reply.extend(MAC);
        reply.extend(ARP);
        reply.extend([0, 1, 8, 0, 6, 4, 0, 2]);
        reply.extend(MAC);
        reply.extend([10, 9, 0, 2]);
        reply.extend(&request[22..32]);
        transmit(&mut driver, &reply);

        let datagram = take_matching(&mut driver, &mut at, |f| f[12..14] == IPV4 && f[23] == 17);
        assert!(datagram.ends_with(b"from the host"));

        // A datagram of the guest's, its checksum left out (0 is "none" for UDP).
        let mut sent = HEADER.to_vec();
        sent.extend(&request[6..12]);
        sent.extend(MAC);
        sent.extend(IPV4);
        let mut header = [
            0x45, 0, 0, 42, 0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1,
        ];
        let sum: u32 = header
            .chunks(2)
            .map(|w| u32::from(w[0]) << 8 | u32::from(w[1]))
            .sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        sent.extend(header);
        sent.extend([0x1b, 0x59, 0x1b, 0x58, 0, 22, 0, 0]);
        sent.extend(b"from the guest");
        transmit(&mut driver, &sent);
        let mut received = [0; 64];
        let (len, from) = host.recv_from(&mut received).unwrap();
        assert_eq!(&received[..len], b"from the guest");
        assert_eq!(from.to_string(), "10.9.0.2:7001");

        // The interface goes away under the device.
        ip("link del tap0");
        let addr = driver.alloc_with(&reply);
        let len = reply.len() as u32;
        assert_eq!(driver.request(TX, &[Buffer::readable(addr, len)]), 0);
    });
}

fn transmit(driver: &mut MockDriver, frame: &[u8]) {
    let addr = driver.alloc_with(frame);
    let len = frame.len() as u32;
    assert_eq!(driver.request(TX, &[Buffer::readable(addr, len)]), 0);
}

/// The next frame that is as wanted; others (IPv6 neighbour discovery) are passed over.
fn take_matching(driver: &mut MockDriver, at: &mut u64, wanted: fn(&[u8]) -> bool) -> Vec<u8> {
    loop {
        let (count, frame) = take_frame(driver, *at);
        *at += u64::from(count);
        if wanted(&frame) {
            return frame;
        }
    }
}

#[test]
fn a_device_whose_host_end_is_closed_still_gives_buffers_back() {
    let (mut driver, hosts, counters) = started(1);
    drop(hosts);
    offer(&mut driver, 0, 4, 1526);
    let addr = driver.alloc_with(&frame(60));
    assert_eq!(driver.request(TX, &[Buffer::readable(addr, 72)]), 0);
    assert_eq!(counters.tx_dropped.load(Ordering::Relaxed), 1);
}
