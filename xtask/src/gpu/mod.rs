//! `gpu`: records what this machine's NVIDIA driver returns, for the tests to replay, and compares it with the agent's assumptions.
//!
//! It reads the driver and changes no setting of a card. Meanwhile two processes keep GPU 0 busy, each in a container of its own, and the
//! agent runs in addition: what it credits is in the file, too.
//!
//! ```text
//!   idle | 0.6          | 0.3         | 0.3 and 0.6 | idle
//!   0    0.1            0.4           0.65          0.9   1   of the time
//! ```
//! While both run, a user without privileges queries the driver, too. CUDA loads record their own time slices: the truth by which the
//! driver's rule and the agent's seconds are judged. The raw sample buffer and the context-switch trace below NVML are not read: whether a
//! driver provides them is unknown until a first run on a GPU.

mod report;

use crate::{
    agent,
    build::{self, Built, Profile},
    demo::{
        exposition,
        workloads::{self, Spec, Workload},
    },
    janitor::Cleanup,
    setup, sys,
    tools::{self, Running, Usage, progress},
};
use anyhow::{Context, Result, bail};
use devkit::http::{Response, Server};
use serde_json::{Value, json};
use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Either one shows a loaded kernel driver: Linux's own, or that of WSL.
const DRIVERS: [&str; 2] = ["/dev/nvidiactl", "/dev/dxg"];
const LIBRARY: &str = "libnvidia-ml.so.1";
/// A recording shorter than the driver's sample buffer shows too little.
const SHORTEST: Duration = Duration::from_secs(12);
/// Time in which the agent settles every sample and closes the last window.
const SETTLED: Duration = Duration::from_secs(12);
/// When a user without privileges queries the driver (share of the time), and for how long (seconds).
const UNPRIVILEGED_AT: f64 = 0.75;
const UNPRIVILEGED_FOR: &str = "1.5";
/// The recorder's file, in a temporary folder.
const RECORDING: &str = "recording.json";
/// Exit code of `cuda-load` without CUDA.
const NO_CUDA: i32 = 3;

/// One process's turn, as shares of the recording's time.
struct Turn {
    spec: Spec,
    from: f64,
    to: f64,
}

const TURNS: [Turn; 3] = [
    Turn { spec: spec("duty-60", "0.6"), from: 0.1, to: 0.4 },
    Turn { spec: spec("duty-30", "0.3"), from: 0.4, to: 0.9 },
    Turn { spec: spec("duty-60-again", "0.6"), from: 0.65, to: 0.9 },
];

const fn spec(pod: &'static str, demand: &'static str) -> Spec {
    Spec { namespace: "gpu-recording", pod, container: "load", demand }
}

struct GpuOptions {
    lasts: Duration,
    library: Option<PathBuf>,
    folder: PathBuf,
    /// The programs, built elsewhere.
    built: Option<PathBuf>,
}

impl GpuOptions {
    fn parse(args: &[String]) -> Result<Self> {
        let folder = tools::target_dir()?.join("gpu");
        let mut options = Self { lasts: Duration::from_secs(60), library: None, folder, built: None };
        let mut words = args.iter();
        while let Some(word) = words.next() {
            let (name, given) = tools::option(word);
            let mut value = || given.or_else(|| words.next().map(String::as_str)).unwrap_or_default();
            match name {
                "--for" => options.lasts = tools::duration(value())?,
                "--nvml-lib" => options.library = Some(value().into()),
                "-o" => options.folder = value().into(),
                "--built" => options.built = Some(value().into()),
                _ => return Err(tools::unknown(word)),
            }
        }
        if options.lasts < SHORTEST {
            return Err(Usage(format!("--for must be at least {SHORTEST:?}: a shorter recording shows too little")).into());
        }
        if options.folder.as_os_str().is_empty() {
            return Err(Usage("-o requires a folder".into()).into());
        }
        Ok(options)
    }
}

/// The origin of the load.
enum Source {
    /// `slices`: the folder in which the loads record their time slices.
    Cuda {
        program: PathBuf,
        slices: PathBuf,
    },
    Simulated {
        sim: PathBuf,
        dir: PathBuf,
    },
}

