//! Records the raw responses of the driver: `gpu-recorder [--nvml-lib PATH] [--for SECONDS] [--slices DIR] [--unprivileged]
//! -o FILE`, or `-o -`.
//!
//! It only reads; it changes no setting of a card. One thread per GPU polls every 20 ms, so that a response has at most one new sample.
//! Between two polls it makes and times a few of the agent's other calls. DIR contains the time slices that CUDA loads on GPU 0 recorded.

#[path = "recorder/costs.rs"]
mod costs;
#[path = "recorder/layouts.rs"]
mod layouts;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use gpu_sampler_tests::recording::stride::Stride;
use gpu_sampler_tests::recording::{
    Durations, FORMAT, Fold, Poll, Raw, RecordedGpu, RecordedProcess, RecordedSample, Recording, findings, truth,
};
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::{NvmlError, nvml_try};
use nvml_wrapper::{Device, Nvml};
use nvml_wrapper_sys::bindings::{nvmlProcessUtilizationSample_t, nvmlSample_t};

use self::costs::{Costs, Target};

/// Far below every known sampling period.
const EVERY: Duration = Duration::from_millis(20);
const LIST_EVERY: Duration = Duration::from_secs(2);
const FOLD_EVERY: Duration = Duration::from_secs(1);
const SIZE_EVERY: Duration = Duration::from_secs(5);
/// From time to time this many samples are folded into one response, to see how the driver folds them.
const FOLDED: usize = 9;
const ROOM: usize = 4096;
/// Longer than every known sampling period.
const UNKNOWN_PERIOD: Duration = Duration::from_millis(500);
/// NVML_GPU_UTILIZATION_SAMPLES.
const GPU_UTILIZATION: u32 = 1;
const GET_SAMPLES: &str = "GetSamples";
const GET_PROCESSES: &str = "GetProcessUtilization";
const GET_LIST: &str = "GetComputeRunningProcesses";

const NO_SAMPLE: nvmlSample_t = nvmlSample_t { timeStamp: 0, sampleValue: nvml_wrapper_sys::bindings::nvmlValue_t { ullVal: 0 } };
const NO_PROCESS: nvmlProcessUtilizationSample_t =
    nvmlProcessUtilizationSample_t { pid: 0, timeStamp: 0, smUtil: 0, memUtil: 0, encUtil: 0, decUtil: 0 };

fn boot_us() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid timespec, and a clock that every supported kernel has.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut t) };
    t.tv_sec as u64 * 1_000_000 + t.tv_nsec as u64 / 1_000
}

/// The wall clock less the boot clock. The boot clock is read before and after, for the smallest uncertainty.
fn wall_less_boot_us() -> u64 {
    let before = boot_us();
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
    wall.saturating_sub(u64::midpoint(before, boot_us()))
}

/// The version field of an NVML struct: its size and version.
fn versioned<T>(version: u32) -> u32 {
    size_of::<T>() as u32 | version << 24
}

fn error_name(error: &NvmlError) -> String {
    format!("{error:?}").split(['(', ' ', '{']).next().unwrap_or_default().to_owned()
}

fn is_alive(pid: u32) -> bool {
    std::path::Path::new("/proc").join(pid.to_string()).exists()
}

/// The facts that show whether the GPU is busy.
#[derive(Default)]
struct RecorderState {
    /// When the newest sample was read, and whether all samples of that read show a busy GPU; `None` if they differ.
    sampled: Option<(Instant, Option<bool>)>,
    /// Compute processes at the last call that listed them.
    listed: Option<usize>,
}

impl RecorderState {
    fn sample(&mut self, samples: &[RecordedSample]) {
        let Some(newest) = samples.last() else { return };
        let busy = newest.1 > 0;
        let agreed = samples.iter().all(|sample| (sample.1 > 0) == busy);
        self.sampled = Some((Instant::now(), agreed.then_some(busy)));
    }

