//! The C ABI: the symbols that NVML clients look up. No panic crosses it; every pointer is checked for NULL.
//!
//! The signatures are nvml.h's; layouts come from nvml-wrapper-sys. What a V100 does not have answers NOT_SUPPORTED.

use std::ffi::{CStr, OsStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::os::unix::ffi::OsStrExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use nvml_wrapper_sys::bindings::{
    nvmlBAR1Memory_t, nvmlDevice_t, nvmlMemory_t, nvmlMemory_v2_t, nvmlPciInfo_t, nvmlProcessInfo_t,
    nvmlProcessUtilizationSample_t, nvmlReturn_t, nvmlSample_t, nvmlUtilization_t,
};

use crate::driver::{Driver, RESERVED_BYTES};

const UNINITIALIZED: nvmlReturn_t = 1;
const INVALID_ARGUMENT: nvmlReturn_t = 2;
const NOT_SUPPORTED: nvmlReturn_t = 3;
const NOT_FOUND: nvmlReturn_t = 6;
const INSUFFICIENT_SIZE: nvmlReturn_t = 7;
const DRIVER_NOT_LOADED: nvmlReturn_t = 9;
const TIMEOUT: nvmlReturn_t = 10;
const UNKNOWN: nvmlReturn_t = 999;
/// What the size query answers: a capacity, not a count.
const ROW_CAPACITY: c_uint = 100;
/// NVML_GPU_UTILIZATION_SAMPLES and NVML_VALUE_TYPE_UNSIGNED_INT.
const GPU_UTILIZATION: c_uint = 1;
const VALUE_UNSIGNED_INT: c_uint = 1;

type Answer = Result<(), nvmlReturn_t>;

struct State {
    references: u64,
    driver: Driver,
}

static STATE: Mutex<Option<State>> = Mutex::new(None);

fn guard(f: impl FnOnce() -> Answer) -> nvmlReturn_t {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(())) => 0,
        Ok(Err(code)) => code,
        Err(_) => UNKNOWN,
    }
}

fn with<T>(f: impl FnOnce(&mut Driver) -> Result<T, nvmlReturn_t>) -> Result<T, nvmlReturn_t> {
    let mut state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    f(&mut state.as_mut().ok_or(UNINITIALIZED)?.driver)
}

/// Handles of GPUs are below it, those of MIG devices above.
const MIG_HANDLE_BELOW: usize = 0xffff;

/// Handles are the index plus one, so NULL is none.
fn on<T>(device: nvmlDevice_t, f: impl FnOnce(&mut Driver, usize) -> Result<T, nvmlReturn_t>) -> Result<T, nvmlReturn_t> {
    with(|driver| match (device as usize).checked_sub(1) {
        Some(index) if index < driver.world.gpus.len() => f(driver, index),
        _ => Err(INVALID_ARGUMENT),
    })
}

fn put<T>(to: *mut T, value: T) -> Answer {
    if to.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: not NULL, and NVML's contract makes the caller pass memory for one T.
    unsafe { to.write(value) };
    Ok(())
}

fn get<T: Copy>(from: *const T) -> Result<T, nvmlReturn_t> {
    if from.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: not NULL, and NVML's contract makes the caller pass an initialised T.
    Ok(unsafe { from.read() })
}

/// A NUL-terminated string into a caller's buffer of `room` bytes.
fn put_text(to: *mut c_char, room: c_uint, text: &str) -> Answer {
    if to.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    if text.len() + 1 > room as usize {
        return Err(INSUFFICIENT_SIZE);
    }
    for (i, byte) in text.bytes().chain([0]).enumerate() {
        // SAFETY: i < room, and the caller passes `room` bytes.
        unsafe { to.add(i).write(byte as c_char) };
    }
    Ok(())
}

fn text<'a>(from: *const c_char) -> Result<&'a str, nvmlReturn_t> {
    if from.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: not NULL, and NVML's contract makes it NUL-terminated.
    unsafe { CStr::from_ptr(from) }.to_str().map_err(|_| INVALID_ARGUMENT)
}

