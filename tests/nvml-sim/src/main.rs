//! The simulator's command: makes worlds, declares loads, faults and XIDs, lets short processes live, tells the truth.

mod arguments;
mod child;
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
use nvidia_ml_sim::{loads, symbols, time, world};

#[derive(Parser)]
#[command(name = "nvml-sim", about = "Simulated NVIDIA GPUs with ground truth", arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Make simulated GPUs in a folder
    Init {
        #[arg(long)]
        dir: PathBuf,
        /// How many GPUs; with --world only when the file names none
        #[arg(long)]
        gpus: Option<usize>,
        /// Settings (TOML); README.md of this package lists the keys
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
    },
    /// Start a process and load the GPU with it from its first instant
    Run {
        #[command(flatten)]
        load: Demand,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Let many short processes live in cgroups, each loading a GPU from its first instant; prints them as JSON lines
    Lives(lives::Lives),
    /// Wait to be killed: what `lives --launch` runs in its processes
    #[command(hide = true)]
    Rest,
    /// Let something go wrong from now on
    Fault(FaultArgs),
    /// Let a GPU report an XID now
    Xid {
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        gpu: usize,
        #[arg(long)]
        xid: u64,
        /// How often at once
        #[arg(long, default_value_t = 1)]
        count: u64,
    },
    /// Print what really happened, as JSON
    Truth {
        #[arg(long)]
        dir: PathBuf,
        /// RFC 3339; from the world's begin when left out
        #[arg(long, value_parser = time::parse)]
        from: Option<u64>,
        #[arg(long, value_parser = time::parse)]
        to: Option<u64>,
        /// Every sample the driver recorded, instead of the timeline's sums
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
    /// Part of the GPU it wants, above 0 and up to 1; may be left out when it wants another engine, or memory alone
    #[arg(long, value_parser = demand)]
    demand: Option<f64>,
    /// Demands that follow each other from its begin on, such as 1.0:20s,0:10s; begun anew at the end, unless the last has no duration
    #[arg(long, value_name = "DEMAND:FOR,..", value_parser = steps, conflicts_with = "demand")]
    demands: Option<Steps>,
    /// The demands count from then on, instead of from the load's begin; until then it wants the first. RFC 3339
    #[arg(long, value_parser = time::parse, requires = "demands")]
    since: Option<u64>,
    /// GPU memory it holds, such as 2GiB or 512MiB
    #[arg(long, value_parser = bytes, default_value = "0")]
    mem: u64,
    #[command(flatten)]
    ways: ways::Options,
}

#[derive(clap::Args)]
struct FaultArgs {
    #[arg(long)]
    dir: PathBuf,
    /// Index of the GPU; all when left out
    #[arg(long)]
    gpu: Option<usize>,
    #[arg(long, required_unless_present = "clear")]
    kind: Option<FaultKind>,
    /// Only this call, such as nvmlDeviceGetSamples; every call on the device when left out
    #[arg(long, value_name = "SYMBOL")]
    call: Option<String>,
    /// What the calls answer, such as GPU_IS_LOST
    #[arg(long, value_parser = faults::error)]
    error: Option<u32>,
    /// By how much the calls are slower
    #[arg(long, default_value_t = 0)]
    micros: u64,
    /// Why clocks are held down: sw_power_cap, hw_thermal and others, with commas between
    #[arg(long, value_parser = faults::reasons)]
    reasons: Option<u64>,
    /// With reasons: the SM clock is at most this
    #[arg(long)]
    mhz: Option<u32>,
    /// With reasons: the power limit, and power is at most this
    #[arg(long)]
    watts: Option<u32>,
    /// With reasons: the temperature is at least this
    #[arg(long)]
    celsius: Option<u32>,
    /// End after this long, such as 5s; for ever when left out
    #[arg(long = "for", value_parser = time::span)]
    lasts: Option<Duration>,
    /// End what is in force, on this GPU and of this kind where given
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
        Verb::Load { pid, load, lasts } => {
            check(&load)?;
            hold::load(&load.dir, declared(&load, pid)?, lasts).map(|()| 0)
        }
        Verb::Run { load, command } => {
            check(&load)?;
            hold::run(&load, &command)
        }
        Verb::Lives(asked) => lives::run(&asked).map(|()| 0),
        Verb::Rest => child::rest(),
        Verb::Fault(asked) => fault(asked).map(|()| 0),
        Verb::Xid { dir, gpu, xid, count } => {
            known(&dir, gpu)?;
            loads::Log::open(&dir)?.xid(gpu, xid, count).map(|_| 0)
        }
        Verb::Truth { dir, from, to, samples } => truth::print(&dir, from, to, samples).map(|()| 0),
    }
}

