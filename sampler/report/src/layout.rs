//! Text in columns: what of a foreign string may reach a terminal, how wide it is there, and tables that fit.

use unicode_width::UnicodeWidthChar as _;

/// Between columns.
const GUTTER: usize = 2;

/// With what would steer a terminal, or turn the direction of what follows, shown instead of sent: names are chosen by tenants.
pub fn safe(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || steers(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// Marks of direction, separators of lines, and characters nobody sees.
fn steers(c: char) -> bool {
    matches!(c,
        '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
        | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// How many columns of a terminal a text takes.
pub fn columns(text: &str) -> usize {
    text.chars().map(|c| c.width().unwrap_or(0)).sum()
}

/// Cut in the middle to what fits: pods differ in their ends as often as in their beginnings.
pub fn fit(text: &str, room: usize, unicode: bool) -> String {
    // Marks without a width of their own could pile up without end.
    let crowded = text.chars().count() > room.saturating_mul(4);
    if columns(text) <= room && !crowded {
        return text.to_owned();
    }
    let dots = if unicode { "…" } else { ".." };
    let left = room.saturating_sub(columns(dots));
    let head = taken(text.chars(), left.div_ceil(2));
    let tail: String = taken(text.chars().rev(), left - left.div_ceil(2)).chars().rev().collect();
    // What is narrower than its dots is cut without them.
    let whole = format!("{head}{dots}{tail}");
    if columns(&whole) <= room { whole } else { taken(text.chars(), room) }
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

/// With what is drawn of words' own characters: plain spaces in any case, and ASCII where blocks cannot be drawn either.
pub fn drawn(text: &str, unicode: bool) -> String {
    let text = text.replace('\u{a0}', " ");
    if unicode { text } else { text.replace(" ± ", " +- ").replace('→', "->") }
}

/// `head`, then the text, broken between words; further lines begin below the text's first.
pub fn wrapped(head: &str, text: &str, width: usize, unicode: bool) -> Vec<String> {
    // Spaces between a number and its unit become plain ones once the lines are broken; the ASCII for ± is as long as it is told to be.
    let text = if unicode { text.to_owned() } else { text.replace('±', "+-").replace('→', "->") };
    let indent = columns(head);
    // Narrower than this, every word would be a line.
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

/// A word that no line can hold is broken inside.
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

/// Colours of a terminal, or none of them.
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
    /// One of six for the `n`th of several; red and green are not both among them.
    pub fn nth(self, n: usize, text: &str) -> String {
        self.paint(["36", "33", "35", "34", "96", "93"][n % 6], text)
    }
}

/// A table: one column of names, which gives way, and columns of values, the least important of which go first.
pub struct Table {
    pub name: Column,
    pub values: Vec<Column>,
}

pub struct Column {
    pub head: String,
    /// Of several columns that do not fit, the one with the highest goes first.
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
        /// Names are cut to this before a column goes.
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
    fn nothing_steers_the_terminal() {
        let rows = [
            ("plain-name_1.2", "plain-name_1.2"),
            ("a\x1b[2Jb", "a\\u{1b}[2Jb"),
            ("a\r\nb\t", "a\\r\\nb\\t"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("abc\u{202e}fed", "abc\\u{202e}fed"),
            ("日本語", "日本語"),
        ];
        for (from, expect) in rows {
            assert_eq!(safe(from), expect);
        }
    }

    #[test]
    fn what_is_cut_keeps_both_ends_and_its_width() {
        assert_eq!(fit("namespace/pod-abcdef/main", 13, true), "namesp…f/main");
        assert_eq!(fit("namespace/pod-abcdef/main", 13, false), "namesp../main");
        assert_eq!(fit("日本語日本語", 7, true), "日…語");
        for room in 0..12 {
            assert!(columns(&fit("日本語日本語日本語", room, true)) <= room);
            assert!(columns(&fit("namespace/pod", room, false)) <= room);
        }
        let piled = format!("a{}", "\u{301}".repeat(10_000));
        assert!(fit(&piled, 10, true).chars().count() < 100);
    }

    #[test]
    fn long_words_are_broken() {
        let lines = wrapped("* ", &"x".repeat(50), 22, true);
        assert_eq!(lines, [format!("* {}", "x".repeat(20)), format!("  {}", "x".repeat(20)), format!("  {}", "x".repeat(10))]);
        assert_eq!(wrapped("a ", "b c", 80, true), ["a b c"]);
        assert_eq!(wrapped("", "take 1.0\u{a0}±\u{a0}0.1\u{a0}s or so", 20, false), ["take 1.0 +- 0.1 s or", "so"]);
    }
}
