//! `gpu`: what this machine's NVIDIA driver answers, recorded for the tests to replay, and held against what the product assumes.
//!
//! It reads the driver and changes no setting of a card. Meanwhile two processes keep GPU 0 busy, each in a container of its own, and the
//! agent runs beside them: what it credits is in the file too.
//!
//! ```text
//!   idle | 0.6          | 0.3         | 0.3 and 0.6 | idle
//!   0    0.1            0.4           0.65          0.9   1   of the time
//! ```
//! While both work, a user without privileges asks too. CUDA loads note their own time slices: the truth by which the driver's rule and
//! the agent's seconds are judged. The raw sample ring and the context-switch trace below NVML are not read: whether a driver gives them
//! is not known before a first run on a GPU.

mod report;

use crate::{
    agent,
    build::{self, Built, Profile},
    demo::{
        exposition,
        workloads::{self, Spec, Workload},
    },
    http,
    janitor::Cleanup,
    setup, sys,
    tools::{self, Running, Usage, say},
};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// Both stand for a loaded kernel driver: Linux's own, and that of WSL.
const DRIVERS: [&str; 2] = ["/dev/nvidiactl", "/dev/dxg"];
const LIBRARY: &str = "libnvidia-ml.so.1";
/// Less than the ring of a driver is nothing to learn from.
const SHORTEST: Duration = Duration::from_secs(12);
/// Until the agent has settled every sample and closed the last window.
const SETTLED: Duration = Duration::from_secs(12);
/// When a user without privileges asks, and for how long.
const UNPRIVILEGED_AT: f64 = 0.75;
const UNPRIVILEGED_FOR: &str = "1.5";
/// `cuda-load` has found no CUDA.
const NO_CUDA: i32 = 3;

/// One process's turn: parts of the recording's time.
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

#[derive(Clone)]
struct Options {
    lasts: Duration,
    library: Option<PathBuf>,
    folder: PathBuf,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let folder = tools::target_dir()?.join("gpu");
        let mut options = Self { lasts: Duration::from_secs(60), library: None, folder };
        let mut words = args.iter();
        while let Some(word) = words.next() {
            let (name, given) = word.split_once('=').map_or((word.as_str(), None), |(name, value)| (name, Some(value)));
            let mut value = || given.or_else(|| words.next().map(String::as_str)).unwrap_or_default();
            match name {
                "--for" => options.lasts = tools::duration(value())?,
                "--nvml-lib" => options.library = Some(value().into()),
                "-o" => options.folder = value().into(),
                _ => return Err(tools::unknown(word)),
            }
        }
        if options.lasts < SHORTEST {
            return Err(Usage(format!("--for is {SHORTEST:?} at least: shorter says nothing")).into());
        }
        if options.folder.as_os_str().is_empty() {
            return Err(Usage("-o wants a folder".into()).into());
        }
        Ok(options)
    }
}

/// Where the load comes from.
enum Source {
    /// `slices`: where the loads note when they ran.
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
    let options = Options::parse(args)?;
    look_for_a_driver(options.library.as_deref())?;
    if !sys::is_root() {
        bail!("the agent loads programs into the kernel: run as root");
    }
    setup::ensure(setup::Scope::Ebpf, false)?;
    let simulated = options.library.as_deref().and_then(world);
    let profile = if simulated.is_some() { Profile::Debug } else { Profile::Release };
    let built = build::everything(profile)?;
    let [recorder, cuda] = programs(&built, profile)?;

    // A simulated driver's device nodes are its own.
    let devices = simulated.as_ref().map(|dir| dir.join("dev"));
    doctor(&built, options.library.as_deref(), devices.as_deref())?;
    sys::catch_signals();
    // Declared first, so dropped last: the processes end before their cgroups are removed.
    let mut cleanup = Cleanup::start()?;
    let tmp = cleanup.temporary("gpu-sampler-gpu")?;
    let source = match simulated {
        Some(dir) => Source::Simulated { sim: built.sim.clone(), dir },
        None => Source::Cuda { program: cuda, slices: tmp.join("slices") },
    };
    if let Source::Cuda { slices, .. } = &source {
        fs::create_dir_all(slices).with_context(|| slices.display().to_string())?;
    }
    let mut command = Command::new(&built.sampler);
    command.arg("run");
    if let Some(library) = &options.library {
        command.arg("--nvml-lib").arg(library);
    }
    if let Some(devices) = &devices {
        command.arg("--path-devfs").arg(devices);
    }
    let (agent, server, _) = agent::start("gpu", command, &tmp)?;
    let raw = tmp.join("recording.json");
    let Recorded { load, unprivileged } = record(&recorder, &raw, &options, &source, &mut cleanup)?;
    say(format_args!("gpu: the agent settles its last samples, {SETTLED:?}"));
    thread::sleep(SETTLED);
    let mut recording: Value = serde_json::from_slice(&fs::read(&raw)?)?;
    recording["load"] = load;
    recording["unprivileged"] = unprivileged;
    recording["agent"] = seen_by_the_agent(server)?;
    drop(agent);

