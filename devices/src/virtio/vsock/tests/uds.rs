//! The Unix socket convention, from the side of the programs that use it.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use super::*;
use crate::virtio::vsock::uds::{MAX_HALF_OPEN, UdsError, VsockUds};

struct Place {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

fn place() -> Place {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v.sock");
    Place {
        _directory: directory,
        path,
    }
}

fn client(place: &Place) -> UnixStream {
    let stream = UnixStream::connect(&place.path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

#[test]
fn a_client_names_a_port_and_reads_ok_before_the_guests_first_byte() {
    let place = place();
    let mut guest = Guest::start();
    let _uds = VsockUds::bind(&place.path, guest.handle.clone()).unwrap();
    let mut client = client(&place);
    // What follows the line in the same write belongs to the guest.
    client.write_all(b"CONNECT 5000\nfor the guest").unwrap();
    let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    assert_eq!(request.header.dst_port, 5000);
    guest.answer(&request.header, VIRTIO_VSOCK_OP_RESPONSE);
    let host_port = request.header.src_port;
    guest.send_data(host_port, 5000, b"from the guest\n");
    assert_eq!(guest.expect(VIRTIO_VSOCK_OP_RW).data, b"for the guest");
    let mut lines = BufReader::new(client).lines();
    assert_eq!(lines.next().unwrap().unwrap(), format!("OK {host_port}"));
    assert_eq!(lines.next().unwrap().unwrap(), "from the guest");
}

#[test]
fn a_client_whose_connection_is_refused_reads_the_end() {
    let place = place();
    let mut guest = Guest::start();
    let _uds = VsockUds::bind(&place.path, guest.handle.clone()).unwrap();
    let mut client = client(&place);
    client.write_all(b"CONNECT 5000\n").unwrap();
    let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    guest.answer(&request.header, VIRTIO_VSOCK_OP_RST);
    assert_ended(&client);
}

#[test]
fn lines_that_are_no_requests_close_the_client() {
    let place = place();
    let guest = Guest::start();
    let _uds = VsockUds::bind(&place.path, guest.handle.clone()).unwrap();
    for line in [
        &b"\n"[..],
        b"CONNECT\n",
        b"CONNECT \n",
        b"CONNECT -1\n",
        b"CONNECT +1\n",
        b"CONNECT 4294967296\n",
        b"CONNECT 1 \n",
        b"connect 1\n",
        b"CONNECT 1\0\n",
        b"GET / HTTP/1.1\r\n",
        b"CONNECT 00000000000000000000000000000000000000000000001",
        &[0xff; 100],
    ] {
        let mut client = client(&place);
        client.write_all(line).unwrap();
        assert_ended(&client);
    }
    assert_eq!(guest.connections(), 0);
}

#[test]
fn idle_clients_cannot_keep_others_out() {
    let place = place();
    let mut guest = Guest::start();
    let _uds = VsockUds::bind(&place.path, guest.handle.clone()).unwrap();
    let mut idle: Vec<UnixStream> = (0..MAX_HALF_OPEN).map(|_| client(&place)).collect();
    for client in &mut idle {
        client.write_all(b"CONN").unwrap();
    }
    let mut honest = client(&place);
    honest.write_all(b"CONNECT 5000\n").unwrap();
    let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    assert_eq!(request.header.dst_port, 5000);
    for client in &idle {
        assert_ended(client);
    }
}

#[test]
fn a_guests_connection_goes_to_the_socket_named_after_its_port() {
    let place = place();
    let mut guest = Guest::start();
    let _uds = VsockUds::bind(&place.path, guest.handle.clone()).unwrap();
    let port_path = format!("{}_52", place.path.display());
    guest.send_op(52, 9, VIRTIO_VSOCK_OP_REQUEST);
    guest.expect(VIRTIO_VSOCK_OP_RST);
    let listener = UnixListener::bind(port_path).unwrap();
    guest.send_op(52, 9, VIRTIO_VSOCK_OP_REQUEST);
    guest.expect(VIRTIO_VSOCK_OP_RESPONSE);
    let (stream, _) = listener.accept().unwrap();
    guest.send_data(52, 9, b"hello");
    assert_eq!(read(&stream, 5), b"hello");
}

#[test]
fn a_listener_with_a_full_backlog_does_not_stop_the_device() {
    let place = place();
    let mut guest = Guest::start();
    let _uds = VsockUds::bind(&place.path, guest.handle.clone()).unwrap();
    let _listener = UnixListener::bind(format!("{}_52", place.path.display())).unwrap();
    let mut refused = false;
    for port in 0..10_000 {
        guest.send_op(52, port, VIRTIO_VSOCK_OP_REQUEST);
        refused = guest.receive().op() == VIRTIO_VSOCK_OP_RST;
        if refused {
            break;
        }
    }
    assert!(refused, "a backlog without an end");
}

#[test]
fn the_socket_is_for_its_user_only_and_goes_with_its_owner() {
    let place = place();
    let guest = Guest::start();
    let uds = VsockUds::bind(&place.path, guest.handle.clone()).unwrap();
    let metadata = std::fs::symlink_metadata(&place.path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    drop(uds);
    assert!(!place.path.exists());
}

#[test]
fn a_dead_socket_is_replaced_and_a_live_one_or_a_file_is_not() {
    let place = place();
    let guest = Guest::start();
    drop(UnixListener::bind(&place.path).unwrap());
    assert!(place.path.exists(), "std leaves the file behind");
    let uds = VsockUds::bind(&place.path, guest.handle.clone()).unwrap();
    let error = VsockUds::bind(&place.path, guest.handle.clone()).unwrap_err();
    assert!(matches!(error, UdsError::InUse(_)), "{error}");
    assert!(place.path.exists(), "the live socket was removed");
    drop(uds);
    std::fs::write(&place.path, "precious").unwrap();
    let error = VsockUds::bind(&place.path, guest.handle.clone()).unwrap_err();
    assert!(matches!(error, UdsError::NotASocket(_)), "{error}");
    assert_eq!(std::fs::read(&place.path).unwrap(), b"precious");
}

#[test]
fn a_path_that_cannot_be_bound_is_an_error_that_names_it() {
    let place = place();
    let guest = Guest::start();
    for path in [
        place.path.join("below/a/socket"),
        place.path.with_file_name("x".repeat(200)),
    ] {
        let error = VsockUds::bind(&path, guest.handle.clone()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(path.to_str().unwrap()), "{text}");
    }
}
