//! Messages as bytes: what a request carries is taken from its end of the buffer piece by piece,
//! and a reply is put together in one buffer that is used again for the next.

use std::ffi::CStr;
use std::io::IoSlice;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::channel::Channel;
use crate::prompt;
use crate::wire::{InHeader, NotifyCode, OUT_HEADER_LEN, OutHeader};

/// The longest name of a file, bytes, without the NUL.
pub const NAME_MAX: usize = 255;
/// The longest path, which a symbolic link may hold, bytes.
pub const PATH_MAX: usize = 4096;

/// What a request carries after its header.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a>(&'a [u8]);

impl<'a> Args<'a> {
    /// The header of `message` and what follows it.
    ///
    /// # Errors
    /// `EINVAL` where the message is shorter than a header, or than the header says.
    pub fn parse(message: &'a [u8]) -> Result<(InHeader, Args<'a>), Errno> {
        let (header, rest) = InHeader::read_from_prefix(message).map_err(|_| Errno::INVAL)?;
        let length = usize::try_from(header.len).map_err(|_| Errno::INVAL)?;
        // Extensions (the caller's groups, a security label) follow the arguments: none is asked for.
        let extensions = usize::from(header.total_extlen) * 8;
        let body = length
            .checked_sub(size_of::<InHeader>() + extensions)
            .and_then(|length| rest.get(..length))
            .ok_or(Errno::INVAL)?;
        Ok((header, Args(body)))
    }

    /// The structure that comes next.
    ///
    /// # Errors
    /// `EINVAL` where too few bytes are left.
    pub fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Result<T, Errno> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = rest;
        Ok(value)
    }

    /// The string that comes next, without regard to what it says.
    ///
    /// # Errors
    /// `EINVAL` where no NUL ends it.
    pub fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = self.0.get(text.count_bytes() + 1..).unwrap_or_default();
        Ok(text)
    }

    /// The name of a file that comes next: one step of a path, never two, never upwards.
    ///
    /// # Errors
    /// `ENAMETOOLONG`, and `EINVAL` for what is no name.
    pub fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.text()?;
        check_name(name)?;
        Ok(name)
    }

    /// All that is left.
    pub fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// Whether `name` is one step downwards.
///
/// # Errors
/// `ENAMETOOLONG`, and `EINVAL` for the empty name, `.`, `..` and what has a slash in it.
pub fn check_name(name: &CStr) -> Result<(), Errno> {
    let bytes = name.to_bytes();
    if bytes.len() > NAME_MAX {
        return Err(Errno::NAMETOOLONG);
    }
    if matches!(bytes, b"" | b"." | b"..") || bytes.contains(&b'/') {
        return Err(Errno::INVAL);
    }
    Ok(())
}

/// A reply in the making.
pub struct Reply<'c> {
    bytes: Box<[u8]>,
    len: usize,
    /// What a channel has put at its place already, bytes.
    placed: usize,
    /// The request's number.
    unique: u64,
    channel: Option<&'c dyn Channel>,
}

impl<'c> Reply<'c> {
    /// A reply with room for `capacity` bytes after its header.
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            bytes: vec![0; OUT_HEADER_LEN + capacity].into_boxed_slice(),
            len: OUT_HEADER_LEN,
            placed: 0,
            unique: 0,
            channel: None,
        }
    }

    /// The same, for `channel`, which may have a better place for a file's data.
    pub fn on(channel: &'c dyn Channel, capacity: usize) -> Self {
        Self {
            channel: Some(channel),
            ..Self::with_capacity(capacity)
        }
    }

    /// For how many bytes after its header there is room.
    pub fn capacity(&self) -> usize {
        self.bytes.len() - OUT_HEADER_LEN
    }

    /// Forgets what was put in: a reply to the request `unique` begins.
    pub fn begin(&mut self, unique: u64) {
        self.unique = unique;
        self.clear();
    }

    fn clear(&mut self) {
        self.len = OUT_HEADER_LEN;
        self.placed = 0;
    }

    /// Adds up to `length` bytes of `file` from `offset` on, and nothing else after them.
    ///
    /// # Errors
    /// Those of pread(2), and `EAGAIN` on a thread that must not wait.
    pub fn read(&mut self, file: BorrowedFd<'_>, offset: u64, length: usize) -> Result<(), Errno> {
        let channel = self.channel.filter(|_| self.is_empty());
        if let Some(channel) = channel
            && let Some(read) = channel.read_to_place(self.unique, file, offset, length)
        {
            self.placed = read?;
            return Ok(());
        }
        let room = self.room(length);
        let read = match prompt::is_prompt() {
            true => prompt::read(file, room, offset)?,
            false => rustix::io::pread(file, room, offset)?,
        };
        self.grow(read);
        Ok(())
    }

    /// How many bytes were put in after the header.
    pub fn len(&self) -> usize {
        self.len - OUT_HEADER_LEN
    }

    /// Whether nothing was put in.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes back all but the first `len` bytes after the header.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(OUT_HEADER_LEN + len);
    }

    /// Adds a structure.
    ///
    /// # Errors
    /// `ENOBUFS` where there is no room.
    pub fn push<T: IntoBytes + Immutable>(&mut self, value: &T) -> Result<(), Errno> {
        self.put(value.as_bytes())
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// `ENOBUFS` where there is no room.
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        let room = self.room(bytes.len());
        if room.len() < bytes.len() {
            return Err(Errno::NOBUFS);
        }
        room.copy_from_slice(bytes);
        self.len += bytes.len();
        Ok(())
    }

    /// Up to `len` bytes of room, to be filled by hand and then told to [`Reply::grow`].
    pub fn room(&mut self, len: usize) -> &mut [u8] {
        let end = self.len.saturating_add(len).min(self.bytes.len());
        self.bytes.get_mut(self.len..end).unwrap_or_default()
    }

    /// The first `len` bytes of the room were filled.
    pub fn grow(&mut self, len: usize) {
        self.len = self.len.saturating_add(len).min(self.bytes.len());
    }

    /// The whole message: that of success with what was put in, or an error alone.
    ///
    /// What the channel has put at its place is announced, and not in it.
    pub fn finish(&mut self, outcome: Result<(), Errno>) -> &[u8] {
        if outcome.is_err() {
            self.clear();
        }
        let header = OutHeader {
            // The buffer is a few MiB at most.
            len: u32::try_from(self.len + self.placed).unwrap_or(u32::MAX),
            error: outcome.err().map_or(0, |errno| -errno.raw_os_error()),
            unique: self.unique,
        };
        let message = self.bytes.get_mut(..self.len).unwrap_or_default();
        if let Some(start) = message.get_mut(..OUT_HEADER_LEN) {
            start.copy_from_slice(header.as_bytes());
        }
        message
    }
}

