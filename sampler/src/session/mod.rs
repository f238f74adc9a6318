//! Recording: what is known is kept for a while in memory, and in a file while somebody asks for it.
//!
//! ```text
//!  core thread --facts--> recorder thread --frames--> ring in memory (some minutes)
//!                          ^ labels, names    |  \--> writer thread of a session --> DIR/ID.gpus.part -> DIR/ID.gpus
//!  HTTP --start, stop------+                  +----> ... one each: a disk that hangs stalls its session alone
//!  HTTP <--list, files-- store
//! ```
//! The core thread never waits for any of it. The format and what belongs in it are sampler_session's.

mod enrich;
mod manager;
mod recorder;
pub mod render;
mod request;
mod ring;
mod store;
mod writer;

use std::io::Read as _;
use std::path::{Path, PathBuf};

use sampler_session::{ReadError, Session};
use thiserror::Error;

pub use self::recorder::{Recorder, RecorderView, SessionInputs};
pub use self::request::{MAX_DURATION_S, MAX_LOOKBACK_S, Request};
pub use self::store::{Phase, Store, StoreError};

/// Larger files are not read: what is read is held.
const MAX_FILE_BYTES: u64 = 2 << 30;
#[derive(Debug, Error)]
pub enum SessionError {
    #[error("cannot read {path}", path = path.display())]
    Open { path: PathBuf, source: std::io::Error },
    #[error("{path} is no file", path = path.display())]
    NoFile { path: PathBuf },
    #[error("{path} has {bytes} bytes; at most {MAX_FILE_BYTES} are read", path = path.display())]
    TooLarge { path: PathBuf, bytes: u64 },
    #[error("{path} cannot be read as a session", path = path.display())]
    Format { path: PathBuf, source: ReadError },
}

/// A session file, as far as it can be read; what cannot be is said in it.
pub fn read(path: &Path) -> Result<Session, SessionError> {
    let open = |source| SessionError::Open { path: path.to_owned(), source };
    // A named pipe would be waited for.
    let meta = std::fs::metadata(path).map_err(open)?;
    if !meta.is_file() {
        return Err(SessionError::NoFile { path: path.to_owned() });
    }
    read_from(&std::fs::File::open(path).map_err(open)?, path)
}

/// As [`read`], of a file that is open.
pub fn read_from(file: &std::fs::File, path: &Path) -> Result<Session, SessionError> {
    let mut bytes = Vec::new();
    let open = |source| SessionError::Open { path: path.to_owned(), source };
    // One more than allowed tells that there is more.
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(open)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(SessionError::TooLarge { path: path.to_owned(), bytes: bytes.len() as u64 });
    }
    sampler_session::read(&bytes).map_err(|source| SessionError::Format { path: path.to_owned(), source })
}
