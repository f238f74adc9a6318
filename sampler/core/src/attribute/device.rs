//! One device: its samples in, facts out.

use std::collections::VecDeque;
use std::sync::Arc;

use super::clock::GpuClock;
use super::process_attribution::Owners;
use super::timeline::Wall;
use crate::device::ClockView;
use crate::device::{DeviceReadings, Engine, GpuInfo, SampleCounts};
use crate::fact::{AttributedProcess, ClockFact, GpuFact, Holder, UnobservedReason, UnqueriedSample, User, UtilizationSample};
use crate::identity::Identity;
use crate::observation::Rejected;
use crate::observation::{Answer, DeviceSample, EngineSample, GpmInterval, GpuBatch, ProcessSample};
use crate::reconstruct::Grid;
use crate::units::{BootNs, GpuNs, WallTime};

/// A tick waits this long for its process row, which another call brings, and two periods at least.
const SETTLE_NS: u64 = 400_000_000;
/// Rows wait for the ticks of engines that are read seconds later.
const PROCESS_SAMPLES_NS: u64 = 5_000_000_000;
/// A row belongs to a tick that is this many periods away at most.
const NEAR_PERIODS: f64 = 0.5;
/// What a driver's ring may still give: 72 samples of about 167 ms, and what is left for delays. Older time without an answer is unobserved.
const RING_NS: u64 = 15_000_000_000;
/// Ticks of other engines that wait, at most: what their rings hold, twice.
const ENGINE_TICKS: usize = 2 * 72 * Engine::ALL.len();
/// The clock is told of so often.
const CLOCK_NS: u64 = 10_000_000_000;

const COMPUTE: usize = Engine::Compute as usize;

type AttributedFacts = Vec<(BootNs, GpuFact)>;

/// What is known of how a device is read.
#[derive(Clone, Copy, Debug)]
pub struct DeviceView {
    pub sample_gaps: u64,
    pub ring_overruns: u64,
    pub rejected: [u64; Rejected::ALL.len()],
    pub off_grid: u64,
    pub clock: ClockView,
    pub period_ns: Option<u64>,
    pub last_sample: Option<WallTime>,
    pub counts: SampleCounts,
}

#[derive(Debug)]
pub struct DeviceAttribution {
    info: Arc<GpuInfo>,
    gone: bool,
    clock: GpuClock,
    grid: Grid,
    wall: Wall,
    owners: Owners,
    /// The first read sets watermarks only.
    first_read: bool,
    watermark: Option<GpuNs>,
    /// The ring is dry, because the device is idle.
    dry: bool,
    pending: VecDeque<DeviceSample>,
    engine_pending: VecDeque<EngineSample>,
    process_samples: VecDeque<(ProcessSample, bool)>,
    /// Stamps of the device samples of the last [`PROCESS_SAMPLES_NS`] whose process was queried: samples of other engines near them were, too.
    queried: VecDeque<GpuNs>,
    /// Samples attributed, and those of them whose process was queried.
    counts: SampleCounts,
    gaps: u64,
    overruns: u64,
    rejected: [u64; Rejected::ALL.len()],
    off_grid: u64,
    last_wall: Option<WallTime>,
    last_batch: BootNs,
    /// No answer for so long that its readings and lists are told to be unknown.
    silent: bool,
    clock_told: BootNs,
}

impl DeviceAttribution {
    pub fn new(info: Arc<GpuInfo>, at: BootNs, told: &mut AttributedFacts) -> Self {
        told.push((at, GpuFact::Opened(Arc::clone(&info))));
        Self {
            info,
            gone: false,
            clock: GpuClock::default(),
            grid: Grid::default(),
            wall: Wall::new(at),
            owners: Owners::default(),
            first_read: true,
            watermark: None,
            dry: false,
            pending: VecDeque::new(),
            engine_pending: VecDeque::new(),
            process_samples: VecDeque::new(),
            queried: VecDeque::new(),
            counts: SampleCounts::default(),
            gaps: 0,
            overruns: 0,
            rejected: [0; Rejected::ALL.len()],
            off_grid: 0,
            last_wall: None,
            last_batch: at,
            silent: false,
            clock_told: BootNs(0),
        }
    }

