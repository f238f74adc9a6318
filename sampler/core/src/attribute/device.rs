//! Attribution of one device: turns its samples into facts.

use std::collections::VecDeque;
use std::sync::Arc;

use strum::EnumCount as _;

use super::clock::GpuClock;
use super::process_attribution::ProcessAttribution;
use super::timeline::Timeline;
use crate::device::{ClockView, DeviceReadings, Engine, GpuInfo, HardwareReadings, Reason, SampleCounts};
use crate::fact::{AttributedProcess, ClockFact, GpuFact, Holder, UnobservedReason, UnqueriedSample, User, UtilizationSample};
use crate::identity::Identity;
use crate::observation::{
    BusyLatch, DeviceSample, EngineSample, GpmInterval, GpuBatch, PollStatus, ProcessSample, Rejected, RunningProcess,
};
use crate::reconstruct::Grid;
use crate::units::{BootNs, GpuNs, WallTime};

/// A device sample waits this long, and at least two periods, for its process sample, which another call returns.
const SETTLE_NS: u64 = 400_000_000;
/// Process samples are kept this long for the samples of other engines, which are read seconds later.
const PROCESS_SAMPLES_NS: u64 = 5_000_000_000;
/// What a driver's sample buffer may still return: 72 samples of about 167 ms, plus a margin for delays. Older time without a response is
/// unobserved.
const RING_NS: u64 = 15_000_000_000;
/// Maximum number of waiting samples of other engines: twice what their buffers hold.
const MAX_ENGINE_SAMPLES: usize = 2 * 72 * Engine::COUNT;
/// Full samples without a process wait this long at most for whether the device's busy counter is latched.
const LATCH_NS: u64 = 5_000_000_000;
/// Interval of clock facts.
const CLOCK_NS: u64 = 10_000_000_000;

type AttributedFacts = Vec<(BootNs, GpuFact)>;

#[derive(Debug, Default)]
pub struct DeviceAttribution {
    info: Arc<GpuInfo>,
    gone: bool,
    /// Not read until it is found again, on request.
    released: bool,
    clock: GpuClock,
    grid: Grid,
    timeline: Timeline,
    attribution: ProcessAttribution,
    /// The first read only sets watermarks.
    first_read: bool,
    watermark: Option<GpuNs>,
    /// The sample buffer is empty because the device is idle.
    dry: bool,
    pending: VecDeque<DeviceSample>,
    engine_pending: VecDeque<EngineSample>,
    /// Whether the busy counter is latched, at the last poll.
    latch: BusyLatch,
    /// The newest sample of the counter while it was latched.
    latched_until: Option<GpuNs>,
    /// Each with whether a device sample claimed it.
    process_samples: VecDeque<(ProcessSample, bool)>,
    /// Stamps of the device samples of the last [`PROCESS_SAMPLES_NS`] with a queried process. Samples of other engines near them were
    /// queried too.
    queried: VecDeque<GpuNs>,
    /// Attributed samples, and how many of them had their process queried.
    pub counts: SampleCounts,
    pub sample_gaps: u64,
    pub ring_overruns: u64,
    pub rejected: [u64; Rejected::COUNT],
    pub off_grid: u64,
    pub last_sample: Option<WallTime>,
    pub hardware: HardwareReadings,
    last_batch: BootNs,
    /// The driver has not responded for so long that the readings and process lists were reported as unknown.
    silent: bool,
    clock_reported: BootNs,
}

impl DeviceAttribution {
    pub fn new(info: Arc<GpuInfo>, at: BootNs, facts: &mut AttributedFacts) -> Self {
        facts.push((at, GpuFact::Opened(Arc::clone(&info))));
        Self { info, timeline: Timeline::new(at), first_read: true, last_batch: at, ..Self::default() }
    }