pub fn verb(args: &[String]) -> Result<()> {
    let options = GpuOptions::parse(args)?;
    check_driver(options.library.as_deref())?;
    if !sys::is_root() {
        bail!("the agent loads programs into the kernel, which requires root");
    }
    let simulated = options.library.as_deref().and_then(world);
    let profile = if simulated.is_some() { Profile::Debug } else { Profile::Release };
    let programs = match &options.built {
        Some(folder) => Programs::in_folder(folder)?,
        None => Programs::build(profile)?,
    };
    // A simulated driver's device nodes are its own.
    let devices = simulated.as_ref().map(|dir| dir.join("dev"));
    doctor(&programs.sampler, options.library.as_deref(), devices.as_deref())?;
    sys::catch_signals();
    // Declared first, so dropped last: the processes end before their cgroups are removed.
    let mut cleanup = Cleanup::start()?;
    let tmp = cleanup.temporary("gpu-sampler-gpu")?;
    let source = match simulated {
        Some(dir) => Source::Simulated { sim: programs.sim.clone(), dir },
        None => Source::Cuda { program: programs.cuda.clone(), slices: tmp.join("slices") },
    };
    if let Source::Cuda { slices, .. } = &source {
        fs::create_dir_all(slices).with_context(|| slices.display().to_string())?;
    }
    let mut command = Command::new(&programs.sampler);
    command.arg("run");
    if let Some(library) = &options.library {
        command.arg("--nvml-lib").arg(library);
    }
    if let Some(devices) = &devices {
        command.arg("--path-devfs").arg(devices);
    }
    // An unwritable folder must be an error before the recording.
    fs::create_dir_all(&options.folder).with_context(|| options.folder.display().to_string())?;
    let (agent, server, _) = agent::start("gpu", command, &tmp)?;
    let meanwhile = record(&programs.recorder, &tmp, &options, &source, &mut cleanup)?;
    let mut recording: Value = serde_json::from_slice(&fs::read(tmp.join(RECORDING))?)?;
    let file = options.folder.join(name(&recording));
    // Written before anything else can fail, and again when the rest is known.
    let write = |recording: &Value| fs::write(&file, recording.to_string()).with_context(|| file.display().to_string());
    write(&recording)?;
    recording["load"] = meanwhile.load(&source, &recording);
    recording["unprivileged"] = meanwhile.unprivileged;
    if let Some(problem) = recording["load"]["problem"].as_str() {
        progress(format_args!("gpu: {problem}"));
    }
    write(&recording)?;
    if let Some(signal) = sys::interrupted() {
        bail!("interrupted by signal {signal}; {} lacks the agent's results", file.display());
    }
    progress(format_args!("gpu: waiting {SETTLED:?} for the agent to settle its last samples"));
    thread::sleep(SETTLED);
    recording["agent"] = agent_results(server).unwrap_or_else(|error| problem(&error));
    drop(agent);

    write(&recording)?;
    for line in report::lines(&recording) {
        println!("{line}");
    }
    progress(format_args!("gpu: {} bytes in {}", fs::metadata(&file)?.len(), file.display()));
    Ok(())
}

/// Runs before anything is built: without a driver there is nothing to record.
fn check_driver(library: Option<&Path>) -> Result<()> {
    const REMEDY: &str = "install and load NVIDIA's driver (`nvidia-smi` must list a GPU), or set --nvml-lib; the project itself needs no \
                          GPU: `cargo xtask demo --sim` and `cargo xtask test` simulate one";
    if let Some(library) = library {
        if !library.exists() {
            bail!("{} does not exist", library.display());
        }
        return Ok(());
    }
    if !DRIVERS.iter().any(|device| Path::new(device).exists()) {
        bail!("no GPU with NVIDIA's driver found: {} does not exist\n  -> {REMEDY}", DRIVERS[0]);
    }
    let known = tools::on_path("ldconfig").and_then(|ldconfig| tools::output(ldconfig, &["-p"]));
    // If the library cannot be checked, the recorder tries to load it.
    if known.is_some_and(|known| !known.contains(LIBRARY)) && std::env::var_os("LD_LIBRARY_PATH").is_none() {
        bail!("the kernel driver is loaded, but its library {LIBRARY} is missing\n  -> {REMEDY}");
    }
    Ok(())
}

