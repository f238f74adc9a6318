//! `doctor`: runs the agent's own startup steps as checks and reports the results. It leaves nothing behind: eBPF programs are loaded,
//! attached and dropped again.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use sampler_core::units::BootNs;
use serde::Serialize;

use super::access::AccessArgs;
use super::request::{self, AgentResponse, LIVE, document};
use super::runtimes;
use crate::cli::output::{self, print};
use crate::cli::text::{use_colours, wrapped};
use crate::config::{Config, KernelMode, Settings};
use crate::error::display_chain;
use crate::export::live::LiveDocument;
use crate::health::condition::{CGROUPS_REMEDY, PID_NAMESPACE_REMEDY};
use crate::objects::{Objects, StoreUrl};
use crate::observe::gpu::{self, Diagnosis, GpuError};
use crate::observe::kernel::layout::{Layout, layout};
use crate::observe::kernel::probe::{self, Chosen, KernelAccess};
use crate::observe::kernel::{KernelError, Mode, Tracker, cgroupfs, pid_namespace, scan};
use crate::privileges::{self, Restricted};

/// The agent needs two; other programs on the machine need some.
const LEAST_INSTANCES: u64 = 16;
/// One is needed where eBPF is unavailable; the other is reserve for cgroups that are created later.
const WATCHES_PER_CGROUP: u64 = 2;
/// Column at which details begin.
const INDENT: usize = 25;

#[derive(Args)]
pub struct Doctor {
    /// Configuration file (TOML) of the agent
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
    /// The agent is not affected, but another program is, or will be.
    Warning,
    /// The agent runs, but measures less than it could.
    Degraded,
    /// The agent does not start, or has nothing to measure.
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
    /// As in `gpu_sampler_kernel_mode`; null if the agent would not start.
    kernel_mode: Option<&'static str>,
    checks: Vec<Check>,
}

impl Doctor {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let report = match self.settings.validate(self.config.as_deref()) {
            Ok(config) => examine(&config),
            // With --json, a configuration error is reported as JSON, too.
            Err(error) if self.json => {
                let remedy = "correct the key or flag; `gpu-sampler config --default` prints all of them";
                let checks = vec![Check::bad("configuration", CheckStatus::Failed, display_chain(&error), remedy)];
                Report { can_run: false, kernel_mode: None, checks }
            }
            Err(error) => return Err(error.into()),
        };
        print(&if self.json { output::json(&report)? } else { text(&report) })?;
        Ok(if report.can_run { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn examine(config: &Config) -> Report {
    // As the agent runs.
    let restricted = privileges::restrict(config.kept_capabilities, config.seccomp);
    let layout = layout(&config.path_procfs);
    let access = KernelAccess {
        btf: &config.btf(),
        procfs: &config.path_procfs,
        sysfs: &config.path_sysfs,
        ring_bytes: config.kernel_ring_bytes,
    };
    let chosen = probe::choose(config.kernel_mode, &layout, &access);
    let mode = chosen.as_ref().ok().map(|c| c.tracker.mode());
    let kernel_mode = mode.map(Mode::name);
    let mut checks =
        vec![kernel_version(config), rights(&restricted), pid_namespace(), cgroups(&layout, mode), processes(config, &layout)];
    checks.extend(kernel(chosen, config.kernel_mode));
    let cgroups = count_cgroups(&layout);
    checks.push(inotify(&config.path_procfs, cgroups));
    checks.extend(driver(config));
    checks.extend(runtimes::checks(config, &layout));
    checks.push(credentials(config));
    checks.extend(config.session_store.clone().map(session_store));
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
            Check::bad("kernel", CheckStatus::Failed, format!("{path}: {error}"), "set --path-procfs to the host's /proc")
        }
    }
}

fn rights(restricted: &Restricted) -> Check {
    let missing: Vec<_> = privileges::missing(restricted.capabilities).collect();
    if missing.is_empty() {
        let filter = if restricted.has_filter { ", with a seccomp filter" } else { "" };
        return Check::ok("privileges", format!("{}{filter}", restricted.capabilities));
    }
    let names: Vec<String> = missing.iter().map(|needed| needed.capability.to_string()).collect();
    let mut without: Vec<&str> = missing.iter().map(|needed| needed.without).collect();
    without.dedup();
    let detail = format!("without {}: {}", names.join(", "), without.join("; "));
    Check::bad("privileges", CheckStatus::Degraded, detail, format!("run as root, or grant {}", names.join(", ")))
}

fn credentials(config: &Config) -> Check {
    if let Err(error) = config.check_security() {
        let remedy = "correct the file or the setting that is named; the agent does not start with it";
        return Check::bad("credentials", CheckStatus::Failed, display_chain(&error), remedy);
    }
    let sources = [("token file", &config.token_file), ("web configuration", &config.web_config_file)];
    let sources: Vec<&str> = sources.into_iter().filter_map(|(name, file)| file.as_ref().map(|_| name)).collect();
    let detail = match (sources.is_empty(), config.listen.ip().is_loopback()) {
        (false, _) => format!("by {}", sources.join(" and ")),
        (true, true) => "not needed on loopback".into(),
        (true, false) => "none: /metrics is open, everything else is closed".into(),
    };
    Check::ok("credentials", detail)
}

/// Lists the prefix: whether it can be written to is known with the first session.
fn session_store(url: StoreUrl) -> Check {
    const NAME: &str = "session store";
    let shown = url.to_string();
    let list = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let objects = Objects::open(url)?;
        anyhow::Ok(runtime.block_on(objects.list(""))?.len())
    };
    match list() {
        Ok(objects) => Check::ok(NAME, format!("{shown} has {objects} objects")),
        Err(error) => {
            let remedy = "correct session_store or its credentials; until then sessions stay in session_dir";
            Check::bad(NAME, CheckStatus::Degraded, display_chain(error.as_ref()), remedy)
        }
    }
}