    /// The device was found again: its sample buffer is new, and its clock may be.
    pub fn reopen(&mut self, info: Arc<GpuInfo>, at: BootNs, facts: &mut AttributedFacts) {
        if std::mem::take(&mut self.gone) {
            self.timeline.resume(at);
        }
        if std::mem::take(&mut self.released) && self.info.is_leaf() {
            self.unobserved_until(at, UnobservedReason::Released, facts);
        }
        facts.push((at, GpuFact::Opened(Arc::clone(&info))));
        self.info = info;
        (self.first_read, self.dry) = (true, false);
        self.grid = Grid::default();
        self.clock.forget();
        self.restart();
    }

    /// Drops waiting samples: they belong to a sample buffer or a clock that no longer exists.
    fn restart(&mut self) {
        self.watermark = None;
        (self.latch, self.latched_until) = (BusyLatch::Clear, None);
        self.pending.clear();
        self.engine_pending.clear();
        self.process_samples.clear();
        self.queried.clear();
    }

    pub fn gone(&mut self, at: BootNs, facts: &mut AttributedFacts) {
        self.gone = true;
        let why = if std::mem::take(&mut self.released) { UnobservedReason::Released } else { UnobservedReason::NoAnswer };
        self.unobserved_until(at, why, facts);
        self.restart();
        self.hardware = HardwareReadings::default();
        self.attribution.forget_lists();
        facts.push((at, GpuFact::Gone));
    }

    /// Ends observation until the device is found again. Samples that wait for their process samples are dropped: the calls that would
    /// return those are not made.
    pub fn release(&mut self, at: BootNs, facts: &mut AttributedFacts) {
        if self.gone || std::mem::replace(&mut self.released, true) {
            return;
        }
        self.restart();
        self.hardware = HardwareReadings::default();
        self.attribution.forget_lists();
        facts.push((at, GpuFact::Readings(DeviceReadings::default())));
        facts.push((at, GpuFact::Held(None)));
    }

    /// A process of `user` called cuInit at `at`. One that calls it again is known, and a user that starts very many is not followed in all
    /// of them.
    pub fn client(&mut self, (pid, user): (u32, User), at: BootNs, identity: &Identity, facts: &mut AttributedFacts) {
        if self.gone || self.released {
            return;
        }
        let since = self.attribution.since(pid, at, identity);
        if !self.attribution.follow_client((pid, since), user, at) {
            return;
        }
        facts.push((at, GpuFact::Client { pid, user, since }));
        self.attribution.report_departure((pid, since), identity, facts);
    }

    fn unobserved_until(&mut self, at: BootNs, why: UnobservedReason, facts: &mut AttributedFacts) {
        let ns = self.timeline.advance_to(at);
        if ns > 0 {
            facts.push((at, GpuFact::Unobserved { ns, why }));
        }
    }

    fn idle_until(&mut self, at: BootNs, facts: &mut AttributedFacts) {
        let ns = self.timeline.advance_to(at);
        if ns > 0 {
            facts.push((at, GpuFact::Idle { ns }));
        }
    }

