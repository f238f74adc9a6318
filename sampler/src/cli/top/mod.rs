//! `top`: who uses which GPU now. A thread asks the agent ([`source`]), [`model`] keeps what there is to see, [`view`] draws it.
//!
//! ```text
//!  agent --/api/v1/live--> source --events--> loop --> model --> view --> terminal
//!  signals ---------------^                    ^-- keys, resizes
//! ```
//!
//! However it ends (a key, SIGTERM, SIGHUP, a panic), the terminal is as it was.

mod history;
mod model;
mod once;
mod rows;
mod source;
mod view;
mod words;

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind};

use self::model::{Asked, Model};
use self::rows::Sort;
use self::source::{AgentEvent, LIVE, REMEDY, nobody, too_old};
use super::ask::{self, AgentResponse};
use crate::cli::output::{colours, print};
use crate::config::Settings;
use crate::export::live::LiveDocument;

const EXAMPLES: &str = "\
Examples:
  gpu-sampler top
  gpu-sampler top --sort waiting --filter prod
  gpu-sampler top --once --json | jq '.users[] | {pod, duty_cycle_percent}'";

/// Keys are answered within this.
const TURN: Duration = Duration::from_millis(50);

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Top {
    /// The agent to ask [default: the one at --listen]
    #[arg(long, value_name = "URL")]
    agent: Option<String>,
    /// How often it is asked, such as 500ms or 2s
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = interval)]
    interval: Duration,
    /// Print one table and end
    #[arg(long)]
    once: bool,
    /// With --once: print the agent's document
    #[arg(long, requires = "once")]
    json: bool,
    /// Sort order
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// Only rows in which all of these words are: names, images, ids, GPUs
    #[arg(long, value_name = "WORDS", default_value = "", hide_default_value = true)]
    filter: String,
    /// Configuration file (TOML) of the agent: where it listens, and its token
    #[arg(long, value_name = "FILE", env = "GPU_SAMPLER_CONFIG")]
    config: Option<PathBuf>,
    /// Where the agent listens [default: 127.0.0.1:9836]
    #[arg(long, value_name = "ADDR:PORT", env = "GPU_SAMPLER_LISTEN")]
    listen: Option<String>,
    /// File with the token that an agent beyond loopback wants
    #[arg(long, value_name = "PATH", env = "GPU_SAMPLER_TOKEN_FILE")]
    token_file: Option<PathBuf>,
}

fn interval(text: &str) -> Result<Duration, String> {
    let wanted = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let most = Duration::from_secs(3600);
    if wanted < Duration::from_millis(100) || wanted > most {
        return Err("give a time from 100ms to 1h".into());
    }
    Ok(wanted)
}

impl Top {
    pub fn run(self) -> anyhow::Result<()> {
        // Whom the agent lets in is its own business.
        let (listen, token_file) = (self.listen.clone(), self.token_file.clone());
        let settings = Settings { listen, token_file, open_metrics: Some(true), ..Settings::default() };
        let config = settings.validate(self.config.as_deref())?;
        let mut listen = config.listen;
        if listen.ip().is_unspecified() {
            listen.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
        }
        let agent = self.agent.clone().unwrap_or_else(|| format!("http://{listen}"));
        if self.once {
            return self.print(&agent, config.token.as_deref());
        }
        if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
            bail!("the live view needs a terminal; `gpu-sampler top --once` prints one table, with --json one document");
        }
        let (to, told) = channel();
        source::start(agent.clone(), config.token, self.interval, to)?;
        let model = Model::new(&agent, self.interval, self.sort, &self.filter);
        let mut terminal = ratatui::try_init().context("cannot take over the terminal; --once prints one table")?;
        let result = show(&mut terminal, model, &told);
        ratatui::restore();
        result
    }

    fn print(&self, agent: &str, token: Option<&str>) -> anyhow::Result<()> {
        let body = match ask::get(agent, LIVE, token, REMEDY)? {
            AgentResponse::Found(body) => body,
            AgentResponse::NotFound(_) => bail!("{}", too_old(agent)),
            AgentResponse::NoAgent(error) => return Err(error.context(nobody(agent))),
        };
        let live: LiveDocument =
            serde_json::from_slice(&body).with_context(|| format!("what answers at {agent} is no gpu-sampler agent"))?;
        if self.json {
            // As it came: also what an agent newer than this says.
            let whole: serde_json::Value = serde_json::from_slice(&body)?;
            return print(&format!("{}\n", serde_json::to_string_pretty(&whole)?));
        }
        let width = terminal_size::terminal_size_of(std::io::stdout()).map(|(width, _)| usize::from(width.0));
        let bold = colours(std::io::stdout().is_terminal());
        print(&once::table(&live, self.sort, &self.filter, width, bold))
    }
}

fn show(terminal: &mut DefaultTerminal, mut model: Model, told: &Receiver<AgentEvent>) -> anyhow::Result<()> {
    let colours = colours(true);
    let mut changed = true;
    loop {
        if changed {
            terminal.draw(|frame| view::draw(frame, &mut model, colours)).context("cannot draw on the terminal")?;
        }
        changed = false;
        if event::poll(TURN).context("cannot read from the terminal")? {
            changed = true;
            if let Event::Key(key) = event::read().context("cannot read from the terminal")?
                && key.kind != KeyEventKind::Release
                && model.key(key) == Some(Asked::Quit)
            {
                return Ok(());
            }
        }
        loop {
            match told.try_recv() {
                Ok(AgentEvent::LiveDocument(live)) => model.update(*live),
                Ok(AgentEvent::Away(why)) => model.away(why),
                Ok(AgentEvent::Terminate) => return Ok(()),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => bail!("the thread that asks the agent ended; please report this"),
            }
            changed = true;
        }
    }
}
