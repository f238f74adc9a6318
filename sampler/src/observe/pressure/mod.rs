//! Reads the time that containers with GPUs waited for other resources: their CPU quota, a processor, memory, IO. From their cgroups,
//! once a second while they use a GPU and every ten seconds otherwise.
//!
//! ```text
//!  pressure        every second: for each container of the snapshot that is due, requests a reading -> facts
//!  pressure-read   reads the files; abandoned if a read takes longer than 2 s, and that container is skipped until the read returns
//! ```
//! Guarantees: a missing value is unknown, never 0. A read that fails or hangs is counted and reported, and delays other containers by
//! at most that one wait of 2 s. Nothing is read while no container has a GPU.
//!
//! The files are polled, not watched: PSI triggers would have to be maintained for every cgroup, and reports need sums.

mod files;
mod place;
mod throttle;
mod worker;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use sampler_core::identity::ContainerRecord;
use sampler_core::observation::Observation;
use sampler_core::observation::PressureFact;
use sampler_core::snapshot::{ContainerGpu, Snapshot};
use sampler_core::units::ContainerKey;

pub use self::files::{Outcome, OutcomeCounts};

use self::place::{Hierarchies, PressurePaths};
use self::throttle::Throttle;
use self::worker::{PressureReading, PressureWorker, Target};
use crate::health::Health;
use crate::health::condition::Condition;
use crate::inbox::{Closed, CoreSender};
use crate::observe::kernel::layout::Layout;

const EVERY: Duration = Duration::from_secs(1);
/// Containers that have not used a GPU for this time are read at this interval.
const IDLE: Duration = Duration::from_secs(10);
/// A file of cgroupfs is read in microseconds; one that takes this long is stuck in the kernel.
const PATIENCE: Duration = Duration::from_secs(2);
/// Maximum number of hanging threads. With this many, the cause is not a single container, and nothing is read until one returns.
const MAX_ABANDONED: usize = 4;
/// How often missing cgroups of a container are searched for.
const FIND_EVERY: Duration = Duration::from_secs(10);

/// The results so far, for export.
#[derive(Clone, Debug, Default)]
pub struct PressureView {
    /// The last fact of each container in the snapshot, including removed containers.
    pub facts: HashMap<ContainerKey, PressureFact>,
    pub reads: OutcomeCounts,
    /// Time spent on reading.
    pub took: Duration,
}

/// The state of a container between readings.
#[derive(Default)]
struct ContainerPressure {
    paths: Option<Arc<PressurePaths>>,
    found: Option<Instant>,
    throttle: Throttle,
    /// GPU-seconds so far, and when they last grew.
    used: f64,
    used_at: Option<Instant>,
    read_at: Option<Instant>,
}

impl ContainerPressure {
    /// Whether to read it in this round. `used`: its GPU-seconds so far.
    fn is_due(&mut self, used: f64, now: Instant) -> bool {
        if self.used_at.is_none() || used != self.used {
            (self.used, self.used_at) = (used, Some(now));
        }
        let is_past = |at: Option<Instant>| at.is_none_or(|at| now.saturating_duration_since(at) >= IDLE);
        let is_due = !is_past(self.used_at) || is_past(self.read_at);
        if is_due {
            self.read_at = Some(now);
        }
        is_due
    }
}

struct AbandonedWorker {
    worker: PressureWorker,
    record: Arc<ContainerRecord>,
}

type ReadPressure = Arc<dyn Fn(Target) -> PressureReading + Send + Sync>;

struct Pressure {
    hierarchies: Arc<Hierarchies>,
    read: ReadPressure,
    patience: Duration,
    worker: Option<PressureWorker>,
    abandoned: Vec<AbandonedWorker>,
    known: HashMap<ContainerKey, ContainerPressure>,
    view: PressureView,
}

/// The containers to read, with their seconds on any engine: those that exist and have a GPU.
fn wanted(snapshot: &Snapshot) -> impl Iterator<Item = (&Arc<ContainerRecord>, f64)> {
    let with_gpu = snapshot.containers.iter().filter(|c| c.gone.is_none() && !c.gpus.is_empty());
    let used = |usage: &ContainerGpu| usage.seconds + usage.engines.iter().map(|(_, seconds)| seconds).sum::<f64>();
    with_gpu.map(move |c| (&c.record, c.gpus.iter().map(used).sum()))
}

impl Pressure {
    fn new(hierarchies: Hierarchies) -> Self {
        let hierarchies = Arc::new(hierarchies);
        let reading = Arc::clone(&hierarchies);
        Self {
            hierarchies,
            read: Arc::new(move |target| worker::read(&reading, target)),
            patience: PATIENCE,
            worker: None,
            abandoned: Vec::new(),
            known: HashMap::new(),
            view: PressureView::default(),
        }
    }

