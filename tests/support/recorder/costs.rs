//! Durations of the calls that the agent makes, while the GPU is idle and while it is busy. A few calls are made between two polls, so
//! the recording has no gap for them.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use gpu_sampler_tests::recording::{Cost, Quantiles};
use nvml_wrapper::Nvml;
use nvml_wrapper::error::{NvmlError, nvml_try};
use nvml_wrapper_sys::bindings::{
    nvmlDevice_t, nvmlFieldValue_t, nvmlGpmSample_t, nvmlMemory_t, nvmlMemory_v2_t, nvmlProcessInfo_t,
    nvmlProcessUtilizationInfo_v1_t, nvmlProcessUtilizationSample_t, nvmlProcessesUtilizationInfo_t, nvmlSample_t,
    nvmlUtilization_t,
};

use super::versioned;

/// Calls between two polls, at most.
const AT_ONCE: usize = 8;
/// Durations kept for one call in one state.
const KEPT: usize = 20_000;
/// A call that was rejected this often is not made again.
const REFUSED: u64 = 3;
const ROOM: usize = 4_096;
/// NVML_FI_DEV_PERF_POLICY_*: time that power, synchronization, temperature and the board held clocks down, nanoseconds.
const THROTTLE_FIELDS: [u32; 5] = [74, 76, 269, 270, 271];
const TEMPERATURE_GPU: u32 = 0;
const CLOCK_SM: u32 = 1;

/// Buffers for the responses.
pub struct Buffers {
    samples: Vec<nvmlSample_t>,
    process_samples: Vec<nvmlProcessUtilizationSample_t>,
    infos: Vec<nvmlProcessUtilizationInfo_v1_t>,
    list: Vec<nvmlProcessInfo_t>,
    gpm: nvmlGpmSample_t,
}

/// A GPU, and its newest known time stamp.
pub struct Target<'a> {
    pub nvml: &'a Nvml,
    pub device: nvmlDevice_t,
    pub newest: u64,
}

