//! The verbs. Exit codes: 0 done, 1 failed, 2 usage (clap's own).

use std::io::IsTerminal as _;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::agent;
use crate::config::{REFERENCE, Settings};

/// Which container used which GPU, when.
#[derive(Parser)]
#[command(version, about, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// The node agent: follows containers, samples the GPUs, serves /metrics
    Run(Run),
    /// Prints the commented reference of the configuration, or checks a file
    Config(Config),
}

#[derive(Args)]
struct Run {
    /// Configuration file (TOML); `gpu-sampler config --default` prints one
    #[arg(long, value_name = "FILE", env = "GPU_SAMPLER_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Config {
    /// Print every key with its default
    #[arg(long)]
    default: bool,
    /// Validate a file; exit 1 and the reason when it is wrong
    #[arg(long, value_name = "FILE")]
    check: Option<PathBuf>,
}

impl Cli {
    pub fn run(self) -> anyhow::Result<()> {
        match self.verb {
            Verb::Run(run) => {
                log();
                agent::run(run.settings.validate(run.config.as_deref())?)
            }
            Verb::Config(Config { check: Some(file), .. }) => {
                Settings::default().validate(Some(&file))?;
                println!("{}: valid", file.display());
                Ok(())
            }
            Verb::Config(_) => {
                print!("{REFERENCE}");
                Ok(())
            }
        }
    }
}

/// To stderr; RUST_LOG chooses, colours only on a terminal and without NO_COLOR.
fn log() {
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
}
