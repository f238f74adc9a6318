//! The simulator's command: creates worlds, declares loads, faults and XIDs, runs short-lived processes, prints the truth.

mod arguments;
mod child;
mod freezer;
mod hold;
mod lives;
mod truth;
mod ways;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use arguments::{Steps, bytes, demand, steps};
use clap::{Parser, Subcommand};
use nvidia_ml_sim::faults::{self, Clear, Fault, FaultKind, Held, micros};
use nvidia_ml_sim::{kernel_files, loads, symbols, time, world};

#[derive(Parser)]
#[command(name = "nvml-sim", about = "Simulated NVIDIA GPUs with ground truth", arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Create simulated GPUs in a folder
    Init {
        #[arg(long)]
        dir: PathBuf,
        /// Number of GPUs; with --world only if the file has none
        #[arg(long)]
        gpus: Option<usize>,
        /// Settings (TOML); README.md of this package documents the keys
        #[arg(long)]
        world: Option<PathBuf>,
    },
    /// Declare that a process uses a GPU, until it ends or --for passes
    Load {
        #[arg(long)]
        pid: u32,
        #[command(flatten)]
        load: Demand,
        /// End after this long, such as 5s or 500ms
        #[arg(long = "for", value_parser = time::span)]
        lasts: Option<Duration>,
        /// Have no demand while the process is frozen by a cgroup, as a process that submits its own work; its memory stays
        #[arg(long)]
        stops_while_frozen: bool,
    },
    /// Start a process with a load from its first instant
    Run {
        #[command(flatten)]
        load: Demand,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Run many short-lived processes in cgroups, each with a load from its first instant, and print them as JSON lines
    Lives(lives::Lives),
    /// Wait to be killed: the program of processes that `lives --launch` starts
    #[command(hide = true)]
    Rest,
    /// Inject a fault from now on
    Fault(FaultArgs),
    /// Report an XID of a GPU now
    Xid {
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        gpu: usize,
        #[arg(long)]
        xid: u64,
        /// Number of events
        #[arg(long, default_value_t = 1)]
        count: u64,
    },
    /// Print what really happened, as JSON
    Truth {
        #[arg(long)]
        dir: PathBuf,
        /// RFC 3339; default: the world's begin
        #[arg(long, value_parser = time::parse)]
        from: Option<u64>,
        #[arg(long, value_parser = time::parse)]
        to: Option<u64>,
        /// Print every sample that the driver recorded instead of the sums
        #[arg(long)]
        samples: bool,
    },
}

#[derive(clap::Args)]
struct Demand {
    #[arg(long)]
    dir: PathBuf,
    /// Index of the GPU
    #[arg(long)]
    gpu: usize,
    /// Demand for the compute engine, above 0 and up to 1; optional with a demand for another engine, or with --mem
    #[arg(long, value_parser = demand)]
    demand: Option<f64>,
    /// Schedule of demands from the load's begin, such as 1.0:20s,0:10s; repeated, unless the last has no duration
    #[arg(long, value_name = "DEMAND:FOR,..", value_parser = steps, conflicts_with = "demand")]
    demands: Option<Steps>,
    /// Start of the schedule instead of the load's begin; until then the first demand applies. RFC 3339
    #[arg(long, value_parser = time::parse, requires = "demands")]
    since: Option<u64>,
    /// GPU memory that the load holds, such as 2GiB or 512MiB
    #[arg(long, value_parser = bytes, default_value = "0")]
    mem: u64,
    #[command(flatten)]
    ways: ways::Options,
}

#[derive(clap::Args)]
struct FaultArgs {
    #[arg(long)]
    dir: PathBuf,
    /// Index of the GPU; default: all
    #[arg(long)]
    gpu: Option<usize>,
    #[arg(long, required_unless_present = "clear")]
    kind: Option<FaultKind>,
    /// Only this call, such as nvmlDeviceGetSamples; default: every call on the device
    #[arg(long, value_name = "SYMBOL")]
    call: Option<String>,
    /// Error that the calls return, such as GPU_IS_LOST
    #[arg(long, value_parser = faults::error)]
    error: Option<u32>,
    /// Additional latency of the calls, microseconds
    #[arg(long, default_value_t = 0)]
    micros: u64,
    /// Reasons for throttled clocks: sw_power_cap, hw_thermal and others, separated by commas
    #[arg(long, value_parser = faults::reasons)]
    reasons: Option<u64>,
    /// With reasons: upper limit of the SM clock
    #[arg(long)]
    mhz: Option<u32>,
    /// With reasons: the power limit, and upper limit of the power
    #[arg(long)]
    watts: Option<u32>,
    /// With reasons: lower limit of the temperature
    #[arg(long)]
    celsius: Option<u32>,
    /// End after this long, such as 5s; default: never
    #[arg(long = "for", value_parser = time::span)]
    lasts: Option<Duration>,
    /// End faults in force, of this GPU and this kind where given
    #[arg(long, conflicts_with_all = ["call", "error", "micros", "reasons", "mhz", "watts", "celsius", "lasts"])]
    clear: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse().verb) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("nvml-sim: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> anyhow::Result<u8> {
    match verb {
        Verb::Init { dir, gpus, world } => init(&dir, gpus, world.as_deref()).map(|()| 0),
        Verb::Load { pid, load, lasts, stops_while_frozen } => {
            check(&load)?;
            let freezer = stops_while_frozen.then(|| freezer::ProcessFreezer::new(pid)).transpose()?;
            hold::load(&load.dir, declared(&load, pid)?, lasts, freezer.as_ref()).map(|()| 0)
        }
        Verb::Run { load, command } => {
            check(&load)?;
            hold::run(&load, &command)
        }
        Verb::Lives(options) => lives::run(&options).map(|()| 0),
        Verb::Rest => child::rest(),
        Verb::Fault(options) => fault(options).map(|()| 0),
        Verb::Xid { dir, gpu, xid, count } => {
            check_gpu(&dir, gpu)?;
            loads::Log::open(&dir)?.xid(gpu, xid, count).map(|_| 0)
        }
        Verb::Truth { dir, from, to, samples } => truth::print(&dir, from, to, samples).map(|()| 0),
    }
}

