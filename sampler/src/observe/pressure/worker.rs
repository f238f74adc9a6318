//! The reader thread. It may hang in the kernel and is then abandoned: after its read returns, it reads nothing more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use sampler_core::identity::ContainerRecord;
use sampler_core::observation::{CpuQuota, PressureFact};

use super::files::{OutcomeCounts, PressureFiles};
use super::place::{Hierarchies, PressurePaths};
use crate::observe::clock::boot_now;

/// A container to read. Without `paths`, its cgroups are located first.
#[derive(Clone)]
pub struct Target {
    pub record: Arc<ContainerRecord>,
    pub paths: Option<Arc<PressurePaths>>,
}

/// The result of reading one container.
pub struct PressureReading {
    pub paths: Arc<PressurePaths>,
    /// Without `cpu`, which follows from `quotas`.
    pub fact: PressureFact,
    /// Indexed like [`PressurePaths::levels`].
    pub quotas: Vec<Option<CpuQuota>>,
    pub counts: OutcomeCounts,
    pub problem: Option<String>,
    pub took: Duration,
}

pub fn read(hierarchies: &Hierarchies, target: Target) -> PressureReading {
    let begun = Instant::now();
    let paths = target.paths.unwrap_or_else(|| Arc::new(hierarchies.find(&target.record)));
    let mut files = PressureFiles::default();
    let quotas = paths.levels.iter().map(|level| files.quota(paths.version, level)).collect();
    let mut some = |resource| paths.v2.as_ref().and_then(|cgroup| files.some_ns(cgroup, resource));
    let (cpu_some_ns, memory_some_ns, io_some_ns) = (some("cpu"), some("memory"), some("io"));
    let fact = PressureFact { key: target.record.key, at: boot_now(), cpu: None, cpu_some_ns, memory_some_ns, io_some_ns };
    PressureReading { paths, fact, quotas, counts: files.counts, problem: files.problem, took: begun.elapsed() }
}

pub struct PressureWorker {
    targets: Option<Sender<Target>>,
    readings: Receiver<PressureReading>,
    abandoned: Arc<AtomicBool>,
}

impl PressureWorker {
    /// `read` is [`read`] except in tests.
    pub fn start(read: impl Fn(Target) -> PressureReading + Send + 'static) -> std::io::Result<Self> {
        let (targets, to_do) = channel::<Target>();
        let (done, readings) = channel();
        let abandoned = Arc::new(AtomicBool::new(false));
        let given_up = Arc::clone(&abandoned);
        std::thread::Builder::new().name("pressure-read".into()).spawn(move || {
            for target in to_do {
                if given_up.load(Ordering::Relaxed) || done.send(read(target)).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { targets: Some(targets), readings, abandoned })
    }

    pub fn request(&self, target: Target) {
        // If the thread has panicked, `next` returns an error.
        let _sent = self.targets.as_ref().map(|to| to.send(target));
    }

    /// The next reading, in the order of requests; an error if it is not available within `patience`.
    pub fn next(&self, patience: Duration) -> Result<PressureReading, RecvTimeoutError> {
        self.readings.recv_timeout(patience)
    }

    pub fn abandon(&mut self) {
        self.abandoned.store(true, Ordering::Relaxed);
        self.targets = None;
    }

    /// Whether the thread of an abandoned worker has ended.
    pub fn has_returned(&self) -> bool {
        loop {
            match self.readings.try_recv() {
                Ok(_) => {}
                Err(TryRecvError::Empty) => return false,
                Err(TryRecvError::Disconnected) => return true,
            }
        }
    }
}
