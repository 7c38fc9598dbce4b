//! fanotify(7), as far as it goes without privileges: marks on directories, or on one file, and events that
//! name a directory by its file handle and the entry by its name, and tell whether this process itself was
//! the cause.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::host::ProcPath;

/// What is asked for of each directory; `FAN_RENAME` is there since Linux 5.17.
const MASK: u64 = libc::FAN_CREATE
    | libc::FAN_DELETE
    | libc::FAN_MODIFY
    | libc::FAN_CLOSE_WRITE
    | libc::FAN_ATTRIB
    | libc::FAN_ONDIR
    | libc::FAN_EVENT_ON_CHILD;
const MOVES: u64 = libc::FAN_MOVED_FROM | libc::FAN_MOVED_TO;

/// What is asked for of a file by itself, whatever the name that is used: the number of those counts as an attribute.
const FILE_MASK: u64 =
    libc::FAN_MODIFY | libc::FAN_CLOSE_WRITE | libc::FAN_ATTRIB | libc::FAN_MOVE_SELF;

/// `FAN_EVENT_INFO_TYPE_*`: a directory and a name; of a rename, the old and the new ones.
const INFO_DFID_NAME: u8 = 2;
const INFO_OLD_DFID_NAME: u8 = 10;
const INFO_NEW_DFID_NAME: u8 = 12;

/// Filesystems whose files are changed by others than this kernel, which then has nothing to tell: their numbers in
/// linux/magic.h, or their own sources.
const ELSEWHERE: [u64; 13] = [
    0x6969,      // NFS
    0xff53_4d42, // CIFS
    0xfe53_4d42, // SMB 2 and later
    0x6573_5546, // FUSE, virtiofs too
    0x0102_1997, // 9p
    0x00c3_6400, // Ceph
    0x5346_414f, // AFS
    0x7375_7245, // Coda
    0x2003_0528, // OrangeFS
    0x0bd0_0bd0, // Lustre
    0x786f_4256, // VirtualBox's shared folders
    0x0116_1970, // GFS2
    0x7461_636f, // OCFS2
];

/// The largest file handle that filesystems use, bytes.
const MAX_HANDLE: usize = 128;

/// What identifies a directory or a file in events: its filesystem and its file handle, as the kernel writes
/// them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FileId(Box<[u8]>);

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub dir: FileId,
    pub name: CString,
}

/// What has happened, as often as it may be, to one entry.
#[derive(Debug)]
pub(crate) struct Raised {
    /// `FAN_*`, possibly several: what happens to one entry in a row is one event.
    pub mask: u64,
    /// Whether this process was the cause.
    pub own: bool,
    /// The entry; of a rename, the old one, if it was in a directory with a mark.
    pub entry: Option<Entry>,
    /// Of a rename, the new one, if it is in a directory with a mark.
    pub to: Option<Entry>,
}

#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Metadata {
    event_len: u32,
    vers: u8,
    reserved: u8,
    metadata_len: u16,
    mask: u64,
    fd: i32,
    pid: i32,
}

#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct InfoHeader {
    info_type: u8,
    pad: u8,
    len: u16,
}

/// A `file_handle` with room.
#[repr(C)]
struct FileHandle {
    bytes: u32,
    kind: i32,
    handle: [u8; MAX_HANDLE],
}

