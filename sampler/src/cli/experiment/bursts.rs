//! The bursts of an experiment: asks the guard for each freeze in time, and reports each one to the session.
//!
//! While anything is frozen, this watches the guard, the agent and the signals of this process. Each of them ends the experiment, with the
//! suspect thawed: without the guard it is thawed here; without the agent or after a signal by closing the guard's pipe.

use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use hyper::{Method, StatusCode};
use sampler_core::experiment::{ExperimentFact, ExperimentSchedule};
use sampler_core::units::BootNs;

use super::super::client::Client;
use super::super::record::{Signals, call};
use super::warn;
use crate::error::report_line;
use crate::freeze::{GuardHandle, GuardReply, GuardRequest};
use crate::observe::clock::boot_now;
use crate::session::SessionStatus;

/// How often the agent is asked for the session.
const AGENT_INTERVAL: Duration = Duration::from_millis(250);
/// For one such response.
const AGENT_TIMEOUT: Duration = Duration::from_secs(1);
/// Consecutive requests without a response after which the agent counts as lost. A refused connection is enough by itself.
const MAX_FAILED_POLLS: u32 = 5;
/// The session has this much after the last window, so that its last samples are recorded.
const TRAIL_NS: u64 = 1_000_000_000;
/// The guard may reply this much after a freeze has ended.
const LATE: Duration = Duration::from_millis(700);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BurstsOutcome {
    Complete,
    Interrupted,
}

/// What ended a wait.
enum BurstEvent {
    Due,
    Guard(Option<GuardReply>),
    Agent(anyhow::Error),
    Signal,
}

pub struct Bursts<'a> {
    pub client: &'a Client,
    /// Path of the session in the API.
    pub session: &'a str,
    pub schedule: &'a ExperimentSchedule,
    pub guard: GuardHandle,
    /// Consecutive requests to the agent without a response.
    pub failed_polls: u32,
    pub signals: &'a mut Signals,
}

fn until(at: BootNs) -> Duration {
    Duration::from_nanos(at.saturating_since(boot_now()))
}

/// Returns when the agent does not record the session any more. `failed`: consecutive requests without a response, also of earlier calls
/// that were cancelled.
async fn agent_is_lost(client: &Client, session: &str, failed: &mut u32) -> anyhow::Error {
    loop {
        tokio::time::sleep(AGENT_INTERVAL).await;
        match client.send_within(AGENT_TIMEOUT, Method::GET, session, Vec::new()).await {
            Ok(Ok(mut reply)) if reply.status().is_success() => {
                let body = reply.body().await.unwrap_or_default();
                match serde_json::from_slice::<SessionStatus>(&body) {
                    Ok(status) if status.state.is_active() => *failed = 0,
                    Ok(status) => return anyhow!("the session is {}: {}", status.state.name(), status.error.unwrap_or_default()),
                    Err(_) => *failed += 1,
                }
            }
            Ok(Ok(reply)) if reply.status() == StatusCode::NOT_FOUND => {
                return anyhow!("the agent does not have the session any more");
            }
            Ok(Err(error)) => return anyhow::Error::from(error).context("the agent has ended"),
            // A response that does not arrive, or a server that refuses one more request.
            Ok(Ok(_)) | Err(_) => *failed += 1,
        }
        if *failed > MAX_FAILED_POLLS {
            return anyhow!("the agent at {} does not respond", client.url());
        }
    }
}