    /// A dry sample buffer gives no information; then a GPU without processes is idle, and the state of any other is unknown.
    fn loaded(&self) -> Option<bool> {
        let dry = Duration::from_micros(findings::DRY_US);
        match self.sampled {
            Some((at, loaded)) if at.elapsed() < dry => loaded,
            _ => (self.listed == Some(0)).then_some(false),
        }
    }
}

/// The median distance of these time stamps.
fn period(stamps: &[u64]) -> Duration {
    let mut gaps: Vec<u64> = stamps.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).collect();
    gaps.sort_unstable();
    gaps.get(gaps.len() / 2).map_or(UNKNOWN_PERIOD, |us| Duration::from_micros((*us).min(findings::DRY_US)))
}

struct Recorder<'a> {
    nvml: &'a Nvml,
    device: Device<'a>,
    samples: Vec<nvmlSample_t>,
    process_samples: Vec<nvmlProcessUtilizationSample_t>,
    took: BTreeMap<String, Vec<u64>>,
    errors: BTreeMap<String, BTreeMap<String, u64>>,
    sizes: BTreeMap<String, Vec<String>>,
    strides: BTreeMap<String, Stride>,
    ended: (u64, u64),
    again: [(u64, u64); 2],
}

impl<'a> Recorder<'a> {
    fn new(nvml: &'a Nvml, index: u32) -> Result<Self> {
        let device = nvml.device_by_index(index).with_context(|| format!("GPU {index}"))?;
        let (samples, process_samples) = (vec![NO_SAMPLE; ROOM], vec![NO_PROCESS; ROOM]);
        let (took, errors, sizes, strides) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let (ended, again) = ((0, 0), [(0, 0); 2]);
        Ok(Self { nvml, device, samples, process_samples, took, errors, sizes, strides, ended, again })
    }

    /// Times a call and counts its error; NOT_FOUND is an empty response.
    fn call<T: Default>(&mut self, name: &str, f: impl FnOnce(&mut Self) -> Result<T, NvmlError>) -> T {
        let begun = Instant::now();
        let result = f(self);
        self.took.entry(name.to_owned()).or_default().push(begun.elapsed().as_micros() as u64);
        match result {
            Ok(value) => value,
            Err(NvmlError::NotFound) => T::default(),
            Err(error) => {
                *self.errors.entry(name.to_owned()).or_default().entry(error_name(&error)).or_default() += 1;
                T::default()
            }
        }
    }

    fn samples(&mut self, after: u64) -> Result<Vec<RecordedSample>, NvmlError> {
        let symbol = self.nvml.lib().nvmlDeviceGetSamples.as_ref();
        let symbol = symbol.map_err(|error| NvmlError::FailedToLoadSymbol(error.to_string()))?;
        let (mut kind, mut count) = (0, ROOM as u32);
        let to = self.samples.as_mut_ptr();
        // SAFETY: a live library's handle, and room for `count` samples, which is as many as the driver writes at most.
        nvml_try(unsafe { symbol(self.device.handle(), GPU_UTILIZATION, after, &raw mut kind, &raw mut count, to) })?;
        let value = |s: &nvmlSample_t| match kind {
            // SAFETY: the driver reported that the values are doubles.
            0 => unsafe { s.sampleValue.dVal as u32 },
            // SAFETY: every other kind is an integer; on little-endian machines its low half is its value.
            _ => unsafe { s.sampleValue.uiVal },
        };
        Ok(self.samples.iter().take(count as usize).map(|s| RecordedSample(s.timeStamp, value(s))).collect())
    }

