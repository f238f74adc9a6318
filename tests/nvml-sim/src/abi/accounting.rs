//! Accounting: the GPU use of each process during its lifetime.

use std::ffi::{c_uint, c_ulonglong};

use nvml_wrapper_sys::bindings::{nvmlAccountingStats_t, nvmlDevice_t, nvmlReturn_t};

use super::{Call, NO_PERMISSION, NOT_FOUND, NOT_SUPPORTED, failed, get, guard, nvml, put, put_all};
use crate::driver::Driver;
use crate::tally::Account;

/// Number of processes that a driver keeps accounts of.
const BUFFER: c_uint = 4_000;

/// Of drivers since 610: with the sums of the process's samples, in hundredths of a percent.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(non_snake_case, reason = "nvml.h's names")]
pub struct AccountingStatsV2 {
    pid: c_uint,
    isRunning: c_uint,
    gpuUtilization: c_uint,
    memoryUtilization: c_uint,
    maxMemoryUsage: c_ulonglong,
    sampleCount: c_uint,
    sumGpuUtil: c_ulonglong,
    sumFbUtil: c_ulonglong,
    time: c_ulonglong,
    startTime: c_ulonglong,
}

const _: () = assert!(size_of::<AccountingStatsV2>() == 64);

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

/// The sums are those of samples that cover the whole life of the process.
fn stats_v2(pid: c_uint, account: &Account, period_us: u64, now_us: u64) -> AccountingStatsV2 {
    let first = stats(account, now_us);
    let lived_us = account.end_us.unwrap_or(now_us).saturating_sub(account.begin_us);
    let sum = |seconds: f64| (seconds * 1e6 / period_us as f64 * 10_000.0) as c_ulonglong;
    AccountingStatsV2 {
        pid,
        isRunning: first.isRunning,
        gpuUtilization: first.gpuUtilization,
        memoryUtilization: first.memoryUtilization,
        maxMemoryUsage: first.maxMemoryUsage,
        sampleCount: (lived_us / period_us) as c_uint,
        sumGpuUtil: sum(account.seconds[0]),
        sumFbUtil: sum(account.seconds[1]),
        time: first.time,
        startTime: first.startTime,
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
    fn nvmlDeviceGetAccountingStats_v2(call, device: nvmlDevice_t, to: *mut AccountingStatsV2) {
        on(call, device, |d, gpu| {
            let pid = get(to)?.pid;
            let accounts = d.accounts(gpu).map_err(failed)?;
            let account = accounts.iter().rfind(|((p, _), _)| d.shown(*p) == pid).ok_or(NOT_FOUND)?;
            put(to, stats_v2(pid, &account.1, *d.world.period_us(gpu), d.now()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sums_of_a_process_are_those_of_its_samples() {
        let account =
            Account { seconds: [2.5, 1.0, 0.0, 0.0, 0.0, 0.0], begin_us: 1_000_000, end_us: Some(6_000_000), memory_bytes: 7 };
        let stats = stats_v2(9, &account, 100_000, 60_000_000);
        assert_eq!((stats.pid, stats.isRunning, stats.gpuUtilization, stats.sampleCount), (9, 0, 50, 50));
        // 50 samples of 50 %, and of 20 %.
        assert_eq!((stats.sumGpuUtil, stats.sumFbUtil, stats.time), (250_000, 100_000, 5_000));
    }
}
