//! The core thread: drains both kernel rings, merges scans, owns identity, attribution and aggregation, publishes snapshots.
//!
//! ```text
//!  poll(rings | inotify, inbox) -> drain -> lost events? -> resync (scan, drain, merge, sweep)
//!                                        -> batches of samples, only after the rings were drained past them and no event is lost
//!                                        -> a few queries
//! ```

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use rustix::event::{PollFd, PollFlags, Timespec};
use sampler_core::identity::{ContainerChange, Liveness};
use sampler_core::observation::{CgroupChange, GpuBatch, Observation};
use sampler_core::pipeline::Core;
use sampler_core::snapshot::Snapshot;
use sampler_core::units::BootNs;
use tokio::sync::mpsc::UnboundedSender;

use crate::config::{Config, KernelMode};
use crate::error::display_chain;
use crate::health::condition::Condition;
use crate::health::{Health, Lost};
use crate::inbox::{Inbox, Message, Query, TAKE_EVERY};
use crate::labels::ContainerEvent;
use crate::observe::clock::{boot_now, wall_now};
use crate::observe::kernel::layout::Layout;
use crate::observe::kernel::proc::is_alive;
use crate::observe::kernel::rings::KernelFact;
use crate::observe::kernel::scan::{self, Scan};
use crate::observe::kernel::watch::{CgroupWatch, EventsRead, WatchError};
use crate::observe::kernel::{Mode, Tracker};
use crate::query::{self, Subject};
use crate::session::Recorder;

/// How often the clock of the core advances, which closes windows and makes facts for the recorder.
const ADVANCE_EVERY: Duration = Duration::from_millis(250);
/// As [`TAKE_EVERY`], where a process must be read while it lives.
const TAKE_EVERY_WITHOUT_EVENTS: Duration = Duration::from_millis(20);
/// How often a snapshot is published without a request for it. A snapshot of many users takes longer than all else in that time.
const PUBLISH_EVERY: Duration = Duration::from_secs(1);
/// Minimum time between two snapshots, however many scrapes ask for one.
const PUBLISH_SPACING: Duration = Duration::from_millis(100);
/// How often the followed processes are read without kernel events; without inotify, all processes and all cgroups.
const RESCAN_EVERY: Duration = Duration::from_secs(1);
/// Minimum time between two resyncs, so that continuing losses leave time for other work.
const RESYNC_EVERY: Duration = Duration::from_millis(300);
/// Losses may never stop if the kernel skips programs. Scans then take one eighth of a processor, as long as tables are still repaired
/// within a second.
const RESYNC_TIMES: u32 = 8;
const RESYNC_RAREST: Duration = Duration::from_millis(600);
/// How often the sizes of the tables are published, which requires a walk over them.
const SIZE_EVERY: Duration = Duration::from_secs(1);
/// How often inotify is tried again after a fallback to /proc for lack of watches.
const WATCH_AGAIN_EVERY: Duration = Duration::from_secs(30);
/// Minimum time between two reads of the loss counters. Samples wait for a read; each takes a system call per program and processor time
/// that grows with the number of processors (`cargo xtask bench counters`).
const COUNT_EVERY: Duration = Duration::from_millis(100);
/// A period of losses ends after this time without a loss.
const CALM_AFTER: Duration = Duration::from_secs(10);
/// How often continuing losses are logged: there may be many a second.
const LOG_LOSSES_EVERY: Duration = Duration::from_secs(60);
const RESYNC_AT_LEAST_EVERY: Duration = Duration::from_secs(30);
/// How often cgroups are walked with inotify, to find changes without an event.
const WALK_EVERY: Duration = Duration::from_secs(10);
/// Maximum number of queries per turn, so that samples do not wait for queries.
const QUERIES_PER_TURN: usize = 8;

pub struct CoreThread {
    pub core: Core,
    pub config: Arc<Config>,
    pub layout: Layout,
    pub tracker: Tracker,
    pub inbox: Inbox,
    pub health: Arc<Health>,
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    pub containers: UnboundedSender<ContainerEvent>,
    pub stop: Arc<AtomicBool>,
    pub recorder: Recorder,
    /// inotify lost events: watches must be set up and cgroups scanned again.
    pub start_over: bool,
}

