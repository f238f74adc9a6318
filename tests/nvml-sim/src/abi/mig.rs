//! MIG devices and their GPU.

use std::ffi::c_uint;

use nvml_wrapper_sys::bindings::{nvmlDevice_t, nvmlDeviceAttributes_t, nvmlReturn_t};

use super::{Call, NOT_FOUND, NOT_SUPPORTED, guard, handle, nvml, put};
use crate::world::{Mig, Unit};

/// Multiprocessors of an A100's slice.
const SLICE_MULTIPROCESSORS: c_uint = 14;

/// A call that only MIG devices support.
fn on_mig(call: Call, device: nvmlDevice_t, f: impl FnOnce(&Mig) -> Result<(), nvmlReturn_t>) -> Result<(), nvmlReturn_t> {
    call.on_unit(device, |s, unit| f(s.driver.world.mig(unit).ok_or(NOT_SUPPORTED)?))
}

nvml! {
    fn nvmlDeviceGetMigMode(call, device: nvmlDevice_t, current: *mut c_uint, pending: *mut c_uint) {
        call.on(device, |d, gpu| {
            if d.world.gpus[gpu].mig.is_empty() {
                return Err(NOT_SUPPORTED);
            }
            put(current, 1)?;
            put(pending, 1)
        })
    }
    fn nvmlDeviceGetMaxMigDeviceCount(call, device: nvmlDevice_t, to: *mut c_uint) {
        call.on(device, |d, gpu| put(to, d.world.gpus[gpu].mig.len() as c_uint))
    }
    fn nvmlDeviceGetMigDeviceHandleByIndex(call, device: nvmlDevice_t, index: c_uint, to: *mut nvmlDevice_t) {
        call.on(device, |d, gpu| {
            let unit = Unit { gpu, mig: Some(index as usize) };
            if d.world.mig(unit).is_some() { put(to, handle(unit)) } else { Err(NOT_FOUND) }
        })
    }
    fn nvmlDeviceGetDeviceHandleFromMigDeviceHandle(call, device: nvmlDevice_t, to: *mut nvmlDevice_t) {
        call.on_unit(device, |_, unit| if unit.mig.is_some() { put(to, handle(unit.gpu.into())) } else { Err(NOT_SUPPORTED) })
    }
    fn nvmlDeviceIsMigDeviceHandle(call, device: nvmlDevice_t, to: *mut c_uint) {
        call.on_unit(device, |_, unit| put(to, c_uint::from(unit.mig.is_some())))
    }
    fn nvmlDeviceGetGpuInstanceId(call, device: nvmlDevice_t, to: *mut c_uint) { on_mig(call, device, |mig| put(to, mig.gi)) }
    fn nvmlDeviceGetComputeInstanceId(call, device: nvmlDevice_t, to: *mut c_uint) { on_mig(call, device, |mig| put(to, mig.ci)) }
    fn nvmlDeviceGetAttributes_v2(call, device: nvmlDevice_t, to: *mut nvmlDeviceAttributes_t) {
        on_mig(call, device, |mig| put(to, nvmlDeviceAttributes_t {
            multiprocessorCount: mig.slices * SLICE_MULTIPROCESSORS,
            sharedCopyEngineCount: mig.slices,
            sharedDecoderCount: mig.slices / 2,
            sharedEncoderCount: 0,
            sharedJpegCount: 0,
            sharedOfaCount: 0,
            gpuInstanceSliceCount: mig.slices,
            computeInstanceSliceCount: mig.slices,
            memorySizeMB: mig.memory_bytes >> 20,
        }))
    }
}