fn check(load: &Demand) -> anyhow::Result<()> {
    load.ways.check(&load.dir, &world::World::read(&load.dir)?, load.gpu, "--gpu")
}

fn declared(load: &Demand, pid: u32) -> anyhow::Result<loads::Load> {
    let start_time = loads::start_time(pid).with_context(|| format!("--pid {pid}: there is no such process"))?;
    let steps = load.demands.clone().map(|steps| steps.0).unwrap_or_default();
    let most = steps.iter().map(|step| step.demand).reduce(f64::max);
    let (gpu, demand, memory_bytes) = (load.gpu, load.demand.or(most).unwrap_or(0.0), load.mem);
    let ways = loads::Ways { steps, steps_from_us: load.since, ..load.ways.ways(demand > 0.0 || memory_bytes > 0)? };
    Ok(loads::Load { id: 0, pid, start_time, gpu, demand, memory_bytes, begin_us: 0, end_us: None, ways })
}

fn known(dir: &Path, gpu: usize) -> anyhow::Result<()> {
    let gpus = world::World::read(dir)?.gpus.len();
    if gpu >= gpus {
        bail!("--gpu {gpu}: {} has {gpus} GPUs, numbered from 0", dir.display());
    }
    Ok(())
}

fn fault(asked: FaultArgs) -> anyhow::Result<()> {
    asked.gpu.map_or(Ok(()), |gpu| known(&asked.dir, gpu))?;
    let mut log = loads::Log::open(&asked.dir)?;
    if asked.clear {
        return log.clear(Clear { gpu: asked.gpu, kind: asked.kind, at_us: 0 }).map(|_| ());
    }
    let kind = asked.kind.context("--kind is missing")?;
    let (error, reasons) = (asked.error.unwrap_or(0), asked.reasons.unwrap_or(0));
    let (gpu, call, micros_) = (asked.gpu, asked.call, asked.micros);
    let held = Held { mhz: asked.mhz, watts: asked.watts, celsius: asked.celsius };
    let fault = Fault { gpu, call, error, micros: micros_, reasons, held, ..Fault::of_kind(kind) };
    let fault = faults::checked(fault).map_err(anyhow::Error::msg)?;
    log.fault(fault, asked.lasts.map(micros)).map(|_| ())
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
        bail!("--gpus differs from the {} GPUs that the --world file names; leave it out", world.gpus.len());
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
    let devices = dir.join(world::DEVICES);
    fs::create_dir_all(&devices).with_context(|| devices.display().to_string())?;
    for node in world.nodes(dir, None) {
        fs::write(&node, "").with_context(|| node.display().to_string())?;
    }
    fs::write(dir.join(loads::FILE), "").with_context(|| dir.display().to_string())?;
    fs::write(dir.join(world::FILE), toml::to_string(&world)?).with_context(|| dir.display().to_string())
}

/// How long the machine has been up.
fn up_us() -> u64 {
    let up = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = up.split_whitespace().next().and_then(|s| s.parse::<f64>().ok()).unwrap_or(0.0);
    (seconds * 1e6) as u64
}

/// What NVML_SIM_LIBRARY names, or what cargo put beside this program.
fn library() -> anyhow::Result<PathBuf> {
    let path = match std::env::var_os("NVML_SIM_LIBRARY") {
        Some(path) => PathBuf::from(path),
        None => std::env::current_exe()?.with_file_name("libnvidia_ml_sim.so"),
    };
    if !path.exists() {
        bail!("{} is not there; build it with `cargo build -p nvml-sim`", path.display());
    }
    Ok(path)
}