    let file = options.folder.join(name(&recording));
    fs::create_dir_all(&options.folder).with_context(|| options.folder.display().to_string())?;
    fs::write(&file, recording.to_string()).with_context(|| file.display().to_string())?;
    for line in report::lines(&recording) {
        println!("{line}");
    }
    say(format_args!("gpu: {} bytes in {}", fs::metadata(&file)?.len(), file.display()));
    Ok(())
}

/// Before anything is built: without a driver there is nothing to record.
fn look_for_a_driver(library: Option<&Path>) -> Result<()> {
    const REMEDY: &str = "install NVIDIA's driver and load it (`nvidia-smi` must list a GPU), or name a library with --nvml-lib; the \
                          project itself needs no GPU: `cargo xtask demo --sim` and `cargo xtask test` simulate one";
    if let Some(library) = library {
        if !library.exists() {
            bail!("{} does not exist", library.display());
        }
        return Ok(());
    }
    if !DRIVERS.iter().any(|device| Path::new(device).exists()) {
        bail!("there is no GPU with NVIDIA's driver here: {} does not exist\n  -> {REMEDY}", DRIVERS[0]);
    }
    let known = tools::on_path("ldconfig").and_then(|ldconfig| tools::output(ldconfig, &["-p"]));
    // Where nobody can tell, the recorder tries.
    if known.is_some_and(|known| !known.contains(LIBRARY)) && std::env::var_os("LD_LIBRARY_PATH").is_none() {
        bail!("the kernel driver is there, its library {LIBRARY} is not\n  -> {REMEDY}");
    }
    Ok(())
}

/// DIR of a simulated library, DIR/lib/libnvidia-ml.so.1.
fn world(library: &Path) -> Option<PathBuf> {
    let dir = library.parent()?.parent()?;
    dir.join("world.toml").exists().then(|| dir.to_owned())
}

fn programs(built: &Built, profile: Profile) -> Result<[PathBuf; 2]> {
    let names = ["gpu-recorder", "cuda-load"];
    let mut cargo = tools::cargo(&["build", "--locked", "--package", "gpu-sampler-tests"])?;
    cargo.args(names.iter().flat_map(|name| ["--bin", name]));
    if profile == Profile::Release {
        cargo.arg("--release");
    }
    tools::run(&mut cargo)?;
    Ok(names.map(|name| built.sampler.with_file_name(name)))
}

/// Its own words, and on failure its own remedies.
fn doctor(built: &Built, library: Option<&Path>, devices: Option<&Path>) -> Result<()> {
    let mut doctor = Command::new(&built.sampler);
    doctor.arg("doctor");
    if let Some(library) = library {
        doctor.arg("--nvml-lib").arg(library);
    }
    if let Some(devices) = devices {
        doctor.arg("--path-devfs").arg(devices);
    }
    tools::run(&mut doctor).context("the agent cannot run here")
}

/// What ran meanwhile.
struct Recorded {
    load: Value,
    unprivileged: Value,
}

fn recorder_command(recorder: &Path, options: &Options, seconds: &str) -> Command {
    let mut command = Command::new(recorder);
    command.args(["--for", seconds]);
    if let Some(library) = &options.library {
        command.arg("--nvml-lib").arg(library);
    }
    tools::forget_cargo(&mut command);
    command
}

