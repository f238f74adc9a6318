//! The health of the agent: readiness, conditions, counts of events, calls and errors.
//!
//! A condition is logged once per message, and is exported for as long as it lasts.

pub mod call_watchdog;
pub mod condition;
pub mod nvml_calls;
pub mod outcomes;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sampler_common::kind;
use sampler_core::identity::Size;
use sampler_core::pid_space::PidSpace;
use sampler_core::units::BootNs;

use self::call_watchdog::Change;
use self::condition::Condition;
use self::nvml_calls::DriverHealth;
use self::outcomes::{CountsByOutcome, OtlpOutcome, UploadOutcome};

/// Upper bounds of `gpu_sampler_nvml_call_seconds`.
pub const CALL_BOUNDS: [f64; 10] = [0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1, 1.0];
/// Upper bounds of `gpu_sampler_identify_seconds`.
pub const IDENTIFY_BOUNDS: [f64; 11] = [0.00002, 0.00003, 0.00005, 0.000075, 0.0001, 0.00015, 0.00025, 0.0005, 0.001, 0.01, 0.1];

/// Kernel events that were not delivered.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lost {
    /// Indexed by [`kind`].
    pub of_kind: [u64; kind::COUNT as usize],
    /// Of these, events for which the kernel skipped the program.
    pub skipped: u64,
}

impl Lost {
    pub fn sum(&self) -> u64 {
        self.of_kind.iter().sum()
    }
}

/// A histogram for export.
#[derive(Clone, Debug, Default)]
pub struct Times {
    pub count: u64,
    pub sum_seconds: f64,
    /// Cumulative counts, one per bound.
    pub buckets: Vec<u64>,
}

/// Durations in fixed buckets: there is one of these for each driver call of each GPU.
struct DurationHistogram<const N: usize> {
    /// In seconds, ascending.
    bounds: &'static [f64; N],
    /// Cumulative.
    buckets: [u64; N],
    count: u64,
    sum: Duration,
}

impl<const N: usize> DurationHistogram<N> {
    fn new(bounds: &'static [f64; N]) -> Self {
        Self { bounds, buckets: [0; N], count: 0, sum: Duration::ZERO }
    }

    fn record(&mut self, took: Duration) {
        for (bound, count) in self.bounds.iter().zip(&mut self.buckets) {
            *count += u64::from(took.as_secs_f64() <= *bound);
        }
        self.count += 1;
        self.sum += took;
    }

    fn times(&self) -> Times {
        Times { count: self.count, sum_seconds: self.sum.as_secs_f64(), buckets: self.buckets.to_vec() }
    }
}

#[derive(Clone, Debug, Default)]
pub struct HealthView {
    pub kernel_mode: &'static str,
    /// Whether the driver's PIDs are this machine's.
    pub pid_space: PidSpace,
    pub events_seen: [u64; kind::COUNT as usize],
    pub events_lost: Lost,
    /// Processor time that the core thread has spent on draining the kernel's rings.
    pub drained: Duration,
    pub resyncs: u64,
    pub repairs: u64,
    /// Dead processes that the check against /proc removed.
    pub liveness_repairs: u64,
    pub processes: Size,
    /// (cgroups, their size in bytes, cgroups evicted early for lack of room).
    pub cgroups: (usize, usize, u64),
    /// Number of processes with wait probes.
    pub wait_probed_processes: usize,
    /// Number of inotify watches.
    pub watches: usize,
    /// Time from the creation of a cgroup in the kernel to its entry in the tables.
    pub identified: Times,
    /// `None` before the first attempt to use the driver.
    pub nvml_up: Option<bool>,
    /// The present conditions with their messages, sorted by key.
    pub degraded: Vec<(Condition, String)>,
}

#[derive(Default)]
struct HealthState {
    view: HealthView,
    /// The messages of the present conditions.
    messages: HashMap<Condition, String>,
    identified: Option<DurationHistogram<{ IDENTIFY_BOUNDS.len() }>>,
}

#[derive(Default)]
pub struct Health {
    inner: Mutex<HealthState>,
    ready: AtomicBool,
    /// Turns of the core thread so far.
    core_turns: AtomicU64,
    pub driver: DriverHealth,
    pub otlp: CountsByOutcome<OtlpOutcome>,
    pub uploads: CountsByOutcome<UploadOutcome>,
}

