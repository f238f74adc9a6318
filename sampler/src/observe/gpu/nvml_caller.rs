//! Makes all driver calls for one device. Each call is timed, watched and counted; a call that the device does not support is not
//! repeated for some time. Support is determined by trying, not by driver version.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvml_wrapper::error::NvmlError;
use strum::EnumCount as _;

use super::budget::Cost;
use crate::health::Health;
use crate::health::call_watchdog::Caller;
use crate::health::nvml_calls::{Call, DeviceCalls};
use crate::observe::clock::{boot_now, cpu_now};

/// Unsupported calls are retried after this time: the configuration of the driver may change.
pub const TRY_AGAIN_AFTER: Duration = Duration::from_secs(600);

/// The consequence of an error beyond the failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceFault {
    /// The GPU cannot be used until it is reset or returns.
    Lost,
    /// The driver was unloaded or replaced: the library must be opened again.
    Dead,
}

pub struct NvmlCaller {
    pub calls: Arc<DeviceCalls>,
    pub caller: Arc<Caller>,
    /// When the call was last found to be unsupported.
    unsupported_since: [Option<Instant>; Call::COUNT],
    /// The cost of calls since the last [`NvmlCaller::take_spent`].
    pub spent: Cost,
    /// The consequence of the last error that had one.
    pub fault: Option<DeviceFault>,
}

pub fn is_unsupported(error: &NvmlError) -> bool {
    matches!(error, NvmlError::NotSupported | NvmlError::FailedToLoadSymbol(_) | NvmlError::FunctionNotFound)
}

pub fn fault(error: &NvmlError) -> Option<DeviceFault> {
    match error {
        NvmlError::GpuLost | NvmlError::ResetRequired => Some(DeviceFault::Lost),
        NvmlError::Uninitialized | NvmlError::DriverNotLoaded | NvmlError::LibRmVersionMismatch => Some(DeviceFault::Dead),
        _ => None,
    }
}

/// The name of the variant, as a label value with a bounded number of values.
pub fn error_name(error: &NvmlError) -> String {
    let debug = format!("{error:?}");
    debug.split(['(', ' ', '{']).next().unwrap_or("Unknown").to_owned()
}

impl NvmlCaller {
    pub fn new(uuid: &str, caller: &Arc<Caller>, health: &Health) -> Self {
        Self {
            calls: health.driver.device(uuid),
            caller: Arc::clone(caller),
            unsupported_since: [None; Call::COUNT],
            spent: Cost::default(),
            fault: None,
        }
    }

    /// Makes a call. One that is known to be unsupported is not made and returns `NotSupported`.
    pub fn call<T>(&mut self, call: Call, f: impl FnOnce() -> Result<T, NvmlError>) -> Result<T, NvmlError> {
        let n = call as usize;
        if self.unsupported_since[n].is_some_and(|since| since.elapsed() < TRY_AGAIN_AFTER) {
            return Err(NvmlError::NotSupported);
        }
        let (begun, cpu) = (Instant::now(), cpu_now());
        let result = self.caller.during(call, boot_now(), f);
        let took = begun.elapsed();
        self.spent.cpu += cpu_now().saturating_sub(cpu);
        self.spent.wait += took;
        let unsupported = result.as_ref().is_err_and(is_unsupported);
        self.unsupported_since[n] = unsupported.then(Instant::now);
        // Other errors do not show whether the call is supported.
        if unsupported || result.is_ok() {
            self.calls.set_supported(call, !unsupported);
        }
        let error = result.as_ref().err().filter(|_| !unsupported);
        if let Some(fault) = error.and_then(fault) {
            self.fault = Some(fault);
        }
        self.calls.record(call, took, error.map(error_name));
        result
    }

    pub fn take_spent(&mut self) -> Cost {
        std::mem::take(&mut self.spent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::condition::Condition;

    #[test]
    fn an_unsupported_call_is_made_once_and_again_by_the_next_thread() {
        let health = Health::default();
        let caller = Arc::new(health.driver.caller(Condition::Gpu { slot: 0 }, Some("GPU-0")));
        let mut driver = NvmlCaller::new("GPU-0", &caller, &health);
        let mut made = 0;
        let mut call = |driver: &mut NvmlCaller, reply: Result<u32, NvmlError>| {
            let result = driver.call(Call::GetPowerUsage, || {
                made += 1;
                reply
            });
            (result.ok(), made)
        };
        assert_eq!(call(&mut driver, Ok(1)), (Some(1), 1));
        assert_eq!(call(&mut driver, Err(NvmlError::NotSupported)), (None, 2));
        assert_eq!(call(&mut driver, Ok(1)), (None, 2));
        let view = &health.driver.view()[0];
        assert_eq!(view.supported, [("GetPowerUsage", false)]);
        // An unsupported call is not a failure.
        assert!(view.errors.is_empty());
        driver = NvmlCaller::new("GPU-0", &caller, &health);
        assert_eq!(call(&mut driver, Ok(1)), (Some(1), 3));
        assert_eq!(health.driver.view()[0].supported, [("GetPowerUsage", true)]);
        assert_eq!(call(&mut driver, Err(NvmlError::Unknown)), (None, 4));
        let view = &health.driver.view()[0];
        assert_eq!(view.supported, [("GetPowerUsage", true)]);
        assert_eq!(view.errors, [("GetPowerUsage", "Unknown".to_owned(), 1)]);
        assert_eq!(driver.fault, None);
        call(&mut driver, Err(NvmlError::GpuLost));
        assert_eq!(driver.fault, Some(DeviceFault::Lost));
    }
}
