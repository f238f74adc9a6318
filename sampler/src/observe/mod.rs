//! IO only: reads the kernel and the NVIDIA driver, and records when each reading was started and completed.

pub mod clock;
pub mod gpu;
pub mod kernel;
pub mod pressure;
pub mod waits;