/// The folder DIR of a simulated library DIR/lib/libnvidia-ml.so.1.
fn world(library: &Path) -> Option<PathBuf> {
    let dir = library.parent()?.parent()?;
    dir.join("world.toml").exists().then(|| dir.to_owned())
}

/// The programs that a recording runs.
struct Programs {
    sampler: PathBuf,
    sim: PathBuf,
    recorder: PathBuf,
    cuda: PathBuf,
}

impl Programs {
    fn build(profile: Profile) -> Result<Self> {
        setup::ensure(setup::Scope::Ebpf, false)?;
        let Built { sampler, sim, .. } = build::everything(profile)?;
        let names = ["gpu-recorder", "cuda-load"];
        let mut cargo = tools::cargo(&["build", "--locked", "--package", "gpu-sampler-tests"])?;
        cargo.args(names.iter().flat_map(|name| ["--bin", name]));
        if profile == Profile::Release {
            cargo.arg("--release");
        }
        tools::run(&mut cargo)?;
        let [recorder, cuda] = names.map(|name| sampler.with_file_name(name));
        Ok(Self { sampler, sim, recorder, cuda })
    }

    /// For a machine without Rust.
    fn in_folder(folder: &Path) -> Result<Self> {
        let program = |name: &str| -> Result<PathBuf> {
            let path = folder.join(name);
            path.canonicalize().with_context(|| format!("--built: {}", path.display()))
        };
        let [sampler, recorder, cuda] = [program("gpu-sampler")?, program("gpu-recorder")?, program("cuda-load")?];
        Ok(Self { sampler, sim: folder.join("nvml-sim"), recorder, cuda })
    }
}

/// Runs doctor; its output has the remedies of a failure.
fn doctor(sampler: &Path, library: Option<&Path>, devices: Option<&Path>) -> Result<()> {
    let mut doctor = Command::new(sampler);
    doctor.arg("doctor");
    if let Some(library) = library {
        doctor.arg("--nvml-lib").arg(library);
    }
    if let Some(devices) = devices {
        doctor.arg("--path-devfs").arg(devices);
    }
    tools::run(&mut doctor).context("the agent cannot run here")
}

/// Results of what ran during the recording.
struct Meanwhile {
    /// The pid of each load and its task, in the order of the turns.
    turns: Vec<(u32, Value)>,
    problem: Option<String>,
    unprivileged: Value,
}

impl Meanwhile {
    /// The turns, with each load's seconds on the engine: the sum of the time slices that it recorded.
    fn load(&self, source: &Source, recording: &Value) -> Value {
        let mut problem = self.problem.clone();
        let (mut turns, mut measured) = (Vec::new(), false);
        for (pid, turn) in &self.turns {
            let mut turn = turn.clone();
            if let Source::Cuda { .. } = source {
                let seconds = &recording["gpus"][0]["slices"][pid.to_string()];
                measured |= seconds.is_number();
                if seconds.is_null() && problem.is_none() {
                    problem = Some(format!("the load {} recorded no time slices", turn["pod"]));
                }
                turn["measured_seconds"] = seconds.clone();
            }
            turns.push(turn);
        }
        let kind = match source {
            Source::Cuda { .. } if measured => "cuda",
            Source::Simulated { .. } if problem.is_none() => "simulated",
            _ => "none",
        };
        if kind == "none" {
            turns.clear();
            problem = problem.map(|problem| format!("{problem}; the GPU was recorded without a load"));
        }
        json!({"kind": kind, "turns": turns, "problem": problem})
    }
}

/// Takes the place of results that could not be obtained.
fn problem(error: &anyhow::Error) -> Value {
    json!({"problem": format!("{error:#}")})
}

