//! `record`: requests a session from a running agent and fetches its file. Without an agent, runs one in this process for the duration.
//!
//! ```text
//!  POST sessions -> GET sessions/ID every 500 ms -> GET sessions/ID/file -> FILE -> DELETE sessions/ID
//!                    Ctrl-C: POST sessions/ID/stop --^    second Ctrl-C: exit
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::io::{IsTerminal as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use hyper::Method;
use sampler_core::fact::{Fact, WaitProbeFact};
use sampler_core::observation::{EngineFact, WaitProbeState};
use sampler_session::trigger::Trigger;

use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::access::{AccessArgs, AgentAccess};
use super::client::{Client, TIMEOUT};
use super::request::{LIVE, document};
use crate::agent::{self, Surroundings};
use crate::cli::output::{log, print};
use crate::cli::text::{bytes, terminal_safe};
use crate::config::{Config, Settings};
use crate::export::live::LiveDocument;
use crate::export::server;
use crate::export::sessions::{EngineMetricsBody, SessionBody, StartedSession, WaitProbesBody};
use crate::session::{self, Phase, SessionStatus};

const EXAMPLES: &str = "\
Examples:
  gpu-sampler record --duration 5m -o slow-training.gpus
  gpu-sampler record --lookback 2m --duration 10s       what just happened
  gpu-sampler record --engine-metrics --duration 10m     with the latencies that serving engines report
  gpu-sampler record --trigger 'coactive>0.5 for 5s' --lookback 30s
  gpu-sampler report slow-training.gpus";

const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// Consecutive polls without a response after which the agent counts as lost.
const MAX_FAILED_POLLS: u32 = 10;
/// For one chunk of the file.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(30);
/// Reasons of failed readings of serving engines that are printed; a report has all.
const MAX_PROBLEMS: usize = 20;
/// For the agent of this process to be ready, and for it to find GPUs.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
const GPUS_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Record {
    /// Duration, from now or from when the trigger's condition is met
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    duration: Duration,
    /// Include this much of the time before the start; a running agent keeps the last minutes in memory
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    lookback: Duration,
    /// Session file to write [default: gpu-sampler-NODE-TIME.gpus in the current directory]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Limit reports of the session to this GPU, by index or UUID; may be repeated
    #[arg(long, value_name = "GPU")]
    gpu: Vec<String>,
    /// Limit reports of the session to this container, by id, name or pod; may be repeated
    #[arg(long, value_name = "CONTAINER")]
    container: Vec<String>,
    /// Limit reports of the session to this namespace; may be repeated
    #[arg(long, value_name = "NAMESPACE")]
    namespace: Vec<String>,
    /// Wait for a condition such as coactive>0.5, temperature>85:gpu=0 or 'busy>0.9 for 5s'
    #[arg(long, value_name = "CONDITION")]
    trigger: Option<Trigger>,
    /// Also record the metrics of serving engines (vLLM, SGLang, Triton, TGI) in containers with GPUs; a running agent needs engine_access
    #[arg(long)]
    engine_metrics: bool,
    /// How often the metrics of serving engines are read; 1s to 60s
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = humantime::parse_duration)]
    engine_every: Duration,
    /// Agent to query [default: the one at --listen if it runs, else sample in this process, as `run` does]
    #[arg(long, value_name = "URL")]
    agent: Option<String>,
    /// Keep the session on the agent after fetching it
    #[arg(long)]
    keep: bool,
    /// Configuration file (TOML) of the agent
    #[arg(long, value_name = "FILE", env = "GPU_SAMPLER_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    access: AccessArgs,
}

/// A folder that is removed on drop.
struct TempFolder(PathBuf);

impl Drop for TempFolder {
    fn drop(&mut self) {
        // A folder that cannot be removed does no harm.
        let _removed = std::fs::remove_dir_all(&self.0);
    }
}