    pub fn apply(&mut self, batch: &GpuBatch, identity: &Identity, facts: &mut AttributedFacts) {
        // A driver call was in progress when the device disappeared or was released.
        if self.gone || self.released {
            return;
        }
        self.silent = false;
        self.hardware = batch.hardware.unwrap_or(self.hardware);
        // Before the readings, which count the reasons without a counter.
        facts.extend(batch.throttle_times.map(|times| (batch.ended, GpuFact::ThrottleTimes(times))));
        if let Some(readings) = batch.readings {
            facts.push((batch.ended, GpuFact::Readings(readings)));
        }
        let failed_entirely = batch.status == PollStatus::Failed && batch.readings == Some(DeviceReadings::default());
        if let Some(processes) = &batch.processes {
            let users = self.attribution.attribute_list(processes, batch.began, batch.ended, identity);
            let holder = |(process, user): (&RunningProcess, User)| Holder {
                pid: process.pid,
                user,
                kind: process.kind,
                memory_bytes: process.memory_bytes,
            };
            let held = processes.iter().zip(users).map(holder).collect();
            facts.push((batch.ended, GpuFact::Held(Some(held))));
        } else if failed_entirely {
            // The list of holders is not current either.
            self.attribution.forget_lists();
            facts.push((batch.ended, GpuFact::Held(None)));
        }
        for (sum, n) in self.rejected.iter_mut().zip(batch.rejected) {
            *sum += u64::from(n);
        }
        if let Some(gpm) = batch.gpm {
            self.measured(gpm, batch.wall, facts);
        } else {
            match batch.status {
                PollStatus::Samples => self.read_samples(batch, identity, facts),
                PollStatus::Dry { idle } => self.dry(idle, batch, identity, facts),
                // A MIG device is measured in intervals; the next one may follow.
                PollStatus::Unsupported => {
                    self.settle_samples(batch.ended, identity, facts);
                    let ns = self.timeline.advance_to(batch.ended);
                    facts.push((batch.ended, GpuFact::Unsupported { ns }));
                }
                PollStatus::Failed => self.settle_samples(batch.ended, identity, facts),
            }
        }
        self.last_batch = batch.ended;
        if batch.ended.saturating_since(self.clock_reported) > CLOCK_NS && self.clock.is_known() {
            self.clock_reported = batch.ended;
            let clock = self.clock.view();
            let clock = ClockFact {
                ahead_of_boot_seconds: clock.ahead_of_boot_seconds,
                uncertainty_seconds: clock.uncertainty_seconds,
                period_ns: self.grid.period_ns(),
                steps: clock.steps,
            };
            facts.push((batch.ended, GpuFact::Clock(clock)));
        }
    }

    fn read_samples(&mut self, batch: &GpuBatch, identity: &Identity, facts: &mut AttributedFacts) {
        if batch.stepped {
            self.clock.stepped();
            self.restart();
            facts.push((batch.ended, GpuFact::Restarted));
        }
        let newest = batch.samples.iter().map(|t| t.at).max();
        match newest {
            Some(newest) => {
                let oldest = batch.samples.iter().map(|t| t.at).min().unwrap_or(newest);
                self.clock.polled((oldest, newest), batch.ring_began, batch.ended, self.grid.period_or_most_ns());
                self.last_sample = Some(batch.wall);
            }
            None => self.clock.silent(batch.ring_began),
        }
        if std::mem::take(&mut self.first_read) {
            // What the buffer held before the start is not attributed: it only sets the watermarks.
            self.watermark = newest;
            if let Some(at) = newest.and_then(|newest| self.clock.boot(newest)) {
                self.unobserved_until(at, UnobservedReason::Start, facts);
            }
            return;
        }
        let known = self.pending.back().map(|t| t.at).or(self.watermark);
        self.pending.extend(batch.samples.iter().filter(|t| known.is_none_or(|known| t.at > known)));
        self.engine_pending.extend(&batch.engine_samples);
        self.process_samples.extend(batch.process_samples.iter().map(|sample| (*sample, false)));
        self.latch = batch.latch;
        if batch.latch == BusyLatch::Latched {
            self.latched_until = newest.or(self.latched_until);
        }
        self.settle_samples(batch.ended, identity, facts);
    }

    /// Handles an empty sample buffer, as an idle device has it.
    fn dry(&mut self, idle: bool, batch: &GpuBatch, identity: &Identity, facts: &mut AttributedFacts) {
        self.clock.silent(batch.ring_began);
        self.settle_samples(batch.ended, identity, facts);
        self.first_read = false;
        if !self.pending.is_empty() {
            return;
        }
        // A sample that still arrives is not older than a period plus the time that the driver takes to serve it.
        let until = batch.ended.minus(2 * self.grid.period_or_most_ns() + SETTLE_NS);
        if until <= self.timeline.until() {
            return;
        }
        self.watermark = None;
        self.dry = idle;
        if idle {
            self.idle_until(until, facts);
        } else {
            self.unobserved_until(until, UnobservedReason::NoSamples, facts);
        }
    }

