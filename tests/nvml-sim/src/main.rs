//! The simulator's command: makes worlds, declares loads, lets short processes live, tells the truth.

mod child;
mod hold;
mod lives;
mod truth;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand};
use nvidia_ml_sim::{loads, time, world};

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
        #[arg(long = "for", value_parser = duration)]
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
    /// Part of the GPU it wants, above 0 and up to 1
    #[arg(long, value_parser = demand)]
    demand: f64,
    /// GPU memory it holds, such as 2GiB or 512MiB
    #[arg(long, value_parser = bytes, default_value = "0")]
    mem: u64,
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
        Verb::Truth { dir, from, to, samples } => truth::print(&dir, from, to, samples).map(|()| 0),
    }
}

fn check(load: &Demand) -> anyhow::Result<()> {
    let gpus = world::World::read(&load.dir)?.gpus.len();
    if load.gpu >= gpus {
        bail!("--gpu {}: {} has {gpus} GPUs, numbered from 0", load.gpu, load.dir.display());
    }
    Ok(())
}

fn declared(load: &Demand, pid: u32) -> anyhow::Result<loads::Load> {
    let start_time = loads::start_time(pid).with_context(|| format!("--pid {pid}: there is no such process"))?;
    let (gpu, demand, memory_bytes) = (load.gpu, load.demand, load.mem);
    Ok(loads::Load { id: 0, pid, start_time, gpu, demand, memory_bytes, begin_us: 0, end_us: None })
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
    let lib = dir.join("lib");
    fs::create_dir_all(&lib).with_context(|| lib.display().to_string())?;
    let library = library()?;
    fs::copy(&library, lib.join("libnvidia-ml.so.1")).with_context(|| library.display().to_string())?;
    fs::write(dir.join(loads::FILE), "").with_context(|| dir.display().to_string())?;
    fs::write(dir.join(world::FILE), toml::to_string(&world)?).with_context(|| dir.display().to_string())
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

fn number(text: &str) -> (Option<f64>, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    (text[..end].parse().ok(), &text[end..])
}

fn demand(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|d| *d > 0.0 && *d <= 1.0).ok_or_else(|| "a demand is above 0 and at most 1".into())
}

fn bytes(text: &str) -> Result<u64, String> {
    let shift = match number(text).1 {
        "" => Some(0),
        "KiB" => Some(10),
        "MiB" => Some(20),
        "GiB" => Some(30),
        _ => None,
    };
    let bytes = number(text).0.zip(shift).map(|(n, shift)| n * f64::from(1u32 << shift));
    bytes.map(|b| b as u64).ok_or_else(|| "give bytes, or a number with KiB, MiB or GiB".into())
}

fn duration(text: &str) -> Result<Duration, String> {
    let factor = match number(text).1 {
        "s" => Some(1.0),
        "ms" => Some(0.001),
        "m" => Some(60.0),
        _ => None,
    };
    let seconds = number(text).0.zip(factor).map(|(n, factor)| n * factor);
    seconds.and_then(|s| Duration::try_from_secs_f64(s).ok()).ok_or_else(|| "give a duration such as 5s, 500ms or 1m".into())
}

fn durations(text: &str) -> Result<(Duration, Duration), String> {
    let (from, to) = text.split_once("..").ok_or("give two durations such as 5ms..50ms")?;
    let (from, to) = (duration(from)?, duration(to)?);
    if from > to { Err("give it from the shorter to the longer, such as 5ms..50ms".into()) } else { Ok((from, to)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(bytes("2GiB"), Ok(2 << 30));
        assert_eq!(bytes("1.5MiB"), Ok(3 << 19));
        assert_eq!(bytes("17"), Ok(17));
        assert!(bytes("2GB").is_err() && bytes("").is_err());
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert!(duration("5").is_err());
        let ms = Duration::from_millis;
        assert_eq!(durations("5ms..50ms"), Ok((ms(5), ms(50))));
        assert_eq!(durations("0.5s..0.5s"), Ok((ms(500), ms(500))));
        for wrong in ["", "5ms", "..", "5ms..", "..5ms", "5..50ms", "5ms...50ms", "5ms..50ms..60ms"] {
            assert!(durations(wrong).is_err(), "{wrong}");
        }
        assert!(durations("50ms..5ms").is_err_and(|e| e.contains("from the shorter to the longer")));
        assert!(demand("0").is_err() && demand("1.1").is_err() && demand("x").is_err());
        assert_eq!(demand("0.6"), Ok(0.6));
    }
}
