//! The core thread: drains both kernel rings, merges scans, owns identity, attribution and aggregation, publishes snapshots.
//!
//! ```text
//!  poll(rings | inotify, inbox) -> drain -> lost events? -> resync (scan, drain, merge, sweep)
//!                                        -> batches of samples, only after the rings were drained past them and nothing is lost
//!                                        -> a few of people's questions
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
use sampler_core::units::{BootNs, Tgid};
use tokio::sync::mpsc::UnboundedSender;

use crate::config::{Config, KernelMode};
use crate::error::display_chain;
use crate::health::{Health, Lost};
use crate::inbox::{Inbox, Message, Question};
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

const PUBLISH_EVERY: Duration = Duration::from_millis(250);
/// Without kernel events, the processes that are followed are looked at this often; without inotify, all of them and all cgroups.
const RESCAN_EVERY: Duration = Duration::from_secs(1);
/// Between two resyncs, so that a storm that keeps losing events leaves time for anything else.
const RESYNC_EVERY: Duration = Duration::from_millis(300);
/// Losses may go on for ever, where the kernel skips programs: scans take an eighth of a processor then, as long as that repairs within
/// a second.
const RESYNC_TIMES: u32 = 8;
const RESYNC_RAREST: Duration = Duration::from_millis(600);
/// Their sizes take a walk over the tables.
const SIZE_EVERY: Duration = Duration::from_secs(1);
/// After a fall to /proc alone for want of watches.
const WATCH_AGAIN_EVERY: Duration = Duration::from_secs(30);
/// Least time between two reads of what the kernel lost. Samples wait for a read; each takes a system call per program and processor time
/// that grows with the number of processors (`cargo xtask bench counters`).
const COUNT_EVERY: Duration = Duration::from_millis(100);
/// So long without a loss ends a storm.
const CALM_AFTER: Duration = Duration::from_secs(10);
/// A storm that goes on loses events many times a second.
const TELL_EVERY: Duration = Duration::from_secs(60);
const RESYNC_AT_LEAST_EVERY: Duration = Duration::from_secs(30);
/// With inotify, cgroups are walked this often, for what no event told.
const WALK_EVERY: Duration = Duration::from_secs(10);
/// People wait for samples, not samples for people.
const QUESTIONS_A_TURN: usize = 8;

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
    /// inotify has lost track: watch and scan anew.
    pub start_over: bool,
}

/// What the loop remembers from turn to turn.
struct Turn {
    /// What the GPU threads tell, in its order. Batches are attributed only once the tables are right up to their end: while events are
    /// lost they wait for a resync: 300 ms and what a scan takes.
    waiting: VecDeque<Observation>,
    questions: VecDeque<Question>,
    /// What the kernel lost, as last read, and when that was.
    lost: Lost,
    counted: Instant,
    /// The count of lost events that is repaired, if any is, and the one that the last scan was for.
    last_repaired: Option<u64>,
    attempted_until: u64,
    /// Up to here the tables are known to be right: a batch received by then may be attributed. Never later than the drain before the
    /// last read of the losses.
    clean_since: BootNs,
    published: Instant,
    /// The end of the last scan, and its duration.
    scanned: Instant,
    scan_took: Duration,
    walked: Instant,
    /// When the tables' sizes were last told.
    sized: Instant,
    /// Grows while scans are incomplete: what cannot be read now may not be readable soon.
    resync_after: Duration,
    /// While events are lost.
    storm: Option<Storm>,
    /// Checks entries against /proc for losses that no counter reports; the first repair is logged.
    liveness: Liveness,
    liveness_logged: bool,
}

#[derive(Clone, Copy)]
struct Storm {
    /// When it was last told of in the log.
    told: Instant,
    /// When events were last found lost.
    last: Instant,
}

impl Turn {
    /// A batch waits until losses up to its end were read.
    fn batch_waits(&self) -> bool {
        matches!(self.waiting.front(), Some(Observation::Gpu(batch)) if batch.ended > self.clean_since)
    }

    /// From one resync to the next while events are lost.
    fn spacing(&self) -> Duration {
        (RESYNC_TIMES * self.scan_took).clamp(RESYNC_EVERY, RESYNC_RAREST).max(self.scan_took)
    }