/// The state of the loop between turns.
struct Turn {
    /// Observations of the GPU threads, in order. A batch is attributed only once the tables are correct up to its end: after a loss of
    /// events it waits for a resync, which takes 300 ms and the duration of a scan.
    waiting: VecDeque<Observation>,
    queries: VecDeque<Query>,
    /// The loss counters, as last read, and when that was.
    lost: Lost,
    counted: Instant,
    /// The count of lost events up to which the tables were repaired, if they were, and the count for which the last scan was made.
    last_repaired: Option<u64>,
    attempted_until: u64,
    /// The tables are known to be correct up to this time: a batch received by then may be attributed. Never later than the drain before
    /// the last read of the loss counters.
    clean_since: BootNs,
    advanced: Instant,
    published: Instant,
    /// The end of the last scan, and its duration.
    scanned: Instant,
    scan_took: Duration,
    walked: Instant,
    /// When the sizes of the tables were last published.
    sized: Instant,
    /// The back-off while scans are incomplete: unreadable processes may stay unreadable.
    resync_after: Duration,
    /// The present period of losses.
    losses: Option<LossPeriod>,
    /// Checks entries against /proc for losses that no counter reports; the first repair is logged.
    liveness: Liveness,
    liveness_logged: bool,
}

#[derive(Clone, Copy)]
struct LossPeriod {
    /// When it was last logged.
    logged: Instant,
    /// When a loss was last detected.
    last: Instant,
}

/// Whether the observation is of a time of which events may be missing.
fn is_held(observation: &Observation, clean_since: BootNs) -> bool {
    match observation {
        Observation::Gpu(batch) => batch.ended > clean_since,
        Observation::GpuClient { at, .. } => *at > clean_since,
        _ => false,
    }
}

impl Turn {
    /// Whether a batch waits until the losses up to its end were read.
    fn batch_waits(&self) -> bool {
        self.waiting.front().is_some_and(|next| is_held(next, self.clean_since))
    }

    /// Time from one resync to the next while events are lost.
    fn spacing(&self) -> Duration {
        (RESYNC_TIMES * self.scan_took).clamp(RESYNC_EVERY, RESYNC_RAREST).max(self.scan_took)
    }

    fn count_is_due(&self) -> bool {
        let wanted = self.batch_waits() || self.advanced.elapsed() >= ADVANCE_EVERY;
        wanted && self.counted.elapsed() >= COUNT_EVERY
    }

    /// The time until there is something to do, if nothing arrives. `take_every`: how often the input is taken.
    fn idle(&self, take_every: Duration) -> Duration {
        if !self.queries.is_empty() {
            return Duration::ZERO;
        }
        let advance = ADVANCE_EVERY.saturating_sub(self.advanced.elapsed()).min(take_every);
        if self.batch_waits() { advance.min(COUNT_EVERY.saturating_sub(self.counted.elapsed())) } else { advance }
    }
}

impl CoreThread {
    pub fn run(mut self) {
        let clean_since = boot_now();
        let counted = self.lost();
        let lost = counted.sum();
        let scan = self.scan();
        let complete = scan.complete();
        self.merge(scan, None);
        self.advance(&counted);
        self.publish();
        self.size();
        self.health.set_ready();
        let now = Instant::now();
        let mut turn = Turn {
            waiting: VecDeque::new(),
            queries: VecDeque::new(),
            lost: counted,
            counted: now,
            last_repaired: complete.then_some(lost),
            attempted_until: lost,
            clean_since,
            advanced: now,
            published: now,
            scanned: now,
            scan_took: Duration::ZERO,
            walked: now,
            sized: now,
            resync_after: RESYNC_EVERY,
            losses: None,
            liveness: Liveness::default(),
            liveness_logged: false,
        };
        while !self.stop.load(Ordering::Relaxed) {
            // Without kernel events, processes are read when a batch names them, which must be soon.
            let has_events = self.tracker.mode() == Mode::RawTracepoint;
            self.wait(turn.idle(if has_events { TAKE_EVERY } else { TAKE_EVERY_WITHOUT_EVENTS }));
            self.turn(&mut turn);
            self.health.core_turned();
        }
    }

    fn turn(&mut self, turn: &mut Turn) {
        self.inbox.clear_wakeup();
        while let Some(message) = self.inbox.take() {
            match message {
                Message::Observation(observation) => turn.waiting.push_back(observation),
                Message::Query(query) => turn.queries.push_back(query),
            }
        }
        // Every waiting batch was received before this time.
        let before = boot_now();
        self.drain();
        self.resync(turn, before);
        while let Some(observation) = turn.waiting.pop_front_if(|next| !is_held(next, turn.clean_since)) {
            if let Observation::Gpu(batch) = &observation {
                self.read_processes_of(batch);
            }
            self.core.observe(observation);
        }
        for query in turn.queries.drain(..turn.queries.len().min(QUERIES_PER_TURN)) {
            self.reply(query, &mut turn.published, &turn.lost);
        }
        if turn.advanced.elapsed() >= ADVANCE_EVERY {
            turn.advanced = Instant::now();
            self.advance(&turn.lost);
            if turn.published.elapsed() >= PUBLISH_EVERY {
                turn.published = Instant::now();
                self.publish();
            }
            if turn.sized.elapsed() >= SIZE_EVERY {
                turn.sized = Instant::now();
                self.check_living(turn);
                self.size();
            }
        }
    }

