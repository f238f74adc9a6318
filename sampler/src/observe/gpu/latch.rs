//! Detects a busy counter that is latched: it stays at 100 % after a process was killed, while nothing runs. Seen on Blackwell with drivers
//! 580 to 595 (Datura-ai/lium-io pull request 1142).
//!
//! ```text
//!  clear --a full sample without a process, no memory activity--> suspected --more of them, and the power of an idle GPU--> latched
//!    ^--------------------- a process, a sample below 100 %, or memory activity ---------------------------------------------/
//! ```
//! A full sample names its process under either rule of the driver, so one without a process is suspicious in itself.

use nvml_wrapper::error::NvmlError;
use sampler_core::observation::BusyLatch;
use sampler_core::reconstruct::Recovered;

use super::library::Handle;
use super::nvml_caller::NvmlCaller;
use crate::health::nvml_calls::Call;

/// Full samples without a process before the counter counts as latched: two seconds of the fastest grid that was seen.
const SAMPLES: u32 = 20;
/// Part of the power limit that an idle GPU with a latched counter stays below: 100 of 600 W were seen.
const IDLE_POWER_RATIO: f64 = 1.0 / 3.0;

#[derive(Debug, Default)]
pub struct Latch {
    state: BusyLatch,
    /// Full samples without a process, in succession.
    samples: u32,
}

/// What a poll shows of the compute engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    /// No new sample, or none with a queried process.
    Nothing,
    /// So many full samples, none of which was found to have a process.
    Full(u32),
    /// A process, or a sample that is not full.
    Other,
}

/// What else the driver reports of a GPU on which nothing runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Evidence {
    IdleMemory,
    IdlePower,
}

impl Shown {
    fn by(recovered: &Recovered) -> Self {
        let is_named = recovered.process_samples.iter().any(|sample| sample.percent.iter().any(|percent| *percent > 0));
        let is_full = recovered.samples.iter().all(|sample| sample.busy_percent >= 100);
        if is_named || !is_full {
            Self::Other
        } else if recovered.samples.iter().any(|sample| sample.queried) {
            // Where driver calls are slow, one of several is queried; a process that keeps the device busy would be its.
            Self::Full(recovered.samples.len() as u32)
        } else {
            Self::Nothing
        }
    }
}

impl Latch {
    pub fn update(&mut self, recovered: &Recovered, handle: &Handle, driver: &mut NvmlCaller) -> BusyLatch {
        self.advance(Shown::by(recovered), |evidence| match evidence {
            Evidence::IdleMemory => is_memory_idle(handle, driver),
            Evidence::IdlePower => has_idle_power(handle, driver),
        })
    }

    /// `has`: whether the driver reports this; it is called only where that matters.
    fn advance(&mut self, shown: Shown, mut has: impl FnMut(Evidence) -> bool) -> BusyLatch {
        match shown {
            Shown::Nothing => {}
            Shown::Full(samples) if has(Evidence::IdleMemory) => {
                self.samples = self.samples.saturating_add(samples);
                let is_latched = self.state == BusyLatch::Latched || self.samples >= SAMPLES && has(Evidence::IdlePower);
                self.state = if is_latched { BusyLatch::Latched } else { BusyLatch::Suspected };
            }
            Shown::Full(_) | Shown::Other => *self = Self::default(),
        }
        self.state
    }
}

/// Some boards always return 0 for both rates.
fn is_memory_idle(handle: &Handle, driver: &mut NvmlCaller) -> bool {
    let rates = driver.call(Call::GetUtilizationRates, || handle.device().utilization_rates());
    rates.is_ok_and(|rates| rates.gpu > 0 && rates.memory == 0)
}

fn has_idle_power(handle: &Handle, driver: &mut NvmlCaller) -> bool {
    let power = driver.call(Call::GetPowerUsage, || handle.device().power_usage());
    let limit = driver.call(Call::GetEnforcedPowerLimit, || handle.device().enforced_power_limit());
    let is_idle = |milliwatts: u32| Ok::<_, NvmlError>(f64::from(milliwatts) <= f64::from(limit?) * IDLE_POWER_RATIO);
    power.and_then(is_idle).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Shown::{Full, Nothing, Other};
    use sampler_core::observation::{DeviceSample, ProcessSample};
    use sampler_core::units::GpuNs;

    #[test]
    fn one_queried_sample_speaks_for_a_poll() {
        let sample = |busy_percent, queried| DeviceSample { at: GpuNs(1), busy_percent, queried };
        let shown = |samples: &[DeviceSample]| Shown::by(&Recovered { samples: samples.to_vec(), ..Recovered::default() });
        assert_eq!(shown(&[sample(100, false), sample(100, false), sample(100, true)]), Full(3));
        assert_eq!(shown(&[sample(100, false)]), Nothing);
        assert_eq!(shown(&[]), Nothing);
        assert_eq!(shown(&[sample(99, false), sample(100, true)]), Other);
        let named = ProcessSample { at: GpuNs(1), pid: 7, percent: [100, 0, 0, 0, 0, 0] };
        let recovered = Recovered { samples: vec![sample(100, true)], process_samples: vec![named], ..Recovered::default() };
        assert_eq!(Shown::by(&recovered), Other);
    }

    #[test]
    fn a_counter_is_latched_only_with_all_of_the_evidence() {
        let state = |polls: &[Shown], memory_idle: bool, power: bool| {
            let mut latch = Latch::default();
            let has = |evidence| if evidence == Evidence::IdleMemory { memory_idle } else { power };
            polls.iter().map(|shown| latch.advance(*shown, has)).last().unwrap_or_default()
        };
        let full = [Full(1); SAMPLES as usize];
        assert_eq!(state(&full, true, true), BusyLatch::Latched);
        assert_eq!(state(&full[1..], true, true), BusyLatch::Suspected);
        assert_eq!(state(&[&full[..], &[Nothing]].concat(), true, true), BusyLatch::Latched);
        assert_eq!(state(&full, false, true), BusyLatch::Clear, "memory is in use");
        assert_eq!(state(&full, true, false), BusyLatch::Suspected, "the power is that of work");
        assert_eq!(state(&[&full[..], &[Other]].concat(), true, true), BusyLatch::Clear);
        assert_eq!(state(&[&full[1..], &[Other], &full[1..]].concat(), true, true), BusyLatch::Suspected);
        assert_eq!(state(&[Full(SAMPLES)], true, true), BusyLatch::Latched, "a buffer that is read at once");
    }
}
