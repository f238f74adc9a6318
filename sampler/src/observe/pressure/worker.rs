//! The reader thread. It may hang in the kernel and is then abandoned: after its read returns, it reads nothing more.
//!
//! It reads a batch of containers for each request, because two switches between threads cost more than the reads of one container.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sampler_core::identity::ContainerRecord;
use sampler_core::observation::{CpuQuota, PressureFact};

use super::files::{PressureFiles, ReadOutcomes};
use super::place::Hierarchies;
use crate::observe::clock::boot_now;

/// A container to read. Without `files`, its cgroups are located first.
pub struct Target {
    pub record: Arc<ContainerRecord>,
    pub files: Option<PressureFiles>,
    pub keep_open: bool,
}

/// The result of reading one container.
pub struct PressureReading {
    pub files: PressureFiles,
    /// Without `cpu`, which follows from `quotas`.
    pub fact: PressureFact,
    /// By level, from the container up.
    pub quotas: Vec<Option<CpuQuota>>,
    pub outcomes: ReadOutcomes,
    pub took: Duration,
}

pub fn read(hierarchies: &Hierarchies, target: Target) -> PressureReading {
    let begun = Instant::now();
    let mut files = target.files.unwrap_or_else(|| PressureFiles::new(hierarchies.find(&target.record)));
    files.keep_open(target.keep_open);
    let quotas = files.quotas();
    let [cpu_some_ns, memory_some_ns, io_some_ns] = files.some_ns();
    let fact = PressureFact { key: target.record.key, at: boot_now(), cpu: None, cpu_some_ns, memory_some_ns, io_some_ns };
    PressureReading { fact, quotas, outcomes: files.take_outcomes(), files, took: begun.elapsed() }
}

/// The progress of a batch.
pub enum Progress {
    Complete,
    /// The read of the container after the returned ones hangs.
    Hangs,
}

pub struct PressureWorker {
    batches: Option<Sender<Vec<Target>>>,
    /// The readings of the present batch, in its order.
    readings: Arc<Mutex<Vec<PressureReading>>>,
    complete: Receiver<()>,
    abandoned: Arc<AtomicBool>,
}

impl PressureWorker {
    /// `read` is [`read`] except in tests.
    pub fn start(read: impl Fn(Target) -> PressureReading + Send + 'static) -> std::io::Result<Self> {
        let (batches, to_do) = channel::<Vec<Target>>();
        let (done, complete) = channel();
        let (abandoned, readings) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (given_up, results) = (Arc::clone(&abandoned), Arc::clone(&readings));
        std::thread::Builder::new().name("pressure-read".into()).spawn(move || {
            for batch in to_do {
                for target in batch {
                    if given_up.load(Ordering::Relaxed) {
                        return;
                    }
                    let reading = read(target);
                    results.lock().unwrap_or_else(PoisonError::into_inner).push(reading);
                }
                if done.send(()).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { batches: Some(batches), readings, complete, abandoned })
    }

    /// Reads a batch; returns what was read, in its order, until it is complete or one read takes longer than `patience`.
    pub fn read(&self, batch: Vec<Target>, patience: Duration) -> (Vec<PressureReading>, Progress) {
        let readings = || self.readings.lock().unwrap_or_else(PoisonError::into_inner);
        // If the thread has panicked, so does the wait end.
        let _sent = self.batches.as_ref().map(|to| to.send(batch));
        let mut read = 0;
        loop {
            match self.complete.recv_timeout(patience) {
                Ok(()) => return (std::mem::take(&mut *readings()), Progress::Complete),
                Err(RecvTimeoutError::Timeout) if readings().len() > read => read = readings().len(),
                Err(_) => return (std::mem::take(&mut *readings()), Progress::Hangs),
            }
        }
    }

    pub fn abandon(&mut self) {
        self.abandoned.store(true, Ordering::Relaxed);
        self.batches = None;
    }

    /// Whether the thread of an abandoned worker has ended.
    pub fn has_returned(&self) -> bool {
        loop {
            match self.complete.try_recv() {
                Ok(()) => {}
                Err(TryRecvError::Empty) => return false,
                Err(TryRecvError::Disconnected) => return true,
            }
        }
    }
}