fn pid_namespace() -> Check {
    match pid_namespace::problem() {
        None => Check::ok("pid namespace", "the host's"),
        // The agent would start, but attribute nothing.
        Some(problem) => Check::bad("pid namespace", CheckStatus::Failed, problem, PID_NAMESPACE_REMEDY),
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
        // Kernel events carry cgroup ids; the other modes depend on paths.
        let usable = !mounts.is_empty() && mode == Some(Mode::RawTracepoint);
        let status = if usable { CheckStatus::Degraded } else { CheckStatus::Failed };
        return Check::bad("cgroups", status, problem, CGROUPS_REMEDY);
    }
    Check::ok("cgroups", format!("{}: {}", layout.name(), mounts.join(", ")))
}

fn count_cgroups(layout: &Layout) -> usize {
    let mut count = 0;
    for (hierarchy, mount) in layout.mounts() {
        // Other checks report cgroups that cannot be read.
        let _complete = cgroupfs::walk(hierarchy, mount, BootNs(0), &mut |_, _| {}, &mut |_, _| count += 1);
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
        return Check::bad("processes", CheckStatus::Failed, "no process is visible", "set --path-procfs to the host's /proc");
    }
    let summary = format!("{processes} processes and {cgroups} cgroups scanned in {ms} ms");
    match found.problems.as_slice() {
        [] => Check::ok("processes", summary),
        [first, ..] => {
            let detail = format!("{summary}; {} could not be read, for example {first}", found.problems.len());
            let remedy = "if permission is denied, run as root or with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH";
            Check::bad("processes", CheckStatus::Degraded, detail, remedy)
        }
    }
}

fn kernel(chosen: Result<Chosen, KernelError>, wanted: KernelMode) -> Vec<Check> {
    const NAME: &str = "kernel events";
    let Chosen { tracker, refused } = match chosen {
        Ok(chosen) => chosen,
        Err(error) => {
            let remedy = "correct the cause, or set kernel_mode to auto";
            return vec![Check::bad(NAME, CheckStatus::Failed, display_chain(&error), remedy)];
        }
    };
    let mode = tracker.mode();
    let mut checks: Vec<Check> = refused
        .into_iter()
        .map(|(mode, error)| {
            let name = if mode == Mode::RawTracepoint { "eBPF" } else { "inotify" };
            Check::bad(
                name,
                CheckStatus::Degraded,
                display_chain(&error),
                "correct the cause; until then the next best mode is used",
            )
        })
        .collect();
    checks.push(match tracker {
        Tracker::RawTracepoint(_) => {
            Check::ok(NAME, "mode raw_tracepoint: the eBPF programs load, pass their self-check and attach")
        }
        _ => {
            let detail = format!("mode {}: {}", mode.name(), mode.limitations());
            let remedy =
                if wanted == KernelMode::Auto { "correct the eBPF problem reported above" } else { "remove kernel_mode" };
            Check::bad(NAME, CheckStatus::Degraded, detail, format!("{remedy}: mode raw_tracepoint has none of these limits"))
        }
    });
    checks
}

