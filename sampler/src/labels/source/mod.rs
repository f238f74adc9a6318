//! The sources of labels: each may fail alone, each has a hard limit in time and size, none is on the sampling path.

pub mod docker;
pub mod files;

use sampler_core::labels::{Facts, Outcome};

/// A source's answer, with what to log when it failed.
pub struct Answer {
    pub outcome: Outcome,
    /// `ok`, `not-found`, `error` or `timeout`.
    pub name: &'static str,
    pub detail: String,
}

impl Answer {
    pub fn failed(name: &'static str, detail: impl ToString) -> Self {
        Self { outcome: Outcome::Failed, name, detail: detail.to_string() }
    }

    pub fn not_found() -> Self {
        Self { outcome: Outcome::NotFound, name: "not-found", detail: String::new() }
    }

    pub fn found(facts: Facts) -> Self {
        Self { outcome: Outcome::Found(facts), name: "ok", detail: String::new() }
    }
}
