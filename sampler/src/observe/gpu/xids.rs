//! The driver's event set, listening for XID errors.

use nvml_wrapper::error::{NvmlError, nvml_sym, nvml_try};
use nvml_wrapper_sys::bindings::{nvmlEventData_t, nvmlEventSet_t, nvmlEventTypeXidCriticalError};

use super::library::{Generation, RawDevice};

/// Errors that devices report, as they come. Not for two threads at once.
pub struct Xids<'a> {
    generation: &'a Generation,
    set: nvmlEventSet_t,
}

impl<'a> Xids<'a> {
    pub fn new(generation: &'a Generation) -> Result<Self, NvmlError> {
        let create = nvml_sym(generation.lib().nvmlEventSetCreate.as_ref())?;
        let mut set = std::ptr::null_mut();
        // SAFETY: `set` is what the call fills.
        nvml_try(unsafe { create(&raw mut set) })?;
        Ok(Self { generation, set })
    }

    pub fn listen(&self, device: RawDevice) -> Result<(), NvmlError> {
        let register = nvml_sym(self.generation.lib().nvmlDeviceRegisterEvents.as_ref())?;
        // SAFETY: handle and set belong to this open library.
        nvml_try(unsafe { register(device.0, u64::from(nvmlEventTypeXidCriticalError), self.set) })
    }

    /// The next error, or `None` when none came in time.
    pub fn wait(&self, timeout_ms: u32) -> Result<Option<(RawDevice, u64)>, NvmlError> {
        let lib = self.generation.lib();
        let wait = nvml_sym(lib.nvmlEventSetWait_v2.as_ref().or(lib.nvmlEventSetWait.as_ref()))?;
        // SAFETY: numbers and a handle, for which all-zero is a value.
        let mut data: nvmlEventData_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set belongs to this open library, `data` is what the call fills.
        match nvml_try(unsafe { wait(self.set, &raw mut data, timeout_ms) }) {
            Ok(()) if data.eventType & u64::from(nvmlEventTypeXidCriticalError) != 0 => {
                Ok(Some((RawDevice(data.device), data.eventData)))
            }
            Ok(()) | Err(NvmlError::Timeout) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Xids<'_> {
    fn drop(&mut self) {
        if let Ok(free) = self.generation.lib().nvmlEventSetFree.as_ref() {
            // SAFETY: the set is this library's and is not used again.
            unsafe { free(self.set) };
        }
    }
}
