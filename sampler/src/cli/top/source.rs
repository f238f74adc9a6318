//! Asks the agent again and again, and listens to signals: on a thread of its own, so that keys are answered while an agent hangs.

use std::sync::mpsc::Sender;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::ask::{self, AgentResponse};
use crate::error::display_chain;
use crate::export::live::LiveDocument;

/// Of `/api/v1/live`.
pub const LIVE: &str = "/api/v1/live";
/// Where something else than an agent answers.
pub const REMEDY: &str = "name the agent with --agent or --listen";

pub enum AgentEvent {
    LiveDocument(Box<LiveDocument>),
    /// No picture could be had; why, with the remedy.
    Away(String),
    /// A signal asks to end.
    Terminate,
}

/// The thread ends when nobody listens any more.
pub fn start(agent: String, token: Option<String>, every: Duration, to: Sender<AgentEvent>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the IO runtime")?;
    let work = move || {
        runtime.block_on(async {
            tokio::select! {
                () = follow(&agent, token.as_deref(), every, &to) => {}
                () = asked_to_end() => {
                    // Nobody listens: it has ended.
                    let _ended = to.send(AgentEvent::Terminate);
                }
            }
        });
    };
    std::thread::Builder::new().name("top-source".into()).spawn(work).context("cannot start a thread")?;
    Ok(())
}

async fn follow(agent: &str, token: Option<&str>, every: Duration, to: &Sender<AgentEvent>) {
    let mut turn = tokio::time::interval(every);
    turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        turn.tick().await;
        let told = match live(agent, token).await {
            Ok(live) => AgentEvent::LiveDocument(Box::new(live)),
            Err(error) => AgentEvent::Away(display_chain(error.as_ref())),
        };
        if to.send(told).is_err() {
            return;
        }
    }
}

async fn live(agent: &str, token: Option<&str>) -> anyhow::Result<LiveDocument> {
    match ask::get_within(agent, LIVE, token, REMEDY).await? {
        AgentResponse::Found(body) => {
            serde_json::from_slice(&body).with_context(|| format!("what answers at {agent} is no gpu-sampler agent"))
        }
        AgentResponse::NotFound(_) => Err(anyhow::anyhow!(too_old(agent))),
        AgentResponse::NoAgent(error) => Err(error.context(nobody(agent))),
    }
}

/// Ctrl-C is a key while the terminal is raw; these come from elsewhere, or from a terminal that goes away.
async fn asked_to_end() {
    let wait = |kind| async move {
        match signal(kind) {
            Ok(mut stream) => {
                stream.recv().await;
            }
            // It then ends the process at once, as it does by default.
            Err(_) => std::future::pending::<()>().await,
        }
    };
    tokio::select! {
        () = wait(SignalKind::terminate()) => {}
        () = wait(SignalKind::interrupt()) => {}
        () = wait(SignalKind::hangup()) => {}
    }
}

pub fn nobody(agent: &str) -> String {
    format!("no agent answers at {agent}; start `gpu-sampler run`, or name one with --agent")
}

pub fn too_old(agent: &str) -> String {
    format!("the agent at {agent} is older than this command and has no {LIVE}; update it")
}
