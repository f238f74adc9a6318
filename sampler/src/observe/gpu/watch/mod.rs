//! `gpu-watch`: opens the library, tracks the list of GPUs, and reopens the library after the driver was replaced, after a GPU was lost,
//! and after a release.
//!
//! ```text
//!  closed --opened--> listing every 5 s --driver unloaded, GPU lost, release--> threads end, or are abandoned after 3 s --> closed
//!     \--cannot be opened: retried after 1 s, 2 s .. 10 s--/
//! ```
//! GPUs that cannot be opened, and lost ones, are tried ever more rarely, and hold up no other GPU.

mod lost;
mod releases;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nvml_wrapper::error::NvmlError;
use sampler_core::observation::Observation;

use super::context::Context;
use super::error::{GpuError, spawn};
use super::events::Events;
use super::library::Generation;
use super::library_search::{LibrarySearch, OpenedLibrary};
use super::mig;
use super::nvml_caller::{DeviceFault, fault};
use super::opener::{self, OpenTarget, OpenedGpu, Opener};
use super::poller::{Poller, Start};
use super::release::{self, ReleaseRequest, ReleaseSender, open_nodes};
use super::retry::{Backoff, RARELY, Unseen};
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
/// Until the second try to open a lost GPU. A GPU that is being reset is back within seconds.
const LOST_AT_FIRST: Duration = Duration::from_secs(1);
/// Initialization may hang in the driver; the agent starts without it.
const START_PATIENCE: Duration = Duration::from_secs(5);
/// Threads that hang in an old library are abandoned after this time.
const GIVE_UP_AFTER: Duration = Duration::from_secs(3);
/// Interval of the checks during a sleep.
const NAP: Duration = Duration::from_millis(100);

/// The thread of a GPU.
struct GpuWorker {
    end: Arc<AtomicBool>,
    /// Set by the thread, which ends then.
    lost: Arc<AtomicBool>,
    thread: JoinHandle<()>,
    calls: Arc<CallSlot>,
}

/// A GPU that was opened, also while it has no thread.
struct KnownGpu {
    slot: usize,
    index: Arc<AtomicU32>,
    pci_bus_id: Option<String>,
    /// Number of its device node.
    minor: Option<u32>,
}

impl KnownGpu {
    fn index(&self) -> u32 {
        self.index.load(Ordering::Relaxed)
    }
}

/// Why a known GPU is not opened.
enum Withheld {
    /// On request.
    Released {
        until: Instant,
    },
    Lost(Backoff),
}

/// A GPU that cannot be opened.
struct Unopened {
    reason: String,
    backoff: Backoff,
}

struct Watch {
    search: LibrarySearch,
    /// The file that was loaded.
    library: PathBuf,
    context: Arc<Context>,
    caller: Caller,
    requests: Receiver<ReleaseRequest>,
    /// Received during a sleep, which ended then.
    pending: Option<ReleaseRequest>,
    known: HashMap<Arc<str>, KnownGpu>,
    workers: HashMap<Arc<str>, GpuWorker>,
    withheld: HashMap<Arc<str>, Withheld>,
    /// GPUs that were lost and have returned at this time, with the back-off that continues if they are lost again soon.
    returned: HashMap<Arc<str>, (Backoff, Instant)>,
    /// Indices that cannot be opened and are reported.
    unopened: HashMap<u32, Unopened>,
    unseen: Unseen,
    opener: Opener,
    /// The number of GPUs in the last list: indices stand for the same GPUs while it is unchanged.
    counted: u32,
    /// The number of GPUs in the last check of those that NVML does not list, if there were any, and the time of the check.
    unlisted: Option<(u32, Instant)>,
    /// A GPU that is lost was tried, perhaps for the first time, since the library was opened, which may have left its node open.
    tried_lost: bool,
    /// A hanging call kept device nodes open when the library was closed last: closing it again does not help.
    is_stuck: bool,
    /// All GPUs are released until then: the library is not opened.
    closed_until: Option<Instant>,
}

