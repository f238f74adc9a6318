//! Text for people: to standard output, wrapped and harmless; logs to standard error.

use std::io::{IsTerminal as _, Write as _};

use anyhow::Context as _;
use tracing_subscriber::EnvFilter;

/// To stdout. A reader that has seen enough is no failure; a full disk is.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("cannot write to standard output"),
        _ => Ok(()),
    }
}

/// `head`, which takes `indent` columns, then the text: broken into lines on a terminal, whole elsewhere.
pub fn wrapped(head: &str, indent: usize, text: &str) -> String {
    let width = terminal_size::terminal_size_of(std::io::stdout()).map_or(usize::MAX, |(width, _)| usize::from(width.0));
    // Narrower than this, every word would be a line.
    let room = width.saturating_sub(indent).max(24);
    let (mut out, mut column) = (head.to_owned(), 0);
    for word in harmless(text).split(' ') {
        let length = word.chars().count();
        if column > 0 && column + 1 + length > room {
            out += &format!("\n{:indent$}", "");
            column = 0;
        } else if column > 0 {
            out.push(' ');
            column += 1;
        }
        out += word;
        column += length;
    }
    out.push('\n');
    out
}

/// Names come from whoever runs containers: what would steer the terminal, or turn the text around, is shown, not sent.
pub fn harmless(text: &str) -> String {
    let steers = |c: char| {
        c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    text.chars().map(|c| if steers(c) { c.escape_default().to_string() } else { c.to_string() }).collect()
}

/// Colours are wanted on that stream: it is a terminal, and NO_COLOR is not set.
pub fn colours(is_terminal: bool) -> bool {
    is_terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// To stderr; RUST_LOG chooses, colours only on a terminal and without NO_COLOR.
pub fn log(default: &str) {
    let colours = colours(std::io::stderr().is_terminal());
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
}
