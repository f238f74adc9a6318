//! IO only: what the kernel and the NVIDIA driver say, with the times it was asked and answered.

pub mod clock;
pub mod gpu;
pub mod kernel;
pub mod pressure;
