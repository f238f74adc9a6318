//! What `doctor` says of each GPU: one look, no sampling.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{channel, sync_channel};
use std::time::{Duration, Instant};

use sampler_core::snapshot::MigMode;

use super::budget::{Cost, Limits, expected};
use super::calls::Buffers;
use super::driver::{Driver, cpu_now, error_name};
use super::library::{Generation, Handle};
use super::{GpuError, gpm, mig, open, spawn};
use crate::health::Health;
use crate::health::driver::Call;

/// The driver may hang.
const PATIENCE: Duration = Duration::from_secs(10);
const SILENT: &str = "look into dmesg for Xid lines; a reset may help. The other GPUs do not wait for it";
const CLOSED: &str = "it is not sampled until it can be opened; see dmesg for Xid lines";
const MIXED: &str = "its time cannot be told apart by process here; MIG, WSL and some boards do not offer it";
/// Calls timed, of which the median is told.
const TIMED: usize = 5;
/// nvmlSamplingType_t: GPU utilization.
const GPU_UTILIZATION: u32 = 1;

/// The driver and its GPUs, in words.
pub struct Inspected {
    pub version: String,
    /// (what it is, what to do where the agent cannot attribute its time to processes).
    pub gpus: Vec<(String, Option<&'static str>)>,
}

/// Each GPU in a thread of its own, because it may hang.
pub fn inspect(lib: Option<&Path>, limits: Limits) -> Result<Inspected, GpuError> {
    let until = Instant::now() + PATIENCE;
    let (done, opened) = sync_channel(1);
    let lib = lib.map(Path::to_owned);
    spawn("gpu-inspect", move || {
        let _waited_for = done.send(look(lib.as_deref()));
    })?;
    let (generation, version, count) = opened.recv_timeout(PATIENCE).unwrap_or(Err(GpuError::Hangs))?;
    let (done, inspected) = channel();
    let mut gpus: Vec<_> = (0..count).map(|index| (format!("GPU {index} does not answer"), Some(SILENT))).collect();
    for index in 0..count {
        let (generation, done) = (Arc::clone(&generation), done.clone());
        spawn("gpu-inspect", move || {
            let _waited_for = done.send((index, gpu(&generation, index, limits)));
        })?;
    }
    // The last thread that ends closes it.
    drop(done);
    while let Ok((index, gpu)) = inspected.recv_timeout(until.saturating_duration_since(Instant::now())) {
        gpus[index as usize] = gpu;
    }
    Ok(Inspected { version, gpus })
}

fn look(lib: Option<&Path>) -> Result<(Arc<Generation>, String, u32), GpuError> {
    let generation = Arc::new(Generation::new(open(lib)?));
    let version = generation.nvml().sys_driver_version().unwrap_or_else(|_| "unknown".into());
    let count = generation.nvml().device_count().map_err(GpuError::List)?;
    Ok((generation, version, count))
}

fn gpu(generation: &Arc<Generation>, index: u32, limits: Limits) -> (String, Option<&'static str>) {
    let handle = match Handle::by_index(generation, index) {
        Ok(handle) => handle,
        Err(error) => return (format!("GPU {index} cannot be opened: {error}"), Some(CLOSED)),
    };
    let uuid = handle.device().uuid().unwrap_or_else(|_| "no UUID".into());
    let name = handle.device().name().unwrap_or_else(|_| "no name".into());
    let health = Health::default();
    let caller = Arc::new(health.driver.caller(String::new(), None));
    let mut driver = Driver::new(&uuid, &caller, &health);
    let what = format!("GPU {index} {name} {uuid}");
    if let Ok(MigMode::Enabled) = mig::mode(&handle, &mut driver) {
        let places = handle.device().mig_device_count().unwrap_or_default();
        let n = (0..places).filter(|place| handle.mig(*place).is_ok()).count();
        let gpm = if gpm::is_supported(&handle, &mut driver) { "their time by GPM" } else { "no GPM: their time is unsupported" };
        return (format!("{what}: MIG mode, {n} MIG devices, {gpm}"), None);
    }
    let mut buffers = Buffers::default();
    let samples = driver.call(Call::GetSamples, || buffers.samples(&handle, GPU_UTILIZATION, 0));
    let mut rows = driver.call(Call::GetProcessesUtilizationInfo, || buffers.rows_of_all_engines(&handle, 0)).map(|_| ());
    let newer = rows.is_ok();
    if !newer {
        rows = driver.call(Call::GetProcessUtilization, || buffers.rows(&handle, 0)).map(|_| ());
    }
    let of_samples = match &samples {
        Ok(samples) => format!("{} samples in its ring", samples.len()),
        Err(error) => format!("no samples ({})", error_name(error)),
    };
    let of_rows = match &rows {
        Ok(()) if newer => "process utilization of all engines".to_owned(),
        Ok(()) => "process utilization".to_owned(),
        Err(error) => format!("no process utilization ({})", error_name(error)),
    };
    let median = median(|| {
        let _answer = buffers.rows(&handle, u64::MAX / 2);
        let _answer = buffers.samples(&handle, GPU_UTILIZATION, u64::MAX / 2);
    });
    let (queried_ratio, stderr_ratio) = expected(limits, median);
    let took = format!(
        "{} us a poll: the process of {:.0} % of samples can be queried, a share of one half over 10 s is known to {:.1} points",
        median.wait.as_micros(),
        queried_ratio * 100.0,
        stderr_ratio * 100.0
    );
    (format!("{what}: {of_samples}, {of_rows}, {took}"), (samples.is_err() || rows.is_err()).then_some(MIXED))
}

fn median(mut f: impl FnMut()) -> Cost {
    let mut took: Vec<Cost> = (0..TIMED)
        .map(|_| {
            let (begun, cpu) = (Instant::now(), cpu_now());
            f();
            Cost { cpu: cpu_now().saturating_sub(cpu), wait: begun.elapsed() }
        })
        .collect();
    took.sort_unstable_by_key(|cost| cost.wait);
    took[TIMED / 2]
}
