//! From a file's bytes to its session, whatever became of the bytes.
//!
//! ```text
//!            +--------- next frame is whole ---------+
//!            v                                       |
//!  [in step] --damage, or a number missing--> [lost] --Header, then State frames--> [in step]
//!   State frames are passed over               their facts are taken
//! ```
//! Facts of whole frames are kept in both states; what was lost is said. The checksum decides what is whole.

use serde::de::DeserializeOwned;
use thiserror::Error;

use super::frame::{self, Flaw, Head, Kind, MAJOR, MARKER, MINOR, record};
use super::{End, Header, Session};
use sampler_core::fact::Fact;

/// Facts of one file that are held: three days of eight busy GPUs.
pub const MAX_FACTS: usize = 16_000_000;
/// Of all payloads, decompressed.
pub const MAX_TOTAL_BYTES: u64 = 2 << 30;
/// Places told apart in [`Session::damage`]; the others are counted.
const MAX_DAMAGE: usize = 100;
/// Damage is searched for the next frame with checksums over at most this many times the file: a file may be made to look like
/// nothing but beginnings of frames.
const MAX_EFFORT: usize = 4;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum ReadError {
    #[error("this is no session file: no frame of one can be found in it")]
    NotASession,
    #[error(
        "its format is version {0}, and this program reads version {MAJOR}; use the gpu-sampler that recorded it, or a newer one"
    )]
    Version(u8),
    #[error("no header can be read in it: {0}")]
    NoHeader(String),
}

/// What a later minor version wrote that is not known here.
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
    /// Something is missing since the last State that was whole; true at first.
    lost: bool,
    /// Within a section's State frames, as far as none is missing; and whether they are taken.
    section: Option<bool>,
    unknown: Unknown,
    foreign_major: Option<u8>,
    summed: usize,
    unpacked: u64,
    dropped: u64,
}

/// All that can be read.
pub fn read(file: &[u8]) -> Result<Session, ReadError> {
    let Ok(zstd) = zstd::bulk::Decompressor::new() else {
        return Err(ReadError::NoHeader("not enough memory to decompress".into()));
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
        summed: 0,
        unpacked: 0,
        dropped: 0,
    };
    while reader.at < file.len() && reader.frame() {}
    reader.finish()
}

/// What a file's beginning says of it, without reading the rest.
pub fn header(beginning: &[u8]) -> Option<Header> {
    let mut zstd = zstd::bulk::Decompressor::new().ok()?;
    first(beginning, 0, Kind::Header, &mut zstd)
}

/// The End frame among a file's last bytes.
pub fn end(last: &[u8]) -> Option<End> {
    let mut zstd = zstd::bulk::Decompressor::new().ok()?;
    // It is short and nothing follows it: the last marker is its own.
    let at = last.windows(MARKER.len()).rposition(|bytes| bytes == MARKER)?;
    first(last, at, Kind::End, &mut zstd)
}

fn first<T: DeserializeOwned>(file: &[u8], at: usize, kind: Kind, zstd: &mut zstd::bulk::Decompressor<'static>) -> Option<T> {
    let (head, payload) = frame::at(file, at).ok()?;
    let raw = frame::unpack(&head, payload, zstd).ok().filter(|_| head.major == MAJOR && head.kind == kind as u8)?;
    decode(record(&mut &raw[..])?, head.minor)
}

/// A record may be longer than what is known of it only where a later version wrote it.
fn decode<T: DeserializeOwned>(record: &[u8], minor: u8) -> Option<T> {
    let (what, rest) = postcard::take_from_bytes(record).ok()?;
    (rest.is_empty() || minor > MINOR).then_some(what)
}

