//! The agent of a run, over its lives: started, watched, killed, started again.

use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};

use super::accounts::{LifeAccount, Problem};
use super::board::{Board, LifeAddress, lock};
use super::resources::{MemoryCgroup, ResourceUse, problems_of_life};
use super::world::{SoakWorld, now_us};
use crate::Agent;
use crate::kernel::Layout;

/// Small rings, so that a storm of processes overflows them and the churn does not.
const RING_BYTES: &str = "8192";
/// Lines of a log that are shown where the agent ended by itself.
const LAST_LINES: usize = 12;

/// One life of the agent.
#[derive(Debug, Default)]
pub struct LifeSpan {
    pub started_us: u64,
    pub ended_by: &'static str,
    pub used: Vec<ResourceUse>,
    pub log: String,
}

pub struct Subject<'w> {
    world: &'w SoakWorld,
    board: Arc<Board>,
    // Dropped in this order: the agent is in the cgroup.
    pub agent: Option<Agent>,
    /// Why there is none, otherwise.
    memory: Result<MemoryCgroup>,
    pub lives: Vec<LifeSpan>,
}

impl<'w> Subject<'w> {
    pub fn new(world: &'w SoakWorld, board: Arc<Board>) -> Self {
        Self { world, board, memory: MemoryCgroup::new(), agent: None, lives: Vec::new() }
    }

    fn command(&self) -> Result<Command> {
        let command = Agent::command(Some(&self.world.sim))?;
        let Ok(memory) = &self.memory else { return Ok(command) };
        // All of its memory is charged to the cgroup, from its first page on.
        let mut inside = Command::new("sh");
        inside.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(memory.procs());
        inside.arg(command.get_program()).args(command.get_args());
        inside.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        Ok(inside)
    }

    pub fn start(&mut self) -> Result<()> {
        let (root, endpoint) = (self.world.root(), self.world.endpoint());
        let (root, sessions) = (root.to_string_lossy(), self.world.disk.0.to_string_lossy());
        let args = ["--kernel-mode", "raw_tracepoint", "--kernel-ring-bytes", RING_BYTES, "--path-rootfs", &root];
        let more = ["--docker-endpoint", &endpoint, "--session-dir", &sessions, "--session-dir-max-bytes", "8388608"];
        self.lives.push(LifeSpan { started_us: now_us(), ended_by: "", ..LifeSpan::default() });
        let started = self.board.now();
        let agent = Agent::start_as(Layout::Machine, self.command()?, &[&args[..], &more].concat())?;
        let mut state = lock(&self.board.state);
        state.accounts.push(LifeAccount::new(started));
        state.agent = Some(LifeAddress { life: self.lives.len() - 1, port: agent.port, pid: agent.process.0.id() });
        state.excuse(false, self.board.now());
        drop(state);
        self.agent = Some(agent);
        Ok(())
    }

    /// The cgroup that its memory is charged to.
    pub fn memory(&self) -> Result<&MemoryCgroup> {
        self.memory.as_ref().map_err(|error| anyhow!("{error:#}"))
    }

    pub fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("the agent runs")
    }

    pub fn pid(&self) -> Result<u32> {
        Ok(self.agent()?.process.0.id())
    }

    pub fn signal(&self, signal: i32) -> Result<()> {
        crate::leftovers::kill(self.pid()?, signal);
        Ok(())
    }

    /// Ends this life; the scrapers wait for the next one.
    pub fn end(&mut self, by: &'static str, signal: i32) -> Result<()> {
        let Some(mut agent) = self.agent.take() else { return Ok(()) };
        lock(&self.board.state).agent = None;
        let status = agent.process.ends_with(signal)?;
        if signal == libc::SIGTERM && !status.success() {
            self.board.report(Problem::new("exit status", format!("after SIGTERM: {status}")));
        }
        self.close(by, agent.log()?);
        Ok(())
    }

    fn close(&mut self, by: &'static str, log: String) {
        let Some(life) = self.lives.last_mut() else { return };
        if log.contains("panicked at") {
            let line = log.lines().find(|line| line.contains("panicked at")).unwrap_or_default();
            self.board.report(Problem::new("panic", line));
        }
        (life.ended_by, life.log) = (by, log);
        problems_of_life(&life.used).into_iter().for_each(|problem| self.board.report(problem));
    }

    /// Starts the agent again if it has ended by itself. Returns whether it had.
    pub fn restart_if_ended(&mut self, may_end: bool) -> Result<bool> {
        let Some(agent) = &mut self.agent else { return Ok(false) };
        let Some(status) = agent.process.0.try_wait()? else { return Ok(false) };
        let log = agent.log()?;
        let last: Vec<&str> = log.lines().rev().take(LAST_LINES).collect();
        if !may_end {
            let text = format!("at {:.1} s: {status}; its last lines, newest first: {}", self.board.now(), last.join(" | "));
            self.board.report(Problem::new("the agent ended", text));
        }
        lock(&self.board.state).agent = None;
        self.agent = None;
        self.close("itself", log);
        if may_end {
            // What ended it would end the next one while it starts.
            self.memory()?.limit(None)?;
        }
        self.start()?;
        Ok(true)
    }

    /// Reads what the agent uses.
    pub fn watch(&mut self) -> Result<()> {
        let Some(agent) = &self.agent else { return Ok(()) };
        let lines = agent.log()?.lines().count();
        // It may have ended a moment ago.
        let Ok(used) = ResourceUse::read(agent.process.0.id(), self.board.now(), lines) else { return Ok(()) };
        used.problems().into_iter().for_each(|problem| self.board.report(problem));
        if let Some(life) = self.lives.last_mut() {
            life.used.push(used);
        }
        Ok(())
    }

    /// The log of this life so far.
    pub fn log(&self) -> String {
        self.agent.as_ref().and_then(|agent| agent.log().ok()).unwrap_or_default()
    }
}
