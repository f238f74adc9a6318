//! Output of the commands: text to standard output, logs to standard error.

use std::io::{IsTerminal as _, Write as _};

use anyhow::Context as _;
use tracing_subscriber::EnvFilter;

use super::journal::{self, JournalFormat};
use super::text::use_colours;

/// Writes to stdout. A closed pipe is not a failure; a full disk is.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("cannot write to standard output"),
        _ => Ok(()),
    }
}

/// A document as indented JSON.
pub fn json(document: &impl serde::Serialize) -> anyhow::Result<String> {
    Ok(format!("{}\n", serde_json::to_string_pretty(document)?))
}

/// Logs to stderr at the level of RUST_LOG or else `default`; with colours only on a terminal and without NO_COLOR. The journal has times
/// and priorities of its own.
pub fn log(default: &str) {
    let colours = use_colours(std::io::stderr().is_terminal());
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr);
    if journal::has_stderr() { log.event_format(JournalFormat::default()).init() } else { log.init() }
}
