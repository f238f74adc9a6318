//! Text for terminals: width, wrapping, numbers and colours. An unknown value is a dash, never 0.

use sampler_report::UserName;
pub use sampler_report::terminal_safe;
use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

pub const DASH: &str = "–";
/// In less, every word would be on a line of its own.
const LEAST_WIDTH: usize = 24;

/// The width of the terminal on stdout; `None` elsewhere.
pub fn terminal_width() -> Option<usize> {
    terminal_size::terminal_size_of(std::io::stdout()).map(|(width, _)| usize::from(width.0))
}

/// Whether to use colours on a stream: it is a terminal and not a dumb one, and NO_COLOR is not set.
pub fn use_colours(is_terminal: bool) -> bool {
    let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    is_terminal && !is_dumb && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// `head`, which is `indent` columns wide, then the text: wrapped on a terminal, a single line elsewhere. Safe to display.
pub fn wrapped(head: &str, indent: usize, text: &str) -> String {
    let width = terminal_width().map_or(usize::MAX, |width| width.saturating_sub(indent).max(LEAST_WIDTH));
    let lines = wrap(&terminal_safe(text), width, usize::MAX);
    format!("{head}{}\n", lines.join(&format!("\n{:indent$}", "")))
}

/// At most `most` lines, wrapped at spaces. A word is not broken: ids and paths stay whole, for copying.
pub fn wrap(text: &str, width: usize, most: usize) -> Vec<String> {
    let (mut lines, mut line) = (Vec::new(), String::new());
    let mut column = 0;
    for word in text.split(' ') {
        let columns = word.width();
        if column > 0 && column + 1 + columns > width && lines.len() + 1 < most {
            lines.push(std::mem::take(&mut line));
            column = 0;
        } else if column > 0 {
            line.push(' ');
            column += 1;
        }
        line += word;
        column += columns;
    }
    lines.push(line);
    lines
}

/// At most `width` columns; a truncated text ends with an ellipsis.
pub fn fit(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let (mut out, mut taken) = (String::new(), 0);
    for c in text.chars() {
        let columns = c.width().unwrap_or_default();
        if taken + columns + 1 > width {
            break;
        }
        out.push(c);
        taken += columns;
    }
    if width > 0 {
        out.push('…');
    }
    out
}

/// Exactly `width` columns.
pub fn left(text: &str, width: usize) -> String {
    let text = fit(text, width);
    let pad = width.saturating_sub(text.width());
    format!("{text}{:pad$}", "")
}

/// Exactly `width` columns.
pub fn right(text: &str, width: usize) -> String {
    let text = fit(text, width);
    let pad = width.saturating_sub(text.width());
    format!("{:pad$}{text}", "")
}

/// The name of a container or pod, from its namespace, pod, container and name. Safe to display.
pub fn user_name(labels: [&Option<String>; 4], container_id: &str, id: &str) -> String {
    let [namespace, pod, container, name] = labels.map(|label| label.as_deref().unwrap_or_default());
    terminal_safe(&UserName { namespace, pod, container, name, container_id, id }.to_string())
}

/// In the largest binary unit that keeps the number at 1 or more.
pub fn bytes(value: u64) -> String {
    let mut value = value as f64;
    let mut unit = "B";
    for larger in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, larger);
    }
    let digits = usize::from(unit != "B" && value < 100.0);
    format!("{value:.digits$} {unit}")
}

pub fn bytes_or_dash(value: Option<u64>) -> String {
    value.map_or(DASH.into(), bytes)
}

pub fn percent_or_dash(ratio: Option<f64>) -> String {
    ratio.map_or(DASH.into(), |ratio| format!("{:.0} %", ratio * 100.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_numbers_are_dashes_and_bytes_are_binary() {
        for (value, expect) in
            [(None, "–"), (Some(0), "0 B"), (Some(1536), "1.5 KiB"), (Some(16 << 30), "16.0 GiB"), (Some(600 << 20), "600 MiB")]
        {
            assert_eq!(bytes_or_dash(value), expect);
        }
        assert_eq!((percent_or_dash(None), percent_or_dash(Some(0.994))), ("–".into(), "99 %".into()));
    }

    #[test]
    fn texts_are_truncated_and_padded_to_the_width() {
        for (text, width, expect) in [("abc", 5, "abc  "), ("abcdef", 4, "abc…"), ("データ", 4, "デ… "), ("x", 0, "")] {
            assert_eq!(left(text, width), expect);
        }
        assert_eq!(right("7", 3), "  7");
    }

    #[test]
    fn lines_break_at_spaces_only_and_the_last_one_takes_the_rest() {
        assert_eq!(wrap("one two  three", 7, usize::MAX), ["one two", "three"]);
        assert_eq!(wrap("a   b", 7, usize::MAX), ["a   b"]);
        assert_eq!(wrap("one two three", 7, 1), ["one two three"]);
        assert_eq!(wrap("a 0123456789 b", 4, usize::MAX), ["a", "0123456789", "b"]);
        assert_eq!(wrap("", 4, usize::MAX), [""]);
    }
}