fn recorder_command(recorder: &Path, options: &GpuOptions, seconds: &str) -> Command {
    let mut command = Command::new(recorder);
    command.args(["--for", seconds]);
    if let Some(library) = &options.library {
        command.arg("--nvml-lib").arg(library);
    }
    tools::forget_cargo(&mut command);
    command
}

/// The recorder as a user without privileges, for a short time.
struct Unprivileged {
    process: Running,
    responses: PathBuf,
    log: PathBuf,
}

impl Unprivileged {
    fn start(recorder: &Path, options: &GpuOptions, tmp: &Path) -> Result<Self> {
        let (responses, log) = (tmp.join("unprivileged.json"), tmp.join("unprivileged.log"));
        let mut command = recorder_command(recorder, options, UNPRIVILEGED_FOR);
        command.args(["--unprivileged", "-o", "-"]).stdin(Stdio::null());
        command.stdout(fs::File::create(&responses)?).stderr(fs::File::create(&log)?);
        Ok(Self { process: Running::start("the recorder without privileges", &mut command)?, responses, log })
    }

    /// Counts of its results, once it has ended; or its error.
    fn poll(&mut self) -> Option<Value> {
        let ended = self.process.ended().transpose()?;
        Some(ended.and_then(|status| self.counts(status)).unwrap_or_else(|error| problem(&error)))
    }

    fn counts(&self, status: ExitStatus) -> Result<Value> {
        if !status.success() {
            bail!("{} ({status})", fs::read_to_string(&self.log)?.trim());
        }
        Ok(counts(&serde_json::from_slice(&fs::read(&self.responses)?).context("the recorder's results")?))
    }
}

/// Counts of the samples and processes that a user without privileges gets.
fn counts(recording: &Value) -> Value {
    let gpu = &recording["gpus"][0];
    let polls = gpu["raw"]["polls"].as_array().into_iter().flatten();
    let (mut samples, mut process_samples, mut named) = (0, 0, 0);
    for poll in polls {
        samples += poll[2].as_array().map_or(0, Vec::len);
        for process in poll[3].as_array().into_iter().flatten() {
            process_samples += 1;
            named += u32::from(process[1].as_u64().is_some_and(|pid| pid != 0 && pid != u64::from(u32::MAX)));
        }
    }
    let (listed, errors) = (&gpu["listed"][0], &gpu["errors"]);
    json!({"samples": samples, "rows": process_samples, "rows_with_pid": named, "listed": listed, "errors": errors})
}

/// Runs the recorder and, meanwhile, the processes in their turns. Only a failure of the recorder itself is an error.
fn record(recorder: &Path, tmp: &Path, options: &GpuOptions, source: &Source, cleanup: &mut Cleanup) -> Result<Meanwhile> {
    let seconds = options.lasts.as_secs_f64();
    let mut command = recorder_command(recorder, options, &seconds.to_string());
    command.arg("-o").arg(tmp.join(RECORDING));
    if let Source::Cuda { slices, .. } = source {
        command.arg("--slices").arg(slices);
    }
    progress(format_args!("gpu: recording for {:?}", options.lasts));
    let mut recording = Running::start("the recorder", &mut command)?;
    let begun = Instant::now();
    let mut waiting: Vec<&Turn> = TURNS.iter().collect();
    let mut running: Vec<(&Turn, Load)> = Vec::new();
    let (mut turns, mut load_problem) = (Vec::new(), None);
    let (mut reader, mut unprivileged) = (None, None);
    let mut is_recorded = false;
    // A driver that hangs blocks both readers without limit.
    let patience = options.lasts + Duration::from_secs(60);
    loop {
        if let Some(status) = recording.ended()?.filter(|_| !is_recorded) {
            if !status.success() {
                bail!("the recorder ended ({status})");
            }
            is_recorded = true;
        }
        if is_recorded && (reader.is_none() || unprivileged.is_some()) {
            break;
        }
        if let Some(signal) = sys::interrupted() {
            if is_recorded {
                break;
            }
            bail!("interrupted by signal {signal}");
        }
        if begun.elapsed() > patience {
            if !is_recorded {
                bail!("the recorder has not ended after {patience:?}: a call to the driver hangs");
            }
            unprivileged = Some(json!({"problem": format!("no result within {patience:?}: a call to the driver hangs")}));
            break;
        }
        let now = begun.elapsed().as_secs_f64() / seconds;
        if let Some(n) = waiting.iter().position(|turn| turn.from <= now && load_problem.is_none()) {
            let turn = waiting.remove(n);
            let wanted = (turn.to - now) * seconds;
            match Load::start(turn, wanted, source, cleanup) {
                Ok(load) => {
                    let what = json!({"pod": turn.spec.pod, "duty": turn.spec.demand, "seconds": wanted});
                    turns.push((load.workload.pid, what));
                    running.push((turn, load));
                }
                Err(error) => load_problem = Some(format!("{error:#}")),
            }
        }
        if reader.is_none() && unprivileged.is_none() && now >= UNPRIVILEGED_AT {
            match Unprivileged::start(recorder, options, tmp) {
                Ok(started) => reader = Some(started),
                Err(error) => unprivileged = Some(problem(&error)),
            }
        }
        unprivileged = unprivileged.or_else(|| reader.as_mut()?.poll());
        for (_, load) in &mut running {
            load_problem = load_problem.or_else(|| load.problem());
        }
        running.retain(|(turn, _)| turn.to > now);
        thread::sleep(Duration::from_millis(20));
    }
    Ok(Meanwhile { turns, problem: load_problem, unprivileged: unprivileged.unwrap_or_default() })
}

