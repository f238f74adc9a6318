//! Errors of reading GPUs, and threads, whose start may fail.

use nvml_wrapper::error::NvmlError;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum GpuError {
    #[error(
        "cannot use the NVIDIA driver library {path}: {error}; install the NVIDIA driver, or name its libnvidia-ml.so.1 with --nvml-lib"
    )]
    // Not a `source`: nvml-wrapper's message already repeats its own.
    Init { path: String, error: NvmlError },
    #[error("the NVIDIA driver does not list its GPUs")]
    List(#[source] NvmlError),
    #[error("the NVIDIA driver library does not answer")]
    Hangs,
    #[error("cannot start the thread {name}")]
    Thread { name: String, source: std::io::Error },
}

pub fn spawn(name: &str, f: impl FnOnce() + Send + 'static) -> Result<std::thread::JoinHandle<()>, GpuError> {
    let name = name.to_owned();
    std::thread::Builder::new().name(name.clone()).spawn(f).map_err(|source| GpuError::Thread { name, source })
}
