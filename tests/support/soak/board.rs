//! What the threads of a run share: the current life of the agent, its latest page, the spans of faults, latencies, problems.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::accounts::{Allowed, LifeAccount, Problem, TimedPage};
use super::faults::Reach;

/// Time of a GPU that does not respond is undecided for 15 s; after that it must be settled.
const SETTLED_SECONDS: f64 = 17.0;
/// Texts that are kept of one violation.
const TEXTS_MOST: usize = 3;

/// A violation: how often it was seen, and the first texts.
#[derive(Clone, Debug, Default)]
pub struct Violation {
    pub times: u64,
    pub texts: Vec<String>,
}

/// One scrape of the agent.
#[derive(Clone, Copy, Debug)]
pub struct Scrape {
    pub begun: f64,
    pub took: f64,
    /// Whether the agent was stopped, killed or starting in this time.
    pub excused: bool,
}

/// The process that is being scraped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LifeAddress {
    pub life: usize,
    pub port: u16,
    pub pid: u32,
}

#[derive(Default)]
pub struct BoardState {
    /// `None` while the agent is killed or starting.
    pub agent: Option<LifeAddress>,
    /// Whether the agent is stopped.
    pub stopped: bool,
    pub latest: Option<Arc<TimedPage>>,
    pub accounts: Vec<LifeAccount>,
    pub allowed: Allowed,
    pub scrapes: BTreeMap<&'static str, Vec<Scrape>>,
    pub violations: BTreeMap<String, Violation>,
    /// Keys of conditions on the pages since this was cleared.
    pub conditions: BTreeSet<String>,
    /// Until when time of a GPU may be in no state; by index, seconds of the run.
    disturbed_until: BTreeMap<usize, f64>,
    /// When the agent last was not able to respond.
    excused_until: f64,
}

pub struct Board {
    begun: Instant,
    over: AtomicBool,
    pub uuids: Vec<String>,
    pub state: Mutex<BoardState>,
}

/// A thread that panicked has failed the run; the state is still valid.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Board {
    pub fn new(uuids: Vec<String>, allowed: Allowed) -> Self {
        let state = BoardState { allowed, ..BoardState::default() };
        Self { begun: Instant::now(), over: AtomicBool::new(false), uuids, state: Mutex::new(state) }
    }

    /// Seconds of the run.
    pub fn now(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed) || super::interrupt::caught().is_some()
    }

    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub fn report(&self, problem: Problem) {
        lock(&self.state).report(problem);
    }

    /// From now on, and for a while after the end of the fault, time of these GPUs may be in no state.
    pub fn disturb(&self, reach: Reach, until: f64) {
        let mut state = lock(&self.state);
        for gpu in self.reached(reach) {
            let settled = state.disturbed_until.entry(gpu).or_default();
            *settled = settled.max(until + SETTLED_SECONDS);
        }
    }

    /// The agent has converged: time of these GPUs must be settled from now on.
    pub fn settle(&self, reach: Reach) {
        let now = self.now();
        let mut state = lock(&self.state);
        for gpu in self.reached(reach) {
            state.disturbed_until.insert(gpu, now);
        }
    }

    fn reached(&self, reach: Reach) -> std::ops::Range<usize> {
        match reach {
            Reach::Gpu(gpu) => gpu..gpu + 1,
            Reach::AllGpus => 0..self.uuids.len(),
            Reach::NoGpu => 0..0,
        }
    }

    /// Stores a page of the current life and checks it.
    pub fn take(&self, address: LifeAddress, page: TimedPage) {
        let mut state = lock(&self.state);
        if state.agent != Some(address) {
            return;
        }
        let BoardState { accounts, allowed, disturbed_until, .. } = &mut *state;
        let begun = page.begun;
        let calm = |uuid: &str| {
            let gpu = self.uuids.iter().position(|known| known == uuid);
            gpu.is_some_and(|gpu| disturbed_until.get(&gpu).is_none_or(|until| begun > *until))
        };
        let page = Arc::new(page);
        let Some(account) = accounts.get_mut(address.life) else { return };
        for problem in account.take(&page, allowed, &calm) {
            state.report(problem);
        }
        state.conditions.extend(conditions(&page));
        state.latest = Some(page);
    }
}

/// Keys of the conditions on this page.
pub fn conditions(page: &TimedPage) -> BTreeSet<String> {
    let degraded = page.samples.iter().filter(|s| s.name == "gpu_sampler_degraded");
    degraded.filter_map(|s| s.labels.get("condition").cloned()).collect()
}

impl BoardState {
    pub fn report(&mut self, problem: Problem) {
        let violation = self.violations.entry(problem.key).or_default();
        violation.times += 1;
        if violation.texts.len() < TEXTS_MOST {
            violation.texts.push(problem.text);
        }
    }

    /// States that the agent cannot respond, until it is called with `false`.
    pub fn excuse(&mut self, unable: bool, now: f64) {
        self.stopped = unable;
        self.excused_until = now;
    }

    /// Whether the agent could not respond at some time since `begun`.
    pub fn is_excused(&self, begun: f64) -> bool {
        self.stopped || self.agent.is_none() || begun < self.excused_until + 0.5
    }
}
