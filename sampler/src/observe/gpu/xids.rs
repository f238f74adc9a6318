//! The driver's event set, which receives XID errors.

use nvml_wrapper::error::{NvmlError, nvml_sym, nvml_try};
use nvml_wrapper_sys::bindings::{nvmlEventData_t, nvmlEventSet_t, nvmlEventTypeXidCriticalError};

use super::library::{Generation, RawDevice};

/// Receives the XID errors of registered devices. Not for use by two threads at once.
pub struct Xids<'a> {
    generation: &'a Generation,
    set: nvmlEventSet_t,
}

impl<'a> Xids<'a> {
    pub fn new(generation: &'a Generation) -> Result<Self, NvmlError> {
        let create = nvml_sym(generation.lib().nvmlEventSetCreate.as_ref())?;
        let mut set = std::ptr::null_mut();
        // SAFETY: `set` is the output argument of the call.
        nvml_try(unsafe { create(&raw mut set) })?;
        Ok(Self { generation, set })
    }

    pub fn listen(&self, device: RawDevice) -> Result<(), NvmlError> {
        let register = nvml_sym(self.generation.lib().nvmlDeviceRegisterEvents.as_ref())?;
        // SAFETY: handle and set belong to this open library.
        nvml_try(unsafe { register(device.0, u64::from(nvmlEventTypeXidCriticalError), self.set) })
    }

    /// The next error, or `None` after the timeout.
    pub fn wait(&self, timeout_ms: u32) -> Result<Option<(RawDevice, u64)>, NvmlError> {
        let lib = self.generation.lib();
        let wait = nvml_sym(lib.nvmlEventSetWait_v2.as_ref().or(lib.nvmlEventSetWait.as_ref()))?;
        // SAFETY: consists of numbers and a handle, for which all-zero bytes are valid.
        let mut data: nvmlEventData_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set belongs to this open library, `data` is the output argument of the call.
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
            // SAFETY: the set belongs to this library and is not used again.
            unsafe { free(self.set) };
        }
    }
}
