//! What xtask, the tests and the benches share. Nothing here is part of the agent.
//!
//! Without features it has no dependencies, so that the pure packages can use it in their tests, and the simulated driver in programs that
//! load it. `http` adds the HTTP client, `venv` Python environments, `libfuzzer` the engine of `cargo xtask fuzz`.

#![deny(unsafe_code)]

mod fuzz;

pub mod gpu_users;
#[cfg(feature = "http")]
pub mod http;
pub mod process;
pub mod promql;
mod random;
#[cfg(feature = "venv")]
mod venv;

pub use fuzz::{ARGUMENTS, fuzz};
pub use random::Random;
#[cfg(feature = "venv")]
pub use venv::{CHART_PACKAGES, S3_PACKAGES, venv};