    fn process_samples(&mut self, after: u64) -> Result<Vec<RecordedProcess>, NvmlError> {
        let symbol = self.nvml.lib().nvmlDeviceGetProcessUtilization.as_ref();
        let symbol = symbol.map_err(|error| NvmlError::FailedToLoadSymbol(error.to_string()))?;
        let mut count = ROOM as u32;
        // SAFETY: a live library's handle, and room for `count` entries, which is as many as the driver writes at most.
        nvml_try(unsafe { symbol(self.device.handle(), self.process_samples.as_mut_ptr(), &raw mut count, after) })?;
        let process =
            |r: &nvmlProcessUtilizationSample_t| RecordedProcess(r.timeStamp, r.pid, [r.smUtil, r.memUtil, r.encUtil, r.decUtil]);
        Ok(self.process_samples.iter().take(count as usize).map(process).collect())
    }

    /// Records the driver's responses to calls without a buffer.
    fn record_sizes(&mut self) {
        let lib = self.nvml.lib();
        let (mut kind, mut samples, mut processes) = (0, 0, 0);
        // SAFETY: the handle does not leave the life of the library.
        let handle = unsafe { self.device.handle() };
        let result = |code: u32, count: u32| match nvml_try(code) {
            Ok(()) => format!("success, {count}"),
            Err(error) => format!("{error:?}, {count}"),
        };
        let none = std::ptr::null_mut();
        let sample_size = lib.nvmlDeviceGetSamples.as_ref().ok().map(|symbol| {
            // SAFETY: without a buffer the driver writes the kind and the count only.
            let code = unsafe { symbol(handle, GPU_UTILIZATION, 0, &raw mut kind, &raw mut samples, none) };
            result(code, samples)
        });
        let process_size = lib.nvmlDeviceGetProcessUtilization.as_ref().ok().map(|symbol| {
            // SAFETY: without a buffer and with a count of 0, the driver writes the count only.
            let code = unsafe { symbol(handle, std::ptr::null_mut(), &raw mut processes, 0) };
            result(code, processes)
        });
        for (name, response) in [(GET_SAMPLES, sample_size), (GET_PROCESSES, process_size)] {
            let known = self.sizes.entry(name.to_owned()).or_default();
            // Each response once, and at most eight.
            if let Some(response) = response.filter(|response| !known.contains(response) && known.len() < 8) {
                known.push(response);
            }
        }
    }

    /// Records whether `lastSeen` excludes the stamp itself, for a sample and a process sample that the buffer still has.
    fn check_last_seen(&mut self, stamp: u64, process_stamp: u64) {
        let samples = self.samples(stamp).unwrap_or_default();
        let processes = self.process_samples(process_stamp).unwrap_or_default();
        for (sum, there, again) in [
            (0, stamp, samples.iter().any(|sample| sample.0 == stamp)),
            (1, process_stamp, processes.iter().any(|process| process.0 == process_stamp)),
        ] {
            if there > 0 {
                self.again[sum].0 += 1;
                self.again[sum].1 += u64::from(again);
            }
        }
    }

    /// Records what is needed only from time to time, between polls.
    fn record_details(&mut self, stamp: u64, process_stamp: u64) {
        self.record_sizes();
        self.check_last_seen(stamp, process_stamp);
        // SAFETY: the handle does not leave the life of the library.
        layouts::measure_all(self.nvml, unsafe { self.device.handle() }, &mut self.strides);
    }

