//! One GPU's ledger: ticks in, seconds out.
//!
//! ```text
//!  device tick (busy % of its period) + the pid that a process row names at the same instant
//!      idle            -> idle, booked at once
//!      busy, pid       -> that pid's owner, booked at once
//!      busy, no pid    -> waits until its 10 s window closes, then divided over the window's pid ticks, or no_pid
//! ```
//! Crediting only ticks that carry a pid would credit the square of the duty cycle: the pid is whoever was on the engine at one
//! instant, the utilization is the whole period's. Busy time and what it is credited to are booked together, so their sums
//! agree at every instant; what waits is in no state yet, for at most one window.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::clock::GpuClock;
use crate::identity::{Identity, KEEP_EXITED_NS, Verdict};
use crate::observation::{DeviceTick, GpuBatch, ProcessRow, RunningProcess};
use crate::snapshot::{DeviceReadings, GpuInfo, GpuTime, GpuView, Reason};
use crate::units::{BootNs, ContainerKey, GpuNs, WallTime};

/// Width of the windows over which pid-less busy time is divided, and of the duty cycle.
pub const WINDOW_NS: u64 = 10_000_000_000;
/// A gap above this many periods holds lost ticks.
const GAP_FACTOR: f64 = 1.5;
/// A tick waits this long for its process row, which another call brings.
const SETTLE_NS: u64 = 400_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum User {
    Container(ContainerKey),
    Nobody(Reason),
}

#[derive(Clone, Copy, Debug)]
struct Tick {
    at: GpuNs,
    span_ns: u64,
    busy_ns: f64,
    user: Option<User>,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Credit {
    pub ns: f64,
    pub samples: u64,
}

/// A container's part of the last window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Duty {
    pub percent: f64,
    pub stderr: f64,
}

#[derive(Debug)]
pub struct Gpu {
    pub info: Arc<GpuInfo>,
    clock: GpuClock,
    readings: DeviceReadings,
    watermark: Option<GpuNs>,
    pending_ticks: VecDeque<DeviceTick>,
    rows: VecDeque<ProcessRow>,
    row_watermark: HashMap<u32, GpuNs>,
    recent: VecDeque<Tick>,
    waiting: Vec<Tick>,
    window_pids: HashMap<User, u64>,
    window_end: Option<GpuNs>,
    time: [f64; 4],
    unattributed: [f64; Reason::ALL.len()],
    credits: HashMap<ContainerKey, Credit>,
    memory: HashMap<ContainerKey, u64>,
    gaps: u64,
    last_wall: Option<WallTime>,
    last_answer: Option<BootNs>,
}

const BUSY: usize = 0;
const IDLE: usize = 1;
const UNOBSERVED: usize = 2;
const UNSUPPORTED: usize = 3;

impl Gpu {
    pub fn new(info: Arc<GpuInfo>) -> Self {
        Self {
            info,
            clock: GpuClock::default(),
            readings: DeviceReadings::default(),
            watermark: None,
            pending_ticks: VecDeque::new(),
            rows: VecDeque::new(),
            row_watermark: HashMap::new(),
            recent: VecDeque::new(),
            waiting: Vec::new(),
            window_pids: HashMap::new(),
            window_end: None,
            time: [0.0; 4],
            unattributed: [0.0; Reason::ALL.len()],
            credits: HashMap::new(),
            memory: HashMap::new(),
            gaps: 0,
            last_wall: None,
            last_answer: None,
        }
    }

