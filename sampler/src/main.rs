//! gpu-sampler: which container used which GPU, when. Parses, dispatches, prints the error chain.

mod agent;
mod cli;
mod config;
mod export;
mod health;
mod labels;
mod observe;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    match cli::Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gpu-sampler: {error:#}");
            ExitCode::FAILURE
        }
    }
}