    /// Found again: its ring is another, its clock may be.
    pub fn reopen(&mut self, info: Arc<GpuInfo>, at: BootNs, told: &mut AttributedFacts) {
        if std::mem::take(&mut self.gone) {
            self.wall.resume(at);
        }
        told.push((at, GpuFact::Opened(Arc::clone(&info))));
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
        self.process_samples.clear();
        self.queried.clear();
    }

    pub fn gone(&mut self, at: BootNs, told: &mut AttributedFacts) {
        self.gone = true;
        self.unobserved_until(at, UnobservedReason::NoAnswer, told);
        self.restart();
        self.owners.forget_lists();
        told.push((at, GpuFact::Gone));
    }

    fn unobserved_until(&mut self, at: BootNs, why: UnobservedReason, told: &mut AttributedFacts) {
        let ns = self.wall.up_to(at);
        if ns > 0 {
            told.push((at, GpuFact::Unobserved { ns, why }));
        }
    }

    fn idle_until(&mut self, at: BootNs, told: &mut AttributedFacts) {
        let ns = self.wall.up_to(at);
        if ns > 0 {
            told.push((at, GpuFact::Idle { ns }));
        }
    }

    pub fn apply(&mut self, batch: &GpuBatch, identity: &Identity, told: &mut AttributedFacts) {
        // A call was under way when it went.
        if self.gone {
            return;
        }
        self.silent = false;
        if let Some(readings) = batch.readings {
            told.push((batch.ended, GpuFact::Readings(readings)));
        }
        let tells_nothing = batch.answer == Answer::Failed && batch.readings == Some(DeviceReadings::default());
        if let Some(processes) = &batch.processes {
            let users = self.owners.listed(processes, batch.began, batch.ended, identity);
            let holder = |(process, user): (&crate::observation::RunningProcess, User)| Holder {
                pid: process.pid,
                user,
                kind: process.kind,
                memory_bytes: process.memory_bytes,
            };
            let held = processes.iter().zip(users).map(holder).collect();
            told.push((batch.ended, GpuFact::Held(Some(held))));
        } else if tells_nothing {
            // Then it does not tell who holds it either.
            self.owners.forget_lists();
            told.push((batch.ended, GpuFact::Held(None)));
        }
        for (sum, n) in self.rejected.iter_mut().zip(batch.rejected) {
            *sum += u64::from(n);
        }
        if let Some(gpm) = batch.gpm {
            self.measured(gpm, batch.wall, told);
        } else {
            match batch.answer {
                Answer::Samples => self.samples(batch, identity, told),
                Answer::Dry { idle } => self.dry(idle, batch, identity, told),
                // A MIG device is measured in intervals: the next may follow.
                Answer::Unsupported => {
                    self.settle(batch.ended, identity, told);
                    let ns = self.wall.up_to(batch.ended);
                    told.push((batch.ended, GpuFact::Unsupported { ns }));
                }
                Answer::Failed => self.settle(batch.ended, identity, told),
            }
        }
        self.last_batch = batch.ended;
        if batch.ended.saturating_since(self.clock_told) > CLOCK_NS && self.clock.is_known() {
            self.clock_told = batch.ended;
            let clock = self.clock.view();
            told.push((
                batch.ended,
                GpuFact::Clock(ClockFact {
                    ahead_of_boot_seconds: clock.ahead_of_boot_seconds,
                    uncertainty_seconds: clock.uncertainty_seconds,
                    period_ns: self.grid.period_ns(),
                    steps: clock.steps,
                }),
            ));
        }
    }