    pub fn apply(&mut self, batch: &GpuBatch, identity: &Identity) {
        if let Some(readings) = batch.readings {
            self.readings = readings;
        }
        if let Some(processes) = &batch.processes {
            self.memory(processes, batch, identity);
        }
        if !batch.supported {
            if let Some(last) = self.last_answer {
                self.time[UNSUPPORTED] += batch.ended.saturating_since(last) as f64;
            }
            self.last_answer = Some(batch.ended);
            return;
        }
        if let Some(newest) = batch.ticks.iter().map(|t| t.at).max() {
            self.clock.polled(newest, batch.ended);
            self.last_wall = Some(batch.wall);
            if self.watermark.is_none() {
                // What the ring held before the start is nobody's: it only sets the watermarks.
                self.watermark = Some(newest);
                self.window_end = Some(GpuNs(newest.0.saturating_add(WINDOW_NS)));
                for row in &batch.rows {
                    self.row_watermark.insert(row.pid, row.at);
                }
                return;
            }
        }
        let Some(watermark) = self.watermark else { return };
        let newest_queued = self.pending_ticks.back().map_or(watermark, |t| t.at);
        let mut ticks: Vec<DeviceTick> = batch.ticks.iter().copied().filter(|t| t.at > newest_queued).collect();
        ticks.sort_by_key(|t| t.at);
        self.pending_ticks.extend(ticks);
        for row in &batch.rows {
            let seen = self.row_watermark.entry(row.pid).or_insert(watermark);
            if row.at > *seen {
                *seen = row.at;
                self.rows.push_back(*row);
            }
        }
        self.settle(batch.ended, identity);
    }

    /// Books every tick old enough that its process row, if it has one, has been read.
    fn settle(&mut self, now: BootNs, identity: &Identity) {
        while let Some(&tick) = self.pending_ticks.front() {
            let Some(at) = self.clock.boot(tick.at) else { return };
            if now.saturating_since(at) < SETTLE_NS {
                return;
            }
            self.pending_ticks.pop_front();
            self.book(tick, at, identity);
        }
    }

    fn book(&mut self, tick: DeviceTick, at: BootNs, identity: &Identity) {
        let Some(watermark) = self.watermark else { return };
        let gap = tick.at.0.saturating_sub(watermark.0);
        self.watermark = Some(tick.at);
        let span_ns = match self.clock.period_ns() {
            Some(period) if gap as f64 > GAP_FACTOR * period as f64 => {
                self.gaps += 1;
                self.time[UNOBSERVED] += (gap - period) as f64;
                period
            }
            _ => {
                self.clock.gap(gap);
                gap
            }
        };
        self.close_windows(tick.at);
        let busy_ns = span_ns as f64 * f64::from(tick.busy_percent.min(100)) / 100.0;
        self.time[IDLE] += span_ns as f64 - busy_ns;
        let row = self.row_at(tick.at);
        let user = row.map(|row| self.user(row.pid, at, span_ns, identity));
        let tick = Tick { at: tick.at, span_ns, busy_ns, user };
        if let Some(user) = user {
            *self.window_pids.entry(user).or_default() += 1;
            self.credit(user, busy_ns, 1);
        } else if busy_ns > 0.0 {
            self.waiting.push(tick);
        }
        self.recent.push_back(tick);
        while self.recent.front().is_some_and(|t| tick.at.0 - t.at.0 >= WINDOW_NS) {
            self.recent.pop_front();
        }
    }

    /// The row of this tick; rows that no tick claims are dropped.
    fn row_at(&mut self, at: GpuNs) -> Option<ProcessRow> {
        let mut found = None;
        self.rows.retain(|row| {
            if row.at == at {
                found = Some(*row);
            }
            row.at > at
        });
        found
    }

    fn user(&self, pid: u32, at: BootNs, span_ns: u64, identity: &Identity) -> User {
        if pid == 0 || pid == u32::MAX {
            return User::Nobody(Reason::InvalidPid);
        }
        let (from, to) = self.clock.named_within(at, span_ns);
        match identity.resolve(pid, from, to) {
            Verdict::Container(key) => User::Container(key),
            Verdict::Host => User::Nobody(Reason::Host),
            Verdict::Unknown => User::Nobody(Reason::PidUnknown),
            Verdict::Lost => User::Nobody(Reason::Lost),
            Verdict::Ambiguous => User::Nobody(Reason::Ambiguous),
        }
    }

    fn credit(&mut self, user: User, ns: f64, samples: u64) {
        self.time[BUSY] += ns;
        match user {
            User::Container(key) => {
                let credit = self.credits.entry(key).or_default();
                credit.ns += ns;
                credit.samples += samples;
            }
            User::Nobody(reason) => self.unattributed[reason as usize] += ns,
        }
    }

