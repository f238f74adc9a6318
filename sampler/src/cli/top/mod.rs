//! `top`: live view of GPU usage. A thread polls the agent ([`source`]), [`model`] holds the displayed state, [`view`] draws it.
//!
//! ```text
//!  agent --/api/v1/live--> source --events--> loop --> model --> view --> terminal
//!  signals ---------------^                    ^-- keys, resizes
//! ```
//!
//! On every exit (a key, SIGTERM, SIGHUP, a panic) the terminal is restored.

mod history;
mod model;
mod names;
mod once;
mod rows;
mod source;
mod view;

use std::io::IsTerminal as _;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind};

use self::model::{Action, Model};
use self::rows::Sort;
use self::source::{AgentEvent, REMEDY, too_old};
use super::access::AgentAccess;
use super::agent_args::AgentArgs;
use super::request::{self, AgentResponse, LIVE, document, unreachable};
use crate::cli::output::{self, print};
use crate::cli::text::{terminal_width, use_colours};
use crate::export::live::LiveDocument;

const EXAMPLES: &str = "\
Examples:
  gpu-sampler top
  gpu-sampler top --sort waiting --filter prod
  gpu-sampler top --once --json | jq '.users[] | {pod, duty_cycle_percent}'";

/// Bound of the time until a document from the agent is drawn.
const EVENT_TIMEOUT: Duration = Duration::from_millis(50);

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Top {
    /// Poll interval, such as 500ms or 2s
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = interval)]
    interval: Duration,
    /// Print one table and exit
    #[arg(long)]
    once: bool,
    /// With --once: print the agent's JSON document
    #[arg(long, requires = "once")]
    json: bool,
    /// Sort order
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// Show only rows that contain all of these words, in names, images, ids or GPUs
    #[arg(long, value_name = "WORDS", default_value = "", hide_default_value = true)]
    filter: String,
    #[command(flatten)]
    agent: AgentArgs,
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if !(Duration::from_millis(100)..=Duration::from_secs(3600)).contains(&interval) {
        return Err("expected a time from 100ms to 1h".into());
    }
    Ok(interval)
}

impl Top {
    pub fn run(self) -> anyhow::Result<()> {
        let agent = self.agent.resolve()?;
        if self.once {
            return self.print(&agent);
        }
        if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
            bail!(
                "the live view requires a terminal; use `gpu-sampler top --once` for one table, or with --json for one document"
            );
        }
        let (sender, events) = channel();
        let model = Model::new(&agent.url, self.interval, self.sort, &self.filter);
        source::start(agent, self.interval, sender)?;
        let mut terminal = ratatui::try_init().context("cannot initialize the terminal; use --once for one table")?;
        let result = run_loop(&mut terminal, model, &events);
        ratatui::restore();
        result
    }

    fn print(&self, access: &AgentAccess) -> anyhow::Result<()> {
        let agent = &access.url;
        let body = match request::get(access, LIVE, REMEDY)? {
            AgentResponse::Found(body) => body,
            AgentResponse::NotFound(_) => bail!("{}", too_old(agent)),
            AgentResponse::NoAgent(error) => return Err(error.context(unreachable(agent))),
        };
        let live: LiveDocument = document(agent, &body)?;
        if self.json {
            // The whole document, with fields that only a newer agent has.
            return print(&output::json(&document::<serde_json::Value>(agent, &body)?)?);
        }
        let bold = use_colours(std::io::stdout().is_terminal());
        print(&once::table(&live, self.sort, &self.filter, terminal_width(), bold))
    }
}

fn run_loop(terminal: &mut DefaultTerminal, mut model: Model, events: &Receiver<AgentEvent>) -> anyhow::Result<()> {
    let colours = use_colours(true);
    let mut changed = true;
    loop {
        if changed {
            terminal.draw(|frame| view::draw(frame, &mut model, colours)).context("cannot draw on the terminal")?;
        }
        changed = false;
        if event::poll(EVENT_TIMEOUT).context("cannot read from the terminal")? {
            changed = true;
            if let Event::Key(key) = event::read().context("cannot read from the terminal")?
                && key.kind != KeyEventKind::Release
                && model.handle_key(key) == Some(Action::Quit)
            {
                return Ok(());
            }
        }
        loop {
            match events.try_recv() {
                Ok(AgentEvent::LiveDocument(live)) => model.update(*live),
                Ok(AgentEvent::Disconnected(error)) => model.disconnect(error),
                Ok(AgentEvent::Terminate) => return Ok(()),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => bail!("the thread that polls the agent stopped; please report this bug"),
            }
            changed = true;
        }
    }
}
