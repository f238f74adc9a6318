//! The course of a run: a fault, its convergence, a quiet span, the next fault.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::accounts::{Credit, CreditKey, LAG_SECONDS, Problem, TimedPage};
use super::board::{Board, conditions, lock};
use super::effects::EffectWatch;
use super::faults::{FaultKind, PlannedFault, Reach, Schedule};
use super::inject::inject;
use super::interrupt;
use super::options::SoakOptions;
use super::sessions::SessionChecks;
use super::subject::Subject;
use super::world::{FAULTY_GPUS, HOST, SoakWorld, now_us};
use crate::kernel::{ProcessTable, agent_table, cgroup2, proc_table};
use crate::record::RecordedLife;
use crate::{Sample, sum};

/// After the end of a fault all is as before within this time.
pub const CONVERGED_WITHIN: Duration = Duration::from_secs(30);
/// Between convergence and the next fault.
const QUIET: Duration = Duration::from_secs(6);
/// Room that the last fault needs.
const LAST_FAULT: Duration = Duration::from_secs(30);
/// Newest samples of a GPU that is sampled are not older.
const NEWEST_SECONDS: f64 = 2.0;
const TICK: Duration = Duration::from_millis(100);
const WATCH_EVERY: f64 = 1.0;
/// What the agent logs of a GPU that the driver no longer lists.
const GONE: &str = "GPU gone";

/// One fault and what followed.
#[derive(Debug)]
pub struct FaultRecord {
    pub plan: PlannedFault,
    pub begun: f64,
    pub ended: f64,
    pub refused: Option<String>,
    pub note: String,
    /// Seconds after its end; `None` if it did not within the limit.
    pub converged: Option<f64>,
    pub conditions: BTreeSet<String>,
    pub log_lines: usize,
    pub first_line: String,
}

/// A span without a fault: credits of steady users at its begin and its end, with the times of the pages.
#[derive(Debug)]
pub struct QuietSpan {
    pub from: f64,
    pub to: f64,
    pub before: BTreeMap<CreditKey, Credit>,
    pub after: BTreeMap<CreditKey, Credit>,
}

/// What has to be as before in addition to what always has.
#[derive(Debug, Default)]
struct Expected {
    /// A container that needs labels.
    late: Option<String>,
    /// The table of processes equals /proc.
    table: bool,
    /// The GPU that was not present: no state has that time.
    absent: Option<String>,
}

pub struct SoakRun<'w> {
    pub options: &'w SoakOptions,
    pub world: &'w SoakWorld,
    pub board: Arc<Board>,
    pub subject: Subject<'w>,
    pub lives: &'w Mutex<Vec<RecordedLife>>,
    pub faults: Vec<FaultRecord>,
    pub spans: Vec<QuietSpan>,
    /// Loads of containers that started during faults.
    pub loads: Vec<crate::Running>,
    pub sessions: SessionChecks,
    /// Whether the agent may be ended by the fault in force, and whether it was.
    pub may_end: bool,
    pub has_ended: bool,
    /// Of the present fault.
    effect: Option<EffectWatch>,
    baseline: BTreeSet<String>,
    watched: f64,
}

impl<'w> SoakRun<'w> {
    pub fn new(options: &'w SoakOptions, world: &'w SoakWorld, board: Arc<Board>, lives: &'w Mutex<Vec<RecordedLife>>) -> Self {
        let subject = Subject::new(world, board.clone());
        let (faults, spans, loads) = (Vec::new(), Vec::new(), Vec::new());
        let stepped = world.uuids.last().cloned().unwrap_or_default();
        let (sessions, baseline) = (SessionChecks { stepped, ..SessionChecks::default() }, BTreeSet::new());
        let (may_end, has_ended, effect, watched) = (false, false, None, 0.0);
        Self {
            options,
            world,
            board,
            subject,
            lives,
            faults,
            spans,
            loads,
            sessions,
            may_end,
            has_ended,
            effect,
            baseline,
            watched,
        }
    }

    /// Waits, and meanwhile watches what the agent uses and whether it lives.
    pub fn wait(&mut self, duration: Duration) -> Result<()> {
        let until = Instant::now() + duration;
        loop {
            interrupt::pause(TICK.min(until.saturating_duration_since(Instant::now())))?;
            self.has_ended |= self.subject.restart_if_ended(self.may_end)?;
            if let (Some(page), Some(effect)) = (self.latest(), &mut self.effect) {
                effect.take(&page.samples, &self.world.uuids);
            }
            if self.board.now() - self.watched > WATCH_EVERY {
                self.watched = self.board.now();
                self.subject.watch()?;
            }
            if Instant::now() >= until {
                return Ok(());
            }
        }
    }