/// Why the library is closed while it could be used.
enum Close {
    /// The driver was unloaded or replaced.
    Replaced,
    /// A GPU is lost: with its handles open it could not be reset.
    Lost,
    Release,
}

/// Starts GPU sampling. An unusable library is an error if it is configured by name; otherwise, and if it hangs, opening is retried.
pub fn start(config: &Config, context: Arc<Context>) -> Result<ReleaseSender, GpuError> {
    let (opened, first) = sync_channel(1);
    let (sender, requests) = release::channel();
    let search = LibrarySearch::new(config);
    let named = search.is_configured();
    let watch = Watch {
        search,
        library: PathBuf::new(),
        caller: context.health.driver.caller(Condition::GpuList, None),
        context: Arc::clone(&context),
        requests,
        pending: None,
        known: HashMap::new(),
        workers: HashMap::new(),
        withheld: HashMap::new(),
        returned: HashMap::new(),
        unopened: HashMap::new(),
        unseen: Unseen::default(),
        opener: Opener::default(),
        counted: 0,
        unlisted: None,
        tried_lost: false,
        is_stuck: false,
        closed_until: None,
    };
    spawn("gpu-watch", move || watch.run(&opened))?;
    match first.recv_timeout(START_PATIENCE) {
        Ok(Err(error)) if named => Err(error),
        Ok(Ok(()) | Err(_)) => Ok(sender),
        Err(_) => {
            let message =
                "the initialization of the NVIDIA driver has not returned for 5 s; no GPU is sampled until it does; check dmesg";
            context.health.degraded(Condition::Nvml, message);
            Ok(sender)
        }
    }
}

