//! Kernel tracking as a whole: the real agent on the real kernel. Each section prints its measurements and their number.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::programs::RawTracePoint;
use gpu_sampler_benches::{Sysctl, at_most, bpf_use, line, quantile, total, wanted};
use gpu_sampler_tests::kernel::{Actor, CgroupTree};
use gpu_sampler_tests::record::credited;
use gpu_sampler_tests::{Agent, Sample, Sim, get, sum, var};

type KernelSection = fn() -> Result<()>;

const SIGKILL: i32 = 9;
const STRICT: [&str; 2] = ["--kernel-mode", "raw_tracepoint"];

fn main() -> Result<()> {
    let sections: [(&str, KernelSection); 7] = [
        ("cold-start", cold_start),
        ("mkdir", mkdir_to_identified),
        ("life", kernel_time_of_a_life),
        ("counters", loss_counters),
        ("restart", complete_after_restart),
        ("memory", memory_at_65536),
        ("storage", map_or_events),
    ];
    for (name, run) in sections {
        if wanted(name) {
            println!("\n{name}");
            run()?;
        }
    }
    Ok(())
}

fn sim() -> Result<Sim> {
    Sim::new("[[gpus]]")
}

/// Starts processes that stay, spread over cgroups; none is reaped before the actor ends.
fn many_processes(processes: u32, tree: &CgroupTree, cgroups: usize) -> Result<Actor> {
    let dirs = (0..cgroups).map(|n| Ok(tree.container(n)?.1.to_string_lossy().into_owned())).collect::<Result<Vec<_>>>()?;
    let lives = processes.to_string();
    let args: Vec<&str> = ["storm", &lives, "1"].into_iter().chain(dirs.iter().take(1_000).map(String::as_str)).collect();
    let mut actor = Actor::start(&var("ACTOR_BIN")?, &args)?;
    let stayed = actor.line()?.split(' ').count();
    ensure!(stayed == processes as usize, "only {stayed} of {processes} processes could be started");
    Ok(actor)
}

fn cold_start() -> Result<()> {
    let (sim, tree) = (sim()?, CgroupTree::new("bench-start")?);
    let _crowd = many_processes(5_000, &tree, 1_000)?;
    let mut took = Vec::new();
    for _ in 0..10 {
        let port = gpu_sampler_tests::free_port()?;
        let mut command = Agent::command(Some(&sim))?;
        command.args(["--listen", &format!("127.0.0.1:{port}")]).args(STRICT).stderr(Stdio::null());
        let from = Instant::now();
        let _agent = gpu_sampler_tests::Running(command.spawn()?);
        while get(port, "/readyz").is_err() {
            ensure!(from.elapsed() < Duration::from_secs(30), "the agent is not ready");
            std::thread::sleep(Duration::from_millis(1));
        }
        took.push(from.elapsed().as_secs_f64() * 1e3);
    }
    took.sort_by(f64::total_cmp);
    line("start to ready, 1,000 cgroups, 5,000 processes: p50 of 10", quantile(&took, 0.5), "ms", Some(250.0));
    line("                                                  max", quantile(&took, 1.0), "ms", Some(250.0));
    Ok(())
}

fn mkdir_to_identified() -> Result<()> {
    const N: usize = 2_000;
    let (sim, tree) = (sim()?, CgroupTree::new("bench-mkdir")?);
    let agent = Agent::start(Some(&sim), &STRICT)?;
    for n in 0..N {
        let (_, dir) = tree.container(n)?;
        std::thread::sleep(Duration::from_millis(3));
        std::fs::remove_dir(dir)?;
        std::thread::sleep(Duration::from_millis(3));
    }
    std::thread::sleep(Duration::from_secs(1));
    let page = agent.scrape()?;
    let name = "gpu_sampler_identify_seconds";
    line("mkdir of a container to identified, 2,000: p50 at most", at_most(&page, name, 0.5)? * 1e6, "us", None);
    line("                                           p99 at most", at_most(&page, name, 0.99)? * 1e6, "us", Some(250.0));
    Ok(())
}

/// Runs short processes, one after the other: fork or vfork, exec, exit.
fn short_processes(lives: u32) -> Result<()> {
    for _ in 0..lives {
        ensure!(Command::new("true").stdin(Stdio::null()).status()?.success());
    }
    Ok(())
}

