//! From facts to frames. Where frames go, and when, is the recorder's business.

use std::io;

use serde::Serialize;
use thiserror::Error;

use super::frame::{Frame, Kind, put_record};
use super::{End, Header};
use sampler_core::fact::Fact;

/// A frame's payload is closed once it is as long as this, uncompressed; one record more may fit.
const FULL_BYTES: usize = 1 << 20;
/// A fact of this length is none that aggregation makes; it would not fit a frame.
const MAX_RECORD_BYTES: usize = 4 << 20;

#[derive(Debug, Error)]
pub enum PackError {
    #[error("a record cannot be encoded")]
    Encode(#[from] postcard::Error),
    #[error("a record of {0} bytes is longer than records may be")]
    TooLong(usize),
    #[error("a frame cannot be compressed")]
    Compress(#[from] io::Error),
}

/// Makes frames; keeps zstd's tables between them.
pub struct Packer {
    zstd: zstd::bulk::Compressor<'static>,
    raw: Vec<u8>,
    record: Vec<u8>,
}

impl Packer {
    pub fn new() -> Result<Self, PackError> {
        Ok(Self { zstd: Frame::compressor()?, raw: Vec::new(), record: Vec::new() })
    }

    pub fn header(&mut self, header: &Header) -> Result<Frame, PackError> {
        self.one(Kind::Header, header)
    }

    pub fn end(&mut self, end: &End) -> Result<Frame, PackError> {
        self.one(Kind::End, end)
    }

    /// What [`super::State::facts`] holds: a frame, or several when it is much.
    pub fn state(&mut self, facts: &[Fact]) -> Result<Vec<Frame>, PackError> {
        self.many(Kind::State, facts)
    }

    /// Nothing for no facts.
    pub fn facts(&mut self, facts: &[Fact]) -> Result<Vec<Frame>, PackError> {
        if facts.is_empty() { Ok(Vec::new()) } else { self.many(Kind::Facts, facts) }
    }

    fn one(&mut self, kind: Kind, what: &impl Serialize) -> Result<Frame, PackError> {
        self.raw.clear();
        self.put(what)?;
        Ok(Frame::pack(kind, &self.raw, &mut self.zstd)?)
    }

    fn many(&mut self, kind: Kind, facts: &[Fact]) -> Result<Vec<Frame>, PackError> {
        let mut frames = Vec::new();
        self.raw.clear();
        for fact in facts {
            self.put(fact)?;
            if self.raw.len() >= FULL_BYTES {
                frames.push(Frame::pack(kind, &self.raw, &mut self.zstd)?);
                self.raw.clear();
            }
        }
        if !self.raw.is_empty() || frames.is_empty() {
            frames.push(Frame::pack(kind, &self.raw, &mut self.zstd)?);
        }
        Ok(frames)
    }

    fn put(&mut self, what: &impl Serialize) -> Result<(), PackError> {
        let mut record = std::mem::take(&mut self.record);
        record.clear();
        let record = postcard::to_extend(what, record)?;
        if record.len() > MAX_RECORD_BYTES {
            return Err(PackError::TooLong(record.len()));
        }
        put_record(&record, &mut self.raw);
        self.record = record;
        Ok(())
    }
}

/// A whole file in memory, for tests and for who has all facts at once.
#[derive(Default)]
pub struct FileBytes {
    pub bytes: Vec<u8>,
    pub sequence: u32,
}

impl FileBytes {
    pub fn put(&mut self, frame: &Frame) {
        frame.put(self.sequence, &mut self.bytes);
        self.sequence = self.sequence.wrapping_add(1);
    }
}
