//! The core thread: drains both kernel rings, merges scans, owns identity, attribution and aggregation, publishes snapshots.
//!
//! ```text
//!  poll(rings | inotify, inbox) -> drain -> lost events? -> resync (scan, drain, merge, sweep)
//!                                        -> batches of samples, only after the rings were drained past them and nothing is lost
//! ```

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use rustix::event::{PollFd, PollFlags, Timespec};
use sampler_core::aggregate::Core;
use sampler_core::identity::ContainerChange;
use sampler_core::observation::{CgroupChange, GpuBatch, Observation};
use sampler_core::snapshot::Snapshot;
use sampler_core::units::BootNs;
use tokio::sync::mpsc::UnboundedSender;

use crate::config::Config;
use crate::explain::{self, Subject};
use crate::health::Health;
use crate::inbox::{Inbox, Message};
use crate::labels::ContainerEvent;
use crate::observe::clock::{boot_now, wall_now};
use crate::observe::kernel::scan::{self, Scan};
use crate::observe::kernel::watch::{CgroupWatch, Read};
use crate::observe::kernel::{Mode, Tracker};

const PUBLISH_EVERY: Duration = Duration::from_millis(250);
/// Without kernel events, what is known of processes is looked at again this often; without inotify, cgroups and all processes too.
const RESCAN_EVERY: Duration = Duration::from_secs(1);
/// Between two resyncs, so that a storm that keeps losing events leaves time for anything else.
const RESYNC_EVERY: Duration = Duration::from_millis(300);
/// A storm that goes on loses events many times a second.
const TELL_EVERY: Duration = Duration::from_secs(60);
/// A process that the driver names is looked at this often.
const SIGHT_EVERY_NS: u64 = 1_000_000_000;

pub struct CoreThread {
    pub core: Core,
    pub config: Arc<Config>,
    pub layout: scan::Layout,
    pub tracker: Tracker,
    pub inbox: Inbox,
    pub health: Arc<Health>,
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    pub containers: UnboundedSender<ContainerEvent>,
    pub stop: Arc<AtomicBool>,
}

/// What the loop remembers from turn to turn.
struct Turn {
    /// Batches not yet attributed: while events are lost they wait for a resync, which is 300 ms at most.
    waiting: VecDeque<GpuBatch>,
    lost: u64,
    /// Up to here the tables are known to be right: a batch received by then may be attributed.
    sound: BootNs,
    published: Instant,
    scanned: Instant,
    sighted: HashMap<u32, BootNs>,
    /// When losses were last told of in the log.
    told: Option<Instant>,
}

impl CoreThread {
    pub fn run(mut self) {
        let sound = boot_now();
        let lost = self.lost();
        self.rescan(None);
        self.publish();
        self.health.set_ready();
        let now = Instant::now();
        let (waiting, sighted) = (VecDeque::new(), HashMap::new());
        let mut turn = Turn { waiting, lost, sound, published: now, scanned: now, sighted, told: None };
        while !self.stop.load(Ordering::Relaxed) {
            self.wait(PUBLISH_EVERY.saturating_sub(turn.published.elapsed()));
            self.turn(&mut turn);
        }
    }

    fn turn(&mut self, turn: &mut Turn) {
        self.inbox.silence();
        while let Some(message) = self.inbox.take() {
            match message {
                Message::Observation(Observation::Gpu(batch)) => turn.waiting.push_back(batch),
                Message::Observation(other) => self.core.observe(other),
                // Nobody waits any more: nothing to do.
                Message::Explain(subject, answer) => {
                    self.drain();
                    if let Subject::Pid(pid) = subject {
                        self.look_at(std::iter::once(pid));
                    }
                    let _sent = answer.send(explain::known(&self.core.identity, &subject));
                }
                Message::Processes(answer) => {
                    self.drain();
                    let _sent = answer.send(explain::living(&self.core.identity));
                }
            }
        }
        // Every batch that waits was received before this.
        let before = boot_now();
        self.drain();
        self.resync(turn, before);
        while let Some(batch) = turn.waiting.pop_front_if(|batch| batch.ended <= turn.sound) {
            self.sight(&batch, &mut turn.sighted);
            self.core.observe(Observation::Gpu(batch));
        }
        if turn.published.elapsed() >= PUBLISH_EVERY {
            turn.published = Instant::now();
            turn.sighted.retain(|_, at| boot_now().saturating_since(*at) < SIGHT_EVERY_NS);
            self.publish();
        }
    }