impl Health {
    /// The state stays usable after a panic of another thread, because each change is one assignment.
    fn inner(&self) -> MutexGuard<'_, HealthState> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_ready(&self) {
        self.ready.store(true, Ordering::Relaxed);
    }

    pub fn ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// Counts a turn of the core thread: the sign that it makes progress.
    pub fn core_turned(&self) {
        self.core_turns.fetch_add(1, Ordering::Relaxed);
    }

    pub fn core_turns(&self) -> u64 {
        self.core_turns.load(Ordering::Relaxed)
    }

    /// Begins a condition or changes its message; logged if the message is new. The remedy of the condition is appended to the message.
    pub fn degraded(&self, condition: Condition, message: &str) {
        let message = match condition.remedy() {
            Some(remedy) => format!("{message}; {remedy}"),
            None => message.to_owned(),
        };
        let before = self.inner().messages.insert(condition, message.clone());
        if before.as_ref() != Some(&message) {
            tracing::warn!(what = &*condition.key(), severity = <&str>::from(condition.severity()), "{message}");
        }
    }

    /// Ends a condition; logged if it was present.
    pub fn recovered(&self, condition: Condition) {
        self.recovered_with(condition, condition.recovery());
    }

    /// As [`Health::recovered`], with another message.
    pub fn recovered_with(&self, condition: Condition, message: &str) {
        if self.inner().messages.remove(&condition).is_some() {
            tracing::info!(what = &*condition.key(), "{message}");
        }
    }

    /// Changes what [`Health::view`] returns, except for `identified` and `degraded`.
    pub fn update(&self, change: impl FnOnce(&mut HealthView)) {
        change(&mut self.inner().view);
    }

    pub fn identified(&self, after_ns: u64) {
        let mut inner = self.inner();
        inner.identified.get_or_insert_with(|| DurationHistogram::new(&IDENTIFY_BOUNDS)).record(Duration::from_nanos(after_ns));
    }

    /// Ends the condition if there are no problems; otherwise begins it, and keeps its first message while it lasts.
    pub fn report(&self, condition: Condition, problems: &[String], message: impl FnOnce(usize, &str) -> String) {
        match problems.first() {
            None => self.recovered(condition),
            Some(first) if !self.is_degraded(condition) => self.degraded(condition, &message(problems.len(), first)),
            Some(_) => {}
        }
    }

    fn is_degraded(&self, condition: Condition) -> bool {
        self.inner().messages.contains_key(&condition)
    }

    /// Updates the conditions of driver calls that do not return and of those that have returned.
    pub fn watch_calls(&self, now: BootNs) {
        for change in self.driver.watch(now) {
            match change {
                Change::Stalled { condition, message } => self.degraded(condition, &message),
                Change::Returned { condition } => self.recovered_with(condition, "the driver call has returned"),
            }
        }
    }

    pub fn view(&self) -> HealthView {
        let inner = self.inner();
        let mut view = inner.view.clone();
        view.identified = inner.identified.as_ref().map(DurationHistogram::times).unwrap_or_default();
        view.degraded = inner.messages.iter().map(|(condition, message)| (*condition, message.clone())).collect();
        view.degraded.sort_by_cached_key(|(condition, _)| condition.key());
        view
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_begins_and_ends() {
        let health = Health::default();
        health.degraded(Condition::Nvml, "no driver");
        assert!(health.is_degraded(Condition::Nvml));
        assert_eq!(health.view().degraded, [(Condition::Nvml, "no driver".to_owned())]);
        health.recovered(Condition::Nvml);
        assert!(health.view().degraded.is_empty());
    }

    #[test]
    fn conditions_are_sorted_by_key_and_have_their_remedy() {
        let health = Health::default();
        for condition in [Condition::Nvml, Condition::Gpu { slot: 1 }, Condition::Cgroups, Condition::GpuBudget { slot: 0 }] {
            health.degraded(condition, "problem");
        }
        let degraded = health.view().degraded;
        let keys: Vec<_> = degraded.iter().map(|(condition, _)| condition.key()).collect();
        assert_eq!(keys, ["cgroups", "gpu-0-budget", "gpu-1", "nvml"]);
        assert_eq!(degraded[0].1, format!("problem; {}", condition::CGROUPS_REMEDY));
    }
}
