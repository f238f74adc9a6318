//! Driver calls that nvml-wrapper does not offer in the form that the poller needs: with preallocated buffers, and with the variants of
//! older and newer drivers.
//!
//! NOT_FOUND and NO_DATA mean "nothing new" and yield an empty result, never an error.

use std::ffi::c_uint;

use nvml_wrapper::error::{NvmlError, nvml_sym, nvml_try};
use nvml_wrapper_sys::bindings::{
    nvmlDevice_t, nvmlProcessInfo_v1_t, nvmlProcessInfo_v2_t, nvmlProcessUtilizationInfo_v1_t, nvmlProcessUtilizationSample_t,
    nvmlProcessesUtilizationInfo_t, nvmlReturn_t, nvmlSample_t,
};
use sampler_core::reconstruct::{RawProcessSample, RawSample};

use super::library::{Handle, unsupported_argument, versioned};
use super::list_entries::EntryBuffer;

/// The size query returns a capacity (100 or 4096), not a count, and the number of samples grows between calls: one call with room for
/// all is made instead.
const PROCESS_SAMPLES: usize = 4096;
/// The driver lists at most 950 processes.
const PROCESSES: usize = 1024;
/// The driver's ring has 72 samples.
const SAMPLES: usize = 128;
/// Maximum number of entries of a buffer, whatever size the driver requests.
const MOST: usize = 1 << 16;
/// nvmlValueType_t.
const DOUBLE: c_uint = 0;
const UNSIGNED_LONG: c_uint = 2;
const UNSIGNED_LONG_LONG: c_uint = 3;
const SIGNED_LONG_LONG: c_uint = 4;

/// The process lists of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    Compute,
    Graphics,
    Mps,
}

type ListCall<T> = unsafe extern "C" fn(nvmlDevice_t, *mut c_uint, *mut T) -> nvmlReturn_t;

/// Receive results of calls; grow when the driver has more.
#[derive(Default)]
pub struct Buffers {
    samples: Vec<nvmlSample_t>,
    process_samples: Vec<nvmlProcessUtilizationSample_t>,
    infos: Vec<nvmlProcessUtilizationInfo_v1_t>,
    processes: EntryBuffer,
    old_processes: Vec<nvmlProcessInfo_v1_t>,
}

// SAFETY: consists of plain numbers; pointers are never part of a result, and nothing is bound to a thread.
unsafe impl Send for Buffers {}

