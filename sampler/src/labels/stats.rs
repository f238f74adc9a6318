//! Statistics of the label service: the state of sources, counts of queries, and the time until labels are complete.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use hdrhistogram::Histogram;
use sampler_labels::{Outcome, QueryOutcome, Source};

use super::source::reply::SourceReply;
use super::view::FILES;

/// Upper bounds of `gpu_sampler_resolve_seconds`.
pub const RESOLVE_BOUNDS: [f64; 12] = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 5.0, 30.0];
/// Longest recorded time; a longer one counts as this.
const LONGEST_RESOLVE_NS: u64 = 3_600_000_000_000;

#[derive(Clone, Debug, Default)]
pub struct LabelStats {
    /// Whether the last query of a source succeeded, by source and endpoint.
    pub up: BTreeMap<(&'static str, String), bool>,
    /// Queries to sockets, by source and outcome.
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
    /// Ignores poisoning: each change is one assignment, so counters are consistent after a panic elsewhere.
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

    /// Removes the endpoint from the output.
    pub fn retired(&self, source: Source, endpoint: &str) {
        self.inner().stats.up.remove(&(source.name(), endpoint.to_owned()));
    }

    /// The endpoint does not exist. It counts as failing if it existed before or is configured.
    pub fn absent(&self, source: Source, endpoint: &str, configured: bool) {
        let known = self.inner().stats.up.contains_key(&(source.name(), endpoint.to_owned()));
        if configured || known {
            self.probed(source, endpoint, Some("there is nothing at this endpoint; waiting for it to appear"));
        }
    }

    pub fn record_outcome(&self, source: Source, endpoint: &str, reply: &SourceReply) {
        if reply.outcome == Outcome::NotQueried {
            return;
        }
        let mut inner = self.inner();
        let counts = if source.is_socket() { &mut inner.stats.calls } else { &mut inner.stats.reads };
        *counts.entry((source.name(), reply.status.name())).or_default() += 1;
        // An absent file says nothing about the state of the source.
        if !source.is_socket() && reply.outcome == Outcome::NotFound {
            return;
        }
        let endpoint = match (&reply.at, source) {
            // The path belongs to one process or pod: it is not an endpoint.
            (_, Source::Mountinfo | Source::Manifest) | (None, _) => endpoint.to_owned(),
            (Some(at), _) => at.display().to_string(),
        };
        let up = reply.outcome != Outcome::Failed;
        // A success at any path ends a failure that was reported without a path.
        if up && !source.is_socket() {
            inner.stats.up.remove(&(source.name(), FILES.to_owned()));
        }
        drop(inner);
        self.probed(source, &endpoint, (!up).then_some(&reply.detail));
    }

    /// Records a query that was not about one container.
    pub fn queried(&self, source: Source, endpoint: &str, problem: Option<&str>) {
        let outcome = if problem.is_none() { QueryOutcome::Ok } else { QueryOutcome::Error };
        *self.inner().stats.calls.entry((source.name(), outcome.name())).or_default() += 1;
        self.probed(source, endpoint, problem);
    }

    /// Records whether the endpoint responds, without counting a query.
    pub fn probed(&self, source: Source, endpoint: &str, problem: Option<&str>) {
        let before = self.inner().stats.up.insert((source.name(), endpoint.to_owned()), problem.is_none());
        log_change(source, endpoint, problem.is_none(), before, problem.unwrap_or_default());
    }

    pub fn is_down(&self, source: Source, endpoint: &str) -> bool {
        self.inner().stats.up.get(&(source.name(), endpoint.to_owned())) == Some(&false)
    }
}

/// Logs a change of the state of an endpoint.
fn log_change(source: Source, endpoint: &str, up: bool, before: Option<bool>, detail: &str) {
    let source = source.name();
    match (up, before) {
        (false, None | Some(true)) => tracing::warn!("labels: {source} at {endpoint}: {detail:?}"),
        (false, Some(false)) => tracing::debug!("labels: {source} at {endpoint}: {detail:?}"),
        (true, Some(false)) => tracing::info!("labels: {source} at {endpoint} responds again"),
        _ => {}
    }
}
