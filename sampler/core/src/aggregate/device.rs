//! One device's ledger: facts in, seconds out.
//!
//! ```text
//!  sample with its rows -> lane of its engine (whose) and windows (shares, who was active together)
//!  spans              -> idle, unobserved, unsupported
//! ```

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use super::coactivity::Coactivity;
use super::divide::{Presence, Sample, likeness, stands_for};
use super::engine_account::{self, Booked, Credit, EngineAccount};
use super::exits::{Left, Lifetimes, NamedUser};
use super::holders::Holders;
use super::settings::{Range, Settings, WINDOW_NS};
use super::windows::Windows;
use crate::device::{DeviceReadings, Engine, GpuInfo, Reason, THROTTLE_REASONS};
use crate::fact::{GpuFact, UnqueriedSample, User};
use crate::snapshot::{EngineTime, GpuTime, WindowShares};
use crate::units::{BootNs, ContainerKey};

/// Nothing was observed for so long: rates of the last window are not known. Where driver calls are slow, half a ring of samples comes
/// at once, every 6 s.
const STALE_NS: u64 = 8_000_000_000;
/// Variances are added up once in a while: it takes a look at the last minutes.
const VARIANCE_NS: u64 = 2_000_000_000;
/// Readings further apart say nothing about the time between. Where driver calls take 10 ms each they are some 35 s apart.
const READINGS_NS: u64 = 60_000_000_000;
/// A sample arrives this late at most.
const ARRIVED_NS: u64 = 11_000_000_000;
/// No driver's period comes near it.
const TICK_MOST_NS: u64 = 10_000_000_000;
/// Kinds of XID errors kept apart; there are about 150.
const XIDS: usize = 256;
const COMPUTE: usize = Engine::Compute as usize;

/// A stretch of the last window.
#[derive(Clone, Copy, Debug)]
struct Recent {
    at: BootNs,
    span_ns: f64,
    busy_ns: f64,
    user: Option<User>,
    queried: bool,
    /// Measured by counters of the device, not drawn by samples.
    measured: bool,
}

impl Recent {
    fn busy_ratio(&self) -> f64 {
        self.busy_ns / self.span_ns.max(1.0)
    }

    /// What a named sample stands for where pid-less time is divided.
    fn stands_for(&self) -> f64 {
        stands_for(self.busy_ratio())
    }
}

/// A container's part of the last window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Duty {
    pub percent: f64,
    pub stderr: f64,
}

#[derive(Debug)]
pub struct DeviceAccount {
    pub info: Arc<GpuInfo>,
    pub gone: Option<BootNs>,
    pub readings: DeviceReadings,
    pub together: Coactivity,
    keep_history: bool,
    range: Range,
    idle_ns: f64,
    unobserved_ns: u64,
    unsupported_ns: u64,
    holders: Holders,
    left: Left,
    lanes: Vec<EngineAccount>,
    sampled: [bool; Engine::ALL.len()],
    recent: VecDeque<Recent>,
    windows: Windows,
    throttled: Option<(BootNs, [f64; THROTTLE_REASONS.len()])>,
    xids: BTreeMap<u64, u64>,
    variance_at: BootNs,
}

impl DeviceAccount {
    pub fn new(info: Arc<GpuInfo>, at: BootNs, settings: Settings) -> Self {
        Self {
            info,
            gone: None,
            readings: DeviceReadings::default(),
            together: Coactivity::new(settings.saturation_ratio, settings.keep_history),
            keep_history: settings.keep_history,
            range: settings.range,
            idle_ns: 0.0,
            unobserved_ns: 0,
            unsupported_ns: 0,
            holders: Holders::default(),
            left: Left::default(),
            lanes: Engine::ALL.iter().map(|_| EngineAccount::new(settings.range)).collect(),
            sampled: [false; Engine::ALL.len()],
            recent: VecDeque::new(),
            windows: Windows::default(),
            throttled: None,
            xids: BTreeMap::new(),
            variance_at: at,
        }
    }