    fn wait(&self, at_most: Duration) {
        let mut fds = vec![PollFd::from_borrowed_fd(self.inbox.fd(), PollFlags::IN)];
        fds.extend(self.tracker.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let timeout = Timespec { tv_sec: 0, tv_nsec: at_most.subsec_nanos().into() };
        // Interrupted is as good as ready: the turn looks at everything.
        let _ready = rustix::event::poll(&mut fds, Some(&timeout));
    }

    fn lost(&self) -> u64 {
        match &self.tracker {
            Tracker::RawTracepoint(program) => program.lost().iter().sum(),
            Tracker::Inotify(_) | Tracker::Procfs => 0,
        }
    }

    /// Repairs the tables after losses; without kernel events, looks again at what may have changed. `before`: the rings were
    /// drained past it.
    fn resync(&mut self, turn: &mut Turn, before: BootNs) {
        match &self.tracker {
            Tracker::RawTracepoint(_) => {
                // Read before the scan: what is lost during it is for the next one.
                let lost = self.lost();
                if lost == turn.lost {
                    turn.sound = before;
                } else if turn.scanned.elapsed() >= RESYNC_EVERY {
                    self.health.resynced();
                    let began = boot_now();
                    self.rescan(Some(turn.sound));
                    (turn.lost, turn.sound, turn.scanned) = (lost, began, Instant::now());
                    if turn.told.is_none_or(|at| at.elapsed() >= TELL_EVERY) {
                        turn.told = Some(Instant::now());
                        let repairs = self.core.identity.repairs;
                        tracing::warn!(lost, repairs, "kernel events were lost and the tables repaired; raise kernel_ring_bytes");
                    }
                }
            }
            tracker => {
                let processes_only = matches!(tracker, Tracker::Inotify(_));
                turn.sound = before;
                if turn.scanned.elapsed() < RESCAN_EVERY {
                    return;
                }
                if processes_only {
                    let living: Vec<u32> = self.core.identity.processes.living().map(|(tgid, ..)| tgid.0).collect();
                    let scan = scan::sight(&self.config.path_procfs, &self.layout, living.into_iter());
                    self.merge(scan, None);
                } else {
                    self.rescan(None);
                }
                turn.scanned = Instant::now();
            }
        }
    }

    fn rescan(&mut self, repairs_since: Option<BootNs>) {
        let mut scan = scan::scan(&self.config.path_procfs, &self.layout);
        if self.tracker.mode() == Mode::Inotify {
            // Processes are followed only once the driver has named them.
            scan.facts.retain(|fact| !matches!(fact, Observation::ProcessSeen(_)));
            scan.end.all_processes = false;
        }
        self.merge(scan, repairs_since);
    }

    fn merge(&mut self, mut scan: Scan, repairs_since: Option<BootNs>) {
        self.drain();
        for problem in &scan.problems {
            self.health.degraded("scan", problem);
        }
        scan.end.repairs_since = repairs_since;
        self.core.observe(Observation::ScanBegan);
        for fact in scan.facts {
            self.core.observe(fact);
        }
        self.core.observe(Observation::ScanEnded(scan.end));
        self.tell_containers();
    }

    /// Without process events: who is it that the driver names?
    fn sight(&mut self, batch: &GpuBatch, sighted: &mut HashMap<u32, BootNs>) {
        if self.tracker.mode() == Mode::RawTracepoint {
            return;
        }
        let listed = batch.processes.iter().flatten().map(|p| p.pid);
        let named: HashSet<u32> = batch.rows.iter().map(|row| row.pid).chain(listed).collect();
        let now = boot_now();
        let due = |pid: &u32| sighted.get(pid).is_none_or(|at| now.saturating_since(*at) >= SIGHT_EVERY_NS);
        let due: Vec<u32> = named.into_iter().filter(due).collect();
        sighted.extend(due.iter().map(|pid| (*pid, now)));
        self.look_at(due.into_iter());
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

    fn drain(&mut self) {
        let (core, health) = (&mut self.core, &self.health);
        let mut start_over = false;
        match &mut self.tracker {
            Tracker::RawTracepoint(program) => program.rings.drain(|observation| {
                if let Observation::Cgroup(fact) = &observation
                    && fact.change == CgroupChange::Created
                {
                    health.identified(boot_now().saturating_since(fact.at));
                }
                core.observe(observation);
            }),
            Tracker::Inotify(watch) => {
                let read = watch.read(&mut |fact| core.observe(Observation::Cgroup(fact)));
                match read {
                    Ok(read) => start_over = read == Read::StartOver,
                    Err(error) => health.degraded("inotify", &format!("{:#}", anyhow::Error::from(error))),
                }
            }
            Tracker::Procfs => {}
        }
        if start_over {
            self.watch_again();
        }
        self.tell_containers();
    }

    fn watch_again(&mut self) {
        match CgroupWatch::new(&self.layout) {
            Ok(watch) => {
                self.tracker = Tracker::Inotify(watch);
                self.rescan(None);
            }
            Err(error) => self.health.degraded("inotify", &format!("{:#}", anyhow::Error::from(error))),
        }
    }

    fn tell_containers(&mut self) {
        for change in self.core.take_container_changes() {
            let event = match change {
                ContainerChange::Appeared(record) => ContainerEvent::Appeared(record),
                ContainerChange::Gone(key, at) => ContainerEvent::Gone(key, at),
            };
            // The label service ends only with the process.
            if self.containers.send(event).is_err() {
                return;
            }
        }
    }

    fn publish(&mut self) {
        self.core.observe(Observation::Tick { at: boot_now(), wall: wall_now() });
        if let Tracker::RawTracepoint(program) = &self.tracker {
            self.health.kernel_events(&program.rings.seen, &program.lost(), program.rings.drained);
        }
        self.health.tables(&self.core.identity);
        self.snapshot.store(Arc::new(self.core.snapshot()));
    }
}
