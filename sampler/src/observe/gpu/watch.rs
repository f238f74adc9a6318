//! `gpu-watch`: opens the library, tracks the list of GPUs, and reopens the library after the driver was replaced.
//!
//! ```text
//!  closed --opened--> listing every 5 s --driver unloaded--> its threads end, or are abandoned after 3 s --> closed
//!     \--cannot be opened: retried after 1 s, 2 s .. 10 s--/
//! ```

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nvml_wrapper::error::NvmlError;
use sampler_core::observation::Observation;

use super::context::Context;
use super::error::{GpuError, spawn};
use super::events::Events;
use super::library::{Generation, Handle};
use super::library_search::{LibrarySearch, OpenedLibrary};
use super::mig;
use super::nvml_caller::{DeviceFault, fault};
use super::poller::{Poller, Start};
use crate::config::Config;
use crate::error::display_chain;
use crate::health::call_watchdog::{CallSlot, Caller};
use crate::health::condition::Condition;
use crate::health::nvml_calls::Call;
use crate::inbox::Closed;
use crate::observe::clock::boot_now;

/// Back-off for opening a missing driver library; short at first, for a driver that is being replaced.
const RETRY_AT_FIRST: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_secs(10);
/// How often GPUs are listed; rarer if a list takes long.
const LIST_EVERY: Duration = Duration::from_secs(5);
const LIST_AT_LEAST_EVERY: Duration = Duration::from_secs(60);
/// Initialization may hang in the driver; the agent starts without it.
const START_PATIENCE: Duration = Duration::from_secs(5);
/// Time limit for opening one GPU, so that the other GPUs do not wait longer.
const OPEN_PATIENCE: Duration = Duration::from_secs(2);
/// Threads that hang in an old library are abandoned after this time.
const GIVE_UP_AFTER: Duration = Duration::from_secs(3);
/// Interval of the checks during a sleep.
const NAP: Duration = Duration::from_millis(100);

type Opened = Result<(Handle, String), NvmlError>;

/// The thread of a GPU.
struct GpuWorker {
    slot: usize,
    index: Arc<AtomicU32>,
    end: Arc<AtomicBool>,
    thread: JoinHandle<()>,
    calls: Arc<CallSlot>,
}

struct Watch {
    search: LibrarySearch,
    /// The file that was loaded.
    library: PathBuf,
    context: Arc<Context>,
    caller: Caller,
    workers: HashMap<Arc<str>, GpuWorker>,
    /// Slots of GPUs that were read through the previous library.
    before: HashMap<Arc<str>, usize>,
    /// Indices that could not be opened and are reported.
    unopened: Vec<u32>,
    /// Indices of GPUs for which the opening thread hangs.
    hanging: HashMap<u32, Receiver<(u32, Opened)>>,
}

/// Starts GPU sampling. An unusable library is an error if it is configured by name; otherwise, and if it hangs, opening is retried.
pub fn start(config: &Config, context: Arc<Context>) -> Result<(), GpuError> {
    let (opened, first) = sync_channel(1);
    let search = LibrarySearch::new(config);
    let named = search.is_configured();
    let caller = context.health.driver.caller(Condition::GpuList, None);
    let (workers, before, unopened, hanging) = (HashMap::new(), HashMap::new(), Vec::new(), HashMap::new());
    let library = PathBuf::new();
    let watch = Watch { search, library, context: Arc::clone(&context), caller, workers, before, unopened, hanging };
    spawn("gpu-watch", move || watch.run(&opened))?;
    match first.recv_timeout(START_PATIENCE) {
        Ok(Err(error)) if named => Err(error),
        Ok(Ok(()) | Err(_)) => Ok(()),
        Err(_) => {
            let message =
                "the initialization of the NVIDIA driver has not returned for 5 s; no GPU is sampled until it does; check dmesg";
            context.health.degraded(Condition::Nvml, message);
            Ok(())
        }
    }
}

