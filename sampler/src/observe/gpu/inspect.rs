//! The GPU checks of `doctor`: one inspection of each GPU, without sampling.

use std::path::PathBuf;
use std::sync::mpsc::{channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use sampler_core::aggregate::QUERIED_RATIO;
use sampler_core::device::MigMode;
use sampler_core::pid_space::{Evidence, NamedPid};

use super::budget::{Budget, Cost, Limits, expected};
use super::calls::{Buffers, List};
use super::context::{devfs, limits};
use super::device_nodes::{DevicePaths, Nodes};
use super::diagnosis::Diagnosis;
use super::error::{GpuError, spawn};
use super::library::{Generation, Handle};
use super::library_search::{LibrarySearch, OpenedLibrary};
use super::nvml_caller::{NvmlCaller, error_name};
use super::process_calls::ProcessCalls;
use super::ring::{GPU_UTILIZATION, Tools};
use super::source::Source;
use super::{gpm, mig, pid_space};
use crate::config::Config;
use crate::health::Health;
use crate::health::condition::Condition;
use crate::health::nvml_calls::Call;
use crate::observe::clock::{boot_now, cpu_now};

/// Maximum duration of the inspection, because the driver may hang.
const PATIENCE: Duration = Duration::from_secs(10);
const SILENT: &str = "check dmesg for Xid lines; a reset may help. Sampling of the other GPUs is not affected";
const CLOSED: &str = "it is not sampled until it can be opened; check dmesg for Xid lines";
const MIXED: &str = "its time cannot be attributed to processes; MIG, WSL and some boards do not support this";
const SLOW: &str = "driver calls are slow: shares have a larger error, and coactivity is not known; raise gpu_wait_percent and \
                    gpu_budget_percent, or find what delays driver calls";
/// Maximum time that a GPU waits to be timed.
const TURN: Duration = Duration::from_secs(3);
/// Number of timed calls, of which the median is reported.
const TIMED: usize = 5;
/// Time between the two lists that may name a process of another PID space: a single sighting is not conclusive.
const LIST_AGAIN_AFTER: Duration = Duration::from_millis(1_100);

/// The driver and its GPUs, as text.
pub struct Inspected {
    pub version: String,
    /// The file that was loaded.
    pub library: PathBuf,
    /// Why GPUs are missing, or why there is none.
    pub unlisted: Option<Diagnosis>,
    /// (description, remedy if its time cannot be attributed to processes).
    pub gpus: Vec<(String, Option<&'static str>)>,
    /// Whether the driver's PIDs are this machine's, and a remedy if time cannot be attributed.
    pub pid_space: (String, Option<&'static str>),
}

/// What decides where samples are read.
struct SourceSettings {
    limits: Limits,
    /// Folders that may have the device nodes.
    devfs: Vec<PathBuf>,
}

/// Lets one GPU at a time measure its calls: with a global driver lock, concurrent calls would wait for each other.
#[derive(Default)]
struct Turns(Mutex<()>);

impl Turns {
    /// Waits for a turn, with a timeout in case a GPU hangs.
    fn take(&self) -> Option<std::sync::MutexGuard<'_, ()>> {
        let until = Instant::now() + TURN;
        loop {
            match self.0.try_lock() {
                Ok(turn) => return Some(turn),
                Err(TryLockError::Poisoned(turn)) => return Some(turn.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
                Err(TryLockError::WouldBlock) => return None,
            }
        }
    }
}

/// The evidence about the PID space from the processes of all GPUs.
struct PidSpaces {
    places: DevicePaths,
    nodes: Option<Nodes>,
    evidence: Mutex<Evidence>,
}

/// Inspects each GPU in a separate thread, because it may hang.
pub fn inspect(config: &Config) -> Result<Inspected, GpuError> {
    let until = Instant::now() + PATIENCE;
    let (done, opened) = sync_channel(1);
    let search = LibrarySearch::new(config);
    spawn("gpu-inspect", move || {
        let _waited_for = done.send(open_driver(search));
    })?;
    let OpenedDriver { generation, library, version, count, unlisted } =
        opened.recv_timeout(PATIENCE).unwrap_or(Err(GpuError::Hangs))?;
    let (done, inspected) = channel();
    let mut gpus: Vec<_> = (0..count).map(|index| (format!("GPU {index} does not respond"), Some(SILENT))).collect();
    let pid_spaces = Arc::new(PidSpaces::new(config));
    let source = Arc::new(SourceSettings { limits: limits(config), devfs: devfs(config) });
    let turns = Arc::new(Turns::default());
    for index in 0..count {
        let (generation, pid_spaces, done) = (Arc::clone(&generation), Arc::clone(&pid_spaces), done.clone());
        let (turns, source) = (Arc::clone(&turns), Arc::clone(&source));
        spawn("gpu-inspect", move || {
            let _waited_for = done.send((index, gpu(&generation, index, &source, &pid_spaces, &turns)));
        })?;
    }
    // The last thread to end closes the channel.
    drop(done);
    while let Ok((index, gpu)) = inspected.recv_timeout(until.saturating_duration_since(Instant::now())) {
        gpus[index as usize] = gpu;
    }
    let pid_space = pid_space::verdict_text(&pid_spaces.evidence(), boot_now());
    Ok(Inspected { version, library, gpus, unlisted, pid_space })
}

impl PidSpaces {
    fn new(config: &Config) -> Self {
        let places = DevicePaths::new(config);
        let nodes = places.nodes();
        let evidence = Evidence::new(nodes.is_some(), nodes.as_ref().is_some_and(|nodes| nodes.module));
        Self { places, nodes, evidence: Mutex::new(evidence) }
    }

    fn evidence(&self) -> std::sync::MutexGuard<'_, Evidence> {
        self.evidence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks the processes that the driver lists; a second time if none of them holds a device node.
    fn check(&self, handle: &Handle, driver: &mut NvmlCaller, buffers: &mut Buffers) {
        let Some(nodes) = &self.nodes else { return };
        for again in [false, true] {
            let at = boot_now();
            let mut pids = Vec::new();
            for (list, call) in [
                (List::Compute, Call::GetComputeRunningProcesses),
                (List::Graphics, Call::GetGraphicsRunningProcesses),
                (List::Mps, Call::GetMpsComputeRunningProcesses),
            ] {
                let listed = driver.call(call, || buffers.processes(handle, list)).unwrap_or_default();
                pids.extend(listed.into_iter().map(|(pid, _)| pid).filter(|pid| !matches!(pid, 0 | &u32::MAX)));
            }
            for pid in &pids {
                if let Some(sighting) = self.places.sighting(nodes, *pid) {
                    self.evidence().record(NamedPid { pid: *pid, listed: true, at }, boot_now(), sighting);
                }
            }
            if again || pids.is_empty() || self.evidence().holder().is_some() {
                return;
            }
            std::thread::sleep(LIST_AGAIN_AFTER);
        }
    }
}

struct OpenedDriver {
    generation: Arc<Generation>,
    library: PathBuf,
    version: String,
    count: u32,
    unlisted: Option<Diagnosis>,
}

fn open_driver(mut search: LibrarySearch) -> Result<OpenedDriver, GpuError> {
    let OpenedLibrary { nvml, path: library } = search.open()?;
    let generation = Arc::new(Generation::new(nvml));
    let version = generation.nvml().sys_driver_version().unwrap_or_else(|_| "unknown".into());
    let count = generation.nvml().device_count().map_err(|error| GpuError::List(search.files.explain(&error, &library)))?;
    let unlisted = search.files.unlisted(count);
    Ok(OpenedDriver { generation, library, version, count, unlisted })
}

fn gpu(
    generation: &Arc<Generation>,
    index: u32,
    source: &SourceSettings,
    pid_spaces: &PidSpaces,
    turns: &Turns,
) -> (String, Option<&'static str>) {
    let handle = match Handle::by_index(generation, index) {
        Ok(handle) => handle,
        Err(error) => return (format!("GPU {index} cannot be opened: {error}"), Some(CLOSED)),
    };
    let uuid = handle.device().uuid().unwrap_or_else(|_| "no UUID".into());
    let name = handle.device().name().unwrap_or_else(|_| "no name".into());
    let health = Health::default();
    let caller = Arc::new(health.driver.caller(Condition::GpuUnopened { index }, None));
    let mut driver = NvmlCaller::new(&uuid, &caller, &health);
    let title = format!("GPU {index} {name} {uuid}");
    let mut buffers = Buffers::default();
    pid_spaces.check(&handle, &mut driver, &mut buffers);
    if let Ok(MigMode::Enabled) = mig::mode(&handle, &mut driver) {
        let count = handle.device().mig_device_count().unwrap_or_default();
        let n = (0..count).filter(|index| handle.mig(*index).is_ok()).count();
        let gpm = if gpm::is_supported(&handle, &mut driver) {
            "utilization from GPM"
        } else {
            "no GPM: their utilization is unsupported"
        };
        return (format!("{title}: MIG mode, {n} MIG devices, {gpm}"), None);
    }
    let samples = driver.call(Call::GetSamples, || buffers.samples(&handle, GPU_UTILIZATION, 0));
    let mut process_samples =
        driver.call(Call::GetProcessesUtilizationInfo, || buffers.process_samples_of_all_engines(&handle, 0)).map(|_| ());
    let newer = process_samples.is_ok();
    if !newer {
        process_samples = driver.call(Call::GetProcessUtilization, || buffers.process_samples(&handle, 0)).map(|_| ());
    }
    let samples_text = match &samples {
        Ok(samples) => format!("{} samples in the sample buffer", samples.len()),
        Err(error) => format!("no samples ({})", error_name(error)),
    };
    let processes_text = match &process_samples {
        Ok(()) if newer => "process utilization of all engines".to_owned(),
        Ok(()) => "process utilization".to_owned(),
        Err(error) => format!("no process utilization ({})", error_name(error)),
    };
    let turn = turns.take();
    let is_sampled = samples.is_ok() && process_samples.is_ok();
    let own = if is_sampled { own_buffer(&handle, &mut driver, &mut buffers, source) } else { OwnBuffer::Unused(String::new()) };
    if let OwnBuffer::Used(cost) = own {
        return (format!("{title}: {samples_text}, {processes_text}, {cost}"), None);
    }
    let median = median(|| {
        let _result = if newer {
            buffers.process_samples_of_all_engines(&handle, u64::MAX / 2).map(|_| ())
        } else {
            buffers.process_samples(&handle, u64::MAX / 2).map(|_| ())
        };
        let _result = buffers.samples(&handle, GPU_UTILIZATION, u64::MAX / 2);
    });
    drop(turn);
    let us = median.wait.as_micros();
    if samples.is_err() || process_samples.is_err() {
        return (format!("{title}: {samples_text}, {processes_text}, {us} us per poll"), Some(MIXED));
    }
    let (queried_ratio, stderr_ratio) = expected(source.limits, median);
    let (own, is_open) = match own {
        OwnBuffer::Unused(reason) => (reason, false),
        OwnBuffer::Used(text) | OwnBuffer::Later(text) => (text, true),
    };
    let cost = format!(
        "{us} us per poll: the processes of {:.0} % of samples can be queried, the standard error of a share of one half over 10 s is \
         {:.1} points{own}",
        queried_ratio * 100.0,
        stderr_ratio * 100.0
    );
    let is_slow = queried_ratio < QUERIED_RATIO && !is_open;
    (format!("{title}: {samples_text}, {processes_text}, {cost}"), is_slow.then_some(SLOW))
}

/// Whether the driver's own sample buffer is read, as text.
enum OwnBuffer {
    Used(String),
    /// It can be read, but there is nothing to compare while the GPU is idle.
    Later(String),
    /// With the reason, if there is one.
    Unused(String),
}

fn own_buffer(handle: &Handle, driver: &mut NvmlCaller, buffers: &mut Buffers, source: &SourceSettings) -> OwnBuffer {
    let Ok(pci) = handle.device().pci_info() else { return OwnBuffer::Unused(String::new()) };
    let mut budget = Budget::new(source.limits, boot_now().0);
    let mut process_calls = ProcessCalls::default();
    let mut tools = Tools { handle, driver, buffers, budget: &mut budget, process_calls: &mut process_calls };
    let mut chosen = Source::default();
    let decision = chosen.decide(&mut tools, &source.devfs, &pci.bus_id);
    match (chosen, decision) {
        (Source::Buffer(mut buffer), _) => {
            let cost = median(|| {
                let _result = buffer.read();
            });
            let us = cost.wait.as_micros();
            OwnBuffer::Used(format!(
                "the driver's own buffer matches NVML: {us} us for a read, which has the process of every sample"
            ))
        }
        (Source::Undecided { .. }, _) => OwnBuffer::Later(
            "; through NVML only until the driver's own buffer has been compared with it, which requires a busy GPU".into(),
        ),
        (Source::Nvml(_), Some(Err(reason))) => OwnBuffer::Unused(format!("; the driver's own buffer is not used: {reason}")),
        (Source::Nvml(_), _) => OwnBuffer::Unused(String::new()),
    }
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
