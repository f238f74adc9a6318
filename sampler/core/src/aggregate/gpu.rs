//! One device's ledger: its samples in, seconds out.
//!
//! ```text
//!  poll -> ticks and rows wait until late rows are there -> tick + row -> user -> lane (whose) and wall (which state)
//!  other engines' ticks, seconds later                   -> tick + row -> user -> a lane of their own
//!  no poll for longer than the driver's ring holds       -> unobserved
//! ```

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use super::WINDOW_NS;
use super::clock::GpuClock;
use super::holders::Holders;
use super::lane::{Booked, Credit, Lane, Tick};
use super::user::{Named, User};
use super::wall::Wall;
use super::windows::Windows;
use crate::identity::Identity;
use crate::observation::{Answer, DeviceTick, EngineTick, GpmInterval, GpuBatch, ProcessRow};
use crate::recover::{Grid, Rejected};
use crate::snapshot::{DeviceReadings, Engine, EngineTime, GpuInfo, GpuView, Reason, THROTTLE_REASONS, WindowShares};
use crate::units::{BootNs, ContainerKey, GpuNs, WallTime};

/// A tick waits this long for its process row, which another call brings, and two periods at least.
const SETTLE_NS: u64 = 400_000_000;
/// Rows wait for the ticks of engines that are read seconds later.
const ROWS_NS: u64 = 5_000_000_000;
/// A row belongs to a tick that is this many periods away at most.
const NEAR_PERIODS: f64 = 0.5;
/// What a driver's ring may still give: 72 samples of about 167 ms, and what is left for delays. Older time without an answer is unobserved.
const RING_NS: u64 = 15_000_000_000;
/// Nothing was observed for so long: rates of the last window are not known.
const STALE_NS: u64 = 3_000_000_000;
/// Variances are added up once in a while: it takes a look at the last minutes.
const VARIANCE_NS: u64 = 2_000_000_000;
/// Readings further apart say nothing about the time between.
const READINGS_NS: u64 = 10_000_000_000;
/// Ticks of other engines that wait, at most: what their rings hold, twice.
const ENGINE_TICKS: usize = 2 * 72 * Engine::ALL.len();
/// Kinds of XID errors kept apart; there are about 150.
const XIDS: usize = 256;

/// A stretch of the last window.
#[derive(Clone, Copy, Debug)]
struct Recent {
    at: BootNs,
    span_ns: f64,
    busy_ns: f64,
    user: Option<User>,
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
    pub gone: Option<BootNs>,
    clock: GpuClock,
    grid: Grid,
    wall: Wall,
    readings: DeviceReadings,
    holders: Holders,
    /// The first read sets watermarks only.
    first_read: bool,
    watermark: Option<GpuNs>,
    /// The ring is dry, because the device is idle.
    dry: bool,
    pending: VecDeque<DeviceTick>,
    engine_pending: VecDeque<EngineTick>,
    rows: VecDeque<(ProcessRow, bool)>,
    lanes: Vec<Lane>,
    sampled: [bool; Engine::ALL.len()],
    recent: VecDeque<Recent>,
    windows: Windows,
    gaps: u64,
    overruns: u64,
    rejected: [u64; Rejected::ALL.len()],
    off_grid: u64,
    throttled: Option<(BootNs, [f64; THROTTLE_REASONS.len()])>,
    xids: BTreeMap<u64, u64>,
    last_wall: Option<WallTime>,
    last_batch: BootNs,
    variance_at: BootNs,
}

const COMPUTE: usize = Engine::Compute as usize;