/// Hands `send` a notification: `head`, and the name it speaks of, if any.
pub fn notification<T, R>(
    code: NotifyCode,
    head: &T,
    name: Option<&CStr>,
    send: impl FnOnce(&[IoSlice<'_>]) -> R,
) -> R
where
    T: IntoBytes + Immutable,
{
    let name = name.map_or(&[][..], CStr::to_bytes_with_nul);
    let len = OUT_HEADER_LEN + size_of::<T>() + name.len();
    let header = OutHeader {
        len: u32::try_from(len).unwrap_or(u32::MAX),
        error: code as i32,
        unique: 0,
    };
    send(&[
        IoSlice::new(header.as_bytes()),
        IoSlice::new(head.as_bytes()),
        IoSlice::new(name),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{GetattrIn, MkdirIn};

    fn message(body: &[u8], claimed: usize) -> Vec<u8> {
        let header = InHeader {
            len: u32::try_from(claimed).unwrap(),
            ..InHeader::default()
        };
        [header.as_bytes(), body].concat()
    }

    #[test]
    fn what_a_header_claims_and_what_is_there_have_to_agree() {
        let whole = message(b"abc\0", 44);
        assert_eq!(Args::parse(&whole).unwrap().1.rest(), b"abc\0");
        assert_eq!(
            Args::parse(&message(b"abc\0", 45)).unwrap_err(),
            Errno::INVAL
        );
        assert_eq!(Args::parse(&message(b"", 39)).unwrap_err(), Errno::INVAL);
        assert_eq!(Args::parse(&whole[..39]).unwrap_err(), Errno::INVAL);
    }

    #[test]
    fn arguments_are_taken_in_order_and_never_past_the_end() {
        let body = [
            MkdirIn {
                mode: 0o755,
                umask: 0,
            }
            .as_bytes(),
            b"name\0rest",
        ]
        .concat();
        let bytes = message(&body, 40 + body.len());
        let (_, mut args) = Args::parse(&bytes).unwrap();
        assert_eq!(args.take::<MkdirIn>().unwrap().mode, 0o755);
        assert_eq!(args.name().unwrap(), c"name");
        assert_eq!(args.take::<GetattrIn>().unwrap_err(), Errno::INVAL);
        assert_eq!(args.name().unwrap_err(), Errno::INVAL, "no NUL");
        assert_eq!(args.rest(), b"rest");
    }

    #[test]
    fn a_name_is_one_step_downwards() {
        let long = [b'x'; 256];
        let long = std::ffi::CString::new(long).unwrap();
        assert_eq!(check_name(&long), Err(Errno::NAMETOOLONG));
        for name in [c"", c".", c"..", c"a/b", c"/", c"../x"] {
            assert_eq!(check_name(name), Err(Errno::INVAL), "{name:?}");
        }
        for name in [c"...", c"a", c"\xff\xfe", c" ", c".a"] {
            assert_eq!(check_name(name), Ok(()), "{name:?}");
        }
    }

    #[test]
    fn a_reply_takes_no_more_than_it_has_room_for() {
        let mut reply = Reply::with_capacity(4);
        reply.begin(7);
        assert_eq!(reply.put(b"12345"), Err(Errno::NOBUFS));
        reply.put(b"123").unwrap();
        assert_eq!(reply.room(100).len(), 1);
        assert_eq!(reply.finish(Ok(())).len(), OUT_HEADER_LEN + 3);
        let failed = reply.finish(Err(Errno::NOENT));
        let header = OutHeader::read_from_bytes(failed).unwrap();
        assert_eq!((header.len, header.error, header.unique), (16, -2, 7));
    }
}
