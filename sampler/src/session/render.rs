//! The formats of a report, for who asks over HTTP.

use sampler_report::{Report, TextOptions};
use thiserror::Error;

#[derive(Debug, Error)]
#[error("{0:?} is no format; choose from {all}", all = FORMATS.join(", "))]
pub struct UnknownFormat(pub String);

pub const FORMATS: [&str; 5] = ["text", "json", "html", "perfetto", "csv"];

/// Content type and text.
pub fn render(report: &Report, format: &str) -> Result<(&'static str, String), UnknownFormat> {
    Ok(match format {
        "text" => {
            let options = TextOptions { width: None, colour: false, unicode: true };
            ("text/plain; charset=utf-8", sampler_report::text(report, &options))
        }
        "json" => ("application/json", sampler_report::json(report)),
        "html" => ("text/html; charset=utf-8", sampler_report::html(report)),
        "perfetto" => ("application/json", sampler_report::perfetto(report)),
        "csv" => ("text/csv; charset=utf-8", sampler_report::csv(report)),
        other => return Err(UnknownFormat(other.chars().take(40).collect())),
    })
}