    fn samples(&mut self, batch: &GpuBatch, identity: &Identity, told: &mut AttributedFacts) {
        if batch.stepped {
            self.clock.stepped();
            self.restart();
            told.push((batch.ended, GpuFact::Restarted));
        }
        let newest = batch.samples.iter().map(|t| t.at).max();
        match newest {
            Some(newest) => {
                let oldest = batch.samples.iter().map(|t| t.at).min().unwrap_or(newest);
                self.clock.polled((oldest, newest), batch.ring_began, batch.ended, self.grid.period_or_most_ns());
                self.last_wall = Some(batch.wall);
            }
            None => self.clock.silent(batch.ring_began),
        }
        if std::mem::take(&mut self.first_read) {
            // What the ring held before the start is nobody's: it only sets the watermarks.
            self.watermark = newest;
            if let Some(at) = newest.and_then(|newest| self.clock.boot(newest)) {
                self.unobserved_until(at, UnobservedReason::Start, told);
            }
            return;
        }
        let known = self.pending.back().map(|t| t.at).or(self.watermark);
        self.pending.extend(batch.samples.iter().filter(|t| known.is_none_or(|known| t.at > known)));
        self.engine_pending.extend(&batch.engine_samples);
        self.process_samples.extend(batch.process_samples.iter().map(|row| (*row, false)));
        self.settle(batch.ended, identity, told);
    }

