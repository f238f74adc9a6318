//! Recent activity of the GPU: utilization, samples, power, clocks and throttle reasons.

use std::ffi::{c_uint, c_ulonglong};

use nvml_wrapper_sys::bindings::{
    nvmlDevice_t, nvmlProcessUtilizationInfo_v1_t, nvmlProcessUtilizationSample_t, nvmlProcessesUtilizationInfo_v1_t,
    nvmlReturn_t, nvmlSample_t, nvmlUtilization_t,
};

use super::{
    Call, INSUFFICIENT_SIZE, NOT_FOUND, NOT_SUPPORTED, failed, get, guard, nvml, put, put_all, struct_version, version_of,
};
use crate::answers::{MEMORY_CLOCK_MHZ, ProcessSample, RingKind, clock_mhz, power_mw};
use crate::driver::Driver;
use crate::model::{ENGINES, Engine};
use crate::world::{ProcessCall, Rates};

const VALUE_UNSIGNED_INT: c_uint = 1;
const MEMORY_CLOCK: c_uint = 2;
/// All reasons of nvml.h.
const ALL_REASONS: c_ulonglong = 0x1ff;

/// The process samples for a read, or the result code and the count for the caller.
fn process_samples(
    driver: &mut Driver,
    gpu: usize,
    after: u64,
    room: usize,
    no_buffer: bool,
    how: ProcessCall,
) -> Result<Vec<ProcessSample>, (nvmlReturn_t, c_uint)> {
    if how == ProcessCall::Unsupported {
        return Err((NOT_SUPPORTED, 0));
    }
    let probe = *driver.world.row_probe(gpu);
    if room == 0 || no_buffer {
        return Err((INSUFFICIENT_SIZE, probe));
    }
    let mut samples = driver.process_samples(gpu, after).map_err(|error| (failed(error), 0))?;
    if how == ProcessCall::Zeros {
        samples.iter_mut().for_each(|sample| sample.util = [0; ENGINES]);
    }
    if samples.is_empty() || how == ProcessCall::Empty {
        return Err((NOT_FOUND, 0));
    }
    // One more than the size query returned: a client without headroom has to query again.
    let wanted = samples.len().max(if *driver.world.rows_grow(gpu) { probe as usize + 1 } else { 0 });
    if room < wanted { Err((INSUFFICIENT_SIZE, probe.max(wanted as c_uint))) } else { Ok(samples) }
}

/// Utilization of one engine, and the driver's period.
fn engine(call: Call, device: nvmlDevice_t, engine: Engine, to: *mut c_uint, period: *mut c_uint) -> Result<(), nvmlReturn_t> {
    call.on_whole(device, |d, gpu| {
        let util = d.latest(gpu).map_err(failed)?.map_or(0, |t| t.util[engine as usize]);
        put(to, util)?;
        put(period, *d.world.period_us(gpu) as c_uint)
    })
}

fn reasons(call: Call, device: nvmlDevice_t, to: *mut c_ulonglong) -> Result<(), nvmlReturn_t> {
    call.on(device, |d, gpu| put(to, d.reasons(gpu).map_err(failed)?))
}

fn clock(call: Call, device: nvmlDevice_t, kind: c_uint, to: *mut c_uint) -> Result<(), nvmlReturn_t> {
    call.on(device, |d, gpu| {
        let busy = d.busy(gpu).map_err(failed)?;
        put(to, if kind == MEMORY_CLOCK { MEMORY_CLOCK_MHZ } else { at_most(clock_mhz(busy), d.held(gpu).mhz) })
    })
}

fn at_most(value: u32, limit: Option<u32>) -> u32 {
    limit.map_or(value, |limit| value.min(limit))
}

