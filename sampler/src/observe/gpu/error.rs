//! Errors of GPU access, and a function that starts threads.

use nvml_wrapper::error::NvmlError;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum GpuError {
    #[error(
        "cannot use the NVIDIA driver library {path}: {error}; install the NVIDIA driver, or set --nvml-lib to its libnvidia-ml.so.1"
    )]
    // Not a `source`: the message of nvml-wrapper already contains its source.
    Init { path: String, error: NvmlError },
    #[error("the NVIDIA driver cannot list its GPUs")]
    List(#[source] NvmlError),
    #[error("a call of the NVIDIA driver library does not return")]
    Hangs,
    #[error("cannot start the thread {name}")]
    Thread { name: String, source: std::io::Error },
}

pub fn spawn(name: &str, f: impl FnOnce() + Send + 'static) -> Result<std::thread::JoinHandle<()>, GpuError> {
    let name = name.to_owned();
    std::thread::Builder::new().name(name.clone()).spawn(f).map_err(|source| GpuError::Thread { name, source })
}
