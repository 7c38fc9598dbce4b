//! The FUSE protocol as the kernel speaks it (`include/uapi/linux/fuse.h`, 7.36 and later): opcodes,
//! flags, and the structures of requests, replies and notifications.
//!
//! Names are the header's, without the `fuse_` and `FUSE_` prefixes. All numbers are in the
//! machine's own byte order: both ends run on one processor.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The protocol's major version.
pub const MAJOR: u32 = 7;
/// The newest minor version whose messages are known here.
pub const MINOR: u32 = 40;
/// The oldest minor version that is served: Linux 5.15, with the flags of [`InitIn::flags2`].
pub const OLDEST_MINOR: u32 = 34;
/// The inode number of the root.
pub const ROOT_ID: u64 = 1;

macro_rules! opcodes {
    ($($name:ident = $value:literal,)*) => {
        /// What a request asks for.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(missing_docs, reason = "the names are the kernel's")]
        pub enum Opcode { $($name = $value,)* }

        impl Opcode {
            /// Every opcode, by number.
            pub const ALL: &[Opcode] = &[$(Opcode::$name,)*];

            /// The opcode with this number, if it is served or has a place in the protocol.
            pub fn from_number(number: u32) -> Option<Opcode> {
                match number {
                    $($value => Some(Opcode::$name),)*
                    _ => None,
                }
            }
        }
    };
}

opcodes! {
    Lookup = 1,
    Forget = 2,
    Getattr = 3,
    Setattr = 4,
    Readlink = 5,
    Symlink = 6,
    Mknod = 8,
    Mkdir = 9,
    Unlink = 10,
    Rmdir = 11,
    Rename = 12,
    Link = 13,
    Open = 14,
    Read = 15,
    Write = 16,
    Statfs = 17,
    Release = 18,
    Fsync = 20,
    Setxattr = 21,
    Getxattr = 22,
    Listxattr = 23,
    Removexattr = 24,
    Flush = 25,
    Init = 26,
    Opendir = 27,
    Readdir = 28,
    Releasedir = 29,
    Fsyncdir = 30,
    Getlk = 31,
    Setlk = 32,
    Setlkw = 33,
    Access = 34,
    Create = 35,
    Interrupt = 36,
    Destroy = 38,
    BatchForget = 42,
    Fallocate = 43,
    Readdirplus = 44,
    Rename2 = 45,
    Lseek = 46,
    CopyFileRange = 47,
    Syncfs = 50,
    Tmpfile = 51,
    Statx = 52,
}

impl Opcode {
    /// Whether such a request is done in no time, most often, unless it carries much.
    pub fn is_brief(self) -> bool {
        !matches!(
            self,
            Self::Fsync | Self::Fsyncdir | Self::Syncfs | Self::Fallocate | Self::CopyFileRange
        )
    }
}

/// What a notification says; it stands where a reply has its error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum NotifyCode {
    /// [`NotifyInvalInodeOut`]: forget the attributes and the data of an inode.
    InvalInode = 2,
    /// [`NotifyInvalEntryOut`] and a name: forget what a name stands for.
    InvalEntry = 3,
    /// [`NotifyDeleteOut`] and a name: a name is gone.
    Delete = 6,
}

macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $value:expr;)*) => {
        $($(#[$doc])* pub const $name: $type = $value;)*
    };
}

/// Flags of [`InitIn`] and [`InitOut`], those of `flags2` shifted up by 32.
#[allow(missing_docs, reason = "the names are the kernel's")]
pub mod init {
    flags! {
        ASYNC_READ: u64 = 1 << 0;
        POSIX_LOCKS: u64 = 1 << 1;
        ATOMIC_O_TRUNC: u64 = 1 << 3;
        EXPORT_SUPPORT: u64 = 1 << 4;
        BIG_WRITES: u64 = 1 << 5;
        DONT_MASK: u64 = 1 << 6;
        FLOCK_LOCKS: u64 = 1 << 10;
        AUTO_INVAL_DATA: u64 = 1 << 12;
        DO_READDIRPLUS: u64 = 1 << 13;
        READDIRPLUS_AUTO: u64 = 1 << 14;
        ASYNC_DIO: u64 = 1 << 15;
        WRITEBACK_CACHE: u64 = 1 << 16;
        PARALLEL_DIROPS: u64 = 1 << 18;
        POSIX_ACL: u64 = 1 << 20;
        MAX_PAGES: u64 = 1 << 22;
        CACHE_SYMLINKS: u64 = 1 << 23;
        NO_OPENDIR_SUPPORT: u64 = 1 << 24;
        EXPLICIT_INVAL_DATA: u64 = 1 << 25;
        HANDLE_KILLPRIV_V2: u64 = 1 << 28;
        SETXATTR_EXT: u64 = 1 << 29;
        INIT_EXT: u64 = 1 << 30;
        CREATE_SUPP_GROUP: u64 = 1 << 34;
        HAS_EXPIRE_ONLY: u64 = 1 << 35;
    }
}

/// Flags of [`SetattrIn::valid`].
#[allow(missing_docs, reason = "the names are the kernel's")]
pub mod fattr {
    flags! {
        MODE: u32 = 1 << 0;
        UID: u32 = 1 << 1;
        GID: u32 = 1 << 2;
        SIZE: u32 = 1 << 3;
        ATIME: u32 = 1 << 4;
        MTIME: u32 = 1 << 5;
        FH: u32 = 1 << 6;
        ATIME_NOW: u32 = 1 << 7;
        MTIME_NOW: u32 = 1 << 8;
        CTIME: u32 = 1 << 10;
        KILL_SUIDGID: u32 = 1 << 11;
    }
}

/// Flags of [`OpenOut::open_flags`].
#[allow(missing_docs, reason = "the names are the kernel's")]
pub mod fopen {
    flags! {
        DIRECT_IO: u32 = 1 << 0;
        KEEP_CACHE: u32 = 1 << 1;
        CACHE_DIR: u32 = 1 << 3;
        NOFLUSH: u32 = 1 << 5;
        PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
    }
}

/// Kills setuid and setgid: of [`OpenIn::open_flags`] and [`CreateIn::open_flags`].
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// Kills setuid and setgid: of [`WriteIn::write_flags`].
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// The data come from the page cache, the handle is any that was at hand: of
/// [`WriteIn::write_flags`].
pub const WRITE_CACHE: u32 = 1 << 0;
/// The handle is valid: of [`GetattrIn::getattr_flags`].
pub const GETATTR_FH: u32 = 1 << 0;
/// A lock of flock(2): of [`LkIn::lk_flags`].
pub const LK_FLOCK: u32 = 1 << 0;
/// Data only: of [`FsyncIn::fsync_flags`].
pub const FSYNC_FDATASYNC: u32 = 1 << 0;
/// Clear setgid with an access list: of [`SetxattrIn::setxattr_flags`].
pub const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;

macro_rules! structures {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
            #[repr(C)]
            #[allow(missing_docs, reason = "the fields are the kernel's")]
            pub struct $name { $(pub $field: $type,)* }
        )*
    };
}

