//! An archive on its way: chunks of bytes, with notes in between and a result at the end.
//!
//! A chunk is its length (u32, little endian, not 0) and that many bytes. A length of 0 stands
//! before a framed [`Report`]. So the receiver knows whether it got all of an archive, and
//! otherwise why not, on the one connection that the archive came by.

use std::io::{self, BufRead, Read, Write};

use crate::protocol::{self, Report};

/// Bytes of a full chunk: large enough that calls cost little beside the copying.
pub const CHUNK: usize = 256 << 10;

const PREFIX: usize = 4;

/// The sender's end.
pub struct ChunkWriter<W> {
    to: W,
    /// Who is told the notes instead of the receiver.
    notes: Option<Box<dyn FnMut(String) + Send>>,
    /// A chunk that is being filled, behind the place of its length.
    buffer: Vec<u8>,
    filled: usize,
}

impl<W: Write> ChunkWriter<W> {
    /// Sends to `to`, which should not buffer.
    pub fn new(to: W) -> Self {
        Self {
            to,
            notes: None,
            buffer: vec![0; PREFIX + CHUNK],
            filled: PREFIX,
        }
    }

    /// Tells `notes` what there is to say rather than the receiver: the person is on this side.
    pub fn with_notes(mut self, notes: impl FnMut(String) + Send + 'static) -> Self {
        self.notes = Some(Box::new(notes));
        self
    }

    /// Room for the next bytes, at least one; say with [`Self::advance`] how many were put there.
    ///
    /// Fails where a full chunk cannot be sent.
    pub fn room(&mut self) -> io::Result<&mut [u8]> {
        if self.filled == self.buffer.len() {
            self.send()?;
        }
        Ok(self.buffer.get_mut(self.filled..).unwrap_or_default())
    }

    /// Takes the first `len` bytes of [`Self::room`] into the archive.
    pub fn advance(&mut self, len: usize) {
        self.filled = (self.filled + len).min(self.buffer.len());
    }

    /// Says something to the person who waits for the copy.
    pub fn note(&mut self, note: String) -> io::Result<()> {
        match &mut self.notes {
            Some(notes) => {
                notes(note);
                Ok(())
            }
            None => self.report(&Report::Note(note)),
        }
    }

    /// Ends the archive, or says why it goes no further.
    pub fn end(mut self, result: Result<(), String>) -> io::Result<W> {
        self.report(&Report::End(result))?;
        Ok(self.to)
    }

    fn report(&mut self, report: &Report) -> io::Result<()> {
        self.send()?;
        self.to.write_all(&[0; PREFIX])?;
        protocol::send(&mut self.to, report)
    }

    fn send(&mut self) -> io::Result<()> {
        let chunk = self.buffer.get_mut(..self.filled).unwrap_or_default();
        if let Some((prefix, bytes)) = chunk.split_first_chunk_mut::<PREFIX>()
            && !bytes.is_empty()
        {
            *prefix = (bytes.len() as u32).to_le_bytes();
            self.to.write_all(chunk)?;
        }
        self.filled = PREFIX;
        Ok(())
    }
}

impl<W: Write> Write for ChunkWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.room()?;
        let len = room.len().min(bytes.len());
        if let (Some(room), Some(bytes)) = (room.get_mut(..len), bytes.get(..len)) {
            room.copy_from_slice(bytes);
        }
        self.advance(len);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()?;
        self.to.flush()
    }
}

/// Why the other side stopped, in its own words: inside an [`io::Error`].
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct PeerFailed(pub String);

/// The receiver's end: reads as the archive's bytes, up to the end of the archive.
///
/// Where the other side said why it stopped, reading fails with a `PeerFailed` inside; where the
/// connection ends without a result, with ConnectionAborted.
pub struct ChunkReader<R, N> {
    from: R,
    notes: N,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Bytes of this chunk that were not read yet.
    left: u64,
    ended: bool,
}

