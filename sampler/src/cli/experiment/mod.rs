//! `experiment`: freezes a suspect at random times while the agent records, and prints whether the victim received more GPU time, or waited
//! less, then.
//!
//! ```text
//!  resolve, refuse, consent -> POST sessions -> POST the schedule -> guard: freeze, thaw, POST each freeze -> stop -> file -> judgement
//!                                               '-- before the first freeze
//! ```
//! What may be frozen is decided in `subjects`, when it is frozen in `bursts`, and that it is thawed in `crate::freeze`. Whether there is
//! an effect is decided by the report of the session, which anyone can make again from the file.

mod bursts;
mod subjects;

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use hyper::Method;
use sampler_core::experiment::{
    BURSTS, ExperimentDesign, ExperimentFact, ExperimentSchedule, FREEZE_NS, FreezeConsent, PAUSE_NS,
};
use sampler_core::units::BootNs;
use sampler_report::{Outcome, Report, TextOptions, experiments_text};
use sampler_session::View;

use self::bursts::{Bursts, BurstsOutcome};
use self::subjects::{FrozenSubject, Subjects};
use super::access::AccessArgs;
use super::client::{Client, TIMEOUT};
use super::record::{Signals, call, engine_metrics_body, engine_problems, fetch, quoted, start_session};
use super::request::{document, unreachable};
use crate::cli::output::{json, print};
use crate::cli::text::{terminal_safe, terminal_width, use_colours};
use crate::config::{Config, Settings};
use crate::error::{display_chain, report_line};
use crate::export::experiments::{FolderId, ThawSupport};
use crate::export::sessions::{SessionBody, WaitProbesBody};
use crate::freeze::{ExperimentLock, GuardHandle, RuntimeDir, recover};
use crate::observe::clock::boot_now;
use crate::observe::kernel::layout::layout;
use crate::session::{self, SessionStatus};

const EXAMPLES: &str = "\
Examples:
  gpu-sampler experiment --victim trainer-0 --suspect 73e1a9
  gpu-sampler experiment --victim trainer-0 --suspect notebook-7 --i-may-freeze --bursts 12 --freeze 2s -o why.gpus
  gpu-sampler experiment --victim 73e1a9 --suspect loader-3 --whole-pod --seed 7
  gpu-sampler experiment --victim llm-0 --suspect 73e1a9 --engine-metrics --wait-probes=container=llm-0

The suspect does nothing while it is frozen. It must have the annotation or label gpu-sampler.io/may-freeze=true, or
--i-may-freeze is required. docs/experiments.md describes consent, safety and the test.";

/// Between the schedule and the first window.
const LEAD_NS: u64 = 2_000_000_000;
/// The session is stopped after the end of the schedule; if this command is killed, it ends by itself after this time.
const TAIL_S: f64 = 30.0;
/// Not counted at the start of each window.
const GUARD: Duration = Duration::from_nanos(sampler_report::GUARD_NS);
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// For a stopped session to end.
const ENDS_WITHIN: Duration = Duration::from_secs(60);

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct ExperimentArgs {
    /// User that may receive too little GPU time: a container by id, name or pod, or the path of a cgroup
    #[arg(long, value_name = "CONTAINER")]
    victim: String,
    /// Container to freeze, by id, name, pod or the path of its cgroup
    #[arg(long, value_name = "CONTAINER")]
    suspect: String,
    /// Number of freezes, 6 to 100; 7 or more can confirm an effect on one GPU, 9 or more one of three outcomes
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(i64::from(*BURSTS.start())..=i64::from(*BURSTS.end())))]
    bursts: u32,
    /// Length of a freeze, and of the time without one that it is compared with; 100ms to 10s
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = freeze_time)]
    freeze: Duration,
    /// Mean pause between two bursts; up to 60s
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = pause_time)]
    pause: Duration,
    /// Seed of the schedule [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Freeze the suspect without its annotation or label
    #[arg(long)]
    i_may_freeze: bool,
    /// Freeze the whole pod of the suspect, with all of its containers
    #[arg(long)]
    whole_pod: bool,
    /// Also compare the time to the first token of the victim's serving engines (vLLM, SGLang, Triton, TGI); needs engine_access
    #[arg(long)]
    engine_metrics: bool,
    /// How often the metrics of serving engines are read; 1s to 60s, and less than half of the freeze
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration)]
    engine_every: Duration,
    /// Session file to write [default: gpu-sampler-NODE-TIME.gpus in the current directory]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print the experiment of the report as JSON
    #[arg(long)]
    json: bool,
    /// Agent to query, on this machine [default: the one at --listen]
    #[arg(long, value_name = "URL")]
    agent: Option<String>,
    /// Configuration file (TOML) of the agent
    #[arg(long, value_name = "FILE", env = "GPU_SAMPLER_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    access: AccessArgs,
}

