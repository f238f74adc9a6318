//! Reads the samples of one GPU's ring and the process samples that name their processes, in the order that [`Recovery`] requires.

use nvml_wrapper::error::NvmlError;
use sampler_core::observation::{EngineSample, PollStatus};
use sampler_core::reconstruct::{RawProcessSample, RawSample, Recovered, Recovery};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::budget::{Budget, Cost};
use super::calls::Buffers;
use super::library::Handle;
use super::nvml_caller::{NvmlCaller, is_unsupported};
use super::process_calls::ProcessCalls;
use super::sample_buffer::{BufferSample, SAME_SAMPLE_US};
use super::source::Source;
use crate::health::nvml_calls::Call;
use crate::observe::clock::boot_now;

/// nvmlSamplingType_t: GPU utilization.
pub const GPU_UTILIZATION: u32 = 1;
/// How often a device with a dry ring is queried for being idle.
const IDLE_QUERIED_EVERY: Duration = Duration::from_secs(1);
/// How often the utilization rates of a device are verified, until it is known whether they can be trusted.
const RATES_VERIFIED_EVERY: Duration = Duration::from_secs(5);
/// A sample this busy contradicts a utilization rate of 0. Several contradictions are required, because the two values do not refer to
/// the same instant.
const SURELY_BUSY_PERCENT: u32 = 50;
const MAX_CONTRADICTIONS: u32 = 2;
/// Maximum number of samples in the driver's ring: the reported size may be that of a reply, not of the ring.
const RING: usize = 72;

/// The assumed period until it is known.
const USUAL_PERIOD: Duration = Duration::from_millis(167);
/// Upper bound of half a ring: time without a sample for 15 s is unobserved.
const HALF_RING_MOST: Duration = Duration::from_millis(6_500);

#[derive(Default)]
pub struct SampleRing {
    source: Source,
    /// Why the driver's own buffer is no longer used, until that is reported.
    ended: Option<&'static str>,
    /// New samples of the other engines, where the source has them.
    engine_samples: Vec<EngineSample>,
    recovery: Recovery,
    /// Whether the last sample that was read showed activity.
    is_busy: bool,
    /// Newest timestamp of the ring, in microseconds of the device.
    newest_us: u64,
    /// Number of samples that the driver keeps; `None` until it was queried.
    depth: Option<usize>,
    idle: Option<(Instant, bool)>,
    rates: Rates,
}

/// Some boards always report that they are idle. This is detected while the ring shows activity.
#[derive(Default)]
struct Rates {
    /// The rates have been above 0.
    trusted: bool,
    contradictions: u32,
    verified: Option<Instant>,
}

/// The objects needed to read the ring.
pub struct Tools<'a> {
    pub handle: &'a Handle,
    pub driver: &'a mut NvmlCaller,
    pub buffers: &'a mut Buffers,
    pub budget: &'a mut Budget,
    pub process_calls: &'a mut ProcessCalls,
}

impl SampleRing {
    pub fn period(&self) -> Option<Duration> {
        self.recovery.period_ns().map(Duration::from_nanos)
    }

    pub fn period_or_usual(&self) -> Duration {
        self.period().unwrap_or(USUAL_PERIOD)
    }

    /// The time for which the driver keeps half of its samples, at most as long as attribution waits.
    pub fn half(&self) -> Duration {
        let samples = u32::try_from(self.depth.unwrap_or(RING) / 2).unwrap_or(u32::MAX).max(1);
        (self.period_or_usual() * samples).min(HALF_RING_MOST)
    }

    /// Whether one read returns every sample with its process.
    pub fn is_complete(&self) -> bool {
        matches!(self.source, Source::Buffer(_))
    }

    /// The new samples of the other engines; `None` where they are read separately.
    pub fn take_engine_samples(&mut self) -> Option<Vec<EngineSample>> {
        self.is_complete().then(|| std::mem::take(&mut self.engine_samples))
    }

