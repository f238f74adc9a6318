//! Asks for the samples of one GPU's ring and for the rows that name who caused them, in the order that [`Recovery`] says.

use nvml_wrapper::error::NvmlError;
use sampler_core::observation::Answer;
use sampler_core::reconstruct::{RawProcessSample, Recovered, Recovery};
use std::time::{Duration, Instant};

use super::budget::{Budget, Cost};
use super::calls::Buffers;
use super::library::Handle;
use super::nvml_caller::{NvmlCaller, is_unsupported};
use crate::health::nvml_calls::Call;
use crate::observe::clock::boot_now;

/// nvmlSamplingType_t: GPU utilization.
const GPU_UTILIZATION: u32 = 1;
/// A dry ring's device is asked this often whether it is idle.
const IDLE_ASKED_EVERY: Duration = Duration::from_secs(1);
/// Whether its answer can be believed is looked at this often, until it is known.
const DOUBTED_EVERY: Duration = Duration::from_secs(5);
/// A ring this busy is one that an answer of 0 contradicts; so many times, for the two are not of the same instant.
const SURELY_BUSY_PERCENT: u32 = 50;
const LIES: u32 = 2;
/// Samples in the driver's ring, at most: what it says may be the size of an answer, not of the ring.
const RING: usize = 72;

/// Taken for the period until it is known.
const USUAL_PERIOD: Duration = Duration::from_millis(167);
/// Time of which no sample was read for 15 s is unobserved.
const HALF_RING_MOST: Duration = Duration::from_millis(6_500);

#[derive(Default)]
pub struct SampleRing {
    recovery: Recovery,
    /// Largest stamp that the ring had, in the device's microseconds.
    newest_us: u64,
    /// Samples that the driver keeps; `None` until it was asked.
    depth: Option<usize>,
    idle: Option<(Instant, bool)>,
    rates: Rates,
}

/// Some boards answer that they are idle whatever runs. Found out while the ring says otherwise.
#[derive(Default)]
struct Rates {
    /// They have told of something.
    honest: bool,
    lies: u32,
    asked: Option<Instant>,
}

/// What the ring is read with.
pub struct Tools<'a> {
    pub handle: &'a Handle,
    pub driver: &'a mut NvmlCaller,
    pub buffers: &'a mut Buffers,
    pub budget: &'a mut Budget,
}

impl SampleRing {
    pub fn period(&self) -> Option<Duration> {
        self.recovery.period_ns().map(Duration::from_nanos)
    }

    pub fn period_or_usual(&self) -> Duration {
        self.period().unwrap_or(USUAL_PERIOD)
    }

    /// How long the driver keeps half of its samples, at most what attribution waits for.
    pub fn half(&self) -> Duration {
        let samples = u32::try_from(self.depth.unwrap_or(RING) / 2).unwrap_or(u32::MAX).max(1);
        (self.period_or_usual() * samples).min(HALF_RING_MOST)
    }

    /// `row_calls`: how many questions for rows may be put. `listed`: how many processes the device had lately, where that is known.
    pub fn poll(
        &mut self,
        tools: &mut Tools<'_>,
        row_calls: usize,
        listed: Option<usize>,
    ) -> (Answer, Recovered, Option<NvmlError>) {
        match self.samples(tools) {
            Ok(()) => {}
            Err(error) if is_unsupported(&error) => return (Answer::Unsupported, Recovered::default(), None),
            Err(error) => return (Answer::Failed, self.recovery.take(), Some(error)),
        }
        self.process_samples(tools, row_calls);
        // Another sample was taken in between: once, for the next poll takes what comes then.
        if self.recovery.is_ahead() && self.samples(tools).is_ok() {
            self.process_samples(tools, 2 * row_calls);
        }
        let recovered = self.recovery.take();
        if recovered.samples.last().is_some_and(|tick| tick.busy_percent >= SURELY_BUSY_PERCENT) {
            self.doubt_rates(tools);
        }
        let answer = if self.recovery.is_dry(boot_now()) {
            Answer::Dry { idle: self.is_idle(tools, listed) }
        } else {
            self.idle = None;
            Answer::Samples
        };
        (answer, recovered, None)
    }