fn kernel_time_of_a_life() -> Result<()> {
    const LIVES: u32 = 5_000;
    let sim = sim()?;
    let agent = Agent::start(Some(&sim), &STRICT)?;
    let _stats = Sysctl::set("kernel.bpf_stats_enabled", "1")?;
    let pid = agent.process.0.id();
    std::thread::sleep(Duration::from_secs(1));
    let (kernel, page) = (bpf_use(pid)?, agent.scrape()?);
    short_processes(LIVES)?;
    std::thread::sleep(Duration::from_secs(1));
    let (kernel_after, page_after) = (bpf_use(pid)?, agent.scrape()?);
    let ns = (kernel_after.run_time_ns - kernel.run_time_ns) as f64;
    let runs = (kernel_after.runs - kernel.runs) as f64;
    line("kernel time per process (fork, exec, exit)", ns / f64::from(LIVES) / 1e3, "us", Some(3.0));
    line("    program runs per process", runs / f64::from(LIVES), "", None);
    drained("a trickle", &page, &page_after);
    let tree = CgroupTree::new("bench-life")?;
    let (_, dir) = tree.container(0)?;
    let mut storm = Actor::start(&var("ACTOR_BIN")?, &["storm", "20000", "20000", &dir.to_string_lossy()])?;
    storm.line()?;
    std::thread::sleep(Duration::from_secs(1));
    drained("a storm", &page_after, &agent.scrape()?);
    Ok(())
}

/// Costs of what the agent reads at most ten times a second (the skip counters of its programs) and every second from /proc (entries to
/// check).
fn loss_counters() -> Result<()> {
    const READS: u32 = 2_000;
    const READS_A_SECOND: f64 = 10.0;
    const CHECKS_A_SECOND: f64 = 100.0;
    let agent = Agent::start(None, &STRICT)?;
    let fdinfo = format!("/proc/{}/fdinfo", agent.process.0.id());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(fdinfo)? {
        let path = entry?.path();
        // The agent may close a descriptor meanwhile.
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        // Programs of this type that are attached, or were loaded for another use: the agent reads the counters of seven.
        if text.contains("prog_type:\t17") && files.len() < 7 {
            files.push(std::fs::File::open(path)?);
        }
    }
    ensure!(files.len() == 7, "{} programs instead of 7", files.len());
    let mut text = [0; 4096];
    let per_read = cpu_us(READS, || files.iter().try_for_each(|file| file.read_at(&mut text, 0).map(drop)))?;
    line("skip counters of 7 programs: processor time of a read", per_read, "us", None);
    line("    at 10 a second, share of a core", per_read * READS_A_SECOND / 1e4, "%", Some(0.1));
    let per_check = cpu_us(READS, || std::fs::read(format!("/proc/{}/stat", std::process::id())).map(drop))?;
    line("a check against /proc: processor time", per_check, "us", None);
    line("    at 100 a second (12,000 processes and more), share of a core", per_check * CHECKS_A_SECOND / 1e4, "%", Some(0.3));
    Ok(())
}

/// Processor time of this thread per call, over `n` calls.
fn cpu_us(n: u32, mut call: impl FnMut() -> std::io::Result<()>) -> Result<f64> {
    let used = || -> Result<u64> {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
        Ok(text.split(' ').next().context("schedstat")?.parse()?)
    };
    let before = used()?;
    for _ in 0..n {
        call()?;
    }
    Ok((used()? - before) as f64 / 1e3 / f64::from(n))
}

fn drained(what: &str, before: &[Sample], after: &[Sample]) {
    let grown = |name| total(after, name) - total(before, name);
    let events = grown("gpu_sampler_kernel_events_total");
    let ns = grown("gpu_sampler_kernel_drain_seconds_total") * 1e9 / events;
    line(&format!("drain per event, tables included, {what} of {events} events"), ns, "ns", Some(150.0));
    line("    lost", grown("gpu_sampler_kernel_events_lost_total"), "", None);
}

fn complete_after_restart() -> Result<()> {
    let gpus = "[[gpus]]\n".repeat(8);
    let sim = Sim::new(&format!("seed = 1\nperiod_us = 100000\npid_rule = 'last'\n{gpus}"))?;
    let tree = CgroupTree::new("bench-restart")?;
    let dirs = (0..50).map(|n| Ok(tree.container(n)?.1)).collect::<Result<Vec<_>>>()?;
    let dirs: Vec<&Path> = dirs.iter().map(|dir| dir.as_path()).collect();
    let mut first = Agent::start(Some(&sim), &STRICT)?;
    let lives = sim.lives(&dirs, &["--count", "8000", "--at-once", "12", "--lasting", "5ms..50ms"])?;
    std::thread::sleep(Duration::from_secs(3));
    first.process.ends_with(SIGKILL)?;
    let started_us = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_micros() as f64;
    let second = Agent::start(Some(&sim), &STRICT)?;
    lives.all()?;
    std::thread::sleep(Duration::from_secs(12));
    second.scrape()?;
    let got = credited(&second.scrape()?);
    // The credited samples are the last ones of each GPU; their first one shows since when.
    let samples = sim.samples()?;
    let mut since = Vec::new();
    for gpu in 0..8 {
        let on_gpu: Vec<_> = samples.iter().filter(|s| s.gpu == gpu).collect();
        let uuid = &on_gpu.first().context("recorded samples")?.uuid;
        let n: u64 = got.iter().filter(|((_, on), _)| on == uuid).map(|(_, n)| n).sum();
        let first = on_gpu.get(on_gpu.len() - n as usize).context("credited samples")?;
        since.push((first.at_us as f64 - started_us) / 1e3);
    }
    since.sort_by(f64::total_cmp);
    line("killed, restarted: first credited sample after the start, of 8", quantile(&since, 0.5), "ms", Some(1000.0));
    line("                                                     latest", quantile(&since, 1.0), "ms", Some(1000.0));
    Ok(())
}