    /// One round: sends a fact for each readable container and returns the problems.
    fn round(
        &mut self,
        snapshot: &Snapshot,
        send: &mut dyn FnMut(PressureFact) -> Result<(), Closed>,
    ) -> Result<Vec<String>, Closed> {
        self.abandoned.retain(|abandoned| !abandoned.worker.has_returned());
        let mut problems: Vec<String> = Vec::new();
        let exists: HashMap<ContainerKey, bool> = snapshot.containers.iter().map(|c| (c.record.key, c.gone.is_none())).collect();
        self.view.facts.retain(|key, _| exists.contains_key(key));
        self.known.retain(|key, _| exists.get(key).is_some_and(|exists| *exists));
        let now = Instant::now();
        for (record, used) in wanted(snapshot) {
            if self.abandoned.len() >= MAX_ABANDONED {
                break;
            }
            let hangs = self.abandoned.iter().any(|abandoned| abandoned.record.key == record.key);
            if hangs || !self.known.entry(record.key).or_default().is_due(used, now) {
                continue;
            }
            match self.read(record) {
                Ok(Some(reading)) => {
                    problems.extend(reading.problem.clone());
                    let fact = self.take(record, reading);
                    send(fact)?;
                }
                Ok(None) => {}
                Err(error) => problems.push(format!("cannot start the thread pressure-read: {error}")),
            }
        }
        problems.extend(self.abandoned.iter().map(|abandoned| format!("{}: reading it hangs", abandoned.record.cgroup_path)));
        Ok(problems)
    }

    /// `None` if the read hangs.
    fn read(&mut self, record: &Arc<ContainerRecord>) -> std::io::Result<Option<PressureReading>> {
        let read = Arc::clone(&self.read);
        let worker = match self.worker.take() {
            Some(worker) => worker,
            None => PressureWorker::start(move |target| read(target))?,
        };
        let known = self.known.entry(record.key).or_default();
        let recent = known.found.is_some_and(|found| found.elapsed() < FIND_EVERY);
        let paths = known.paths.clone().filter(|paths| recent || !self.hierarchies.is_incomplete(paths));
        if paths.is_none() {
            known.found = Some(Instant::now());
        }
        worker.request(Target { record: Arc::clone(record), paths });
        if let Ok(reading) = worker.next(self.patience) {
            self.worker = Some(worker);
            return Ok(Some(reading));
        }
        self.view.reads[Outcome::Timeout as usize] += 1;
        let mut worker = worker;
        worker.abandon();
        self.abandoned.push(AbandonedWorker { worker, record: Arc::clone(record) });
        Ok(None)
    }

    fn take(&mut self, record: &ContainerRecord, reading: PressureReading) -> PressureFact {
        for (all, new) in self.view.reads.iter_mut().zip(reading.counts) {
            *all += new;
        }
        self.view.took += reading.took;
        let known = self.known.entry(record.key).or_default();
        known.paths = Some(reading.paths);
        let fact = PressureFact { cpu: known.throttle.add(&reading.quotas), ..reading.fact };
        self.view.facts.insert(record.key, fact);
        fact
    }
}

/// The connections of the thread.
pub struct WorkerContext {
    pub to: CoreSender,
    pub health: Arc<Health>,
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    pub stop: Arc<AtomicBool>,
}

/// Starts the thread. It ends with the agent, which does not wait for it.
pub fn start(layout: &Layout, procfs: &Path, context: WorkerContext) -> std::io::Result<Arc<ArcSwap<PressureView>>> {
    let view = Arc::new(ArcSwap::from_pointee(PressureView::default()));
    let hierarchies = Hierarchies::new(layout, procfs);
    if hierarchies.none() {
        return Ok(view);
    }
    let published = Arc::clone(&view);
    std::thread::Builder::new().name("pressure".into()).spawn(move || {
        // Closed: the core has ended, and with it the agent.
        let _closed = run(Pressure::new(hierarchies), &context, &published);
    })?;
    Ok(view)
}

fn run(mut pressure: Pressure, context: &WorkerContext, view: &ArcSwap<PressureView>) -> Result<(), Closed> {
    let mut next = Instant::now();
    while !context.stop.load(Ordering::Relaxed) {
        // After a long round the schedule restarts from now: two rounds in quick succession would yield nothing.
        let now = Instant::now();
        next = if now < next + EVERY { next + EVERY } else { now + EVERY };
        let snapshot = context.snapshot.load_full();
        let problems = pressure.round(&snapshot, &mut |fact| context.to.observe(Observation::Pressure(fact)))?;
        let message = |n, first: &str| format!("cannot read the pressure of containers in {n} places, such as {first}");
        context.health.report(Condition::Pressure, &problems, message);
        view.store(Arc::new(pressure.view.clone()));
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
