//! Failures of the library that are not errors of its caller: files of the simulated world.

use std::io;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: cannot {action}; `cuda-work install --dir DIR` creates the files", path = path.display())]
    File { path: PathBuf, action: &'static str, source: io::Error },
    #[error("{path}: the file has another layout; remove it and run `cuda-work install` again", path = path.display())]
    Layout { path: PathBuf },
    #[error("{dir}: there is no GPU; run `cuda-work install --dir DIR` after `nvml-sim init`", dir = dir.display())]
    NoGpu { dir: PathBuf },
    #[error("process {pid}: /proc has no start time; is /proc mounted?")]
    NoStartTime { pid: u32 },
}

/// Adds path and action to an IO error.
pub fn at(path: impl Into<PathBuf>, action: &'static str) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::File { path, action, source }
}