/// The inotify limits of the machine.
fn inotify(procfs: &Path, cgroups: usize) -> Check {
    let read = |name: &str| -> Option<u64> {
        let path: PathBuf = procfs.join("sys/fs/inotify").join(name);
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    let (Some(instances), Some(watches)) = (read("max_user_instances"), read("max_user_watches")) else {
        let remedy = "set --path-procfs to the host's /proc";
        return Check::bad("inotify", CheckStatus::Degraded, "the limits cannot be read", remedy);
    };
    let detail = format!("{instances} instances and {watches} watches per user");
    // One instance is for sockets, one for cgroups where eBPF is unavailable.
    if instances < LEAST_INSTANCES || watches < WATCHES_PER_CGROUP * cgroups as u64 {
        let remedy = "raise fs.inotify.max_user_instances and fs.inotify.max_user_watches";
        return Check::bad("inotify", CheckStatus::Degraded, format!("{detail}, with {cgroups} cgroups"), remedy);
    }
    Check::ok("inotify", detail)
}

fn driver(config: &Config) -> Vec<Check> {
    const NAME: &str = "NVIDIA driver";
    let inspected = match gpu::inspect(config) {
        Ok(inspected) => inspected,
        Err(error) => return vec![unusable_driver(NAME, config, error)],
    };
    let gpus = match inspected.gpus.len() {
        1 => "1 GPU".into(),
        n => format!("{n} GPUs"),
    };
    let summary = format!("version {}, {gpus}, library {}", inspected.version, inspected.library.display());
    let mut checks = vec![match inspected.unlisted {
        None => Check::ok(NAME, summary),
        Some(Diagnosis { problem, remedy }) => Check::bad(NAME, CheckStatus::Degraded, format!("{summary}; {problem}"), remedy),
    }];
    let check = |name, (detail, remedy)| match remedy {
        None => Check::ok(name, detail),
        Some(remedy) => Check::bad(name, CheckStatus::Degraded, detail, remedy),
    };
    checks.extend(inspected.gpus.into_iter().map(|gpu| check("GPU", gpu)));
    checks.push(check("driver's pids", inspected.pid_space));
    checks
}

/// The agent does not start with an unusable library that is configured; it waits for a missing default library.
fn unusable_driver(name: &'static str, config: &Config, error: GpuError) -> Check {
    let is_configured = config.nvml_lib.is_some();
    let status = |fails: bool| if fails { CheckStatus::Failed } else { CheckStatus::Degraded };
    match error {
        GpuError::Library(found) if is_configured => {
            Check::bad(name, CheckStatus::Failed, found.to_string(), "correct the path, or omit --nvml-lib")
        }
        GpuError::Library(found) => {
            let tried: Vec<String> = found.tried.iter().map(|path| path.display().to_string()).collect();
            let detail = format!("{found}; tried: {}", tried.join(", "));
            let remedy = "install the NVIDIA driver, or set --nvml-lib to its libnvidia-ml.so.1; a running agent tries again";
            Check::bad(name, CheckStatus::Degraded, detail, remedy)
        }
        GpuError::Init { path, diagnosis: Diagnosis { problem, remedy } } => {
            Check::bad(name, status(is_configured), format!("library {}: {problem}", path.display()), remedy)
        }
        GpuError::List(Diagnosis { problem, remedy }) => Check::bad(name, status(is_configured), problem, remedy),
        error @ (GpuError::Hangs | GpuError::Thread { .. }) => {
            let remedy = "check dmesg for Xid lines; nothing is sampled while it fails, and a running agent tries again";
            Check::bad(name, CheckStatus::Degraded, display_chain(&error), remedy)
        }
    }
}

/// The listen address is free, or in use by an agent.
fn address(config: &Config) -> Check {
    let listen = config.listen;
    let error = match std::net::TcpListener::bind(listen) {
        Ok(_) => return Check::ok("address", format!("{listen} is free")),
        Err(error) => error,
    };
    let agent = (error.kind() == std::io::ErrorKind::AddrInUse).then(|| running(config)).flatten();
    match agent {
        Some(state) => Check::ok("address", format!("an agent serves at {listen} already: {state}")),
        None => {
            let remedy =
                "find the program that listens there with `ss -ltnp` (perhaps a hung agent), or set --listen to a free address";
            Check::bad("address", CheckStatus::Failed, format!("{listen}: {error}"), remedy)
        }
    }
}

/// Kernel mode and event loss of a running agent.
fn running(config: &Config) -> Option<String> {
    let agent = AccessArgs::default().resolve(None, config).ok()?;
    let Ok(AgentResponse::Found(body)) = request::get(&agent, LIVE, "") else { return None };
    let live: LiveDocument = document(&agent.url, &body).ok()?;
    let (mode, lost, resyncs) = (live.kernel_mode, live.kernel_events_lost, live.resyncs);
    Some(format!("mode {mode}, {lost} kernel events lost, {resyncs} resyncs"))
}

fn text(report: &Report) -> String {
    let colours = use_colours(std::io::stdout().is_terminal());
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
        (true, true) => "\nThe agent can run here, but is degraded.\n",
        (false, _) => "\nThe agent cannot run here.\n",
    };
    out
}
