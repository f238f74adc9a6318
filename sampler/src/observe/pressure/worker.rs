//! The thread that reads. It may hang in the kernel, and is then left behind: it reads nothing more when its read returns.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use sampler_core::identity::ContainerRecord;
use sampler_core::observation::CpuQuota;
use sampler_core::units::BootNs;

use super::files::{OutcomeCounts, PressureFiles};
use super::place::{Hierarchies, PressurePaths};
use crate::observe::clock::boot_now;

/// A container to read; without a place, or where it is to be found again, it is looked for first.
#[derive(Clone)]
pub struct Target {
    pub record: Arc<ContainerRecord>,
    pub place: Option<Arc<PressurePaths>>,
}

/// One look at one container.
pub struct Look {
    pub place: Arc<PressurePaths>,
    pub at: BootNs,
    /// As [`PressurePaths::levels`].
    pub quotas: Vec<Option<CpuQuota>>,
    pub cpu_some_ns: Option<u64>,
    pub memory_some_ns: Option<u64>,
    pub io_some_ns: Option<u64>,
    pub counts: OutcomeCounts,
    pub problem: Option<String>,
    pub took: Duration,
}

pub fn look(hierarchies: &Hierarchies, target: Target) -> Look {
    let begun = Instant::now();
    let place = target.place.unwrap_or_else(|| Arc::new(hierarchies.find(&target.record)));
    let mut files = PressureFiles::default();
    let quotas = place.levels.iter().map(|level| files.quota(place.version, level)).collect();
    let mut some = |resource| place.v2.as_ref().and_then(|cgroup| files.some_ns(cgroup, resource));
    let (cpu_some_ns, memory_some_ns, io_some_ns) = (some("cpu"), some("memory"), some("io"));
    let (counts, problem, at) = (files.counts, files.problem, boot_now());
    Look { place, at, quotas, cpu_some_ns, memory_some_ns, io_some_ns, counts, problem, took: begun.elapsed() }
}

pub struct PressureWorker {
    targets: Option<Sender<Target>>,
    looks: Receiver<Look>,
    left: Arc<AtomicBool>,
}

impl PressureWorker {
    /// `read` is [`look`], but in tests.
    pub fn start(read: impl Fn(Target) -> Look + Send + 'static) -> std::io::Result<Self> {
        let (targets, to_do) = channel::<Target>();
        let (done, looks) = channel();
        let left = Arc::new(AtomicBool::new(false));
        let given_up = Arc::clone(&left);
        std::thread::Builder::new().name("pressure-read".into()).spawn(move || {
            for target in to_do {
                if given_up.load(Ordering::Relaxed) || done.send(read(target)).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { targets: Some(targets), looks, left })
    }

    pub fn ask(&self, target: Target) {
        // One that has panicked answers nothing, and is noticed by that.
        let _asked = self.targets.as_ref().map(|to| to.send(target));
    }

    /// The next look, in the order in which they were asked for; `None` when it is not there within `patience`.
    pub fn next(&self, patience: Duration) -> Result<Look, RecvTimeoutError> {
        self.looks.recv_timeout(patience)
    }

    pub fn leave(&mut self) {
        self.left.store(true, Ordering::Relaxed);
        self.targets = None;
    }

    /// Of one that was left: its thread has ended.
    pub fn has_returned(&self) -> bool {
        loop {
            match self.looks.try_recv() {
                Ok(_) => {}
                Err(TryRecvError::Empty) => return false,
                Err(TryRecvError::Disconnected) => return true,
            }
        }
    }
}
