//! Accounting: the GPU use of each process during its lifetime.

use std::ffi::c_uint;

use nvml_wrapper_sys::bindings::{nvmlAccountingStats_t, nvmlDevice_t, nvmlReturn_t};

use super::{Call, NO_PERMISSION, NOT_FOUND, NOT_SUPPORTED, failed, guard, nvml, put, put_all};
use crate::driver::Driver;
use crate::tally::Account;

/// Number of processes that a driver keeps accounts of.
const BUFFER: c_uint = 4_000;

fn on(
    call: Call,
    device: nvmlDevice_t,
    f: impl FnOnce(&mut Driver, usize) -> Result<(), nvmlReturn_t>,
) -> Result<(), nvmlReturn_t> {
    call.on(device, |d, gpu| if *d.world.accounting(gpu) { f(d, gpu) } else { Err(NOT_SUPPORTED) })
}

fn stats(account: &Account, now_us: u64) -> nvmlAccountingStats_t {
    let lived_us = account.end_us.unwrap_or(now_us).saturating_sub(account.begin_us);
    let percent = |seconds: f64| (seconds * 1e8 / lived_us.max(1) as f64).round().min(100.0) as c_uint;
    nvmlAccountingStats_t {
        gpuUtilization: percent(account.seconds[0]),
        memoryUtilization: percent(account.seconds[1]),
        maxMemoryUsage: account.memory_bytes,
        // Milliseconds; 0 while the process runs.
        time: account.end_us.map_or(0, |_| lived_us / 1_000),
        startTime: account.begin_us,
        isRunning: c_uint::from(account.end_us.is_none()),
        reserved: [0; 5],
    }
}

nvml! {
    fn nvmlDeviceGetAccountingMode(call, device: nvmlDevice_t, to: *mut c_uint) {
        call.on(device, |d, gpu| put(to, c_uint::from(*d.world.accounting(gpu))))
    }
    fn nvmlDeviceSetAccountingMode(call, device: nvmlDevice_t, _mode: c_uint) { on(call, device, |_, _| Err(NO_PERMISSION)) }
    fn nvmlDeviceClearAccountingPids(call, device: nvmlDevice_t) { on(call, device, |_, _| Err(NO_PERMISSION)) }
    fn nvmlDeviceGetAccountingBufferSize(call, device: nvmlDevice_t, to: *mut c_uint) { on(call, device, |_, _| put(to, BUFFER)) }
    fn nvmlDeviceGetAccountingPids(call, device: nvmlDevice_t, count: *mut c_uint, to: *mut c_uint) {
        on(call, device, |d, gpu| {
            let mut pids: Vec<c_uint> = d.accounts(gpu).map_err(failed)?.into_iter().map(|((pid, _), _)| d.shown(pid)).collect();
            pids.dedup();
            pids.truncate(BUFFER as usize);
            if pids.is_empty() { put(count, 0) } else { put_all(to, count, &pids, pids.len() as c_uint) }
        })
    }
    fn nvmlDeviceGetAccountingStats(call, device: nvmlDevice_t, pid: c_uint, to: *mut nvmlAccountingStats_t) {
        on(call, device, |d, gpu| {
            // The last process that had this pid.
            let accounts = d.accounts(gpu).map_err(failed)?;
            let account = accounts.iter().rfind(|((p, _), _)| d.shown(*p) == pid).ok_or(NOT_FOUND)?;
            put(to, stats(&account.1, d.now()))
        })
    }
}