fn put_all<T: Copy>(to: *mut T, count: *mut c_uint, items: &[T], when_small: c_uint) -> Answer {
    if to.is_null() || (get(count)? as usize) < items.len() {
        put(count, when_small)?;
        return Err(INSUFFICIENT_SIZE);
    }
    for (i, item) in items.iter().enumerate() {
        // SAFETY: i < *count, and the caller passes that many elements.
        unsafe { to.add(i).write(*item) };
    }
    put(count, items.len() as c_uint)
}

fn failed(error: anyhow::Error) -> nvmlReturn_t {
    eprintln!("nvml-sim: {error:#}");
    UNKNOWN
}

/// NVML_SIM_DIR, or where this library lies: DIR/lib/libnvidia-ml.so.1.
fn dir() -> Option<PathBuf> {
    if let Some(dir) = std::env::var_os("NVML_SIM_DIR").filter(|d| !d.is_empty()) {
        return Some(dir.into());
    }
    // SAFETY: all-zero is a valid Dl_info, and dladdr fills it for an address of this library.
    let info = unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        (libc::dladdr((&raw const STATE).cast(), &raw mut info) != 0).then_some(info)?
    };
    // SAFETY: dladdr's name is NUL-terminated and lives as long as the library.
    let path = unsafe { CStr::from_ptr(info.dli_fname) };
    let path = PathBuf::from(OsStr::from_bytes(path.to_bytes()));
    Some(path.parent()?.parent()?.to_owned())
}

fn init() -> Answer {
    let mut state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(state) = &mut *state {
        state.references += 1;
        return Ok(());
    }
    let driver = Driver::open(&dir().ok_or(DRIVER_NOT_LOADED)?).map_err(|error| {
        eprintln!("nvml-sim: {error:#}");
        DRIVER_NOT_LOADED
    })?;
    *state = Some(State { references: 1, driver });
    Ok(())
}

fn find(device: *mut nvmlDevice_t, which: impl Fn(usize, &crate::world::Gpu) -> bool) -> Answer {
    let index = with(|d| d.world.gpus.iter().enumerate().position(|(i, g)| which(i, g)).ok_or(NOT_FOUND))?;
    put(device, (index + 1) as nvmlDevice_t)
}

/// Busy share now, 0 to 1.
fn load(driver: &mut Driver, gpu: usize) -> Result<f64, nvmlReturn_t> {
    Ok(driver.latest(gpu).map_err(failed)?.map_or(0.0, |t| f64::from(t.util) / 100.0))
}

macro_rules! nvml {
    ($(fn $name:ident($($arg:ident: $type:ty),*) $body:block)*) => {$(
        /// As in nvml.h.
        /// # Safety
        /// Pointers are NULL or point to what nvml.h says.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> nvmlReturn_t {
            guard(|| $body)
        }
    )*};
}