    /// Attributes every sample that is old enough for its process sample, if it has one, to have been read.
    fn settle_samples(&mut self, now: BootNs, identity: &Identity, facts: &mut AttributedFacts) {
        self.attribution.report_departures(now, identity, facts);
        let patience = SETTLE_NS.max(2 * self.grid.period_or_most_ns());
        while let Some(&sample) = self.pending.front() {
            let Some(at) = self.clock.boot(sample.at) else { return };
            let is_suspected = self.latch == BusyLatch::Suspected && self.is_full_without_process(&sample);
            let wait = if is_suspected { LATCH_NS.max(patience) } else { patience };
            if now.saturating_since(at) < wait {
                break;
            }
            self.pending.pop_front();
            self.attribute_sample(sample, at, now, identity, facts);
        }
        self.settle_engines(now, patience, identity, facts);
        let Some(newest) = self.watermark else { return };
        while self.queried.pop_front_if(|at| newest.0.saturating_sub(at.0) > PROCESS_SAMPLES_NS).is_some() {}
        while let Some((_, claimed)) =
            self.process_samples.pop_front_if(|(sample, _)| newest.0.saturating_sub(sample.at.0) > PROCESS_SAMPLES_NS)
        {
            self.off_grid += u64::from(!claimed);
        }
    }

    fn attribute_sample(
        &mut self,
        sample: DeviceSample,
        at: BootNs,
        now: BootNs,
        identity: &Identity,
        facts: &mut AttributedFacts,
    ) {
        let gap_ns = self.watermark.map(|last| sample.at.0.saturating_sub(last.0));
        let period = self.grid.period_or_most_ns();
        self.watermark = Some(sample.at);
        if let Some(gap_ns) = gap_ns {
            self.grid.gap(gap_ns);
        }
        if std::mem::take(&mut self.dry) {
            // The first sample after an idle span: before its own period there was nothing to sample.
            self.idle_until(at.minus(period), facts);
        }
        let Some(span) = self.timeline.advance_by_sample(at, gap_ns, period) else { return };
        if span.missing_ns > 0 {
            facts.push((at.minus(span.ns), GpuFact::Unobserved { ns: span.missing_ns, why: UnobservedReason::Missing }));
            if gap_ns.is_some() {
                self.sample_gaps += 1;
                // The buffer was not read for so long that it wrapped.
                self.ring_overruns += u64::from(now.saturating_since(at) > RING_NS / 2);
            }
        }
        self.counts.samples += 1;
        self.counts.queried += u64::from(sample.queried);
        if sample.queried {
            self.queried.push_back(sample.at);
        }
        let is_latched = self.latched_until.is_some_and(|until| sample.at <= until) && self.is_full_without_process(&sample);
        let DeviceSample { at: stamp, busy_percent, queried } = sample;
        let sample = EngineSample { engine: Engine::Compute, at: stamp, busy_percent };
        let mut fact = self.sample_fact(sample, at, span.ns, queried, identity, facts);
        if let GpuFact::Utilization(utilization) = &mut fact
            && is_latched
        {
            // Named as time without a process, it is neither divided over other samples nor credited to a holder of the device.
            let user = User::Unattributed(Reason::NoPid);
            utilization.processes = vec![AttributedProcess { pid: 0, percent: 100, user, since: BootNs(0) }];
        }
        facts.push((at, fact));
    }

    fn settle_engines(&mut self, now: BootNs, patience: u64, identity: &Identity, facts: &mut AttributedFacts) {
        let period = self.grid.period_or_most_ns();
        // Samples wait while the offset of their clock is unknown, but their number is bounded.
        self.engine_pending.drain(..self.engine_pending.len().saturating_sub(MAX_ENGINE_SAMPLES));
        if !self.clock.is_known() {
            return;
        }
        while let Some(&sample) = self.engine_pending.front() {
            // A sample with a time in the future, or without a valid time, would block all that follow.
            let at = self.clock.boot(sample.at).filter(|at| *at <= now.plus(RING_NS));
            if at.is_some_and(|at| now.saturating_since(at) < patience) {
                return;
            }
            self.engine_pending.pop_front();
            let Some(at) = at else { continue };
            let near = self.grid.near_ns();
            let queried = self.queried.iter().any(|queried| queried.0.abs_diff(sample.at.0) < near);
            let fact = self.sample_fact(sample, at, period, queried, identity, facts);
            facts.push((at, fact));
        }
    }