impl Record {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let folder = folder_of(self.output.as_deref());
        if !folder.is_dir() {
            bail!("{} is not a directory; set --output to a file in an existing one", folder.display());
        }
        let config = self.settings.clone().validate(self.config.as_deref())?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .context("cannot start the IO runtime")?;
        let result = runtime.block_on(self.record(config));
        // A file read of the agent may hang in the kernel.
        runtime.shutdown_timeout(TIMEOUT);
        result
    }

    async fn record(&self, config: Config) -> anyhow::Result<ExitCode> {
        let access = self.access.resolve(self.agent.as_deref(), &config)?;
        let (client, agent) = (Client::new(&access)?, &access.url);
        let mut signals = Signals::new()?;
        match client.send(Method::GET, "/readyz", Vec::new()).await? {
            Ok(_) => self.record_with(&client, &mut signals, false).await,
            Err(error) if self.agent.is_some() => {
                let error = anyhow::Error::from(error);
                Err(error.context(format!("no agent is reachable at {agent}; start `gpu-sampler run`, or omit --agent")))
            }
            Err(_) => self.record_in_process(config, &mut signals).await,
        }
    }

    /// Runs an agent in this process and records with it.
    async fn record_in_process(&self, mut config: Config, signals: &mut Signals) -> anyhow::Result<ExitCode> {
        log("warn");
        eprintln!("No agent runs at {}; sampling in this process.", config.listen);
        if !self.lookback.is_zero() {
            eprintln!("--lookback has no effect: there are no samples from before this command.");
        }
        let folder = TempFolder(folder_of(self.output.as_deref()).join(format!(".gpu-sampler-{}", std::process::id())));
        config.engine_access = self.engine_metrics;
        config.listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        config.session_dir = std::path::absolute(&folder.0).context("cannot determine the current directory")?;
        config.session_store = None;
        // Those of the session, which ends with them.
        config.wait_probes = None;
        (config.token_file, config.web_config_file) = (None, None);
        let listener = server::bind(config.listen)?;
        let address = listener.local_addr().context("cannot read the address of the socket")?;
        let client = Client::new(&AgentAccess::plain(format!("http://{address}")))?;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let surroundings = Surroundings { namespace_helper: agent::namespace_helper(&config)?, ..Surroundings::default() };
        let serving = agent::serve(Arc::new(config), surroundings, TcpListener::from_std(listener)?, async {
            // The sender is dropped to stop the agent.
            let _dropped = stopped.await;
        });
        let recording = async {
            wait_until_ready(&client).await?;
            self.record_with(&client, signals, true).await
        };
        tokio::pin!(serving);
        let result = tokio::select! {
            served = &mut serving => {
                served?;
                bail!("the agent in this process stopped before the session ended");
            }
            result = recording => result,
        };
        drop(stop);
        serving.await?;
        result
    }

    /// Starts a session on the agent, follows it and fetches its file. With `in_process`, no warning about a short lookback is printed:
    /// [`Record::record_in_process`] has done that.
    async fn record_with(&self, client: &Client, signals: &mut Signals, in_process: bool) -> anyhow::Result<ExitCode> {
        let request = SessionBody {
            duration_seconds: self.duration.as_secs_f64(),
            lookback_seconds: self.lookback.as_secs_f64(),
            trigger: self.trigger.as_ref().map(ToString::to_string),
            gpus: self.gpu.clone(),
            containers: self.container.clone(),
            namespaces: self.namespace.clone(),
            wait_probes: self.settings.wait_probes.clone().map(WaitProbesBody::Selection),
            engine_metrics: self.engine_metrics.then(|| engine_metrics_body(self.engine_every, &self.settings)),
        };
        let id = start_session(client, &request).await?;
        let session = format!("/api/v1/sessions/{id}");
        let status = self.follow(client, &session, signals).await?;
        let fetched = tokio::select! {
            fetched = fetch(client, &session, self.output.as_deref()) => fetched,
            () = signals.next() => Err(anyhow!("interrupted; the session {id} remains on the agent")),
        };
        let file = match (fetched, &status.error) {
            (Ok(file), _) => file,
            // A failed session may have no file: its own failure is the cause.
            (Err(_), Some(failure)) => bail!("session {id} is {}: {failure}", status.state.name()),
            (Err(error), None) => return Err(error),
        };
        if !self.keep {
            let deleted = call(client, Method::DELETE, &session, Vec::new()).await;
            deleted.context("the session was fetched, but cannot be deleted on the agent")?;
        }
        let lookback = status.lookback_seconds;
        if lookback + 0.5 < self.lookback.as_secs_f64() && !in_process {
            eprintln!(
                "The agent had samples of the last {lookback:.1} s only, not of {}.",
                humantime::format_duration(self.lookback)
            );
        }
        let recorded = session::read(&file)?;
        for damage in &recorded.damage {
            eprintln!("gpu-sampler: {} is damaged: {}", file.display(), terminal_safe(damage));
        }
        let wait_problems = self.settings.wait_probes.as_deref().map(|selection| wait_problems(&recorded.facts, selection));
        for problem in engine_problems(&recorded.facts).into_iter().chain(wait_problems.into_iter().flatten()) {
            eprintln!("gpu-sampler: {}", terminal_safe(&problem));
        }
        if recorded.end.is_none() && status.error.is_none() {
            eprintln!("gpu-sampler: {} is incomplete: the file ends before the session did", file.display());
        }
        let seconds = status.elapsed_seconds + lookback;
        let size = bytes(status.size_bytes);
        let name = quoted(&file.display().to_string());
        print(&format!("{}: {seconds:.1} s, {size}\nNext: gpu-sampler report {name}\n", file.display()))?;
        match status.error {
            Some(failure) => bail!("{failure}; {} has what was recorded until then", file.display()),
            None => Ok(ExitCode::SUCCESS),
        }
    }

    /// Polls the session until it ends; returns its last status.
    async fn follow(&self, client: &Client, session: &str, signals: &mut Signals) -> anyhow::Result<SessionStatus> {
        let mut progress = RecordProgress::new();
        let (mut failed_polls, mut stopped) = (0, false);
        loop {
            let polled = call(client, Method::GET, session, Vec::new()).await;
            match polled.and_then(|body| document::<SessionStatus>(client.url(), &body)) {
                Ok(status) => {
                    failed_polls = 0;
                    progress.show(&status);
                    if !status.state.is_active() {
                        return Ok(status);
                    }
                }
                Err(error) if failed_polls >= MAX_FAILED_POLLS => {
                    return Err(
                        error.context("the agent does not respond; when it runs again, find its sessions at /api/v1/sessions")
                    );
                }
                Err(_) => failed_polls += 1,
            }
            tokio::select! {
                () = tokio::time::sleep(POLL_INTERVAL) => {}
                () = signals.next() => {
                    if stopped {
                        bail!("interrupted; the session remains on the agent at {}", client.url());
                    }
                    stopped = true;
                    progress.clear();
                    eprintln!("Stopping the session; press Ctrl-C again to exit at once.");
                    call(client, Method::POST, &format!("{session}/stop"), Vec::new()).await?;
                }
            }
        }
    }
}

