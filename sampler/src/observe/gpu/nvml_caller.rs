//! Every call for one device goes through here: it is timed, watched and counted, and one that the device does not serve is not made
//! again for a while. No version decides what is tried.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvml_wrapper::error::NvmlError;
use rustix::time::{ClockId, clock_gettime};

use crate::health::Health;
use crate::health::call_watchdog::Caller;
use crate::health::nvml_calls::{Call, DeviceCalls};
use crate::observe::clock::boot_now;

/// What is not supported is tried again this often: a driver may be told to allow it.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(600);

/// What an error says beyond its own call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceFault {
    /// This GPU does not answer until it is reset or comes back.
    Lost,
    /// The driver has gone or was replaced: the library must be opened anew.
    Dead,
}

/// What calls took since it was last asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent {
    pub wall: Duration,
    /// Processor time within.
    pub cpu: Duration,
}

pub struct NvmlCaller {
    calls: Arc<DeviceCalls>,
    caller: Arc<Caller>,
    off: [Option<Instant>; Call::ALL.len()],
    shown: [Option<bool>; Call::ALL.len()],
    spent: Spent,
    trouble: Option<DeviceFault>,
}

/// Processor time of this thread.
pub fn cpu_now() -> Duration {
    let t = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

pub fn is_unsupported(error: &NvmlError) -> bool {
    matches!(error, NvmlError::NotSupported | NvmlError::FailedToLoadSymbol(_) | NvmlError::FunctionNotFound)
}

pub fn trouble(error: &NvmlError) -> Option<DeviceFault> {
    match error {
        NvmlError::GpuLost | NvmlError::ResetRequired => Some(DeviceFault::Lost),
        NvmlError::Uninitialized | NvmlError::DriverNotLoaded | NvmlError::LibRmVersionMismatch => Some(DeviceFault::Dead),
        _ => None,
    }
}

/// A bounded label value: the variant's name.
pub fn error_name(error: &NvmlError) -> String {
    let debug = format!("{error:?}");
    debug.split(['(', ' ', '{']).next().unwrap_or("Unknown").to_owned()
}

impl NvmlCaller {
    pub fn new(uuid: &str, caller: &Arc<Caller>, health: &Health) -> Self {
        Self {
            calls: health.driver.device(uuid),
            caller: Arc::clone(caller),
            off: [None; Call::ALL.len()],
            shown: [None; Call::ALL.len()],
            spent: Spent::default(),
            trouble: None,
        }
    }

    /// For another device that is read by the same thread.
    pub fn beside(&self, uuid: &str, health: &Health) -> Self {
        Self::new(uuid, &self.caller, health)
    }

    /// A call that the device is known not to serve is not made, and answers `NotSupported`.
    pub fn call<T>(&mut self, call: Call, f: impl FnOnce() -> Result<T, NvmlError>) -> Result<T, NvmlError> {
        let n = call as usize;
        if self.off[n].is_some_and(|since| since.elapsed() < TRY_AGAIN_AFTER) {
            return Err(NvmlError::NotSupported);
        }
        self.caller.enter(call, boot_now());
        let (begun, cpu) = (Instant::now(), cpu_now());
        let result = f();
        let took = begun.elapsed();
        self.caller.leave();
        self.spent.cpu += cpu_now().saturating_sub(cpu);
        self.spent.wall += took;
        let unsupported = result.as_ref().is_err_and(is_unsupported);
        self.off[n] = unsupported.then(Instant::now);
        // An error says nothing about whether it is served.
        if (unsupported || result.is_ok()) && self.shown[n] != Some(!unsupported) {
            self.shown[n] = Some(!unsupported);
            self.calls.set_supported(call, !unsupported);
        }
        let error = result.as_ref().err().filter(|_| !unsupported);
        if let Some(trouble) = error.and_then(trouble) {
            self.trouble = Some(trouble);
        }
        self.calls.record(call, took, error.map(error_name));
        result
    }

    pub fn spent(&self) -> Spent {
        self.spent
    }

    pub fn take_spent(&mut self) -> Spent {
        std::mem::take(&mut self.spent)
    }

    pub fn add_spent(&mut self, of: Spent) {
        self.spent.wall += of.wall;
        self.spent.cpu += of.cpu;
    }

    pub fn trouble(&self) -> Option<DeviceFault> {
        self.trouble
    }

    pub fn set_pace(&self, poll_interval: Duration, recent_ratios: [f64; 2]) {
        self.calls.set_pace(poll_interval, recent_ratios);
    }

    /// The device was opened again: nothing that was found out about the old one holds.
    pub fn reset(&mut self) {
        self.off = [None; Call::ALL.len()];
        self.trouble = None;
    }

    pub fn set_lost(&mut self) {
        self.trouble = Some(DeviceFault::Lost);
    }

    pub fn clear_trouble(&mut self) {
        self.trouble = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_supported_is_asked_once_and_again_after_a_reset() {
        let health = Health::default();
        let caller = Arc::new(health.driver.caller("gpu-0".into(), Some("GPU-0")));
        let mut driver = NvmlCaller::new("GPU-0", &caller, &health);
        let mut made = 0;
        let mut ask = |driver: &mut NvmlCaller, answer: Result<u32, NvmlError>| {
            let result = driver.call(Call::GetPowerUsage, || {
                made += 1;
                answer
            });
            (result.ok(), made)
        };
        assert_eq!(ask(&mut driver, Ok(1)), (Some(1), 1));
        assert_eq!(ask(&mut driver, Err(NvmlError::NotSupported)), (None, 2));
        assert_eq!(ask(&mut driver, Ok(1)), (None, 2));
        let view = &health.driver.view()[0];
        assert_eq!(view.supported, [("GetPowerUsage", false)]);
        // It is no failure.
        assert!(view.errors.is_empty());
        driver.reset();
        assert_eq!(ask(&mut driver, Ok(1)), (Some(1), 3));
        assert_eq!(health.driver.view()[0].supported, [("GetPowerUsage", true)]);
        assert_eq!(ask(&mut driver, Err(NvmlError::Unknown)), (None, 4));
        let view = &health.driver.view()[0];
        assert_eq!(view.supported, [("GetPowerUsage", true)]);
        assert_eq!(view.errors, [("GetPowerUsage", "Unknown".to_owned(), 1)]);
        assert_eq!(driver.trouble(), None);
        ask(&mut driver, Err(NvmlError::GpuLost));
        assert_eq!(driver.trouble(), Some(DeviceFault::Lost));
    }
}
