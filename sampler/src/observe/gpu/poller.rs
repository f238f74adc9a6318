//! One GPU's poller. Polls faster than the driver samples: each reply then holds at most one new sample a process, so the raw
//! (time, pid, utilization) tuples come out exactly; polled slower, the driver averages them away.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nvml_wrapper::enum_wrappers::device::{Clock, Sampling, TemperatureSensor};
use nvml_wrapper::enums::device::{SampleValue, UsedGpuMemory};
use nvml_wrapper::error::{NvmlError, nvml_try};
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use nvml_wrapper::{Device, Nvml};
use nvml_wrapper_sys::bindings::nvmlProcessUtilizationSample_t;
use sampler_core::observation::{DeviceTick, GpuBatch, Observation, ProcessRow, RunningProcess};
use sampler_core::snapshot::{DeviceReadings, GpuInfo};
use sampler_core::units::GpuNs;

use crate::health::Health;
use crate::inbox::Outbox;
use crate::observe::clock::{boot_now, wall_now};

/// Below half of the finest grid seen on real drivers (~167 ms) and of a 100 ms one.
const POLL_EVERY: Duration = Duration::from_millis(50);
/// The process list holds a global driver lock for milliseconds: rarely.
const LIST_EVERY: Duration = Duration::from_secs(2);
/// The size query answers a capacity (100 or 4096), not a count, and rows grow between calls: ask once with room for all.
const ROWS: usize = 4096;

pub struct Poller {
    nvml: &'static Nvml,
    device: Device<'static>,
    info: Arc<GpuInfo>,
    to: Outbox,
    health: Arc<Health>,
    stop: Arc<AtomicBool>,
    rows: Vec<nvmlProcessUtilizationSample_t>,
    /// Largest timestamp returned, in the GPU's microseconds; never the wall clock's.
    last_tick_us: u64,
    last_row_us: u64,
    supported: bool,
    listed: Option<Instant>,
}

impl Poller {
    pub fn new(
        nvml: &'static Nvml,
        device: Device<'static>,
        info: Arc<GpuInfo>,
        to: Outbox,
        health: Arc<Health>,
        stop: Arc<AtomicBool>,
    ) -> Self {
        let empty = nvmlProcessUtilizationSample_t { pid: 0, timeStamp: 0, smUtil: 0, memUtil: 0, encUtil: 0, decUtil: 0 };
        Self {
            nvml,
            device,
            info,
            to,
            health,
            stop,
            rows: vec![empty; ROWS],
            last_tick_us: 0,
            last_row_us: 0,
            supported: true,
            listed: None,
        }
    }

    pub fn run(mut self) {
        while !self.stop.load(Ordering::Relaxed) {
            let begun = Instant::now();
            let batch = self.poll();
            if self.to.observe(Observation::Gpu(batch)).is_err() {
                return;
            }
            std::thread::sleep(POLL_EVERY.saturating_sub(begun.elapsed()));
        }
    }

    fn poll(&mut self) -> GpuBatch {
        let began = boot_now();
        // Rows first: a tick that appears between the two calls is then only late, not without its pid.
        let mut answered = true;
        let rows = self.call("GetProcessUtilization", Self::process_rows).unwrap_or_default();
        let ticks = match self.call("GetSamples", Self::device_ticks) {
            Ok(ticks) => ticks,
            Err(NvmlError::NotSupported | NvmlError::FailedToLoadSymbol(_)) => {
                self.supported = false;
                Vec::new()
            }
            Err(_) => {
                answered = false;
                Vec::new()
            }
        };
        let mut batch = GpuBatch {
            gpu: self.info.index as usize,
            began,
            ended: boot_now(),
            wall: wall_now(),
            ticks,
            rows,
            processes: None,
            readings: None,
            supported: self.supported,
            answered,
        };
        if self.listed.is_none_or(|at| at.elapsed() >= LIST_EVERY) {
            self.listed = Some(Instant::now());
            batch.processes = self.call("GetComputeRunningProcesses", |p| p.device.running_compute_processes()).ok().map(running);
            batch.readings = Some(self.readings());
        }
        batch
    }