structures! {
    /// What every request begins with.
    InHeader {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32,
        total_extlen: u16, padding: u16,
    }
    /// What every reply and notification begins with.
    OutHeader { len: u32, error: i32, unique: u64, }
    /// A file's attributes.
    Attr {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32,
        mtimensec: u32, ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32,
        blksize: u32, flags: u32,
    }
    /// A name found or made.
    EntryOut {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32,
        attr_valid_nsec: u32, attr: Attr,
    }
    /// Attributes, and how long they hold.
    AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr, }
    ForgetIn { nlookup: u64, }
    ForgetOne { nodeid: u64, nlookup: u64, }
    BatchForgetIn { count: u32, dummy: u32, }
    GetattrIn { getattr_flags: u32, dummy: u32, fh: u64, }
    SetattrIn {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64,
        ctime: u64, atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32,
        uid: u32, gid: u32, unused5: u32,
    }
    MknodIn { mode: u32, rdev: u32, umask: u32, padding: u32, }
    MkdirIn { mode: u32, umask: u32, }
    RenameIn { newdir: u64, }
    Rename2In { newdir: u64, flags: u32, padding: u32, }
    LinkIn { oldnodeid: u64, }
    OpenIn { flags: u32, open_flags: u32, }
    CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32, }
    OpenOut { fh: u64, open_flags: u32, backing_id: i32, }
    ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64, }
    FlushIn { fh: u64, unused: u32, padding: u32, lock_owner: u64, }
    ReadIn {
        fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32,
        padding: u32,
    }
    WriteIn {
        fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32,
        padding: u32,
    }
    WriteOut { size: u32, padding: u32, }
    StatfsOut {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32,
        frsize: u32, padding: u32, spare: [u32; 6],
    }
    FsyncIn { fh: u64, fsync_flags: u32, padding: u32, }
    /// With `SETXATTR_EXT`.
    SetxattrIn { size: u32, flags: u32, setxattr_flags: u32, padding: u32, }
    GetxattrIn { size: u32, padding: u32, }
    GetxattrOut { size: u32, padding: u32, }
    FileLock { start: u64, end: u64, kind: u32, pid: u32, }
    LkIn { fh: u64, owner: u64, lk: FileLock, lk_flags: u32, padding: u32, }
    LkOut { lk: FileLock, }
    AccessIn { mask: u32, padding: u32, }
    /// Up to `flags`, which is all that is sent without `INIT_EXT`.
    InitIn { major: u32, minor: u32, max_readahead: u32, flags: u32, }
    /// What follows [`InitIn`] with `INIT_EXT`.
    InitExt { flags2: u32, unused: [u32; 11], }
    InitOut {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16,
        congestion_threshold: u16, max_write: u32, time_gran: u32, max_pages: u16,
        map_alignment: u16, flags2: u32, max_stack_depth: u32, unused: [u32; 6],
    }
    InterruptIn { unique: u64, }
    FallocateIn { fh: u64, offset: u64, length: u64, mode: u32, padding: u32, }
    /// What a directory's entry begins with; its name follows.
    Dirent { ino: u64, off: u64, namelen: u32, kind: u32, }
    LseekIn { fh: u64, offset: u64, whence: u32, padding: u32, }
    LseekOut { offset: u64, }
    CopyFileRangeIn {
        fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64, len: u64, flags: u64,
    }
    StatxIn { getattr_flags: u32, reserved: u32, fh: u64, sx_flags: u32, sx_mask: u32, }
    SxTime { sec: i64, nsec: u32, reserved: u32, }
    /// Attributes as statx(2) gives them.
    Statx {
        mask: u32, blksize: u32, attributes: u64, nlink: u32, uid: u32, gid: u32, mode: u16,
        spare0: u16, ino: u64, size: u64, blocks: u64, attributes_mask: u64, atime: SxTime,
        btime: SxTime, ctime: SxTime, mtime: SxTime, rdev_major: u32, rdev_minor: u32,
        dev_major: u32, dev_minor: u32, spare2: [u64; 14],
    }
    StatxOut { attr_valid: u64, attr_valid_nsec: u32, flags: u32, spare: [u64; 2], stat: Statx, }
    NotifyInvalInodeOut { ino: u64, off: i64, len: i64, }
    NotifyInvalEntryOut { parent: u64, namelen: u32, flags: u32, }
    NotifyDeleteOut { parent: u64, child: u64, namelen: u32, padding: u32, }
}

/// Length of the header of a request.
pub const IN_HEADER_LEN: usize = size_of::<InHeader>();
/// Length of the header of a reply.
pub const OUT_HEADER_LEN: usize = size_of::<OutHeader>();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_kernels_header() {
        let sizes = [
            (size_of::<InHeader>(), 40),
            (size_of::<OutHeader>(), 16),
            (size_of::<Attr>(), 88),
            (size_of::<EntryOut>(), 128),
            (size_of::<AttrOut>(), 104),
            (size_of::<SetattrIn>(), 88),
            (size_of::<ReadIn>(), 40),
            (size_of::<WriteIn>(), 40),
            (size_of::<StatfsOut>(), 80),
            (size_of::<LkIn>(), 48),
            (size_of::<InitIn>() + size_of::<InitExt>(), 64),
            (size_of::<InitOut>(), 64),
            (size_of::<FallocateIn>(), 32),
            (size_of::<Dirent>(), 24),
            (size_of::<CopyFileRangeIn>(), 56),
            (size_of::<Statx>(), 256),
            (size_of::<StatxOut>(), 288),
        ];
        for (ours, kernels) in sizes {
            assert_eq!(ours, kernels);
        }
    }

    #[test]
    fn every_opcode_is_found_by_its_number() {
        for opcode in Opcode::ALL {
            assert_eq!(Opcode::from_number(*opcode as u32), Some(*opcode));
        }
        assert_eq!(Opcode::from_number(0), None);
        assert_eq!(Opcode::from_number(4096), None);
    }
}