/// Where an experiment runs.
struct Trial<'a> {
    client: &'a Client,
    /// Path of the session in the API.
    session: &'a str,
    procfs: &'a Path,
    runtime_dir: &'a RuntimeDir,
    lock: &'a ExperimentLock,
}

fn time_within(text: &str, range: &std::ops::RangeInclusive<u64>, expected: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let is_within = u64::try_from(time.as_nanos()).is_ok_and(|ns| range.contains(&ns));
    if is_within { Ok(time) } else { Err(format!("expected {expected}")) }
}

fn freeze_time(text: &str) -> Result<Duration, String> {
    time_within(text, &FREEZE_NS, "100ms to 10s")
}

fn pause_time(text: &str) -> Result<Duration, String> {
    time_within(text, &PAUSE_NS, "at most 60s")
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl ExperimentArgs {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        self.check_engine_readings()?;
        let config = self.settings.clone().validate(self.config.as_deref())?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .context("cannot start the IO runtime")?;
        let result = runtime.block_on(self.experiment(&config));
        // A file read of the agent may hang in the kernel.
        runtime.shutdown_timeout(TIMEOUT);
        result
    }

    /// Any counted part of a window must have two readings of an engine in it, whenever the first is.
    fn check_engine_readings(&self) -> anyhow::Result<()> {
        let needed = GUARD + self.engine_every.saturating_mul(2);
        if self.engine_metrics && self.freeze < needed {
            let time = humantime::format_duration;
            bail!(
                "with --engine-every {} a freeze must last {} or longer for two readings of an engine in it: set --freeze {}{}",
                time(self.engine_every),
                time(needed),
                time(needed.min(Duration::from_nanos(*FREEZE_NS.end()))),
                if nanos(needed) > *FREEZE_NS.end() { ", which is the longest, and a shorter --engine-every" } else { "" }
            );
        }
        Ok(())
    }

    fn design(&self, consent: FreezeConsent) -> ExperimentDesign {
        let random = || RandomState::new().build_hasher().finish();
        ExperimentDesign {
            seed: self.seed.unwrap_or_else(random),
            bursts: self.bursts,
            window_ns: nanos(self.freeze),
            pause_ns: nanos(self.pause),
            consent,
        }
    }

    async fn experiment(&self, config: &Config) -> anyhow::Result<ExitCode> {
        let access = self.access.resolve(self.agent.as_deref(), config)?;
        let client = Client::new(&access)?;
        if let Err(error) = client.send(Method::GET, "/readyz", Vec::new()).await? {
            return Err(anyhow::Error::from(error).context(unreachable(&access.url)));
        }
        let layout = layout(&config.path_procfs);
        let subjects = Subjects { access: &access, config, layout: &layout };
        let victim = subjects.victim(&self.victim).await?;
        let suspect = subjects.suspect(&self.suspect, self.whole_pod, &victim).await?;
        let consent = subjects.check_consent(&suspect, self.i_may_freeze).await?;
        let runtime_dir = RuntimeDir::new(&config.runtime_dir);
        runtime_dir.create()?;
        let lock = runtime_dir.lock()?;
        // Before it is checked whether the suspect is frozen: an earlier experiment may have left it so.
        if let Some(cgroup) = recover(&runtime_dir, &layout, &config.path_procfs, boot_now())? {
            eprintln!("Thawed {cgroup}, which an earlier experiment had left frozen.");
        }
        runtime_dir.check_unguarded()?;
        suspect.check_thawed()?;
        let design = self.design(consent);
        let session = self.start_session(&client, &design).await?;
        let (procfs, runtime_dir) = (config.path_procfs.as_path(), &runtime_dir);
        let trial = Trial { client: &client, session: &session, procfs, runtime_dir, lock: &lock };
        let ran = trial.run(&suspect, victim, &design).await;
        // Whatever happened, the session ends; it stays on the agent if it cannot be fetched.
        let stopped = call(&client, Method::POST, &format!("{session}/stop"), Vec::new()).await;
        match ran.with_context(|| format!("the experiment ended early, and {} is not frozen by it", suspect.name))? {
            BurstsOutcome::Complete => {}
            BurstsOutcome::Interrupted => {
                bail!("interrupted; {} is not frozen by it any more, and the session remains on the agent", suspect.name)
            }
        }
        stopped.context("cannot stop the session")?;
        let report = self.report(&client, &session).await?;
        for missing in self.missing_outcomes(&report) {
            eprintln!("gpu-sampler: {missing}");
        }
        self.print(&report)?;
        Ok(ExitCode::SUCCESS)
    }

    /// The path of the session in the API.
    async fn start_session(&self, client: &Client, design: &ExperimentDesign) -> anyhow::Result<String> {
        let length = design.draw(String::new(), String::new(), BootNs(0)).end().0 + LEAD_NS;
        let request = SessionBody {
            duration_seconds: length as f64 / 1e9 + TAIL_S,
            lookback_seconds: 0.0,
            trigger: None,
            gpus: Vec::new(),
            containers: Vec::new(),
            namespaces: Vec::new(),
            wait_probes: self.settings.wait_probes.clone().map(WaitProbesBody::Selection),
            engine_metrics: self.engine_metrics.then(|| engine_metrics_body(self.engine_every, &self.settings)),
        };
        Ok(format!("/api/v1/sessions/{}", start_session(client, &request).await?))
    }

    /// Waits until the stopped session ends, fetches its file and reports it.
    async fn report(&self, client: &Client, session: &str) -> anyhow::Result<Report> {
        let ended = async {
            loop {
                let body = call(client, Method::GET, session, Vec::new()).await?;
                let status: SessionStatus = document(client.url(), &body)?;
                match status.error {
                    Some(failure) => bail!("the session failed: {failure}"),
                    None if !status.state.is_active() => return Ok(()),
                    None => tokio::time::sleep(POLL_INTERVAL).await,
                }
            }
        };
        let within = || format!("the session did not end within {} s; it remains on the agent", ENDS_WITHIN.as_secs());
        tokio::time::timeout(ENDS_WITHIN, ended).await.with_context(within)??;
        let file = fetch(client, session, self.output.as_deref()).await?;
        let deleted = call(client, Method::DELETE, session, Vec::new()).await;
        deleted.context("the session was fetched, but cannot be deleted on the agent")?;
        eprintln!("{}\nNext: gpu-sampler report {}", file.display(), quoted(&file.display().to_string()));
        read_report(&file)
    }

    /// Outcomes that were requested and that the session does not have.
    fn missing_outcomes(&self, report: &Report) -> Vec<&'static str> {
        let has = |outcome| {
            report.experiments.iter().flat_map(|experiment| &experiment.effects).any(|effect| effect.outcome == outcome)
        };
        let mut missing = Vec::new();
        if self.settings.wait_probes.is_some() && !has(Outcome::CallWait) {
            missing.push("no process of the victim had wait probes: --wait-probes must select it, and `gpu-sampler report` has the reasons");
        }
        if self.engine_metrics && !has(Outcome::TimeToFirstToken) {
            missing.push("no serving engine of the victim reported a time to the first token, so that it is not compared");
        }
        missing
    }

    fn print(&self, report: &Report) -> anyhow::Result<()> {
        if self.json {
            return print(&json(&report.experiments)?);
        }
        let is_terminal = std::io::IsTerminal::is_terminal(&std::io::stdout());
        let options = TextOptions { width: terminal_width(), colour: use_colours(is_terminal), unicode: true };
        print(&experiments_text(report, &options))
    }
}

