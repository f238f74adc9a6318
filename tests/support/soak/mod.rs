//! Soak and chaos: one agent on a simulated node, for a long time, with faults drawn from a seed one after another, and checks of every
//! page. `cargo xtask soak` runs it; docs/soak.md describes the faults and the checks.
//!
//! ```text
//!   churn ---- lives of processes in new cgroups ----+
//!   world ---- steady users, engine behind a proxy --+--> simulated driver, kernel --> agent --> two scrapers --> board
//!   run ------ one fault, convergence, a quiet span -+                                                              |
//!                                                      accounts: each page      verdict: against the record <-------+
//! ```
//! A violation does not end a run; the table at its end names each.

pub mod accounts;
pub mod board;
pub mod churn;
pub mod effects;
pub mod facts;
pub mod faults;
pub mod inject;
pub mod interrupt;
pub mod options;
pub mod report;
pub mod resources;
pub mod run;
pub mod scrapers;
pub mod sessions;
pub mod subject;
pub mod verdict;
pub mod world;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result};

use self::accounts::{LifeAccount, Problem};
use self::board::{Board, lock};
use self::churn::Churn;
use self::facts::SessionVerdict;
use self::faults::FaultKind;
use self::options::SoakOptions;
use self::run::SoakRun;
use self::scrapers::Scraper;
use self::verdict::{JudgedLife, OwnerVerdict, PERIOD_US, SteadyVerdict};
use self::world::{SoakWorld, now_us};
use crate::record::RecordedProcesses;

/// Until everything recorded is served, attributed and exported: the last window of unnamed time closes 10 s after it began.
const SETTLED: Duration = Duration::from_secs(14);

/// Samples of the first and the last second of a life may be credited or not.
const EDGE_US: u64 = 1_000_000;
/// Containers, and their part of all users of a GPU, that may be exposed before their labels were read.
const BLANK_LEAST: usize = 4;
const BLANK_RATIO: f64 = 0.01;

/// Runs it. Returns whether there was no violation.
pub fn soak(options: &SoakOptions) -> Result<bool> {
    println!("soak for {} s, seed {}", options.lasts.as_secs(), options.seed);
    let world = SoakWorld::new(options.seed, options.lasts, options.kinds.contains(&FaultKind::ClockStep))?;
    let begun_us = now_us();
    let board = Arc::new(Board::new(world.uuids.clone(), world.allowed()));
    let lives = Mutex::new(world.steady_lives());
    let below = world.tree.make("")?;
    let churn = Churn {
        sim: &world.sim,
        below,
        root: world.root(),
        uuids: &world.uuids,
        board: board.clone(),
        lives: &lives,
        seed: options.seed,
    };
    let mut run = SoakRun::new(options, &world, board.clone(), &lives);
    let ended = std::thread::scope(|scope| {
        let churning = scope.spawn(|| churn.run());
        for scraper in [Scraper::Parsing, Scraper::OpenMetrics] {
            let board = &board;
            scope.spawn(move || scraper.run(board));
        }
        let ended = run.faults().and_then(|()| run.settle());
        board.end();
        let churned = churning.join().map_err(|_| anyhow::anyhow!("the churn panicked"))?;
        ended.and(churned)
    });
    ended?;
    let verdict = judge(&run, begun_us)?;
    Ok(report::print(&run, &verdict))
}

impl SoakRun<'_> {
    /// Waits until all is settled, and ends the agent.
    fn settle(&mut self) -> Result<()> {
        self.wait(SETTLED)?;
        self.subject.end("SIGTERM", libc::SIGTERM)
    }
}

/// Says so if more containers were exposed before their labels were read than a busy machine explains. `pairs`: of a user and a GPU.
fn blank_problem(blank: usize, pairs: usize) -> Option<Problem> {
    let most = BLANK_LEAST.max((pairs as f64 * BLANK_RATIO) as usize);
    let text = || {
        format!("{blank} containers were exposed before their labels were read, of {pairs} users of a GPU; {most} are allowed")
    };
    (blank > most).then(|| Problem::new("blank labels", text()))
}

/// What the comparison with the simulator's record gave.
pub struct SoakVerdict {
    pub steady: Vec<SteadyVerdict>,
    pub owners: OwnerVerdict,
    pub sessions: SessionVerdict,
}

/// Compares with the simulator's record.
fn judge(run: &SoakRun<'_>, begun_us: u64) -> Result<SoakVerdict> {
    let second = |seconds: f64| begun_us + (seconds * 1e6) as u64;
    let mut state = lock(&run.board.state);
    let mut lives = Vec::new();
    for (life, account) in run.subject.lives.iter().zip(&state.accounts) {
        let page = account.last.as_deref().context("each life was scraped")?;
        lives.push(JudgedLife { account, page: &page.samples, from_us: life.started_us, to_us: second(page.ended) });
    }
    let ran = |at_us: u64| lives.iter().any(|life| (life.from_us + EDGE_US..life.to_us - EDGE_US).contains(&at_us));
    let samples = run.world.sim.samples()?;
    let ids = run.world.steady.iter().map(|user| user.id.clone()).collect();
    let processes = RecordedProcesses::new(&lock(run.lives), PERIOD_US);
    let (owners, mut problems) = verdict::owners(&processes, &samples, &state.accounts, &run.world.uuids, &ids, &ran);
    let (sessions, wrong) = facts::judge(&run.sessions.samples, &samples, &processes);
    problems.extend(wrong);
    let steady = verdict::steady(run.world, &lives, &run.spans, second)?;
    let demands = run.world.steady.iter().filter(|user| user.id != world::HOST).map(|user| user.demand);
    let unknown = verdict::unknown_ratio(&run.world.uuids, &lives);
    problems.extend(owners.short_problem(unknown));
    problems.extend(sessions.problems(owners.in_lives, unknown));
    let sum = |of: fn(&LifeAccount) -> usize| state.accounts.iter().map(of).sum::<usize>();
    problems.extend(blank_problem(sum(|account| account.blank.len()), sum(|account| account.credits.len())));
    problems.extend(steady.iter().zip(demands).flat_map(|(user, demand)| user.problems(demand)));
    problems.into_iter().for_each(|problem| state.report(problem));
    Ok(SoakVerdict { steady, owners, sessions })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_blank_labels_than_a_busy_machine_explains_are_found() {
        assert_eq!((blank_problem(4, 10), blank_problem(10, 1000)), (None, None));
        assert_eq!(blank_problem(5, 10).unwrap().key, "blank labels");
        assert_eq!(blank_problem(11, 1000).unwrap().key, "blank labels");
    }
}
