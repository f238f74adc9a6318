//! What a session says: who used which GPU, with whom, and whom that kept waiting, with the evidence.
//!
//! [`Report`] is the one model; every format (`text`, `json`, `html`, `perfetto`, `csv`) is a function of it. Its serialization is the
//! `json` format, so fields are added and not changed.

mod build;
mod causes;
mod findings;
mod gather;
mod model;
mod onoff;

pub use build::build;
pub use model::*;

#[cfg(test)]
mod tests;