impl Watch {
    /// `opened` receives the result of the first attempt.
    fn run(mut self, opened: &SyncSender<Result<(), GpuError>>) {
        let mut retry = RETRY_AT_FIRST;
        while !self.context.stopping() {
            if let Some(request) = self.pending.take().filter(ReleaseRequest::is_awaited) {
                self.release_while_closed(request);
            }
            if let Some(until) = self.closed_until {
                let left = until.saturating_duration_since(Instant::now());
                if !left.is_zero() {
                    self.sleep(left, |_| false);
                    continue;
                }
                self.closed_until = None;
                self.end_releases(Instant::now());
            }
            match self.caller.during(Call::Init, boot_now(), || self.search.open()) {
                Ok(OpenedLibrary { nvml, path }) => {
                    self.library = path;
                    let was = Instant::now();
                    self.context.pids.opened();
                    match self.serve(Arc::new(Generation::new(nvml)), opened) {
                        // The core has ended, and with it the agent.
                        Err(Closed) => return,
                        Ok(Close::Lost | Close::Release) => continue,
                        Ok(Close::Replaced) => {}
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
            self.sleep(retry, |_| false);
            retry = (retry * 2).min(RETRY);
        }
    }

    fn nap(&self, at_most: Duration, enough: impl Fn(&Self) -> bool) {
        let until = Instant::now() + at_most;
        while Instant::now() < until && !self.context.stopping() && !enough(self) {
            std::thread::sleep(NAP);
        }
    }

    /// Ends early if a release is requested.
    fn sleep(&mut self, at_most: Duration, enough: impl Fn(&Self) -> bool) {
        let until = Instant::now() + at_most;
        while Instant::now() < until && !self.context.stopping() && !enough(self) && self.pending.is_none() {
            std::thread::sleep(NAP);
            self.pending = self.requests.try_recv().ok();
        }
    }

    /// Lists GPUs until the library has to be closed, and closes it.
    fn serve(&mut self, generation: Arc<Generation>, opened: &SyncSender<Result<(), GpuError>>) -> Result<Close, Closed> {
        let mut events = None;
        while !self.context.stopping() && !generation.is_dead() {
            let begun = Instant::now();
            self.end_releases(begun);
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
            let pause = self.pause(begun);
            self.sleep(pause, |watch| generation.is_dead() || watch.workers.values().any(|w| w.thread.is_finished()));
            if let Some(request) = self.pending.take().filter(ReleaseRequest::is_awaited) {
                match self.selected(&request) {
                    Ok(selected) => {
                        let before = open_nodes();
                        self.close(generation, events, &Close::Release);
                        self.release(request, selected, &before);
                        return Ok(Close::Release);
                    }
                    Err(error) => request.reply(Err(error)),
                }
            }
            if !generation.is_dead() && (self.withhold_lost() || self.holds_lost()) {
                self.close(generation, events, &Close::Lost);
                return Ok(Close::Lost);
            }
        }
        self.close(generation, events, &Close::Replaced);
        Ok(Close::Replaced)
    }

    /// Until the next list. Listing may wait in the driver and delay other users, so its share of time is limited. Time in hanging calls
    /// does not count.
    fn pause(&self, begun: Instant) -> Duration {
        let share = self.context.limits.wait_percent / 100.0;
        let hung = opener::PATIENCE.saturating_mul(u32::try_from(self.opener.hanging()).unwrap_or(u32::MAX));
        let least = begun.elapsed().saturating_sub(hung).div_f64(share).min(LIST_AT_LEAST_EVERY);
        let now = Instant::now();
        let due = self.withheld.values().map(|withheld| match withheld {
            Withheld::Released { until } => until.saturating_duration_since(now),
            Withheld::Lost(backoff) => backoff.left(now),
        });
        due.min().unwrap_or(LIST_EVERY).min(LIST_EVERY).max(least)
    }

    /// The GPUs to open now. While a GPU is released, the others are opened by their PCI addresses: NVML may touch every GPU when it looks
    /// for one by its index or UUID.
    fn targets(&self, count: u32, now: Instant) -> Vec<OpenTarget> {
        let is_due = |uuid: &Arc<str>| match self.withheld.get(uuid) {
            None => true,
            Some(Withheld::Released { .. }) => false,
            Some(Withheld::Lost(backoff)) => backoff.is_due(now),
        };
        if self.is_releasing() {
            let waits = |gpu: &KnownGpu| self.unopened.get(&gpu.index()).is_some_and(|unopened| !unopened.backoff.is_due(now));
            let others = self.known.iter().filter(|(uuid, gpu)| is_due(uuid) && !waits(gpu));
            return others.filter_map(|(_, gpu)| Some(OpenTarget::Pci(gpu.index(), gpu.pci_bus_id.clone()?))).collect();
        }
        let waiting: Vec<u32> = self.known.iter().filter(|(uuid, _)| !is_due(uuid)).map(|(_, gpu)| gpu.index()).collect();
        let is_waiting = |index: &u32| {
            // With another count an index may be that of another GPU.
            count == self.counted && (waiting.contains(index) || self.unopened.get(index).is_some_and(|u| !u.backoff.is_due(now)))
        };
        (0..count).filter(|index| !is_waiting(index)).map(OpenTarget::Index).collect()
    }

    /// Starts a thread for every new GPU and ends the threads of removed GPUs.
    fn list(&mut self, generation: &Arc<Generation>) -> Result<u32, NvmlError> {
        let is_releasing = self.is_releasing();
        if !is_releasing {
            self.caller.during(Call::Init, boot_now(), || generation.refresh())?;
        }
        let count = self.caller.during(Call::GetCount, boot_now(), || generation.nvml().device_count())?;
        if !is_releasing {
            self.report_unlisted(count);
        }
        let now = Instant::now();
        let targets = self.targets(count, now);
        let tried: Vec<u32> = targets.iter().map(OpenTarget::index).collect();
        let mut seen: Vec<Arc<str>> = Vec::new();
        let mut found = Vec::new();
        let mut failed = Vec::new();
        for (index, opened) in self.opener.open_all(generation, targets) {
            match opened {
                Some(Ok(gpu)) if seen.iter().any(|known| **known == *gpu.uuid) => {
                    let uuid = gpu.uuid;
                    failed
                        .push((index, format!("its UUID {uuid} is also that of another GPU; the driver or the board is broken")));
                }
                Some(Ok(gpu)) => {
                    let uuid: Arc<str> = gpu.uuid.as_str().into();
                    seen.push(Arc::clone(&uuid));
                    // Slots are taken before threads start, so that MIG devices, which the threads find, come after the GPUs.
                    let slot = self.context.slots.take(&uuid);
                    found.push((gpu, uuid, index, slot));
                }
                Some(Err(error)) if fault(&error) == Some(DeviceFault::Dead) => return Err(error),
                Some(Err(error)) => {
                    self.tried_lost |= fault(&error) == Some(DeviceFault::Lost);
                    failed.push((index, error.to_string()));
                }
                None => failed.push((index, "the driver call does not return; check dmesg for Xid lines".into())),
            }
        }
        for (gpu, uuid, index, slot) in found {
            self.returned(&uuid, slot, now);
            self.start_poller(gpu, uuid, index, slot);
        }
        let waiting = self.waiting_lost(count, &tried);
        let before = failed.len();
        failed.retain(|(index, _)| !self.is_still_lost(*index, now));
        let lost = waiting + before - failed.len();
        self.update_unopened(count, &tried, failed, now);
        if !is_releasing {
            self.end_removed(&seen, lost);
            self.counted = count;
        }
        Ok(count)
    }

    /// Updates the back-off and the condition of each index that cannot be opened.
    fn update_unopened(&mut self, count: u32, tried: &[u32], failed: Vec<(u32, String)>, now: Instant) {
        let is_failed = |index: &u32| failed.iter().any(|(failed, _)| failed == index);
        for (index, _) in self.unopened.extract_if(|index, _| *index >= count || tried.contains(index) && !is_failed(index)) {
            self.context.health.recovered(Condition::GpuUnopened { index });
        }
        for (index, reason) in failed {
            let first = || Unopened { reason: String::new(), backoff: Backoff::new(LIST_EVERY, now) };
            let unopened = self.unopened.entry(index).and_modify(|unopened| unopened.backoff.failed(now)).or_insert_with(first);
            unopened.reason = reason;
        }
    }

    fn report_unopened(&self, missing: usize) {
        // GPUs with a thread are reported by that thread.
        for (index, Unopened { reason, .. }) in self.unopened.iter().filter(|_| self.unopened.len() > missing) {
            let rarely = RARELY.as_secs() / 60;
            let message =
                format!("GPU {index} cannot be opened, retrying ever more rarely, every {rarely} min at most: {reason}");
            self.context.health.degraded(Condition::GpuUnopened { index: *index }, &message);
        }
    }

    /// GPUs of which the driver library cannot open the nodes are missing in its list, without an error.
    /// Opens device nodes, which may make the driver initialize a broken GPU: only for a new count, and rarely.
    fn report_unlisted(&mut self, count: u32) {
        let files = &self.search.files;
        if !files.drives_more_than(count) {
            self.unlisted = None;
            self.context.health.recovered(Condition::GpusUnlisted);
            return;
        }
        if self.unlisted.is_some_and(|(of, at)| of == count && at.elapsed() < RARELY) {
            return;
        }
        self.unlisted = Some((count, Instant::now()));
        if let Some(diagnosis) = files.unlisted(count) {
            self.context.health.degraded(Condition::GpusUnlisted, &diagnosis.to_string());
        }
    }

    fn start_poller(&mut self, gpu: OpenedGpu, uuid: Arc<str>, index: u32, slot: usize) {
        let known = self.known.entry(Arc::clone(&uuid)).or_insert_with(|| KnownGpu {
            slot,
            index: Arc::new(AtomicU32::new(index)),
            pci_bus_id: None,
            minor: None,
        });
        known.index.store(index, Ordering::Relaxed);
        (known.pci_bus_id, known.minor) = (gpu.pci_bus_id, gpu.minor);
        let shared_index = Arc::clone(&known.index);
        if self.workers.get(&uuid).is_some_and(|worker| !worker.thread.is_finished()) {
            return;
        }
        // By slot, because an index may later belong to another GPU.
        let name = format!("gpu-{slot}");
        let caller = self.context.health.driver.caller(Condition::Gpu { slot }, Some(&uuid));
        let (end, lost, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)), Arc::clone(&caller.slot));
        let (uuid_of_thread, handle) = (Arc::clone(&uuid), gpu.handle);
        let start =
            Start { handle, uuid: uuid_of_thread, index: shared_index, slot, end: Arc::clone(&end), lost: Arc::clone(&lost) };
        let poller = Poller::new(&self.context, start, caller);
        match spawn(&name, move || poller.run()) {
            Ok(thread) => {
                tracing::info!(gpu = index, uuid = &*uuid, "GPU found");
                self.workers.insert(uuid, GpuWorker { end, lost, thread, calls });
            }
            Err(error) => {
                let message = format!("{uuid} is not sampled, retrying: {}", display_chain(&error));
                self.context.health.degraded(Condition::Gpu { slot }, &message);
            }
        }
    }

    /// Ends what was kept of GPUs that no longer exist. `lost`: the number of lost ones that exist.
    fn end_removed(&mut self, seen: &[Arc<str>], lost: usize) {
        let missing: Vec<Arc<str>> = self.known.keys().filter(|uuid| !seen.contains(uuid)).cloned().collect();
        self.report_unopened(missing.iter().filter(|uuid| self.workers.contains_key(*uuid)).count());
        for uuid in self.unseen.removed(&missing, self.unopened.len() + lost) {
            self.withheld.remove(&uuid);
            if let Some(worker) = self.workers.remove(&uuid) {
                worker.end.store(true, Ordering::Relaxed);
                worker.calls.end();
            }
            self.returned.remove(&uuid);
            let Some(KnownGpu { slot, .. }) = self.known.remove(&uuid) else { continue };
            self.context.slots.gone(&uuid);
            self.context.health.driver.forget(&uuid);
            self.context.health.recovered(Condition::Gpu { slot });
            let left = self.context.mig_left.lock().unwrap_or_else(PoisonError::into_inner).remove(&uuid);
            for (uuid, slot) in left.into_iter().flatten() {
                let _sent = mig::report_gone(&self.context, &uuid, slot);
            }
            tracing::info!(uuid = &*uuid, "GPU gone");
            // If the core has ended, the next list detects it.
            let _sent = self.context.to.observe(Observation::GpuGone { gpu: slot, at: boot_now() });
        }
    }

    /// Ends all threads and closes the library. Threads that hang in it keep it open; opening it again does not wait for them.
    fn close(&mut self, generation: Arc<Generation>, events: Option<JoinHandle<()>>, why: &Close) {
        generation.kill();
        if self.context.stopping() {
            return;
        }
        if matches!(why, Close::Replaced) {
            self.context.health.update(|view| view.nvml_up = Some(false));
            self.context.health.degraded(Condition::Nvml, "the NVIDIA driver was unloaded or replaced; reopening its library");
        }
        self.nap(GIVE_UP_AFTER, |watch| {
            watch.workers.values().all(|w| w.thread.is_finished()) && events.as_ref().is_none_or(JoinHandle::is_finished)
        });
        for (uuid, worker) in self.workers.drain() {
            worker.calls.end();
            // The poll interval no longer applies, and the next thread sets it only with its first poll.
            self.context.health.driver.device(&uuid).set_pace(Duration::ZERO, [f64::NAN; 2]);
        }
        self.opener.forget_ended();
        // Shutting down may hang as well.
        let (done, closed) = sync_channel(1);
        let closing = spawn("gpu-close", move || {
            drop(generation);
            let _waited_for = done.send(());
        });
        if closing.is_ok() {
            let _closed = closed.recv_timeout(GIVE_UP_AFTER);
        }
        (self.tried_lost, self.is_stuck) = (false, !open_nodes().is_empty());
    }
}
