//! The formats of a report.

use super::model::Report;
use super::page::TextOptions;
use super::{csv, html, json, perfetto, text};

#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::EnumString, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Format {
    Text,
    Json,
    Html,
    Perfetto,
    Csv,
}

impl Format {
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Help for one format.
    pub fn description(self) -> &'static str {
        match self {
            Format::Text => "Text for a terminal",
            Format::Json => "JSON document for programs",
            Format::Html => "Self-contained HTML page",
            Format::Perfetto => "Trace for ui.perfetto.dev",
            Format::Csv => "One line per window, GPU and user",
        }
    }

    pub fn content_type(self) -> &'static str {
        match self {
            Format::Text => "text/plain; charset=utf-8",
            Format::Json | Format::Perfetto => "application/json",
            Format::Html => "text/html; charset=utf-8",
            Format::Csv => "text/csv; charset=utf-8",
        }
    }

    /// `options` apply to text only.
    pub fn render(self, report: &Report, options: &TextOptions) -> String {
        match self {
            Format::Text => text(report, options),
            Format::Json => json(report),
            Format::Html => html(report),
            Format::Perfetto => perfetto(report),
            Format::Csv => csv(report),
        }
    }
}