    fn count_is_due(&self) -> bool {
        let wanted = self.batch_waits() || self.published.elapsed() >= PUBLISH_EVERY;
        wanted && self.counted.elapsed() >= COUNT_EVERY
    }

    /// How long there is nothing to do, if nothing comes.
    fn idle(&self) -> Duration {
        if !self.questions.is_empty() {
            return Duration::ZERO;
        }
        let publish = PUBLISH_EVERY.saturating_sub(self.published.elapsed());
        if self.batch_waits() { publish.min(COUNT_EVERY.saturating_sub(self.counted.elapsed())) } else { publish }
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
        self.publish(&counted);
        self.size();
        self.health.set_ready();
        let now = Instant::now();
        let (waiting, questions) = (VecDeque::new(), VecDeque::new());
        let mut turn = Turn {
            waiting,
            questions,
            lost: counted,
            counted: now,
            last_repaired: complete.then_some(lost),
            attempted_until: lost,
            clean_since,
            published: now,
            scanned: now,
            scan_took: Duration::ZERO,
            walked: now,
            sized: now,
            resync_after: RESYNC_EVERY,
            storm: None,
            liveness: Liveness::default(),
            liveness_logged: false,
        };
        while !self.stop.load(Ordering::Relaxed) {
            self.wait(turn.idle());
            self.turn(&mut turn);
        }
    }

    fn turn(&mut self, turn: &mut Turn) {
        self.inbox.silence();
        while let Some(message) = self.inbox.take() {
            match message {
                Message::Observation(observation) => turn.waiting.push_back(observation),
                Message::Question(question) => turn.questions.push_back(question),
            }
        }
        // Every batch that waits was received before this.
        let before = boot_now();
        self.drain();
        self.resync(turn, before);
        while let Some(observation) =
            turn.waiting.pop_front_if(|told| !matches!(told, Observation::Gpu(b) if b.ended > turn.clean_since))
        {
            if let Observation::Gpu(batch) = &observation {
                self.sight(batch);
            }
            self.core.observe(observation);
        }
        for question in turn.questions.drain(..turn.questions.len().min(QUESTIONS_A_TURN)) {
            self.answer(question);
        }
        if turn.published.elapsed() >= PUBLISH_EVERY {
            turn.published = Instant::now();
            self.publish(&turn.lost);
            if turn.sized.elapsed() >= SIZE_EVERY {
                turn.sized = Instant::now();
                self.check_living(turn);
                self.size();
            }
        }
    }

    fn answer(&mut self, question: Question) {
        match question {
            Question::Explain(subject, answer) => {
                if let Subject::Pid(pid) = subject {
                    self.look_at(std::iter::once(pid));
                }
                // Nobody waits any more: nothing to do.
                let _sent = answer.send(query::known(&self.core.identity, &subject));
            }
            Question::Ids(begin, answer) => {
                let _sent = answer.send(query::ids(&self.core.identity, &begin));
            }
            Question::Processes(answer) => {
                let _sent = answer.send(query::living(&self.core.identity));
            }
        }
    }