type CallResult = Result<usize, NvmlError>;
type Made = fn(&Target<'_>, &mut Buffers) -> CallResult;

/// Calls a symbol with the device as the first argument.
macro_rules! on_device {
    ($target:expr, $name:ident, $($argument:expr),*) => {{
        let symbol = $target.nvml.lib().$name.as_ref();
        let symbol = symbol.map_err(|error| NvmlError::FailedToLoadSymbol(error.to_string()))?;
        // SAFETY: a live library's handle, and pointers to live values of the types that nvml.h requires, with the room that is passed.
        nvml_try(unsafe { symbol($target.device, $($argument),*) })
    }};
}

fn samples(target: &Target<'_>, buffers: &mut Buffers, kind: u32, after: u64) -> CallResult {
    let (mut value_type, mut count) = (0, ROOM as u32);
    on_device!(target, nvmlDeviceGetSamples, kind, after, &raw mut value_type, &raw mut count, buffers.samples.as_mut_ptr())?;
    Ok(count as usize)
}

fn process_samples(target: &Target<'_>, buffers: &mut Buffers, after: u64) -> CallResult {
    let mut count = ROOM as u32;
    on_device!(target, nvmlDeviceGetProcessUtilization, buffers.process_samples.as_mut_ptr(), &raw mut count, after)?;
    Ok(count as usize)
}

fn infos(target: &Target<'_>, buffers: &mut Buffers, after: u64) -> CallResult {
    let mut info = nvmlProcessesUtilizationInfo_t {
        version: versioned::<nvmlProcessesUtilizationInfo_t>(1),
        processSamplesCount: ROOM as u32,
        lastSeenTimeStamp: after,
        procUtilArray: buffers.infos.as_mut_ptr(),
    };
    on_device!(target, nvmlDeviceGetProcessesUtilizationInfo, &raw mut info)?;
    Ok(info.processSamplesCount as usize)
}

macro_rules! list {
    ($name:ident) => {
        |target, buffers| {
            let mut count = ROOM as u32;
            on_device!(target, $name, &raw mut count, buffers.list.as_mut_ptr())?;
            Ok(count as usize)
        }
    };
}

/// A call that returns one number.
macro_rules! value {
    ($name:ident, $zero:expr $(, $argument:expr)*) => {
        |target, _| {
            let mut value = $zero;
            on_device!(target, $name, $($argument,)* &raw mut value)?;
            Ok(1)
        }
    };
}

fn fields(target: &Target<'_>, count: usize) -> CallResult {
    // SAFETY: numbers and a union of numbers, for which all-zero is a value.
    let mut fields: [nvmlFieldValue_t; THROTTLE_FIELDS.len()] = unsafe { std::mem::zeroed() };
    for (field, id) in fields.iter_mut().zip(THROTTLE_FIELDS) {
        field.fieldId = id;
    }
    on_device!(target, nvmlDeviceGetFieldValues, count as _, fields.as_mut_ptr())?;
    Ok(fields.iter().take(count).filter(|field| field.nvmlReturn == 0).count())
}

fn memory_v2(target: &Target<'_>, _: &mut Buffers) -> CallResult {
    // SAFETY: numbers, for which all-zero is a value.
    let mut memory: nvmlMemory_v2_t = unsafe { std::mem::zeroed() };
    memory.version = versioned::<nvmlMemory_v2_t>(2);
    on_device!(target, nvmlDeviceGetMemoryInfo_v2, &raw mut memory)?;
    Ok(1)
}

fn mig_mode(target: &Target<'_>, _: &mut Buffers) -> CallResult {
    let (mut current, mut pending) = (0, 0);
    on_device!(target, nvmlDeviceGetMigMode, &raw mut current, &raw mut pending)?;
    Ok(1)
}

fn gpm(target: &Target<'_>, buffers: &mut Buffers) -> CallResult {
    if buffers.gpm.is_null() {
        let symbol = target.nvml.lib().nvmlGpmSampleAlloc.as_ref();
        let symbol = symbol.map_err(|error| NvmlError::FailedToLoadSymbol(error.to_string()))?;
        // SAFETY: a place for a pointer; the sample lives as long as this process, which ends soon.
        nvml_try(unsafe { symbol(&raw mut buffers.gpm) })?;
    }
    on_device!(target, nvmlGpmSampleGet, buffers.gpm)?;
    Ok(1)
}

/// By the agent's names for calls; "whole" responses are those that the agent requests after a start.
const CALLS: [(&str, Made); 27] = [
    ("GetSamples", |t, b| samples(t, b, 1, t.newest)),
    ("GetSamples whole", |t, b| samples(t, b, 1, 0)),
    ("GetSamples:memory", |t, b| samples(t, b, 2, t.newest)),
    ("GetSamples:encoder", |t, b| samples(t, b, 3, t.newest)),
    ("GetSamples:decoder", |t, b| samples(t, b, 4, t.newest)),
    ("GetSamples:jpeg", |t, b| samples(t, b, 8, t.newest)),
    ("GetSamples:ofa", |t, b| samples(t, b, 9, t.newest)),
    ("GetProcessUtilization", |t, b| process_samples(t, b, t.newest)),
    ("GetProcessUtilization whole", |t, b| process_samples(t, b, 0)),
    ("GetProcessesUtilizationInfo", |t, b| infos(t, b, t.newest)),
    ("GetProcessesUtilizationInfo whole", |t, b| infos(t, b, 0)),
    ("GetUtilizationRates", value!(nvmlDeviceGetUtilizationRates, nvmlUtilization_t { gpu: 0, memory: 0 })),
    ("GetComputeRunningProcesses", list!(nvmlDeviceGetComputeRunningProcesses_v3)),
    ("GetGraphicsRunningProcesses", list!(nvmlDeviceGetGraphicsRunningProcesses_v3)),
    ("GetMPSComputeRunningProcesses", list!(nvmlDeviceGetMPSComputeRunningProcesses_v3)),
    ("GetMemoryInfo", value!(nvmlDeviceGetMemoryInfo, nvmlMemory_t { total: 0, free: 0, used: 0 })),
    ("GetMemoryInfo_v2", memory_v2),
    ("GetPowerUsage", value!(nvmlDeviceGetPowerUsage, 0)),
    ("GetTotalEnergyConsumption", value!(nvmlDeviceGetTotalEnergyConsumption, 0)),
    ("GetTemperature", value!(nvmlDeviceGetTemperature, 0, TEMPERATURE_GPU)),
    ("GetClockInfo", value!(nvmlDeviceGetClockInfo, 0, CLOCK_SM)),
    ("GetCurrentClocksEventReasons", value!(nvmlDeviceGetCurrentClocksEventReasons, 0)),
    ("GetFieldValues, 5 throttle times", |t, _| fields(t, THROTTLE_FIELDS.len())),
    ("GetFieldValues, 1 throttle time", |t, _| fields(t, 1)),
    ("GetMigMode", mig_mode),
    ("GetMinorNumber", value!(nvmlDeviceGetMinorNumber, 0)),
    ("GpmSampleGet", gpm),
];

#[derive(Clone, Default)]
struct Measured {
    /// Idle, loaded.
    took_ns: [Vec<u64>; 2],
    entries: usize,
    errors: BTreeMap<String, u64>,
}

/// A call that was made; it is pending until the state of the GPU is known to be the same before and after it.
struct Pending {
    at: Instant,
    call: usize,
    took_ns: u64,
}

pub struct Costs {
    buffers: Buffers,
    made: Vec<Measured>,
    next: usize,
    /// Whether the GPU is busy, if known, and since when.
    loaded: Option<bool>,
    since: Instant,
    pending: VecDeque<Pending>,
}

impl Costs {
    pub fn new() -> Self {
        // SAFETY: numbers and unions of numbers, for which all-zero is a value.
        let buffers = unsafe {
            Buffers {
                samples: vec![std::mem::zeroed(); ROOM],
                process_samples: vec![std::mem::zeroed(); ROOM],
                infos: vec![std::mem::zeroed(); ROOM],
                list: vec![std::mem::zeroed(); ROOM],
                gpm: std::ptr::null_mut(),
            }
        };
        let made = vec![Measured::default(); CALLS.len()];
        Self { buffers, made, next: 0, loaded: None, since: Instant::now(), pending: VecDeque::new() }
    }

    /// Sets the current state of the GPU. A sample shows a change up to a period late, and the period of the change belongs to neither
    /// state: calls within a period of a change are dropped.
    pub fn set_loaded(&mut self, loaded: Option<bool>, period: Duration) {
        let now = Instant::now();
        if loaded != self.loaded {
            (self.loaded, self.since) = (loaded, now);
            self.pending.clear();
        }
        let Some(loaded) = self.loaded else { return };
        while let Some(call) = self.pending.pop_front_if(|call| now.duration_since(call.at) > period) {
            if call.at.duration_since(self.since) < period {
                continue;
            }
            let times = &mut self.made[call.call].took_ns[usize::from(loaded)];
            if times.len() < KEPT {
                times.push(call.took_ns);
            }
        }
    }

    /// Makes the next few calls until `until`; one that hangs late delays a poll, which the recording shows.
    pub fn measure(&mut self, target: &Target<'_>, until: Instant) {
        if self.loaded.is_none() {
            return;
        }
        for _ in 0..AT_ONCE {
            let (n, began) = (self.next, Instant::now());
            if began >= until {
                return;
            }
            self.next = (self.next + 1) % CALLS.len();
            let made = &mut self.made[n];
            if made.entries == 0 && made.errors.values().any(|count| *count >= REFUSED) {
                continue;
            }
            let result = (CALLS[n].1)(target, &mut self.buffers);
            let took = began.elapsed();
            match result {
                Ok(entries) => made.entries = made.entries.max(entries),
                Err(NvmlError::NotFound | NvmlError::NoData) => {}
                Err(error) => {
                    *made.errors.entry(super::error_name(&error)).or_default() += 1;
                    continue;
                }
            }
            let took_ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
            self.pending.push_back(Pending { at: began, call: n, took_ns });
        }
    }

    pub fn all(self) -> BTreeMap<String, Cost> {
        let cost = |made: Measured| {
            let [idle, loaded] = made.took_ns.map(Quantiles::of_ns);
            Cost { idle, loaded, entries: made.entries, errors: made.errors }
        };
        CALLS.iter().zip(self.made).map(|((name, _), made)| ((*name).to_owned(), cost(made))).collect()
    }
}

/// The part of the time between two polls that is left for measured calls.
pub fn share(every: Duration) -> Duration {
    every / 2
}
