//! How long containers with GPUs waited for something else: their CPU quota, a processor, memory, IO. Once a second, from their cgroups.
//!
//! ```text
//!  pressure        every second: who is there (the snapshot) -> asks the reader for one after the other -> facts
//!  pressure-read   reads the files; left behind where a read takes longer than 2 s, and that container not asked about until it returns
//! ```
//! Promises: what a file does not say is unknown, never 0; a read that fails or hangs is counted and told, and costs no other
//! container more than that one wait of 2 s. Reads nothing while no container has a GPU.
//!
//! Deliberately only read, not watched: PSI triggers would have to be kept for every cgroup, and a report wants sums.

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
use sampler_core::snapshot::Snapshot;
use sampler_core::units::ContainerKey;

pub use self::files::{Outcome, OutcomeCounts};

use self::place::{Hierarchies, PressurePaths};
use self::throttle::Throttle;
use self::worker::{Look, PressureWorker, Target};
use crate::health::Health;
use crate::inbox::{Closed, CoreSender};
use crate::observe::kernel::layout::Layout;

const EVERY: Duration = Duration::from_secs(1);
/// A file of cgroupfs is read in microseconds; one that takes this long is stuck in the kernel.
const PATIENCE: Duration = Duration::from_secs(2);
/// Threads that hang. With so many, it is not one container's fault, and nothing is read until one returns.
const MAX_LEFT: usize = 4;
/// A container whose cgroups were not all found is looked for this often.
const FIND_EVERY: Duration = Duration::from_secs(10);

const HEALTH_KEY: &str = "pressure";

/// What was read so far, for who shows it.
#[derive(Clone, Debug, Default)]
pub struct PressureView {
    /// The last of each container that is in the snapshot, gone or not.
    pub facts: HashMap<ContainerKey, PressureFact>,
    pub reads: OutcomeCounts,
    /// Time spent on reading.
    pub took: Duration,
}

/// What is remembered of a container from look to look.
#[derive(Default)]
struct ContainerPressure {
    place: Option<Arc<PressurePaths>>,
    found: Option<Instant>,
    throttle: Throttle,
}

struct RetiredWorker {
    worker: PressureWorker,
    record: Arc<ContainerRecord>,
}

type ReadPressure = Arc<dyn Fn(Target) -> Look + Send + Sync>;

struct Pressure {
    hierarchies: Arc<Hierarchies>,
    read: ReadPressure,
    patience: Duration,
    worker: Option<PressureWorker>,
    left: Vec<RetiredWorker>,
    known: HashMap<ContainerKey, ContainerPressure>,
    view: PressureView,
}

/// Those to read: they live and have a GPU.
fn wanted(snapshot: &Snapshot) -> impl Iterator<Item = &Arc<ContainerRecord>> {
    snapshot.containers.iter().filter(|c| c.gone.is_none() && !c.gpus.is_empty()).map(|c| &c.record)
}

impl Pressure {
    fn new(hierarchies: Hierarchies) -> Self {
        let hierarchies = Arc::new(hierarchies);
        let reading = Arc::clone(&hierarchies);
        Self {
            hierarchies,
            read: Arc::new(move |target| worker::look(&reading, target)),
            patience: PATIENCE,
            worker: None,
            left: Vec::new(),
            known: HashMap::new(),
            view: PressureView::default(),
        }
    }

    /// One round: a fact for each container that could be read, and what was wrong.
    fn round(
        &mut self,
        snapshot: &Snapshot,
        tell: &mut dyn FnMut(PressureFact) -> Result<(), Closed>,
    ) -> Result<Vec<String>, Closed> {
        self.left.retain(|left| !left.worker.has_returned());
        let mut problems: Vec<String> = Vec::new();
        let there: HashMap<ContainerKey, bool> = snapshot.containers.iter().map(|c| (c.record.key, c.gone.is_none())).collect();
        self.view.facts.retain(|key, _| there.contains_key(key));
        self.known.retain(|key, _| there.get(key).is_some_and(|lives| *lives));
        for record in wanted(snapshot).filter(|r| self.left.iter().all(|left| left.record.key != r.key)).collect::<Vec<_>>() {
            if self.left.len() >= MAX_LEFT {
                break;
            }
            match self.look_at(record) {
                Ok(Some(look)) => {
                    problems.extend(look.problem.clone());
                    let fact = self.take(record, look);
                    tell(fact)?;
                }
                Ok(None) => {}
                Err(error) => problems.push(format!("cannot start the thread pressure-read: {error}")),
            }
        }
        problems.extend(self.left.iter().map(|left| format!("{}: reading it hangs", left.record.cgroup_path)));
        Ok(problems)
    }