/// Counts of what a user without privileges is answered, or why nothing.
fn ask_without_privileges(recorder: &Path, options: &Options) -> Result<Value> {
    let mut command = recorder_command(recorder, options, UNPRIVILEGED_FOR);
    let output = command.args(["--unprivileged", "-o", "-"]).output().with_context(|| recorder.display().to_string())?;
    if !output.status.success() {
        return Ok(json!({"problem": String::from_utf8_lossy(&output.stderr).trim()}));
    }
    let answers: Value = serde_json::from_slice(&output.stdout).context("the recorder's answers")?;
    let gpu = &answers["gpus"][0];
    let polls = gpu["raw"]["polls"].as_array().into_iter().flatten();
    let (mut samples, mut rows, mut named) = (0, 0, 0);
    for poll in polls {
        samples += poll[2].as_array().map_or(0, Vec::len);
        let of = poll[3].as_array().into_iter().flatten();
        for row in of {
            rows += 1;
            named += u32::from(row[1].as_u64().is_some_and(|pid| pid != 0 && pid != u64::from(u32::MAX)));
        }
    }
    Ok(json!({"samples": samples, "rows": rows, "rows_with_pid": named, "listed": gpu["listed"][0], "errors": gpu["errors"]}))
}

/// Starts the recorder and lets the processes have their turns.
fn record(recorder: &Path, to: &Path, options: &Options, source: &Source, cleanup: &mut Cleanup) -> Result<Recorded> {
    let seconds = options.lasts.as_secs_f64();
    let program = recorder;
    let mut command = recorder_command(program, options, &seconds.to_string());
    command.arg("-o").arg(to);
    if let Source::Cuda { slices, .. } = source {
        command.arg("--slices").arg(slices);
    }
    say(format_args!("gpu: records for {:?}", options.lasts));
    let mut recorder = Running::start("the recorder", &mut command)?;
    let begun = Instant::now();
    let mut waiting: Vec<&Turn> = TURNS.iter().collect();
    let mut running: Vec<(&Turn, Load)> = Vec::new();
    let (mut turns, mut problem) = (Vec::new(), None);
    let mut unprivileged: Option<thread::JoinHandle<Result<Value>>> = None;
    // A driver that hangs keeps the recorder for ever.
    let patience = options.lasts + Duration::from_secs(60);
    loop {
        if let Some(status) = recorder.ended()? {
            if !status.success() {
                bail!("the recorder ended ({status})");
            }
            break;
        }
        if let Some(signal) = sys::interrupted() {
            bail!("interrupted by signal {signal}");
        }
        if begun.elapsed() > patience {
            bail!("the recorder has not ended after {patience:?}: a call to the driver hangs");
        }
        let now = begun.elapsed().as_secs_f64() / seconds;
        if let Some(n) = waiting.iter().position(|turn| turn.from <= now && problem.is_none()) {
            let turn = waiting.remove(n);
            let load = Load::start(turn, (turn.to - now) * seconds, source, cleanup)?;
            let (pid, wanted) = (load.workload.pid, (turn.to - now) * seconds);
            turns.push((pid, json!({"pod": turn.spec.pod, "duty": turn.spec.demand, "seconds": wanted})));
            running.push((turn, load));
        }
        if unprivileged.is_none() && now >= UNPRIVILEGED_AT {
            let (program, options) = (program.to_owned(), options.clone());
            unprivileged = Some(thread::spawn(move || ask_without_privileges(&program, &options)));
        }
        for (_, load) in &mut running {
            problem = problem.take().or(load.problem()?);
        }
        running.retain(|(turn, _)| turn.to > now);
        thread::sleep(Duration::from_millis(20));
    }
    if let Some(told) = &problem {
        say(format_args!("gpu: {told}; what was recorded is a GPU without our load"));
    }
    let kind = match (source, &problem) {
        (_, Some(_)) => "none",
        (Source::Cuda { .. }, None) => "cuda",
        (Source::Simulated { .. }, None) => "simulated",
    };
    if problem.is_some() {
        turns.clear();
    }
    for (pid, turn) in &mut turns {
        if let Source::Cuda { slices, .. } = source {
            turn["measured_seconds"] = json!(measured(&slices.join(format!("{pid}.csv")))?);
        }
    }
    let turns: Vec<Value> = turns.into_iter().map(|(_, turn)| turn).collect();
    let unprivileged = match unprivileged.map(thread::JoinHandle::join) {
        Some(Ok(answers)) => answers?,
        Some(Err(_)) => bail!("the thread that asked without privileges panicked"),
        None => Value::Null,
    };
    Ok(Recorded { load: json!({"kind": kind, "turns": turns, "problem": problem}), unprivileged })
}

/// The seconds that a load was on the engine, by the slices that it noted.
fn measured(slices: &Path) -> Result<f64> {
    let text = fs::read_to_string(slices).with_context(|| slices.display().to_string())?;
    Ok(sum_of_slices(&text))
}

