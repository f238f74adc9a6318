//! The verbs. Exit codes: 0 done, 1 failed, 2 usage (clap's own).

mod ask;
mod client;
mod doctor;
mod explain;
mod record;
mod report;
mod runtimes;
mod sample;
mod top;

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

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

/// To stdout. A reader that has seen enough is no failure; a full disk is.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("cannot write to standard output"),
        _ => Ok(()),
    }
}

/// `head`, which takes `indent` columns, then the text: broken into lines on a terminal, whole elsewhere.
fn wrapped(head: &str, indent: usize, text: &str) -> String {
    let width = terminal_size::terminal_size_of(std::io::stdout()).map_or(usize::MAX, |(width, _)| usize::from(width.0));
    // Narrower than this, every word would be a line.
    let room = width.saturating_sub(indent).max(24);
    let (mut out, mut column) = (head.to_owned(), 0);
    for word in harmless(text).split(' ') {
        let length = word.chars().count();
        if column > 0 && column + 1 + length > room {
            out += &format!("\n{:indent$}", "");
            column = 0;
        } else if column > 0 {
            out.push(' ');
            column += 1;
        }
        out += word;
        column += length;
    }
    out.push('\n');
    out
}

/// Names come from whoever runs containers: what would steer the terminal, or turn the text around, is shown, not sent.
fn harmless(text: &str) -> String {
    let steers = |c: char| {
        c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    text.chars().map(|c| if steers(c) { c.escape_default().to_string() } else { c.to_string() }).collect()
}

/// Colours are wanted on that stream: it is a terminal, and NO_COLOR is not set.
fn colours(is_terminal: bool) -> bool {
    is_terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// To stderr; RUST_LOG chooses, colours only on a terminal and without NO_COLOR.
fn log(default: &str) {
    let colours = colours(std::io::stderr().is_terminal());
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
}