    /// Decides where samples are read, while the GPU is busy. `devfs`: folders that may have the device nodes; empty if only NVML is to be used. Returns a new
    /// decision, with the reason where it is NVML.
    pub fn choose_source(&mut self, tools: &mut Tools<'_>, devfs: &[PathBuf], pci_bus_id: &str) -> Option<Result<(), String>> {
        if let Some(reason) = self.ended.take() {
            return Some(Err(reason.into()));
        }
        if !self.is_busy {
            return None;
        }
        let decision = self.source.decide(tools, devfs, pci_bus_id)?;
        if let (Ok(samples), began) = (&decision, boot_now()) {
            // The two sources give the same sample slightly different times: what NVML returned is known.
            let known = samples.iter().filter(|sample| sample.at_us <= self.newest_us.saturating_add(SAME_SAMPLE_US));
            self.recovery = Recovery::default();
            self.recovery.samples(&known.map(BufferSample::device_sample).collect::<Vec<_>>(), began, began);
            let _known = self.recovery.take();
        }
        Some(decision.map(drop))
    }

    /// `process_queries`: maximum number of process queries. `listed`: number of processes in the last list, if known.
    pub fn poll(
        &mut self,
        tools: &mut Tools<'_>,
        process_queries: usize,
        listed: Option<usize>,
    ) -> (PollStatus, Recovered, Option<NvmlError>) {
        if let Source::Buffer(source) = &mut self.source {
            source.verify_again(tools);
            let Some((next, reason)) = source.ended() else { return self.poll_buffer(tools, listed) };
            (self.source, self.ended) = (next, Some(reason));
            // The two sources give the same sample slightly different times: what the buffer returned is known.
            let (known, now) = (RawSample { at_us: self.newest_us, percent: 0 }, boot_now());
            self.recovery = Recovery::default();
            self.recovery.samples(&[known], now, now);
            let _known = self.recovery.take();
        }
        match self.samples(tools) {
            Ok(()) => {}
            Err(error) if is_unsupported(&error) => return (PollStatus::Unsupported, Recovered::default(), None),
            Err(error) => return (PollStatus::Failed, self.recovery.take(), Some(error)),
        }
        self.process_samples(tools, process_queries);
        // A further sample arrived in between. Read once more only: the next poll reads later ones.
        if self.recovery.is_ahead() && self.samples(tools).is_ok() {
            self.process_samples(tools, 2 * process_queries);
        }
        let recovered = self.recovery.take();
        self.is_busy = recovered.samples.last().is_some_and(|sample| sample.busy_percent > 0);
        self.verify_rates(&recovered, tools);
        (self.status(tools, listed), recovered, None)
    }

    fn status(&mut self, tools: &mut Tools<'_>, listed: Option<usize>) -> PollStatus {
        if self.recovery.is_dry(boot_now()) {
            return PollStatus::Dry { idle: self.is_idle(tools, listed) };
        }
        self.idle = None;
        PollStatus::Samples
    }

    fn poll_buffer(&mut self, tools: &mut Tools<'_>, listed: Option<usize>) -> (PollStatus, Recovered, Option<NvmlError>) {
        let Source::Buffer(source) = &mut self.source else { return (PollStatus::Failed, Recovered::default(), None) };
        let began = boot_now();
        let samples = match tools.driver.call(Call::SampleBuffer, || source.read()) {
            Ok(samples) => samples,
            Err(error) => {
                source.read_failed();
                return (PollStatus::Failed, self.recovery.take(), Some(error));
            }
        };
        // Sets what a reply without new samples means; the reply is always the whole buffer.
        let _after = self.recovery.samples_after(began);
        let of_compute: Vec<RawSample> = samples.iter().map(BufferSample::device_sample).collect();
        self.recovery.samples(&of_compute, began, boot_now());
        self.recovery.named(samples.iter().flat_map(BufferSample::process_samples));
        self.engine_samples.extend(source.engines(&samples));
        self.newest_us = of_compute.last().map_or(self.newest_us, |sample| sample.at_us);
        let recovered = self.recovery.take();
        self.verify_rates(&recovered, tools);
        (self.status(tools, listed), recovered, None)
    }