/// Starts a thread that opens these GPUs. Its channel has no capacity, so that it stops once the receiver is dropped.
fn opener(generation: &Arc<Generation>, indices: Vec<u32>) -> Result<Receiver<(u32, Opened)>, GpuError> {
    let (to, opened) = sync_channel(0);
    let generation = Arc::clone(generation);
    spawn("gpu-open", move || {
        let open = |index| {
            let handle = Handle::by_index(&generation, index)?;
            let uuid = handle.device().uuid()?;
            Ok((handle, uuid))
        };
        let _given_up = indices.into_iter().try_for_each(|index| to.send((index, open(index))));
    })?;
    Ok(opened)
}

impl Watch {
    /// `opened` receives the result of the first attempt.
    fn run(mut self, opened: &SyncSender<Result<(), GpuError>>) {
        let mut retry = RETRY_AT_FIRST;
        while !self.context.stopping() {
            match self.caller.during(Call::Init, boot_now(), || self.search.open()) {
                Ok(OpenedLibrary { nvml, path }) => {
                    self.library = path;
                    let was = Instant::now();
                    self.context.pids.opened();
                    // Closed: the core has ended, and with it the agent.
                    if self.serve(Arc::new(Generation::new(nvml)), opened).is_err() {
                        return;
                    }
                    // A library that becomes unusable at once is not reopened in a loop.
                    retry = if was.elapsed() > RETRY { RETRY_AT_FIRST } else { retry };
                }
                Err(error) => {
                    self.context.health.update(|view| view.nvml_up = Some(false));
                    let message = format!("no GPU can be read, retrying: {}", display_chain(&error));
                    self.context.health.degraded(Condition::Nvml, &message);
                    let _waited_for = opened.try_send(Err(error));
                }
            }
            self.sleep(retry, || false);
            retry = (retry * 2).min(RETRY);
        }
    }

    fn sleep(&self, at_most: Duration, enough: impl Fn() -> bool) {
        let until = Instant::now() + at_most;
        while Instant::now() < until && !self.context.stopping() && !enough() {
            std::thread::sleep(NAP);
        }
    }

    /// Lists GPUs until the library can no longer be used.
    fn serve(&mut self, generation: Arc<Generation>, opened: &SyncSender<Result<(), GpuError>>) -> Result<(), Closed> {
        let mut events = None;
        while !self.context.stopping() && !generation.is_dead() {
            let begun = Instant::now();
            match self.list(&generation) {
                Ok(gpus) => {
                    self.context.health.update(|view| view.nvml_up = Some(true));
                    self.context.health.recovered(Condition::Nvml);
                    if events.is_none() {
                        tracing::info!(gpus, library = %self.library.display(), "sampling");
                        let listener = Events::new(Arc::clone(&generation), Arc::clone(&self.context));
                        events = spawn("gpu-events", move || listener.run()).ok();
                    }
                    let _waited_for = opened.try_send(Ok(()));
                }
                Err(error) => {
                    if fault(&error) == Some(DeviceFault::Dead) {
                        generation.kill();
                    }
                    let error = GpuError::List(self.search.files.explain(&error, &self.library));
                    self.context.health.degraded(Condition::Nvml, &error.to_string());
                    let _waited_for = opened.try_send(Err(error));
                }
            }
            // Listing may wait in the driver and delay other users, so its share of time is limited. Time in hanging calls does not count.
            let share = self.context.limits.wait_percent / 100.0;
            let hung = OPEN_PATIENCE.saturating_mul(u32::try_from(self.hanging.len()).unwrap_or(u32::MAX));
            let every = begun.elapsed().saturating_sub(hung).div_f64(share).clamp(LIST_EVERY, LIST_AT_LEAST_EVERY);
            self.sleep(every, || generation.is_dead() || self.workers.values().any(|w| w.thread.is_finished()));
        }
        self.release(generation, events);
        Ok(())
    }