    pub fn apply(&mut self, at: BootNs, fact: &GpuFact, lifetimes: &Lifetimes) {
        match fact {
            GpuFact::Opened(info) => {
                self.gone = None;
                self.info = Arc::clone(info);
                self.restart();
            }
            GpuFact::Gone => {
                self.gone = Some(at);
                self.restart();
                self.readings = DeviceReadings::default();
                self.holders = Holders::default();
            }
            GpuFact::Restarted => self.restart(),
            GpuFact::Utilization(tick) => {
                let sample = sample(at, tick.ns, tick.busy_percent, true);
                self.sample(Engine::Compute, sample, NamedUser::of(&tick.processes), lifetimes);
            }
            GpuFact::EngineSample(engine, tick) => {
                let sample = sample(at, tick.ns, tick.busy_percent, true);
                self.sample(*engine, sample, NamedUser::of(&tick.processes), lifetimes);
            }
            GpuFact::Unqueried(engine, UnqueriedSample { ns, busy_percent, .. }) => {
                self.sample(*engine, sample(at, *ns, *busy_percent, false), None, lifetimes);
            }
            GpuFact::Idle { ns } => {
                let ns = self.range.part(at, *ns) as f64;
                self.idle_ns += ns;
                let at_most = at.min(self.range.to);
                self.observed(Recent { at: at_most, span_ns: ns, busy_ns: 0.0, user: None, queried: true, measured: false });
                self.decide(at, lifetimes);
            }
            GpuFact::Unobserved { ns, .. } => {
                self.unobserved_ns = self.unobserved_ns.saturating_add(self.range.part(at, *ns));
                self.decide(at, lifetimes);
            }
            GpuFact::Unsupported { ns } => {
                self.unsupported_ns = self.unsupported_ns.saturating_add(self.range.part(at, *ns));
                // No more ticks come for what waits.
                self.decide(at, lifetimes);
            }
            GpuFact::Measured { ns, busy_ratio } => {
                self.measured(at, self.range.part(at, *ns) as f64, busy_ratio.clamp(0.0, 1.0))
            }
            GpuFact::Held(Some(holders)) => self.holders.listed(holders),
            GpuFact::Held(None) => self.holders = Holders::default(),
            GpuFact::Readings(readings) => self.read(*readings, at),
            GpuFact::Xid { xid, count } => {
                if self.xids.len() < XIDS || self.xids.contains_key(xid) {
                    let sum = self.xids.entry(*xid).or_default();
                    *sum = sum.saturating_add(*count);
                }
            }
            GpuFact::Left { pid, since } => self.left.leave(*pid, *since, at),
            GpuFact::Clock(_) => {}
        }
    }

