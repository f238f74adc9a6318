//! What the label service says of itself: which sources answer, how often they are asked, how long labels take.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use hdrhistogram::Histogram;
use sampler_labels::{Outcome, QueryOutcome, Source};

use super::source::answer::Answer;
use super::view::FILES;

/// Upper bounds of `gpu_sampler_resolve_seconds`.
pub const RESOLVE_BOUNDS: [f64; 12] = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 5.0, 30.0];
/// Longest resolution told apart.
const LONGEST_RESOLVE_NS: u64 = 3_600_000_000_000;

#[derive(Clone, Debug, Default)]
pub struct LabelStats {
    /// Sources seen: whether the last answer was one, with their endpoint.
    pub up: BTreeMap<(&'static str, String), bool>,
    /// Questions put to sockets, by source and outcome.
    pub calls: BTreeMap<(&'static str, &'static str), u64>,
    /// Reads of files, by source and outcome.
    pub reads: BTreeMap<(&'static str, &'static str), u64>,
    pub resolve_count: u64,
    pub resolve_sum: f64,
    /// Cumulative, one per [`RESOLVE_BOUNDS`].
    pub resolve_buckets: Vec<u64>,
}

struct StatsState {
    stats: LabelStats,
    times: Histogram<u64>,
}

pub struct Stats(Mutex<StatsState>);

impl Default for Stats {
    fn default() -> Self {
        let times = Histogram::new_with_bounds(1, LONGEST_RESOLVE_NS, 2).expect("1 ns to 1 h at two digits are valid bounds");
        Self(Mutex::new(StatsState { stats: LabelStats::default(), times }))
    }
}

impl Stats {
    /// Counters stay usable after a panic elsewhere: each change is one assignment.
    fn inner(&self) -> MutexGuard<'_, StatsState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn view(&self) -> LabelStats {
        let inner = self.inner();
        let mut stats = inner.stats.clone();
        stats.resolve_count = inner.times.len();
        stats.resolve_buckets = RESOLVE_BOUNDS.map(|bound| inner.times.count_between(0, (bound * 1e9) as u64)).to_vec();
        stats
    }

    pub fn resolved(&self, after_ns: u64) {
        let mut inner = self.inner();
        inner.times.saturating_record(after_ns.max(1));
        inner.stats.resolve_sum += after_ns as f64 / 1e9;
    }

    /// The endpoint is not spoken of any more.
    pub fn retired(&self, source: Source, endpoint: &str) {
        self.inner().stats.up.remove(&(source.name(), endpoint.to_owned()));
    }

    /// Nothing is at the endpoint. It counts as failing where it was there before, or was asked for.
    pub fn absent(&self, source: Source, endpoint: &str, given: bool) {
        let key = (source.name(), endpoint.to_owned());
        let known = self.inner().stats.up.contains_key(&key);
        if given || known {
            self.probed(source, endpoint, Some("there is nothing at this endpoint; it is waited for"));
        }
    }

    pub fn answered(&self, source: Source, endpoint: &str, answer: &Answer) {
        // Nobody was asked.
        if answer.outcome == Outcome::NotAsked {
            return;
        }
        let mut inner = self.inner();
        let counts = if source.is_socket() { &mut inner.stats.calls } else { &mut inner.stats.reads };
        *counts.entry((source.name(), answer.told.name())).or_default() += 1;
        // That a file is not there says nothing about whoever writes such files.
        if !source.is_socket() && answer.outcome == Outcome::NotFound {
            return;
        }
        let endpoint = match (&answer.at, source) {
            // One process or pod each: not an endpoint.
            (_, Source::Mountinfo | Source::Manifest) | (None, _) => endpoint.to_owned(),
            (Some(at), _) => at.display().to_string(),
        };
        let up = answer.outcome != Outcome::Failed;
        // A failure that had no place is over when a place answers.
        if up && !source.is_socket() {
            inner.stats.up.remove(&(source.name(), FILES.to_owned()));
        }
        let before = inner.stats.up.insert((source.name(), endpoint.clone()), up);
        drop(inner);
        tell(source, &endpoint, up, before, &answer.detail);
    }

    /// A question that was not about one container.
    pub fn asked(&self, source: Source, endpoint: &str, problem: Option<&str>) {
        let told = if problem.is_none() { QueryOutcome::Ok } else { QueryOutcome::Error };
        *self.inner().stats.calls.entry((source.name(), told.name())).or_default() += 1;
        self.probed(source, endpoint, problem);
    }

    /// Whether it answers, without a question.
    pub fn probed(&self, source: Source, endpoint: &str, problem: Option<&str>) {
        let before = self.inner().stats.up.insert((source.name(), endpoint.to_owned()), problem.is_none());
        tell(source, endpoint, problem.is_none(), before, problem.unwrap_or_default());
    }

    pub fn is_down(&self, source: Source, endpoint: &str) -> bool {
        self.inner().stats.up.get(&(source.name(), endpoint.to_owned())) == Some(&false)
    }
}

/// In the log, when it changed.
fn tell(source: Source, endpoint: &str, up: bool, before: Option<bool>, detail: &str) {
    let source = source.name();
    match (up, before) {
        (false, None | Some(true)) => tracing::warn!("labels: {source} at {endpoint}: {detail:?}"),
        (false, Some(false)) => tracing::debug!("labels: {source} at {endpoint}: {detail:?}"),
        (true, Some(false)) => tracing::info!("labels: {source} at {endpoint} answers again"),
        _ => {}
    }
}
