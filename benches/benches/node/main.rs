//! The whole agent at the size of real nodes: processor time by thread, memory, the page and what a scrape of it costs.
//!
//! With `GPU_SAMPLER_BEFORE` set to the path of another build of the agent, each section runs with that one first, so that both are measured
//! in one run.
//!
//! The simulated driver runs in the agent's GPU threads; its own time is subtracted from their figure and from the sum.

mod measure;
mod world;

use std::time::Duration;

use anyhow::Result;
use gpu_sampler_benches::{line, wanted};
use gpu_sampler_tests::{Agent, var};

use measure::{Memory, Spent, page, scrapes};
use world::{Size, World};

/// After all pairs are exposed: caches fill, and every window of 10 s has been complete once.
const WARM_UP: Duration = Duration::from_secs(15);
const QUIET: Duration = Duration::from_secs(30);
type NodeSection = fn() -> Result<()>;

const GROWTH_MINUTES: u32 = 10;

struct Aims {
    quiet: f64,
    scrape_cpu: f64,
    scrape_p99: f64,
    page_bytes: f64,
    rss: f64,
}

/// Those of a node of 8 GPUs with 64 processes each, and of one with 8 each next to 1,000 containers without a GPU.
const FULL: Aims = Aims { quiet: 2.0, scrape_cpu: 8.0, scrape_p99: 25.0, page_bytes: 1.2e6, rss: 45.0 };
const LIGHT: Aims = Aims { quiet: 1.5, scrape_cpu: 3.0, scrape_p99: 25.0, page_bytes: 1.2e6, rss: 45.0 };
const SERIES_A_PAIR: f64 = 14.0;
const OWN_SERIES: f64 = 150.0;
const KIB_A_PAIR: f64 = 4.0;
const UNNAMED_MS: f64 = 1.0;

const SIZES: [(&str, Size, Option<Aims>); 5] = [
    ("node-1x4", Size { gpus: 1, processes: 4, containers: 4, others: 0 }, None),
    ("node-8x8", Size { gpus: 8, processes: 8, containers: 64, others: 1_000 }, Some(LIGHT)),
    ("node-8x64", Size { gpus: 8, processes: 64, containers: 200, others: 0 }, Some(FULL)),
    ("node-others-8x64", Size { gpus: 8, processes: 64, containers: 200, others: 5_000 }, None),
    ("node-16x64", Size { gpus: 16, processes: 64, containers: 400, others: 0 }, None),
];

fn main() -> Result<()> {
    for (name, size, aims) in &SIZES {
        with_each_build(name, &format!("{name}: {size:?}"), || steady(*size, aims.as_ref()))?;
    }
    let sections: [(&str, NodeSection); 5] = [
        ("node-pairs", pairs),
        ("node-idle", used_once),
        ("node-churn-named", || churn(true)),
        ("node-churn-unnamed", || churn(false)),
        ("node-growth", growth),
    ];
    for (name, run) in sections {
        with_each_build(name, name, run)?;
    }
    Ok(())
}

/// Runs the section of this name, if it is wanted, with the build to compare with and with the present one.
fn with_each_build(name: &str, heading: &str, run: impl Fn() -> Result<()>) -> Result<()> {
    if !wanted(name) {
        return Ok(());
    }
    let present = var("GPU_SAMPLER_BIN")?;
    if let Ok(before) = std::env::var("GPU_SAMPLER_BEFORE") {
        println!("\n{heading}, before");
        // SAFETY: the bench has one thread here.
        unsafe { std::env::set_var("GPU_SAMPLER_BIN", before) };
        let done = run();
        // SAFETY: as above.
        unsafe { std::env::set_var("GPU_SAMPLER_BIN", present) };
        done?;
    }
    println!("\n{heading}");
    run()
}

