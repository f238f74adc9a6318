//! Readings of a device other than samples: memory, power, temperature, clocks, and the processes that use its memory.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use nvml_wrapper::error::NvmlError;
use sampler_core::device::{DeviceReadings, Engine};
use sampler_core::observation::{EngineSample, ProcessKind, RunningProcess};
use sampler_core::units::GpuNs;

use super::calls::{Buffers, List};
use super::library::Handle;
use super::nvml_caller::NvmlCaller;
use crate::health::nvml_calls::Call;

/// The graphics and MPS lists change less often, and each query holds a driver lock as long as the query of the compute list.
const OTHER_LISTS_EVERY: Duration = Duration::from_secs(5);
/// The lists are read early if a sample names a process that is not in them, but at most this often and within the budget, because the
/// process may never appear in them.
pub const EARLY_LISTS_EVERY: Duration = Duration::from_millis(500);
/// If an engine has no new sample for this long, its whole ring is read, in case the device's clock went back.
const SILENT: Duration = Duration::from_secs(8);
/// `comm` of the processes of the multi-process service, which the kernel truncates to 15 bytes.
const MPS_COMM: &str = "nvidia-cuda-mps";

/// nvmlSamplingType_t of the engines with separate sample rings.
const ENGINES: [(Engine, u32, Call); 5] = [
    (Engine::Memory, 2, Call::GetMemorySamples),
    (Engine::Encoder, 3, Call::GetEncoderSamples),
    (Engine::Decoder, 4, Call::GetDecoderSamples),
    (Engine::Jpeg, 8, Call::GetJpegSamples),
    (Engine::Ofa, 9, Call::GetOfaSamples),
];

/// Only the memory.
pub fn memory(handle: &Handle, driver: &mut NvmlCaller) -> DeviceReadings {
    let memory = match driver.call(Call::GetMemoryInfoV2, || handle.memory_v2()) {
        Err(NvmlError::NotSupported | NvmlError::FailedToLoadSymbol(_)) => {
            driver.call(Call::GetMemoryInfo, || handle.memory_v1())
        }
        known => known,
    };
    let (memory_used_bytes, memory_total_bytes) = memory.ok().unzip();
    DeviceReadings { memory_used_bytes, memory_total_bytes, ..DeviceReadings::default() }
}

pub fn readings(handle: &Handle, driver: &mut NvmlCaller) -> DeviceReadings {
    let device = handle.device();
    let memory = memory(handle, driver);
    let power = driver.call(Call::GetPowerUsage, || device.power_usage());
    let energy = driver.call(Call::GetTotalEnergyConsumption, || device.total_energy_consumption());
    let temperature = driver.call(Call::GetTemperature, || device.temperature(TemperatureSensor::Gpu));
    let clock = driver.call(Call::GetClockInfo, || device.clock_info(Clock::SM));
    let reasons = driver.call(Call::GetClocksEventReasons, || handle.clocks_event_reasons());
    DeviceReadings {
        power_watts: power.ok().map(|mw| f64::from(mw) / 1e3),
        energy_joules: energy.ok().map(|mj| mj as f64 / 1e3),
        temperature_celsius: temperature.ok().map(f64::from),
        sm_clock_hertz: clock.ok().map(|mhz| f64::from(mhz) * 1e6),
        throttle_reasons: reasons.ok(),
        ..memory
    }
}

/// The processes of one device.
pub struct Processes {
    procfs: PathBuf,
    /// The processes in the last lists.
    listed: HashSet<u32>,
    /// Of the compute processes in the last lists, whether each is the server of the multi-process service: a process that is listed runs
    /// its last program, because the driver lists it once it has opened the GPU.
    mps_servers: HashMap<u32, bool>,
    last: Option<Instant>,
    others: HashMap<u32, RunningProcess>,
    others_read: Option<Instant>,
}

impl Processes {
    pub fn new(procfs: PathBuf) -> Self {
        let (listed, mps_servers, others) = (HashSet::new(), HashMap::new(), HashMap::new());
        Self { procfs, listed, mps_servers, last: None, others, others_read: None }
    }

    /// Whether a sample names a process that was not in the last lists, so that these are outdated.
    pub fn has_unlisted(&self, mut pids: impl Iterator<Item = u32>, at_most_every: Duration) -> bool {
        self.last.is_none_or(|at| at.elapsed() >= at_most_every) && pids.any(|pid| !self.listed.contains(&pid))
    }

    /// Makes the next [`Processes::list`] read all lists, however recently they were read.
    pub fn want_all(&mut self) {
        self.others_read = None;
    }