/// The folder of a session file that is written to `output`.
fn folder_of(output: Option<&Path>) -> PathBuf {
    let parent = output.and_then(Path::parent).filter(|parent| !parent.as_os_str().is_empty());
    parent.unwrap_or(Path::new(".")).to_owned()
}

/// Fetches the file of a session under a temporary name, then renames it.
pub(super) async fn fetch(client: &Client, session: &str, output: Option<&Path>) -> anyhow::Result<PathBuf> {
    let mut reply = client.send(Method::GET, &format!("{session}/file"), Vec::new()).await??;
    if !reply.status().is_success() {
        reply.success().await?;
    }
    let part = folder_of(output).join(format!(".gpu-sampler-{}.part", std::process::id()));
    let result = save(&mut reply, &part).await.with_context(|| format!("cannot fetch the session to {}", part.display()));
    let named = result.and_then(|()| {
        let name = match output {
            Some(file) => file.to_owned(),
            None => default_name(&part)?,
        };
        std::fs::rename(&part, &name).with_context(|| format!("cannot write {}", name.display()))?;
        Ok(name)
    });
    if named.is_err() {
        let _removed = std::fs::remove_file(&part);
    }
    named
}

pub(super) fn engine_metrics_body(every: Duration, settings: &Settings) -> EngineMetricsBody {
    EngineMetricsBody { every_seconds: every.as_secs_f64(), rules: settings.engine_rules.clone().unwrap_or_default() }
}