    /// Starts a thread for every new GPU and ends the threads of removed GPUs.
    fn list(&mut self, generation: &Arc<Generation>) -> Result<u32, NvmlError> {
        self.caller.during(Call::Init, boot_now(), || generation.refresh())?;
        let count = self.caller.during(Call::GetCount, boot_now(), || generation.nvml().device_count())?;
        self.report_unlisted(count);
        let mut seen: Vec<Arc<str>> = Vec::new();
        let mut found = Vec::new();
        let mut unopened = Vec::new();
        for (index, opened) in self.open_all(generation, count) {
            match opened {
                Some(Ok((_, uuid))) if seen.iter().any(|known| **known == *uuid) => {
                    unopened
                        .push((index, format!("its UUID {uuid} is also that of another GPU; the driver or the board is broken")));
                }
                Some(Ok((handle, uuid))) => {
                    let uuid: Arc<str> = uuid.into();
                    seen.push(Arc::clone(&uuid));
                    // Slots are taken before threads start, so that MIG devices, which the threads find, come after the GPUs.
                    let slot = self.context.slots.take(&uuid);
                    found.push((handle, uuid, index, slot));
                }
                Some(Err(error)) if fault(&error) == Some(DeviceFault::Dead) => return Err(error),
                Some(Err(error)) => unopened.push((index, error.to_string())),
                None => unopened.push((index, "the driver call does not return; check dmesg for Xid lines".into())),
            }
        }
        for (handle, uuid, index, slot) in found {
            self.start_poller(handle, uuid, index, slot);
        }
        // GPUs with a thread are reported by that thread.
        let unseen = self.workers.keys().filter(|uuid| !seen.contains(uuid)).count();
        for (index, error) in unopened.iter().filter(|_| unopened.len() > unseen) {
            let message = format!("GPU {index} cannot be opened, retrying: {error}");
            self.context.health.degraded(Condition::GpuUnopened { index: *index }, &message);
        }
        let unopened: Vec<u32> = unopened.into_iter().map(|(index, _)| index).collect();
        for index in self.unopened.iter().filter(|index| !unopened.contains(index)) {
            self.context.health.recovered(Condition::GpuUnopened { index: *index });
        }
        // A GPU that cannot be opened may be any of those that were not seen.
        if unopened.is_empty() {
            self.end_gone(&seen);
        }
        self.unopened = unopened;
        Ok(count)
    }

    /// GPUs of which the driver library cannot open the nodes are missing in its list, without an error.
    fn report_unlisted(&self, count: u32) {
        let files = &self.search.files;
        match files.drives_more_than(count).then(|| files.unlisted(count)).flatten() {
            Some(diagnosis) => self.context.health.degraded(Condition::GpusUnlisted, &diagnosis.to_string()),
            None => self.context.health.recovered(Condition::GpusUnlisted),
        }
    }

    /// Opens all GPUs, in a thread that is abandoned if it hangs; `None` for GPUs of which the calls do not return.
    fn open_all(&mut self, generation: &Arc<Generation>, count: u32) -> Vec<(u32, Option<Opened>)> {
        self.hanging.retain(|_, thread| matches!(thread.try_recv(), Err(TryRecvError::Empty)));
        let (mut all, mut left) = (Vec::new(), VecDeque::new());
        for index in 0..count {
            if self.hanging.contains_key(&index) {
                all.push((index, None));
            } else {
                left.push_back(index);
            }
        }
        while !left.is_empty() {
            let Ok(opened) = opener(generation, left.iter().copied().collect()) else { break };
            let hangs = loop {
                match opened.recv_timeout(OPEN_PATIENCE) {
                    Ok((index, result)) => {
                        left.pop_front();
                        all.push((index, Some(result)));
                    }
                    Err(RecvTimeoutError::Timeout) => break left.pop_front(),
                    Err(RecvTimeoutError::Disconnected) => break None,
                }
            };
            let Some(index) = hangs else { break };
            all.push((index, None));
            self.hanging.insert(index, opened);
        }
        // No thread could be started.
        all.extend(left.into_iter().map(|index| (index, None)));
        all.sort_unstable_by_key(|(index, _)| *index);
        all
    }

