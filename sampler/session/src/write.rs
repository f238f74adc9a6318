//! Packs facts into frames. The recorder decides where and when frames are written.

use std::io;

use serde::Serialize;
use thiserror::Error;

use super::frame::{Frame, Kind, put_record};
use super::{End, Header};
use sampler_core::fact::Fact;

/// A frame's payload is closed once its uncompressed length reaches this; the last record may exceed it.
const FULL_BYTES: usize = 1 << 20;
/// Aggregation makes no fact of this length, and it would not fit into a frame.
const MAX_RECORD_BYTES: usize = 4 << 20;

#[derive(Debug, Error)]
pub enum PackError {
    #[error("a record cannot be encoded")]
    Encode(#[from] postcard::Error),
    #[error("a record of {0} bytes exceeds the limit of {MAX_RECORD_BYTES} bytes")]
    TooLong(usize),
    #[error("a frame cannot be compressed")]
    Compress(#[from] io::Error),
}

/// Packs frames; keeps zstd's tables from one frame to the next.
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
        self.single(Kind::Header, header)
    }

    pub fn end(&mut self, end: &End) -> Result<Frame, PackError> {
        self.single(Kind::End, end)
    }

    /// Packs the facts of [`super::State::facts`] into one frame, or several if they exceed the length of one.
    pub fn state(&mut self, facts: &[Fact]) -> Result<Vec<Frame>, PackError> {
        self.fact_frames(Kind::State, facts)
    }

    /// Returns no frame if there are no facts.
    pub fn facts(&mut self, facts: &[Fact]) -> Result<Vec<Frame>, PackError> {
        if facts.is_empty() { Ok(Vec::new()) } else { self.fact_frames(Kind::Facts, facts) }
    }

    fn single(&mut self, kind: Kind, value: &impl Serialize) -> Result<Frame, PackError> {
        self.raw.clear();
        self.put(value)?;
        Ok(Frame::pack(kind, &self.raw, &mut self.zstd)?)
    }

    fn fact_frames(&mut self, kind: Kind, facts: &[Fact]) -> Result<Vec<Frame>, PackError> {
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

    fn put(&mut self, value: &impl Serialize) -> Result<(), PackError> {
        let mut record = std::mem::take(&mut self.record);
        record.clear();
        let record = postcard::to_extend(value, record)?;
        if record.len() > MAX_RECORD_BYTES {
            return Err(PackError::TooLong(record.len()));
        }
        put_record(&record, &mut self.raw);
        self.record = record;
        Ok(())
    }
}

/// A complete file in memory, for tests and for callers that have all facts at once.
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
