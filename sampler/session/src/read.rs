//! Reads a session from a file's bytes, also if they are damaged.
//!
//! ```text
//!  [in step] --damage or a sequence gap--> [lost] --a Header, then all of its State frames--> [in step]
//!   State frames are skipped                their facts are read
//! ```
//! Facts frames with a valid checksum are read in both states; losses are reported.

use serde::de::DeserializeOwned;
use thiserror::Error;

use super::frame::{self, Flaw, Head, Kind, MAJOR, MARKER, MINOR, record};
use super::{End, Header, Session};
use sampler_core::fact::Fact;

/// Facts kept of one file: three days of eight busy GPUs.
pub const MAX_FACTS: usize = 16_000_000;
/// Decompressed length of all payloads together.
pub const MAX_TOTAL_BYTES: u64 = 2 << 30;
/// Damaged places listed in [`Session::damage`]; further ones are counted.
const MAX_DAMAGE: usize = 100;
/// The search for the next frame computes checksums over at most this many times the length of the file: a crafted file may consist of
/// nothing but beginnings of frames.
const MAX_EFFORT: usize = 4;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum ReadError {
    #[error("not a session file: it contains no valid frame")]
    NotASession,
    #[error(
        "its format is version {0}, but this program reads version {MAJOR}: use the gpu-sampler that recorded it, or a newer one"
    )]
    Version(u8),
    #[error("it has no readable header: {0}")]
    NoHeader(String),
}

/// Frames and records of a later minor version that this version cannot decode.
#[derive(Default)]
struct Unknown {
    minor: u8,
    frames: u64,
    records: u64,
}

struct Reader<'a> {
    file: &'a [u8],
    at: usize,
    zstd: zstd::bulk::Decompressor<'static>,
    header: Option<Header>,
    session: Session,
    more_damage: usize,
    next: u32,
    /// Data is missing since the last complete State; initially true.
    lost: bool,
    /// Set within a section's State frames while none is missing; true if their facts are read.
    section: Option<bool>,
    unknown: Unknown,
    foreign_major: Option<u8>,
    checksummed: usize,
    unpacked: u64,
    dropped: u64,
}

/// Reads as much of a session as possible. Fails only without a readable header.
pub fn read(file: &[u8]) -> Result<Session, ReadError> {
    let Ok(zstd) = zstd::bulk::Decompressor::new() else {
        return Err(ReadError::NoHeader("the decompressor cannot be created for lack of memory".into()));
    };
    let mut reader = Reader {
        file,
        at: 0,
        zstd,
        header: None,
        session: Session::default(),
        more_damage: 0,
        next: 0,
        lost: true,
        section: None,
        unknown: Unknown::default(),
        foreign_major: None,
        checksummed: 0,
        unpacked: 0,
        dropped: 0,
    };
    while reader.at < file.len() && reader.frame() {}
    reader.finish()
}

/// Reads the header from a file's first bytes.
pub fn header(beginning: &[u8]) -> Option<Header> {
    let mut zstd = zstd::bulk::Decompressor::new().ok()?;
    first(beginning, 0, Kind::Header, &mut zstd)
}

/// Reads the End frame from a file's last bytes.
pub fn end(last: &[u8]) -> Option<End> {
    let mut zstd = zstd::bulk::Decompressor::new().ok()?;
    // An End frame is short and is the last frame, so the last marker belongs to it.
    let at = last.windows(MARKER.len()).rposition(|bytes| bytes == MARKER)?;
    first(last, at, Kind::End, &mut zstd)
}

fn first<T: DeserializeOwned>(file: &[u8], at: usize, kind: Kind, zstd: &mut zstd::bulk::Decompressor<'static>) -> Option<T> {
    let (head, payload) = frame::parse_at(file, at).ok()?;
    let raw = frame::unpack(&head, payload, zstd).ok().filter(|_| head.major == MAJOR && head.kind == kind as u8)?;
    decode(record(&mut &raw[..])?, head.minor)
}

/// Bytes may follow the known fields of a record only if a later version wrote it.
fn decode<T: DeserializeOwned>(record: &[u8], minor: u8) -> Option<T> {
    let (what, rest) = postcard::take_from_bytes(record).ok()?;
    (rest.is_empty() || minor > MINOR).then_some(what)
}

