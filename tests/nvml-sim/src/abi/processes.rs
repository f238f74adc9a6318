//! Memory, and the processes that use it.

use std::ffi::c_uint;

use nvml_wrapper_sys::bindings::{
    nvmlDevice_t, nvmlMemory_t, nvmlMemory_v2_t, nvmlProcessDetail_v1_t, nvmlProcessDetailList_v1_t, nvmlProcessInfo_t,
    nvmlProcessInfo_v1_t, nvmlReturn_t,
};

use super::{Call, INSUFFICIENT_SIZE, INVALID_ARGUMENT, failed, get, guard, nvml, put, put_all, struct_version, version_of};
use crate::processes::{List, Process};

/// A process list, with entries in the layout that `make` gives them.
fn list<T: Copy>(
    call: Call,
    device: nvmlDevice_t,
    list: List,
    count: *mut c_uint,
    to: *mut T,
    make: fn(Process) -> T,
) -> Result<(), nvmlReturn_t> {
    call.on_unit(device, |s, unit| {
        let found: Vec<T> = s.driver.processes(unit, list).map_err(failed)?.into_iter().map(make).collect();
        if found.is_empty() { put(count, 0) } else { put_all(to, count, &found, found.len() as c_uint) }
    })
}

fn v1(p: Process) -> nvmlProcessInfo_v1_t {
    nvmlProcessInfo_v1_t { pid: p.pid, usedGpuMemory: p.bytes }
}

/// The layout of `_v2` and `_v3`.
fn v2(p: Process) -> nvmlProcessInfo_t {
    nvmlProcessInfo_t { pid: p.pid, usedGpuMemory: p.bytes, gpuInstanceId: p.gi, computeInstanceId: p.ci }
}

/// That of 535.43 to 535.86 for `_v2` and `_v3`.
fn wide(p: Process) -> nvmlProcessDetail_v1_t {
    let (pid, gi, ci) = (p.pid, p.gi, p.ci);
    nvmlProcessDetail_v1_t { pid, usedGpuMemory: p.bytes, gpuInstanceId: gi, computeInstanceId: ci, usedGpuCcProtectedMemory: 0 }
}

/// A list of `_v2` or `_v3`, with the entries that the world's driver writes.
fn newer(
    call: Call,
    device: nvmlDevice_t,
    which: List,
    count: *mut c_uint,
    to: *mut nvmlProcessInfo_t,
) -> Result<(), nvmlReturn_t> {
    call.on_unit(device, |s, unit| {
        let found = s.driver.processes(unit, which).map_err(failed)?;
        let all = || found.iter().copied();
        let needed = found.len() as c_uint;
        match *s.driver.world.list_entry_bytes(unit.gpu) {
            _ if found.is_empty() => put(count, 0),
            16 => put_all(to.cast(), count, &all().map(v1).collect::<Vec<_>>(), needed),
            32 => put_all(to.cast(), count, &all().map(wide).collect::<Vec<_>>(), needed),
            _ => put_all(to, count, &all().map(v2).collect::<Vec<_>>(), needed),
        }
    })
}

macro_rules! lists {
    ($($list:ident $first:ident $second:ident $third:ident)*) => {
        nvml! {$(
            fn $first(call, device: nvmlDevice_t, count: *mut c_uint, to: *mut nvmlProcessInfo_v1_t) {
                list(call, device, List::$list, count, to, v1)
            }
            fn $second(call, device: nvmlDevice_t, count: *mut c_uint, to: *mut nvmlProcessInfo_t) {
                newer(call, device, List::$list, count, to)
            }
            fn $third(call, device: nvmlDevice_t, count: *mut c_uint, to: *mut nvmlProcessInfo_t) {
                newer(call, device, List::$list, count, to)
            }
        )*}
    };
}

lists! {
    Compute nvmlDeviceGetComputeRunningProcesses nvmlDeviceGetComputeRunningProcesses_v2
        nvmlDeviceGetComputeRunningProcesses_v3
    Graphics nvmlDeviceGetGraphicsRunningProcesses nvmlDeviceGetGraphicsRunningProcesses_v2
        nvmlDeviceGetGraphicsRunningProcesses_v3
    Mps nvmlDeviceGetMPSComputeRunningProcesses nvmlDeviceGetMPSComputeRunningProcesses_v2
        nvmlDeviceGetMPSComputeRunningProcesses_v3
}

nvml! {
    fn nvmlDeviceGetRunningProcessDetailList(call, device: nvmlDevice_t, list: *mut nvmlProcessDetailList_v1_t) {
        version_of(list.cast(), struct_version::<nvmlProcessDetailList_v1_t>(1))?;
        call.on_unit(device, |s, unit| {
            let mut detail = get(list)?;
            let which = [List::Compute, List::Graphics, List::Mps].get(detail.mode as usize).ok_or(INVALID_ARGUMENT)?;
            let found: Vec<_> = s.driver.processes(unit, *which).map_err(failed)?.into_iter().map(wide).collect();
            let (room, to) = (detail.numProcArrayEntries as usize, detail.procArray);
            if !found.is_empty() && (to.is_null() || room < found.len()) {
                detail.numProcArrayEntries = found.len() as c_uint;
                return put(list, detail).and(Err(INSUFFICIENT_SIZE));
            }
            if found.is_empty() {
                detail.numProcArrayEntries = 0;
            } else {
                put_all(to, &raw mut detail.numProcArrayEntries, &found, found.len() as c_uint)?;
            }
            put(list, detail)
        })
    }
    fn nvmlDeviceGetMemoryInfo(call, device: nvmlDevice_t, to: *mut nvmlMemory_t) {
        call.on_unit(device, |s, unit| {
            let memory = s.driver.memory(unit).map_err(failed)?;
            // The driver's own memory counts as used here.
            let used = memory.reserved + memory.used;
            put(to, nvmlMemory_t { total: memory.total, free: memory.total - used, used })
        })
    }
    fn nvmlDeviceGetMemoryInfo_v2(call, device: nvmlDevice_t, to: *mut nvmlMemory_v2_t) {
        version_of(to.cast(), struct_version::<nvmlMemory_v2_t>(2))?;
        call.on_unit(device, |s, unit| {
            let (memory, version) = (s.driver.memory(unit).map_err(failed)?, get(to)?.version);
            let (total, reserved, used) = (memory.total, memory.reserved, memory.used);
            put(to, nvmlMemory_v2_t { version, total, reserved, free: total - reserved - used, used })
        })
    }
}
