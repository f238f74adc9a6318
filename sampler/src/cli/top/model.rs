//! The state of `top` and the effects of keys on it. Without terminal, clock or network: documents and keys come in, the view reads.

use std::collections::HashMap;
use std::time::{Duration, UNIX_EPOCH};

use clap::ValueEnum as _;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::history::{History, Point, SPAN};
use super::names::{contender_key, contender_name};
use super::rows::{Key, Sort, TopRow, arrange};
use crate::export::live::{LiveDocument, LiveUser};

/// Contention in seconds per second; a lower rate is noise.
pub const LEAST_RATE: f64 = 0.005;
/// Bound of the filter, against pasted text.
const MAX_FILTER_CHARS: usize = 200;

/// The effect of a key on the event loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Quit,
}

pub struct Model {
    pub agent: String,
    pub interval: Duration,
    pub live: Option<LiveDocument>,
    /// Why there is no newer document.
    pub disconnected: Option<String>,
    pub sort: Sort,
    pub filter: String,
    /// While a filter is being typed: the previous one.
    pub typing: Option<String>,
    pub paused: bool,
    pub help: bool,
    pub rows: Vec<TopRow>,
    /// Rows before the filter.
    pub total: usize,
    /// Index of the first row on the screen.
    pub first: usize,
    /// Rows that fit on the screen, as last drawn.
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
            disconnected: None,
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

    pub fn disconnect(&mut self, error: String) {
        self.disconnected = Some(error);
    }

    /// Takes a new document. While the display is paused, only the histories are updated.
    pub fn update(&mut self, live: LiveDocument) {
        self.disconnected = None;
        let now = time_of(&live);
        for user in &live.users {
            let contenders = user.contended_by.iter();
            let contention_with = contenders.map(|other| (contender_key(other).to_owned(), other.seconds)).collect();
            let value = user.duty_cycle_percent.map(|percent| percent / 100.0);
            let point = Point { at: now, value, contention: user.contention_seconds, contention_with };
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
        row.contention = history.and_then(|history| history.rate(|point| point.contention));
        let contenders = user.contended_by.iter().filter_map(|other| {
            let key = contender_key(other);
            let rate = history?.rate(|point| point.contention_with.get(key).copied().unwrap_or_default())?;
            (rate >= LEAST_RATE).then(|| (contender_name(other), rate))
        });
        row.contenders = contenders.collect();
        row.contenders.sort_by(|a, b| b.1.total_cmp(&a.1));
        row
    }

    fn arrange(&mut self) {
        let Some(live) = &self.live else { return };
        let rows = live.users.iter().map(|user| self.row(user)).collect();
        self.total = live.users.len();
        self.rows = arrange(live, rows, self.sort, &self.filter);
        self.keep_selected_visible();
    }

    /// The time of the displayed document.
    pub fn now(&self) -> Duration {
        self.live.as_ref().map(time_of).unwrap_or_default()
    }

    pub fn spark(&self, row: &TopRow, width: usize) -> String {
        self.histories.get(&row.key()).map_or_else(|| " ".repeat(width), |history| history.spark(self.now(), width))
    }

    /// Index of the selected row; the selection follows the container when the row moves.
    pub fn selected(&self) -> usize {
        let index = self.selected.as_ref().and_then(|key| self.rows.iter().position(|row| row.key() == *key));
        index.unwrap_or(self.first).min(self.rows.len().saturating_sub(1))
    }

    fn select(&mut self, index: usize) {
        let index = index.min(self.rows.len().saturating_sub(1));
        self.selected = self.rows.get(index).map(TopRow::key);
        self.keep_selected_visible();
    }

    /// Sets the number of rows that fit on the screen.
    pub fn set_page(&mut self, rows: usize) {
        self.page = rows.max(1);
        self.keep_selected_visible();
    }

    fn keep_selected_visible(&mut self) {
        self.first = self.first.min(self.rows.len().saturating_sub(self.page));
        if self.selected.is_some() {
            let selected = self.selected();
            self.first = self.first.min(selected).max((selected + 1).saturating_sub(self.page));
        }
    }

    pub fn handle_key(&mut self, key: KeyEvent) -> Option<Action> {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        if control && matches!(key.code, KeyCode::Char('c')) {
            return Some(Action::Quit);
        }
        if self.typing.is_some() {
            self.type_filter(key.code);
            return None;
        }
        if self.help {
            self.help = false;
            return None;
        }
        let (selected, page) = (self.selected(), self.page);
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Some(Action::Quit),
            KeyCode::Char('s') => {
                let has_pressure = self.live.iter().flat_map(|live| &live.users).any(|user| user.waits.is_some());
                let mut later = Sort::value_variants().iter().cycle().skip_while(|sort| **sort != self.sort).skip(1);
                self.sort = later.find(|sort| has_pressure || **sort != Sort::Pressure).copied().unwrap_or_default();
                self.arrange();
            }
            KeyCode::Char('/') => self.typing = Some(self.filter.clone()),
            KeyCode::Char('p') | KeyCode::Char(' ') => self.paused = !self.paused,
            KeyCode::Char('?') | KeyCode::Char('h') => self.help = true,
            KeyCode::Up | KeyCode::Char('k') => self.select(selected.saturating_sub(1)),
            KeyCode::Down | KeyCode::Char('j') => self.select(selected + 1),
            KeyCode::PageUp => self.select(selected.saturating_sub(page)),
            KeyCode::PageDown => self.select(selected + page),
            KeyCode::Home => self.select(0),
            KeyCode::End => self.select(usize::MAX),
            _ => {}
        }
        None
    }

    fn type_filter(&mut self, code: KeyCode) {
        match code {
            KeyCode::Enter => self.typing = None,
            // Restores the previous filter.
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
