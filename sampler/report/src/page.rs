//! A page of text for a terminal or a pipe, which limits the width of its lines.

use super::layout::{Ink, Table, wrapped};
use super::words;

#[derive(Clone, Copy, Debug)]
pub struct TextOptions {
    /// Columns; `None` for a pipe, which gets 100.
    pub width: Option<usize>,
    pub colour: bool,
    /// Draws with block characters; otherwise with ASCII only (names are not changed).
    pub unicode: bool,
}

pub struct Page {
    pub width: usize,
    pub ink: Ink,
    pub unicode: bool,
    lines: Vec<String>,
}

impl Page {
    pub fn new(options: &TextOptions) -> Self {
        let width = options.width.unwrap_or(100).clamp(40, 240);
        Self { width, ink: Ink(options.colour), unicode: options.unicode, lines: Vec::new() }
    }

    /// The page, with a newline at the end.
    pub fn finish(self) -> String {
        self.lines.join("\n") + "\n"
    }

    /// Appends a line of at most `width` columns.
    pub fn line(&mut self, line: impl Into<String>) {
        self.lines.push(line.into());
    }

    pub fn wrap(&mut self, head: &str, text: &str) {
        self.painted(head, text, |_, line| line.to_owned());
    }

    /// Wraps before it colours, so that the codes do not count as width.
    pub fn painted(&mut self, head: &str, text: &str, paint: impl Fn(Ink, &str) -> String) {
        let lines = wrapped(head, text, self.width, self.unicode);
        self.lines.extend(lines.iter().map(|line| paint(self.ink, line)));
    }

    pub fn heading(&mut self, text: &str) {
        self.line("");
        self.painted("", text, Ink::strong);
    }

    pub fn table(&mut self, table: Table) {
        self.lines.extend(table.lines(2, self.width, self.unicode, self.ink));
    }

    /// `… 54 more`, if not all are shown.
    pub fn more(&mut self, all: usize, shown: usize) {
        if all > shown {
            self.line(format!("  {} {} more", self.dots(), words::count(all - shown)));
        }
    }

    pub fn dots(&self) -> &'static str {
        if self.unicode { "…" } else { "..." }
    }

    /// Colours the first occurrence of `tag` in the line at `position`, after wrapping, so that the codes do not count as width.
    pub fn paint_tag(&mut self, position: usize, tag: &str, paint: impl Fn(Ink, &str) -> String) {
        if let Some(line) = self.lines.get_mut(position) {
            *line = line.replacen(tag, &paint(self.ink, tag), 1);
        }
    }

    pub fn line_count(&self) -> usize {
        self.lines.len()
    }
}
