//! The command of the simulated CUDA driver: installs it, runs processes that use it, prints the truth of their waiting.

mod driver;
mod ended_thread;
mod install;
mod pace;
mod truth;
mod work;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use nvidia_ml_sim::time;

#[derive(Parser)]
#[command(
    name = "cuda-work",
    about = "Processes that use a simulated CUDA driver, with ground truth of waiting",
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Put the library into the folder of a world that `nvml-sim init` created
    Install {
        #[arg(long)]
        dir: PathBuf,
        /// Longest time that a process has the GPU while others wait; default: 2ms
        #[arg(long, value_parser = time::span)]
        slice: Option<Duration>,
    },
    /// Use a GPU for some time, then print what was done as JSON
    Run(work::Options),
    /// Print how long each process waited and which processes were on the GPU meanwhile, as JSON
    Truth {
        #[arg(long)]
        dir: PathBuf,
        /// RFC 3339; default: all
        #[arg(long, value_parser = time::parse)]
        from: Option<u64>,
        #[arg(long, value_parser = time::parse)]
        to: Option<u64>,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cuda-work: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> anyhow::Result<()> {
    match verb {
        Verb::Install { dir, slice } => install::install(&dir, slice),
        Verb::Run(options) => work::run(&options),
        Verb::Truth { dir, from, to } => truth::print(&dir, from, to),
    }
}