/// A queue of events.
#[derive(Debug)]
pub(crate) struct Group {
    fd: OwnedFd,
    mask: u64,
    /// `FAN_MARK_*`: what may be marked.
    only: u32,
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Group {
    /// One for directories.
    ///
    /// # Errors
    /// Where the host's kernel is older than 5.13 or does not let us.
    pub fn for_directories() -> Result<Self, Errno> {
        let mask = MASK | libc::FAN_RENAME;
        let mut group = Self::open(0, mask, libc::FAN_MARK_ONLYDIR)?;
        // What is asked for is looked at first, then the path, of which there is none.
        if group.change(libc::FAN_MARK_ADD, c"") == Err(Errno::INVAL) {
            group.mask = MASK | MOVES;
        }
        Ok(group)
    }

    /// One for a file by itself.
    ///
    /// # Errors
    /// As for directories.
    pub fn for_file() -> Result<Self, Errno> {
        // Without its own name in events, those would be left out that no directory has to do with.
        Self::open(libc::FAN_REPORT_FID, FILE_MASK, 0)
    }

    fn open(report: u32, mask: u64, only: u32) -> Result<Self, Errno> {
        let flags = libc::FAN_CLASS_NOTIF
            | libc::FAN_CLOEXEC
            | libc::FAN_NONBLOCK
            | libc::FAN_REPORT_DFID_NAME
            | report;
        // SAFETY: no pointers are passed; a descriptor that is returned is nobody else's.
        let fd = unsafe {
            let fd = libc::fanotify_init(flags, libc::O_RDONLY as u32);
            check(fd)?;
            OwnedFd::from_raw_fd(fd)
        };
        Ok(Self { fd, mask, only })
    }

    fn change(&self, flags: u32, path: &CStr) -> Result<(), Errno> {
        // SAFETY: the path ends with a NUL and outlives the call.
        check(unsafe {
            libc::fanotify_mark(
                self.fd.as_raw_fd(),
                flags,
                self.mask,
                libc::AT_FDCWD,
                path.as_ptr(),
            )
        })
    }

    /// Wants to hear of what happens in a directory, or to a file.
    ///
    /// # Errors
    /// `ENOSPC` where the host allows no more; others where the filesystem cannot tell, or not of everything.
    pub fn mark(&self, file: BorrowedFd<'_>) -> Result<FileId, Errno> {
        let found = rustix::fs::fstatfs(file)?;
        if ELSEWHERE.contains(&found.f_type.cast_unsigned()) {
            return Err(Errno::OPNOTSUPP);
        }
        let id = file_id(file)?;
        self.change(
            libc::FAN_MARK_ADD | self.only,
            ProcPath::of(&file).as_c_str(),
        )?;
        Ok(id)
    }

    /// Wants to hear no more of a directory.
    ///
    /// # Errors
    /// Those of fanotify_mark(2).
    pub fn unmark(&self, dir: BorrowedFd<'_>) -> Result<(), Errno> {
        self.change(libc::FAN_MARK_REMOVE, ProcPath::of(&dir).as_c_str())
    }

    /// What has happened since the last time, in the order of the kernel; nothing where nothing has.
    ///
    /// # Errors
    /// Those of read(2).
    pub fn read(&self, buffer: &mut [u8]) -> Result<Vec<Raised>, Errno> {
        let length = match rustix::io::read(&self.fd, &mut *buffer) {
            Err(Errno::AGAIN | Errno::INTR) => 0,
            outcome => outcome?,
        };
        let mut rest = buffer.get(..length).unwrap_or_default();
        let mut raised = Vec::new();
        while let Some((event, after)) = parse(rest) {
            raised.push(event);
            rest = after;
        }
        Ok(raised)
    }
}

fn check(outcome: libc::c_int) -> Result<(), Errno> {
    match outcome {
        -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
        _ => Ok(()),
    }
}

fn file_id(file: BorrowedFd<'_>) -> Result<FileId, Errno> {
    let mut handle = FileHandle {
        bytes: MAX_HANDLE as u32,
        kind: 0,
        handle: [0; MAX_HANDLE],
    };
    let mut mount = 0;
    // SAFETY: the handle has as much room as it says, and both it and the number outlive the call.
    check(unsafe {
        libc::name_to_handle_at(
            file.as_raw_fd(),
            c"".as_ptr(),
            (&raw mut handle).cast(),
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    })?;
    let found = rustix::fs::fstatvfs(file)?;
    let length = usize::try_from(handle.bytes).map_err(|_| Errno::OVERFLOW)?;
    let bytes = handle.handle.get(..length).ok_or(Errno::OVERFLOW)?;
    let mut id = Vec::with_capacity(16 + length);
    // Two 32-bit numbers, the first in the lower half.
    let number = found.f_fsid;
    for half in [number & 0xffff_ffff, number >> 32] {
        let half = u32::try_from(half).map_err(|_| Errno::OVERFLOW)?;
        id.extend(half.to_ne_bytes());
    }
    id.extend(handle.bytes.to_ne_bytes());
    id.extend(handle.kind.to_ne_bytes());
    id.extend(bytes);
    Ok(FileId(id.into()))
}

fn parse(bytes: &[u8]) -> Option<(Raised, &[u8])> {
    let (metadata, _) = Metadata::read_from_prefix(bytes).ok()?;
    let length = usize::try_from(metadata.event_len).ok()?;
    let event = bytes.get(..length)?;
    let mut records = event.get(usize::from(metadata.metadata_len)..)?;
    let own_pid = std::process::id();
    let mut raised = Raised {
        mask: metadata.mask,
        own: u32::try_from(metadata.pid).is_ok_and(|pid| pid == own_pid),
        entry: None,
        to: None,
    };
    while let Ok((header, _)) = InfoHeader::read_from_prefix(records) {
        let length = usize::from(header.len);
        let Some(body) = records.get(size_of::<InfoHeader>()..length) else {
            break;
        };
        match header.info_type {
            INFO_DFID_NAME | INFO_OLD_DFID_NAME => raised.entry = parse_entry(body),
            INFO_NEW_DFID_NAME => raised.to = parse_entry(body),
            _ => {}
        }
        records = records.get(length..)?;
    }
    Some((raised, bytes.get(length..)?))
}

fn parse_entry(body: &[u8]) -> Option<Entry> {
    // fsid, length of the handle, its kind, the handle, the name.
    let length: [u8; 4] = body.get(8..12)?.try_into().ok()?;
    let end = usize::try_from(u32::from_ne_bytes(length))
        .ok()?
        .checked_add(16)?;
    Some(Entry {
        dir: FileId(body.get(..end)?.into()),
        name: CStr::from_bytes_until_nul(body.get(end..)?)
            .ok()?
            .to_owned(),
    })
}