impl Bursts<'_> {
    pub async fn run(&mut self) -> anyhow::Result<BurstsOutcome> {
        for burst in 0..self.schedule.len() {
            if self.burst(burst).await? == BurstsOutcome::Interrupted {
                return Ok(BurstsOutcome::Interrupted);
            }
        }
        self.wait_until(self.schedule.end().plus(TRAIL_NS)).await
    }

    async fn event(&mut self, wait: Duration) -> BurstEvent {
        let Self { client, session, guard, failed_polls, signals, .. } = self;
        tokio::select! {
            biased;
            reply = guard.reply() => BurstEvent::Guard(reply),
            () = signals.next() => BurstEvent::Signal,
            error = agent_is_lost(client, session, failed_polls) => BurstEvent::Agent(error),
            () = tokio::time::sleep(wait) => BurstEvent::Due,
        }
    }

    /// The guard has ended: the suspect is thawed at once.
    fn without_guard(&mut self) -> anyhow::Error {
        match self.guard.kill() {
            Ok(()) => anyhow!("the guard has ended; the suspect is thawed, unless another program has frozen it"),
            Err(error) => error.context("the guard has ended"),
        }
    }

    /// Waits while nothing is frozen.
    async fn wait_until(&mut self, at: BootNs) -> anyhow::Result<BurstsOutcome> {
        match self.event(until(at)).await {
            BurstEvent::Due => Ok(BurstsOutcome::Complete),
            BurstEvent::Signal => Ok(BurstsOutcome::Interrupted),
            BurstEvent::Agent(error) => Err(error),
            BurstEvent::Guard(None) => Err(self.without_guard()),
            BurstEvent::Guard(Some(reply)) => bail!("the guard replied {reply:?} while nothing was frozen"),
        }
    }

    async fn burst(&mut self, burst: u32) -> anyhow::Result<BurstsOutcome> {
        let window = self.schedule.frozen_window(burst).context("the schedule has no such burst")?;
        if self.wait_until(window.from).await? == BurstsOutcome::Interrupted {
            return Ok(BurstsOutcome::Interrupted);
        }
        let ns = window.to.saturating_since(boot_now());
        // For the report it would not be frozen as planned: the counted part begins at the half of a short window.
        if ns < self.schedule.window_ns / 2 {
            warn(&anyhow!("burst {} has no freeze: this process was late", burst + 1));
            return Ok(BurstsOutcome::Complete);
        }
        if let Err(error) = self.guard.request(GuardRequest::Freeze { ns }) {
            return Err(error.context(self.without_guard()));
        }
        self.follow_freeze(burst, window.to).await
    }

    /// Waits for the end of a freeze, and reports it.
    async fn follow_freeze(&mut self, burst: u32, to: BootNs) -> anyhow::Result<BurstsOutcome> {
        loop {
            match self.event(until(to) + LATE).await {
                BurstEvent::Guard(Some(GuardReply::Thawed { from, to })) => {
                    self.report(burst, from, to).await?;
                    return Ok(BurstsOutcome::Complete);
                }
                BurstEvent::Guard(Some(GuardReply::Failed { message })) => {
                    warn(&anyhow!("burst {} has no complete freeze: {message}", burst + 1));
                    return Ok(BurstsOutcome::Complete);
                }
                BurstEvent::Guard(Some(GuardReply::Frozen { .. } | GuardReply::Ready { .. })) => {}
                BurstEvent::Guard(None) => return Err(self.without_guard()),
                // The guard thaws when its pipe closes.
                BurstEvent::Signal => {
                    self.guard.stop()?;
                    return Ok(BurstsOutcome::Interrupted);
                }
                BurstEvent::Agent(error) => {
                    self.guard.stop()?;
                    return Err(error);
                }
                BurstEvent::Due => {
                    self.guard.stop()?;
                    bail!("the guard did not thaw the suspect in time, so it was stopped");
                }
            }
        }
    }

    async fn report(&self, burst: u32, from: BootNs, to: BootNs) -> anyhow::Result<()> {
        let fact = ExperimentFact::Frozen { experiment: self.schedule.start, burst, from, to };
        let path = format!("{}/experiment", self.session);
        call(self.client, Method::POST, &path, serde_json::to_vec(&fact)?).await?;
        let seconds = to.saturating_since(from) as f64 / 1e9;
        report_line(&format!("Burst {} of {}: frozen for {seconds:.2} s", burst + 1, self.schedule.len()));
        Ok(())
    }
}