    /// The ring runs dry on an idle device.
    fn dry(&mut self, idle: bool, batch: &GpuBatch, identity: &Identity, told: &mut AttributedFacts) {
        self.clock.silent(batch.ring_began);
        self.settle(batch.ended, identity, told);
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
            self.idle_until(until, told);
        } else {
            self.unobserved_until(until, UnobservedReason::NoSamples, told);
        }
    }

    /// Tells every tick old enough that its process row, if it has one, has been read.
    fn settle(&mut self, now: BootNs, identity: &Identity, told: &mut AttributedFacts) {
        self.owners.follow(now, identity, told);
        let patience = SETTLE_NS.max(2 * self.grid.period_or_most_ns());
        while let Some(&tick) = self.pending.front() {
            let Some(at) = self.clock.boot(tick.at) else { return };
            if now.saturating_since(at) < patience {
                break;
            }
            self.pending.pop_front();
            self.tick(tick, at, now, identity, told);
        }
        self.settle_engines(now, patience, identity, told);
        let Some(newest) = self.watermark else { return };
        while self.queried.pop_front_if(|at| newest.0.saturating_sub(at.0) > PROCESS_SAMPLES_NS).is_some() {}
        while let Some((_, claimed)) =
            self.process_samples.pop_front_if(|(row, _)| newest.0.saturating_sub(row.at.0) > PROCESS_SAMPLES_NS)
        {
            self.off_grid += u64::from(!claimed);
        }
    }

    fn tick(&mut self, tick: DeviceSample, at: BootNs, now: BootNs, identity: &Identity, told: &mut AttributedFacts) {
        let gap_ns = self.watermark.map(|last| tick.at.0.saturating_sub(last.0));
        let period = self.grid.period_or_most_ns();
        self.watermark = Some(tick.at);
        if let Some(gap_ns) = gap_ns {
            self.grid.gap(gap_ns);
        }
        if std::mem::take(&mut self.dry) {
            // The first sample after idleness: up to its own period there was none to take.
            self.idle_until(at.minus(period), told);
        }
        let Some(span) = self.wall.tick(at, gap_ns, period) else { return };
        if span.missing_ns > 0 {
            told.push((at.minus(span.ns), GpuFact::Unobserved { ns: span.missing_ns, why: UnobservedReason::Missing }));
            if gap_ns.is_some() {
                self.gaps += 1;
                // Nobody looked for so long that the ring went round.
                self.overruns += u64::from(now.saturating_since(at) > RING_NS / 2);
            }
        }
        let process_samples = self.process_samples_of(tick.at);
        self.counts.samples += 1;
        self.counts.queried += u64::from(tick.queried);
        if tick.queried {
            self.queried.push_back(tick.at);
        } else if tick.busy_percent > 0 {
            told.push((at, unqueried(Engine::Compute, tick.at, span.ns, tick.busy_percent)));
            return;
        }
        let tick = self.utilization_sample(COMPUTE, tick.at, at, span.ns, tick.busy_percent, &process_samples, identity, told);
        told.push((at, GpuFact::Utilization(tick)));
    }

    fn settle_engines(&mut self, now: BootNs, patience: u64, identity: &Identity, told: &mut AttributedFacts) {
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
            let process_samples = self.process_samples_of(tick.at);
            let engine = tick.engine;
            if tick.busy_percent > 0 && !self.was_queried(tick.at) {
                told.push((at, unqueried(engine, tick.at, period, tick.busy_percent)));
                continue;
            }
            let tick = self.utilization_sample(
                engine as usize,
                tick.at,
                at,
                period,
                tick.busy_percent,
                &process_samples,
                identity,
                told,
            );
            told.push((at, GpuFact::EngineSample(engine, tick)));
        }
    }

    fn was_queried(&self, at: GpuNs) -> bool {
        let near = (self.grid.period_or_most_ns() as f64 * NEAR_PERIODS) as u64;
        self.queried.iter().any(|queried| queried.0.abs_diff(at.0) < near)
    }

    /// Marks the rows of a tick.
    fn process_samples_of(&mut self, at: GpuNs) -> Vec<ProcessSample> {
        let near = (self.grid.period_or_most_ns() as f64 * NEAR_PERIODS) as u64;
        let mut process_samples = Vec::new();
        for (row, claimed) in self.process_samples.iter_mut().filter(|(row, _)| row.at.0.abs_diff(at.0) < near) {
            *claimed = true;
            process_samples.push(*row);
        }
        process_samples
    }

    /// With the rows that name somebody for that engine.
    #[expect(clippy::too_many_arguments, reason = "a tick's own parts, and what is needed to tell whose they are")]
    fn utilization_sample(
        &mut self,
        engine: usize,
        stamp: GpuNs,
        at: BootNs,
        ns: u64,
        busy_percent: u32,
        process_samples: &[ProcessSample],
        identity: &Identity,
        told: &mut AttributedFacts,
    ) -> UtilizationSample {
        let within = self.clock.named_within(at, ns);
        let percent = |row: &ProcessSample| row.percent.get(engine).copied().unwrap_or_default();
        let named = process_samples.iter().filter(|row| percent(row) > 0);
        let processes: Vec<AttributedProcess> =
            named.map(|row| self.owners.row((row.pid, percent(row)), within, identity, told)).collect();
        UtilizationSample { stamp, ns, busy_percent: busy_percent.min(100) as u8, processes }
    }

    /// GPM says how busy a MIG device was.
    fn measured(&mut self, gpm: GpmInterval, wall: WallTime, told: &mut AttributedFacts) {
        self.unobserved_until(gpm.from, UnobservedReason::Missing, told);
        let ns = self.wall.up_to(gpm.to);
        self.last_wall = Some(wall);
        told.push((gpm.to, GpuFact::Measured { ns, busy_ratio: gpm.busy_ratio.clamp(0.0, 1.0) }));
    }

    /// Time passes, also where no driver answers.
    pub fn passed(&mut self, now: BootNs, told: &mut AttributedFacts) {
        if self.gone {
            return;
        }
        if now.saturating_since(self.last_batch) > RING_NS && !std::mem::replace(&mut self.silent, true) {
            self.owners.forget_lists();
            told.push((now, GpuFact::Readings(DeviceReadings::default())));
            told.push((now, GpuFact::Held(None)));
        }
        if !self.info.is_leaf() {
            return;
        }
        let lost = now.minus(RING_NS);
        if lost > self.wall.until() {
            self.unobserved_until(lost, UnobservedReason::NoAnswer, told);
            // What the ring still gives from before is told.
            self.watermark = None;
        }
    }

    pub fn view(&self) -> DeviceView {
        DeviceView {
            sample_gaps: self.gaps,
            ring_overruns: self.overruns,
            rejected: self.rejected,
            off_grid: self.off_grid,
            clock: self.clock.view(),
            period_ns: self.grid.period_ns(),
            last_sample: self.last_wall,
            counts: self.counts,
        }
    }
}

fn unqueried(engine: Engine, stamp: GpuNs, ns: u64, busy_percent: u32) -> GpuFact {
    GpuFact::Unqueried(engine, UnqueriedSample { stamp, ns, busy_percent: busy_percent.min(100) as u8 })
}
