//! Both halves of the relay back to back, and each against a peer that is slow, gone or hostile.

use super::*;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;

/// Long enough for the slowest machine; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(30);

/// A relay that runs: how it ended, the frames' other end, the stream's other end.
fn relayed() -> (mpsc::Receiver<Result<()>>, OwnedFd, UnixStream) {
    let (card, frames) = frame_sockets();
    let (stream, peer) = UnixStream::pair().unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    (start(stream, frames), card, peer)
}

fn start(stream: UnixStream, frames: OwnedFd) -> mpsc::Receiver<Result<()>> {
    let (done, ended) = mpsc::channel();
    thread::spawn(move || done.send(relay(stream.into(), frames)));
    ended
}

/// The first blocks and the second does not.
fn frame_sockets() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC;
    let (near, far) =
        net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    net::sockopt::set_socket_timeout(&near, net::sockopt::Timeout::Recv, Some(PATIENCE)).unwrap();
    rustix::io::ioctl_fionbio(&far, true).unwrap();
    (near, far)
}

/// A frame of `len` bytes, its header included, that can be told from others.
fn frame(number: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| (number * 31 + at * 7) as u8).collect()
}

fn framed(frame: &[u8]) -> Vec<u8> {
    let mut bytes = (frame.len() as u32).to_le_bytes().to_vec();
    bytes.extend(frame);
    bytes
}

fn receive(from: &OwnedFd) -> Vec<u8> {
    let mut buffer = vec![0; MAX_FRAME + 1];
    let len = rustix::io::read(from, &mut buffer).unwrap();
    buffer.truncate(len);
    buffer
}

#[test]
fn frames_of_all_lengths_pass_both_ways_in_order() {
    let (here, frames_here) = frame_sockets();
    let (there, frames_there) = frame_sockets();
    let (stream_here, stream_there) = UnixStream::pair().unwrap();
    let ended = [
        start(stream_here, frames_here),
        start(stream_there, frames_there),
    ];
    let lens = [HEADER_LEN + 1, 60, 1526, 9000, MAX_FRAME - 1, MAX_FRAME];
    thread::scope(|scope| {
        for (from, to) in [(&here, &there), (&there, &here)] {
            scope.spawn(move || {
                for number in 0..300 {
                    let sent = frame(number, lens[number % lens.len()]);
                    assert_eq!(rustix::io::write(from, &sent), Ok(sent.len()));
                }
            });
            scope.spawn(move || {
                for number in 0..300 {
                    let wanted = frame(number, lens[number % lens.len()]);
                    assert!(receive(to) == wanted, "frame {number} is another");
                }
            });
        }
    });
    drop(here);
    for half in ended {
        let result = half.recv_timeout(PATIENCE);
        result.expect("both halves end").expect("without an error");
    }
}

#[test]
fn a_frame_may_come_in_pieces_and_many_may_come_at_once() {
    let (_ended, card, mut peer) = relayed();
    let whole = framed(&frame(1, 100));
    for byte in &whole {
        peer.write_all(&[*byte]).unwrap();
    }
    assert_eq!(receive(&card), frame(1, 100));
    let many: Vec<u8> = (0..500).flat_map(|n| framed(&frame(n, 90))).collect();
    let writer = thread::spawn(move || peer.write_all(&many).map(|()| peer));
    for number in 0..500 {
        assert_eq!(receive(&card), frame(number, 90), "frame {number}");
    }
    drop(writer.join().unwrap().unwrap());
}

#[test]
fn an_impossible_length_ends_the_relay_with_an_error() {
    for len in [0, HEADER_LEN, MAX_FRAME + 1, 1 << 20, u32::MAX as usize] {
        let (ended, card, mut peer) = relayed();
        peer.write_all(&(len as u32).to_le_bytes()).unwrap();
        let error = ended.recv_timeout(PATIENCE).unwrap().unwrap_err();
        assert!(
            error
                .to_string()
                .contains(&format!("a frame of {len} bytes")),
            "{error}"
        );
        assert!(receive(&card).is_empty(), "the card's end is not closed");
        assert_eq!(peer.read(&mut [0]).unwrap(), 0, "the stream is not closed");
    }
}

#[test]
fn half_a_frame_before_the_end_is_dropped_quietly() {
    let (ended, card, mut peer) = relayed();
    peer.write_all(&framed(&frame(1, 60))).unwrap();
    peer.write_all(&framed(&frame(2, 1000))[..500]).unwrap();
    drop(peer);
    ended.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(receive(&card), frame(1, 60));
    assert!(receive(&card).is_empty(), "half a frame was passed on");
}

#[test]
fn the_end_of_either_side_ends_the_relay() {
    let (ended, card, mut peer) = relayed();
    drop(card);
    ended.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    let (ended, card, peer) = relayed();
    drop(peer);
    ended.recv_timeout(PATIENCE).unwrap().unwrap();
    assert!(receive(&card).is_empty());
}

#[test]
fn a_card_that_takes_nothing_holds_the_stream_up_and_not_the_other_way() {
    let (ended, card, mut peer) = relayed();
    peer.set_nonblocking(true).unwrap();
    let bytes = framed(&frame(3, 1500));
    let mut sent = 0_usize;
    // Until nothing moves any more: what is held in all is bounded.
    let mut stuck = 0;
    while stuck < 50 {
        match peer.write(&bytes[sent % bytes.len()..]) {
            Ok(len) => (sent, stuck) = (sent + len, 0),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                stuck += 1;
                thread::sleep(Duration::from_millis(2));
            }
        }
        assert!(sent < 64 << 20, "the relay takes without end");
    }
    peer.set_nonblocking(false).unwrap();
    let up = frame(4, 200);
    assert_eq!(rustix::io::write(&card, &up), Ok(up.len()));
    let mut received = vec![0; PREFIX + up.len()];
    peer.read_exact(&mut received).unwrap();
    assert_eq!(received, framed(&up));
    for number in 0..sent / bytes.len() {
        assert!(
            receive(&card) == bytes[PREFIX..],
            "frame {number} is another"
        );
    }
    drop(peer);
    ended.recv_timeout(PATIENCE).unwrap().unwrap();
}

#[test]
fn an_offer_is_private_is_taken_once_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let offered = || {
        let (card, frames) = frame_sockets();
        let tap = HostTap {
            name: "tap0".to_owned(),
            mtu: Some(1400),
            frames,
        };
        (card, tap.offer(&dir.path().join("vsock")).unwrap())
    };
    let (card, offer) = offered();
    let (port, mtu) = parse(offer.variable()).unwrap();
    assert_eq!(mtu, Some(1400));
    let path = dir.path().join(format!("vsock_{port}"));
    let mode = path.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let mut peer = UnixStream::connect(&path).unwrap();
    peer.write_all(&framed(&frame(1, 60))).unwrap();
    assert_eq!(receive(&card), frame(1, 60));
    assert!(UnixStream::connect(&path).is_err(), "it was taken twice");
    drop(offer);
    let (_card, unused) = offered();
    drop(unused);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn what_the_variable_says_is_understood_or_refused() {
    assert_eq!(parse("1073741824"), Some((1 << 30, None)));
    assert_eq!(parse("7,9000"), Some((7, Some(9000))));
    for bad in [
        "",
        ",",
        "7,",
        ",1500",
        "-1",
        "7,70000",
        "4294967296",
        "7,1,2",
    ] {
        assert_eq!(parse(bad), None, "{bad:?}");
    }
}