    /// `None` if the driver did not return the compute list.
    pub fn list(&mut self, handle: &Handle, driver: &mut NvmlCaller, buffers: &mut Buffers) -> Option<Vec<RunningProcess>> {
        if self.others_read.is_none_or(|at| at.elapsed() >= OTHER_LISTS_EVERY) {
            self.others_read = Some(Instant::now());
            self.others.clear();
            let lists = [
                (List::Graphics, Call::GetGraphicsRunningProcesses, ProcessKind::Graphics),
                (List::Mps, Call::GetMpsComputeRunningProcesses, ProcessKind::Mps),
            ];
            for (list, call, kind) in lists {
                for (pid, memory_bytes) in driver.call(call, || buffers.processes(handle, list)).unwrap_or_default() {
                    merge(&mut self.others, RunningProcess { pid, memory_bytes, kind });
                }
            }
        }
        let compute = driver.call(Call::GetComputeRunningProcesses, || buffers.processes(handle, List::Compute)).ok()?;
        let mut all = self.others.clone();
        let known = std::mem::take(&mut self.mps_servers);
        for (pid, memory_bytes) in compute {
            let is_server = known.get(&pid).copied().or_else(|| self.is_mps_server(pid));
            self.mps_servers.extend(is_server.map(|is_server| (pid, is_server)));
            let kind = if is_server == Some(true) { ProcessKind::MpsServer } else { ProcessKind::Compute };
            merge(&mut all, RunningProcess { pid, memory_bytes, kind });
        }
        self.last = Some(Instant::now());
        self.listed = all.keys().copied().collect();
        Some(all.into_values().collect())
    }

    /// The driver lists the service among the compute processes without marking it. `None` if the process has ended or is not of this
    /// PID namespace.
    fn is_mps_server(&self, pid: u32) -> Option<bool> {
        let comm = std::fs::read_to_string(self.procfs.join(pid.to_string()).join("comm")).ok()?;
        Some(comm.trim_end() == MPS_COMM)
    }
}

/// Keeps one entry per process: lists overlap, and each states the whole memory of the process.
fn merge(all: &mut HashMap<u32, RunningProcess>, other: RunningProcess) {
    let rank = |kind| match kind {
        ProcessKind::Graphics => 0,
        ProcessKind::Compute => 1,
        ProcessKind::Mps => 2,
        ProcessKind::MpsServer => 3,
    };
    let known = all.entry(other.pid).or_insert(other);
    known.memory_bytes = known.memory_bytes.max(other.memory_bytes);
    if rank(other.kind) > rank(known.kind) {
        known.kind = other.kind;
    }
}

/// Sample rings of the engines other than compute. The driver keeps several seconds of samples, so they are read rarely.
#[derive(Default)]
pub struct Engines {
    /// Newest timestamp of each ring, in microseconds; `None` before the first read, which only sets it.
    newest: [Option<u64>; ENGINES.len()],
    /// When a ring last had a new sample.
    updated: [Option<Instant>; ENGINES.len()],
}

impl Engines {
    pub fn read(&mut self, handle: &Handle, driver: &mut NvmlCaller, buffers: &mut Buffers) -> Vec<EngineSample> {
        let mut fresh = Vec::new();
        for (n, (engine, kind, call)) in ENGINES.iter().enumerate() {
            let silent = self.updated[n].is_some_and(|at| at.elapsed() >= SILENT);
            let after = if silent { 0 } else { self.newest[n].unwrap_or(0) };
            let Ok(samples) = driver.call(*call, || buffers.samples(handle, *kind, after)) else { continue };
            let Some(newest) = samples.iter().map(|s| s.at_us).max() else {
                self.newest[n] = self.newest[n].or(Some(0));
                continue;
            };
            if self.newest[n] == Some(newest) {
                continue;
            }
            self.updated[n] = Some(Instant::now());
            let Some(known) = self.newest[n].replace(newest).filter(|known| newest > *known) else {
                // The first read, or the clock was set back: earlier samples of the ring are not reported.
                continue;
            };
            let new = samples.iter().filter(|s| s.at_us > known && s.percent <= 100);
            fresh.extend(new.map(|s| EngineSample {
                engine: *engine,
                at: GpuNs(s.at_us.saturating_mul(1000)),
                busy_percent: s.percent,
            }));
        }
        fresh
    }

    /// The device's clock was set: discards the known timestamps.
    pub fn stepped(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_in_several_lists_is_merged_into_one_entry() {
        let mut all = HashMap::new();
        for (kind, memory_bytes) in [(ProcessKind::Graphics, Some(5)), (ProcessKind::Mps, None), (ProcessKind::Compute, Some(7))]
        {
            merge(&mut all, RunningProcess { pid: 1, memory_bytes, kind });
        }
        assert_eq!(
            all.into_values().collect::<Vec<_>>(),
            [RunningProcess { pid: 1, memory_bytes: Some(7), kind: ProcessKind::Mps }]
        );
    }
}
