//! Reads the time that containers with GPUs waited for other resources: their CPU quota, a processor, memory, IO. From their cgroups,
//! once a second while they use a GPU, and otherwise every ten seconds, which grow to a minute while they do not.
//!
//! ```text
//!  pressure        every second: requests a reading of the containers of the snapshot that are due -> facts
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

use self::files::PressureFiles;
use self::place::Hierarchies;
use self::throttle::Throttle;
use self::worker::{PressureReading, PressureWorker, Progress, Target};
use crate::health::Health;
use crate::health::condition::Condition;
use crate::inbox::{Closed, CoreSender};
use crate::observe::kernel::layout::Layout;

const EVERY: Duration = Duration::from_secs(1);
/// Containers that have not used a GPU for this time are read at this interval, or in [`IDLE_READS`] parts of the time without use.
const IDLE: Duration = Duration::from_secs(10);
const IDLE_READS: u32 = 6;
const MAX_INTERVAL: Duration = Duration::from_secs(60);
/// A file of cgroupfs is read in microseconds; one that takes this long is stuck in the kernel.
const PATIENCE: Duration = Duration::from_secs(2);
/// Maximum number of hanging threads. With this many, the cause is not a single container, and nothing is read until one returns.
const MAX_ABANDONED: usize = 4;
/// Missing cgroups of a container are searched for after this time, then after twice that and so on: runtimes create all cgroups of a
/// container within milliseconds, and some hierarchies have none.
const FIND_AGAIN: Duration = Duration::from_secs(10);
const MAX_FIND_AGAIN: Duration = Duration::from_secs(600);
/// Maximum number of containers with files kept open: at most seven each, for each of which the kernel keeps a page.
const MAX_KEPT_OPEN: usize = 1024;
/// Descriptors that the process must be allowed for each of them: twice its files, so that the rest of the process has half.
const DESCRIPTORS_PER_CONTAINER: usize = 14;

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
    files: Option<PressureFiles>,
    /// When its cgroups were last searched for, and the time until they are searched for again.
    searched: Option<(Instant, Duration)>,
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
        let interval = (since(self.used_at, now) / IDLE_READS).clamp(IDLE, MAX_INTERVAL);
        let is_due = self.is_active(now) || since(self.read_at, now) >= interval;
        if is_due {
            self.read_at = Some(now);
        }
        is_due
    }

    /// Whether it used a GPU lately, and is read in every round.
    fn is_active(&self, now: Instant) -> bool {
        since(self.used_at, now) < IDLE
    }
}