    fn samples(&mut self, tools: &mut Tools<'_>) -> Result<(), NvmlError> {
        if self.depth.is_none() {
            let capacity = tools.driver.call(Call::GetSamples, || Buffers::capacity(tools.handle, GPU_UTILIZATION));
            self.depth = Some(capacity.ok().filter(|n| *n > 0).map_or(RING, |n| n.min(RING)));
        }
        let began = boot_now();
        let after = self.recovery.samples_after(began);
        let samples = tools.driver.call(Call::GetSamples, || tools.buffers.samples(tools.handle, GPU_UTILIZATION, after))?;
        self.recovery.samples(&samples, began, boot_now());
        // The last in the driver's order, not the largest timestamp: the clock may have been set back.
        self.newest_us = samples.last().map_or(self.newest_us, |s| s.at_us);
        Ok(())
    }

    fn process_samples(&mut self, tools: &mut Tools<'_>, at_most: usize) {
        while let Some(after) = self.recovery.next_process_query(at_most) {
            // Samples without a reply stay marked as not queried.
            let Some(process_samples) = query_process_samples(tools, after) else { return };
            self.recovery.process_samples(after, &process_samples);
        }
    }

    fn verify_rates(&mut self, recovered: &Recovered, tools: &mut Tools<'_>) {
        if recovered.samples.last().is_none_or(|sample| sample.busy_percent < SURELY_BUSY_PERCENT) {
            return;
        }
        let known = self.rates.trusted || self.rates.contradictions >= MAX_CONTRADICTIONS;
        if known || self.rates.verified.is_some_and(|at| at.elapsed() < RATES_VERIFIED_EVERY) {
            return;
        }
        self.rates.verified = Some(Instant::now());
        match tools.driver.call(Call::GetUtilizationRates, || tools.handle.device().utilization_rates()) {
            Ok(rates) if rates.gpu > 0 => self.rates.trusted = true,
            Ok(_) => self.rates.contradictions += 1,
            Err(_) => {}
        }
    }

    /// Whether a device with a dry ring is idle according to other queries. Unknown counts as not idle.
    fn is_idle(&mut self, tools: &mut Tools<'_>, listed: Option<usize>) -> bool {
        if let Some((at, idle)) = self.idle
            && at.elapsed() < IDLE_QUERIED_EVERY
        {
            return idle;
        }
        let rates = tools.driver.call(Call::GetUtilizationRates, || tools.handle.device().utilization_rates());
        let reported_idle = match rates {
            Ok(rates) if rates.gpu > 0 => false,
            Ok(_) if self.rates.contradictions < MAX_CONTRADICTIONS => true,
            // Only the absence of processes distinguishes a dry ring from a frozen one.
            Ok(_) => listed == Some(0),
            Err(error) if is_unsupported(&error) => listed == Some(0),
            Err(_) => false,
        };
        // A process sample after the last sample of the ring contradicts it.
        let newest = self.newest_us;
        let idle = reported_idle
            && query_process_samples(tools, newest)
                .is_some_and(|process_samples| process_samples.iter().all(|sample| sample.at_us <= newest));
        self.idle = Some((Instant::now(), idle));
        idle
    }
}

/// Process samples after this timestamp; empty if the device does not support the query. `None` if the query failed.
pub fn query_process_samples(tools: &mut Tools<'_>, after: u64) -> Option<Vec<RawProcessSample>> {
    let before = tools.driver.spent;
    let process_samples = tools.process_calls.query(tools.handle, tools.driver, tools.buffers, after);
    let after = tools.driver.spent;
    tools.budget.process_query(Cost { cpu: after.cpu.saturating_sub(before.cpu), wait: after.wait.saturating_sub(before.wait) });
    match process_samples {
        Ok(process_samples) => Some(process_samples),
        // Processes can never be named: busy time is still observed, and attributed to `no_pid`.
        Err(error) if is_unsupported(&error) => Some(Vec::new()),
        Err(_) => None,
    }
}