nvml! {
    fn nvmlInit_v2() { init() }
    fn nvmlInit() { init() }
    fn nvmlInitWithFlags(_flags: c_uint) { init() }
    fn nvmlShutdown() {
        let mut held = STATE.lock().unwrap_or_else(PoisonError::into_inner);
        let state = held.as_mut().ok_or(UNINITIALIZED)?;
        state.references -= 1;
        if state.references == 0 {
            *held = None;
        }
        Ok(())
    }
    fn nvmlSystemGetDriverVersion(to: *mut c_char, room: c_uint) { with(|d| put_text(to, room, &d.world.driver_version)) }
    fn nvmlSystemGetNVMLVersion(to: *mut c_char, room: c_uint) {
        with(|d| put_text(to, room, &format!("12.{}", d.world.driver_version)))
    }
    fn nvmlSystemGetCudaDriverVersion(to: *mut c_int) { with(|_| put(to, 12_020)) }
    fn nvmlSystemGetCudaDriverVersion_v2(to: *mut c_int) { with(|_| put(to, 12_020)) }
    fn nvmlDeviceGetCount_v2(to: *mut c_uint) { with(|d| put(to, d.world.gpus.len() as c_uint)) }
    fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, to: *mut nvmlDevice_t) {
        find(to, |i, _| i == index as usize).map_err(|code| if code == NOT_FOUND { INVALID_ARGUMENT } else { code })
    }
    fn nvmlDeviceGetHandleByUUID(uuid: *const c_char, to: *mut nvmlDevice_t) {
        let uuid = text(uuid)?;
        find(to, |_, gpu| gpu.uuid == uuid)
    }
    fn nvmlDeviceGetHandleByPciBusId_v2(id: *const c_char, to: *mut nvmlDevice_t) {
        let id = text(id)?;
        find(to, |_, gpu| gpu.pci_bus_id.eq_ignore_ascii_case(id))
    }
    fn nvmlDeviceGetName(device: nvmlDevice_t, to: *mut c_char, room: c_uint) {
        on(device, |d, i| put_text(to, room, &d.world.gpus[i].name))
    }
    fn nvmlDeviceGetUUID(device: nvmlDevice_t, to: *mut c_char, room: c_uint) {
        // A MIG device's handle has its number plus one above its GPU's.
        let (device, mig) = (device as usize & MIG_HANDLE_BELOW, device as usize / (MIG_HANDLE_BELOW + 1));
        on(device as nvmlDevice_t, |d, i| {
            let gpu = &d.world.gpus[i];
            let uuid = if mig == 0 { &gpu.uuid } else { gpu.mig.get(mig - 1).ok_or(INVALID_ARGUMENT)? };
            put_text(to, room, uuid)
        })
    }
    fn nvmlDeviceGetMigMode(device: nvmlDevice_t, current: *mut c_uint, pending: *mut c_uint) {
        on(device, |d, i| {
            if d.world.gpus[i].mig.is_empty() {
                return Err(NOT_SUPPORTED);
            }
            put(current, 1)?;
            put(pending, 1)
        })
    }
    fn nvmlDeviceGetMaxMigDeviceCount(device: nvmlDevice_t, to: *mut c_uint) {
        on(device, |d, i| put(to, d.world.gpus[i].mig.len() as c_uint))
    }
    fn nvmlDeviceGetMigDeviceHandleByIndex(device: nvmlDevice_t, index: c_uint, to: *mut nvmlDevice_t) {
        on(device, |d, i| match d.world.gpus[i].mig.get(index as usize) {
            Some(_) => put(to, ((i + 1) + (index as usize + 1) * (MIG_HANDLE_BELOW + 1)) as nvmlDevice_t),
            None => Err(NOT_FOUND),
        })
    }
    fn nvmlDeviceGetSerial(device: nvmlDevice_t, to: *mut c_char, room: c_uint) {
        on(device, |_, i| put_text(to, room, &format!("03200{i:08}")))
    }
    fn nvmlDeviceGetVbiosVersion(device: nvmlDevice_t, to: *mut c_char, room: c_uint) {
        on(device, |_, _| put_text(to, room, "88.00.4F.00.09"))
    }
    fn nvmlDeviceGetIndex(device: nvmlDevice_t, to: *mut c_uint) { on(device, |_, i| put(to, i as c_uint)) }
    fn nvmlDeviceGetMinorNumber(device: nvmlDevice_t, to: *mut c_uint) {
        on(device, |d, i| put(to, d.world.gpus[i].minor.unwrap_or(i as c_uint)))
    }
    fn nvmlDeviceGetPciInfo_v3(device: nvmlDevice_t, to: *mut nvmlPciInfo_t) {
        on(device, |d, i| {
            let id = &d.world.gpus[i].pci_bus_id;
            // SAFETY: integers and character arrays: all-zero is valid.
            let mut pci: nvmlPciInfo_t = unsafe { std::mem::zeroed() };
            for (to, from) in pci.busId.iter_mut().zip(id.bytes().take(31)) {
                *to = from as c_char;
            }
            for (to, from) in pci.busIdLegacy.iter_mut().zip(id.trim_start_matches("0000").bytes().take(15)) {
                *to = from as c_char;
            }
            let part = |n: usize| id.split([':', '.']).nth(n).and_then(|hex| u32::from_str_radix(hex, 16).ok()).unwrap_or_default();
            (pci.domain, pci.bus, pci.device) = (part(0), part(1), part(2));
            (pci.pciDeviceId, pci.pciSubSystemId) = (0x1db1_10de, 0x1212_10de);
            put(to, pci)
        })
    }
    fn nvmlDeviceGetMemoryInfo(device: nvmlDevice_t, to: *mut nvmlMemory_t) {
        on(device, |d, i| {
            let total = d.world.gpus[i].memory_bytes;
            let held: u64 = d.processes(i).map_err(failed)?.iter().map(|(_, bytes)| bytes).sum();
            let used = (RESERVED_BYTES + held).min(total);
            put(to, nvmlMemory_t { total, free: total - used, used })
        })
    }
    fn nvmlDeviceGetMemoryInfo_v2(device: nvmlDevice_t, to: *mut nvmlMemory_v2_t) {
        on(device, |d, i| {
            let version = get(to)?.version;
            let total = d.world.gpus[i].memory_bytes;
            let held: u64 = d.processes(i).map_err(failed)?.iter().map(|(_, bytes)| bytes).sum();
            let used = held.min(total - RESERVED_BYTES.min(total));
            put(to, nvmlMemory_v2_t { version, total, reserved: RESERVED_BYTES, free: total - used - RESERVED_BYTES.min(total), used })
        })
    }
    fn nvmlDeviceGetBAR1MemoryInfo(device: nvmlDevice_t, to: *mut nvmlBAR1Memory_t) {
        on(device, |d, i| {
            let bar1Total = d.world.gpus[i].memory_bytes;
            put(to, nvmlBAR1Memory_t { bar1Total, bar1Free: bar1Total - (2 << 20), bar1Used: 2 << 20 })
        })
    }
    fn nvmlDeviceGetUtilizationRates(device: nvmlDevice_t, to: *mut nvmlUtilization_t) {
        on(device, |d, i| {
            let gpu = d.latest(i).map_err(failed)?.map_or(0, |t| t.util);
            put(to, nvmlUtilization_t { gpu, memory: gpu / 2 })
        })
    }
    fn nvmlDeviceGetEncoderUtilization(device: nvmlDevice_t, to: *mut c_uint, period: *mut c_uint) {
        on(device, |_, _| put(to, 0).and(put(period, 167_000)))
    }
    fn nvmlDeviceGetDecoderUtilization(device: nvmlDevice_t, to: *mut c_uint, period: *mut c_uint) {
        on(device, |_, _| put(to, 0).and(put(period, 167_000)))
    }
    fn nvmlDeviceGetProcessUtilization(
        device: nvmlDevice_t, to: *mut nvmlProcessUtilizationSample_t, count: *mut c_uint, last_seen: c_ulonglong
    ) {
        on(device, |d, i| {
            let rows = d.rows(i, last_seen).map_err(failed)?;
            if get(count)? == 0 || to.is_null() {
                put(count, ROW_CAPACITY)?;
                return Err(INSUFFICIENT_SIZE);
            }
            if rows.is_empty() {
                put(count, 0)?;
                return Err(NOT_FOUND);
            }
            let rows: Vec<_> = rows.iter().map(|r| nvmlProcessUtilizationSample_t {
                pid: r.pid, timeStamp: r.at_us, smUtil: r.util, memUtil: r.util / 2, encUtil: 0, decUtil: 0,
            }).collect();
            put_all(to, count, &rows, ROW_CAPACITY.max(rows.len() as c_uint))
        })
    }
    fn nvmlDeviceGetSamples(
        device: nvmlDevice_t, kind: c_uint, last_seen: c_ulonglong, value_type: *mut c_uint, count: *mut c_uint, to: *mut nvmlSample_t
    ) {
        on(device, |d, i| {
            if kind != GPU_UTILIZATION {
                return Err(NOT_SUPPORTED);
            }
            put(value_type, VALUE_UNSIGNED_INT)?;
            let ticks = d.samples(i, last_seen).map_err(failed)?;
            if to.is_null() {
                return put(count, d.world.ring as c_uint);
            }
            if ticks.is_empty() {
                put(count, 0)?;
                return Err(NOT_FOUND);
            }
            let samples: Vec<nvmlSample_t> = ticks.iter().map(|t| {
                // SAFETY: a union of integers: all-zero is valid.
                let mut sample: nvmlSample_t = unsafe { std::mem::zeroed() };
                sample.timeStamp = t.at_us;
                sample.sampleValue.uiVal = t.util;
                sample
            }).collect();
            put_all(to, count, &samples, d.world.ring as c_uint)
        })
    }
    fn nvmlDeviceGetComputeRunningProcesses_v3(device: nvmlDevice_t, count: *mut c_uint, to: *mut nvmlProcessInfo_t) {
        on(device, |d, i| {
            let list: Vec<_> = d.processes(i).map_err(failed)?.into_iter().map(|(pid, usedGpuMemory)| nvmlProcessInfo_t {
                pid, usedGpuMemory, gpuInstanceId: u32::MAX, computeInstanceId: u32::MAX,
            }).collect();
            if list.is_empty() {
                return put(count, 0);
            }
            put_all(to, count, &list, list.len() as c_uint)
        })
    }
    fn nvmlDeviceGetGraphicsRunningProcesses_v3(device: nvmlDevice_t, count: *mut c_uint, _to: *mut nvmlProcessInfo_t) {
        on(device, |_, _| put(count, 0))
    }
    fn nvmlDeviceGetMPSComputeRunningProcesses_v3(device: nvmlDevice_t, count: *mut c_uint, _to: *mut nvmlProcessInfo_t) {
        on(device, |_, _| put(count, 0))
    }
    fn nvmlDeviceGetPowerUsage(device: nvmlDevice_t, to: *mut c_uint) {
        on(device, |d, i| { let busy = load(d, i)?; put(to, 40_000 + (220_000.0 * busy) as c_uint) })
    }
    fn nvmlDeviceGetPowerManagementLimit(device: nvmlDevice_t, to: *mut c_uint) { on(device, |_, _| put(to, 300_000)) }
    fn nvmlDeviceGetPowerManagementDefaultLimit(device: nvmlDevice_t, to: *mut c_uint) { on(device, |_, _| put(to, 300_000)) }
    fn nvmlDeviceGetEnforcedPowerLimit(device: nvmlDevice_t, to: *mut c_uint) { on(device, |_, _| put(to, 300_000)) }
    fn nvmlDeviceGetPowerManagementLimitConstraints(device: nvmlDevice_t, low: *mut c_uint, high: *mut c_uint) {
        on(device, |_, _| put(low, 150_000).and(put(high, 300_000)))
    }
    fn nvmlDeviceGetTemperature(device: nvmlDevice_t, _sensor: c_uint, to: *mut c_uint) {
        on(device, |d, i| { let busy = load(d, i)?; put(to, 35 + (30.0 * busy) as c_uint) })
    }
    fn nvmlDeviceGetClockInfo(device: nvmlDevice_t, kind: c_uint, to: *mut c_uint) {
        on(device, |d, i| { let busy = load(d, i)? > 0.0; put(to, if kind == 2 { 877 } else if busy { 1_530 } else { 135 }) })
    }
    fn nvmlDeviceGetMaxClockInfo(device: nvmlDevice_t, kind: c_uint, to: *mut c_uint) {
        on(device, |_, _| put(to, if kind == 2 { 877 } else { 1_530 }))
    }
    fn nvmlDeviceGetPcieThroughput(device: nvmlDevice_t, _counter: c_uint, to: *mut c_uint) { on(device, |_, _| put(to, 0)) }
    fn nvmlDeviceGetCurrPcieLinkGeneration(device: nvmlDevice_t, to: *mut c_uint) { on(device, |_, _| put(to, 3)) }
    fn nvmlDeviceGetMaxPcieLinkGeneration(device: nvmlDevice_t, to: *mut c_uint) { on(device, |_, _| put(to, 3)) }
    fn nvmlDeviceGetCurrPcieLinkWidth(device: nvmlDevice_t, to: *mut c_uint) { on(device, |_, _| put(to, 16)) }
    fn nvmlDeviceGetMaxPcieLinkWidth(device: nvmlDevice_t, to: *mut c_uint) { on(device, |_, _| put(to, 16)) }
    fn nvmlDeviceGetPerformanceState(device: nvmlDevice_t, to: *mut c_uint) { on(device, |_, _| put(to, 0)) }
    fn nvmlDeviceGetPersistenceMode(device: nvmlDevice_t, to: *mut c_uint) { on(device, |_, _| put(to, 1)) }
    fn nvmlDeviceGetComputeMode(device: nvmlDevice_t, to: *mut c_uint) { on(device, |_, _| put(to, 0)) }
    fn nvmlDeviceGetDisplayMode(device: nvmlDevice_t, to: *mut c_uint) { on(device, |_, _| put(to, 0)) }
    fn nvmlDeviceGetDisplayActive(device: nvmlDevice_t, to: *mut c_uint) { on(device, |_, _| put(to, 0)) }
    fn nvmlDeviceGetEccMode(device: nvmlDevice_t, current: *mut c_uint, pending: *mut c_uint) {
        on(device, |_, _| put(current, 1).and(put(pending, 1)))
    }
    fn nvmlDeviceGetTotalEccErrors(device: nvmlDevice_t, _kind: c_uint, _counter: c_uint, to: *mut c_ulonglong) {
        on(device, |_, _| put(to, 0))
    }
    fn nvmlDeviceGetBrand(device: nvmlDevice_t, to: *mut c_uint) { on(device, |_, _| put(to, 2)) }
    fn nvmlDeviceGetArchitecture(device: nvmlDevice_t, to: *mut c_uint) { on(device, |_, _| put(to, 5)) }
    fn nvmlDeviceGetNumGpuCores(device: nvmlDevice_t, to: *mut c_uint) { on(device, |_, _| put(to, 5_120)) }
    fn nvmlDeviceGetCudaComputeCapability(device: nvmlDevice_t, major: *mut c_int, minor: *mut c_int) {
        on(device, |_, _| put(major, 7).and(put(minor, 0)))
    }
    fn nvmlDeviceGetAccountingMode(device: nvmlDevice_t, to: *mut c_uint) { on(device, |_, _| put(to, 0)) }
    fn nvmlDeviceGetSupportedEventTypes(device: nvmlDevice_t, to: *mut c_ulonglong) { on(device, |_, _| put(to, 8)) }
    fn nvmlDeviceRegisterEvents(device: nvmlDevice_t, _types: c_ulonglong, _set: *mut c_void) { on(device, |_, _| Ok(())) }
    fn nvmlEventSetCreate(to: *mut *mut c_void) { with(|_| put(to, std::ptr::dangling_mut::<c_void>())) }
    fn nvmlEventSetFree(_set: *mut c_void) { with(|_| Ok(())) }
    // No event ever comes; the wait is as long as a driver's.
    fn nvmlEventSetWait_v2(_set: *mut c_void, _data: *mut c_void, timeout_ms: c_uint) {
        with(|_| Ok(()))?;
        std::thread::sleep(std::time::Duration::from_millis(u64::from(timeout_ms)));
        Err(TIMEOUT)
    }
}

