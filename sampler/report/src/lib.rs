//! What a session says: who used which GPU, with whom, and whom that kept waiting, with the evidence.
//!
//! [`Report`] is the one model; every format (`text`, `json`, `html`, `perfetto`, `csv`) is a function of it. Its serialization is the
//! `json` format, so fields are added and not changed.
#![forbid(unsafe_code)]

mod bins;
mod build;
mod causes;
mod compare;
mod csv;
mod findings;
mod gather;
mod html;
mod json;
mod layout;
mod model;
mod onoff;
mod perfetto;
#[cfg(test)]
mod sample;
mod selection;
mod text;
mod words;

pub use build::build;
pub use compare::{Comparison, compare};
pub use csv::csv;
pub use html::html;
pub use json::json;
pub use model::*;
pub use perfetto::perfetto;
pub use text::{TextOptions, text};

#[cfg(test)]
mod tests;
