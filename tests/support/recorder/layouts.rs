//! Measures the length of entries in responses: the buffer is filled with a pattern first, and the bytes that the driver wrote show it.
//! There is room for entries several times as long as any known.

use std::collections::BTreeMap;
use std::ffi::{c_uint, c_void};

use gpu_sampler_tests::recording::stride::{PATTERN, Stride};
use nvml_wrapper::Nvml;
use nvml_wrapper_sys::bindings::{nvmlDevice_t, nvmlProcessesUtilizationInfo_t, nvmlReturn_t};

use super::{is_alive, versioned};

/// Entries requested, and bytes of room for each.
const ENTRIES: usize = 1_024;
const ROOM_EACH: usize = 256;

/// A response that was written over the pattern, and the driver's count of its entries.
fn written(call: impl FnOnce(*mut c_void, &mut c_uint) -> nvmlReturn_t) -> Option<(Vec<u8>, usize)> {
    // Words, for the alignment that entries need.
    let mut room = vec![u64::from_ne_bytes([PATTERN; 8]); ENTRIES * ROOM_EACH / 8];
    let mut count = ENTRIES as c_uint;
    if call(room.as_mut_ptr().cast(), &mut count) != 0 || count == 0 {
        return None;
    }
    let bytes = room.iter().flat_map(|word| word.to_ne_bytes()).collect();
    Some((bytes, (count as usize).min(ENTRIES)))
}

/// Takes the offset of the pid in an entry, and the length of entries that the agent assumes.
fn measure(
    to: &mut BTreeMap<String, Stride>,
    name: &str,
    (pid_at, assumed): (usize, usize),
    call: impl FnOnce(*mut c_void, &mut c_uint) -> nvmlReturn_t,
) {
    let Some((bytes, entries)) = written(call) else { return };
    // More entries leave fewer possible lengths.
    if to.get(name).is_none_or(|known| entries > known.entries) {
        to.insert(name.to_owned(), Stride::of(&bytes, entries, pid_at, assumed, is_alive));
    }
}

/// Measures each call with a layout that the agent relies on.
pub fn measure_all(nvml: &Nvml, device: nvmlDevice_t, to: &mut BTreeMap<String, Stride>) {
    let lib = nvml.lib();
    macro_rules! list {
        ($($name:ident $assumed:literal)*) => {$(
            if let Ok(symbol) = &lib.$name {
                measure(to, stringify!($name), (0, $assumed), |room, count| {
                    // SAFETY: a live library's handle, and room for `count` entries of several times any known length.
                    unsafe { symbol(device, count, room.cast()) }
                });
            }
        )*};
    }
    list! {
        nvmlDeviceGetComputeRunningProcesses 16
        nvmlDeviceGetComputeRunningProcesses_v2 24
        nvmlDeviceGetComputeRunningProcesses_v3 24
        nvmlDeviceGetGraphicsRunningProcesses_v3 24
        nvmlDeviceGetMPSComputeRunningProcesses_v3 24
    }
    if let Ok(symbol) = &lib.nvmlDeviceGetProcessUtilization {
        measure(to, "nvmlDeviceGetProcessUtilization", (0, 32), |room, count| {
            // SAFETY: as above.
            unsafe { symbol(device, room.cast(), count, 0) }
        });
    }
    if let Ok(symbol) = &lib.nvmlDeviceGetProcessesUtilizationInfo {
        measure(to, "nvmlDeviceGetProcessesUtilizationInfo", (8, 40), |room, count| {
            let mut info = nvmlProcessesUtilizationInfo_t {
                version: versioned::<nvmlProcessesUtilizationInfo_t>(1),
                processSamplesCount: *count,
                lastSeenTimeStamp: 0,
                procUtilArray: room.cast(),
            };
            // SAFETY: as above; `info` contains its own version.
            let code = unsafe { symbol(device, &raw mut info) };
            *count = info.processSamplesCount;
            code
        });
    }
}