impl Gpu {
    pub fn new(info: Arc<GpuInfo>, at: BootNs) -> Self {
        Self {
            info,
            gone: None,
            clock: GpuClock::default(),
            grid: Grid::default(),
            wall: Wall::new(at),
            readings: DeviceReadings::default(),
            holders: Holders::default(),
            first_read: true,
            watermark: None,
            dry: false,
            pending: VecDeque::new(),
            engine_pending: VecDeque::new(),
            rows: VecDeque::new(),
            lanes: Engine::ALL.iter().map(|_| Lane::default()).collect(),
            sampled: [false; Engine::ALL.len()],
            recent: VecDeque::new(),
            windows: Windows::default(),
            gaps: 0,
            overruns: 0,
            rejected: [0; Rejected::ALL.len()],
            off_grid: 0,
            throttled: None,
            xids: BTreeMap::new(),
            last_wall: None,
            last_batch: at,
            variance_at: at,
        }
    }

    /// Found again: its ring is another, its clock may be.
    pub fn reopen(&mut self, info: Arc<GpuInfo>, at: BootNs) {
        if self.gone.take().is_some() {
            self.wall.resume(at);
        }
        self.info = info;
        (self.first_read, self.dry) = (true, false);
        self.grid = Grid::default();
        self.clock.forget();
        self.restart();
    }

    /// What is waiting belongs to a ring or a clock that is no more.
    fn restart(&mut self) {
        self.watermark = None;
        self.pending.clear();
        self.engine_pending.clear();
        self.rows.clear();
        let mut booked = Vec::new();
        for (engine, lane) in self.lanes.iter_mut().enumerate() {
            let mut of_lane = Vec::new();
            lane.restart(&mut of_lane);
            if engine == COMPUTE {
                booked = of_lane;
            }
        }
        self.count(&booked);
    }

    pub fn gone(&mut self, at: BootNs) {
        self.gone = Some(at);
        self.wall.unobserved_until(at);
        self.restart();
        self.readings = DeviceReadings::default();
        self.holders = Holders::default();
    }

    pub fn apply(&mut self, batch: &GpuBatch, identity: &Identity) {
        // A call was under way when it went.
        if self.gone.is_some() {
            return;
        }
        if let Some(readings) = batch.readings {
            self.read(readings, batch.ended);
        }
        let silent = batch.answer == Answer::Failed && batch.readings == Some(DeviceReadings::default());
        if let Some(processes) = &batch.processes {
            self.holders.listed(processes, batch.began, batch.ended, identity);
        } else if silent {
            // A device that tells nothing at all does not tell who holds it either.
            self.holders = Holders::default();
        }
        for (sum, n) in self.rejected.iter_mut().zip(batch.rejected) {
            *sum += u64::from(n);
        }
        if let Some(gpm) = batch.gpm {
            self.measured(gpm, batch.wall);
        } else {
            match batch.answer {
                Answer::Samples => self.samples(batch, identity),
                Answer::Dry { idle } => self.dry(idle, batch, identity),
                // A MIG device is measured in intervals: the next may follow.
                Answer::Unsupported => {
                    self.settle(batch.ended, identity);
                    self.wall.unsupported_until(batch.ended);
                    // No more ticks come for what waits.
                    self.decide(batch.ended, identity);
                }
                Answer::Failed => self.settle(batch.ended, identity),
            }
        }
        self.last_batch = batch.ended;
    }

    fn samples(&mut self, batch: &GpuBatch, identity: &Identity) {
        if batch.stepped {
            self.clock.stepped();
            self.restart();
        }
        let newest = batch.ticks.iter().map(|t| t.at).max();
        match newest {
            Some(newest) => {
                self.clock.polled(newest, batch.began, batch.ended, self.grid.period_or_most_ns());
                self.last_wall = Some(batch.wall);
            }
            None => self.clock.silent(batch.began),
        }
        if std::mem::take(&mut self.first_read) {
            // What the ring held before the start is nobody's: it only sets the watermarks.
            self.watermark = newest;
            if let Some(at) = newest.and_then(|newest| self.clock.boot(newest)) {
                self.wall.unobserved_until(at);
            }
            return;
        }
        let known = self.pending.back().map(|t| t.at).or(self.watermark);
        self.pending.extend(batch.ticks.iter().filter(|t| known.is_none_or(|known| t.at > known)));
        self.engine_pending.extend(&batch.engine_ticks);
        self.rows.extend(batch.rows.iter().map(|row| (*row, false)));
        self.settle(batch.ended, identity);
    }

