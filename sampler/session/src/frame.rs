//! Frames: the units that are checksummed, skipped if damaged, and counted if missing.
//!
//! ```text
//!  0  marker (8)   reading resumes here after damage; the first one is the file's magic
//!  8  major (1)    minor (1)    kind (1)    0 (1)
//! 12  sequence (4)           from 0, incremented by one each frame: a gap is a loss
//! 16  packed length (4)      of the payload in the file
//! 20  raw length (4)         of the payload after decompression
//! 24  crc32 (4)              of bytes 8 to 24 and the payload
//! 28  payload                zstd; records, each preceded by its length as a varint
//! ```
//! All numbers are little-endian. docs/session-format.md describes the format in prose.

use std::io;

/// Like PNG's: a byte that is not text, a line end that text-mode transfers change, and DOS's end-of-file character.
pub const MARKER: [u8; 8] = *b"\x89GPUS\r\n\x1a";
/// Files of another major version cannot be read. Their frame heads have the layout described here.
pub const MAJOR: u8 = 1;
/// Later minor versions may add kinds of frames, kinds of facts, and fields at the end of a record.
pub const MINOR: u8 = 3;
pub const HEAD_BYTES: usize = 28;
/// Longest decompressed payload: bounds the memory of a reader, whatever length a file states.
pub const MAX_RAW_BYTES: usize = 16 << 20;
/// Longest payload in the file: zstd makes incompressible data slightly longer.
pub const MAX_PACKED_BYTES: usize = MAX_RAW_BYTES + (MAX_RAW_BYTES >> 7) + 1024;
/// Zstd's default level; frames are small, and higher levels gain a few percent.
const LEVEL: i32 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::FromRepr)]
#[repr(u8)]
pub enum Kind {
    Header = 1,
    State = 2,
    Facts = 3,
    End = 4,
}

/// A compressed payload without a position in a file: the same frame is written to several files.
#[derive(Clone, Debug)]
pub struct Frame {
    pub kind: Kind,
    raw_bytes: u32,
    packed: Box<[u8]>,
}

/// The head of a frame with a valid checksum.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    pub major: u8,
    pub minor: u8,
    pub kind: u8,
    pub sequence: u32,
    pub packed_bytes: usize,
    pub raw_bytes: usize,
}

/// The reason why there is no valid frame at an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    NoMarker,
    /// The file ends before the end of the frame.
    Cut,
    TooLong,
    Checksum,
}

impl Flaw {
    pub fn description(self) -> &'static str {
        match self {
            Flaw::NoMarker => "no frame marker at this offset",
            Flaw::Cut => "the file ends within the frame, or the frame's length is wrong",
            Flaw::TooLong => "the length in the frame head exceeds the limit",
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
        let raw_bytes = raw_bytes.ok_or_else(|| io::Error::other("the payload exceeds the limit of a frame"))?;
        Ok(Frame { kind, raw_bytes, packed: with.compress(raw)?.into_boxed_slice() })
    }

    pub(super) fn compressor() -> io::Result<zstd::bulk::Compressor<'static>> {
        zstd::bulk::Compressor::new(LEVEL)
    }

    /// The frame's length in a file.
    pub fn bytes(&self) -> usize {
        HEAD_BYTES + self.packed.len()
    }

    /// Appends the frame to a file with the given sequence number.
    pub fn put(&self, sequence: u32, to: &mut Vec<u8>) {
        let mut head = [0; HEAD_BYTES];
        head[..8].copy_from_slice(&MARKER);
        head[8..12].copy_from_slice(&[MAJOR, MINOR, self.kind as u8, 0]);
        head[12..16].copy_from_slice(&sequence.to_le_bytes());
        // `pack` ensures that lengths fit.
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

/// Parses the frame at `offset`; returns its head and its payload, still compressed. A flaw comes with the number of bytes over which a
/// checksum was computed.
pub fn parse_at(file: &[u8], offset: usize) -> Result<(Head, &[u8]), (Flaw, usize)> {
    let rest = file.get(offset..).unwrap_or_default();
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

/// Decompresses a payload, to at most the length that its head states, which is at most [`MAX_RAW_BYTES`].
pub fn unpack(head: &Head, payload: &[u8], with: &mut zstd::bulk::Decompressor<'static>) -> io::Result<Vec<u8>> {
    let raw = with.decompress(payload, head.raw_bytes)?;
    if raw.len() != head.raw_bytes {
        return Err(io::Error::other("the payload is shorter than its head states"));
    }
    Ok(raw)
}

/// Splits off a length-delimited record; `None` if the bytes are not a valid record.
pub fn record<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (mut length, mut used) = (0usize, 0);
    loop {
        let byte = *rest.get(used)?;
        length |= usize::from(byte & 0x7f) << (7 * used);
        used += 1;
        if byte < 0x80 {
            break;
        }
        // Four groups of seven bits encode every length below the bound.
        if used == 4 {
            return None;
        }
    }
    let record = rest.get(used..used.checked_add(length)?)?;
    *rest = &rest[used + length..];
    Some(record)
}

/// The inverse of [`record`].
pub fn put_record(record: &[u8], to: &mut Vec<u8>) {
    let mut length = record.len();
    while length >= 0x80 {
        to.push(length as u8 & 0x7f | 0x80);
        length >>= 7;
    }
    to.push(length as u8);
    to.extend(record);
}