    /// What is waiting belongs to a ring or a clock that is no more.
    fn restart(&mut self) {
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

    fn sample(&mut self, engine: Engine, sample: Sample, named: Option<NamedUser>, lifetimes: &Lifetimes) {
        let compute = engine == Engine::Compute;
        if compute && self.range.has(sample.at) {
            self.idle_ns += sample.span_ns - sample.busy_ns;
            let Sample { at, span_ns, busy_ns, queried } = sample;
            self.observed(Recent { at, span_ns, busy_ns, user: named.map(|n| n.user), queried, measured: false });
        }
        if let Some(sampled) = self.sampled.get_mut(engine as usize).filter(|_| !compute) {
            *sampled = true;
        }
        let mut booked = Vec::new();
        let otherwise = self.holders.sole_user();
        let presence = Presence { left: &self.left, lifetimes };
        if let Some(lane) = self.lanes.get_mut(engine as usize) {
            lane.tick(engine_account::PendingSample { sample, named, otherwise }, presence, &mut booked);
        }
        if compute {
            self.count(&booked);
            self.settle_variance(sample.at);
        }
    }

    fn settle_variance(&mut self, at: BootNs) {
        if at.saturating_since(self.variance_at) > VARIANCE_NS {
            self.variance_at = at;
            for (engine, lane) in self.lanes.iter_mut().enumerate() {
                // Lists say who holds the device, not which other engines it uses.
                let holders = self.holders.containers().filter(|_| engine == COMPUTE);
                lane.settle_variance(at, &self.left, holders.map(User::Container));
            }
            self.left.forget(at);
        }
    }

    fn observed(&mut self, recent: Recent) {
        if recent.span_ns <= 0.0 {
            return;
        }
        self.windows.observed(recent.at, recent.span_ns);
        self.observe_together(recent);
        self.recent.push_back(recent);
        while self.recent.front().is_some_and(|r| recent.at.saturating_since(r.at) >= WINDOW_NS) {
            self.recent.pop_front();
        }
    }

    /// A tick belongs to the window in which it ends; a long span to all that it covers.
    fn observe_together(&mut self, recent: Recent) {
        const TICK_NS: u64 = super::coactivity::TOGETHER_NS;
        let (mut left_ns, mut at) = (recent.span_ns as u64, recent.at);
        if !recent.queried {
            self.together.unqueried(at, recent.busy_ns);
        }
        if left_ns <= TICK_NS {
            self.together.observed(at, left_ns, recent.busy_ns, recent.user);
            return;
        }
        let busy_ratio = recent.busy_ns / recent.span_ns;
        while left_ns > 0 {
            // To the beginning of the window that `at` is the end of.
            let part = left_ns.min((at.0.saturating_sub(1)) % TICK_NS + 1);
            self.together.observed(at.minus(1), part, part as f64 * busy_ratio, None);
            (left_ns, at) = (left_ns - part, at.minus(part));
        }
    }

    fn count(&mut self, booked: &[Booked]) {
        for one in booked {
            if let User::Container(key) = one.user {
                self.windows.credited(one.at, key, one.ns);
            }
            self.together.credited(one.at, one.user, one.ns);
        }
    }

    /// Whose that was, only who holds it says.
    fn measured(&mut self, at: BootNs, span_ns: f64, busy_ratio: f64) {
        let busy_ns = span_ns * busy_ratio;
        let user = self.holders.only_user();
        if self.range.has(at) {
            self.idle_ns += span_ns - busy_ns;
            self.observed(Recent { at, span_ns, busy_ns, user: Some(user), queried: true, measured: true });
        }
        let mut booked = Vec::new();
        if let Some(lane) = self.lanes.get_mut(COMPUTE).filter(|_| busy_ns > 0.0) {
            lane.book(at, user, busy_ns, 1, &mut booked);
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

    /// Time has passed. `living`: whether a container is not gone.
    pub fn passed(&mut self, now: BootNs, living: impl Fn(ContainerKey) -> bool) {
        if self.gone.is_some() || !self.info.is_leaf() {
            return;
        }
        let there: HashSet<ContainerKey> = self.containers().into_iter().filter(|key| living(*key)).collect();
        let complete_until = complete_until(now, self.lane(Engine::Compute).and_then(EngineAccount::waits_since));
        self.windows.close(complete_until, &there);
        self.together.close(complete_until);
        if !self.keep_history {
            // Live, the reason they are counted under is enough.
            let left = &self.left;
            for lane in &mut self.lanes {
                lane.forget(|user| matches!(user, User::Host(process) if left.has_left(process.pid)));
            }
        }
    }

    /// Nothing more will come.
    pub fn finish(&mut self, lifetimes: &Lifetimes) {
        let mut booked = Vec::new();
        for (engine, lane) in self.lanes.iter_mut().enumerate() {
            let mut of_lane = Vec::new();
            lane.decide(BootNs(u64::MAX), Presence { left: &self.left, lifetimes }, &mut of_lane);
            if engine == COMPUTE {
                booked = of_lane;
            }
        }
        self.count(&booked);
        self.together.close_all();
    }

    fn decide(&mut self, now: BootNs, lifetimes: &Lifetimes) {
        let mut booked = Vec::new();
        if let Some(lane) = self.lanes.get_mut(COMPUTE) {
            lane.decide(now, Presence { left: &self.left, lifetimes }, &mut booked);
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
        let shares = WindowWeights::of(&self.recent);
        let mut seconds: HashMap<ContainerKey, f64> = HashMap::new();
        let named = || self.recent.iter().zip(&shares.weights).filter_map(|(r, weight)| Some((r.user?, *weight)));
        for (user, weight) in named() {
            if let User::Container(key) = user {
                *seconds.entry(key).or_default() += weight;
            }
        }
        let mut squares: f64 = named().map(|(_, weight)| weight.powi(2)).sum();
        if shares.unnamed_ns > 0.0 {
            squares += shares.unnamed_ns.powi(2);
            for (key, share) in self.usual_shares() {
                *seconds.entry(key).or_default() += shares.unnamed_ns * share;
            }
        }
        // Who was not seen in this window may still have been there.
        if let Some(lane) = self.lanes.get(COMPUTE) {
            let there = |user: &&User| lane.spread(**user).is_some();
            for key in lane.credits().keys().filter(there).filter_map(|user| user.container()) {
                seconds.entry(key).or_default();
            }
        }
        let duty = |(key, ns): (ContainerKey, f64)| {
            let variance = self.lanes.get(COMPUTE).map_or(0.0, |lane| lane.variance_of(User::Container(key), squares));
            (key, Duty { percent: 100.0 * ns / span, stderr: 100.0 * variance.sqrt() / span })
        };
        (seconds.into_iter().map(duty).collect(), Some(busy / span))
    }

    /// Of busy time in a window in which no sample names a process: what the last minutes say, or the only user that the driver lists.
    fn usual_shares(&self) -> Vec<(ContainerKey, f64)> {
        if let User::Container(key) = self.holders.sole_user() {
            return vec![(key, 1.0)];
        }
        let Some(lane) = self.lanes.get(COMPUTE) else { return Vec::new() };
        let known = lane.credits().keys().filter_map(|user| Some((user.container()?, lane.spread(*user)?.share)));
        known.collect()
    }

    /// One standard error of a share of one half over the last window; `None` where the device was not busy, or where no samples are
    /// drawn.
    pub fn expected_stderr(&self) -> Option<f64> {
        let busy = || self.recent.iter().filter(|r| r.busy_ns > 0.0 && !r.measured);
        let queried = busy().filter(|r| r.queried).count();
        // Without a single one, anything between nothing and all is as likely.
        busy().next().map(|_| 0.5 / (queried.max(1) as f64).sqrt())
    }

    fn lane(&self, engine: Engine) -> Option<&EngineAccount> {
        self.lanes.get(engine as usize)
    }

    /// Of compute, by user.
    pub fn credits(&self) -> &HashMap<User, Credit> {
        // Every device has a lane for each engine.
        self.lanes.first().expect("a lane per engine").credits()
    }

    /// It has seconds here, of any engine.
    pub fn credits_any(&self, key: ContainerKey) -> bool {
        self.lanes.iter().any(|lane| lane.credits().contains_key(&User::Container(key)))
    }

    /// Containers with seconds here, or processes.
    pub fn containers(&self) -> Vec<ContainerKey> {
        let engines = self.lanes.iter().flat_map(|lane| lane.credits().keys().filter_map(|user| user.container()));
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
        let of = |engine| Some((engine, self.lane(engine)?.credits().get(&User::Container(key))?.ns * 1e-9));
        others.filter_map(of).collect()
    }

    pub fn forget(&mut self, gone: impl Fn(&ContainerKey) -> bool) {
        let user = |user: &User| user.container().is_some_and(|key| gone(&key));
        for lane in &mut self.lanes {
            lane.forget(user);
        }
        self.windows.forget(&gone);
        self.together.forget(&gone);
        self.holders.forget(user);
    }

    pub fn time(&self) -> GpuTime {
        let busy_ns = self.lane(Engine::Compute).map_or(0.0, |lane| lane.busy_ns);
        let s = 1e-9;
        GpuTime {
            busy: busy_ns * s,
            idle: self.idle_ns * s,
            unobserved: self.unobserved_ns as f64 * s,
            unsupported: self.unsupported_ns as f64 * s,
        }
    }

    pub fn unattributed(&self) -> [f64; Reason::ALL.len()] {
        self.lane(Engine::Compute).map_or([0.0; Reason::ALL.len()], |lane| lane.unattributed.map(|ns| ns * 1e-9))
    }

    /// Engines beside compute that the driver samples.
    pub fn engines(&self) -> Vec<EngineTime> {
        let sampled = Engine::ALL.into_iter().zip(self.sampled).filter(|(_, sampled)| *sampled);
        let engine = |(engine, _): (Engine, bool)| {
            let lane = self.lane(engine)?;
            Some(EngineTime { engine, busy: lane.busy_ns * 1e-9, unattributed: lane.unattributed.map(|ns| ns * 1e-9) })
        };
        sampled.filter_map(engine).collect()
    }

    pub fn throttle_seconds(&self) -> Option<[f64; THROTTLE_REASONS.len()]> {
        self.throttled.map(|(_, seconds)| seconds)
    }

    /// (XID, how often), by XID.
    pub fn xids(&self) -> Vec<(u64, u64)> {
        self.xids.iter().map(|(xid, n)| (*xid, *n)).collect()
    }
}

/// Time up to which all samples have arrived and no busy time waits to be divided.
fn complete_until(now: BootNs, waits_since: Option<BootNs>) -> BootNs {
    let arrived = now.minus(ARRIVED_NS);
    waits_since.map_or(arrived, |waits_since| arrived.min(waits_since))
}

fn sample(at: BootNs, ns: u64, busy_percent: u8, queried: bool) -> Sample {
    let span_ns = ns.min(TICK_MOST_NS) as f64;
    Sample { at, span_ns, busy_ns: span_ns * f64::from(busy_percent) / 100.0, queried }
}

/// What each sample of the last window stands for, with the busy time of those that name no process divided over it.
struct WindowWeights {
    /// By sample; 0 for those that name none.
    weights: Vec<f64>,
    /// Busy time in a window in which no sample names a process.
    unnamed_ns: f64,
}

impl WindowWeights {
    fn of(recent: &VecDeque<Recent>) -> Self {
        let named = || recent.iter().enumerate().filter(|(_, r)| r.user.is_some());
        let whole: f64 = named().map(|(_, r)| r.stands_for()).sum();
        let mut weights = vec![0.0; recent.len()];
        if whole <= 0.0 {
            let unnamed_ns = recent.iter().map(|r| r.busy_ns).sum();
            return Self { weights, unnamed_ns };
        }
        let busy = |queried: bool| recent.iter().enumerate().filter(move |(_, r)| r.queried == queried && r.busy_ns > 0.0);
        let mut pool: f64 = busy(true).filter(|(_, r)| r.user.is_none()).map(|(_, r)| r.busy_ns).sum();
        for (n, r) in named() {
            weights[n] += r.busy_ns;
        }
        for (_, unqueried) in busy(false) {
            let like = |r: &Recent| likeness(r.busy_ratio(), unqueried.busy_ratio());
            let all: f64 = busy(true).map(|(_, r)| like(r)).sum();
            for (n, r) in busy(true) {
                let ns = unqueried.busy_ns * like(r) / all;
                if r.user.is_some() { weights[n] += ns } else { pool += ns }
            }
        }
        for (n, r) in named() {
            weights[n] += pool * r.stands_for() / whole;
        }
        Self { weights, unnamed_ns: 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_complete_once_samples_arrived_and_are_divided() {
        let now = BootNs(20 * ARRIVED_NS);
        assert_eq!(complete_until(now, None), BootNs(19 * ARRIVED_NS));
        assert_eq!(complete_until(now, Some(now)), BootNs(19 * ARRIVED_NS));
        assert_eq!(complete_until(now, Some(BootNs(3))), BootNs(3));
        assert_eq!(complete_until(BootNs(5), None), BootNs(0));
    }
}