impl Trial<'_> {
    /// Writes the schedule into the session, then freezes and thaws by it.
    async fn run(&self, suspect: &FrozenSubject, victim: String, design: &ExperimentDesign) -> anyhow::Result<BurstsOutcome> {
        let mut signals = Signals::new()?;
        let guard = GuardHandle::start(suspect.freezer.clone(), self.runtime_dir, self.lock, self.procfs).await?;
        let schedule = design.draw(victim, suspect.path.clone(), boot_now().plus(LEAD_NS));
        let fact = serde_json::to_vec(&ExperimentFact::Schedule(schedule.clone()))?;
        let reply = call(self.client, Method::POST, &format!("{}/experiment", self.session), fact).await?;
        if let Some(problem) = thaw_problem(&document(self.client.url(), &reply)?, self.runtime_dir.path()) {
            report_line(&format!("gpu-sampler: {}", terminal_safe(&problem)));
        }
        report_line(&announcement(&schedule, suspect));
        let (client, session, signals) = (self.client, self.session, &mut signals);
        let mut bursts = Bursts { client, session, schedule: &schedule, guard, failed_polls: 0, signals };
        let outcome = bursts.run().await;
        bursts.guard.stop()?;
        outcome
    }
}

fn read_report(file: &Path) -> anyhow::Result<Report> {
    let session = session::read(file)?;
    for damage in &session.damage {
        eprintln!("gpu-sampler: {} is damaged: {}", file.display(), terminal_safe(damage));
    }
    for problem in engine_problems(&session.facts) {
        eprintln!("gpu-sampler: {}", terminal_safe(&problem));
    }
    Ok(sampler_report::build(&session, &View::default()))
}