fn since(at: Option<Instant>, now: Instant) -> Duration {
    at.map_or(Duration::MAX, |at| now.saturating_duration_since(at))
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
    max_kept_open: usize,
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
    /// `descriptors`: how many the process may have.
    fn new(hierarchies: Hierarchies, descriptors: usize) -> Self {
        let hierarchies = Arc::new(hierarchies);
        let reading = Arc::clone(&hierarchies);
        Self {
            hierarchies,
            read: Arc::new(move |target| worker::read(&reading, target)),
            patience: PATIENCE,
            max_kept_open: MAX_KEPT_OPEN.min(descriptors / DESCRIPTORS_PER_CONTAINER),
            worker: None,
            abandoned: Vec::new(),
            known: HashMap::new(),
            view: PressureView::default(),
        }
    }

    /// One round: returns a fact for each readable container that is due, and the problems.
    fn round(&mut self, snapshot: &Snapshot) -> (Vec<PressureFact>, Vec<String>) {
        self.abandoned.retain(|abandoned| !abandoned.worker.has_returned());
        let exists: HashMap<ContainerKey, bool> = snapshot.containers.iter().map(|c| (c.record.key, c.gone.is_none())).collect();
        self.view.facts.retain(|key, _| exists.contains_key(key));
        self.known.retain(|key, _| exists.get(key).is_some_and(|exists| *exists));
        let mut due = self.due(snapshot);
        let (mut facts, mut problems, mut kept_open) = (Vec::new(), Vec::new(), 0);
        while !due.is_empty() && self.abandoned.len() < MAX_ABANDONED {
            let worker = match self.worker.take() {
                Some(worker) => worker,
                None => {
                    let read = Arc::clone(&self.read);
                    match PressureWorker::start(move |target| read(target)) {
                        Ok(worker) => worker,
                        Err(error) => {
                            problems.push(format!("cannot start the thread pressure-read: {error}"));
                            break;
                        }
                    }
                }
            };
            let batch = self.targets(&due, &mut kept_open);
            let (readings, progress) = worker.read(batch, self.patience);
            let mut left = due.split_off(readings.len().min(due.len()));
            for (record, mut reading) in due.iter().zip(readings) {
                problems.extend(reading.outcomes.problem.take());
                facts.push(self.take(record, reading));
            }
            match progress {
                Progress::Complete => self.worker = Some(worker),
                Progress::Hangs if left.is_empty() => drop(worker),
                Progress::Hangs => self.abandon(worker, left.remove(0)),
            }
            due = left;
        }
        problems.extend(self.abandoned.iter().map(|abandoned| format!("{}: reading it hangs", abandoned.record.cgroup_path)));
        (facts, problems)
    }

    /// The containers to read in this round.
    fn due(&mut self, snapshot: &Snapshot) -> Vec<Arc<ContainerRecord>> {
        let now = Instant::now();
        let mut due = Vec::new();
        for (record, used) in wanted(snapshot) {
            let hangs = self.abandoned.iter().any(|abandoned| abandoned.record.key == record.key);
            if !hangs && self.known.entry(record.key).or_default().is_due(used, now) {
                due.push(Arc::clone(record));
            }
        }
        due
    }

    /// `kept_open`: how many containers of this round keep their files open.
    fn targets(&mut self, due: &[Arc<ContainerRecord>], kept_open: &mut usize) -> Vec<Target> {
        let now = Instant::now();
        let mut targets = Vec::with_capacity(due.len());
        for record in due {
            let known = self.known.entry(record.key).or_default();
            let recent = known.searched.is_some_and(|(at, again)| at.elapsed() < again);
            let files = known.files.take().filter(|files| recent || !self.hierarchies.is_incomplete(&files.paths));
            if files.is_none() {
                let again = known.searched.map_or(FIND_AGAIN, |(_, again)| (2 * again).min(MAX_FIND_AGAIN));
                known.searched = Some((now, again));
            }
            let keep_open = known.is_active(now) && *kept_open < self.max_kept_open;
            *kept_open += usize::from(keep_open);
            targets.push(Target { record: Arc::clone(record), files, keep_open });
        }
        targets
    }

    fn abandon(&mut self, mut worker: PressureWorker, record: Arc<ContainerRecord>) {
        self.view.reads[Outcome::Timeout as usize] += 1;
        worker.abandon();
        self.abandoned.push(AbandonedWorker { worker, record });
    }

    fn take(&mut self, record: &ContainerRecord, reading: PressureReading) -> PressureFact {
        for (all, new) in self.view.reads.iter_mut().zip(reading.outcomes.counts) {
            *all += new;
        }
        self.view.took += reading.took;
        let known = self.known.entry(record.key).or_default();
        known.files = Some(reading.files);
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
pub fn start(
    layout: &Layout,
    procfs: &Path,
    descriptors: usize,
    context: WorkerContext,
) -> std::io::Result<Arc<ArcSwap<PressureView>>> {
    let view = Arc::new(ArcSwap::from_pointee(PressureView::default()));
    let hierarchies = Hierarchies::new(layout, procfs);
    if hierarchies.none() {
        return Ok(view);
    }
    let published = Arc::clone(&view);
    std::thread::Builder::new().name("pressure".into()).spawn(move || {
        // Closed: the core has ended, and with it the agent.
        let _closed = run(Pressure::new(hierarchies, descriptors), &context, &published);
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
        let (facts, problems) = pressure.round(&snapshot);
        context.to.observe_all(facts.into_iter().map(Observation::Pressure))?;
        let message = |n, first: &str| format!("cannot read the pressure of containers in {n} places, such as {first}");
        context.health.report(Condition::Pressure, &problems, message);
        view.store(Arc::new(pressure.view.clone()));
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
