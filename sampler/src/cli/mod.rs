//! The verbs. Exit codes: 0 done, 1 failed, 2 usage (clap's own).

mod ask;
mod client;
mod doctor;
mod explain;
mod output;
mod record;
mod report;
mod runtimes;
mod sample;
mod top;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use self::output::{log, print};
use crate::agent;
use crate::config::{REFERENCE, Settings};

/// Which container used which GPU, when, and whom did it keep waiting
#[derive(Parser)]
#[command(name = "gpu-sampler", version, about, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// The node agent: follows containers, samples the GPUs, serves /metrics
    Run(Run),
    /// Records a session: who uses which GPU, for a while, with what was before
    Record(Box<record::Record>),
    /// What a recorded session says: who used which GPU, with whom, and whom that kept waiting; two sessions are compared
    Report(report::ReportArgs),
    /// Who uses which GPU now, how much, and whom that keeps waiting: a live view of a running agent
    Top(top::Top),
    /// Which container a process or a cgroup belongs to, and how that is known
    Explain(explain::Explain),
    /// What works on this machine, what does not, and the remedy; exit 1 when the agent cannot do its work
    Doctor(doctor::Doctor),
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
    /// The exit code, where it is not an error's.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self.verb {
            Verb::Run(run) => {
                log("info");
                agent::run(run.settings.validate(run.config.as_deref())?)?;
            }
            Verb::Record(record) => return record.run(),
            Verb::Report(report) => return report.run(),
            Verb::Top(top) => top.run()?,
            Verb::Explain(explain) => explain.run()?,
            Verb::Doctor(doctor) => {
                log("error");
                return doctor.run();
            }
            Verb::Config(Config { check: Some(file), .. }) => {
                Settings::default().validate(Some(&file))?;
                print(&format!("{}: valid\n", file.display()))?;
            }
            Verb::Config(_) => print(REFERENCE)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}