    fn record(mut self, index: u32, lasts: Duration, slices: Option<&Path>) -> Result<RecordedGpu> {
        let (begun, mut listed, mut folded, mut sized) = (Instant::now(), None, Instant::now(), None);
        let (mut list_most, mut unknown) = (0, 0);
        let clocks = wall_less_boot_us();
        let mut all = Raw { from_boot_us: boot_us(), ..Raw::default() };
        let (mut newest_sample, mut newest_process) = (0, 0);
        let mut recent: Vec<u64> = Vec::new();
        let mut ring = None;
        let (mut costs, mut state) = (Costs::new(), RecorderState::default());
        while begun.elapsed() < lasts {
            let began = boot_us();
            let turn = Instant::now();
            let samples = self.call(GET_SAMPLES, |r| r.samples(newest_sample));
            let processes = self.call(GET_PROCESSES, |r| r.process_samples(newest_process));
            let took = boot_us() - began;
            if ring.is_none() {
                let (first, last) = (samples.iter().map(|s| s.0).min(), samples.iter().map(|s| s.0).max());
                ring = Some((samples.len(), last.zip(first).map_or(0, |(last, first)| last - first)));
            }
            // An invalid stamp must not hide the samples of the rest of the recording.
            let sane = |r: &&RecordedProcess| r.2.iter().all(|p| *p <= 100);
            newest_sample = samples.iter().map(|s| s.0).fold(newest_sample, u64::max);
            newest_process = processes.iter().filter(sane).map(|r| r.0).fold(newest_process, u64::max);
            let fresh = processes.iter().filter(|process| process.1 != 0 && process.1 != u32::MAX);
            for process in fresh.filter(|_| !all.polls.is_empty()) {
                self.ended.0 += 1;
                self.ended.1 += u64::from(!is_alive(process.1));
            }
            state.sample(&samples);
            recent.extend(samples.iter().map(|s| s.0));
            recent.drain(..recent.len().saturating_sub(FOLDED + 1));
            all.polls.push(Poll(began - all.from_boot_us, took, samples, processes));
            if folded.elapsed() >= FOLD_EVERY && recent.len() > FOLDED {
                folded = Instant::now();
                let response = self.call("GetProcessUtilization (folded)", |r| r.process_samples(recent[0]));
                all.folds.push(Fold(recent[0], newest_sample, response));
            }
            if listed.is_none_or(|at: Instant| at.elapsed() >= LIST_EVERY) {
                listed = Some(Instant::now());
                let list = self.call(GET_LIST, |r| r.device.running_compute_processes().map(Some));
                state.listed = list.as_ref().map(Vec::len);
                let list = list.unwrap_or_default();
                list_most = list_most.max(list.len());
                unknown += list.iter().filter(|p| matches!(p.used_gpu_memory, UsedGpuMemory::Unavailable)).count() as u64;
            }
            if sized.is_none_or(|at: Instant| at.elapsed() >= SIZE_EVERY) {
                sized = Some(Instant::now());
                self.record_details(newest_sample, newest_process);
            }
            // SAFETY: the handle does not leave the life of the library.
            let target = Target { nvml: self.nvml, device: unsafe { self.device.handle() }, newest: newest_sample };
            costs.set_loaded(state.loaded(), period(&recent));
            costs.measure(&target, turn + costs::share(EVERY));
            std::thread::sleep(EVERY.saturating_sub(turn.elapsed()));
        }
        let mut gpu = RecordedGpu {
            index,
            name: self.device.name().unwrap_or_default(),
            mig: self.device.mig_mode().is_ok_and(|mode| mode.current == 1),
            ring: ring.unwrap_or_default(),
            calls: self.took.into_iter().map(|(name, us)| (name, Durations::of(us))).collect(),
            costs: costs.all(),
            strides: self.strides,
            ended: self.ended,
            again: self.again,
            rules: None,
            no_rules: None,
            slices: BTreeMap::new(),
            errors: self.errors,
            sizes: self.sizes,
            listed: (list_most, unknown),
            wall_less_boot_us: (clocks, wall_less_boot_us()),
            findings: Vec::new(),
            raw: Raw::default(),
        };
        if let Some(folder) = slices {
            note_rules(&mut gpu, &all, folder);
        }
        gpu.findings = findings::of(&gpu, &all);
        gpu.raw = all;
        Ok(gpu)
    }
}