    /// Times a driver call, counts its errors. NOT_FOUND is "nothing new", not an error.
    fn call<T: Default>(
        &mut self,
        name: &'static str,
        f: impl FnOnce(&mut Self) -> Result<T, NvmlError>,
    ) -> Result<T, NvmlError> {
        let begun = Instant::now();
        let result = f(self);
        self.health.record_call(&self.info.uuid.0, name, begun.elapsed());
        match result {
            Err(NvmlError::NotFound) => Ok(T::default()),
            Err(error) => {
                self.health.nvml_error(&self.info.uuid.0, name, error_name(&error));
                Err(error)
            }
            ok => ok,
        }
    }

    fn device_ticks(&mut self) -> Result<Vec<DeviceTick>, NvmlError> {
        let samples = self.device.samples(Sampling::GpuUtilization, self.last_tick_us)?;
        let mut ticks = Vec::with_capacity(samples.len());
        for sample in samples.iter().filter(|s| s.timestamp > self.last_tick_us) {
            let percent = match sample.value {
                SampleValue::U32(v) => v,
                SampleValue::U64(v) => u32::try_from(v).unwrap_or(u32::MAX),
                SampleValue::F64(v) => v as u32,
                _ => continue,
            };
            // Over 100 breaks the model: seen in the wild, never true.
            if percent <= 100 {
                ticks.push(DeviceTick { at: GpuNs(sample.timestamp.saturating_mul(1000)), busy_percent: percent });
            }
        }
        self.last_tick_us = samples.iter().map(|s| s.timestamp).fold(self.last_tick_us, u64::max);
        Ok(ticks)
    }

    fn process_rows(&mut self) -> Result<Vec<ProcessRow>, NvmlError> {
        let symbol = match self.nvml.lib().nvmlDeviceGetProcessUtilization.as_ref() {
            Ok(symbol) => symbol,
            Err(error) => return Err(NvmlError::FailedToLoadSymbol(error.to_string())),
        };
        let mut count = ROWS as u32;
        // SAFETY: the handle belongs to a live library (`&'static Nvml`), the buffer holds `count` rows, and the driver writes at
        // most `count` of them.
        nvml_try(unsafe { symbol(self.device.handle(), self.rows.as_mut_ptr(), &raw mut count, self.last_row_us) })?;
        let fresh: Vec<ProcessRow> = self
            .rows
            .iter()
            .take(count as usize)
            .filter(|row| row.timeStamp > self.last_row_us && row.smUtil <= 100)
            .map(|row| ProcessRow { at: GpuNs(row.timeStamp.saturating_mul(1000)), pid: row.pid, sm_percent: row.smUtil })
            .collect();
        self.last_row_us = fresh.iter().map(|row| row.at.0 / 1000).fold(self.last_row_us, u64::max);
        Ok(fresh)
    }

    fn readings(&self) -> DeviceReadings {
        let memory = self.device.memory_info().ok();
        DeviceReadings {
            memory_used_bytes: memory.as_ref().map(|m| m.used),
            memory_total_bytes: memory.as_ref().map(|m| m.total),
            power_watts: self.device.power_usage().ok().map(|mw| f64::from(mw) / 1e3),
            energy_joules: self.device.total_energy_consumption().ok().map(|mj| mj as f64 / 1e3),
            temperature_celsius: self.device.temperature(TemperatureSensor::Gpu).ok().map(f64::from),
            sm_clock_hertz: self.device.clock_info(Clock::SM).ok().map(|mhz| f64::from(mhz) * 1e6),
        }
    }
}

fn running(list: Vec<ProcessInfo>) -> Vec<RunningProcess> {
    let memory = |used: UsedGpuMemory| match used {
        UsedGpuMemory::Used(bytes) if bytes != u64::MAX => Some(bytes),
        _ => None,
    };
    list.into_iter().map(|p| RunningProcess { pid: p.pid, memory_bytes: memory(p.used_gpu_memory) }).collect()
}

/// A bounded label value: the variant's name.
fn error_name(error: &NvmlError) -> String {
    let debug = format!("{error:?}");
    debug.split(['(', ' ', '{']).next().unwrap_or("Unknown").to_owned()
}