    /// Whether the sample may be one of a latched busy counter.
    fn is_full_without_process(&self, sample: &DeviceSample) -> bool {
        let near = self.grid.near_ns();
        let names =
            |named: &ProcessSample| named.at.0.abs_diff(sample.at.0) < near && named.percent[Engine::Compute as usize] > 0;
        sample.queried && sample.busy_percent >= 100 && !self.process_samples.iter().any(|(named, _)| names(named))
    }

    /// Returns the process samples of a device sample and marks them as claimed.
    fn process_samples_of(&mut self, at: GpuNs) -> Vec<ProcessSample> {
        let near = self.grid.near_ns();
        let mut process_samples = Vec::new();
        for (sample, claimed) in self.process_samples.iter_mut().filter(|(sample, _)| sample.at.0.abs_diff(at.0) < near) {
            *claimed = true;
            process_samples.push(*sample);
        }
        process_samples
    }

    /// The fact about a sample of the span of `ns` that ends at `at`, with the processes that are named for its engine. Residencies of
    /// these processes that have ended are added to `facts`.
    fn sample_fact(
        &mut self,
        sample: EngineSample,
        at: BootNs,
        ns: u64,
        queried: bool,
        identity: &Identity,
        facts: &mut AttributedFacts,
    ) -> GpuFact {
        let EngineSample { engine, at: stamp, busy_percent } = sample;
        let process_samples = self.process_samples_of(stamp);
        let is_busy = busy_percent > 0;
        let busy_percent = busy_percent.min(100) as u8;
        if is_busy && !queried {
            return GpuFact::Unqueried(engine, UnqueriedSample { stamp, ns, busy_percent });
        }
        let within = self.clock.named_within(at, ns);
        let percent = |sample: &ProcessSample| sample.percent[engine as usize];
        let named = process_samples.iter().filter(|sample| percent(sample) > 0);
        let processes: Vec<AttributedProcess> =
            named.map(|sample| self.attribution.attribute((sample.pid, percent(sample)), within, identity, facts)).collect();
        let sample = UtilizationSample { stamp, ns, busy_percent, processes };
        if engine == Engine::Compute { GpuFact::Utilization(sample) } else { GpuFact::EngineSample(engine, sample) }
    }

    /// Books what GPM measured of a MIG device.
    fn measured(&mut self, gpm: GpmInterval, wall: WallTime, facts: &mut AttributedFacts) {
        self.unobserved_until(gpm.from, UnobservedReason::Missing, facts);
        let ns = self.timeline.advance_to(gpm.to);
        self.last_sample = Some(wall);
        facts.push((gpm.to, GpuFact::Measured { ns, busy_ratio: gpm.busy_ratio.clamp(0.0, 1.0) }));
    }

    /// Advances time, also where the driver does not respond.
    pub fn advance(&mut self, now: BootNs, facts: &mut AttributedFacts) {
        if self.gone {
            return;
        }
        if self.released {
            if self.info.is_leaf() {
                self.unobserved_until(now, UnobservedReason::Released, facts);
            }
            return;
        }
        if now.saturating_since(self.last_batch) > RING_NS && !std::mem::replace(&mut self.silent, true) {
            self.hardware = HardwareReadings::default();
            self.attribution.forget_lists();
            facts.push((now, GpuFact::Readings(DeviceReadings::default())));
            facts.push((now, GpuFact::Held(None)));
        }
        if !self.info.is_leaf() {
            return;
        }
        let lost = now.minus(RING_NS);
        if lost > self.timeline.until() {
            self.unobserved_until(lost, UnobservedReason::NoAnswer, facts);
            // Time before `lost` is booked: samples that the buffer still returns from it do not count.
            self.watermark = None;
        }
    }

    pub fn clock(&self) -> ClockView {
        self.clock.view()
    }

    pub fn period_ns(&self) -> Option<u64> {
        self.grid.period_ns()
    }
}