impl Reader<'_> {
    fn damage(&mut self, words: String) {
        if self.session.damage.len() < MAX_DAMAGE {
            self.session.damage.push(words);
        } else {
            self.more_damage += 1;
        }
    }

    fn lose(&mut self) {
        (self.lost, self.section) = (true, None);
    }

    /// One frame, or the damage up to the next one. False where reading ends.
    fn frame(&mut self) -> bool {
        match frame::at(self.file, self.at) {
            Ok((head, payload)) => {
                let began = self.at;
                self.at += frame::HEAD_BYTES + head.packed_bytes;
                self.whole(began, &head, payload)
            }
            Err((flaw, summed)) => {
                self.summed += summed;
                self.pass(flaw)
            }
        }
    }

    /// Searches the next whole frame.
    fn pass(&mut self, flaw: Flaw) -> bool {
        let began = self.at;
        self.lose();
        let mut from = began + 1;
        while let Some(found) = self.file.get(from..).and_then(|rest| rest.windows(MARKER.len()).position(|b| b == MARKER)) {
            from += found;
            match frame::at(self.file, from) {
                Ok(_) => {
                    self.damage(format!("bytes {began} to {from} cannot be read: {}", flaw.words()));
                    self.at = from;
                    return true;
                }
                Err((_, summed)) => self.summed += summed,
            }
            if self.summed / MAX_EFFORT > self.file.len() {
                self.damage(format!("nothing is read beyond byte {began}: what follows only looks like frames"));
                return false;
            }
            from += 1;
        }
        self.damage(format!("nothing can be read from byte {began} to the end, {}: {}", self.file.len(), flaw.words()));
        false
    }

    fn whole(&mut self, began: usize, head: &Head, payload: &[u8]) -> bool {
        if head.major != MAJOR {
            self.foreign_major = Some(head.major);
            self.damage(format!("the frame at byte {began} is of version {}, which cannot be read", head.major));
            self.lose();
            return true;
        }
        if head.sequence != self.next {
            if head.sequence < self.next {
                self.damage(format!("the frame at byte {began} has number {}, which was read already", head.sequence));
                self.lose();
                return true;
            }
            let (first, last) = (self.next, head.sequence - 1);
            let which = if first == last { format!("frame {first} is") } else { format!("frames {first} to {last} are") };
            self.damage(format!("{which} missing before byte {began}"));
            self.lose();
        }
        self.next = head.sequence.saturating_add(1);
        self.unpacked += head.raw_bytes as u64;
        if self.unpacked > MAX_TOTAL_BYTES {
            self.damage(format!("nothing is read from byte {began} on: it would be more than {MAX_TOTAL_BYTES} bytes"));
            return false;
        }
        match frame::unpack(head, payload, &mut self.zstd) {
            Ok(raw) => self.payload(began, head, &raw),
            Err(error) => {
                self.damage(format!("the frame at byte {began} cannot be decompressed: {error}"));
                self.lose();
                true
            }
        }
    }

    fn payload(&mut self, began: usize, head: &Head, raw: &[u8]) -> bool {
        match Kind::of(head.kind) {
            Some(Kind::Header) => {
                self.section = Some(self.lost);
                match record(&mut &raw[..]).and_then(|record| decode(record, head.minor)) {
                    Some(header) => {
                        self.header.get_or_insert(header);
                    }
                    None => self.damage(format!("the header at byte {began} cannot be decoded")),
                }
                true
            }
            // Part of a State of which other parts are missing is not taken for it: the next one will be whole.
            Some(Kind::State) => self.section != Some(true) || self.facts(began, head, raw),
            Some(Kind::Facts) => {
                self.section_ends();
                self.facts(began, head, raw)
            }
            Some(Kind::End) => {
                self.section_ends();
                match record(&mut &raw[..]).and_then(|record| decode::<End>(record, head.minor)) {
                    Some(end) => {
                        self.session.end = Some(end.at);
                        self.dropped = end.dropped_frames;
                    }
                    None => self.damage(format!("the end at byte {began} cannot be decoded")),
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

    fn facts(&mut self, began: usize, head: &Head, raw: &[u8]) -> bool {
        let mut rest = raw;
        let mut undecodable = 0u64;
        while !rest.is_empty() {
            let Some(record) = record(&mut rest) else {
                self.damage(format!("the records of the frame at byte {began} cannot be told apart"));
                self.lose();
                return true;
            };
            if self.session.facts.len() >= MAX_FACTS {
                self.damage(format!("nothing is read from byte {began} on: it has more than {MAX_FACTS} facts"));
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
            self.damage(format!("{undecodable} records of the frame at byte {began} cannot be decoded"));
            self.lose();
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
                "it was written by a newer version ({MAJOR}.{minor}): {frames} frames and {records} records of kinds that are not \
                 known here were passed over"
            ));
        }
        if self.dropped > 0 {
            self.damage(format!("the agent had to leave {} frames out, because the disk did not keep up", self.dropped));
        }
        if self.more_damage > 0 {
            let more = format!("and {} more places", self.more_damage);
            self.session.damage.push(more);
        }
        Ok(self.session)
    }
}