/// Calls with the present buffer, and with a larger one while the driver reports that it is too small. `call(pointer, count)` sets
/// `count` to the number of entries, or to the number needed.
fn with_room<T: Copy>(
    buffer: &mut Vec<T>,
    room: usize,
    mut call: impl FnMut(*mut T, &mut c_uint) -> nvmlReturn_t,
) -> Result<&[T], NvmlError> {
    if buffer.is_empty() {
        // SAFETY: entries consist of plain numbers and unions of them, for which all-zero bytes are valid.
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

/// As [`with_room`], for a list with entries of unknown size.
fn newer_list(
    buffer: &mut EntryBuffer,
    mut call: impl FnMut(*mut u64, &mut c_uint) -> nvmlReturn_t,
) -> Result<Vec<(u32, u64)>, NvmlError> {
    let mut room = PROCESSES;
    loop {
        buffer.prepare(room);
        let mut count = room as c_uint;
        match nvml_try(call(buffer.as_mut_ptr(), &mut count)) {
            Ok(()) => return Ok(buffer.entries(count as usize)),
            Err(NvmlError::NotFound | NvmlError::NoData) => return Ok(Vec::new()),
            Err(NvmlError::InsufficientSize(_)) if room < MOST => room = (2 * room).max(count as usize).min(MOST),
            Err(error) => return Err(error),
        }
    }
}

impl Buffers {
    /// Maximum number of samples that the driver returns at once.
    pub fn capacity(handle: &Handle, kind: u32) -> Result<usize, NvmlError> {
        let symbol = *nvml_sym(handle.lib().nvmlDeviceGetSamples.as_ref())?;
        let (mut value_type, mut count) = (1, 0);
        // SAFETY: the handle belongs to this open library; without a buffer the driver only returns the size.
        let result =
            nvml_try(unsafe { symbol(handle.pointer(), kind, 0, &raw mut value_type, &raw mut count, std::ptr::null_mut()) });
        match result {
            Ok(()) | Err(NvmlError::InsufficientSize(_)) => Ok(count as usize),
            Err(error) => Err(error),
        }
    }

    /// Every sample of one of the device's rings that is newer than `after`, in the driver's order.
    pub fn samples(&mut self, handle: &Handle, kind: u32, after: u64) -> Result<Vec<RawSample>, NvmlError> {
        let symbol = *nvml_sym(handle.lib().nvmlDeviceGetSamples.as_ref())?;
        let mut value_type = 1;
        let found = with_room(&mut self.samples, SAMPLES, |to, count| {
            // SAFETY: the handle belongs to this open library, and the driver writes at most `count` samples, for which there is room.
            unsafe { symbol(handle.pointer(), kind, after, &raw mut value_type, count, to) }
        })?;
        let percent = |sample: &nvmlSample_t| {
            let value = sample.sampleValue;
            // SAFETY: a union of numbers, read as the type that the driver reports.
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

    /// Process samples newer than `after`, in the form that every driver supports.
    pub fn process_samples(&mut self, handle: &Handle, after: u64) -> Result<Vec<RawProcessSample>, NvmlError> {
        let symbol = *nvml_sym(handle.lib().nvmlDeviceGetProcessUtilization.as_ref())?;
        let found = with_room(&mut self.process_samples, PROCESS_SAMPLES, |to, count| {
            // SAFETY: the handle belongs to this open library, and the driver writes at most `count` samples, for which there is room.
            unsafe { symbol(handle.pointer(), to, count, after) }
        })?;
        let sample = |s: &nvmlProcessUtilizationSample_t| RawProcessSample {
            at_us: s.timeStamp,
            pid: s.pid,
            percent: [s.smUtil, s.memUtil, s.encUtil, s.decUtil, 0, 0],
        };
        Ok(found.iter().map(sample).collect())
    }

    /// As [`Buffers::process_samples`], with all engines, which drivers since 550 report.
    pub fn process_samples_of_all_engines(&mut self, handle: &Handle, after: u64) -> Result<Vec<RawProcessSample>, NvmlError> {
        let symbol = *nvml_sym(handle.lib().nvmlDeviceGetProcessesUtilizationInfo.as_ref())?;
        let found = with_room(&mut self.infos, PROCESS_SAMPLES, |to, count| {
            let version = versioned::<nvmlProcessesUtilizationInfo_t>(1);
            let mut info = nvmlProcessesUtilizationInfo_t {
                version,
                processSamplesCount: *count,
                lastSeenTimeStamp: after,
                procUtilArray: to,
            };
            // SAFETY: the handle belongs to this open library, `info` contains its version, and the buffer has the stated room.
            let code = unsafe { symbol(handle.pointer(), &raw mut info) };
            *count = info.processSamplesCount;
            code
        });
        let sample = |s: &nvmlProcessUtilizationInfo_v1_t| RawProcessSample {
            at_us: s.timeStamp,
            pid: s.pid,
            percent: [s.smUtil, s.memUtil, s.encUtil, s.decUtil, s.jpgUtil, s.ofaUtil],
        };
        Ok(unsupported_argument(found)?.iter().map(sample).collect())
    }

    /// (PID, bytes of GPU memory if the driver reports them).
    pub fn processes(&mut self, handle: &Handle, list: List) -> Result<Vec<(u32, Option<u64>)>, NvmlError> {
        let lib = handle.lib();
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
        // All ones means "unknown".
        let known = |bytes: u64| (bytes != u64::MAX).then_some(bytes);
        let newer: [Option<ListCall<nvmlProcessInfo_v2_t>>; 2] = [third.ok().copied(), second.ok().copied()];
        for symbol in newer.into_iter().flatten() {
            let found = newer_list(&mut self.processes, |to, count| {
                // SAFETY: the handle belongs to this open library, and the driver writes at most `count` entries, for which there is room
                // whatever their size.
                unsafe { symbol(handle.pointer(), count, to.cast()) }
            });
            match found {
                Err(NvmlError::FunctionNotFound) => {}
                found => return Ok(found?.into_iter().map(|(pid, bytes)| (pid, known(bytes))).collect()),
            }
        }
        let symbol: ListCall<nvmlProcessInfo_v1_t> = *nvml_sym(first)?;
        let found = with_room(&mut self.old_processes, PROCESSES, |to, count| {
            // SAFETY: the handle belongs to this open library, and the driver writes at most `count` entries, for which there is room.
            unsafe { symbol(handle.pointer(), count, to) }
        })?;
        Ok(found.iter().map(|p| (p.pid, known(p.usedGpuMemory))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Return codes and counts of a driver, in the order in which calls are made: the calls end, and the count is never beyond the buffer.
    #[test]
    fn fuzz_list_calls() {
        devkit::fuzz(file!(), "list_calls", move |bytes| {
            let mut answers = bytes.chunks_exact(5).map(|answer| {
                let [code, count @ ..] = answer else { unreachable!("chunks of five bytes") };
                (nvmlReturn_t::from(*code), count.iter().fold(0, |count, byte| count << 8 | u32::from(*byte)))
            });
            let (mut calls, mut buffer, mut processes) = (0, Vec::new(), EntryBuffer::default());
            let mut answer = |count: &mut c_uint| {
                calls += 1;
                let (code, needed) = answers.next().unwrap_or((7, u32::MAX));
                *count = needed;
                code
            };
            let room = usize::from(bytes.first().copied().unwrap_or_default()) + 1;
            let found = with_room::<u64>(&mut buffer, room, |_, count| answer(count)).map(<[u64]>::len);
            assert!(found.unwrap_or_default() <= MOST);
            let listed = newer_list(&mut processes, |_, count| answer(count));
            assert!(listed.map_or(0, |listed| listed.len()) <= MOST);
            // The room doubles each time.
            assert!(buffer.len() <= MOST.max(room) && calls <= 40, "{calls}");
        });
    }
}