    /// The ring runs dry on an idle device.
    fn dry(&mut self, idle: bool, batch: &GpuBatch, identity: &Identity) {
        self.clock.silent(batch.began);
        self.settle(batch.ended, identity);
        self.first_read = false;
        if !self.pending.is_empty() {
            return;
        }
        // A sample that comes after all is not older than a period and what it takes to serve it.
        let until = batch.ended.minus(2 * self.grid.period_or_most_ns() + SETTLE_NS);
        if until <= self.wall.until() {
            return;
        }
        self.watermark = None;
        self.dry = idle;
        if idle {
            self.idle_until(until);
        } else {
            self.wall.unobserved_until(until);
        }
        self.decide(until, identity);
    }

    fn idle_until(&mut self, at: BootNs) {
        let ns = self.wall.idle_until(at);
        if ns > 0.0 {
            self.observed(Recent { at, span_ns: ns, busy_ns: 0.0, user: None });
        }
    }

    /// Books every tick old enough that its process row, if it has one, has been read.
    fn settle(&mut self, now: BootNs, identity: &Identity) {
        let patience = SETTLE_NS.max(2 * self.grid.period_or_most_ns());
        while let Some(&tick) = self.pending.front() {
            let Some(at) = self.clock.boot(tick.at) else { return };
            if now.saturating_since(at) < patience {
                break;
            }
            self.pending.pop_front();
            self.book(tick, at, now, identity);
        }
        self.settle_engines(now, patience, identity);
        let Some(newest) = self.watermark else { return };
        while let Some((_, claimed)) = self.rows.pop_front_if(|(row, _)| newest.0.saturating_sub(row.at.0) > ROWS_NS) {
            self.off_grid += u64::from(!claimed);
        }
        if now.saturating_since(self.variance_at) > VARIANCE_NS {
            self.variance_at = now;
            for lane in &mut self.lanes {
                lane.settle_variance(now, identity);
            }
        }
    }

    fn book(&mut self, tick: DeviceTick, at: BootNs, now: BootNs, identity: &Identity) {
        let gap_ns = self.watermark.map(|last| tick.at.0.saturating_sub(last.0));
        let period = self.grid.period_or_most_ns();
        self.watermark = Some(tick.at);
        if let Some(gap_ns) = gap_ns {
            self.grid.gap(gap_ns);
        }
        if std::mem::take(&mut self.dry) {
            // The first sample after idleness: up to its own period there was none to take.
            self.idle_until(at.minus(period));
        }
        let Some(span) = self.wall.tick(at, gap_ns, period) else { return };
        if span.gap && gap_ns.is_some() {
            self.gaps += 1;
            // Nobody looked for so long that the ring went round.
            self.overruns += u64::from(now.saturating_since(at) > RING_NS / 2);
        }
        if !tick.looked {
            self.claim(tick.at);
            self.wall.unobserved(span.ns);
            return;
        }
        let busy_ns = span.ns * f64::from(tick.busy_percent.min(100)) / 100.0;
        let named = self.named(COMPUTE, tick.at, at, span.ns as u64, identity);
        self.wall.idle(span.ns - busy_ns);
        self.observed(Recent { at, span_ns: span.ns, busy_ns, user: named.map(|n| n.user) });
        let mut booked = Vec::new();
        let otherwise = self.holders.sole_user();
        if let Some(lane) = self.lanes.get_mut(COMPUTE) {
            lane.tick(Tick { at, span_ns: span.ns, busy_ns, named, otherwise }, identity, &mut booked);
        }
        self.count(&booked);
    }