impl Reader<'_> {
    fn damage(&mut self, description: String) {
        if self.session.damage.len() < MAX_DAMAGE {
            self.session.damage.push(description);
        } else {
            self.more_damage += 1;
        }
    }

    fn mark_lost(&mut self) {
        (self.lost, self.section) = (true, None);
    }

    /// Reads a frame, or skips damage up to the next frame. Returns false to stop reading.
    fn frame(&mut self) -> bool {
        match frame::parse_at(self.file, self.at) {
            Ok((head, payload)) => {
                let start = self.at;
                self.at += frame::HEAD_BYTES + head.packed_bytes;
                self.whole_frame(start, &head, payload)
            }
            Err((flaw, checksummed)) => {
                self.checksummed += checksummed;
                self.skip_to_next_frame(flaw)
            }
        }
    }

    /// Searches for the next frame with a valid checksum.
    fn skip_to_next_frame(&mut self, flaw: Flaw) -> bool {
        let start = self.at;
        self.mark_lost();
        let mut from = start + 1;
        while let Some(found) = self.file.get(from..).and_then(|rest| rest.windows(MARKER.len()).position(|b| b == MARKER)) {
            from += found;
            match frame::parse_at(self.file, from) {
                Ok(_) => {
                    self.damage(format!("bytes {start} to {from} cannot be read: {}", flaw.description()));
                    self.at = from;
                    return true;
                }
                Err((_, checksummed)) => self.checksummed += checksummed,
            }
            if self.checksummed / MAX_EFFORT > self.file.len() {
                self.damage(format!("reading stopped at byte {start}: too many frame markers without a valid frame"));
                return false;
            }
            from += 1;
        }
        self.damage(format!("bytes {start} to {} (end of file) cannot be read: {}", self.file.len(), flaw.description()));
        false
    }

    fn whole_frame(&mut self, start: usize, head: &Head, payload: &[u8]) -> bool {
        if head.major != MAJOR {
            self.foreign_major = Some(head.major);
            self.damage(format!("the frame at byte {start} has the unsupported version {}", head.major));
            self.mark_lost();
            return true;
        }
        if head.sequence != self.next {
            if head.sequence < self.next {
                self.damage(format!("the frame at byte {start} repeats sequence number {}", head.sequence));
                self.mark_lost();
                return true;
            }
            let (first, last) = (self.next, head.sequence - 1);
            let which = if first == last { format!("frame {first} is") } else { format!("frames {first} to {last} are") };
            self.damage(format!("{which} missing before byte {start}"));
            self.mark_lost();
        }
        self.next = head.sequence.saturating_add(1);
        self.unpacked += head.raw_bytes as u64;
        if self.unpacked > MAX_TOTAL_BYTES {
            self.damage(format!("reading stopped at byte {start}: the limit of {MAX_TOTAL_BYTES} decompressed bytes is reached"));
            return false;
        }
        match frame::unpack(head, payload, &mut self.zstd) {
            Ok(raw) => self.payload(start, head, &raw),
            Err(error) => {
                self.damage(format!("the frame at byte {start} cannot be decompressed: {error}"));
                self.mark_lost();
                true
            }
        }
    }

    fn payload(&mut self, start: usize, head: &Head, raw: &[u8]) -> bool {
        match Kind::from_repr(head.kind) {
            Some(Kind::Header) => {
                self.section = Some(self.lost);
                match record(&mut &raw[..]).and_then(|record| decode(record, head.minor)) {
                    Some(header) => {
                        self.header.get_or_insert(header);
                    }
                    None => self.damage(format!("the header at byte {start} cannot be decoded")),
                }
                true
            }
            // An incomplete State is not used; the next section has a complete one.
            Some(Kind::State) => self.section != Some(true) || self.facts(start, head, raw),
            Some(Kind::Facts) => {
                self.section_ends();
                self.facts(start, head, raw)
            }
            Some(Kind::End) => {
                self.section_ends();
                match record(&mut &raw[..]).and_then(|record| decode::<End>(record, head.minor)) {
                    Some(end) => {
                        self.session.end = Some(end.at);
                        self.dropped = end.dropped_frames;
                    }
                    None => self.damage(format!("the End frame at byte {start} cannot be decoded")),
                }
                true
            }
            None => {
                self.unknown.minor = self.unknown.minor.max(head.minor);
                self.unknown.frames += 1;
                true
            }
        }
    }

    fn section_ends(&mut self) {
        if self.section.take() == Some(true) {
            self.lost = false;
        }
    }

    fn facts(&mut self, start: usize, head: &Head, raw: &[u8]) -> bool {
        let mut rest = raw;
        let mut undecodable = 0u64;
        while !rest.is_empty() {
            let Some(record) = record(&mut rest) else {
                self.damage(format!("the frame at byte {start} contains an invalid record length"));
                self.mark_lost();
                return true;
            };
            if self.session.facts.len() >= MAX_FACTS {
                self.damage(format!("reading stopped at byte {start}: the limit of {MAX_FACTS} facts is reached"));
                return false;
            }
            match decode::<Fact>(record, head.minor) {
                Some(fact) => self.session.facts.push(fact),
                None if head.minor > MINOR => {
                    self.unknown.minor = self.unknown.minor.max(head.minor);
                    self.unknown.records += 1;
                }
                None => undecodable += 1,
            }
        }
        if undecodable > 0 {
            self.damage(format!("{undecodable} records of the frame at byte {start} cannot be decoded"));
            self.mark_lost();
        }
        true
    }

    fn finish(mut self) -> Result<Session, ReadError> {
        let Some(header) = self.header.take() else {
            return Err(match (self.foreign_major, self.next > 0) {
                (Some(major), _) => ReadError::Version(major),
                (None, false) => ReadError::NotASession,
                (None, true) => ReadError::NoHeader(self.session.damage.join("; ")),
            });
        };
        self.session.header = header;
        let Unknown { minor, frames, records } = self.unknown;
        if frames + records > 0 {
            self.damage(format!(
                "the file was written by a newer version ({MAJOR}.{minor}): {frames} frames and {records} records of unknown kinds \
                 were skipped"
            ));
        }
        if self.dropped > 0 {
            self.damage(format!("the agent dropped {} frames because the disk did not keep up", self.dropped));
        }
        if self.more_damage > 0 {
            let more = format!("and {} more places", self.more_damage);
            self.session.damage.push(more);
        }
        Ok(self.session)
    }
}
