//! The commands. Exit codes: 0 success, 1 failure, 2 usage error (as clap has it).

mod access;
mod agent_args;
mod client;
mod doctor;
mod experiment;
mod explain;
mod fleet;
mod health;
mod holders;
mod journal;
mod output;
mod packaging;
mod record;
mod release;
mod report;
mod request;
mod runtimes;
mod sample;
mod session_files;
mod text;
mod top;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory as _, Parser, Subcommand};

use self::output::{log, print};
use crate::agent;
use crate::config::{REFERENCE, Settings};
use crate::freeze::{GuardOptions, run_guard};
use crate::reload::SettingsSource;
use crate::serving::sockets::{self, COMMAND};

/// Attribute GPU time to containers and export it as Prometheus metrics
#[derive(Parser)]
#[command(name = "gpu-sampler", version, about, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the node agent: track containers, sample GPUs, serve /metrics
    Run(Run),
    /// Record a session of GPU usage, optionally including the time before the command
    Record(Box<record::Record>),
    /// Report the GPU usage and contention of a recorded session or of a fleet's sessions, or compare two sessions
    Report(report::ReportArgs),
    /// Freeze a suspect at random times and report whether the victim received more GPU time meanwhile
    Experiment(Box<experiment::ExperimentArgs>),
    /// Freeze a cgroup on request and thaw it when the command ends
    #[command(hide = true, name = "freeze-guard")]
    FreezeGuard(GuardOptions),
    /// Show live GPU usage and contention of a running agent
    Top(top::Top),
    /// Close all handles of GPUs for a while, so that they can be reset, partitioned or unbound
    Release(release::ReleaseArgs),
    /// Check whether an agent responds; exit 1 if it does not
    Health(health::HealthArgs),
    /// Explain which container a process, cgroup or sample belongs to, and where its labels come from
    Explain(Box<explain::Explain>),
    /// Check kernel, driver, runtimes and permissions, with remedies; exit 1 if the agent cannot run
    Doctor(doctor::Doctor),
    /// Print the commented configuration reference, or validate a file
    Config(Config),
    /// Print the completion script of a shell
    Completions(packaging::Completions),
    /// Make sockets in network namespaces for an agent, which starts this itself
    #[command(name = COMMAND, hide = true)]
    EngineSockets(SocketHelper),
    /// Print the manual page of this program, or write the pages of it and of all its commands
    Man(packaging::ManArgs),
}

#[derive(Args)]
struct Run {
    /// Configuration file (TOML); print one with `gpu-sampler config --default`
    #[arg(long, value_name = "FILE", env = "GPU_SAMPLER_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Args)]
struct SocketHelper {
    /// Refuse all other system calls
    #[arg(long, action = clap::ArgAction::Set, default_value_t = true)]
    seccomp: bool,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Config {
    /// Print all keys with their defaults
    #[arg(long)]
    default: bool,
    /// Validate a file; if it is invalid, print the reason and exit 1
    #[arg(long, value_name = "FILE")]
    check: Option<PathBuf>,
}

impl Cli {
    /// The exit code, unless the command fails with an error.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Run(run) => {
                log("info");
                agent::run(SettingsSource { settings: run.settings, file: run.config })?;
            }
            Command::Record(record) => return record.run(),
            Command::Report(report) => return report.run(),
            Command::Experiment(experiment) => return experiment.run(),
            Command::FreezeGuard(options) => run_guard(&options)?,
            Command::Top(top) => top.run()?,
            Command::Release(release) => release.run()?,
            Command::Health(health) => health.run()?,
            Command::Explain(explain) => explain.run()?,
            Command::Doctor(doctor) => {
                log("error");
                return doctor.run();
            }
            Command::Config(Config { check: Some(file), .. }) => {
                Settings::default().validate(Some(&file))?.check_security()?;
                print(&format!("{}: valid\n", file.display()))?;
            }
            Command::Config(_) => print(REFERENCE)?,
            Command::EngineSockets(helper) => sockets::help(helper.seccomp)?,
            Command::Completions(completions) => completions.run(Self::command())?,
            Command::Man(man) => man.run(Self::command())?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
