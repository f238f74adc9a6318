//! Errors of GPU access, and a function that starts threads.

use std::path::PathBuf;

use thiserror::Error;

use super::diagnosis::Diagnosis;
use super::library_search::NotFound;

#[derive(Debug, Error)]
pub enum GpuError {
    #[error("{0}; install the NVIDIA driver, or set --nvml-lib to its libnvidia-ml.so.1")]
    Library(NotFound),
    #[error("cannot use the NVIDIA driver library {path}: {diagnosis}", path = path.display())]
    Init { path: PathBuf, diagnosis: Diagnosis },
    #[error("the NVIDIA driver cannot list its GPUs: {0}")]
    List(Diagnosis),
    #[error("a call of the NVIDIA driver library does not return")]
    Hangs,
    #[error("cannot start the thread {name}")]
    Thread { name: String, source: std::io::Error },
}

pub fn spawn(name: &str, f: impl FnOnce() + Send + 'static) -> Result<std::thread::JoinHandle<()>, GpuError> {
    let name = name.to_owned();
    std::thread::Builder::new().name(name.clone()).spawn(f).map_err(|source| GpuError::Thread { name, source })
}
