//! Host streams that are AF_VSOCK sockets, as in a VMM that runs in a virtual machine itself: what
//! they tell of their far end differs. These tests need the kernel's vsock loopback and say so
//! where it is missing.

use std::net::Shutdown;
use std::thread;

use rustix::net::{SendFlags, send};
use vsock::{VMADDR_CID_LOCAL, VsockAddr, VsockListener, VsockStream};

use super::*;

/// A connection through the loopback: the client, and what its listener accepted.
fn pair() -> Option<(VsockStream, VsockStream)> {
    let address = VsockAddr::new(VMADDR_CID_LOCAL, libc::VMADDR_PORT_ANY);
    let listener = match VsockListener::bind(&address) {
        Ok(listener) => listener,
        Err(error) => {
            println!("skipped: no vsock loopback: {error}");
            return None;
        }
    };
    let client = VsockStream::connect(&listener.local_addr().unwrap()).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    Some((client, listener.accept().unwrap().0))
}

/// Whether the far end of `stream` takes data still.
fn takes_data(stream: &VsockStream) -> bool {
    send(stream, &[], SendFlags::NOSIGNAL).is_ok()
}

#[test]
fn a_close_before_the_guests_end_resets_the_guests_end_after_its_data() {
    for half_closed in [false, true] {
        let Some((mut client, server)) = pair() else {
            return;
        };
        let mut guest = Guest::start();
        guest.join(b"", server);
        client.write_all(b"written, then closed").unwrap();
        if half_closed {
            client.shutdown(Shutdown::Write).unwrap();
            let (data, flags) = guest.receive_until(VIRTIO_VSOCK_OP_SHUTDOWN);
            assert_eq!(data, b"written, then closed");
            assert_eq!(flags, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
            drop(client);
            guest.receive_until(VIRTIO_VSOCK_OP_RST);
        } else {
            drop(client);
            let (data, flags) = guest.receive_until(VIRTIO_VSOCK_OP_RST);
            assert_eq!(data, b"written, then closed");
            assert_eq!(flags & VIRTIO_VSOCK_SHUTDOWN_F_SEND, 0);
        }
        guest.wait_connections(0);
    }
}

#[test]
fn either_direction_ends_alone_and_a_close_after_both_is_orderly() {
    for client_first in [false, true] {
        let Some((mut client, server)) = pair() else {
            return;
        };
        let mut guest = Guest::start();
        let port = guest.join(b"", server);
        if client_first {
            client.write_all(b"question").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let (data, flags) = guest.receive_until(VIRTIO_VSOCK_OP_SHUTDOWN);
            assert_eq!(data, b"question");
            assert_eq!(flags, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
            guest.send_data(port, 80, b"answer");
            guest.shutdown(port, 80, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
            assert_eq!(read_all(&mut client), b"answer");
        } else {
            guest.send_data(port, 80, b"answer");
            guest.shutdown(port, 80, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
            assert_eq!(read_all(&mut client), b"answer");
            assert!(takes_data(&client), "an end is no reset");
            client.write_all(b"more").unwrap();
            assert_eq!(guest.expect(VIRTIO_VSOCK_OP_RW).data, b"more");
            drop(client);
        }
        let (_, flags) = guest.receive_until(VIRTIO_VSOCK_OP_SHUTDOWN);
        assert_eq!(flags, VIRTIO_VSOCK_SHUTDOWN_BOTH);
        guest.send_op(port, 80, VIRTIO_VSOCK_OP_RST);
        guest.wait_connections(0);
    }
}

#[test]
fn a_reset_by_the_guest_is_a_close_without_an_end() {
    for close in [VIRTIO_VSOCK_OP_RST, VIRTIO_VSOCK_OP_SHUTDOWN] {
        let Some((mut client, server)) = pair() else {
            return;
        };
        let mut guest = Guest::start();
        let port = guest.join(b"", server);
        guest.send_data(port, 80, b"cut");
        let mut data = [0; 3];
        client.read_exact(&mut data).unwrap();
        assert!(takes_data(&client));
        if close == VIRTIO_VSOCK_OP_RST {
            guest.send_op(port, 80, VIRTIO_VSOCK_OP_RST);
        } else {
            guest.shutdown(port, 80, VIRTIO_VSOCK_SHUTDOWN_BOTH);
            guest.expect(VIRTIO_VSOCK_OP_RST);
        }
        assert_eq!(read_all(&mut client), b"");
        assert!(!takes_data(&client), "a reset looks like an end");
        guest.wait_connections(0);
    }
}

#[test]
fn a_slow_reader_on_either_side_loses_nothing() {
    let Some((mut client, server)) = pair() else {
        return;
    };
    let mut guest = Guest::start();
    let port = guest.join(b"", server);
    let (down, up) = (pattern(1 << 20, 41), pattern(256 << 10, 42));
    for chunk in up.chunks(32 << 10) {
        guest.send_data(port, 80, chunk);
    }
    guest.shutdown(port, 80, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
    let sent = down.clone();
    let host = thread::spawn(move || {
        client.write_all(&sent).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        read_all(&mut client)
    });
    assert!(guest.receive_data(down.len()) == down);
    assert!(host.join().unwrap() == up);
}