fn check(load: &Demand) -> anyhow::Result<()> {
    load.ways.check(&load.dir, &world::World::read(&load.dir)?, load.gpu, "--gpu")
}

fn declared(load: &Demand, pid: u32) -> anyhow::Result<loads::Load> {
    let start_time = devkit::process::start_time(pid).with_context(|| format!("--pid {pid}: there is no such process"))?;
    let steps = load.demands.clone().map(|steps| steps.0).unwrap_or_default();
    let most = steps.iter().map(|step| step.demand).reduce(f64::max);
    let (gpu, demand, memory_bytes) = (load.gpu, load.demand.or(most).unwrap_or(0.0), load.mem);
    let ways = loads::Ways { steps, steps_from_us: load.since, ..load.ways.ways(demand > 0.0 || memory_bytes > 0)? };
    Ok(loads::Load { id: 0, pid, start_time, gpu, demand, memory_bytes, begin_us: 0, end_us: None, ways })
}

fn check_gpu(dir: &Path, gpu: usize) -> anyhow::Result<()> {
    let gpus = world::World::read(dir)?.gpus.len();
    if gpu >= gpus {
        bail!("--gpu {gpu}: {} has {gpus} GPUs, numbered from 0", dir.display());
    }
    Ok(())
}

fn fault(options: FaultArgs) -> anyhow::Result<()> {
    options.gpu.map_or(Ok(()), |gpu| check_gpu(&options.dir, gpu))?;
    let mut log = loads::Log::open(&options.dir)?;
    if options.clear {
        return log.clear(Clear { gpu: options.gpu, kind: options.kind, at_us: 0 }).map(|_| ());
    }
    let kind = options.kind.context("--kind is missing")?;
    let (error, reasons) = (options.error.unwrap_or(0), options.reasons.unwrap_or(0));
    let (gpu, call, micros_) = (options.gpu, options.call, options.micros);
    let held = Held { mhz: options.mhz, watts: options.watts, celsius: options.celsius };
    let fault = Fault { gpu, call, error, micros: micros_, reasons, held, ..Fault::of_kind(kind) };
    let fault = faults::validated(fault).map_err(anyhow::Error::msg)?;
    log.fault(fault, options.lasts.map(micros)).map(|_| ())
}

fn init(dir: &Path, gpus: Option<usize>, file: Option<&Path>) -> anyhow::Result<()> {
    let text = match file {
        Some(path) => fs::read_to_string(path).with_context(|| path.display().to_string())?,
        None => String::new(),
    };
    let mut world = world::World::parse(&text).with_context(|| file.map_or(String::new(), |f| f.display().to_string()))?;
    if world.gpus.is_empty() {
        world.gpus = vec![world::Gpu::default(); gpus.unwrap_or(1)];
        world = world::World::parse(&toml::to_string(&world)?)?;
    } else if gpus.is_some_and(|n| n != world.gpus.len()) {
        bail!("--gpus differs from the {} GPUs of the --world file; omit it", world.gpus.len());
    }
    world.begun_us = loads::now_us();
    world.booted_us = world.begun_us.saturating_sub(up_us());
    let lib = dir.join("lib");
    fs::create_dir_all(&lib).with_context(|| lib.display().to_string())?;
    let library = library()?;
    let mut image = fs::read(&library).with_context(|| library.display().to_string())?;
    symbols::hide(&mut image, &symbols::missing(&world)?)?;
    let copy = lib.join("libnvidia-ml.so.1");
    fs::write(&copy, image).with_context(|| copy.display().to_string())?;
    // As the driver's installer has it; older clients load it by this name.
    let link = lib.join("libnvidia-ml.so");
    let _earlier = fs::remove_file(&link);
    std::os::unix::fs::symlink("libnvidia-ml.so.1", &link).with_context(|| link.display().to_string())?;
    let devices = dir.join(world::DEVICES);
    fs::create_dir_all(&devices).with_context(|| devices.display().to_string())?;
    for node in world.nodes(dir, None) {
        fs::write(&node, "").with_context(|| node.display().to_string())?;
    }
    kernel_files::create(&world, dir)?;
    fs::write(dir.join(loads::FILE), "").with_context(|| dir.display().to_string())?;
    fs::write(dir.join(world::FILE), toml::to_string(&world)?).with_context(|| dir.display().to_string())
}

/// The machine's uptime.
fn up_us() -> u64 {
    let up = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = up.split_whitespace().next().and_then(|s| s.parse::<f64>().ok()).unwrap_or(0.0);
    (seconds * 1e6) as u64
}

/// The path in NVML_SIM_LIBRARY, or the library that cargo built next to this program.
fn library() -> anyhow::Result<PathBuf> {
    let path = match std::env::var_os("NVML_SIM_LIBRARY") {
        Some(path) => PathBuf::from(path),
        None => std::env::current_exe()?.with_file_name("libnvidia_ml_sim.so"),
    };
    if !path.exists() {
        bail!("{} does not exist; build it with `cargo build -p nvml-sim`", path.display());
    }
    Ok(path)
}
