//! `record`: has a running agent record a session, and fetches it; where none runs, is the agent itself for as long.
//!
//! ```text
//!  POST sessions -> GET sessions/ID each half second -> GET sessions/ID/file -> FILE -> DELETE sessions/ID
//!                        Ctrl-C: POST sessions/ID/stop --^    a second one: gives up
//! ```

use std::io::{IsTerminal as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use hyper::Method;
use sampler_session::trigger::Trigger;
use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::client::{Client, TIMEOUT};
use crate::agent;
use crate::cli::output::{log, print};
use crate::config::{Config, Settings};
use crate::export::http;
use crate::session;

const EXAMPLES: &str = "\
Examples:
  gpu-sampler record --duration 5m -o slow-training.gpus
  gpu-sampler record --lookback 2m --duration 10s       what has just happened
  gpu-sampler record --trigger 'coactive>0.5 for 5s' --lookback 30s
  gpu-sampler report slow-training.gpus";

const LOOK_EVERY: Duration = Duration::from_millis(500);
/// An agent that does not answer so often in a row is given up.
const MAX_SILENT: u32 = 10;
/// For a piece of the file.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(30);
/// For an agent of one's own to be ready, and for it to have found GPUs.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
const GPUS_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Record {
    /// How long to record, from now or from when the condition is met
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    duration: Duration,
    /// What has been before belongs to it, too: a running agent keeps the last minutes in memory
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    lookback: Duration,
    /// Where the session goes [default: gpu-sampler-NODE-TIME.gpus here]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Reports are to show this GPU, by index or UUID; more than once if wanted
    #[arg(long, value_name = "GPU")]
    gpu: Vec<String>,
    /// Reports are to show this container, by id, name or pod; more than once if wanted
    #[arg(long, value_name = "CONTAINER")]
    container: Vec<String>,
    /// Reports are to show this namespace; more than once if wanted
    #[arg(long, value_name = "NAMESPACE")]
    namespace: Vec<String>,
    /// Wait until this holds, such as coactive>0.5, temperature>85:gpu=0, 'busy>0.9 for 5s'
    #[arg(long, value_name = "CONDITION")]
    trigger: Option<Trigger>,
    /// The agent to ask [default: the one at --listen if it runs; else GPUs are sampled from here, as `run` does]
    #[arg(long, value_name = "URL")]
    agent: Option<String>,
    /// Leave the session with the agent, too
    #[arg(long)]
    keep: bool,
    /// Configuration file (TOML) of the agent
    #[arg(long, value_name = "FILE", env = "GPU_SAMPLER_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

/// A folder that is gone with this.
struct TempFolder(PathBuf);

impl Drop for TempFolder {
    fn drop(&mut self) {
        // What cannot be removed is in nobody's way.
        let _removed = std::fs::remove_dir_all(&self.0);
    }
}

impl Record {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let folder = self.folder();
        if !folder.is_dir() {
            bail!("{} is no folder to write to; give another file with --output", folder.display());
        }
        let mut settings = self.settings.clone();
        // Whom the agent lets in is its own business.
        settings.open_metrics.get_or_insert(true);
        let config = settings.validate(self.config.as_deref())?;
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

    /// Where the file goes.
    fn folder(&self) -> PathBuf {
        let parent = self.output.as_deref().and_then(Path::parent).filter(|parent| !parent.as_os_str().is_empty());
        parent.unwrap_or(Path::new(".")).to_owned()
    }

    async fn record(&self, config: Config) -> anyhow::Result<ExitCode> {
        let mut listen = config.listen;
        if listen.ip().is_unspecified() {
            listen.set_ip(Ipv4Addr::LOCALHOST.into());
        }
        let agent = self.agent.clone().unwrap_or_else(|| format!("http://{listen}"));
        let client = Client::new(&agent, config.token.as_deref())?;
        let mut signals = Signals::new()?;
        match client.send(Method::GET, "/readyz", Vec::new()).await? {
            Ok(_) => self.with(&client, &mut signals, false).await,
            Err(error) if self.agent.is_some() => {
                let error = anyhow::Error::from(error);
                Err(error.context(format!("no agent answers at {agent}; start `gpu-sampler run`, or leave --agent out")))
            }
            Err(_) => self.alone(config, &mut signals).await,
        }
    }

    /// Is the agent itself.
    async fn alone(&self, mut config: Config, signals: &mut Signals) -> anyhow::Result<ExitCode> {
        log("warn");
        eprintln!("No agent runs at {}: sampling from here.", config.listen);
        if !self.lookback.is_zero() {
            eprintln!("Nothing was sampled before now: --lookback has nothing to look back to.");
        }
        let folder = TempFolder(self.folder().join(format!(".gpu-sampler-{}", std::process::id())));
        config.listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        config.session_dir = std::path::absolute(&folder.0).context("there is no current folder")?;
        config.token = None;
        let listener = http::bind(config.listen).await?;
        let client = Client::new(&format!("http://{}", listener.local_addr().context("a socket without an address")?), None)?;
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let serving = agent::serve(Arc::new(config), listener, async {
            // Dropped or sent: both mean the end.
            let _either = ended.await;
        });
        let recording = async {
            ready(&client).await?;
            self.with(&client, signals, true).await
        };
        tokio::pin!(serving);
        let result = tokio::select! {
            served = &mut serving => {
                served?;
                bail!("the agent ended");
            }
            result = recording => result,
        };
        drop(end);
        serving.await?;
        result
    }

    /// `alone`: it was said already that there is nothing to look back to.
    async fn with(&self, client: &Client, signals: &mut Signals, alone: bool) -> anyhow::Result<ExitCode> {
        let wanted = json!({
            "duration_seconds": self.duration.as_secs_f64(),
            "lookback_seconds": self.lookback.as_secs_f64(),
            "trigger": self.trigger.as_ref().map(ToString::to_string),
            "gpus": self.gpu, "containers": self.container, "namespaces": self.namespace,
        });
        let begun: Value = call(client, Method::POST, "/api/v1/sessions", &wanted.to_string()).await?;
        let id = begun["id"].as_str().context("the agent did not say which session it began")?;
        let session = format!("/api/v1/sessions/{id}");
        let status = self.follow(client, &session, signals).await?;
        let failure = status["error"].as_str().map(str::to_owned);
        let fetched = tokio::select! {
            fetched = self.fetch(client, &session) => fetched,
            () = signals.next() => Err(anyhow!("interrupted; the session {id} stays with the agent")),
        };
        let file = match (fetched, &failure) {
            (Ok(file), _) => file,
            // There may be no file: what went wrong is said first.
            (Err(_), Some(failure)) => bail!("session {id} is {}: {failure}", status["state"].as_str().unwrap_or("lost")),
            (Err(error), None) => return Err(error),
        };
        if !self.keep {
            call(client, Method::DELETE, &session, "").await.context("the session is fetched, but stays with the agent")?;
        }
        let looked_back = status["lookback_seconds"].as_f64().unwrap_or_default();
        if looked_back + 0.5 < self.lookback.as_secs_f64() && !alone {
            eprintln!("The agent had {looked_back:.1} s to look back to, not {}.", humantime::format_duration(self.lookback));
        }
        let told = session::read(&file)?;
        for words in &told.damage {
            eprintln!("gpu-sampler: {}: {words}", file.display());
        }
        if told.end.is_none() && failure.is_none() {
            eprintln!("gpu-sampler: {} ends before its session did", file.display());
        }
        let seconds = status["elapsed_seconds"].as_f64().unwrap_or_default() + looked_back;
        let size = size(status["size_bytes"].as_u64().unwrap_or_default());
        let name = quoted(&file.display().to_string());
        print(&format!("{}: {seconds:.1} s, {size}\nNext: gpu-sampler report {name}\n", file.display()))?;
        match failure {
            Some(failure) => bail!("{failure}; {} holds what was recorded up to there", file.display()),
            None => Ok(ExitCode::SUCCESS),
        }
    }

    /// Until it has ended; its last status.
    async fn follow(&self, client: &Client, session: &str, signals: &mut Signals) -> anyhow::Result<Value> {
        let mut progress = RecordProgress::new();
        let (mut silent, mut stopped) = (0, false);
        loop {
            match call(client, Method::GET, session, "").await {
                Ok(status) => {
                    silent = 0;
                    progress.show(&status);
                    if !matches!(status["state"].as_str(), Some("armed" | "recording")) {
                        return Ok(status);
                    }
                }
                Err(error) if silent >= MAX_SILENT => {
                    return Err(error.context("the agent is lost; once it runs again, its sessions are at /api/v1/sessions"));
                }
                Err(_) => silent += 1,
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = signals.next() => {
                    if stopped {
                        bail!("interrupted; what was recorded stays with the agent at {}", client.agent);
                    }
                    stopped = true;
                    progress.clear();
                    eprintln!("Stopping; once more gives up.");
                    call(client, Method::POST, &format!("{session}/stop"), "").await?;
                }
            }
        }
    }

    /// Fetches the file under another name, then gives it its own.
    async fn fetch(&self, client: &Client, session: &str) -> anyhow::Result<PathBuf> {
        let mut reply = client.send(Method::GET, &format!("{session}/file"), Vec::new()).await??;
        if !reply.status().is_success() {
            reply.success().await?;
        }
        let part = self.folder().join(format!(".gpu-sampler-{}.part", std::process::id()));
        let result = save(&mut reply, &part).await.with_context(|| format!("cannot fetch the session to {}", part.display()));
        let named = result.and_then(|()| {
            let name = match &self.output {
                Some(file) => file.clone(),
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
}

async fn save(reply: &mut super::client::HttpReply, part: &Path) -> anyhow::Result<()> {
    let mut file = std::fs::File::create(part)?;
    let mut left = reply.length().context("the agent does not say how long the file is")?;
    while let Some(bytes) = tokio::time::timeout(CHUNK_TIMEOUT, reply.chunk()).await.context("the agent hangs")?? {
        file.write_all(&bytes)?;
        left = left.saturating_sub(bytes.len() as u64);
    }
    if left > 0 {
        bail!("{left} bytes are missing");
    }
    Ok(file.sync_all()?)
}

fn default_name(file: &Path) -> anyhow::Result<PathBuf> {
    let header = session::read(file)?.header;
    let safe = |c: char| if c.is_ascii_alphanumeric() || "-.".contains(c) { c } else { '_' };
    let node: String = header.node.chars().map(safe).take(100).collect();
    let time: String = sampler_core::units::rfc3339(header.start_wall).chars().take(19).filter(|c| !"-:".contains(*c)).collect();
    Ok(PathBuf::from(format!("gpu-sampler-{node}-{time}.gpus")))
}

/// The agent of one's own is ready, and has looked for GPUs.
async fn ready(client: &Client) -> anyhow::Result<()> {
    let waited = tokio::time::timeout(READY_TIMEOUT, async {
        loop {
            match client.send(Method::GET, "/readyz", Vec::new()).await {
                Ok(Ok(reply)) if reply.status().is_success() => return,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    });
    waited.await.context("the first scan takes too long")?;
    let gpus = tokio::time::timeout(GPUS_TIMEOUT, async {
        loop {
            if let Ok(Ok(mut reply)) = client.send(Method::GET, "/metrics", Vec::new()).await
                && reply.body().await.is_ok_and(|page| String::from_utf8_lossy(&page).contains("\ngpu_info{"))
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    if gpus.await.is_err() {
        eprintln!("No GPU was found so far; `gpu-sampler doctor` says why. Recording anyway: one may appear.");
    }
    Ok(())
}

async fn call(client: &Client, method: Method, path: &str, body: &str) -> anyhow::Result<Value> {
    let mut reply = client.send(method, path, body.as_bytes().to_vec()).await??;
    let body = reply.success().await.with_context(|| format!("the agent at {} refuses", client.agent))?;
    if body.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&body).with_context(|| format!("what answers at {} is no gpu-sampler agent", client.agent))
}

/// SIGINT and SIGTERM.
struct Signals(Signal, Signal);

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("signals cannot be listened to");
        Ok(Self(listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?))
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
        }
    }
}

/// One line on a terminal, nothing elsewhere.
struct RecordProgress {
    shown: usize,
    terminal: bool,
}

impl RecordProgress {
    fn new() -> Self {
        Self { shown: 0, terminal: std::io::stderr().is_terminal() }
    }

    fn show(&mut self, status: &Value) {
        if !self.terminal {
            return;
        }
        let line = line(status);
        let width = line.chars().count();
        eprint!("\r{line}{:1$}", "", self.shown.saturating_sub(width));
        self.shown = width;
        if !matches!(status["state"].as_str(), Some("armed" | "recording")) {
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

fn line(status: &Value) -> String {
    let state = status["state"].as_str().unwrap_or("unknown");
    if state == "armed" {
        return format!("waiting for {}", status["trigger"].as_str().unwrap_or("its condition"));
    }
    let seconds = |key: &str| status[key].as_f64().unwrap_or_default();
    let (elapsed, all) = (seconds("elapsed_seconds"), seconds("duration_seconds"));
    let dropped = match status["dropped_frames"].as_u64() {
        None | Some(0) => String::new(),
        Some(frames) => format!(", {frames} frames left out: the agent's disk is slow"),
    };
    if state == "recording" && elapsed >= all {
        return "finishing: waits for samples that are told late".to_owned();
    }
    format!("{state} {elapsed:.0} of {all:.0} s, {}{dropped}", size(status["size_bytes"].as_u64().unwrap_or_default()))
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} bytes"),
        1024..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}

/// As a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_./:=@%+,".contains(&b);
    if word.bytes().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let recording = json!({"state": "recording", "elapsed_seconds": 12.3, "duration_seconds": 60.0, "size_bytes": 34_816});
        assert_eq!(line(&recording), "recording 12 of 60 s, 34.0 KiB");
        let armed = json!({"state": "armed", "trigger": "busy>0.9"});
        assert_eq!(line(&armed), "waiting for busy>0.9");
        let slow = json!({"state": "recording", "duration_seconds": 1.0, "dropped_frames": 3, "size_bytes": 3_000_000});
        assert!(line(&slow).ends_with("2.9 MiB, 3 frames left out: the agent's disk is slow"));
    }

    #[test]
    fn commands_to_type() {
        assert_eq!((quoted("a/b.gpus"), quoted("it's a.gpus")), ("a/b.gpus".into(), "'it'\\''s a.gpus'".into()));
    }
}
