//! A guest that says what it likes.

use std::ffi::CStr;

use rustix::io::Errno;
use share::wire::{self, InHeader, Opcode, OutHeader};
use share::{Answer, Limits, Options, Reply, Share, dispatch};
use tempfile::TempDir;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A guest that says what it likes.
pub struct Guest<'a> {
    share: &'a Share,
    reply: Reply<'static>,
}

impl<'a> Guest<'a> {
    pub fn new(share: &'a Share) -> Self {
        let reply = Reply::with_capacity(share::MAX_TRANSFER);
        Self { share, reply }
    }

    /// Sends a request; what comes back after the header, or the error.
    pub fn ask(&mut self, opcode: Opcode, node: u64, body: &[&[u8]]) -> Result<Vec<u8>, Errno> {
        let body = body.concat();
        let header = InHeader {
            len: u32::try_from(wire::IN_HEADER_LEN + body.len()).unwrap(),
            opcode: opcode as u32,
            unique: 7,
            nodeid: node,
            ..InHeader::default()
        };
        let message = [header.as_bytes(), &body].concat();
        let (answer, bytes) = dispatch(self.share, &message, &mut self.reply);
        if answer == Answer::Silence {
            return Ok(Vec::new());
        }
        let (header, rest) = OutHeader::read_from_prefix(bytes).unwrap();
        assert_eq!(usize::try_from(header.len).unwrap(), bytes.len());
        assert_eq!(header.unique, 7);
        match header.error {
            0 => Ok(rest.to_vec()),
            errno => Err(Errno::from_raw_os_error(-errno)),
        }
    }

    /// Whether a request that waits for a lock, sent under a number, is put off.
    pub fn waits(&mut self, unique: u64, node: u64, body: &[u8]) -> bool {
        let header = InHeader {
            len: u32::try_from(wire::IN_HEADER_LEN + body.len()).unwrap(),
            opcode: Opcode::Setlkw as u32,
            unique,
            nodeid: node,
            ..InHeader::default()
        };
        let message = [header.as_bytes(), body].concat();
        dispatch(self.share, &message, &mut self.reply).0 == Answer::Later
    }

    pub fn get<T: FromBytes + KnownLayout + Immutable>(
        &mut self,
        opcode: Opcode,
        node: u64,
        body: &[&[u8]],
    ) -> Result<T, Errno> {
        let bytes = self.ask(opcode, node, body)?;
        Ok(T::read_from_prefix(&bytes).unwrap().0)
    }

    pub fn lookup(&mut self, dir: u64, name: &CStr) -> Result<u64, Errno> {
        let name = name.to_bytes_with_nul();
        let entry: wire::EntryOut = self.get(Opcode::Lookup, dir, &[name])?;
        match entry.nodeid {
            0 => Err(Errno::NOENT),
            node => Ok(node),
        }
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, Errno> {
        let asked = wire::OpenIn {
            flags: flags.cast_unsigned(),
            open_flags: 0,
        };
        let open: wire::OpenOut = self.get(Opcode::Open, node, &[asked.as_bytes()])?;
        Ok(open.fh)
    }

    pub fn release(&mut self, node: u64, fh: u64) {
        let asked = wire::ReleaseIn {
            fh,
            ..wire::ReleaseIn::default()
        };
        self.ask(Opcode::Release, node, &[asked.as_bytes()])
            .unwrap();
    }

    pub fn read(&mut self, node: u64, fh: u64) -> Result<Vec<u8>, Errno> {
        let asked = wire::ReadIn {
            fh,
            size: 4096,
            ..wire::ReadIn::default()
        };
        self.ask(Opcode::Read, node, &[asked.as_bytes()])
    }
}

pub fn share(dir: &TempDir, limits: Limits) -> Share {
    let options = Options {
        limits,
        ..Options::default()
    };
    Share::open(dir.path(), options).unwrap()
}

pub fn some_limits() -> Limits {
    Limits::of_files(1000)
}
