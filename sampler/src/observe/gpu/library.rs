//! An opened library, handles that keep it open, and scalar calls that differ between drivers. Unsafe code is here, in `calls`, `gpm`
//! and `xids`.

use std::ffi::{CStr, OsStr, c_void};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nvml_wrapper::error::{NvmlError, nvml_sym, nvml_try};
use nvml_wrapper::{Device, Nvml};
use nvml_wrapper_sys::bindings::{NvmlLib, nvmlDevice_t, nvmlFieldValue_t, nvmlMemory_t, nvmlMemory_v2_t, nvmlReturn_t};

/// NVML_ERROR_ARGUMENT_VERSION_MISMATCH, which nvml-wrapper does not define.
const VERSION_MISMATCH: nvmlReturn_t = 25;

/// NVML_ERROR_NOT_SUPPORTED.
const NOT_SUPPORTED: nvmlReturn_t = 3;

/// Loads and initializes the library. May hang in the driver.
pub fn init(path: &Path) -> Result<Nvml, NvmlError> {
    Nvml::builder().lib_path(path.as_os_str()).init()
}

/// The file that the library was loaded from, as the dynamic loader names it.
pub fn path_of(nvml: &Nvml) -> Option<PathBuf> {
    let symbol = *nvml.lib().nvmlInit_v2.as_ref().ok()?;
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::uninit();
    // SAFETY: dladdr only compares the address, and fills `info` if it returns another value than 0.
    let found = unsafe { libc::dladdr(symbol as *const c_void, info.as_mut_ptr()) } != 0;
    // SAFETY: as above; the name is NUL-terminated and exists as long as the library is open.
    let name = found.then(|| unsafe { CStr::from_ptr(info.assume_init().dli_fname) })?;
    Some(PathBuf::from(OsStr::from_bytes(name.to_bytes())))
}

/// One opened library. Every reference keeps it open; dropping the last one shuts it down and closes it.
pub struct Generation {
    nvml: Option<Nvml>,
    dead: AtomicBool,
    /// Devices to be registered by the events thread.
    pub listen: Mutex<Vec<Listen>>,
}

impl Generation {
    pub fn new(nvml: Nvml) -> Self {
        Self { nvml: Some(nvml), dead: AtomicBool::new(false), listen: Mutex::default() }
    }

    pub fn nvml(&self) -> &Nvml {
        self.nvml.as_ref().expect("only drop takes it")
    }

    pub fn lib(&self) -> &NvmlLib {
        self.nvml().lib()
    }

    /// Marks the library as unusable: every thread releases it.
    pub fn kill(&self) {
        self.dead.store(true, Ordering::Relaxed);
    }

    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    /// Initializes and shuts down once more, which makes the driver detect added GPUs.
    pub fn refresh(&self) -> Result<(), NvmlError> {
        let (init, shutdown) = (nvml_sym(self.lib().nvmlInit_v2.as_ref())?, nvml_sym(self.lib().nvmlShutdown.as_ref())?);
        // SAFETY: no arguments; the library counts initializations, so that of `nvml` stays in effect.
        nvml_try(unsafe { init() })?;
        // SAFETY: as above; it pairs with the preceding call.
        nvml_try(unsafe { shutdown() })
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if let Some(nvml) = self.nvml.take()
            && nvml.lib().nvmlShutdown.is_err()
        {
            // The drop of `Nvml` would panic.
            std::mem::forget(nvml);
        }
    }
}

/// A device to be registered for XID errors.
pub struct Listen {
    pub slot: usize,
    pub uuid: Arc<str>,
    pub device: RawDevice,
}

/// A device handle without its library; used only together with its generation.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RawDevice(pub(super) nvmlDevice_t);

// SAFETY: NVML is thread-safe, and the pointer is only passed back to it.
unsafe impl Send for RawDevice {}
// SAFETY: as for Send.
unsafe impl Sync for RawDevice {}

/// A device that keeps its library open.
#[derive(Clone)]
pub struct Handle {
    pub generation: Arc<Generation>,
    device: RawDevice,
}

impl Handle {
    /// `device` belongs to `generation`.
    fn new(generation: &Arc<Generation>, device: &Device<'_>) -> Self {
        // SAFETY: the pointer is used only while its library is open.
        let device = RawDevice(unsafe { device.handle() });
        Self { generation: Arc::clone(generation), device }
    }

    pub fn by_index(generation: &Arc<Generation>, index: u32) -> Result<Self, NvmlError> {
        Ok(Self::new(generation, &generation.nvml().device_by_index(index)?))
    }

    pub fn by_pci(generation: &Arc<Generation>, bus_id: &str) -> Result<Self, NvmlError> {
        Ok(Self::new(generation, &generation.nvml().device_by_pci_bus_id(bus_id)?))
    }

    /// The MIG device at this index; NOT_FOUND if there is none.
    pub fn mig(&self, index: u32) -> Result<Self, NvmlError> {
        Ok(Self::new(&self.generation, &self.device().mig_device_by_index(index)?))
    }

