//! Properties of a GPU: names, numbers, limits. Mostly those of a V100.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong};

use nvml_wrapper_sys::bindings::{nvmlBAR1Memory_t, nvmlConfComputeMemSizeInfo_t, nvmlDevice_t, nvmlPciInfo_t, nvmlReturn_t};

use super::{Call, INVALID_ARGUMENT, NOT_SUPPORTED, guard, nvml, put, put_text};
use crate::driver::Driver;

fn pci(driver: &mut Driver, gpu: usize) -> nvmlPciInfo_t {
    let id = &driver.world.gpus[gpu].pci_bus_id;
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
    pci
}

fn power_limit(call: Call, device: nvmlDevice_t, to: *mut c_uint) -> Result<(), nvmlReturn_t> {
    call.on(device, |d, gpu| put(to, d.held(gpu).watts.map_or(300_000, |watts| watts.saturating_mul(1000))))
}

nvml! {
    fn nvmlDeviceGetName(call, device: nvmlDevice_t, to: *mut c_char, room: c_uint) {
        call.on_unit(device, |s, unit| {
            let world = &s.driver.world;
            let name = &world.gpus[unit.gpu].name;
            match world.mig(unit) {
                // As in "NVIDIA A100-SXM4-40GB MIG 1g.5gb".
                Some(mig) => put_text(to, room, &format!("{name} MIG {}g.{}gb", mig.slices, (mig.memory_bytes >> 30).max(1))),
                None => put_text(to, room, name),
            }
        })
    }
    fn nvmlDeviceGetUUID(call, device: nvmlDevice_t, to: *mut c_char, room: c_uint) {
        call.on_unit(device, |s, unit| put_text(to, room, s.driver.world.uuid(unit)))
    }
    fn nvmlDeviceGetIndex(call, device: nvmlDevice_t, to: *mut c_uint) {
        call.on_unit(device, |s, unit| {
            let index = unit.mig.or_else(|| s.index(unit.gpu)).ok_or(INVALID_ARGUMENT)?;
            put(to, index as c_uint)
        })
    }
    fn nvmlDeviceGetSerial(call, device: nvmlDevice_t, to: *mut c_char, room: c_uint) {
        call.on(device, |_, gpu| put_text(to, room, &format!("03200{gpu:08}")))
    }
    fn nvmlDeviceGetVbiosVersion(call, device: nvmlDevice_t, to: *mut c_char, room: c_uint) {
        call.on(device, |_, _| put_text(to, room, "88.00.4F.00.09"))
    }
    fn nvmlDeviceGetMinorNumber(call, device: nvmlDevice_t, to: *mut c_uint) {
        call.on(device, |d, gpu| put(to, d.world.gpus[gpu].minor.unwrap_or(gpu as c_uint)))
    }
    fn nvmlDeviceGetPciInfo_v3(call, device: nvmlDevice_t, to: *mut nvmlPciInfo_t) {
        call.on(device, |d, gpu| put(to, pci(d, gpu)))
    }
    fn nvmlDeviceGetBAR1MemoryInfo(call, device: nvmlDevice_t, to: *mut nvmlBAR1Memory_t) {
        call.on(device, |d, gpu| {
            let bar1Total = d.world.gpus[gpu].memory_bytes;
            put(to, nvmlBAR1Memory_t { bar1Total, bar1Free: bar1Total - (2 << 20), bar1Used: 2 << 20 })
        })
    }
    // No memory is protected.
    fn nvmlDeviceGetConfComputeMemSizeInfo(call, device: nvmlDevice_t, to: *mut nvmlConfComputeMemSizeInfo_t) {
        call.on(device, |d, gpu| {
            let unprotectedMemSizeKib = d.world.gpus[gpu].memory_bytes >> 10;
            put(to, nvmlConfComputeMemSizeInfo_t { protectedMemSizeKib: 0, unprotectedMemSizeKib })
        })
    }
    fn nvmlDeviceGetFanSpeed(call, device: nvmlDevice_t, _to: *mut c_uint) { call.on(device, |_, _| Err(NOT_SUPPORTED)) }
    fn nvmlDeviceGetPowerManagementLimit(call, device: nvmlDevice_t, to: *mut c_uint) { power_limit(call, device, to) }
    fn nvmlDeviceGetPowerManagementDefaultLimit(call, device: nvmlDevice_t, to: *mut c_uint) {
        call.on(device, |_, _| put(to, 300_000))
    }
    fn nvmlDeviceGetEnforcedPowerLimit(call, device: nvmlDevice_t, to: *mut c_uint) { power_limit(call, device, to) }
    fn nvmlDeviceGetPowerManagementLimitConstraints(call, device: nvmlDevice_t, low: *mut c_uint, high: *mut c_uint) {
        call.on(device, |_, _| put(low, 150_000).and(put(high, 300_000)))
    }
    fn nvmlDeviceGetMaxClockInfo(call, device: nvmlDevice_t, kind: c_uint, to: *mut c_uint) {
        call.on(device, |_, _| put(to, if kind == 2 { 877 } else { 1_530 }))
    }
    fn nvmlDeviceGetPcieThroughput(call, device: nvmlDevice_t, _counter: c_uint, to: *mut c_uint) {
        call.on(device, |_, _| put(to, 0))
    }
    fn nvmlDeviceGetCurrPcieLinkGeneration(call, device: nvmlDevice_t, to: *mut c_uint) { call.on(device, |_, _| put(to, 3)) }
    fn nvmlDeviceGetMaxPcieLinkGeneration(call, device: nvmlDevice_t, to: *mut c_uint) { call.on(device, |_, _| put(to, 3)) }
    fn nvmlDeviceGetCurrPcieLinkWidth(call, device: nvmlDevice_t, to: *mut c_uint) { call.on(device, |_, _| put(to, 16)) }
    fn nvmlDeviceGetMaxPcieLinkWidth(call, device: nvmlDevice_t, to: *mut c_uint) { call.on(device, |_, _| put(to, 16)) }
    fn nvmlDeviceGetPerformanceState(call, device: nvmlDevice_t, to: *mut c_uint) { call.on(device, |_, _| put(to, 0)) }
    fn nvmlDeviceGetPersistenceMode(call, device: nvmlDevice_t, to: *mut c_uint) { call.on(device, |_, _| put(to, 1)) }
    fn nvmlDeviceGetComputeMode(call, device: nvmlDevice_t, to: *mut c_uint) { call.on(device, |_, _| put(to, 0)) }
    fn nvmlDeviceGetDisplayMode(call, device: nvmlDevice_t, to: *mut c_uint) { call.on(device, |_, _| put(to, 0)) }
    fn nvmlDeviceGetDisplayActive(call, device: nvmlDevice_t, to: *mut c_uint) { call.on(device, |_, _| put(to, 0)) }
    fn nvmlDeviceGetEccMode(call, device: nvmlDevice_t, current: *mut c_uint, pending: *mut c_uint) {
        call.on(device, |_, _| put(current, 1).and(put(pending, 1)))
    }
    fn nvmlDeviceGetTotalEccErrors(call, device: nvmlDevice_t, _kind: c_uint, _counter: c_uint, to: *mut c_ulonglong) {
        call.on(device, |_, _| put(to, 0))
    }
    fn nvmlDeviceGetBrand(call, device: nvmlDevice_t, to: *mut c_uint) { call.on(device, |_, _| put(to, 2)) }
    // Volta, or Hopper for boards with GPM.
    fn nvmlDeviceGetArchitecture(call, device: nvmlDevice_t, to: *mut c_uint) {
        call.on(device, |d, gpu| put(to, if *d.world.gpm(gpu) { 9 } else { 5 }))
    }
    fn nvmlDeviceGetNumGpuCores(call, device: nvmlDevice_t, to: *mut c_uint) { call.on(device, |_, _| put(to, 5_120)) }
    fn nvmlDeviceGetCudaComputeCapability(call, device: nvmlDevice_t, major: *mut c_int, minor: *mut c_int) {
        call.on(device, |d, gpu| put(major, if *d.world.gpm(gpu) { 9 } else { 7 }).and(put(minor, 0)))
    }
}