/// Of lines `s,BEGIN,END` in ns; a last line that is cut off is left out.
fn sum_of_slices(text: &str) -> f64 {
    let slice = |line: &str| {
        let (begin, end) = line.strip_suffix('\n')?.strip_prefix("s,")?.split_once(',')?;
        Some(end.parse::<u64>().ok()?.saturating_sub(begin.parse().ok()?) as f64 * 1e-9)
    };
    text.split_inclusive('\n').filter_map(slice).sum()
}

/// A process in its container that keeps GPU 0 busy.
struct Load {
    workload: Workload,
    /// It only sleeps; this says that it does more.
    simulated: Option<Running>,
}

impl Load {
    fn start(turn: &Turn, seconds: f64, source: &Source, cleanup: &mut Cleanup) -> Result<Self> {
        say(format_args!("gpu: {} keeps GPU 0 busy for {} of {seconds:.0} s", turn.spec.pod, turn.spec.demand));
        match source {
            Source::Simulated { sim, dir } => {
                let workload = workloads::start_command(&turn.spec, workloads::sleep()?, cleanup)?;
                let simulated = Some(workloads::load(&workload, &turn.spec, sim, dir)?);
                Ok(Self { workload, simulated })
            }
            Source::Cuda { program, slices } => {
                let mut command = Command::new(program);
                command.args(["--gpu", "0", "--duty", turn.spec.demand, "--for", &seconds.to_string(), "--slices"]).arg(slices);
                // The driver's order, which is NVML's.
                command.env("CUDA_DEVICE_ORDER", "PCI_BUS_ID");
                Ok(Self { workload: workloads::start_command(&turn.spec, command, cleanup)?, simulated: None })
            }
        }
    }

    /// Why there is no load, if there is none.
    fn problem(&mut self) -> Result<Option<String>> {
        if let Some(simulated) = &mut self.simulated
            && let Some(status) = simulated.ended()?
        {
            bail!("{} ended ({status})", simulated.name);
        }
        Ok(match self.workload.ended()? {
            Some(status) if status.code() == Some(NO_CUDA) => Some("there is no CUDA driver library (libcuda.so.1) here".into()),
            Some(status) if !status.success() => Some(format!("the CUDA load ended ({status})")),
            _ => None,
        })
    }
}

/// How it followed the kernel, and whose the seconds are; of the recording's own containers by name.
fn seen_by_the_agent(server: SocketAddr) -> Result<Value> {
    let page = http::get(server, "/metrics").and_then(http::Answer::ok)?;
    let samples = exposition::parse(&String::from_utf8_lossy(&page));
    let of = |name: &'static str| samples.iter().filter(move |sample| sample.name == name);
    let mode = of("gpu_sampler_kernel_mode").next().map(|sample| sample.label("mode").to_owned());
    let index =
        |uuid: &str| of("gpu_info").find(|sample| sample.label("uuid") == uuid).map(|sample| sample.label("index").to_owned());
    let mut containers = Vec::new();
    for sample in of("container_gpu_seconds_total") {
        let ours = sample.label("namespace") == TURNS[0].spec.namespace;
        let pod = if ours { sample.label("pod") } else { "others" };
        containers.push(json!({"gpu": index(sample.label("uuid")), "pod": pod, "seconds": sample.value}));
    }
    let seconds = |name: &'static str, label: &str| -> Vec<Value> {
        of(name)
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
    fn options() {
        let parse = |words: &[&str]| Options::parse(&words.iter().map(|word| word.to_string()).collect::<Vec<_>>());
        assert_eq!(parse(&[]).unwrap().lasts, Duration::from_secs(60));
        let all = parse(&["--for=20s", "--nvml-lib", "/l", "-o", "f"]).unwrap();
        assert_eq!((all.lasts, all.library, all.folder), (Duration::from_secs(20), Some("/l".into()), "f".into()));
        for wrong in [&["--for", "1s"][..], &["-o"], &["x"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn slices_are_summed_up_to_where_they_were_cut_off() {
        let seconds = sum_of_slices("clock,-7\ns,1000000000,1500000000\ns,2000000000,2250000000\ns,3000000000,40");
        assert!((seconds - 0.75).abs() < 1e-9, "{seconds}");
        assert_eq!(sum_of_slices(""), 0.0);
    }

    #[test]
    fn without_a_library_it_says_so() {
        assert!(look_for_a_driver(Some(Path::new("/nowhere/libnvidia-ml.so.1"))).is_err());
    }
}