    fn start_poller(&mut self, handle: Handle, uuid: Arc<str>, index: u32, slot: usize) {
        if let Some(worker) = self.workers.get(&uuid).filter(|worker| !worker.thread.is_finished()) {
            worker.index.store(index, Ordering::Relaxed);
            return;
        }
        // By slot, because an index may later belong to another GPU.
        let name = format!("gpu-{slot}");
        let caller = self.context.health.driver.caller(Condition::Gpu { slot }, Some(&uuid));
        let (end, calls) = (Arc::new(AtomicBool::new(false)), Arc::clone(&caller.slot));
        let shared_index = Arc::new(AtomicU32::new(index));
        let start = Start { handle, uuid: Arc::clone(&uuid), index: Arc::clone(&shared_index), slot, end: Arc::clone(&end) };
        let poller = Poller::new(&self.context, start, caller);
        match spawn(&name, move || poller.run()) {
            Ok(thread) => {
                tracing::info!(gpu = index, uuid = &*uuid, "GPU found");
                self.workers.insert(uuid, GpuWorker { slot, index: shared_index, end, thread, calls });
            }
            Err(error) => {
                let message = format!("{uuid} is not sampled, retrying: {}", display_chain(&error));
                self.context.health.degraded(Condition::Gpu { slot }, &message);
            }
        }
    }

    fn end_gone(&mut self, seen: &[Arc<str>]) {
        for (uuid, worker) in self.workers.extract_if(|uuid, _| !seen.contains(uuid)) {
            worker.end.store(true, Ordering::Relaxed);
            worker.calls.end();
            self.before.insert(uuid, worker.slot);
        }
        for (uuid, slot) in self.before.drain().filter(|(uuid, _)| !seen.contains(uuid)) {
            self.context.slots.gone(&uuid);
            self.context.health.driver.forget(&uuid);
            let left = self.context.mig_left.lock().unwrap_or_else(PoisonError::into_inner).remove(&uuid);
            for (uuid, slot) in left.into_iter().flatten() {
                let _sent = mig::report_gone(&self.context, &uuid, slot);
            }
            tracing::info!(uuid = &*uuid, "GPU gone");
            // If the core has ended, the next list detects it.
            let _sent = self.context.to.observe(Observation::GpuGone { gpu: slot, at: boot_now() });
        }
    }

    /// The driver was unloaded or replaced. Threads that hang in it keep the old library open; opening a new one does not wait for them.
    fn release(&mut self, generation: Arc<Generation>, events: Option<JoinHandle<()>>) {
        generation.kill();
        if self.context.stopping() {
            return;
        }
        self.context.health.update(|view| view.nvml_up = Some(false));
        self.context.health.degraded(Condition::Nvml, "the NVIDIA driver was unloaded or replaced; reopening its library");
        let ended = |watch: &Self| {
            watch.workers.values().all(|w| w.thread.is_finished()) && events.as_ref().is_none_or(JoinHandle::is_finished)
        };
        self.sleep(GIVE_UP_AFTER, || ended(self));
        for (uuid, worker) in self.workers.drain() {
            worker.calls.end();
            // The poll interval no longer applies, and the next thread sets it only with its first poll.
            self.context.health.driver.device(&uuid).set_pace(Duration::ZERO, [f64::NAN; 2]);
            self.before.insert(uuid, worker.slot);
        }
        self.hanging.clear();
        // Shutting down may hang as well.
        let (done, closed) = sync_channel(1);
        let closing = spawn("gpu-close", move || {
            drop(generation);
            let _waited_for = done.send(());
        });
        if closing.is_ok() {
            let _closed = closed.recv_timeout(GIVE_UP_AFTER);
        }
    }
}
