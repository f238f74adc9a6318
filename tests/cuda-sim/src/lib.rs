//! A simulated CUDA driver library with ground truth of waiting. See README.md in this folder.

pub mod abi;
pub mod error;
pub mod gpu;
pub mod nvml_log;
pub mod process;
pub mod schedule;
pub mod shared;
pub mod wait_log;
pub mod waits;