impl<R: Read, N: FnMut(String)> ChunkReader<R, N> {
    /// Receives from `from`; `notes` is given what the sender says on the way.
    pub fn new(from: R, notes: N) -> Self {
        Self {
            from,
            notes,
            buffer: vec![0; CHUNK],
            start: 0,
            end: 0,
            left: 0,
            ended: false,
        }
    }

    /// Reads the length of the next chunk, and the reports in front of it.
    fn start_chunk(&mut self) -> io::Result<()> {
        while self.left == 0 && !self.ended {
            let mut prefix = [0; PREFIX];
            self.from.read_exact(&mut prefix).map_err(cut)?;
            self.left = u32::from_le_bytes(prefix).into();
            if self.left > 0 {
                return Ok(());
            }
            match protocol::receive(&mut self.from).map_err(cut)? {
                Some(Report::Note(note)) => (self.notes)(note),
                Some(Report::End(Ok(()))) => self.ended = true,
                Some(Report::End(Err(why))) => return Err(io::Error::other(PeerFailed(why))),
                None => return Err(io::ErrorKind::ConnectionAborted.into()),
            }
        }
        Ok(())
    }
}

/// An end that is none of the archive.
fn cut(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => io::ErrorKind::ConnectionAborted.into(),
        _ => error,
    }
}

impl<R: Read, N: FnMut(String)> BufRead for ChunkReader<R, N> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.start == self.end {
            self.start_chunk()?;
            (self.start, self.end) = (0, 0);
            let len = usize::try_from(self.left).map_or(CHUNK, |left| left.min(CHUNK));
            let room = self.buffer.get_mut(..len).unwrap_or_default();
            while !room.is_empty() && self.end == 0 {
                match self.from.read(room) {
                    Ok(0) => return Err(io::ErrorKind::ConnectionAborted.into()),
                    Ok(len) => self.end = len,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            self.left -= self.end as u64;
        }
        Ok(self.buffer.get(self.start..self.end).unwrap_or_default())
    }

    fn consume(&mut self, len: usize) {
        self.start = (self.start + len).min(self.end);
    }
}

impl<R: Read, N: FnMut(String)> Read for ChunkReader<R, N> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = self.fill_buf()?.read(into)?;
        self.consume(len);
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(wire: &[u8]) -> (io::Result<Vec<u8>>, Vec<String>) {
        let mut notes = Vec::new();
        let mut bytes = Vec::new();
        let read = ChunkReader::new(wire, |note| notes.push(note)).read_to_end(&mut bytes);
        (read.map(|_| bytes), notes)
    }

    #[test]
    fn bytes_and_notes_come_back_across_chunks() {
        let sent: Vec<u8> = (0..3 * CHUNK + 17).map(|i| (i % 251) as u8).collect();
        let mut writer = ChunkWriter::new(Vec::new());
        writer.write_all(&sent[..CHUNK + 1]).unwrap();
        writer.note("a note".to_owned()).unwrap();
        writer.write_all(&sent[CHUNK + 1..]).unwrap();
        let wire = writer.end(Ok(())).unwrap();
        let (bytes, notes) = read(&wire);
        assert!(bytes.unwrap() == sent);
        assert_eq!(notes, ["a note"]);
    }

    #[test]
    fn the_senders_reason_is_told_from_a_connection_that_broke() {
        let mut writer = ChunkWriter::new(Vec::new());
        writer.write_all(b"half").unwrap();
        let wire = writer.end(Err("the disk broke".to_owned())).unwrap();
        let error = ArchiveError::stream(read(&wire).0.unwrap_err());
        assert!(matches!(error, ArchiveError::Peer(why) if why == "the disk broke"));
        for cut in 0..wire.len() {
            let error = ArchiveError::stream(read(&wire[..cut]).0.unwrap_err());
            assert!(matches!(error, ArchiveError::Lost), "cut at {cut}: {error}");
        }
    }

    #[test]
    fn a_chunk_that_announces_4_gib_takes_no_memory_for_it() {
        let mut wire = u32::MAX.to_le_bytes().to_vec();
        wire.extend([7; 100]);
        let error = read(&wire).0.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    }

    use super::super::ArchiveError;
}