    /// Runs faults until the time is over.
    pub fn faults(&mut self) -> Result<()> {
        self.subject.start()?;
        let begun = self.board.now();
        self.board.disturb(Reach::AllGpus, begun);
        let first = self.converge(begun, &Expected::default())?;
        self.board.settle(Reach::AllGpus);
        println!("started: all GPUs and users are measured after {:.1} s", first.unwrap_or(f64::NAN));
        self.baseline = self.latest().map(|page| conditions(&page)).unwrap_or_default();
        let mut schedule = Schedule::new(self.options.seed, &self.options.kinds, FAULTY_GPUS);
        let steps = self.options.kinds.contains(&FaultKind::ClockStep);
        loop {
            self.quiet()?;
            let left = self.options.lasts.saturating_sub(Duration::from_secs_f64(self.board.now()));
            if left < LAST_FAULT {
                return Ok(());
            }
            // Other faults would last until after the step.
            let is_near = steps && self.world.next_step().is_some_and(|step| step < LAST_FAULT + QUIET);
            let drawn = if is_near { Some(schedule.planned(FaultKind::ClockStep)) } else { schedule.draw() };
            match drawn {
                Some(fault) => self.one(fault)?,
                None => self.wait(Duration::from_secs(1))?,
            }
        }
    }

    fn one(&mut self, plan: PlannedFault) -> Result<()> {
        let begun = self.board.now();
        lock(&self.board.state).conditions.clear();
        self.board.disturb(plan.reach, begun + plan.lasts.as_secs_f64() + CONVERGED_WITHIN.as_secs_f64());
        let (life, logged) = (self.subject.lives.len(), self.subject.log().lines().count());
        self.effect = self.latest().and_then(|page| EffectWatch::new(plan, &page.samples, &self.world.uuids));
        let injected = inject(self, plan)?;
        let ended = self.board.now();
        let table = plan.kind == FaultKind::Storm;
        let absent = (plan.kind == FaultKind::GpuAbsent).then(|| self.world.uuids[plan.gpu].clone());
        if let Some(uuid) = &absent {
            self.sessions.absent.push((uuid.clone(), begun));
        }
        let converged = match injected.refused {
            Some(_) => None,
            None => self.converge(ended, &Expected { late: injected.late, table, absent: absent.clone() })?,
        };
        if converged.is_some() {
            self.board.settle(plan.reach);
        }
        let effect = self.effect.take().filter(|_| injected.refused.is_none());
        if let Some(missing) = effect.and_then(|effect| effect.missing()) {
            let text = format!("begun at {begun:.1} s: {missing}");
            self.board.report(Problem::new(format!("{} without effect", plan.kind.name()), text));
        }
        if let (Some(uuid), Some(account)) = (&absent, lock(&self.board.state).accounts.last_mut()) {
            account.forget_origin(uuid);
        }
        let log = self.subject.log();
        let skipped = if life == self.subject.lives.len() { logged } else { 0 };
        let new: Vec<&str> = log.lines().skip(skipped).collect();
        let first_line = new.iter().find(|line| line.contains("WARN") || line.contains("ERROR"));
        let (first_line, log_lines) = (first_line.map(|line| (*line).to_owned()).unwrap_or_default(), new.len());
        let mut conditions = lock(&self.board.state).conditions.clone();
        conditions.retain(|condition| !self.baseline.contains(condition));
        // Those of GPUs begin with `gpu`, that of the driver is `nvml`. A GPU that the driver no longer lists before a call for it
        // fails is not a condition, and is logged.
        let is_gone = |uuid: &String| new.iter().any(|line| line.contains(GONE) && line.contains(uuid.as_str()));
        let is_stated =
            conditions.iter().any(|name| name.starts_with("gpu") || name == "nvml") || absent.as_ref().is_some_and(is_gone);
        if plan.kind.is_a_condition() && injected.refused.is_none() && !is_stated {
            let (name, gpu) = (plan.kind.name(), plan.gpu);
            let problem = Problem::new(format!("{name} without effect"), format!("{name} of GPU {gpu} was not stated"));
            lock(&self.board.state).report(problem);
        }
        let (refused, note) = (injected.refused, injected.note);
        let record = FaultRecord { plan, begun, ended, refused, note, converged, conditions, log_lines, first_line };
        println!("{record}");
        self.faults.push(record);
        Ok(())
    }

    pub fn latest(&self) -> Option<Arc<TimedPage>> {
        lock(&self.board.state).latest.clone()
    }

    /// Waits until all is as before a fault. Returns the seconds since `ended`, or `None` after the limit, with a violation.
    fn converge(&mut self, ended: f64, expected: &Expected) -> Result<Option<f64>> {
        let mut first: Option<Arc<TimedPage>> = None;
        let mut is_same_table = !expected.table;
        loop {
            if first.is_none() {
                first = self.latest().filter(|page| page.begun >= ended);
            }
            let latest = self.latest().zip(first.clone()).filter(|(page, first)| page.begun > first.begun);
            let mut missing = match &latest {
                Some((page, first)) => self.missing(page, first, expected),
                None => Some("there is no page yet".to_owned()),
            };
            if missing.is_none() {
                missing = self.missing_labels(expected.late.as_deref())?;
            }
            if missing.is_none() && !is_same_table {
                missing = self.table_differs()?;
                is_same_table = missing.is_none();
            }
            let took = latest.map_or(self.board.now(), |(page, _)| page.ended) - ended;
            let Some(missing) = missing else { return Ok(Some(took)) };
            if self.board.now() - ended > CONVERGED_WITHIN.as_secs_f64() {
                let fault = self.faults.len() + 1;
                let text = format!("fault {fault}, which ended at {ended:.1} s: {missing}");
                self.board.report(Problem::new("not converged", text));
                return Ok(None);
            }
            self.wait(TICK)?;
        }
    }

