//! A frame: the unit that is checked, skipped when it is damaged, and counted when it is missing.
//!
//! ```text
//!  0  marker (8)   where to go on after damage; the first one is the file's magic
//!  8  major (1)    minor (1)    kind (1)    0 (1)
//! 12  sequence (4)           from 0, one more each frame: a jump is a loss
//! 16  packed length (4)      of the payload as it is here
//! 20  raw length (4)         of the payload once decompressed
//! 24  crc32 (4)              of bytes 8 to 24 and the payload
//! 28  payload                zstd; records, each behind its length as a varint
//! ```
//! All numbers are little-endian. docs/session-format.md is this in prose.

use std::io;

/// As PNG's: a byte that is no text, a line end that text modes change, an end of file for DOS.
pub const MARKER: [u8; 8] = *b"\x89GPUS\r\n\x1a";
/// Files of another one cannot be read. Their frames' heads are laid out as here.
pub const MAJOR: u8 = 1;
/// Later ones may have kinds of frames and facts that are not known here, and more at the end of a record.
pub const MINOR: u8 = 1;
pub const HEAD_BYTES: usize = 28;
/// Of one payload, decompressed: what a reader must be ready to hold, whatever a file claims.
pub const MAX_RAW_BYTES: usize = 16 << 20;
/// Of one payload in the file: zstd makes what cannot be compressed a little longer.
pub const MAX_PACKED_BYTES: usize = MAX_RAW_BYTES + (MAX_RAW_BYTES >> 7) + 1024;
/// Level 3 is zstd's own default; frames are small, higher ones gain a few percent.
const LEVEL: i32 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Header = 1,
    State = 2,
    Facts = 3,
    End = 4,
}

impl Kind {
    pub fn of(byte: u8) -> Option<Kind> {
        [Kind::Header, Kind::State, Kind::Facts, Kind::End].into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// A payload, compressed, without a place in a file yet: one frame goes into many.
#[derive(Clone, Debug)]
pub struct Frame {
    pub kind: Kind,
    raw_bytes: u32,
    packed: Box<[u8]>,
}

/// What the head of a frame says, once its checksum is right.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    pub major: u8,
    pub minor: u8,
    pub kind: u8,
    pub sequence: u32,
    pub packed_bytes: usize,
    pub raw_bytes: usize,
}

/// Why there is no frame at some place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    NoMarker,
    /// The file ends before the frame does.
    Cut,
    TooLong,
    Checksum,
}

impl Flaw {
    pub fn words(self) -> &'static str {
        match self {
            Flaw::NoMarker => "no frame begins there",
            Flaw::Cut => "the file ends within the frame that begins there, or its length is wrong",
            Flaw::TooLong => "the frame says to be longer than frames may be",
            Flaw::Checksum => "the frame's checksum is wrong",
        }
    }
}

fn crc(of_head: &[u8], payload: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(of_head);
    crc.update(payload);
    crc.finalize()
}

impl Frame {
    /// `raw` is at most [`MAX_RAW_BYTES`].
    pub(super) fn pack(kind: Kind, raw: &[u8], with: &mut zstd::bulk::Compressor<'static>) -> io::Result<Frame> {
        let raw_bytes = u32::try_from(raw.len()).ok().filter(|n| *n as usize <= MAX_RAW_BYTES);
        let raw_bytes = raw_bytes.ok_or_else(|| io::Error::other("a payload longer than frames may have"))?;
        Ok(Frame { kind, raw_bytes, packed: with.compress(raw)?.into_boxed_slice() })
    }

    pub(super) fn compressor() -> io::Result<zstd::bulk::Compressor<'static>> {
        zstd::bulk::Compressor::new(LEVEL)
    }

    /// In a file.
    pub fn bytes(&self) -> usize {
        HEAD_BYTES + self.packed.len()
    }

    /// Adds it to a file as its frame number `sequence`.
    pub fn put(&self, sequence: u32, to: &mut Vec<u8>) {
        let mut head = [0; HEAD_BYTES];
        head[..8].copy_from_slice(&MARKER);
        head[8..12].copy_from_slice(&[MAJOR, MINOR, self.kind as u8, 0]);
        head[12..16].copy_from_slice(&sequence.to_le_bytes());
        // `pack` saw to it that lengths fit.
        head[16..20].copy_from_slice(&(self.packed.len() as u32).to_le_bytes());
        head[20..24].copy_from_slice(&self.raw_bytes.to_le_bytes());
        let crc = crc(&head[8..24], &self.packed);
        head[24..].copy_from_slice(&crc.to_le_bytes());
        to.extend(head);
        to.extend(&self.packed);
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The frame that begins at `at`, and its payload as it is in the file. Flaws come with the number of bytes that were summed.
pub fn at(file: &[u8], at: usize) -> Result<(Head, &[u8]), (Flaw, usize)> {
    let rest = file.get(at..).unwrap_or_default();
    if !rest.starts_with(&MARKER) {
        let begun = !rest.is_empty() && MARKER.starts_with(&rest[..rest.len().min(MARKER.len())]);
        return Err((if begun { Flaw::Cut } else { Flaw::NoMarker }, 0));
    }
    let (Some(head), Some(&[major, minor, kind, _]), Some(sequence), Some(packed), Some(raw), Some(sum)) = (
        rest.get(8..24),
        rest.get(8..12).and_then(|b| b.first_chunk::<4>()),
        u32_at(rest, 12),
        u32_at(rest, 16),
        u32_at(rest, 20),
        u32_at(rest, 24),
    ) else {
        return Err((Flaw::Cut, 0));
    };
    let (packed_bytes, raw_bytes) = (packed as usize, raw as usize);
    if packed_bytes > MAX_PACKED_BYTES || raw_bytes > MAX_RAW_BYTES {
        return Err((Flaw::TooLong, 0));
    }
    let Some(payload) = rest.get(HEAD_BYTES..HEAD_BYTES + packed_bytes) else { return Err((Flaw::Cut, 0)) };
    if crc(head, payload) != sum {
        return Err((Flaw::Checksum, packed_bytes));
    }
    Ok((Head { major, minor, kind, sequence, packed_bytes, raw_bytes }, payload))
}

/// Decompresses a payload; never more than it said, which is never more than [`MAX_RAW_BYTES`].
pub fn unpack(head: &Head, payload: &[u8], with: &mut zstd::bulk::Decompressor<'static>) -> io::Result<Vec<u8>> {
    let raw = with.decompress(payload, head.raw_bytes)?;
    if raw.len() != head.raw_bytes {
        return Err(io::Error::other("shorter than it says"));
    }
    Ok(raw)
}

/// Splits a length-delimited record off; `None` when what is there is no record.
pub fn record<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (mut length, mut used) = (0usize, 0);
    loop {
        let byte = *rest.get(used)?;
        length |= usize::from(byte & 0x7f) << (7 * used);
        used += 1;
        if byte < 0x80 {
            break;
        }
        // Four groups of seven bits hold every length below the bound.
        if used == 4 {
            return None;
        }
    }
    let record = rest.get(used..used.checked_add(length)?)?;
    *rest = &rest[used + length..];
    Some(record)
}

/// The opposite of [`record`].
pub fn put_record(record: &[u8], to: &mut Vec<u8>) {
    let mut length = record.len();
    while length >= 0x80 {
        to.push(length as u8 & 0x7f | 0x80);
        length >>= 7;
    }
    to.push(length as u8);
    to.extend(record);
}
