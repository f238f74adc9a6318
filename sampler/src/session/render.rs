//! The one place where a report's format is chosen.

use sampler_core::report::Report;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum RenderError {
    #[error("{0:?} is no format; choose from {all}", all = FORMATS.join(", "))]
    Unknown(String),
    #[error("the report cannot be encoded")]
    Encode(#[from] serde_json::Error),
}

pub const FORMATS: [&str; 1] = ["json"];

/// Content type and bytes.
pub fn render(report: &Report, format: &str) -> Result<(&'static str, Vec<u8>), RenderError> {
    match format {
        "json" => Ok(("application/json", serde_json::to_vec(report)?)),
        other => Err(RenderError::Unknown(other.chars().take(40).collect())),
    }
}