/// Processor time without scrapes; returns the percentage.
fn quiet(world: &World, agent: &Agent, aim: Option<f64>) -> Result<f64> {
    let before = Spent::now(agent, world)?;
    std::thread::sleep(QUIET);
    let after = Spent::now(agent, world)?;
    let percent = |of: &dyn Fn(&Spent) -> f64| 100.0 * before.rate_until(&after, of);
    let sum = percent(&|spent| spent.all);
    line("processor time without scrapes", sum, "%", aim);
    let mut threads: Vec<(&str, f64)> =
        after.threads.keys().map(|name| (&**name, percent(&|spent| spent.of_thread(name)))).collect();
    threads.sort_by(|a, b| b.1.total_cmp(&a.1));
    for (name, percent) in threads.iter().filter(|(_, percent)| *percent >= 0.01) {
        line(&format!("    threads {name}"), *percent, "%", None);
    }
    line("    of which in the simulated driver, not in the sum", percent(&|spent| spent.driver), "%", None);
    Ok(sum)
}

fn steady(size: Size, aims: Option<&Aims>) -> Result<()> {
    let mut world = World::new(size)?;
    let agent = world.agent()?;
    let pid = agent.process.0.id();
    std::thread::sleep(WARM_UP);
    let idle = Memory::of(pid)?;
    world.use_gpus(size.processes, 0..size.containers)?;
    world.settled(&agent, size.gpus * size.processes)?;
    std::thread::sleep(WARM_UP);
    let sum = quiet(&world, &agent, aims.map(|aims| aims.quiet))?;
    let (page, cost) = (page(&agent, &world)?, scrapes(&agent, &world, sum)?);
    line("page", page.bytes as f64 / 1e6, "MB", aims.map(|aims| aims.page_bytes / 1e6));
    line("    series", page.series as f64, "", None);
    line("    series of a pair", page.pair_series as f64 / page.pairs as f64, "", Some(SERIES_A_PAIR));
    line("    series about the agent", page.own_series as f64, "", Some(OWN_SERIES));
    line("scrape: processor time", cost.cpu, "ms", aims.map(|aims| aims.scrape_cpu));
    line("    p50", cost.p50, "ms", None);
    line("    p99", cost.p99, "ms", aims.map(|aims| aims.scrape_p99));
    let used = Memory::of(pid)?;
    line("resident memory", used.all, "MiB", aims.map(|aims| aims.rss));
    line("    code", used.code, "MiB", None);
    line("    rings of kernel events", used.rings, "MiB", None);
    line("    all else", used.own, "MiB", None);
    line("        of which tables of processes and cgroups", page.table_bytes / f64::from(1 << 20), "MiB", None);
    line("    all else before any GPU was used", idle.own, "MiB", None);
    Ok(())
}

/// Memory of a pair: the same node with 64 of them and with 1,024, where each container uses one GPU, and where each uses all eight.
fn pairs() -> Result<()> {
    const GPUS: usize = 8;
    const FEW: usize = 8;
    const MANY: usize = 128;
    for (what, gpus_each) in [("of a container with one GPU", 1), ("of a container with eight GPUs", GPUS)] {
        let containers = |processes: usize| processes * GPUS / gpus_each;
        let mut world = World::new(Size { gpus: GPUS, processes: MANY, containers: containers(MANY), others: 0 })?;
        let agent = world.agent()?;
        let mut measured = Vec::new();
        for (processes, present) in [(FEW, 0), (MANY - FEW, FEW)] {
            world.use_gpus(processes, containers(present)..containers(present + processes))?;
            world.settled(&agent, GPUS * (present + processes))?;
            std::thread::sleep(2 * WARM_UP);
            measured.push((page(&agent, &world)?.pairs as f64, Memory::of(agent.process.0.id())?.own));
        }
        let &[(few, before), (many, after)] = measured.as_slice() else { unreachable!("two were measured") };
        line(&format!("memory without code and rings, {few} pairs"), before, "MiB", None);
        line(&format!("memory without code and rings, {many} pairs"), after, "MiB", None);
        line(&format!("a pair {what}"), (after - before) * 1024.0 / (many - few), "KiB", Some(KIB_A_PAIR));
    }
    Ok(())
}