    fn wait(&self, at_most: Duration) {
        let mut fds = vec![PollFd::from_borrowed_fd(self.inbox.fd(), PollFlags::IN)];
        fds.extend(self.tracker.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let timeout = Timespec { tv_sec: 0, tv_nsec: at_most.subsec_nanos().into() };
        // Interrupted is as good as ready: the turn looks at everything.
        let _ready = rustix::event::poll(&mut fds, Some(&timeout));
    }

    fn lost(&self) -> Lost {
        let Tracker::RawTracepoint(program) = &self.tracker else { return Lost::default() };
        let (lost, unread) = program.lost();
        match unread {
            Some(error) => self.health.degraded("loss-counters", &display_chain(&error)),
            None => self.health.recovered("loss-counters", "the counters of lost kernel events can be read again"),
        }
        lost
    }

    /// Repairs the tables after losses; without kernel events, looks again at what may have changed. `before`: the rings were
    /// drained past it.
    fn resync(&mut self, turn: &mut Turn, before: BootNs) {
        match &self.tracker {
            Tracker::RawTracepoint(_) => self.repair(turn, before),
            Tracker::Inotify(_) => {
                turn.clean_since = before;
                if turn.scanned.elapsed() >= RESCAN_EVERY {
                    let living: Vec<u32> = self.core.identity.processes.living().map(|(tgid, ..)| tgid.0).collect();
                    self.look_at(living.into_iter());
                    turn.scanned = Instant::now();
                }
                let walk_every = if self.start_over { RESYNC_EVERY } else { WALK_EVERY };
                if turn.walked.elapsed() >= walk_every {
                    if std::mem::take(&mut self.start_over) {
                        self.watch_anew();
                    }
                    let scan = self.scan();
                    self.merge(scan, None);
                    turn.walked = Instant::now();
                }
            }
            Tracker::Procfs => {
                turn.clean_since = before;
                if self.config.kernel_mode != KernelMode::Procfs && turn.walked.elapsed() >= WATCH_AGAIN_EVERY {
                    self.watch_again();
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

    /// The old watches first give their room up.
    fn watch_anew(&mut self) {
        self.tracker = Tracker::Procfs;
        match CgroupWatch::new(&self.layout) {
            Ok(watch) => self.tracker = Tracker::Inotify(watch),
            Err(error) => self.without_watches(&error),
        }
    }

    /// The next mode needs no watches; every second it sees what a lost one would have told.
    fn without_watches(&mut self, error: &WatchError) {
        self.tracker = Tracker::Procfs;
        self.health.set_kernel_mode(Mode::Procfs.name());
        let why = format!("kernel mode procfs: {}; no inotify: {}", Mode::Procfs.gives_up(), display_chain(error));
        self.health.degraded("kernel", &why);
    }

    /// Nothing that failed has failed for good: there may be room for watches again.
    fn watch_again(&mut self) {
        if let Ok(watch) = CgroupWatch::new(&self.layout) {
            self.tracker = Tracker::Inotify(watch);
            self.start_over = false;
            self.health.set_kernel_mode(Mode::Inotify.name());
            self.health.degraded("kernel", &format!("kernel mode inotify again: {}", Mode::Inotify.gives_up()));
            let mut scan = self.scan();
            // From here on only those that the driver names are followed.
            scan.end.all_processes = true;
            self.merge(scan, None);
        }
    }

    fn repair(&mut self, turn: &mut Turn, before: BootNs) {
        if !turn.count_is_due() {
            return;
        }
        // Read after the drain, so that no loss up to `before` is missed, and before the scan: what is lost during it is for the next.
        (turn.lost, turn.counted) = (self.lost(), Instant::now());
        let lost = turn.lost.sum();
        if turn.last_repaired == Some(lost) {
            turn.clean_since = before;
            if turn.storm.is_some_and(|storm| storm.last.elapsed() >= CALM_AFTER) {
                turn.storm = None;
                let repairs = self.core.identity.repairs;
                tracing::info!(lost, repairs, "no kernel event was lost for a while: the tables are whole");
            }
            return;
        }
        // The last scan did what it could for these; what it could not read is tried again, and keeps nothing waiting.
        let again = lost == turn.attempted_until;
        if again {
            turn.clean_since = before;
        }
        let spacing = if again { turn.resync_after } else { turn.spacing() };
        if turn.scanned.elapsed() < spacing {
            return;
        }
        turn.attempted_until = lost;
        self.health.resynced();
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
            self.tell_losses(turn, lost);
        }
    }

    fn tell_losses(&self, turn: &mut Turn, lost: u64) {
        let now = Instant::now();
        let told = turn.storm.map(|storm| storm.told).filter(|told| told.elapsed() < TELL_EVERY);
        if told.is_none() {
            let (repairs, skipped) = (self.core.identity.repairs, turn.lost.skipped);
            if lost > skipped {
                let ring_bytes = self.config.kernel_ring_bytes;
                tracing::warn!(
                    lost,
                    skipped,
                    repairs,
                    ring_bytes,
                    "kernel events are lost, the tables repaired by scans; raise kernel_ring_bytes"
                );
            } else {
                tracing::warn!(
                    skipped,
                    repairs,
                    "the kernel skipped runs of the agent's programs that came while another was at work on the same processor; scans repair \
                     the tables, nothing is to be done"
                );
            }
        }
        turn.storm = Some(Storm { told: told.unwrap_or(now), last: now });
    }

    /// All that this mode can see now.
    fn scan(&mut self) -> Scan {
        match &mut self.tracker {
            Tracker::RawTracepoint(program) => {
                let tasks = || program.tasks().map_err(|error| display_chain(&error));
                scan::of_kernel(&self.config.path_procfs, &self.layout, tasks)
            }
            // Processes are followed only once the driver has named them.
            Tracker::Inotify(_) => scan::of_cgroups(&self.layout),
            Tracker::Procfs => scan::of_proc(&self.config.path_procfs, &self.layout),
        }
    }

    fn merge(&mut self, mut scan: Scan, repairs_since: Option<BootNs>) {
        self.drain();
        match scan.problems.first() {
            None => self.health.recovered("scan", "cgroups and processes can all be read again"),
            Some(first) if !self.health.is_degraded("scan") => {
                let n = scan.problems.len();
                self.health.degraded("scan", &format!("{n} cgroups or processes cannot be read, such as {first}"));
            }
            Some(_) => {}
        }
        scan.end.repairs_since = repairs_since;
        self.core.observe(Observation::ScanBegan);
        for fact in scan.facts {
            self.core.observe(fact);
        }
        self.core.observe(Observation::ScanEnded(scan.end));
        self.tell_containers();
    }

    /// Without process events: who is it that the driver names? Each time, for a pid may be another's by now.
    fn sight(&mut self, batch: &GpuBatch) {
        if self.tracker.mode() == Mode::RawTracepoint {
            return;
        }
        let listed = batch.processes.iter().flatten().map(|p| p.pid);
        let named: HashSet<u32> = batch.process_samples.iter().map(|s| s.pid).chain(listed).collect();
        self.look_at(named.into_iter());
    }

    /// Without process events: looks into /proc.
    fn look_at(&mut self, pids: impl Iterator<Item = u32>) {
        if self.tracker.mode() == Mode::RawTracepoint {
            return;
        }
        for fact in scan::sight(&self.config.path_procfs, &self.layout, pids).facts {
            self.core.observe(fact);
        }
        self.tell_containers();
    }

    /// Checks some entries of the living against /proc. The rings were drained in this turn.
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
        if !dead.is_empty() {
            self.remove_dead(&dead, now);
            if !std::mem::replace(&mut turn.liveness_logged, true) {
                let example = dead.first().map(|tgid| tgid.0);
                tracing::warn!(
                    example,
                    "dead processes were in the table though no loss was counted; removed, more are counted in \
                     gpu_sampler_liveness_repairs_total"
                );
            }
        }
    }

    fn remove_dead(&mut self, dead: &[Tgid], began: BootNs) {
        for tgid in dead {
            self.core.observe(Observation::ProcessGone { tgid: *tgid, began });
        }
        // Another process may have the pid by now.
        let pids = dead.iter().map(|tgid| tgid.0);
        for fact in scan::sight(&self.config.path_procfs, &self.layout, pids).facts {
            self.core.observe(fact);
        }
        self.health.liveness_repaired(dead.len());
        self.tell_containers();
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
        self.tell_containers();
    }

    fn tell_containers(&mut self) {
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
        self.health.tables(&self.core.identity, watches);
    }

    fn publish(&mut self, lost: &Lost) {
        self.health.watch_calls(boot_now());
        self.core.observe(Observation::ClockAdvanced { at: boot_now(), wall: wall_now() });
        // The only place where facts leave the core: they go to whoever records.
        self.recorder.tell(self.core.take_facts());
        if let Tracker::RawTracepoint(program) = &self.tracker {
            self.health.kernel_events(&program.rings.seen, lost, program.rings.drained);
        }
        self.snapshot.store(Arc::new(self.core.snapshot()));
    }
}
