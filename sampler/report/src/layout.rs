//! Text for terminals: escaping, width, wrapping, colours, and tables that fit.

use unicode_width::UnicodeWidthChar as _;

/// Spaces between columns.
const GUTTER: usize = 2;

/// Escapes characters that control a terminal or change the direction of text: tenants choose the names.
pub fn terminal_safe(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || is_invisible(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// Direction marks, line separators and invisible characters.
fn is_invisible(c: char) -> bool {
    matches!(c,
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
        | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// The width of a text in terminal columns.
pub fn columns(text: &str) -> usize {
    text.chars().map(|c| c.width().unwrap_or(0)).sum()
}

/// Shortens a text in the middle to `room` columns: names of pods differ at the end as often as at the beginning.
pub fn fit(text: &str, room: usize, unicode: bool) -> String {
    // Combining marks have no width and could accumulate without limit.
    let crowded = text.chars().count() > room.saturating_mul(4);
    if columns(text) <= room && !crowded {
        return text.to_owned();
    }
    let dots = if unicode { "…" } else { ".." };
    let left = room.saturating_sub(columns(dots));
    let head = taken(text.chars(), left.div_ceil(2));
    let tail: String = taken(text.chars().rev(), left - left.div_ceil(2)).chars().rev().collect();
    // Without dots if there is no room for them.
    let shortened = format!("{head}{dots}{tail}");
    if columns(&shortened) <= room { shortened } else { taken(text.chars(), room) }
}

fn taken(from: impl Iterator<Item = char>, room: usize) -> String {
    let (mut out, mut used) = (String::new(), 0);
    for c in from.take(room.saturating_mul(4)) {
        let wide = c.width().unwrap_or(0);
        if used + wide > room {
            break;
        }
        out.push(c);
        used += wide;
    }
    out
}

pub fn left(text: &str, room: usize) -> String {
    format!("{text}{:1$}", "", room.saturating_sub(columns(text)))
}

pub fn right(text: &str, room: usize) -> String {
    format!("{:1$}{text}", "", room.saturating_sub(columns(text)))
}

/// Replaces non-breaking spaces by plain ones and, without `unicode`, the symbols of this package by ASCII.
pub fn drawn(text: &str, unicode: bool) -> String {
    let text = text.replace('\u{a0}', " ");
    if unicode { text } else { text.replace(" ± ", " +- ").replace('→', "->").replace('µ', "u") }
}

/// `head`, followed by the text broken between words; further lines are indented by the width of `head`.
pub fn wrapped(head: &str, text: &str, width: usize, unicode: bool) -> Vec<String> {
    // Symbols are replaced before wrapping because their ASCII is wider; non-breaking spaces after it.
    let text = if unicode { text.to_owned() } else { text.replace('±', "+-").replace('→', "->") };
    let indent = columns(head);
    // In less room, each word would be a line.
    let room = width.saturating_sub(indent).max(20);
    let (mut lines, mut line) = (Vec::new(), String::new());
    for word in text.split(' ').flat_map(|word| pieces(word, room)) {
        if !line.is_empty() && columns(&line) + 1 + columns(&word) > room {
            lines.push(std::mem::take(&mut line));
        } else if !line.is_empty() {
            line.push(' ');
        }
        line += &word;
    }
    lines.push(line);
    let lines = lines.iter().map(|line| drawn(line, unicode));
    lines.enumerate().map(|(i, line)| if i == 0 { format!("{head}{line}") } else { format!("{:indent$}{line}", "") }).collect()
}

/// Breaks a word that is longer than a line.
fn pieces(word: &str, room: usize) -> Vec<String> {
    if columns(word) <= room {
        return vec![word.to_owned()];
    }
    let (mut out, mut rest) = (Vec::new(), word);
    while !rest.is_empty() {
        let piece = taken(rest.chars(), room.max(2));
        rest = rest.get(piece.len()..).unwrap_or_default();
        out.push(piece);
    }
    out
}

/// Terminal colours; none if false.
#[derive(Clone, Copy)]
pub struct Ink(pub bool);

impl Ink {
    fn paint(self, code: &str, text: &str) -> String {
        if self.0 && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
    pub fn strong(self, text: &str) -> String {
        self.paint("1", text)
    }
    pub fn faint(self, text: &str) -> String {
        self.paint("2", text)
    }
    pub fn alarm(self, text: &str) -> String {
        self.paint("1;31", text)
    }
    pub fn warn(self, text: &str) -> String {
        self.paint("33", text)
    }
    pub fn good(self, text: &str) -> String {
        self.paint("32", text)
    }
    /// Of waiting; no item of [`Self::nth`] has it.
    pub fn wait(self, text: &str) -> String {
        self.paint("31", text)
    }
    /// One of six colours for the `n`th item; red and green are not among them.
    pub fn nth(self, n: usize, text: &str) -> String {
        self.paint(["36", "33", "35", "34", "96", "93"][n % 6], text)
    }
}

/// A table of one column of names, which is shortened first, and columns of values, of which the least important are dropped.
pub struct Table {
    pub name: Column,
    pub values: Vec<Column>,
}

pub struct Column {
    pub head: String,
    /// If columns do not fit, the one with the highest rank is dropped first.
    pub rank: u8,
    pub cells: Vec<String>,
}

impl Column {
    pub fn new(head: &str, rank: u8, cells: Vec<String>) -> Column {
        Column { head: head.to_owned(), rank, cells }
    }

    fn width(&self) -> usize {
        self.cells.iter().map(|cell| columns(cell)).chain([columns(&self.head)]).max().unwrap_or(0)
    }
}

impl Table {
    pub fn lines(mut self, indent: usize, width: usize, unicode: bool, ink: Ink) -> Vec<String> {
        /// Names are shortened to this width before a column is dropped.
        const NAME: usize = 18;
        for cell in self.values.iter_mut().flat_map(|column| &mut column.cells) {
            *cell = drawn(cell, unicode);
        }
        let room = width.saturating_sub(indent);
        let wanted = self.name.width();
        let taken = |values: &[Column]| values.iter().map(|column| column.width() + GUTTER).sum::<usize>();
        while self.values.len() > 1 && taken(&self.values) + wanted.min(NAME) > room {
            let last = self.values.iter().enumerate().max_by_key(|(_, column)| column.rank).map_or(0, |(at, _)| at);
            self.values.remove(last);
        }
        let name = wanted.min(room.saturating_sub(taken(&self.values)).max(8));
        let row = |head: &str, cells: &mut dyn Iterator<Item = (&str, usize)>| {
            let mut line = format!("{:indent$}{}", "", left(&fit(head, name, unicode), name));
            for (cell, wide) in cells {
                line += &format!("{:GUTTER$}{}", "", right(cell, wide));
            }
            line.trim_end().to_owned()
        };
        let heads = row(&self.name.head, &mut self.values.iter().map(|column| (column.head.as_str(), column.width())));
        let mut lines = vec![ink.faint(&heads)];
        for (at, head) in self.name.cells.iter().enumerate() {
            let cells = &mut self.values.iter().map(|column| (column.cells.get(at).map_or("", String::as_str), column.width()));
            lines.push(row(head, cells));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_and_invisible_characters_are_escaped() {
        let cases = [
            ("plain-name_1.2", "plain-name_1.2"),
            ("a\x1b[2Jb", "a\\u{1b}[2Jb"),
            ("a\r\nb\t", "a\\r\\nb\\t"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("abc\u{202e}fed", "abc\\u{202e}fed"),
            ("日本語", "日本語"),
        ];
        for (from, expect) in cases {
            assert_eq!(terminal_safe(from), expect);
        }
    }

    #[test]
    fn a_shortened_text_keeps_both_ends_and_fits() {
        assert_eq!(fit("namespace/pod-abcdef/main", 13, true), "namesp…f/main");
        assert_eq!(fit("namespace/pod-abcdef/main", 13, false), "namesp../main");
        assert_eq!(fit("日本語日本語", 7, true), "日…語");
        for room in 0..12 {
            assert!(columns(&fit("日本語日本語日本語", room, true)) <= room);
            assert!(columns(&fit("namespace/pod", room, false)) <= room);
        }
        let crowded = format!("a{}", "\u{301}".repeat(10_000));
        assert!(fit(&crowded, 10, true).chars().count() < 100);
    }

    #[test]
    fn words_longer_than_a_line_are_broken() {
        let lines = wrapped("* ", &"x".repeat(50), 22, true);
        assert_eq!(lines, [format!("* {}", "x".repeat(20)), format!("  {}", "x".repeat(20)), format!("  {}", "x".repeat(10))]);
        assert_eq!(wrapped("a ", "b c", 80, true), ["a b c"]);
        assert_eq!(wrapped("", "take 1.0\u{a0}±\u{a0}0.1\u{a0}s or so", 20, false), ["take 1.0 +- 0.1 s or", "so"]);
    }
}
