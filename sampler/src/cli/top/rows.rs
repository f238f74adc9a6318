//! The rows of the table: named, filtered and sorted.

use super::names::{contender_name, name};
use crate::cli::text::percent_or_dash;
use crate::export::live::{LiveDocument, LiveUser};
use clap::ValueEnum;

/// Sort order of rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// GPU share over the last 10 s
    #[default]
    Share,
    /// GPU-seconds in total
    Seconds,
    /// GPU memory in use
    Memory,
    /// Pressure, where wait probes are on
    Pressure,
    /// Contention with other users
    Waiting,
    /// Namespace, pod and container
    Name,
}

#[derive(Clone, Debug)]
pub struct TopRow {
    pub name: String,
    pub user: LiveUser,
    /// Contention seconds: per second over the last minute in the live view, total in the single table.
    pub contention: Option<f64>,
    /// Contenders with their part of it, the largest first.
    pub contenders: Vec<(String, f64)>,
}

impl TopRow {
    /// With total contention.
    pub fn new(user: &LiveUser) -> Self {
        let contenders = user.contended_by.iter().map(|other| (contender_name(other), other.seconds)).collect();
        Self { name: name(user), user: user.clone(), contention: Some(user.contention_seconds), contenders }
    }

    /// Identifies the row across documents.
    pub fn key(&self) -> Key {
        (self.user.container_id.clone(), self.user.id.clone(), self.user.uuid.clone())
    }

    /// Index of the GPU; a MIG device has the suffix `m`.
    pub fn gpu(&self) -> String {
        let index = self.user.index.map_or("?".into(), |index| index.to_string());
        if self.user.uuid.starts_with("MIG") { format!("{index}m") } else { index }
    }

    /// Blank without wait probes.
    pub fn pressure(&self) -> String {
        self.user.waits.map(|waits| percent_or_dash(waits.pressure_ratio)).unwrap_or_default()
    }

    fn contains(&self, words: &[String], model: &str) -> bool {
        let u = &self.user;
        let texts = [&u.name, &u.image, &u.runtime, &u.owner, &u.job_name, &u.partition].into_iter().flatten();
        let texts = texts.map(String::as_str).chain([&*self.name, &u.kind, &u.container_id, &u.id, &u.uuid, model]);
        let all = texts.collect::<Vec<_>>().join(" ").to_lowercase() + &format!(" gpu {}", self.gpu());
        words.iter().all(|word| all.contains(word))
    }
}

pub type Key = (String, String, String);

/// The rows that contain all words of the filter, sorted.
pub fn arrange(live: &LiveDocument, mut rows: Vec<TopRow>, sort: Sort, filter: &str) -> Vec<TopRow> {
    let words: Vec<String> = filter.split_whitespace().map(str::to_lowercase).collect();
    let model = |uuid: &str| live.gpus.iter().find(|gpu| gpu.uuid == uuid).map_or("", |gpu| &*gpu.model);
    rows.retain(|row| row.contains(&words, model(&row.user.uuid)));
    // Rounded as displayed, so that invisible differences do not reorder rows. Unknown values come last.
    let value = |row: &TopRow| match sort {
        Sort::Share => row.user.duty_cycle_percent.map(|percent| (percent * 10.0).round()),
        Sort::Seconds => Some(row.user.gpu_seconds),
        Sort::Memory => row.user.memory_used_bytes.map(|bytes| bytes as f64),
        Sort::Pressure => row.user.waits.and_then(|waits| waits.pressure_ratio).map(|ratio| (ratio * 100.0).round()),
        Sort::Waiting => row.contention.map(|rate| (rate * 100.0).round()),
        Sort::Name => None,
    };
    let value = |row: &TopRow| value(row).unwrap_or(-1.0);
    rows.sort_by(|a, b| {
        let by_name = || a.name.cmp(&b.name).then_with(|| a.user.index.cmp(&b.user.index)).then_with(|| a.key().cmp(&b.key()));
        value(b).total_cmp(&value(a)).then_with(by_name)
    });
    rows
}