/// A process in its container that keeps GPU 0 busy.
struct Load {
    workload: Workload,
    /// For a simulated GPU, the process that declares the load; the workload itself only sleeps.
    simulated: Option<Running>,
}

impl Load {
    fn start(turn: &Turn, seconds: f64, source: &Source, cleanup: &mut Cleanup) -> Result<Self> {
        progress(format_args!("gpu: {} keeps GPU 0 busy for {} of {seconds:.0} s", turn.spec.pod, turn.spec.demand));
        match source {
            Source::Simulated { sim, dir } => {
                let workload = workloads::start_command(&turn.spec, workloads::sleep()?, cleanup)?;
                let simulated = Some(workloads::load(&workload, &turn.spec, sim, dir)?);
                Ok(Self { workload, simulated })
            }
            Source::Cuda { program, slices } => {
                let mut command = Command::new(program);
                command.args(["--gpu", "0", "--duty", turn.spec.demand, "--for", &seconds.to_string(), "--slices"]).arg(slices);
                // PCI bus order, which is NVML's order.
                command.env("CUDA_DEVICE_ORDER", "PCI_BUS_ID");
                Ok(Self { workload: workloads::start_command(&turn.spec, command, cleanup)?, simulated: None })
            }
        }
    }

    /// Why there is no load, if it failed.
    fn problem(&mut self) -> Option<String> {
        let simulated = self.simulated.as_mut().and_then(|simulated| {
            let status = simulated.ended().transpose()?;
            Some(status.map_or_else(|error| format!("{error:#}"), |status| format!("{} ended ({status})", simulated.name)))
        });
        simulated.or_else(|| match self.workload.ended() {
            Ok(Some(status)) if status.code() == Some(NO_CUDA) => Some("the CUDA driver library libcuda.so.1 is missing".into()),
            Ok(Some(status)) if !status.success() => Some(format!("the CUDA load ended ({status})")),
            Ok(_) => None,
            Err(error) => Some(format!("{error:#}")),
        })
    }
}

