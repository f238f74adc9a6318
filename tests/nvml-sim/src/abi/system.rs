//! Init and shutdown, versions, the list of devices, names of errors.

use std::ffi::{c_char, c_int, c_uint};

use nvml_wrapper_sys::bindings::{nvmlDevice_t, nvmlReturn_t};

use super::{Call, INVALID_ARGUMENT, NOT_FOUND, find, guard, init, nvml, put, put_text, shutdown, text};
use crate::faults::ERRORS;
use crate::world::Unit;

fn by_index(call: Call, index: c_uint, to: *mut nvmlDevice_t) -> nvmlResult {
    find(call, to, |s, unit| unit.mig.is_none() && s.index(unit.gpu) == Some(index as usize))
        .map_err(|code| if code == NOT_FOUND { INVALID_ARGUMENT } else { code })
}

fn by_pci(call: Call, id: *const c_char, to: *mut nvmlDevice_t) -> nvmlResult {
    let id = text(id)?;
    find(call, to, |s, Unit { gpu, mig }| mig.is_none() && s.driver.world.gpus[gpu].pci_bus_id.eq_ignore_ascii_case(id))
}

#[expect(non_camel_case_types, reason = "named like nvmlReturn_t")]
type nvmlResult = Result<(), nvmlReturn_t>;

nvml! {
    fn nvmlInit_v2(call) { init(call) }
    fn nvmlInit(call) { init(call) }
    fn nvmlInitWithFlags(call, _flags: c_uint) { init(call) }
    fn nvmlShutdown(_call) { shutdown() }
    fn nvmlSystemGetDriverVersion(call, to: *mut c_char, room: c_uint) {
        call.on_library(|s| put_text(to, room, &s.driver.world.driver_version))
    }
    fn nvmlSystemGetNVMLVersion(call, to: *mut c_char, room: c_uint) {
        call.on_library(|s| put_text(to, room, &format!("12.{}", s.driver.world.driver_version)))
    }
    fn nvmlSystemGetCudaDriverVersion(call, to: *mut c_int) { call.on_library(|_| put(to, 12_020)) }
    fn nvmlSystemGetCudaDriverVersion_v2(call, to: *mut c_int) { call.on_library(|_| put(to, 12_020)) }
    fn nvmlDeviceGetCount_v2(call, to: *mut c_uint) { call.on_library(|s| put(to, s.present.len() as c_uint)) }
    fn nvmlDeviceGetCount(call, to: *mut c_uint) { call.on_library(|s| put(to, s.present.len() as c_uint)) }
    fn nvmlDeviceGetHandleByIndex_v2(call, index: c_uint, to: *mut nvmlDevice_t) { by_index(call, index, to) }
    fn nvmlDeviceGetHandleByIndex(call, index: c_uint, to: *mut nvmlDevice_t) { by_index(call, index, to) }
    fn nvmlDeviceGetHandleByUUID(call, uuid: *const c_char, to: *mut nvmlDevice_t) {
        let uuid = text(uuid)?;
        // It may read the UUID of every GPU [I].
        call.on_library(|s| {
            let (world, dir) = (&s.driver.world, &s.driver.dir);
            s.present.iter().try_for_each(|gpu| s.nodes.gpu(world, dir, *gpu))
        })?;
        find(call, to, |s, unit| s.driver.world.uuid(unit) == uuid)
    }
    fn nvmlDeviceGetHandleByPciBusId_v2(call, id: *const c_char, to: *mut nvmlDevice_t) { by_pci(call, id, to) }
    fn nvmlDeviceGetHandleByPciBusId(call, id: *const c_char, to: *mut nvmlDevice_t) { by_pci(call, id, to) }
}

/// As in nvml.h; the text is static.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlErrorString(code: nvmlReturn_t) -> *const c_char {
    ERRORS.iter().find(|(known, ..)| *known == code).map_or(c"Unknown Error", |(.., text)| text).as_ptr()
}
