//! Which of NVML's two calls returns the processes of samples.
//!
//! ```text
//!  all engines --not supported, or silent while the other one names processes--> legacy
//!              <--the same---------------------------------------------------------
//! ```
//! Either one has been seen to return NOT_SUPPORTED, nothing, or entries of 0 % on devices on which the other one is right (Blackwell, and
//! drivers of branch 580). No version decides: the other one is tried in each silence, ever more rarely while it lasts.

use nvml_wrapper::error::NvmlError;
use sampler_core::observation::DeviceSample;
use sampler_core::reconstruct::{RawProcessSample, Recovered};
use sampler_core::units::GpuNs;

use super::calls::Buffers;
use super::library::Handle;
use super::nvml_caller::{NvmlCaller, is_unsupported};
use crate::health::nvml_calls::Call;

/// Queried samples in succession that name no process, though each shows a busy device, before the other call is tried.
const SILENT_SAMPLES: u32 = 8;
/// Up to twice as many before each further try in the same silence.
const SILENT_SAMPLES_MOST: u32 = 8192;
/// A sample this busy names a process with a probability of at least one half.
const BUSY_PERCENT: u32 = 50;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProcessCall {
    /// With all engines, which drivers since 550 have.
    #[default]
    AllEngines,
    Legacy,
}

impl ProcessCall {
    fn other(self) -> Self {
        match self {
            Self::AllEngines => Self::Legacy,
            Self::Legacy => Self::AllEngines,
        }
    }

    pub fn call(self) -> Call {
        match self {
            Self::AllEngines => Call::GetProcessesUtilizationInfo,
            Self::Legacy => Call::GetProcessUtilization,
        }
    }

    fn make(
        self,
        handle: &Handle,
        driver: &mut NvmlCaller,
        buffers: &mut Buffers,
        after: u64,
    ) -> Result<Vec<RawProcessSample>, NvmlError> {
        driver.call(self.call(), || match self {
            Self::AllEngines => buffers.process_samples_of_all_engines(handle, after),
            Self::Legacy => buffers.process_samples(handle, after),
        })
    }
}

#[derive(Default)]
pub struct ProcessCalls {
    preferred: ProcessCall,
    /// The device supported one of them in the last query.
    pub is_supported: bool,
    silence: Silence,
}

impl ProcessCalls {
    /// Process samples after this timestamp, by the preferred call, or by the other one if the device does not support it.
    pub fn query(
        &mut self,
        handle: &Handle,
        driver: &mut NvmlCaller,
        buffers: &mut Buffers,
        after: u64,
    ) -> Result<Vec<RawProcessSample>, NvmlError> {
        let made = match self.preferred.make(handle, driver, buffers, after) {
            Err(error) if is_unsupported(&error) => self.preferred.other().make(handle, driver, buffers, after),
            made => made,
        };
        self.is_supported = !made.as_ref().is_err_and(is_unsupported);
        made
    }

    /// Evaluates what a poll returned. Tries the other call where that is due; the newly preferred one if it names processes that the
    /// present one does not.
    pub fn verify(
        &mut self,
        recovered: &Recovered,
        handle: &Handle,
        driver: &mut NvmlCaller,
        buffers: &mut Buffers,
    ) -> Option<ProcessCall> {
        let after = self.silence.observe(recovered)?;
        let other = self.preferred.other();
        let names = |made: Result<Vec<RawProcessSample>, NvmlError>| made.is_ok_and(|samples| samples.iter().any(is_named));
        // In this order, because a sample may arrive in between.
        if !names(other.make(handle, driver, buffers, after)) || names(self.preferred.make(handle, driver, buffers, after)) {
            return None;
        }
        self.preferred = other;
        self.silence = Silence::default();
        Some(other)
    }
}

fn is_named(sample: &RawProcessSample) -> bool {
    !matches!(sample.pid, 0 | u32::MAX) && sample.percent.iter().any(|percent| (1..=100).contains(percent))
}

/// Successive busy samples without a process.
#[derive(Default)]
struct Silence {
    /// Before the first of them.
    since: Option<GpuNs>,
    last: Option<GpuNs>,
    samples: u32,
    /// Of the last try in this silence; 0 before the first.
    tried_after: u32,
}

impl Silence {
    /// The time before the silence, in microseconds of the device, if the other call is to be tried now.
    fn observe(&mut self, recovered: &Recovered) -> Option<u64> {
        let newest = recovered.samples.last().map(|sample| sample.at);
        let is_named = recovered.process_samples.iter().any(|sample| sample.percent.iter().any(|percent| *percent > 0));
        if is_named || recovered.stepped {
            *self = Self { last: newest.or(self.last), ..Self::default() };
            return None;
        }
        let is_silent = |sample: &&DeviceSample| sample.queried && sample.busy_percent >= BUSY_PERCENT;
        let silent = recovered.samples.iter().filter(is_silent).count() as u32;
        if silent > 0 {
            self.since = self.since.or(self.last);
            self.samples += silent;
        }
        self.last = newest.or(self.last);
        let due = (self.tried_after * 2).clamp(SILENT_SAMPLES, SILENT_SAMPLES_MOST);
        let since = self.since.filter(|_| self.samples >= due)?;
        // A process may have ended before the try, or both calls were silent.
        *self = Self { last: self.last, tried_after: due, ..Self::default() };
        Some(since.0 / 1000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sampler_core::observation::ProcessSample;

    /// One poll with one sample.
    fn poll(n: u64, busy_percent: u32, named: Option<u8>) -> Recovered {
        let at = GpuNs(n * 100_000_000);
        let sample = |percent| ProcessSample { at, pid: 5, percent: [percent, 0, 0, 0, 0, 0] };
        let samples = vec![DeviceSample { at, busy_percent, queried: true }];
        Recovered { samples, process_samples: named.map(sample).into_iter().collect(), ..Recovered::default() }
    }

    #[test]
    fn the_other_call_is_tried_ever_more_rarely_in_each_silence_of_a_busy_device() {
        let tried = |polls: &[(u32, Option<u8>)]| {
            let mut silence = Silence::default();
            let polls = polls.iter().enumerate();
            polls.filter_map(|(n, (busy, named))| silence.observe(&poll(n as u64 + 1, *busy, *named))).collect::<Vec<_>>()
        };
        let silent = [(90, None); 20];
        let zeros = [(90, Some(0)); 20];
        assert_eq!(tried(&silent), [100_000]);
        assert_eq!(tried(&zeros), [100_000], "entries of 0 %");
        assert_eq!(tried(&[[(90, Some(90))].as_slice(), &silent].concat()), [100_000]);
        assert_eq!(tried(&[&silent[..], &[(90, Some(90))], &silent].concat()), [100_000, 2_100_000]);
        assert!(tried(&[(90, None); 7]).is_empty());
        assert!(tried(&[(20, None); 100]).is_empty());
        assert!(tried(&[(0, None); 100]).is_empty());
        let now_and_then: Vec<_> = (0..100).map(|n| (90, (n % 6 == 0).then_some(90))).collect();
        assert!(tried(&now_and_then).is_empty());
    }
}
