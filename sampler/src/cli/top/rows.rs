//! The rows of a picture: named, filtered, in order.

use super::words::{name, name_of_other};
use crate::export::live::{LiveDocument, LiveUser};
use clap::ValueEnum;

/// Sort order of rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// Share of the last 10 s
    #[default]
    Share,
    /// GPU-seconds so far
    Seconds,
    /// GPU memory held
    Memory,
    /// How much others kept it waiting
    Waiting,
    /// Namespace, pod and container
    Name,
}

#[derive(Clone, Debug)]
pub struct TopRow {
    pub name: String,
    pub user: LiveUser,
    /// Seconds that others kept it waiting: per second over the last minute, or so far where there is no history.
    pub waiting: Option<f64>,
    /// By whom, the longest first.
    pub by: Vec<(String, f64)>,
}

impl TopRow {
    /// With what it waited for so far.
    pub fn new(user: &LiveUser) -> Self {
        let by = user.contended_by.iter().map(|other| (name_of_other(other), other.seconds)).collect();
        Self { name: name(user), user: user.clone(), waiting: Some(user.contention_seconds), by }
    }

    /// What tells one row from another, over pictures.
    pub fn key(&self) -> Key {
        (self.user.container_id.clone(), self.user.id.clone(), self.user.uuid.clone())
    }

    /// GPU by index; a MIG device is told by an `m`.
    pub fn gpu(&self) -> String {
        let index = self.user.index.map_or("?".into(), |index| index.to_string());
        if self.user.uuid.starts_with("MIG") { format!("{index}m") } else { index }
    }

    fn has(&self, words: &[String], model: &str) -> bool {
        let u = &self.user;
        let texts = [u.name.as_deref(), u.image.as_deref(), u.runtime.as_deref()].into_iter().flatten();
        let texts = texts.chain([&*self.name, &u.container_id, &u.id, &u.uuid, model]);
        let all = texts.collect::<Vec<_>>().join(" ").to_lowercase() + &format!(" gpu {}", self.gpu());
        words.iter().all(|word| all.contains(word))
    }
}

pub type Key = (String, String, String);

/// Those in which all words of the filter are, in order.
pub fn arrange(live: &LiveDocument, mut rows: Vec<TopRow>, sort: Sort, filter: &str) -> Vec<TopRow> {
    let words: Vec<String> = filter.split_whitespace().map(str::to_lowercase).collect();
    let model = |uuid: &str| live.gpus.iter().find(|gpu| gpu.uuid == uuid).map_or("", |gpu| &*gpu.model);
    rows.retain(|row| row.has(&words, model(&row.user.uuid)));
    // As precise as they are shown. Unknown comes last.
    let value = |row: &TopRow| match sort {
        Sort::Share => row.user.duty_cycle_percent.map(|percent| (percent * 10.0).round()),
        Sort::Seconds => Some(row.user.gpu_seconds),
        Sort::Memory => row.user.memory_used_bytes.map(|bytes| bytes as f64),
        Sort::Waiting => row.waiting.map(|rate| (rate * 100.0).round()),
        Sort::Name => None,
    };
    let value = |row: &TopRow| value(row).unwrap_or(-1.0);
    rows.sort_by(|a, b| {
        let by_name = || a.name.cmp(&b.name).then_with(|| a.user.index.cmp(&b.user.index)).then_with(|| a.key().cmp(&b.key()));
        value(b).total_cmp(&value(a)).then_with(by_name)
    });
    rows
}