    pub fn device(&self) -> Device<'_> {
        // SAFETY: the handle came from this library, which the borrow of `self` keeps open.
        unsafe { Device::new(self.device.0, self.generation.nvml()) }
    }

    pub fn raw(&self) -> RawDevice {
        self.device
    }

    pub(super) fn pointer(&self) -> nvmlDevice_t {
        self.device.0
    }

    pub(super) fn lib(&self) -> &NvmlLib {
        self.generation.lib()
    }

    /// (used, total); memory reserved by the driver does not count as used.
    pub fn memory_v2(&self) -> Result<(u64, u64), NvmlError> {
        let symbol = nvml_sym(self.lib().nvmlDeviceGetMemoryInfo_v2.as_ref())?;
        let version = versioned::<nvmlMemory_v2_t>(2);
        let mut info = nvmlMemory_v2_t { version, total: 0, reserved: 0, free: 0, used: 0 };
        // SAFETY: the handle belongs to this open library, and `info` contains its version.
        unsupported_argument(nvml_try(unsafe { symbol(self.device.0, &raw mut info) }))?;
        Ok((info.used, info.total))
    }

    pub fn memory_v1(&self) -> Result<(u64, u64), NvmlError> {
        let symbol = nvml_sym(self.lib().nvmlDeviceGetMemoryInfo.as_ref())?;
        let mut info = nvmlMemory_t { total: 0, free: 0, used: 0 };
        // SAFETY: the handle belongs to this open library, `info` is the output argument of the call.
        nvml_try(unsafe { symbol(self.device.0, &raw mut info) })?;
        Ok((info.used, info.total))
    }

    /// Bit mask of the reasons for the current clocks; drivers before 535 export the call under another name.
    pub fn clocks_event_reasons(&self) -> Result<u64, NvmlError> {
        let lib = self.lib();
        let newer = lib.nvmlDeviceGetCurrentClocksEventReasons.as_ref();
        let symbol = nvml_sym(newer.or(lib.nvmlDeviceGetCurrentClocksThrottleReasons.as_ref()))?;
        let mut reasons = 0;
        // SAFETY: the handle belongs to this open library, `reasons` is the output argument of the call.
        nvml_try(unsafe { symbol(self.device.0, &raw mut reasons) })?;
        Ok(reasons)
    }

    /// Values of fields, given as id and scope, each with a result of its own.
    pub fn field_values(&self, fields: &[(u32, u32)]) -> Result<Vec<Result<u64, NvmlError>>, NvmlError> {
        let symbol = nvml_sym(self.lib().nvmlDeviceGetFieldValues.as_ref())?;
        let value = |(id, scope): &(u32, u32)| {
            // SAFETY: numbers and a union of numbers, for which all-zero bytes are valid.
            let mut value: nvmlFieldValue_t = unsafe { std::mem::zeroed() };
            // A driver that skips the field leaves this result.
            (value.fieldId, value.scopeId, value.nvmlReturn) = (*id, *scope, NOT_SUPPORTED);
            value
        };
        let mut values: Vec<nvmlFieldValue_t> = fields.iter().map(value).collect();
        let count = i32::try_from(values.len()).map_err(|_| NvmlError::InvalidArg)?;
        // SAFETY: the handle belongs to this open library, and there are `count` values.
        nvml_try(unsafe { symbol(self.device.0, count, values.as_mut_ptr()) })?;
        Ok(values.iter().map(|value| nvml_try(value.nvmlReturn).and_then(|()| number(value))).collect())
    }

    /// The GPU instance of a MIG device.
    pub fn gpu_instance(&self) -> Result<u32, NvmlError> {
        let symbol = nvml_sym(self.lib().nvmlDeviceGetGpuInstanceId.as_ref())?;
        let mut id = 0;
        // SAFETY: the handle belongs to this open library, `id` is the output argument of the call.
        nvml_try(unsafe { symbol(self.device.0, &raw mut id) })?;
        Ok(id)
    }
}

/// The value of a field as a whole number.
fn number(field: &nvmlFieldValue_t) -> Result<u64, NvmlError> {
    // nvmlValueType_t: double, unsigned int, unsigned long, unsigned long long, signed long long, signed int.
    let of_signed = |number: i64| u64::try_from(number).map_err(|_| NvmlError::Unknown);
    // SAFETY: a union of numbers, read as the type that the driver reports.
    unsafe {
        match field.valueType {
            0 => Ok(field.value.dVal as u64),
            1 => Ok(field.value.uiVal.into()),
            2 => Ok(field.value.ulVal),
            3 => Ok(field.value.ullVal),
            4 => of_signed(field.value.sllVal),
            5 => of_signed(field.value.siVal.into()),
            other => Err(NvmlError::UnexpectedVariant(other)),
        }
    }
}

pub(super) fn versioned<T>(version: u32) -> u32 {
    size_of::<T>() as u32 | version << 24
}

/// For calls with a versioned struct: a driver that rejects the version does not support the call.
pub(super) fn unsupported_argument<T>(result: Result<T, NvmlError>) -> Result<T, NvmlError> {
    match result {
        Err(NvmlError::InvalidArg | NvmlError::UnexpectedVariant(VERSION_MISMATCH) | NvmlError::FunctionNotFound) => {
            Err(NvmlError::NotSupported)
        }
        other => other,
    }
}
