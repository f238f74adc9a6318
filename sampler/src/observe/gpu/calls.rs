//! The driver calls that nvml-wrapper does not make the way the poller needs them: with buffers that are there already, and with what
//! older and newer drivers have instead.
//!
//! NOT_FOUND and NO_DATA mean "nothing new" and are an empty answer, never an error.

use std::ffi::c_uint;

use nvml_wrapper::error::{NvmlError, nvml_sym, nvml_try};
use nvml_wrapper_sys::bindings::{
    nvmlDevice_t, nvmlProcessInfo_v1_t, nvmlProcessInfo_v2_t, nvmlProcessUtilizationInfo_v1_t, nvmlProcessUtilizationSample_t,
    nvmlProcessesUtilizationInfo_t, nvmlReturn_t, nvmlSample_t,
};
use sampler_core::reconstruct::{RawProcessSample, RawSample};

use super::library::{Handle, unsupported_argument, versioned};

/// The size query answers a capacity (100 or 4096), not a count, and rows grow between calls: ask once with room for all.
const ROWS: usize = 4096;
/// The driver lists 950 processes at most.
const PROCESSES: usize = 1024;
/// The driver's ring has 72 samples.
const SAMPLES: usize = 128;
/// No buffer grows beyond this many entries, whatever the driver says that it needs.
const MOST: usize = 1 << 16;
/// nvmlValueType_t.
const DOUBLE: c_uint = 0;
const UNSIGNED_LONG: c_uint = 2;
const UNSIGNED_LONG_LONG: c_uint = 3;
const SIGNED_LONG_LONG: c_uint = 4;

/// The lists of a device's processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    Compute,
    Graphics,
    Mps,
}

type ListCall<T> = unsafe extern "C" fn(nvmlDevice_t, *mut c_uint, *mut T) -> nvmlReturn_t;

/// Answers are written here; grows when the driver has more.
#[derive(Default)]
pub struct Buffers {
    samples: Vec<nvmlSample_t>,
    process_samples: Vec<nvmlProcessUtilizationSample_t>,
    infos: Vec<nvmlProcessUtilizationInfo_v1_t>,
    processes: Vec<nvmlProcessInfo_v2_t>,
    old_processes: Vec<nvmlProcessInfo_v1_t>,
}

// SAFETY: plain numbers and the pointers in no answer: nothing in it belongs to a thread.
unsafe impl Send for Buffers {}

/// Asks with the room that is there, and with more while the driver says that it is not enough. `call(pointer, count)` leaves in
/// `count` what there is, or what is needed.
fn with_room<T: Copy>(
    buffer: &mut Vec<T>,
    room: usize,
    mut call: impl FnMut(*mut T, &mut c_uint) -> nvmlReturn_t,
) -> Result<&[T], NvmlError> {
    if buffer.is_empty() {
        // SAFETY: rows of plain numbers and unions of them, for which all-zero is a value.
        buffer.resize(room, unsafe { std::mem::zeroed() });
    }
    loop {
        let mut count = buffer.len() as c_uint;
        match nvml_try(call(buffer.as_mut_ptr(), &mut count)) {
            Ok(()) => return Ok(&buffer[..buffer.len().min(count as usize)]),
            Err(NvmlError::NotFound | NvmlError::NoData) => return Ok(&[]),
            Err(NvmlError::InsufficientSize(_)) if buffer.len() < MOST => {
                let room = (2 * buffer.len()).max(count as usize).min(MOST);
                // SAFETY: as above.
                buffer.resize(room, unsafe { std::mem::zeroed() });
            }
            Err(error) => return Err(error),
        }
    }
}

impl Buffers {
    /// How many samples the driver may answer with at once.
    pub fn capacity(of: &Handle, kind: u32) -> Result<usize, NvmlError> {
        let symbol = *nvml_sym(of.lib().nvmlDeviceGetSamples.as_ref())?;
        let (mut value_type, mut count) = (1, 0);
        // SAFETY: the handle belongs to this open library; without a buffer the driver only says how large it would be.
        let asked = nvml_try(unsafe { symbol(of.pointer(), kind, 0, &raw mut value_type, &raw mut count, std::ptr::null_mut()) });
        match asked {
            Ok(()) | Err(NvmlError::InsufficientSize(_)) => Ok(count as usize),
            Err(error) => Err(error),
        }
    }

    /// Every sample of one of the device's rings that is newer than `after`, in the driver's order.
    pub fn samples(&mut self, of: &Handle, kind: u32, after: u64) -> Result<Vec<RawSample>, NvmlError> {
        let symbol = *nvml_sym(of.lib().nvmlDeviceGetSamples.as_ref())?;
        let mut value_type = 1;
        let found = with_room(&mut self.samples, SAMPLES, |to, count| {
            // SAFETY: the handle belongs to this open library, and the driver writes at most `count` samples, which there is room for.
            unsafe { symbol(of.pointer(), kind, after, &raw mut value_type, count, to) }
        })?;
        let percent = |sample: &nvmlSample_t| {
            let value = sample.sampleValue;
            // SAFETY: a union of numbers, read as what the driver says that it wrote.
            unsafe {
                match value_type {
                    DOUBLE => value.dVal as u32,
                    UNSIGNED_LONG => u32::try_from(value.ulVal).unwrap_or(u32::MAX),
                    UNSIGNED_LONG_LONG => u32::try_from(value.ullVal).unwrap_or(u32::MAX),
                    SIGNED_LONG_LONG => u32::try_from(value.sllVal).unwrap_or(u32::MAX),
                    _ => value.uiVal,
                }
            }
        };
        Ok(found.iter().map(|sample| RawSample { at_us: sample.timeStamp, percent: percent(sample) }).collect())
    }

