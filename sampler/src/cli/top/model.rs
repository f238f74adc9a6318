//! What `top` knows and what keys change in it. No terminal, clock or network: pictures and keys come in, the view reads.

use std::collections::HashMap;
use std::time::{Duration, UNIX_EPOCH};

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::history::{History, Point, SPAN};
use super::rows::{Key, Sort, TopRow, arrange};
use super::words::{key_of_other, name_of_other};
use crate::export::live::{LiveDocument, LiveUser};

/// Less is noise.
const LEAST_RATE: f64 = 0.005;
/// A longer filter is a paste that went astray.
const MAX_FILTER_CHARS: usize = 200;

/// What a key asks of the loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Quit,
}

pub struct Model {
    pub agent: String,
    pub interval: Duration,
    pub live: Option<LiveDocument>,
    /// Why there is no newer picture.
    pub away: Option<String>,
    pub sort: Sort,
    pub filter: String,
    /// What the filter was before it is being typed.
    pub typing: Option<String>,
    pub paused: bool,
    pub help: bool,
    pub rows: Vec<TopRow>,
    /// Before the filter.
    pub total: usize,
    /// The first row on the screen.
    pub first: usize,
    /// Rows that fit, as last drawn.
    page: usize,
    selected: Option<Key>,
    histories: HashMap<Key, History>,
}

impl Model {
    pub fn new(agent: &str, interval: Duration, sort: Sort, filter: &str) -> Self {
        Self {
            agent: agent.to_owned(),
            interval,
            live: None,
            away: None,
            sort,
            filter: filter.to_owned(),
            typing: None,
            paused: false,
            help: false,
            rows: Vec::new(),
            total: 0,
            first: 0,
            page: 1,
            selected: None,
            histories: HashMap::new(),
        }
    }

    pub fn away(&mut self, why: String) {
        self.away = Some(why);
    }

    /// Histories go on while the picture stands still.
    pub fn update(&mut self, live: LiveDocument) {
        self.away = None;
        let now = time_of(&live);
        for user in &live.users {
            let waited_for = user.contended_by.iter().map(|other| (key_of_other(other).to_owned(), other.seconds)).collect();
            let value = user.duty_cycle_percent.map(|percent| percent / 100.0);
            let point = Point { at: now, value, waited: user.contention_seconds, waited_for };
            self.histories.entry(TopRow::new(user).key()).or_default().push(point);
        }
        self.histories.retain(|_, history| !history.is_older_than(now.saturating_sub(SPAN)));
        if !self.paused {
            self.live = Some(live);
            self.arrange();
        }
    }

    fn row(&self, user: &LiveUser) -> TopRow {
        let mut row = TopRow::new(user);
        let history = self.histories.get(&row.key());
        row.waiting = history.and_then(|history| history.rate(|point| point.waited));
        let by = user.contended_by.iter().filter_map(|other| {
            let key = key_of_other(other);
            let rate = history?.rate(|point| point.waited_for.get(key).copied().unwrap_or_default())?;
            (rate >= LEAST_RATE).then(|| (name_of_other(other), rate))
        });
        row.by = by.collect();
        row.by.sort_by(|a, b| b.1.total_cmp(&a.1));
        row
    }

    fn arrange(&mut self) {
        let Some(live) = &self.live else { return };
        let rows = live.users.iter().map(|user| self.row(user)).collect();
        self.total = live.users.len();
        self.rows = arrange(live, rows, self.sort, &self.filter);
        self.keep_in_sight();
    }

    /// The time of the picture that is shown.
    pub fn now(&self) -> Duration {
        self.live.as_ref().map(time_of).unwrap_or_default()
    }

    pub fn spark(&self, row: &TopRow, width: usize) -> String {
        self.histories.get(&row.key()).map_or_else(|| " ".repeat(width), |history| history.spark(self.now(), width))
    }

    /// Index of the row that is looked at; it stays the same container, wherever its row moves.
    pub fn selected(&self) -> usize {
        let known = self.selected.as_ref().and_then(|key| self.rows.iter().position(|row| row.key() == *key));
        known.unwrap_or(self.first).min(self.rows.len().saturating_sub(1))
    }

    fn select(&mut self, index: usize) {
        let index = index.min(self.rows.len().saturating_sub(1));
        self.selected = self.rows.get(index).map(TopRow::key);
        self.keep_in_sight();
    }

    /// Tells how many rows fit.
    pub fn fits(&mut self, rows: usize) {
        self.page = rows.max(1);
        self.keep_in_sight();
    }

    fn keep_in_sight(&mut self) {
        self.first = self.first.min(self.rows.len().saturating_sub(self.page));
        if self.selected.is_some() {
            let selected = self.selected();
            self.first = self.first.min(selected).max((selected + 1).saturating_sub(self.page));
        }
    }

    pub fn key(&mut self, key: KeyEvent) -> Option<Asked> {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        if control && matches!(key.code, KeyCode::Char('c')) {
            return Some(Asked::Quit);
        }
        if self.typing.is_some() {
            self.type_filter(key.code);
            return None;
        }
        if self.help {
            self.help = false;
            return None;
        }
        let (at, page) = (self.selected(), self.page);
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Some(Asked::Quit),
            KeyCode::Char('s') => {
                self.sort = match self.sort {
                    Sort::Share => Sort::Seconds,
                    Sort::Seconds => Sort::Memory,
                    Sort::Memory => Sort::Waiting,
                    Sort::Waiting => Sort::Name,
                    Sort::Name => Sort::Share,
                };
                self.arrange();
            }
            KeyCode::Char('/') => self.typing = Some(self.filter.clone()),
            KeyCode::Char('p') | KeyCode::Char(' ') => self.paused = !self.paused,
            KeyCode::Char('?') | KeyCode::Char('h') => self.help = true,
            KeyCode::Up | KeyCode::Char('k') => self.select(at.saturating_sub(1)),
            KeyCode::Down | KeyCode::Char('j') => self.select(at + 1),
            KeyCode::PageUp => self.select(at.saturating_sub(page)),
            KeyCode::PageDown => self.select(at + page),
            KeyCode::Home => self.select(0),
            KeyCode::End => self.select(usize::MAX),
            _ => {}
        }
        None
    }

    fn type_filter(&mut self, code: KeyCode) {
        match code {
            KeyCode::Enter => self.typing = None,
            // As it was.
            KeyCode::Esc => self.filter = self.typing.take().unwrap_or_default(),
            KeyCode::Backspace => {
                self.filter.pop();
            }
            KeyCode::Char(c) if self.filter.chars().count() < MAX_FILTER_CHARS => self.filter.push(c),
            _ => {}
        }
        self.arrange();
    }
}

fn time_of(live: &LiveDocument) -> Duration {
    let time = humantime::parse_rfc3339(&live.time).ok();
    time.and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default()
}