    /// What is not as before a fault.
    fn missing(&self, page: &TimedPage, first: &TimedPage, expected: &Expected) -> Option<String> {
        let more: Vec<String> = conditions(page).difference(&self.baseline).cloned().collect();
        if !more.is_empty() && !self.faults_not_begun() {
            return Some(format!("degraded by {}", more.join(", ")));
        }
        let state = lock(&self.board.state);
        let account = state.accounts.last()?;
        let now = now_us() as f64 / 1e6;
        for uuid in &self.world.uuids {
            let newest = sum(&page.samples, "gpu_sampler_last_sample_timestamp_seconds", &[("uuid", uuid)]);
            let age = now - newest.unwrap_or_default();
            if age > NEWEST_SECONDS + (self.board.now() - page.begun) {
                return Some(format!("the newest sample of {uuid} is {age:.1} s old"));
            }
            let lag = account.lag(page, uuid);
            if lag > LAG_SECONDS && expected.absent.as_ref() != Some(uuid) {
                return Some(format!("{lag:.1} s of {uuid} are in no state"));
            }
        }
        let stuck = self.world.steady.iter().filter(|user| user.id != HOST).find(|user| {
            let seconds = |page: &[Sample]| credited(page, &user.id);
            seconds(&page.samples) <= seconds(&first.samples)
        });
        stuck.map(|user| format!("{} is not credited", user.name))
    }

    /// Before the first fault, what the agent reports is what this machine is like.
    fn faults_not_begun(&self) -> bool {
        self.faults.is_empty() && self.spans.is_empty()
    }

    fn missing_labels(&self, late: Option<&str>) -> Result<Option<String>> {
        let Some(id) = late else { return Ok(None) };
        let page = self.latest();
        let up = page.and_then(|page| sum(&page.samples, "gpu_sampler_source_up", &[("source", "docker")]));
        if up != Some(1.0) {
            return Ok(Some(format!("gpu_sampler_source_up of docker is {up:?}")));
        }
        let explained = self.subject.agent()?.container(id)?;
        let missing = explained.as_ref().map(|explained| explained["missing"].clone());
        let complete = missing.as_ref().and_then(|missing| missing.as_array()).is_some_and(Vec::is_empty);
        Ok((!complete).then(|| format!("a container that started during the fault lacks labels: {missing:?}")))
    }

    /// Compares the agent's processes with /proc, before and after, since processes come and go.
    fn table_differs(&self) -> Result<Option<String>> {
        let mount = cgroup2()?;
        let before = proc_table(&mount)?;
        let ours = agent_table(self.subject.agent()?)?;
        let after = proc_table(&mount)?;
        let either: ProcessTable = before.union(&after).copied().collect();
        let dead = ours.difference(&either).count();
        let unknown = before.intersection(&after).filter(|process| !ours.contains(process)).count();
        Ok((dead + unknown > 0).then(|| format!("{dead} dead processes in the table, {unknown} of /proc are not in it")))
    }

    fn steady_credits(&self) -> Option<(usize, f64, BTreeMap<CreditKey, Credit>)> {
        let state = lock(&self.board.state);
        let (life, page) = (state.agent?.life, state.latest.as_ref()?);
        let account = state.accounts.get(life)?;
        let credit = |user: &super::world::SteadyUser| {
            let pair = (user.id.clone(), self.world.uuids[user.gpu].clone());
            let credit = account.credits.get(&pair).copied();
            credit.map(|credit| (pair, credit))
        };
        Some((life, page.ended, self.world.steady.iter().filter_map(credit).collect()))
    }

    /// A span without a fault.
    fn quiet(&mut self) -> Result<()> {
        let before = self.steady_credits();
        if let Some(agent) = &self.subject.agent {
            self.sessions.next(agent, self.subject.lives.len(), &self.board)?;
        }
        self.wait(QUIET)?;
        if let (Some((life, from, before)), Some((same, to, after))) = (before, self.steady_credits())
            && life == same
        {
            self.spans.push(QuietSpan { from, to, before, after });
        }
        Ok(())
    }
}

/// Seconds of a container or of another user.
fn credited(page: &[Sample], id: &str) -> f64 {
    let of = |name, label| sum(page, name, &[(label, id)]).unwrap_or_default();
    of("container_gpu_seconds_total", "container_id") + of("gpu_user_seconds_total", "user")
}