    fn close_windows(&mut self, now: GpuNs) {
        let Some(end) = self.window_end else { return };
        if now < end {
            return;
        }
        let pool: f64 = std::mem::take(&mut self.waiting).iter().map(|t| t.busy_ns).sum();
        let pids = std::mem::take(&mut self.window_pids);
        for (user, ns) in divide(pool, &pids) {
            self.credit(user, ns, 0);
        }
        self.window_end = Some(GpuNs(now.0.saturating_add(WINDOW_NS)));
    }

    fn memory(&mut self, processes: &[RunningProcess], batch: &GpuBatch, identity: &Identity) {
        self.memory.clear();
        for process in processes {
            let user = identity.resolve(process.pid, batch.began, batch.ended);
            if let (Verdict::Container(key), Some(bytes)) = (user, process.memory_bytes) {
                *self.memory.entry(key).or_default() += bytes;
            }
        }
    }

    /// Duty cycle of the last window per container; pid-less busy time divided as at a window's close.
    pub fn duties(&self) -> (HashMap<ContainerKey, Duty>, Option<f64>) {
        let span: f64 = self.recent.iter().map(|t| t.span_ns as f64).sum();
        if span <= 0.0 {
            return (HashMap::new(), None);
        }
        let busy: f64 = self.recent.iter().map(|t| t.busy_ns).sum();
        let mut seconds: HashMap<User, f64> = HashMap::new();
        let mut pids: HashMap<User, u64> = HashMap::new();
        let mut pool = 0.0;
        for tick in &self.recent {
            match tick.user {
                Some(user) => {
                    *seconds.entry(user).or_default() += tick.busy_ns;
                    *pids.entry(user).or_default() += 1;
                }
                None => pool += tick.busy_ns,
            }
        }
        for (user, ns) in divide(pool, &pids) {
            *seconds.entry(user).or_default() += ns;
        }
        let n = pids.values().sum::<u64>().max(1) as f64;
        let mut duties = HashMap::new();
        for (user, ns) in seconds {
            if let User::Container(key) = user {
                let share = if busy > 0.0 { (ns / busy).clamp(0.0, 1.0) } else { 0.0 };
                let stderr = 100.0 * busy / span * (share * (1.0 - share) / n).sqrt();
                duties.insert(key, Duty { percent: 100.0 * ns / span, stderr });
            }
        }
        (duties, Some(busy / span))
    }

    pub fn credits(&self) -> &HashMap<ContainerKey, Credit> {
        &self.credits
    }

    pub fn container_memory(&self) -> &HashMap<ContainerKey, u64> {
        &self.memory
    }

    pub fn forget(&mut self, gone: impl Fn(&ContainerKey) -> bool) {
        self.credits.retain(|key, _| !gone(key));
        self.memory.retain(|key, _| !gone(key));
        // A row that old is not in the driver's ring any more, so it cannot come again.
        let newest = self.watermark.map_or(0, |at| at.0);
        self.row_watermark.retain(|_, at| newest.saturating_sub(at.0) < KEEP_EXITED_NS);
    }

    pub fn period_ns(&self) -> Option<u64> {
        self.clock.period_ns()
    }

    pub fn view(&self, utilization_ratio: Option<f64>) -> GpuView {
        let s = 1e-9;
        GpuView {
            info: Arc::clone(&self.info),
            readings: self.readings,
            time: GpuTime {
                busy: self.time[BUSY] * s,
                idle: self.time[IDLE] * s,
                unobserved: self.time[UNOBSERVED] * s,
                unsupported: self.time[UNSUPPORTED] * s,
            },
            unattributed: self.unattributed.map(|ns| ns * s),
            utilization_ratio,
            last_sample: self.last_wall,
            sample_period_seconds: self.clock.period_ns().map(|ns| ns as f64 * s),
            sample_gaps: self.gaps,
        }
    }
}

/// Pid-less busy time over the users that the window's pid ticks name, or `no_pid` where there are none.
fn divide(pool: f64, pids: &HashMap<User, u64>) -> Vec<(User, f64)> {
    let n: u64 = pids.values().sum();
    if pool <= 0.0 {
        return Vec::new();
    }
    if n == 0 {
        return vec![(User::Nobody(Reason::NoPid), pool)];
    }
    pids.iter().map(|(user, count)| (*user, pool * *count as f64 / n as f64)).collect()
}
