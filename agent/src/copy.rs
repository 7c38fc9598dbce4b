//! Copies between host and machine: the machine's end of `mvm cp`.

use std::io::{self, Read};

use agent::archive::{self, ChunkReader, ChunkWriter, PackOptions, Policy, Root};
use agent::protocol::{self, FromUnpack, Pack, Unpack};

use crate::connection::Connection;
use crate::serve::Machine;

/// Sends a tree of the machine, to the end of the archive.
pub fn pack(machine: &Machine, to: &Connection, request: Pack) -> io::Result<()> {
    to.set_timeouts(None)?;
    let mut out = ChunkWriter::new(to);
    let options = PackOptions {
        name: request.name,
        follow: request.follow,
        attributes: request.attributes,
    };
    let packed = root(machine).and_then(|root| {
        let packed = archive::pack(root, &request.path, &options, &mut out);
        packed.map_err(|error| error.sentence())
    });
    out.end(packed)?;
    to.end_output();
    Ok(())
}

/// Unpacks the archive that comes from the host.
pub fn unpack(machine: &Machine, from: &Connection, request: &Unpack) -> io::Result<()> {
    from.set_timeouts(None)?;
    // What the host noted while it packed, the host has said itself.
    let chunks = ChunkReader::new(from, |_| {});
    let policy = Policy {
        owned: request.owned,
        devices: true,
    };
    let mut lost = Ok(());
    let mut note = |note| {
        if lost.is_ok() {
            lost = protocol::send(from, &FromUnpack::Note(note));
        }
    };
    let (path, landing) = (&request.path, &request.landing);
    let done = root(machine).and_then(|root| {
        let unpacked = archive::unpack(root, path, landing, policy, chunks, &mut note);
        unpacked.map(|_| ()).map_err(|error| error.sentence())
    });
    lost?;
    protocol::send(from, &FromUnpack::Done(done))?;
    from.end_output();
    drain(from)
}

/// The machine's root, once it is complete; fails with a sentence.
fn root(machine: &Machine) -> Result<Root<'_>, String> {
    machine.wait_for_root()?;
    let directory = machine.root.directory();
    directory.map(Root::Tree).map_err(|error| error.to_string())
}

/// Reads until the host ends: closed with bytes unread, the connection would be reset, and
/// the answer lost.
fn drain(mut from: &Connection) -> io::Result<()> {
    let mut buffer = vec![0; archive::CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
#[path = "copy_tests.rs"]
mod tests;