/// Starts a session on the agent; returns its id.
pub(super) async fn start_session(client: &Client, request: &SessionBody) -> anyhow::Result<String> {
    let body = call(client, Method::POST, "/api/v1/sessions", serde_json::to_vec(request)?).await?;
    let StartedSession { id } = document(client.url(), &body)?;
    Ok(id)
}

async fn save(reply: &mut super::client::HttpReply, part: &Path) -> anyhow::Result<()> {
    let mut file = std::fs::File::create(part)?;
    let mut left = reply.length().context("the agent's response has no length")?;
    while let Some(bytes) = tokio::time::timeout(CHUNK_TIMEOUT, reply.chunk()).await.context("the agent stopped sending")?? {
        file.write_all(&bytes)?;
        left = left.saturating_sub(bytes.len() as u64);
    }
    if left > 0 {
        bail!("the agent closed the connection {left} bytes before the end of the file");
    }
    Ok(file.sync_all()?)
}

fn default_name(file: &Path) -> anyhow::Result<PathBuf> {
    let header = session::read(file)?.header;
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-.".contains(c) { c } else { '_' };
    let node: String = header.node.chars().map(plain).take(100).collect();
    let time: String = sampler_core::units::rfc3339(header.start_wall).chars().take(19).filter(|c| !"-:".contains(*c)).collect();
    Ok(PathBuf::from(format!("gpu-sampler-{node}-{time}.gpus")))
}