    fn samples(&mut self, tools: &mut Tools<'_>) -> Result<(), NvmlError> {
        if self.depth.is_none() {
            let says = tools.driver.call(Call::GetSamples, || Buffers::capacity(tools.handle, GPU_UTILIZATION));
            self.depth = Some(says.ok().filter(|n| *n > 0).map_or(RING, |n| n.min(RING)));
        }
        let began = boot_now();
        let after = self.recovery.samples_after(began);
        let samples = tools.driver.call(Call::GetSamples, || tools.buffers.samples(tools.handle, GPU_UTILIZATION, after))?;
        self.recovery.samples(&samples, began, boot_now());
        // The newest by the driver's order: a clock that was set back has smaller stamps.
        self.newest_us = samples.last().map_or(self.newest_us, |s| s.at_us);
        Ok(())
    }

    fn process_samples(&mut self, tools: &mut Tools<'_>, at_most: usize) {
        while let Some(after) = self.recovery.next_process_query(at_most) {
            // What was not returned stays marked as not queried.
            let Some(process_samples) = query_process_samples(tools, after) else { return };
            self.recovery.process_samples(after, &process_samples);
        }
    }

    fn doubt_rates(&mut self, tools: &mut Tools<'_>) {
        let known = self.rates.honest || self.rates.lies >= LIES;
        if known || self.rates.asked.is_some_and(|at| at.elapsed() < DOUBTED_EVERY) {
            return;
        }
        self.rates.asked = Some(Instant::now());
        match tools.driver.call(Call::GetUtilizationRates, || tools.handle.device().utilization_rates()) {
            Ok(rates) if rates.gpu > 0 => self.rates.honest = true,
            Ok(_) => self.rates.lies += 1,
            Err(_) => {}
        }
    }

    /// Whether a device whose ring has run dry says elsewhere that nothing runs. What is not known is not idle.
    fn is_idle(&mut self, tools: &mut Tools<'_>, listed: Option<usize>) -> bool {
        if let Some((at, idle)) = self.idle
            && at.elapsed() < IDLE_ASKED_EVERY
        {
            return idle;
        }
        let rates = tools.driver.call(Call::GetUtilizationRates, || tools.handle.device().utilization_rates());
        let says_so = match rates {
            Ok(rates) if rates.gpu > 0 => false,
            Ok(_) if self.rates.lies < LIES => true,
            // Nothing else tells a dry ring from one that froze, but that nobody is there.
            Ok(_) => listed == Some(0),
            Err(error) if is_unsupported(&error) => listed == Some(0),
            Err(_) => false,
        };
        // Somebody on an engine since the ring's last sample contradicts it.
        let newest = self.newest_us;
        let idle = says_so
            && query_process_samples(tools, newest)
                .is_some_and(|process_samples| process_samples.iter().all(|row| row.at_us <= newest));
        self.idle = Some((Instant::now(), idle));
        idle
    }
}

/// Rows after this stamp; none where the device tells of no process at all. `None` when it did not answer.
fn query_process_samples(tools: &mut Tools<'_>, after: u64) -> Option<Vec<RawProcessSample>> {
    let before = tools.driver.spent();
    let all = tools
        .driver
        .call(Call::GetProcessesUtilizationInfo, || tools.buffers.process_samples_of_all_engines(tools.handle, after));
    let process_samples = match all {
        Err(error) if is_unsupported(&error) => {
            tools.driver.call(Call::GetProcessUtilization, || tools.buffers.process_samples(tools.handle, after))
        }
        all => all,
    };
    let after = tools.driver.spent();
    tools.budget.row_call(Cost { cpu: after.cpu.saturating_sub(before.cpu), wait: after.wall.saturating_sub(before.wall) });
    match process_samples {
        Ok(process_samples) => Some(process_samples),
        // Nobody can be named, ever: busy time is `no_pid`, and known all the same.
        Err(error) if is_unsupported(&error) => Some(Vec::new()),
        Err(_) => None,
    }
}