    /// Rows newer than `after`, as every driver tells them.
    pub fn process_samples(&mut self, of: &Handle, after: u64) -> Result<Vec<RawProcessSample>, NvmlError> {
        let symbol = *nvml_sym(of.lib().nvmlDeviceGetProcessUtilization.as_ref())?;
        let found = with_room(&mut self.process_samples, ROWS, |to, count| {
            // SAFETY: the handle belongs to this open library, and the driver writes at most `count` rows, which there is room for.
            unsafe { symbol(of.pointer(), to, count, after) }
        })?;
        let row = |r: &nvmlProcessUtilizationSample_t| RawProcessSample {
            at_us: r.timeStamp,
            pid: r.pid,
            percent: [r.smUtil, r.memUtil, r.encUtil, r.decUtil, 0, 0],
        };
        Ok(found.iter().map(row).collect())
    }

    /// As [`Buffers::process_samples`], with the engines that drivers since 550 tell too.
    pub fn process_samples_of_all_engines(&mut self, of: &Handle, after: u64) -> Result<Vec<RawProcessSample>, NvmlError> {
        let symbol = *nvml_sym(of.lib().nvmlDeviceGetProcessesUtilizationInfo.as_ref())?;
        let found = with_room(&mut self.infos, ROWS, |to, count| {
            let version = versioned::<nvmlProcessesUtilizationInfo_t>(1);
            let mut info = nvmlProcessesUtilizationInfo_t {
                version,
                processSamplesCount: *count,
                lastSeenTimeStamp: after,
                procUtilArray: to,
            };
            // SAFETY: the handle belongs to this open library, `info` says its own version, and there is room for as many rows as it says.
            let code = unsafe { symbol(of.pointer(), &raw mut info) };
            *count = info.processSamplesCount;
            code
        });
        let row = |r: &nvmlProcessUtilizationInfo_v1_t| RawProcessSample {
            at_us: r.timeStamp,
            pid: r.pid,
            percent: [r.smUtil, r.memUtil, r.encUtil, r.decUtil, r.jpgUtil, r.ofaUtil],
        };
        Ok(unsupported_argument(found)?.iter().map(row).collect())
    }

    /// (pid, bytes of GPU memory where the driver knows them).
    pub fn processes(&mut self, of: &Handle, list: List) -> Result<Vec<(u32, Option<u64>)>, NvmlError> {
        let lib = of.lib();
        let (third, second, first) = match list {
            List::Compute => (
                lib.nvmlDeviceGetComputeRunningProcesses_v3.as_ref(),
                lib.nvmlDeviceGetComputeRunningProcesses_v2.as_ref(),
                lib.nvmlDeviceGetComputeRunningProcesses.as_ref(),
            ),
            List::Graphics => (
                lib.nvmlDeviceGetGraphicsRunningProcesses_v3.as_ref(),
                lib.nvmlDeviceGetGraphicsRunningProcesses_v2.as_ref(),
                lib.nvmlDeviceGetGraphicsRunningProcesses.as_ref(),
            ),
            List::Mps => (
                lib.nvmlDeviceGetMPSComputeRunningProcesses_v3.as_ref(),
                lib.nvmlDeviceGetMPSComputeRunningProcesses_v2.as_ref(),
                lib.nvmlDeviceGetMPSComputeRunningProcesses.as_ref(),
            ),
        };
        // All ones is "cannot tell", never a size.
        let known = |bytes: u64| (bytes != u64::MAX).then_some(bytes);
        let newer: [Option<ListCall<nvmlProcessInfo_v2_t>>; 2] = [third.ok().copied(), second.ok().copied()];
        for symbol in newer.into_iter().flatten() {
            let found = with_room(&mut self.processes, PROCESSES, |to, count| {
                // SAFETY: the handle belongs to this open library, and the driver writes at most `count` entries, which there is room for.
                unsafe { symbol(of.pointer(), count, to) }
            });
            match found {
                Err(NvmlError::FunctionNotFound) => {}
                found => return Ok(found?.iter().map(|p| (p.pid, known(p.usedGpuMemory))).collect()),
            }
        }
        let symbol: ListCall<nvmlProcessInfo_v1_t> = *nvml_sym(first)?;
        let found = with_room(&mut self.old_processes, PROCESSES, |to, count| {
            // SAFETY: the handle belongs to this open library, and the driver writes at most `count` entries, which there is room for.
            unsafe { symbol(of.pointer(), count, to) }
        })?;
        Ok(found.iter().map(|p| (p.pid, known(p.usedGpuMemory))).collect())
    }
}