nvml! {
    fn nvmlDeviceGetUtilizationRates(call, device: nvmlDevice_t, to: *mut nvmlUtilization_t) {
        call.on_whole(device, |d, gpu| {
            let latest = d.latest(gpu).map_err(failed)?;
            let util = latest.map_or([0; ENGINES], |sample| d.shown_util(gpu, &sample));
            let shown = *d.world.utilization_rates(gpu) == Rates::Ring;
            put(to, if shown { nvmlUtilization_t { gpu: util[0], memory: util[1] } } else { nvmlUtilization_t { gpu: 0, memory: 0 } })
        })
    }
    fn nvmlDeviceGetEncoderUtilization(call, device: nvmlDevice_t, to: *mut c_uint, period: *mut c_uint) {
        engine(call, device, Engine::Enc, to, period)
    }
    fn nvmlDeviceGetDecoderUtilization(call, device: nvmlDevice_t, to: *mut c_uint, period: *mut c_uint) {
        engine(call, device, Engine::Dec, to, period)
    }
    fn nvmlDeviceGetJpgUtilization(call, device: nvmlDevice_t, to: *mut c_uint, period: *mut c_uint) {
        engine(call, device, Engine::Jpg, to, period)
    }
    fn nvmlDeviceGetOfaUtilization(call, device: nvmlDevice_t, to: *mut c_uint, period: *mut c_uint) {
        engine(call, device, Engine::Ofa, to, period)
    }
    fn nvmlDeviceGetProcessUtilization(
        call, device: nvmlDevice_t, to: *mut nvmlProcessUtilizationSample_t, count: *mut c_uint, last_seen: c_ulonglong
    ) {
        call.on_whole(device, |d, gpu| {
            let how = *d.world.process_utilization(gpu);
            let samples = match process_samples(d, gpu, last_seen, get(count)? as usize, to.is_null(), how) {
                Ok(samples) => samples,
                Err((code, n)) => return put(count, n).and(Err(code)),
            };
            let entries: Vec<_> = samples.iter().map(|r| nvmlProcessUtilizationSample_t {
                pid: r.pid, timeStamp: r.stamp_us, smUtil: r.util[0], memUtil: r.util[1], encUtil: r.util[2], decUtil: r.util[3],
            }).collect();
            put_all(to, count, &entries, entries.len() as c_uint)
        })
    }
    fn nvmlDeviceGetProcessesUtilizationInfo(call, device: nvmlDevice_t, info: *mut nvmlProcessesUtilizationInfo_v1_t) {
        version_of(info.cast(), struct_version::<nvmlProcessesUtilizationInfo_v1_t>(1))?;
        call.on_whole(device, |d, gpu| {
            let mut answer = get(info)?;
            let (room, to) = (answer.processSamplesCount as usize, answer.procUtilArray);
            let how = *d.world.processes_utilization_info(gpu);
            match process_samples(d, gpu, answer.lastSeenTimeStamp, room, to.is_null(), how) {
                Ok(samples) => {
                    let entries: Vec<_> = samples.iter().map(|r| nvmlProcessUtilizationInfo_v1_t {
                        timeStamp: r.stamp_us, pid: r.pid, smUtil: r.util[0], memUtil: r.util[1], encUtil: r.util[2],
                        decUtil: r.util[3], jpgUtil: r.util[4], ofaUtil: r.util[5],
                    }).collect();
                    put_all(to, &raw mut answer.processSamplesCount, &entries, entries.len() as c_uint)?;
                    put(info, answer)
                }
                Err((code, n)) => {
                    answer.processSamplesCount = n;
                    put(info, answer).and(Err(code))
                }
            }
        })
    }
    fn nvmlDeviceGetSamples(
        call, device: nvmlDevice_t, kind: c_uint, last_seen: c_ulonglong, value_type: *mut c_uint, count: *mut c_uint,
        to: *mut nvmlSample_t
    ) {
        call.on_whole(device, |d, gpu| {
            let kind = RingKind::of(kind).ok_or(NOT_SUPPORTED)?;
            put(value_type, VALUE_UNSIGNED_INT)?;
            let samples = d.samples(gpu, kind, last_seen).map_err(failed)?;
            let ring = *d.world.ring(gpu) as c_uint;
            if to.is_null() {
                return put(count, ring);
            }
            if samples.is_empty() {
                put(count, 0)?;
                return Err(NOT_FOUND);
            }
            let samples: Vec<nvmlSample_t> = samples.into_iter().map(|(stamp, value)| {
                // SAFETY: a union of integers: all-zero is valid.
                let mut sample: nvmlSample_t = unsafe { std::mem::zeroed() };
                sample.timeStamp = stamp;
                sample.sampleValue.uiVal = value;
                sample
            }).collect();
            put_all(to, count, &samples, ring)
        })
    }
    fn nvmlDeviceGetPowerUsage(call, device: nvmlDevice_t, to: *mut c_uint) {
        call.on(device, |d, gpu| {
            let wanted = power_mw(d.busy(gpu).map_err(failed)?);
            put(to, at_most(wanted, d.held(gpu).watts.map(|watts| watts.saturating_mul(1000))))
        })
    }
    fn nvmlDeviceGetTotalEnergyConsumption(call, device: nvmlDevice_t, to: *mut c_ulonglong) {
        call.on(device, |d, gpu| {
            if !*d.world.energy(gpu) {
                return Err(NOT_SUPPORTED);
            }
            put(to, d.energy_mj(gpu).map_err(failed)?)
        })
    }
    fn nvmlDeviceGetTemperature(call, device: nvmlDevice_t, _sensor: c_uint, to: *mut c_uint) {
        call.on(device, |d, gpu| {
            let celsius = 35 + (30.0 * d.busy(gpu).map_err(failed)?) as c_uint;
            put(to, d.held(gpu).celsius.map_or(celsius, |least| celsius.max(least)))
        })
    }
    fn nvmlDeviceGetClockInfo(call, device: nvmlDevice_t, kind: c_uint, to: *mut c_uint) { clock(call, device, kind, to) }
    // Current, applications and default clocks are the same here.
    fn nvmlDeviceGetClock(call, device: nvmlDevice_t, kind: c_uint, _which: c_uint, to: *mut c_uint) {
        clock(call, device, kind, to)
    }
    fn nvmlDeviceGetCurrentClocksEventReasons(call, device: nvmlDevice_t, to: *mut c_ulonglong) { reasons(call, device, to) }
    fn nvmlDeviceGetCurrentClocksThrottleReasons(call, device: nvmlDevice_t, to: *mut c_ulonglong) { reasons(call, device, to) }
    fn nvmlDeviceGetSupportedClocksEventReasons(call, device: nvmlDevice_t, to: *mut c_ulonglong) {
        call.on(device, |_, _| put(to, ALL_REASONS))
    }
    fn nvmlDeviceGetSupportedClocksThrottleReasons(call, device: nvmlDevice_t, to: *mut c_ulonglong) {
        call.on(device, |_, _| put(to, ALL_REASONS))
    }
}
