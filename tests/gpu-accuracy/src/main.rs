//! Scores the accuracy of an exporter of GPU metrics against a simulated driver that knows the truth. See README.md in this folder.

mod amount;
mod exporter;
mod mapping;
mod node;
mod page;
mod run;
mod score;
mod table;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser, Subcommand};
use mapping::Mapping;
use run::Run;
use score::ExporterScores;
use world::{WORLDS, World};

/// Score the accuracy of an exporter of GPU metrics against simulated GPUs with known truth
#[derive(Parser)]
#[command(name = "gpu-accuracy", arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run an exporter in each world and print its scores
    Run(RunArgs),
    /// Print tables of the scores of several exporters, and where the first one is not the best
    Compare {
        /// Outputs of `gpu-accuracy run --json`
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// List the worlds
    Worlds,
}

#[derive(Args)]
#[command(after_help = EXAMPLES)]
struct RunArgs {
    /// Description of the exporter's page (TOML); README.md describes it, and `mappings/` has examples
    #[arg(long, value_name = "FILE")]
    mapping: PathBuf,
    /// World to run; repeatable [default: all]
    #[arg(long = "world", value_name = "NAME")]
    worlds: Vec<String>,
    /// Duration of the loads in each world
    #[arg(long = "for", value_name = "TIME", value_parser = humantime::parse_duration, default_value = "60s")]
    lasts: Duration,
    /// Scrape interval
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "1s")]
    interval: Duration,
    /// The program nvml-sim [default: next to this program]
    #[arg(long, value_name = "FILE")]
    nvml_sim: Option<PathBuf>,
    /// Print the scores as JSON instead of a table
    #[arg(long)]
    json: bool,
    /// The exporter's command. {port} stands for the port to listen on, {library} for the simulated libnvidia-ml.so.1, {root} for the
    /// folder with the files of container runtimes, {gpus} for the folder of the simulated GPUs, {containers} for a JSON file about the
    /// containers and their GPUs
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

const EXAMPLES: &str = "\
Needs root, to make cgroups. The library is also found by LD_LIBRARY_PATH.

Example:
  gpu-accuracy run --mapping mappings/gpu-sampler.toml -- \\
    gpu-sampler run --listen 127.0.0.1:{port} --nvml-lib {library} --path-rootfs {root}";

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Run(args) => run(&args),
        Verb::Compare { files } => compare(&files),
        Verb::Worlds => {
            WORLDS.iter().for_each(|world| println!("{:12} {}", world.name, world.about));
            Ok(())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gpu-accuracy: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn compare(files: &[PathBuf]) -> Result<()> {
    let read = |file: &PathBuf| -> Result<ExporterScores> {
        let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
        serde_json::from_str(&text).with_context(|| format!("{}: not the output of `gpu-accuracy run --json`", file.display()))
    };
    let all = files.iter().map(read).collect::<Result<Vec<_>>>()?;
    let how = |scores: &ExporterScores| (scores.seconds, scores.interval_seconds, scores.version.clone());
    if let Some((file, _)) = files.iter().zip(&all).find(|(_, scores)| how(scores) != how(&all[0])) {
        bail!(
            "{} and {} differ in duration, interval or version, so they cannot be compared",
            files[0].display(),
            file.display()
        );
    }
    print!("{}", table::compared(&all));
    Ok(())
}

fn chosen(names: &[String]) -> Result<Vec<&'static World>> {
    if names.is_empty() {
        return Ok(WORLDS.iter().collect());
    }
    let find = |name: &String| WORLDS.iter().find(|world| world.name == name);
    names
        .iter()
        .map(|name| find(name).with_context(|| format!("there is no world {name}; `gpu-accuracy worlds` lists them")))
        .collect()
}

fn run(args: &RunArgs) -> Result<()> {
    if args.lasts < Duration::from_secs(20) {
        bail!("--for {:?} is too short to score anything; give at least 20s", args.lasts);
    }
    if args.interval < Duration::from_millis(100) || args.interval > args.lasts / 4 {
        bail!("--interval has to be from 100ms to a quarter of --for");
    }
    let sim = match &args.nvml_sim {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name("nvml-sim"),
    };
    if !sim.exists() {
        bail!("{} does not exist; name the program with --nvml-sim", sim.display());
    }
    let mapping = Mapping::read(&args.mapping)?;
    let of_world = Run { command: &args.command, mapping: &mapping, interval: args.interval, lasts: args.lasts };
    node::catch_signals();
    let mut worlds = Vec::new();
    for world in chosen(&args.worlds)? {
        eprintln!("gpu-accuracy: {}: {}", world.name, world.about);
        worlds.push(of_world.score(&sim, world).with_context(|| format!("world {}", world.name))?);
    }
    let scores = ExporterScores {
        exporter: mapping.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        seconds: args.lasts.as_secs_f64(),
        interval_seconds: args.interval.as_secs_f64(),
        worlds,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&scores)?);
    } else {
        print!("{}", table::of_exporter(&scores));
    }
    Ok(())
}