/// Why the agent would not thaw the suspect if this command and its guard were killed; `None` if it would.
fn thaw_problem(agent: &ThawSupport, runtime_dir: &Path) -> Option<String> {
    let reason = if agent.folder != FolderId::of(runtime_dir) {
        let (agents, own) = (agent.runtime_dir.display(), runtime_dir.display());
        format!("its runtime_dir, {agents}, is another folder than that of this command, {own}")
    } else {
        agent.cannot_thaw.clone()?
    };
    Some(format!("if this command and its guard are killed during a freeze, the agent will not thaw the suspect: {reason}"))
}

fn announcement(schedule: &ExperimentSchedule, suspect: &FrozenSubject) -> String {
    let seconds = schedule.end().saturating_since(schedule.start).div_ceil(1_000_000_000);
    format!(
        "Suspect {}\nFreezing {} {} times for {:.1} s within {}, seed {}. Ctrl-C thaws it and ends the experiment.",
        terminal_safe(&suspect.describe()),
        terminal_safe(&suspect.name),
        schedule.len(),
        schedule.window_ns as f64 / 1e9,
        humantime::format_duration(Duration::from_secs(seconds)),
        schedule.seed
    )
}

/// A line about an error that does not end the experiment.
fn warn(error: &anyhow::Error) {
    report_line(&format!("gpu-sampler: {}", terminal_safe(&display_chain(error.as_ref()))));
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct ExperimentCommand {
        #[command(flatten)]
        experiment: ExperimentArgs,
    }

    #[test]
    fn an_agent_that_would_not_thaw_is_named() {
        let (own, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let problem = |folder: &Path, cannot_thaw: Option<&str>| {
            let (runtime_dir, folder) = (own.path().to_owned(), FolderId::of(folder));
            let agent = ThawSupport { runtime_dir, folder, cannot_thaw: cannot_thaw.map(str::to_owned) };
            thaw_problem(&agent, own.path()).unwrap_or_default()
        };
        assert_eq!(problem(own.path(), None), "");
        // The same path, as an agent in a container has it.
        assert!(problem(other.path(), None).contains("is another folder than that of this command"));
        assert!(problem(Path::new("/no/such"), None).contains("is another folder"));
        assert!(problem(own.path(), Some("cannot write x")).ends_with("will not thaw the suspect: cannot write x"));
    }

    #[test]
    fn limits_of_freezes_are_checked_on_the_command_line() {
        let parsed = |args: &str| {
            let line = ["experiment", "--victim", "a", "--suspect", "b"].into_iter().chain(args.split_whitespace());
            ExperimentCommand::try_parse_from(line).map(|command| command.experiment)
        };
        for (args, expect) in [
            ("", true),
            ("--bursts 6 --freeze 100ms --pause 0s", true),
            ("--bursts 100 --freeze 10s --pause 60s", true),
            ("--bursts 5", false),
            ("--bursts 101", false),
            ("--freeze 99ms", false),
            ("--freeze 11s", false),
            ("--pause 61s", false),
        ] {
            assert_eq!(parsed(args).is_ok(), expect, "{args}");
        }
        let design = parsed("--seed 7 --freeze 1500ms").unwrap().design(FreezeConsent::Operator);
        let expect = ExperimentDesign {
            seed: 7,
            bursts: 20,
            window_ns: 1_500_000_000,
            pause_ns: 1_000_000_000,
            consent: FreezeConsent::Operator,
        };
        assert_eq!(design, expect);
    }

    #[test]
    fn readings_of_engines_must_fit_into_a_freeze() {
        let check = |args: &str, problem: &str| {
            let line = ["experiment", "--victim", "a", "--suspect", "b"].into_iter().chain(args.split_whitespace());
            let checked =
                ExperimentCommand::try_parse_from(line).map(|command| command.experiment.check_engine_readings()).unwrap();
            match checked {
                Ok(()) => assert_eq!(problem, "", "{args}"),
                Err(error) => assert!(!problem.is_empty() && error.to_string().contains(problem), "{args}: {error}"),
            }
        };
        check("--engine-metrics", "");
        check("--engine-metrics --freeze 2500ms", "");
        check("--freeze 1s", "");
        check("--engine-metrics --freeze 2s", "set --freeze 2s 500ms");
        check("--engine-metrics --engine-every 5s --freeze 10s", "set --freeze 10s, which is the longest, and a shorter");
    }

    #[test]
    fn outcomes_that_were_requested_and_are_not_recorded_are_named() {
        let missing = |args: &str| {
            let line = ["experiment", "--victim", "a", "--suspect", "b"].into_iter().chain(args.split_whitespace());
            let parsed = ExperimentCommand::try_parse_from(line).unwrap();
            parsed.experiment.missing_outcomes(&Report::default()).len()
        };
        assert_eq!((missing(""), missing("--engine-metrics"), missing("--engine-metrics --wait-probes=all")), (0, 1, 2));
    }

    #[test]
    fn the_announcement_has_what_is_frozen_and_what_reproduces_the_experiment() {
        let design =
            ExperimentDesign { seed: 7, bursts: 20, window_ns: 3_000_000_000, pause_ns: 0, consent: FreezeConsent::Operator };
        let text = announcement(&design.draw("/a".into(), "/b".into(), BootNs(5)), &subjects::tests::subject());
        let expect = "Suspect namespace ml, pod trainer-0, 2 containers (73e1a9, c0ffee), cgroup /b\n\
                      Freezing b 20 times for 3.0 s within 2m, seed 7. Ctrl-C thaws it and ends the experiment.";
        assert_eq!(text, expect);
    }
}