    fn observed(&mut self, recent: Recent) {
        self.windows.observed(recent.at, recent.span_ns);
        self.recent.push_back(recent);
        while self.recent.front().is_some_and(|r| recent.at.saturating_since(r.at) >= WINDOW_NS) {
            self.recent.pop_front();
        }
    }

    fn count(&mut self, booked: &[Booked]) {
        for one in booked {
            if let User::Container(key) = one.user {
                self.windows.credited(one.at, key, one.ns);
            }
        }
    }

    fn settle_engines(&mut self, now: BootNs, patience: u64, identity: &Identity) {
        let period = self.grid.period_or_most_ns();
        // While nothing ties their clock to this one they wait, but not for ever.
        self.engine_pending.drain(..self.engine_pending.len().saturating_sub(ENGINE_TICKS));
        if !self.clock.is_known() {
            return;
        }
        while let Some(&tick) = self.engine_pending.front() {
            // One of the future, or of no time at all, would hold up all that follow.
            let at = self.clock.boot(tick.at).filter(|at| *at <= now.plus(RING_NS));
            if at.is_some_and(|at| now.saturating_since(at) < patience) {
                return;
            }
            self.engine_pending.pop_front();
            let Some(at) = at else { continue };
            let engine = tick.engine as usize;
            let span_ns = period as f64;
            let busy_ns = span_ns * f64::from(tick.busy_percent.min(100)) / 100.0;
            let named = self.named(engine, tick.at, at, period, identity);
            let otherwise = self.holders.sole_user();
            if let Some(sampled) = self.sampled.get_mut(engine) {
                *sampled = true;
            }
            if let Some(lane) = self.lanes.get_mut(engine) {
                lane.tick(Tick { at, span_ns, busy_ns, named, otherwise }, identity, &mut Vec::new());
            }
        }
    }

    /// Marks the rows of a tick and gives those that name somebody for that engine.
    fn rows_of(&mut self, at: GpuNs) -> Vec<ProcessRow> {
        let near = (self.grid.period_or_most_ns() as f64 * NEAR_PERIODS) as u64;
        let mut rows = Vec::new();
        for (row, claimed) in self.rows.iter_mut().filter(|(row, _)| row.at.0.abs_diff(at.0) < near) {
            *claimed = true;
            rows.push(*row);
        }
        rows
    }

    fn claim(&mut self, at: GpuNs) {
        self.rows_of(at);
    }

    /// Whom the tick at `tick` names for an engine. More than one is more than the driver can tell: of those, who is known.
    fn named(&mut self, engine: usize, tick: GpuNs, at: BootNs, span_ns: u64, identity: &Identity) -> Option<Named> {
        let (from, to) = self.clock.named_within(at, span_ns);
        let rows = self.rows_of(tick);
        let rows = rows.iter().filter(|row| row.percent.get(engine).is_some_and(|percent| *percent > 0));
        let mut named: Vec<Named> =
            rows.map(|row| Named { user: self.holders.user(row.pid, from, to, identity), pid: row.pid }).collect();
        if named.iter().any(|n| n.user.is_known()) {
            named.retain(|n| n.user.is_known());
        } else if named.iter().any(|n| n.user != User::Nobody(Reason::InvalidPid)) {
            named.retain(|n| n.user != User::Nobody(Reason::InvalidPid));
        }
        let first = *named.first()?;
        let one = named.iter().all(|n| n.user == first.user);
        Some(if one { first } else { Named { user: User::Nobody(Reason::Ambiguous), pid: first.pid } })
    }

    /// GPM says how busy a MIG device was; whose that was, only who holds it says.
    fn measured(&mut self, gpm: GpmInterval, wall: WallTime) {
        self.wall.unobserved_until(gpm.from);
        let from = self.wall.until();
        let busy_ns = self.wall.measured_until(gpm.to, gpm.busy_ratio.clamp(0.0, 1.0));
        let span_ns = gpm.to.saturating_since(from) as f64;
        let user = self.holders.only_user();
        self.last_wall = Some(wall);
        self.observed(Recent { at: gpm.to, span_ns, busy_ns, user: Some(user) });
        let mut booked = Vec::new();
        if let Some(lane) = self.lanes.get_mut(COMPUTE).filter(|_| busy_ns > 0.0) {
            lane.book(gpm.to, user, busy_ns, 1, &mut booked);
        }
        self.count(&booked);
    }

