//! XID events: each reaches every set that was registered before it, once and in order.

use std::ffi::{c_uint, c_ulonglong, c_void};
use std::time::{Duration, Instant};

use nvml_wrapper_sys::bindings::{nvmlDevice_t, nvmlEventData_t, nvmlReturn_t};

use super::{Call, INVALID_ARGUMENT, NOT_SUPPORTED, State, TIMEOUT, failed, guard, handle, locked, nvml, put};
use crate::driver::Driver;
use crate::faults::Xid;
use crate::model::SERVED_AFTER_US;
use crate::processes::NO_INSTANCE;

const XID_CRITICAL_ERROR: c_ulonglong = 8;
const WAIT_CHECKS: Duration = Duration::from_millis(10);

/// A set's position in the order of a GPU's events: time, index in the log, number within a burst.
type Position = (u64, usize, u64);

#[derive(Default)]
pub struct Set {
    registered: Vec<(usize, Position)>,
}

/// The first due event of the registered GPUs that was not delivered yet.
fn next(driver: &Driver, set: &Set, due_us: u64) -> Option<(usize, Position, u64)> {
    let after = |gpu: usize, position: Position| {
        let of_gpu = driver.log.xids.iter().enumerate().filter(move |(_, x)| x.gpu == gpu && x.at_us <= due_us);
        let first = move |(at, xid): (usize, &Xid)| {
            let burst = if (xid.at_us, at) == (position.0, position.1) { position.2 + 1 } else { 0 };
            let next = (xid.at_us, at, burst);
            (next > position && burst < xid.count).then_some((gpu, next, xid.xid))
        };
        of_gpu.filter_map(first).min_by_key(|(_, position, _)| *position)
    };
    set.registered.iter().filter_map(|(gpu, position)| after(*gpu, *position)).min_by_key(|(_, position, _)| *position)
}

/// Younger events may not be in the log yet.
fn due_us(state: &mut State) -> Result<u64, nvmlReturn_t> {
    Ok(state.driver.read_log().map_err(failed)?.saturating_sub(SERVED_AFTER_US))
}

/// Takes the next event from the set.
fn deliver(state: &mut State, handle_of_set: usize) -> Result<Option<(usize, u64)>, nvmlReturn_t> {
    let due = due_us(state)?;
    state.still_loaded()?;
    let set = state.sets.get_mut(&handle_of_set).ok_or(INVALID_ARGUMENT)?;
    let Some((gpu, position, xid)) = next(&state.driver, set, due) else { return Ok(None) };
    set.registered.iter_mut().filter(|(g, _)| *g == gpu).for_each(|(_, at)| *at = position);
    Ok(Some((gpu, xid)))
}

fn wait(call: Call, set: *mut c_void, data: *mut nvmlEventData_t, timeout_ms: c_uint) -> Result<(), nvmlReturn_t> {
    call.enter(None)?;
    let (from, patience) = (Instant::now(), Duration::from_millis(timeout_ms.into()));
    loop {
        if let Some((gpu, xid)) = locked(|s| deliver(s, set as usize))? {
            let (gpuInstanceId, computeInstanceId) = (NO_INSTANCE, NO_INSTANCE);
            let device = handle(gpu.into());
            let event =
                nvmlEventData_t { device, eventType: XID_CRITICAL_ERROR, eventData: xid, gpuInstanceId, computeInstanceId };
            return put(data, event);
        }
        let left = patience.saturating_sub(from.elapsed());
        if left.is_zero() {
            return Err(TIMEOUT);
        }
        std::thread::sleep(left.min(WAIT_CHECKS));
    }
}

nvml! {
    fn nvmlDeviceGetSupportedEventTypes(call, device: nvmlDevice_t, to: *mut c_ulonglong) {
        call.on(device, |_, _| put(to, XID_CRITICAL_ERROR))
    }
    fn nvmlDeviceRegisterEvents(call, device: nvmlDevice_t, types: c_ulonglong, set: *mut c_void) {
        call.on_unit(device, |s, unit| {
            if unit.mig.is_some() || types & !XID_CRITICAL_ERROR != 0 {
                return Err(NOT_SUPPORTED);
            }
            // Events due up to now are older than the registration.
            let now = due_us(s)?;
            let set = s.sets.get_mut(&(set as usize)).ok_or(INVALID_ARGUMENT)?;
            if types != 0 && !set.registered.iter().any(|(gpu, _)| *gpu == unit.gpu) {
                set.registered.push((unit.gpu, (now, usize::MAX, 0)));
            }
            Ok(())
        })
    }
    fn nvmlEventSetCreate(call, to: *mut *mut c_void) {
        call.on_library(|s| {
            let handle = s.new_handle();
            s.sets.insert(handle, Set::default());
            put(to, handle as *mut c_void)
        })
    }
    fn nvmlEventSetFree(call, set: *mut c_void) {
        call.on_library(|s| s.sets.remove(&(set as usize)).map(|_| ()).ok_or(INVALID_ARGUMENT))
    }
    fn nvmlEventSetWait_v2(call, set: *mut c_void, data: *mut nvmlEventData_t, timeout_ms: c_uint) {
        wait(call, set, data, timeout_ms)
    }
    fn nvmlEventSetWait(call, set: *mut c_void, data: *mut nvmlEventData_t, timeout_ms: c_uint) {
        wait(call, set, data, timeout_ms)
    }
}