/// Waits until the agent of this process is ready and has found a GPU, or for [`GPUS_TIMEOUT`].
async fn wait_until_ready(client: &Client) -> anyhow::Result<()> {
    let ready = tokio::time::timeout(READY_TIMEOUT, async {
        loop {
            match client.send(Method::GET, "/readyz", Vec::new()).await {
                Ok(Ok(reply)) if reply.status().is_success() => return,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    });
    ready.await.with_context(|| format!("the first scan of processes took more than {} s", READY_TIMEOUT.as_secs()))?;
    let gpus = tokio::time::timeout(GPUS_TIMEOUT, async {
        loop {
            let body = call(client, Method::GET, LIVE, Vec::new()).await;
            if body.is_ok_and(|body| document::<LiveDocument>(client.url(), &body).is_ok_and(|live| !live.gpus.is_empty())) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    if gpus.await.is_err() {
        eprintln!("No GPU was found so far; run `gpu-sampler doctor` for the reason. Recording continues, since one may appear.");
    }
    Ok(())
}

pub(super) async fn call(client: &Client, method: Method, path: &str, body: Vec<u8>) -> anyhow::Result<Vec<u8>> {
    let mut reply = client.send(method, path, body).await??;
    reply.success().await.with_context(|| format!("the agent at {} rejected the request", client.url()))
}

/// SIGINT and SIGTERM.
pub(super) struct Signals(Signal, Signal);

impl Signals {
    pub(super) fn new() -> anyhow::Result<Self> {
        let handler = |kind| signal(kind).context("cannot install a signal handler");
        Ok(Self(handler(SignalKind::interrupt())?, handler(SignalKind::terminate())?))
    }

    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
        }
    }
}

/// One progress line if stderr is a terminal, else nothing.
struct RecordProgress {
    shown: usize,
    terminal: bool,
}

impl RecordProgress {
    fn new() -> Self {
        Self { shown: 0, terminal: std::io::stderr().is_terminal() }
    }

    fn show(&mut self, status: &SessionStatus) {
        if !self.terminal {
            return;
        }
        let line = progress_line(status);
        let width = line.chars().count();
        eprint!("\r{line}{:1$}", "", self.shown.saturating_sub(width));
        self.shown = width;
        if !status.state.is_active() {
            self.clear();
        }
    }

    fn clear(&mut self) {
        if std::mem::take(&mut self.shown) > 0 {
            eprintln!();
        }
    }
}

impl Drop for RecordProgress {
    fn drop(&mut self) {
        self.clear();
    }
}

fn progress_line(status: &SessionStatus) -> String {
    let (elapsed, duration) = (status.elapsed_seconds, status.duration_seconds);
    match status.state {
        Phase::Armed => return format!("waiting for {}", status.trigger.as_deref().unwrap_or("the condition")),
        Phase::Recording if elapsed >= duration => {
            return "finishing: waiting for samples that the driver reports late".to_owned();
        }
        _ => {}
    }
    let dropped = match status.dropped_frames {
        0 => String::new(),
        frames => format!(", {frames} frames dropped: the agent's disk is slow"),
    };
    format!("{} {elapsed:.0} of {duration:.0} s, {}{dropped}", status.state.name(), bytes(status.size_bytes))
}

/// Why processes have no wait probes; or that the selection has none.
fn wait_problems(facts: &[Fact], selection: &str) -> Vec<String> {
    let is_selected = |fact: &Fact| matches!(fact, Fact::Waited(_) | Fact::WaitProbe(_));
    if !facts.iter().any(is_selected) {
        return vec![format!("--wait-probes={selection} selects no process of a user of a GPU, so the session has no waiting")];
    }
    let problem = |fact: &Fact| match fact {
        Fact::WaitProbe(WaitProbeFact { process, state: WaitProbeState::UncountedCalls, detail, .. }) => {
            Some(format!("process {}: {detail}", process.pid))
        }
        Fact::WaitProbe(WaitProbeFact { process, state, detail, .. }) => {
            let is_problem = !matches!(state, WaitProbeState::Attached | WaitProbeState::Ended | WaitProbeState::NoLibrary);
            is_problem.then(|| format!("process {} has no wait probes: {detail}", process.pid))
        }
        _ => None,
    };
    let all: BTreeSet<String> = facts.iter().filter_map(problem).collect();
    all.into_iter().take(MAX_PROBLEMS).collect()
}

/// Why metrics of serving engines were not read: each reason of each engine once, with the number of readings.
pub(super) fn engine_problems(facts: &[Fact]) -> Vec<String> {
    let mut counts: BTreeMap<(&str, u32, &str), usize> = BTreeMap::new();
    for fact in facts {
        if let Fact::Engine(EngineFact { engine, pid, problem: Some(problem), .. }) = fact {
            *counts.entry((engine, *pid, problem)).or_default() += 1;
        }
    }
    let line = |((engine, pid, problem), n)| format!("{n} readings of the engine {engine} (process {pid}) failed: {problem}");
    counts.into_iter().map(line).take(MAX_PROBLEMS).collect()
}

/// Quoted for a shell where needed.
pub(super) fn quoted(word: &str) -> String {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-_./:=@%+,".contains(&b);
    if word.bytes().all(is_plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_shows_state_time_size_and_dropped_frames() {
        let recording = SessionStatus {
            id: "1".into(),
            state: Phase::Recording,
            started: None,
            duration_seconds: 60.0,
            elapsed_seconds: 12.3,
            lookback_seconds: 0.0,
            size_bytes: 34_816,
            trigger: None,
            error: None,
            dropped_frames: 0,
        };
        assert_eq!(progress_line(&recording), "recording 12 of 60 s, 34.0 KiB");
        let armed = SessionStatus { state: Phase::Armed, trigger: Some("busy>0.9".into()), ..recording.clone() };
        assert_eq!(progress_line(&armed), "waiting for busy>0.9");
        let late = SessionStatus { elapsed_seconds: 60.0, ..recording.clone() };
        assert!(progress_line(&late).starts_with("finishing"));
        let slow = SessionStatus { dropped_frames: 3, size_bytes: 3_000_000, ..recording };
        assert!(progress_line(&slow).ends_with("2.9 MiB, 3 frames dropped: the agent's disk is slow"));
    }

    #[test]
    fn file_names_are_quoted_for_a_shell() {
        assert_eq!((quoted("a/b.gpus"), quoted("it's a.gpus")), ("a/b.gpus".into(), "'it'\\''s a.gpus'".into()));
    }
}
