//! The analysis of a session: which users used which GPU at the same time, which of them had to wait, and the evidence for it.
//!
//! [`Report`] is the only model; every format (`text`, `json`, `html`, `perfetto`, `csv`) is a function of it. Its serialization is the
//! `json` format, so fields are added and never changed.
#![forbid(unsafe_code)]

mod bins;
mod build;
mod causes;
mod compare;
mod csv;
mod demand;
mod engine_model;
mod engine_words;
mod engines;
mod experiments;
mod findings;
mod fleet;
mod format;
mod freeze;
mod gather;
mod html;
mod json;
mod layout;
mod model;
mod onoff;
mod outcomes;
mod page;
mod perfetto;
mod ranking;
#[cfg(test)]
mod sample;
mod selection;
mod text;
mod user_name;
mod wait_words;
mod waiting;
mod words;

pub use self::csv::csv;
pub use build::build;
pub use compare::{Comparison, compare};
pub use engine_model::*;
pub use fleet::{Coverage, Cut, FileProblem, Fleet, FleetFile, FleetOptions, JoinField, WallSpan, fleet};
pub use format::Format;
pub use freeze::GUARD_NS;
pub use html::html;
pub use html::html_escape;
pub use json::json;
pub use layout::terminal_safe;
pub use model::*;
pub use page::TextOptions;
pub use perfetto::perfetto;
pub use text::{experiments_text, text};
pub use user_name::{UserName, short_id};

#[cfg(test)]
mod tests;