    fn reply(&mut self, query: Query, published: &mut Instant, lost: &Lost) {
        match query {
            Query::Publish(reply) => {
                if published.elapsed() >= PUBLISH_SPACING {
                    *published = Instant::now();
                    self.advance(lost);
                    self.publish();
                }
                // Fails if the client no longer waits.
                let _sent = reply.send(());
            }
            Query::Explain(subject, reply) => {
                if let Subject::Pid(pid) = subject
                    && self.tracker.mode() != Mode::RawTracepoint
                {
                    self.read_processes(std::iter::once(pid));
                }
                let _sent = reply.send(query::known(&self.core.identity, &subject));
            }
            Query::Ids(prefix, reply) => {
                let _sent = reply.send(query::ids(&self.core.identity, &prefix));
            }
            Query::Processes(reply) => {
                let _sent = reply.send(query::living(&self.core.identity));
            }
            Query::GpuProcesses(reply) => {
                let _sent = reply.send(self.core.gpu_processes());
            }
        }
    }

    fn wait(&self, at_most: Duration) {
        let mut fds = vec![PollFd::from_borrowed_fd(self.inbox.fd(), PollFlags::IN)];
        fds.extend(self.tracker.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let timeout = Timespec { tv_sec: at_most.as_secs().cast_signed(), tv_nsec: at_most.subsec_nanos().into() };
        // An interruption is treated like readiness: the turn checks everything.
        let _ready = rustix::event::poll(&mut fds, Some(&timeout));
    }

    fn lost(&self) -> Lost {
        let Tracker::RawTracepoint(program) = &self.tracker else { return Lost::default() };
        let (lost, unread) = program.lost();
        match unread {
            Some(error) => self.health.degraded(Condition::LossCounters, &display_chain(&error)),
            None => self.health.recovered(Condition::LossCounters),
        }
        lost
    }

    /// Repairs the tables after losses; without kernel events, reads again what may have changed. `before`: a time up to which the rings
    /// were drained.
    fn resync(&mut self, turn: &mut Turn, before: BootNs) {
        match &self.tracker {
            Tracker::RawTracepoint(_) => self.repair(turn, before),
            Tracker::Inotify(_) => {
                turn.clean_since = before;
                if turn.scanned.elapsed() >= RESCAN_EVERY {
                    let living: Vec<u32> = self.core.identity.processes.living().map(|(tgid, ..)| tgid.0).collect();
                    self.read_processes(living.into_iter());
                    turn.scanned = Instant::now();
                }
                let walk_every = if self.start_over { RESYNC_EVERY } else { WALK_EVERY };
                if turn.walked.elapsed() >= walk_every {
                    if std::mem::take(&mut self.start_over) {
                        self.rebuild_watches();
                    }
                    let scan = self.scan();
                    self.merge(scan, None);
                    turn.walked = Instant::now();
                }
            }
            Tracker::Procfs => {
                turn.clean_since = before;
                if self.config.kernel_mode != KernelMode::Procfs && turn.walked.elapsed() >= WATCH_AGAIN_EVERY {
                    self.retry_inotify();
                    turn.walked = Instant::now();
                }
                if turn.scanned.elapsed() >= RESCAN_EVERY {
                    let scan = self.scan();
                    self.merge(scan, None);
                    turn.scanned = Instant::now();
                }
            }
        }
    }

    /// Drops the old watches first, to free their resources.
    fn rebuild_watches(&mut self) {
        self.tracker = Tracker::Procfs;
        match CgroupWatch::new(&self.layout) {
            Ok(watch) => self.tracker = Tracker::Inotify(watch),
            Err(error) => self.without_watches(&error),
        }
    }

    /// Falls back to mode procfs, which does not need watches and detects every second what events would have reported.
    fn without_watches(&mut self, error: &WatchError) {
        self.tracker = Tracker::Procfs;
        self.health.update(|view| view.kernel_mode = Mode::Procfs.name());
        let message = format!("kernel mode procfs: {}; no inotify: {}", Mode::Procfs.limitations(), display_chain(error));
        self.health.degraded(Condition::KernelMode, &message);
    }

    /// Tries inotify again: watches may be available by now.
    fn retry_inotify(&mut self) {
        if let Ok(watch) = CgroupWatch::new(&self.layout) {
            self.tracker = Tracker::Inotify(watch);
            self.start_over = false;
            self.health.update(|view| view.kernel_mode = Mode::Inotify.name());
            self.health.degraded(Condition::KernelMode, &format!("kernel mode inotify again: {}", Mode::Inotify.limitations()));
            let mut scan = self.scan();
            // From here on only processes that the driver reports are followed.
            scan.end.all_processes = true;
            self.merge(scan, None);
        }
    }

    fn repair(&mut self, turn: &mut Turn, before: BootNs) {
        if !turn.count_is_due() {
            return;
        }
        // Read after the drain, so that no loss up to `before` is missed, and before the scan: losses during it are left to the next scan.
        (turn.lost, turn.counted) = (self.lost(), Instant::now());
        let lost = turn.lost.sum();
        if turn.last_repaired == Some(lost) {
            turn.clean_since = before;
            if turn.losses.is_some_and(|losses| losses.last.elapsed() >= CALM_AFTER) {
                turn.losses = None;
                let repairs = self.core.identity.repairs;
                tracing::info!(lost, repairs, "kernel event loss stopped; the process table is consistent again");
            }
            return;
        }
        // The last scan was made for these losses but was incomplete. It is repeated, but batches do not wait for that.
        let again = lost == turn.attempted_until;
        if again {
            turn.clean_since = before;
        }
        let spacing = if again { turn.resync_after } else { turn.spacing() };
        if turn.scanned.elapsed() < spacing {
            return;
        }
        turn.attempted_until = lost;
        self.health.update(|view| view.resyncs += 1);
        let begun = Instant::now();
        let scan = self.scan();
        let (began, complete) = (scan.end.began, scan.complete());
        self.merge(scan, Some(turn.clean_since));
        self.size();
        (turn.scanned, turn.scan_took) = (Instant::now(), begun.elapsed());
        turn.clean_since = turn.clean_since.max(began);
        if complete {
            (turn.last_repaired, turn.resync_after) = (Some(lost), RESYNC_EVERY);
        } else {
            turn.resync_after = (turn.resync_after * 2).min(RESYNC_AT_LEAST_EVERY);
        }
        if !again {
            self.log_losses(turn, lost);
        }
    }

    fn log_losses(&self, turn: &mut Turn, lost: u64) {
        let now = Instant::now();
        let logged = turn.losses.map(|losses| losses.logged).filter(|logged| logged.elapsed() < LOG_LOSSES_EVERY);
        if logged.is_none() {
            let (repairs, skipped) = (self.core.identity.repairs, turn.lost.skipped);
            if lost > skipped {
                let ring_bytes = self.config.kernel_ring_bytes;
                tracing::warn!(
                    lost,
                    skipped,
                    repairs,
                    ring_bytes,
                    "kernel events were lost; scans repair the tables; raise kernel_ring_bytes"
                );
            } else {
                tracing::warn!(
                    skipped,
                    repairs,
                    "the kernel skipped eBPF programs of the agent because they were already running on the same processor; scans \
                     repair the tables; no action is needed"
                );
            }
        }
        turn.losses = Some(LossPeriod { logged: logged.unwrap_or(now), last: now });
    }

    /// Scans everything that this mode can observe.
    fn scan(&mut self) -> Scan {
        match &mut self.tracker {
            Tracker::RawTracepoint(program) => {
                let tasks = || program.tasks().map_err(|error| display_chain(&error));
                scan::of_kernel(&self.config.path_procfs, &self.layout, tasks)
            }
            // Processes are followed only once the driver has reported them.
            Tracker::Inotify(_) => scan::of_cgroups(&self.layout),
            Tracker::Procfs => scan::of_proc(&self.config.path_procfs, &self.layout),
        }
    }

    fn merge(&mut self, mut scan: Scan, repairs_since: Option<BootNs>) {
        self.drain();
        let message = |n, first: &str| format!("cannot read {n} cgroups or processes, such as {first}");
        self.health.report(Condition::Scan, &scan.problems, message);
        scan.end.repairs_since = repairs_since;
        self.core.observe(Observation::ScanBegan);
        for fact in scan.facts {
            self.core.observe(fact);
        }
        self.core.observe(Observation::ScanEnded(scan.end));
        self.send_container_changes();
    }

    /// Without process events: reads the processes that the driver reports, each time, because a PID may have been reused.
    fn read_processes_of(&mut self, batch: &GpuBatch) {
        if self.tracker.mode() == Mode::RawTracepoint {
            return;
        }
        let listed = batch.processes.iter().flatten().map(|p| p.pid);
        let named: HashSet<u32> = batch.process_samples.iter().map(|s| s.pid).chain(listed).collect();
        self.read_processes(named.into_iter());
    }

    /// Reads processes from /proc. With process events, only where these do not suffice.
    fn read_processes(&mut self, pids: impl Iterator<Item = u32>) {
        for fact in scan::of_processes(&self.config.path_procfs, &self.layout, pids).facts {
            self.core.observe(fact);
        }
        self.send_container_changes();
    }

    /// Checks some entries of living processes against /proc. The rings were drained in this turn.
    fn check_living(&mut self, turn: &mut Turn) {
        if self.tracker.mode() != Mode::RawTracepoint {
            return;
        }
        let now = boot_now();
        let mut dead = Vec::new();
        for entry in turn.liveness.due(now, &self.core.identity.processes) {
            let alive = is_alive(&self.config.path_procfs, entry.tgid, entry.start);
            if turn.liveness.checked(entry, alive, now) {
                dead.push(entry.tgid);
            }
        }
        let Some(first) = dead.first() else { return };
        for tgid in &dead {
            self.core.observe(Observation::ProcessGone { tgid: *tgid, began: now });
        }
        // Another process may have the PID by now.
        self.read_processes(dead.iter().map(|tgid| tgid.0));
        self.health.update(|view| view.liveness_repairs += dead.len() as u64);
        if !std::mem::replace(&mut turn.liveness_logged, true) {
            tracing::warn!(
                example = first.0,
                "removed dead processes from the table although no loss was counted; further ones are counted in \
                 gpu_sampler_liveness_repairs_total"
            );
        }
    }

    fn drain(&mut self) {
        let (core, health) = (&mut self.core, &self.health);
        let mut failed = None;
        match &mut self.tracker {
            Tracker::RawTracepoint(program) => program.rings.drain(boot_now(), |fact| match fact {
                KernelFact::Process(fact) => core.identity.process(&fact),
                KernelFact::Cgroup(fact) => {
                    core.identity.cgroup(&fact);
                    if fact.change == CgroupChange::Created {
                        health.identified(boot_now().saturating_since(fact.at));
                    }
                }
            }),
            Tracker::Inotify(watch) => match watch.read(&mut |fact| core.observe(Observation::Cgroup(fact))) {
                Ok(EventsRead::Complete) => {}
                Ok(EventsRead::StartOver) => self.start_over = true,
                Err(error) => failed = Some(error),
            },
            Tracker::Procfs => {}
        }
        if let Some(error) = failed {
            self.without_watches(&error);
        }
        self.send_container_changes();
    }

    fn send_container_changes(&mut self) {
        for change in self.core.take_container_changes() {
            let event = match change {
                ContainerChange::Appeared(record) => ContainerEvent::Appeared(record),
                ContainerChange::Gone(key, at) => ContainerEvent::Gone(key, at),
                ContainerChange::Evicted(key) => ContainerEvent::Evicted(key),
            };
            // The label service ends only with the process.
            if self.containers.send(event).is_err() {
                return;
            }
        }
    }

    fn size(&self) {
        let watches = if let Tracker::Inotify(watch) = &self.tracker { watch.len() } else { 0 };
        let identity = &self.core.identity;
        let (processes, (cgroups, bytes)) = (identity.processes.size(), identity.cgroups.size());
        self.health.update(|view| {
            view.repairs = identity.repairs;
            view.watches = watches;
            view.processes = processes;
            view.cgroups = (cgroups, bytes, identity.cgroups.evicted);
        });
    }

    fn advance(&mut self, lost: &Lost) {
        self.health.watch_calls(boot_now());
        self.core.observe(Observation::ClockAdvanced { at: boot_now(), wall: wall_now() });
        // The only place where facts leave the core: they go to the recorder.
        self.recorder.send_facts(self.core.take_facts());
        if let Tracker::RawTracepoint(program) = &self.tracker {
            self.health.update(|view| {
                view.events_seen = program.rings.seen;
                view.events_lost = *lost;
                view.drained = program.rings.drained;
            });
        }
    }

    fn publish(&self) {
        self.snapshot.store(Arc::new(self.core.snapshot()));
    }
}