    fn read(&mut self, readings: DeviceReadings, at: BootNs) {
        if let Some(mask) = readings.throttle_reasons {
            let (last, mut seconds) = self.throttled.unwrap_or((at, [0.0; THROTTLE_REASONS.len()]));
            let elapsed = at.saturating_since(last);
            if elapsed <= READINGS_NS {
                for ((bit, _), sum) in THROTTLE_REASONS.iter().zip(&mut seconds) {
                    *sum += if mask & bit == 0 { 0.0 } else { elapsed as f64 * 1e-9 };
                }
            }
            self.throttled = Some((at, seconds));
        }
        self.readings = readings;
    }

    pub fn xid(&mut self, xid: u64, count: u64) {
        if self.xids.len() < XIDS || self.xids.contains_key(&xid) {
            *self.xids.entry(xid).or_default() += count;
        }
    }

    /// Time passes, also where no driver answers.
    pub fn passed(&mut self, now: BootNs, identity: &Identity) {
        if self.gone.is_some() {
            return;
        }
        if now.saturating_since(self.last_batch) > RING_NS {
            self.readings = DeviceReadings::default();
            self.holders = Holders::default();
            self.throttled = self.throttled.map(|(_, seconds)| (now, seconds));
        }
        if !self.info.is_leaf() {
            return;
        }
        let lost = now.minus(RING_NS);
        if lost > self.wall.until() {
            self.wall.unobserved_until(lost);
            // What the ring still gives from before is booked.
            self.watermark = None;
            self.decide(lost, identity);
        }
        let there: HashSet<ContainerKey> = self.credits().keys().copied().chain(self.holders.containers()).collect();
        let there = there.into_iter().filter(|key| identity.cgroups.container(*key).is_some_and(|c| c.gone.is_none())).collect();
        self.windows.close(now, &there);
    }

    fn decide(&mut self, now: BootNs, identity: &Identity) {
        let mut booked = Vec::new();
        if let Some(lane) = self.lanes.get_mut(COMPUTE) {
            lane.decide(now, identity, &mut booked);
        }
        self.count(&booked);
    }

    /// Duty cycle of the last window per container, and the device's; `None` when nothing of it was observed.
    pub fn duties(&self, now: BootNs) -> (HashMap<ContainerKey, Duty>, Option<f64>) {
        let observed = self.recent.back().is_some_and(|r| now.saturating_since(r.at) < STALE_NS);
        let span: f64 = self.recent.iter().map(|r| r.span_ns).sum();
        if !observed || span <= 0.0 {
            return (HashMap::new(), None);
        }
        let busy: f64 = self.recent.iter().map(|r| r.busy_ns).sum();
        let pool: f64 = self.recent.iter().filter(|r| r.user.is_none()).map(|r| r.busy_ns).sum();
        let stands_for = |r: &Recent| 1.005 - r.busy_ns / r.span_ns.max(1.0);
        let named = || self.recent.iter().filter_map(|r| Some((r.user?, r)));
        let whole: f64 = named().map(|(_, r)| stands_for(r)).sum();
        let weight = |r: &Recent| r.busy_ns + if whole > 0.0 { pool * stands_for(r) / whole } else { 0.0 };
        let squares: f64 = named().map(|(_, r)| weight(r).powi(2)).sum();
        let mut seconds: HashMap<ContainerKey, f64> = HashMap::new();
        for (user, recent) in named() {
            if let User::Container(key) = user {
                *seconds.entry(key).or_default() += weight(recent);
            }
        }
        // One who is seldom named is named in few windows, and busy in all.
        if let User::Container(key) = self.holders.sole_user()
            && whole <= 0.0
        {
            *seconds.entry(key).or_default() += pool;
        }
        // Who was not seen in this window may still have been there.
        if let Some(lane) = self.lanes.get(COMPUTE) {
            for key in lane.credits().keys().filter(|key| lane.spread(User::Container(**key)).is_some()) {
                seconds.entry(*key).or_default();
            }
        }
        let duty = |(key, ns): (ContainerKey, f64)| {
            let variance = self.lanes.get(COMPUTE).map_or(0.0, |lane| lane.variance_of(User::Container(key), squares));
            (key, Duty { percent: 100.0 * ns / span, stderr: 100.0 * variance.sqrt() / span })
        };
        (seconds.into_iter().map(duty).collect(), Some(busy / span))
    }