    /// `None` where it hangs.
    fn look_at(&mut self, record: &Arc<ContainerRecord>) -> std::io::Result<Option<Look>> {
        let read = Arc::clone(&self.read);
        let worker = match self.worker.take() {
            Some(worker) => worker,
            None => PressureWorker::start(move |target| read(target))?,
        };
        let known = self.known.entry(record.key).or_default();
        let place = known
            .place
            .clone()
            .filter(|place| !self.hierarchies.lacks(place) || known.found.is_some_and(|found| found.elapsed() < FIND_EVERY));
        if place.is_none() {
            known.found = Some(Instant::now());
        }
        worker.ask(Target { record: Arc::clone(record), place });
        if let Ok(look) = worker.next(self.patience) {
            self.worker = Some(worker);
            return Ok(Some(look));
        }
        self.view.reads[Outcome::Timeout as usize] += 1;
        let mut worker = worker;
        worker.leave();
        self.left.push(RetiredWorker { worker, record: Arc::clone(record) });
        Ok(None)
    }

    fn take(&mut self, record: &ContainerRecord, look: Look) -> PressureFact {
        for (all, new) in self.view.reads.iter_mut().zip(look.counts) {
            *all += new;
        }
        self.view.took += look.took;
        let known = self.known.entry(record.key).or_default();
        let cpu = known.throttle.add(&look.quotas);
        known.place = Some(look.place);
        let (memory_some_ns, io_some_ns) = (look.memory_some_ns, look.io_some_ns);
        let fact = PressureFact { key: record.key, at: look.at, cpu, cpu_some_ns: look.cpu_some_ns, memory_some_ns, io_some_ns };
        self.view.facts.insert(record.key, fact);
        fact
    }
}

/// Where it is told.
pub struct WorkerContext {
    pub to: CoreSender,
    pub health: Arc<Health>,
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    pub stop: Arc<AtomicBool>,
}

/// Starts the thread. It ends with the agent, and nobody waits for it.
pub fn start(layout: &Layout, procfs: &Path, told: WorkerContext) -> std::io::Result<Arc<ArcSwap<PressureView>>> {
    let view = Arc::new(ArcSwap::from_pointee(PressureView::default()));
    let hierarchies = Hierarchies::new(layout, procfs);
    if hierarchies.none() {
        return Ok(view);
    }
    let shown = Arc::clone(&view);
    std::thread::Builder::new().name("pressure".into()).spawn(move || {
        // Closed: the core has ended, and with it the agent.
        let _closed = run(Pressure::new(hierarchies), &told, &shown);
    })?;
    Ok(view)
}

fn run(mut pressure: Pressure, told: &WorkerContext, view: &ArcSwap<PressureView>) -> Result<(), Closed> {
    let mut next = Instant::now();
    while !told.stop.load(Ordering::Relaxed) {
        // After a round that took long the grid begins anew: two in a row tell nothing.
        let now = Instant::now();
        next = if now < next + EVERY { next + EVERY } else { now + EVERY };
        let snapshot = told.snapshot.load_full();
        let problems = pressure.round(&snapshot, &mut |fact| told.to.observe(Observation::Pressure(fact)))?;
        match problems.first() {
            None => told.health.recovered(HEALTH_KEY, "what containers wait for can be read again"),
            Some(first) if !told.health.is_degraded(HEALTH_KEY) => {
                let n = problems.len();
                told.health
                    .degraded(HEALTH_KEY, &format!("what containers wait for cannot be read in {n} places, such as {first}"));
            }
            Some(_) => {}
        }
        view.store(Arc::new(pressure.view.clone()));
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
