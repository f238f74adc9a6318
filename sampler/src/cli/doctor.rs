//! `doctor`: tries what the agent would try, and says what came of it. It leaves nothing behind: programs are loaded, attached
//! and dropped again.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use sampler_core::units::BootNs;
use serde::Serialize;

use super::ask::{self, AgentResponse};
use super::runtimes;
use crate::cli::output::{print, wrapped};
use crate::config::{Config, KernelMode, Settings};
use crate::error::display_chain;
use crate::observe::gpu;
use crate::observe::kernel::layout::{Layout, REMEDY, layout};
use crate::observe::kernel::probe::{self, Chosen};
use crate::observe::kernel::{KernelError, Mode, Tracker, cgroupfs, pid_namespace, scan};

/// The agent takes two; others on the machine take some.
const FEWEST_INSTANCES: u64 = 16;
/// One for each where eBPF cannot be had, and room for those to come.
const WATCHES_A_CGROUP: u64 = 2;
/// Where details begin.
const INDENT: usize = 25;

#[derive(Args)]
pub struct Doctor {
    /// Configuration file (TOML) that the agent would be started with
    #[arg(long, value_name = "FILE", env = "GPU_SAMPLER_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckStatus {
    Ok,
    /// Not about the agent; somebody else has trouble with it, or will.
    Warning,
    /// The agent runs, and knows less.
    Degraded,
    /// The agent does not start, or has nothing to do.
    Failed,
}

#[derive(Debug, Serialize)]
pub struct Check {
    name: &'static str,
    status: CheckStatus,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Check {
    pub fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, status: CheckStatus::Ok, detail: detail.into(), remedy: None }
    }

    pub fn bad(name: &'static str, status: CheckStatus, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, status, detail: detail.into(), remedy: Some(remedy.into()) }
    }
}

#[derive(Serialize)]
struct Report {
    can_run: bool,
    /// As in `gpu_sampler_kernel_mode`; null when the agent does not start.
    kernel_mode: Option<&'static str>,
    checks: Vec<Check>,
}