/// What a V100 without MIG, NVLink switches and GPM answers. The C ABI lets a function ignore its arguments.
macro_rules! not_supported {
    ($($name:ident)*) => {$(
        /// Not supported by this device.
        #[unsafe(no_mangle)]
        pub extern "C" fn $name() -> nvmlReturn_t { NOT_SUPPORTED }
    )*};
}

not_supported! {
    nvmlDeviceGetTotalEnergyConsumption nvmlDeviceGetFanSpeed nvmlDeviceGetFieldValues nvmlDeviceGetGpuInstanceId nvmlDeviceGetComputeInstanceId nvmlDeviceGetAttributes_v2
    nvmlDeviceIsMigDeviceHandle nvmlDeviceGetAccountingPids nvmlDeviceGetAccountingStats nvmlDeviceGetAccountingBufferSize
    nvmlDeviceSetAccountingMode nvmlGpmQueryDeviceSupport nvmlGpmSampleAlloc nvmlGpmSampleFree nvmlGpmSampleGet nvmlGpmMigSampleGet
    nvmlGpmMetricsGet
}

/// As in nvml.h; the text is static.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlErrorString(code: nvmlReturn_t) -> *const c_char {
    let text = match code {
        0 => c"Success",
        UNINITIALIZED => c"Uninitialized",
        INVALID_ARGUMENT => c"Invalid Argument",
        NOT_SUPPORTED => c"Not Supported",
        NOT_FOUND => c"Not Found",
        INSUFFICIENT_SIZE => c"Insufficient Size",
        DRIVER_NOT_LOADED => c"Driver Not Loaded",
        TIMEOUT => c"Timeout",
        _ => c"Unknown Error",
    };
    text.as_ptr()
}
