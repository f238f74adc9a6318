//! The cost of wait probes: processor time of a process for each of its blocking calls, with and without probes in turn, and of the agent.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::cuda::{CudaLibrary, run_time_s};
use gpu_sampler_tests::{Agent, Running, Sim, wait_for};
use serde_json::json;

/// Blocking calls a second.
const RATES: [u32; 3] = [100, 1_000, 20_000];
const SPAN: Duration = Duration::from_secs(4);
/// Spans with and without probes, in turn.
const TIMES: usize = 4;
const WARM_UP: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(15);
/// The thread of the agent.
const THREAD: &str = "waits";

/// Sums over spans.
#[derive(Clone, Copy, Debug, Default)]
struct CallCost {
    seconds: f64,
    calls: f64,
    caller_s: f64,
    agent_s: f64,
    thread_s: f64,
}

impl CallCost {
    fn us_a_call(&self) -> f64 {
        1e6 * self.caller_s / self.calls
    }
}

struct CostScene {
    agent: Agent,
    caller: Running,
    sim: Sim,
    library: CudaLibrary,
}

impl CostScene {
    fn new(rate: u32, args: &[&str]) -> Result<Self> {
        let sim = Sim::new("seed = 1\n[[gpus]]")?;
        let library = CudaLibrary::read(&sim.install_cuda()?)?;
        let words = sim.cuda_words(&format!("--mode empty --rate {rate} --for 600s"))?;
        let (program, arguments) = words.split_first().context("a program")?;
        let caller = Command::new(program).args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
        let caller = Running(caller);
        let agent = Agent::start(Some(&sim), args)?;
        std::thread::sleep(WARM_UP);
        Ok(Self { agent, caller, sim, library })
    }

    fn pid(&self) -> u32 {
        self.caller.0.id()
    }

    /// What one span adds.
    fn measure(&self, to: &mut CallCost) -> Result<()> {
        let now_us = || anyhow::Ok(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_micros() as u64);
        let agent = self.agent.process.0.id();
        let spent = || anyhow::Ok([run_time_s(self.pid(), None)?, run_time_s(agent, None)?, run_time_s(agent, Some(THREAD))?]);
        let (from_us, before) = (now_us()?, spent()?);
        std::thread::sleep(SPAN);
        let (after, to_us) = (spent()?, now_us()?);
        // The process writes its record every few milliseconds.
        std::thread::sleep(Duration::from_millis(50));
        let truth = self.sim.wait_truth(self.pid(), (from_us, to_us))?.context("the caller uses CUDA")?;
        to.seconds += (to_us - from_us) as f64 * 1e-6;
        to.calls += truth.calls;
        to.caller_s += after[0] - before[0];
        to.agent_s += after[1] - before[1];
        to.thread_s += after[2] - before[2];
        Ok(())
    }

    fn probe(&self) -> Result<String> {
        let session = self.agent.record_as(&json!({"duration_seconds": 600, "wait_probes": true}))?;
        let from = Instant::now();
        while !self.library.is_probed(self.pid())? {
            ensure!(from.elapsed() < PATIENCE, "the process has no probes");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(session)
    }

    fn wait_until_unprobed(&self) -> Result<()> {
        wait_for("the process has no probes", PATIENCE, || Ok((!self.library.is_probed(self.pid())?).then_some(())))
    }
}

fn compare(rate: u32) -> Result<()> {
    let scene = CostScene::new(rate, &["--wait-probe-budget", "1000000"])?;
    let (mut without, mut with) = (CallCost::default(), CallCost::default());
    for _ in 0..TIMES {
        scene.measure(&mut without)?;
        let session = scene.probe()?;
        scene.measure(&mut with)?;
        ensure!(scene.library.is_probed(scene.pid())?, "the process lost its probes");
        scene.agent.stop(&session)?;
        scene.wait_until_unprobed()?;
    }
    let percent = |of_s: f64, spent: &CallCost| 100.0 * of_s / spent.seconds;
    println!(
        "| {rate} | {:.0}, {:.0} | {:.2} us | {:.2} us | {:.2} us | {:.3} % | {:.2}, {:.2} % | {:.3} % |",
        without.calls / without.seconds,
        with.calls / with.seconds,
        without.us_a_call(),
        with.us_a_call(),
        with.us_a_call() - without.us_a_call(),
        // Of the caller's time, at this rate.
        100e-6 * (with.us_a_call() - without.us_a_call()) * with.calls / with.seconds,
        percent(without.agent_s, &without),
        percent(with.agent_s, &with),
        percent(with.thread_s, &with),
    );
    Ok(())
}

/// A process over the default budget loses its probes.
fn over_budget(rate: u32) -> Result<()> {
    let scene = CostScene::new(rate, &[])?;
    let (mut before, mut after) = (CallCost::default(), CallCost::default());
    scene.measure(&mut before)?;
    let session = scene.probe()?;
    let from = Instant::now();
    scene.wait_until_unprobed()?;
    let took = from.elapsed();
    for _ in 0..TIMES {
        scene.measure(&mut after)?;
    }
    ensure!(!scene.library.is_probed(scene.pid())?, "the process has probes again");
    scene.agent.stop(&session)?;
    println!(
        "\nDefault budget, {rate} calls a second: detached after {:.2} s; processor time of a call {:.2} us before the session,",
        took.as_secs_f64(),
        before.us_a_call()
    );
    println!("{:.2} us while it goes on.", after.us_a_call());
    Ok(())
}

pub fn run() -> Result<()> {
    println!(
        "\nProcessor time of a process for each blocking call, which returns at once, and of the agent; {TIMES} spans of {SPAN:?} each."
    );
    println!("The increase is in percent of one processor.\n");
    println!(
        "| rate | calls a second without, with | a call without | with | increase | of the time | agent without, with | its thread |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for rate in RATES {
        compare(rate)?;
    }
    over_budget(RATES[2])
}