    fn lane(&self, engine: Engine) -> Option<&Lane> {
        self.lanes.get(engine as usize)
    }

    pub fn credits(&self) -> &HashMap<ContainerKey, Credit> {
        // Every device has a lane for each engine.
        self.lanes.first().expect("a lane per engine").credits()
    }

    /// It has seconds here, of any engine.
    pub fn credits_any(&self, key: ContainerKey) -> bool {
        self.lanes.iter().any(|lane| lane.credits().contains_key(&key))
    }

    /// Containers with seconds here, or processes.
    pub fn containers(&self) -> Vec<ContainerKey> {
        let engines = self.lanes.iter().flat_map(|lane| lane.credits().keys().copied());
        let mut keys: Vec<ContainerKey> = engines.chain(self.holders.containers()).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    pub fn holders(&self) -> &Holders {
        &self.holders
    }

    pub fn window_shares(&self, key: ContainerKey) -> Option<Arc<WindowShares>> {
        self.windows.of(key)
    }

    /// Seconds of the engines beside compute in which the container ever was.
    pub fn engine_seconds(&self, key: ContainerKey) -> Vec<(Engine, f64)> {
        let others = Engine::ALL.into_iter().filter(|engine| *engine != Engine::Compute);
        others.filter_map(|engine| Some((engine, self.lane(engine)?.credits().get(&key)?.ns * 1e-9))).collect()
    }

    pub fn forget(&mut self, gone: impl Fn(&ContainerKey) -> bool) {
        for lane in &mut self.lanes {
            lane.forget(&gone);
        }
        self.windows.forget(&gone);
        self.holders.forget(&gone);
    }

    pub fn view(&self, utilization_ratio: Option<f64>) -> GpuView {
        let s = 1e-9;
        let sampled = Engine::ALL.into_iter().zip(self.sampled).filter(|(_, sampled)| *sampled);
        let engine = |(engine, _): (Engine, bool)| {
            let lane = self.lane(engine)?;
            Some(EngineTime { engine, busy: lane.busy_ns * s, unattributed: lane.unattributed.map(|ns| ns * s) })
        };
        let compute = self.lane(Engine::Compute);
        GpuView {
            info: Arc::clone(&self.info),
            readings: self.readings,
            time: self.wall.view(compute.map_or(0.0, |lane| lane.busy_ns)),
            unattributed: compute.map_or([0.0; Reason::ALL.len()], |lane| lane.unattributed.map(|ns| ns * s)),
            utilization_ratio,
            coactive_ratio: None,
            last_sample: self.last_wall,
            sample_period_seconds: self.grid.period_ns().map(|ns| ns as f64 * s),
            sample_gaps: self.gaps,
            ring_overruns: self.overruns,
            rejected: self.rejected,
            off_grid: self.off_grid,
            clock: self.clock.view(),
            engines: sampled.filter_map(engine).collect(),
            throttle_seconds: self.throttled.map(|(_, seconds)| seconds),
            xids: self.xids.iter().map(|(xid, n)| (*xid, *n)).collect(),
            gone: self.gone,
        }
    }
}
