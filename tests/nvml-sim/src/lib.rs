//! A simulated NVIDIA driver library with ground truth. See README.md in this folder.

#[expect(non_snake_case, reason = "the names are NVML's")]
pub mod abi;
pub mod answers;
pub mod clock;
pub mod driver;
pub mod faults;
pub mod follow;
pub mod kernel_files;
pub mod loads;
pub mod model;
pub mod processes;
#[cfg(test)]
mod quirks;
pub mod symbols;
pub mod tally;
pub mod time;
pub mod world;