/// Adds the rule that samples follow, from the loads' time slices; an error in those must not lose the recording.
fn note_rules(gpu: &mut RecordedGpu, all: &Raw, folder: &Path) {
    let loads = match truth::Load::all_in(folder) {
        Ok(loads) => loads,
        Err(error) => {
            gpu.no_rules = Some(format!("the loads' time slices cannot be read: {error:#}"));
            return;
        }
    };
    gpu.slices = loads.iter().map(|load| (load.pid, load.seconds())).collect();
    let wall_less_boot_ns = i64::try_from(gpu.wall_less_boot_us.0 * 1_000).unwrap_or_default();
    match truth::rules(&findings::true_samples(all), &loads, wall_less_boot_ns) {
        Ok(rules) => gpu.rules = Some(rules),
        Err(unknown) => gpu.no_rules = Some(unknown.to_string()),
    }
}

struct RecorderOptions {
    lib: String,
    lasts: Duration,
    slices: Option<PathBuf>,
    unprivileged: bool,
    to: String,
}

fn options() -> Result<RecorderOptions> {
    let lib = "libnvidia-ml.so.1".into();
    let mut options =
        RecorderOptions { lib, lasts: Duration::from_secs(60), slices: None, unprivileged: false, to: String::new() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if word == "--unprivileged" {
            options.unprivileged = true;
            continue;
        }
        let value = words.next().with_context(|| format!("{word} needs a value"))?;
        match word.as_str() {
            "--nvml-lib" => options.lib = value,
            "--for" => options.lasts = Duration::try_from_secs_f64(value.parse()?)?,
            "--slices" => options.slices = Some(value.into()),
            "-o" => options.to = value,
            _ => bail!("unknown argument {word:?}"),
        }
    }
    ensure!(!options.to.is_empty(), "-o FILE is required");
    Ok(options)
}

/// Continues as a user without privileges, which may get other responses.
fn drop_privileges() -> Result<()> {
    const USER: u32 = 65_534;
    // SAFETY: numbers, and no groups; this process has one thread.
    let refused = unsafe { libc::setgroups(0, std::ptr::null()) != 0 || libc::setgid(USER) != 0 || libc::setuid(USER) != 0 };
    ensure!(!refused, "cannot become user {USER}: {}; run as root", std::io::Error::last_os_error());
    // The change of user has cleared the setting that the parent had made.
    // SAFETY: takes no pointers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    Ok(())
}

fn run() -> Result<()> {
    let options = options()?;
    if options.unprivileged {
        drop_privileges()?;
    }
    let nvml = Nvml::builder().lib_path(options.lib.as_ref()).init();
    let nvml = nvml.map_err(|error| anyhow::anyhow!("cannot use the NVIDIA driver library {}: {error}", options.lib))?;
    let count = nvml.device_count().context("the driver does not count its GPUs")?;
    ensure!(count > 0, "the driver lists no GPU");
    let gpus = std::thread::scope(|scope| {
        let start = |index| {
            let nvml = &nvml;
            // The loads are on the first GPU.
            let slices = options.slices.as_deref().filter(|_| index == 0);
            let lasts = options.lasts;
            scope.spawn(move || Recorder::new(nvml, index)?.record(index, lasts, slices))
        };
        let threads: Vec<_> = (0..count).map(start).collect();
        let ended = |thread: std::thread::ScopedJoinHandle<'_, Result<RecordedGpu>>| {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
        };
        threads.into_iter().map(ended).collect::<Result<Vec<_>>>()
    })?;
    let recording = Recording {
        format: FORMAT,
        driver_version: nvml.sys_driver_version().unwrap_or_default(),
        nvml_version: nvml.sys_nvml_version().unwrap_or_default(),
        card: gpus.first().map(|gpu| gpu.name.clone()).unwrap_or_default(),
        seconds: options.lasts.as_secs_f64(),
        poll_us: EVERY.as_micros() as u64,
        gpus,
        load: serde_json::Value::Null,
        agent: serde_json::Value::Null,
        unprivileged: serde_json::Value::Null,
    };
    let text = recording.encode()?;
    if options.to == "-" {
        println!("{text}");
        return Ok(());
    }
    std::fs::write(&options.to, text).with_context(|| options.to.clone())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gpu-recorder: {error:#}");
            ExitCode::FAILURE
        }
    }
}
