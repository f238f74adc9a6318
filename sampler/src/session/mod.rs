//! Sessions: recent facts are kept in memory, and are written to a file on request.
//!
//! ```text
//!  core thread --facts--> recorder thread --frames--> ring in memory (some minutes)
//!                          ^ labels, names    |  \--> writer thread of a session --> DIR/ID.gpus.part -> DIR/ID.gpus
//!  HTTP --start, stop------+                  +----> ... one each: a disk that hangs stalls only its session
//!  HTTP <--list, files-- store <--complete files-- uploader --> object store (optional)
//! ```
//! The core thread never waits for any of this. The package sampler_session defines the file format and its content.

mod enrich;
mod manager;
mod recorder;
mod request;
mod ring;
mod store;
mod uploader;
mod writer;

use std::io::Read as _;
use std::path::{Path, PathBuf};

use sampler_session::{ReadError, Session};
use thiserror::Error;

pub use self::recorder::{Recorder, RecorderView, SessionInputs};
pub use self::request::{MAX_DURATION_S, MAX_LOOKBACK_S, Request};
pub use self::store::{EXTENSION, Phase, SessionStatus, Store, StoreError};
pub use self::uploader::Uploader;

/// Larger files are not read, because the whole file is held in memory.
pub const MAX_FILE_BYTES: u64 = 2 << 30;
#[derive(Debug, Error)]
pub enum SessionError {
    #[error("cannot read {path}", path = path.display())]
    Open { path: PathBuf, source: std::io::Error },
    #[error("{path} is not a regular file", path = path.display())]
    NoFile { path: PathBuf },
    #[error("{path} has {bytes} bytes, more than the maximum of {MAX_FILE_BYTES}", path = path.display())]
    TooLarge { path: PathBuf, bytes: u64 },
    #[error("{path} cannot be read as a session", path = path.display())]
    Format { path: PathBuf, source: ReadError },
}

/// Reads a session file as far as possible; the session lists the damaged parts.
pub fn read(path: &Path) -> Result<Session, SessionError> {
    let open = |source| SessionError::Open { path: path.to_owned(), source };
    // Opening a named pipe would block.
    let meta = std::fs::metadata(path).map_err(open)?;
    if !meta.is_file() {
        return Err(SessionError::NoFile { path: path.to_owned() });
    }
    read_from(&std::fs::File::open(path).map_err(open)?, path)
}

/// As [`read`], for an open file.
pub fn read_from(file: &std::fs::File, path: &Path) -> Result<Session, SessionError> {
    let mut bytes = Vec::new();
    let open = |source| SessionError::Open { path: path.to_owned(), source };
    // One byte more than allowed, to detect larger files.
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(open)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(SessionError::TooLarge { path: path.to_owned(), bytes: bytes.len() as u64 });
    }
    from_bytes(&bytes, path)
}

/// As [`read`], for the content of a file; `path` is its name in errors.
pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Session, SessionError> {
    sampler_session::read(bytes).map_err(|source| SessionError::Format { path: path.to_owned(), source })
}