/// Containers that used a GPU once and are idle since.
fn used_once() -> Result<()> {
    let world = World::new(Size { gpus: 8, processes: 0, containers: 3_500, others: 0 })?;
    let agent = world.agent()?;
    let pid = agent.process.0.id();
    std::thread::sleep(WARM_UP);
    let before = Memory::of(pid)?;
    world.use_gpus_once()?;
    // Until their ten seconds as active containers are over.
    std::thread::sleep(2 * WARM_UP);
    let sum = quiet(&world, &agent, None)?;
    let (page, cost) = (page(&agent, &world)?, scrapes(&agent, &world, sum)?);
    let after = Memory::of(pid)?;
    line("pairs", page.pairs as f64, "", None);
    line("page", page.bytes as f64 / 1e6, "MB", None);
    line("scrape: processor time", cost.cpu, "ms", None);
    line("resident memory", after.all, "MiB", None);
    line("    a pair", (after.own - before.own) * 1024.0 / page.pairs as f64, "KiB", Some(KIB_A_PAIR));
    Ok(())
}

/// The processor time of a container that comes and goes, with GPU use, beyond what the agent spends without it.
fn churn(is_named: bool) -> Result<()> {
    const LASTS: Duration = Duration::from_secs(30);
    for rate in [12, 40] {
        let (what, named, unnamed, aim) =
            if is_named { ("named", rate, 0, None) } else { ("that no source names", 0, rate, Some(UNNAMED_MS)) };
        let mut world = World::new(Size { gpus: 8, processes: 8, containers: 64, others: 0 })?;
        let agent = world.agent()?;
        world.use_gpus(8, 0..64)?;
        world.settled(&agent, 64)?;
        std::thread::sleep(WARM_UP);
        let before = Spent::now(&agent, &world)?;
        std::thread::sleep(QUIET);
        let quiet = Spent::now(&agent, &world)?;
        let started = world.churn(named, unnamed, LASTS)?;
        // Until the agent gives them up.
        std::thread::sleep(Duration::from_secs(12));
        let after = Spent::now(&agent, &world)?;
        let ms_each = |of: &dyn Fn(&Spent) -> f64| {
            let without = before.rate_until(&quiet, of) * quiet.seconds_until(&after);
            (of(&after) - of(&quiet) - without) * 1e3 / f64::from(started)
        };
        line(&format!("a container {what}, {rate} a second"), ms_each(&|spent| spent.all), "ms", aim);
        let of_thread = |name: &str| ms_each(&|spent| spent.of_thread(name));
        for (name, ms) in after.threads.keys().map(|name| (name, of_thread(name))).filter(|(_, ms)| *ms >= 0.01) {
            line(&format!("    threads {name}"), ms, "ms", None);
        }
    }
    Ok(())
}

/// Memory while containers come and go: flat once the oldest have passed the time for which ended ones are kept.
fn growth() -> Result<()> {
    let mut world = World::new(Size { gpus: 8, processes: 8, containers: 64, others: 0 })?;
    let agent = world.agent()?;
    let pid = agent.process.0.id();
    world.use_gpus(8, 0..64)?;
    world.settled(&agent, 64)?;
    line("resident memory at the start", Memory::of(pid)?.all, "MiB", None);
    for minute in 1..=GROWTH_MINUTES {
        for _ in 0..4 {
            world.churn(5, 5, Duration::from_secs(15))?;
            agent.page()?;
        }
        let page = page(&agent, &world)?;
        line(&format!("after {minute} min of 5 named and 5 unnamed starts a second"), Memory::of(pid)?.all, "MiB", None);
        line("    page", page.bytes as f64 / 1e6, "MB", None);
    }
    Ok(())
}