/// The agent's kernel mode and credited seconds; the recording's own containers by name.
fn agent_results(server: SocketAddr) -> Result<Value> {
    let page = Server::tcp(server).get("/metrics").and_then(Response::ok)?;
    let samples = exposition::parse(&String::from_utf8_lossy(&page));
    let family = |name: &'static str| samples.iter().filter(move |sample| sample.name == name);
    let mode = family("gpu_sampler_kernel_mode").next().map(|sample| sample.label("mode").to_owned());
    let index = |uuid: &str| {
        family("gpu_info").find(|sample| sample.label("uuid") == uuid).map(|sample| sample.label("index").to_owned())
    };
    let mut containers = Vec::new();
    for sample in family("container_gpu_seconds_total") {
        let ours = sample.label("namespace") == TURNS[0].spec.namespace;
        let pod = if ours { sample.label("pod") } else { "others" };
        containers.push(json!({"gpu": index(sample.label("uuid")), "pod": pod, "seconds": sample.value}));
    }
    let seconds = |name: &'static str, label: &str| -> Vec<Value> {
        family(name)
            .filter(|sample| sample.value >= 0.005)
            .map(|sample| json!({"gpu": index(sample.label("uuid")), label: sample.label(label), "seconds": sample.value}))
            .collect()
    };
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "kernel_mode": mode,
        "ebpf_loaded": mode.as_deref() == Some("raw_tracepoint"),
        "containers": containers,
        "time": seconds("gpu_time_seconds_total", "state"),
        "unattributed": seconds("gpu_unattributed_seconds_total", "reason"),
    }))
}

/// `<driver>-<card>.json`.
fn name(recording: &Value) -> String {
    let text = |key: &str| recording[key].as_str().unwrap_or("unknown").to_lowercase();
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
    let name: String = format!("{}-{}", text("driver_version"), text("card")).chars().map(plain).collect();
    format!("{name}.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_after_driver_and_card() {
        let recording = json!({"driver_version": "535.183.01", "card": "Tesla V100-SXM2-16GB"});
        assert_eq!(name(&recording), "535.183.01-tesla-v100-sxm2-16gb.json");
        assert_eq!(name(&json!({"card": "../x"})), "unknown-..-x.json");
    }

    #[test]
    fn options_are_parsed_and_validated() {
        let parse = |words: &[&str]| GpuOptions::parse(&words.iter().map(|word| word.to_string()).collect::<Vec<_>>());
        assert_eq!(parse(&[]).unwrap().lasts, Duration::from_secs(60));
        let all = parse(&["--for=20s", "--nvml-lib", "/l", "-o", "f"]).unwrap();
        assert_eq!((all.lasts, all.library, all.folder), (Duration::from_secs(20), Some("/l".into()), "f".into()));
        for wrong in [&["--for", "1s"][..], &["-o"], &["x"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_load_without_slices_does_not_affect_the_others() {
        let turn = |pid, pod: &str| (pid, json!({"pod": pod, "seconds": 5.0}));
        let all = |problem: Option<&str>| Meanwhile {
            turns: vec![turn(7, "a"), turn(8, "b")],
            problem: problem.map(str::to_owned),
            unprivileged: Value::Null,
        };
        let source = Source::Cuda { program: PathBuf::new(), slices: PathBuf::new() };
        let recording = |slices: Value| json!({"gpus": [{"slices": slices}]});
        let load = all(None).load(&source, &recording(json!({"7": 1.5, "8": 2.0})));
        assert_eq!((&load["kind"], &load["problem"]), (&json!("cuda"), &Value::Null));
        assert_eq!(load["turns"][1], json!({"pod": "b", "seconds": 5.0, "measured_seconds": 2.0}));
        let load = all(None).load(&source, &recording(json!({"8": 2.0})));
        assert_eq!(load["turns"][0]["measured_seconds"], Value::Null);
        assert!(load["kind"] == "cuda" && load["problem"].is_string(), "{load}");
        let load = all(Some("no CUDA")).load(&source, &json!({}));
        assert!(load["kind"] == "none" && load["turns"] == json!([]), "{load}");
    }

    #[test]
    fn samples_and_processes_are_counted() {
        let gpu = json!({"raw": {"polls": [[0, 9, [[1, 50]], [[1, 7, [5]], [1, 0, [0]]]]]}, "listed": [2, 0], "errors": {}});
        let expect = json!({"samples": 1, "rows": 2, "rows_with_pid": 1, "listed": 2, "errors": {}});
        assert_eq!(counts(&json!({"gpus": [gpu]})), expect);
    }

    #[test]
    fn a_missing_library_is_an_error() {
        assert!(check_driver(Some(Path::new("/nowhere/libnvidia-ml.so.1"))).is_err());
    }
}