fn resident_bytes(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).and_then(|l| l.trim().split(' ').next());
    Ok(kib.context("VmRSS")?.parse::<u64>()? * 1024)
}

fn memory_at_65536() -> Result<()> {
    const MIB: f64 = (1 << 20) as f64;
    let _pids = Sysctl::set("kernel.pid_max", "131072")?;
    let (sim, tree) = (sim()?, CgroupTree::new("bench-memory")?);
    let agent = Agent::start(Some(&sim), &STRICT)?;
    let pid = agent.process.0.id();
    std::thread::sleep(Duration::from_secs(1));
    let idle = resident_bytes(pid)?;
    let many_processes = many_processes(65_536, &tree, 100)?;
    std::thread::sleep(Duration::from_secs(2));
    let page = agent.scrape()?;
    let table = |name: &str, table: &str| sum(&page, name, &[("table", table)]).unwrap_or_default();
    let living = table("gpu_sampler_identity_entries", "living");
    ensure!(living >= 65_536.0, "{living} in the table");
    line("65,536 living processes: table", table("gpu_sampler_identity_bytes", "living") / MIB, "MiB", Some(16.0));
    line("    resident memory of the agent, grown by", (resident_bytes(pid)? as f64 - idle as f64) / MIB, "MiB", None);
    line("    resident memory of the agent", resident_bytes(pid)? as f64 / MIB, "MiB", None);
    line("    kernel maps, independent of the load", bpf_use(pid)?.map_bytes as f64 / MIB, "MiB", Some(9.0));
    drop(many_processes);
    let mut exited: f64 = 0.0;
    gpu_sampler_tests::wait_for("all processes have ended", Duration::from_secs(120), || {
        let page = agent.scrape()?;
        let table = |name: &str, table: &str| sum(&page, name, &[("table", table)]).unwrap_or_default();
        exited = exited.max(table("gpu_sampler_identity_bytes", "exited"));
        Ok((table("gpu_sampler_identity_entries", "living") < 1_000.0).then_some(()))
    })?;
    line("    as they end, largest table of exited processes", exited / MIB, "MiB", Some(40.0));
    Ok(())
}

/// The same facts at exec and exit, kept in a kernel map until they are read, or sent to user space as events.
fn map_or_events() -> Result<()> {
    const LIVES: u32 = 5_000;
    let _stats = Sysctl::set("kernel.bpf_stats_enabled", "1")?;
    for (way, programs) in [("map", ["keep_exec", "keep_exit"]), ("events", ["report_exec", "report_exit"])] {
        let mut ebpf = aya::Ebpf::load_file(var("STORAGE_BENCH_OBJECT")?)?;
        for name in programs {
            let program: &mut RawTracePoint = ebpf.program_mut(name).context(name)?.try_into()?;
            program.load()?;
            program.attach(if name.ends_with("exec") { "sched_process_exec" } else { "sched_process_exit" })?;
        }
        let us = std::process::id();
        let before = bpf_use(us)?;
        short_processes(LIVES)?;
        let after = bpf_use(us)?;
        let (ns, runs) = ((after.run_time_ns - before.run_time_ns) as f64, (after.runs - before.runs) as f64);
        line(&format!("{way}: kernel time per exec or exit, {runs} of them"), ns / runs, "ns", None);
        if way == "map" {
            let map = ebpf.map("KEPT").context("KEPT")?;
            let map: aya::maps::HashMap<_, u64, [u64; 4]> = map.try_into()?;
            let keys: Vec<u64> = map.keys().take(1_000).collect::<Result<_, _>>()?;
            let from = Instant::now();
            for key in &keys {
                map.get(key, 0)?;
            }
            line("map: user space reads one process", from.elapsed().as_nanos() as f64 / keys.len() as f64, "ns", None);
            let bytes = after.largest_map_bytes as f64;
            line("map: kernel memory, 65,536 living and 40 s of 10,000 exits/s", bytes / (1 << 20) as f64, "MiB", None);
        }
    }
    println!(
        "events: user space has the cost of draining per event above (life), and at most 40 MiB for exited processes (memory)"
    );
    Ok(())
}