impl Doctor {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let report = match self.settings.validate(self.config.as_deref()) {
            Ok(config) => examine(&config),
            // Who reads JSON wants this as JSON too.
            Err(error) if self.json => {
                let remedy = "`gpu-sampler config --default` prints every key";
                let checks = vec![Check::bad("configuration", CheckStatus::Failed, display_chain(&error), remedy)];
                Report { can_run: false, kernel_mode: None, checks }
            }
            Err(error) => return Err(error.into()),
        };
        let out = if self.json { format!("{}\n", serde_json::to_string_pretty(&report)?) } else { text(&report) };
        print(&out)?;
        Ok(if report.can_run { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn examine(config: &Config) -> Report {
    let layout = layout(&config.path_procfs);
    let chosen = probe::choose(config.kernel_mode, &layout, &config.btf(), config.kernel_ring_bytes);
    let mode = chosen.as_ref().ok().map(|c| c.tracker.mode());
    let kernel_mode = mode.map(Mode::name);
    let mut checks = vec![kernel_version(config), pid_namespace(), cgroups(&layout, mode), processes(config, &layout)];
    checks.extend(kernel(chosen, config.kernel_mode));
    let cgroups = count_cgroups(&layout);
    checks.push(inotify(&config.path_procfs, cgroups));
    checks.extend(driver(config));
    checks.extend(runtimes::checks(config, &layout));
    checks.push(address(config));
    let can_run = checks.iter().all(|c| c.status != CheckStatus::Failed);
    Report { can_run, kernel_mode, checks }
}

fn kernel_version(config: &Config) -> Check {
    let read = |name: &str| std::fs::read_to_string(config.path_procfs.join("sys/kernel").join(name));
    match (read("osrelease"), read("pid_max")) {
        (Ok(release), Ok(pid_max)) => Check::ok("kernel", format!("Linux {}, pids up to {}", release.trim(), pid_max.trim())),
        (Err(error), _) | (_, Err(error)) => {
            let path = config.path_procfs.display();
            Check::bad("kernel", CheckStatus::Failed, format!("{path}: {error}"), "give the host's /proc with --path-procfs")
        }
    }
}

fn pid_namespace() -> Check {
    match pid_namespace::problem() {
        None => Check::ok("pid namespace", "the host's"),
        // It would start, and attribute nothing.
        Some(problem) => Check::bad("pid namespace", CheckStatus::Failed, problem, "nothing else helps"),
    }
}

fn cgroups(layout: &Layout, mode: Option<Mode>) -> Check {
    let mounts: Vec<String> = layout
        .mounts()
        .map(|(hierarchy, mount)| match &layout.v1 {
            Some((controller, id, _)) if *id == hierarchy => format!("v1 {controller} on {}", mount.display()),
            _ => format!("v2 on {}", mount.display()),
        })
        .collect();
    if let Some(problem) = layout.problem() {
        // Kernel events carry ids; without them everything hangs on paths.
        let usable = !mounts.is_empty() && mode == Some(Mode::RawTracepoint);
        let status = if usable { CheckStatus::Degraded } else { CheckStatus::Failed };
        return Check::bad("cgroups", status, problem, REMEDY);
    }
    Check::ok("cgroups", format!("{}: {}", layout.name(), mounts.join(", ")))
}

fn count_cgroups(layout: &Layout) -> usize {
    let mut count = 0;
    for (hierarchy, mount) in layout.mounts() {
        // Those that cannot be seen are told of by other checks.
        let _all = cgroupfs::walk(hierarchy, mount, BootNs(0), &mut |_, _| {}, &mut |_, _| count += 1);
    }
    count
}

fn processes(config: &Config, layout: &Layout) -> Check {
    let found = scan::of_proc(&config.path_procfs, layout);
    let count = |wanted: fn(&sampler_core::observation::Observation) -> bool| found.facts.iter().filter(|f| wanted(f)).count();
    let processes = count(|f| matches!(f, sampler_core::observation::Observation::ProcessSeen(_)));
    let cgroups = count(|f| matches!(f, sampler_core::observation::Observation::Cgroup(_)));
    let ms = found.end.ended.saturating_since(found.end.began) / 1_000_000;
    if processes == 0 {
        return Check::bad("processes", CheckStatus::Failed, "none can be seen", "give the host's /proc with --path-procfs");
    }
    let summary = format!("{processes} processes and {cgroups} cgroups scanned in {ms} ms");
    match found.problems.as_slice() {
        [] => Check::ok("processes", summary),
        [first, ..] => {
            let detail = format!("{summary}; {} could not be read, such as {first}", found.problems.len());
            let remedy = "where permission is denied: run as root, or with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH";
            Check::bad("processes", CheckStatus::Degraded, detail, remedy)
        }
    }
}

fn kernel(chosen: Result<Chosen, KernelError>, wanted: KernelMode) -> Vec<Check> {
    const NAME: &str = "kernel events";
    let Chosen { tracker, refused } = match chosen {
        Ok(chosen) => chosen,
        Err(error) => {
            let remedy = "mend that, or set kernel_mode to auto";
            return vec![Check::bad(NAME, CheckStatus::Failed, display_chain(&error), remedy)];
        }
    };
    let mode = tracker.mode();
    let mut checks: Vec<Check> = refused
        .into_iter()
        .map(|(mode, error)| {
            let name = if mode == Mode::RawTracepoint { "eBPF" } else { "inotify" };
            Check::bad(name, CheckStatus::Degraded, display_chain(&error), "until then the next best mode is used")
        })
        .collect();
    checks.push(match tracker {
        Tracker::RawTracepoint(_) => {
            let detail = "mode raw_tracepoint: the eBPF programs load, their self-check agrees, they attach";
            Check::ok(NAME, detail)
        }
        _ => {
            let detail = format!("mode {}: {}", mode.name(), mode.gives_up());
            let remedy = if wanted == KernelMode::Auto { "make eBPF work, as said above" } else { "leave kernel_mode out" };
            Check::bad(NAME, CheckStatus::Degraded, detail, format!("{remedy}: mode raw_tracepoint knows all of it"))
        }
    });
    checks
}

/// Limits on what the agent watches with.
fn inotify(procfs: &Path, cgroups: usize) -> Check {
    let read = |name: &str| -> Option<u64> {
        let path: PathBuf = procfs.join("sys/fs/inotify").join(name);
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    let (Some(instances), Some(watches)) = (read("max_user_instances"), read("max_user_watches")) else {
        let remedy = "give the host's /proc with --path-procfs";
        return Check::bad("inotify", CheckStatus::Degraded, "its limits cannot be read", remedy);
    };
    let detail = format!("{instances} instances and {watches} watches a user");
    // One for sockets, one for cgroups where eBPF cannot be had; room for those to come.
    if instances < FEWEST_INSTANCES || watches < WATCHES_A_CGROUP * cgroups as u64 {
        let remedy = "raise fs.inotify.max_user_instances and fs.inotify.max_user_watches";
        return Check::bad("inotify", CheckStatus::Degraded, format!("{detail}, and there are {cgroups} cgroups"), remedy);
    }
    Check::ok("inotify", detail)
}

fn driver(config: &Config) -> Vec<Check> {
    const NAME: &str = "NVIDIA driver";
    let inspected = match gpu::inspect(config) {
        Ok(inspected) => inspected,
        // A library named on purpose and unusable keeps the agent from starting; a missing one is waited for.
        Err(error) => {
            let failed = config.nvml_lib.is_some() && !matches!(error, gpu::GpuError::Hangs);
            let status = if failed { CheckStatus::Failed } else { CheckStatus::Degraded };
            let remedy = if failed { "mend the path, or leave --nvml-lib out" } else { "nothing is sampled until then" };
            return vec![Check::bad(NAME, status, display_chain(&error), remedy)];
        }
    };
    let gpus = match inspected.gpus.len() {
        1 => "1 GPU".into(),
        n => format!("{n} GPUs"),
    };
    let mut checks = vec![Check::ok(NAME, format!("version {}, {}", inspected.version, gpus))];
    checks.extend(inspected.gpus.into_iter().map(|(what, remedy)| match remedy {
        None => Check::ok("GPU", what),
        Some(remedy) => Check::bad("GPU", CheckStatus::Degraded, what, remedy),
    }));
    checks.push(match inspected.pid_space {
        (what, None) => Check::ok("driver's pids", what),
        (what, Some(remedy)) => Check::bad("driver's pids", CheckStatus::Degraded, what, remedy),
    });
    checks
}

/// Free, or an agent's already.
fn address(config: &Config) -> Check {
    let listen = config.listen;
    let error = match std::net::TcpListener::bind(listen) {
        Ok(_) => return Check::ok("address", format!("{listen} is free")),
        Err(error) => error,
    };
    let agent = (error.kind() == std::io::ErrorKind::AddrInUse).then(|| running(config)).flatten();
    match agent {
        Some(said) => Check::ok("address", format!("an agent serves at {listen} already: {said}")),
        None => {
            let remedy = "a hung agent, or somebody else: `ss -ltnp` shows who listens there; or choose a free one with --listen";
            Check::bad("address", CheckStatus::Failed, format!("{listen}: {error}"), remedy)
        }
    }
}

/// What a running agent says of itself.
fn running(config: &Config) -> Option<String> {
    let mut at = config.listen;
    if at.ip().is_unspecified() {
        at.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
    }
    let Ok(AgentResponse::Found(page)) = ask::get(&format!("http://{at}"), "/metrics", config.token.as_deref(), "") else {
        return None;
    };
    let page = String::from_utf8_lossy(&page).into_owned();
    let mode = page.lines().find_map(|line| line.strip_prefix("gpu_sampler_kernel_mode{mode=\"")?.split('"').next())?;
    let total = |family: &str| {
        let ours = page.lines().filter(|line| line.starts_with(family));
        ours.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>()
    };
    let (lost, resyncs) = (total("gpu_sampler_kernel_events_lost_total"), total("gpu_sampler_resyncs_total"));
    Some(format!("mode {mode}, {lost} kernel events lost, {resyncs} resyncs"))
}

fn text(report: &Report) -> String {
    let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let paint = |status: CheckStatus| {
        let (word, colour) = match status {
            CheckStatus::Ok => ("ok      ", 32),
            CheckStatus::Warning => ("warning ", 35),
            CheckStatus::Degraded => ("degraded", 33),
            CheckStatus::Failed => ("failed  ", 31),
        };
        if colours { format!("\x1b[{colour}m{word}\x1b[0m") } else { word.to_owned() }
    };
    let mut out = String::new();
    for check in &report.checks {
        out += &wrapped(&format!("{}  {:<14} ", paint(check.status), check.name), INDENT, &check.detail);
        if let Some(remedy) = &check.remedy {
            out += &wrapped(&format!("{:INDENT$}-> ", ""), INDENT + 3, remedy);
        }
    }
    let degraded = report.checks.iter().any(|c| c.status == CheckStatus::Degraded);
    out += match (report.can_run, degraded) {
        (true, false) => "\nThe agent can run here.\n",
        (true, true) => "\nThe agent can run here, with less than it could know.\n",
        (false, _) => "\nThe agent cannot do its work here.\n",
    };
    out
}
