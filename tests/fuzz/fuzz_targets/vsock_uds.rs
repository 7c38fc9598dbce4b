//! The CONNECT line that a client of the vsock device's Unix socket writes.

#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use devices::virtio::vsock::uds::VsockUds;
use devices::virtio::vsock::{Vsock, VsockConfig};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

/// A device without a guest, so that every good line waits for an answer.
struct Server {
    _device: Vsock,
    _uds: VsockUds,
    _dir: TempDir,
    path: PathBuf,
}

static SERVER: LazyLock<std::sync::Mutex<Server>> = LazyLock::new(|| {
    let dir = TempDir::with_prefix("mvm-fuzz-").expect("a directory");
    let path = dir.path().join("vsock");
    let (device, handle) = Vsock::new(VsockConfig::new(3)).expect("a device of good parts");
    let uds = VsockUds::bind(&path, handle).expect("a socket");
    std::sync::Mutex::new(Server {
        _device: device,
        _uds: uds,
        _dir: dir,
        path,
    })
});

fuzz_target!(|data: &[u8]| {
    let path = &SERVER.lock().expect("no panic before").path;
    let mut client = UnixStream::connect(path).expect("a thread that listens");
    // It may hang up before it has read all.
    let _ = client.write_all(data);
    let _ = client.shutdown(Shutdown::Write);
    let _ = client.set_read_timeout(Some(Duration::from_millis(2)));
    let _ = client.read(&mut [0; 64]);
});
