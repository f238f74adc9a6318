//! Errors as text, and lines on standard error.

use std::io::Write as _;

/// The error and its sources, joined by colons. A source is omitted if the text already ends with it: some libraries repeat their source.
pub fn display_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Writes a line to standard error. Unlike `eprintln!`, does not panic if it is closed, as after the end of a terminal: what follows may
/// be a thaw.
pub fn report_line(line: &str) {
    let _closed = writeln!(std::io::stderr(), "{line}");
}
