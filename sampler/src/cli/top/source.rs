//! Polls the agent and handles signals on a separate thread, so that keys are handled while an agent hangs.

use std::sync::mpsc::Sender;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::access::AgentAccess;
use crate::cli::request::{self, AgentResponse, LIVE, document, unreachable};
use crate::error::display_chain;
use crate::export::live::LiveDocument;

/// For a server that is not an agent.
pub const REMEDY: &str = "name the agent with --agent or --listen";

pub enum AgentEvent {
    LiveDocument(Box<LiveDocument>),
    /// No document could be fetched; the error, with the remedy.
    Disconnected(String),
    /// A signal requests termination.
    Terminate,
}

/// The thread ends when the receiver is dropped.
pub fn start(agent: AgentAccess, interval: Duration, events: Sender<AgentEvent>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the IO runtime")?;
    let work = move || {
        runtime.block_on(async {
            tokio::select! {
                () = poll(&agent, interval, &events) => {}
                () = termination_signal() => {
                    // Without a receiver the view has ended already.
                    let _ended = events.send(AgentEvent::Terminate);
                }
            }
        });
    };
    std::thread::Builder::new().name("top-source".into()).spawn(work).context("cannot start a thread")?;
    Ok(())
}

async fn poll(agent: &AgentAccess, interval: Duration, events: &Sender<AgentEvent>) {
    let mut interval = tokio::time::interval(interval);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let event = match live(agent).await {
            Ok(live) => AgentEvent::LiveDocument(Box::new(live)),
            Err(error) => AgentEvent::Disconnected(display_chain(error.as_ref())),
        };
        if events.send(event).is_err() {
            return;
        }
    }
}

async fn live(access: &AgentAccess) -> anyhow::Result<LiveDocument> {
    let agent = &access.url;
    match request::get_within(access, LIVE, REMEDY).await? {
        AgentResponse::Found(body) => document(agent, &body),
        AgentResponse::NotFound(_) => Err(anyhow::anyhow!(too_old(agent))),
        AgentResponse::NoAgent(error) => Err(error.context(unreachable(agent))),
    }
}

/// Waits for a signal. In raw mode Ctrl-C is a key; these signals come from other processes, or from a terminal that is closed.
async fn termination_signal() {
    let wait = |kind| async move {
        match signal(kind) {
            Ok(mut stream) => {
                stream.recv().await;
            }
            // Without a handler the signal ends the process at once, as is the default.
            Err(_) => std::future::pending::<()>().await,
        }
    };
    tokio::select! {
        () = wait(SignalKind::terminate()) => {}
        () = wait(SignalKind::interrupt()) => {}
        () = wait(SignalKind::hangup()) => {}
    }
}

pub fn too_old(agent: &str) -> String {
    format!("the agent at {agent} is older than this command and does not serve {LIVE}; update the agent")
}
