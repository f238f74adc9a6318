//! Short-lived processes in bulk: they start inside a cgroup, with a load from their first instant, and are killed when their time is up.
//!
//! With `--launch` a process starts as a container's first process does: forked outside, moved inside, then exec'd.
//!
//! One thread. Without `--launch` a child is a bare clone that only waits, so that a process costs less than a millisecond. Its load is
//! declared after its start and ended before it is killed, so the load in the log lies within the process's lifetime. Children die with
//! this process.

use std::ffi::CString;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nvidia_ml_sim::loads::{self, Load, Log, Ways};
use nvidia_ml_sim::model::mix;
use nvidia_ml_sim::world::World;
use serde::Serialize;

use crate::child::{Cgroup, Child};
use crate::{arguments, hold, ways};

/// Number of steps between the smallest and the largest demand.
const DEMAND_STEPS: u64 = 10_000;

#[derive(clap::Args)]
pub struct Lives {
    #[arg(long)]
    dir: PathBuf,
    /// Number of processes
    #[arg(long)]
    count: u64,
    /// Number of concurrent processes
    #[arg(long, default_value_t = 12)]
    at_once: usize,
    /// Lifetime, drawn from this range: 5ms..50ms
    #[arg(long, value_name = "FROM..TO", value_parser = arguments::durations)]
    lasting: (Duration, Duration),
    /// Launch each as container runtimes do: fork it in this program's own cgroup, move it by writing cgroup.procs, then exec; the time
    /// from fork to exec is drawn from this range. Default: start each inside its cgroup
    #[arg(long, value_name = "FROM..TO", value_parser = arguments::durations, conflicts_with = "reuse_pid")]
    launch: Option<(Duration, Duration)>,
    /// Directory on cgroup2 in which processes start, with --launch also on cgroup v1; repeatable
    #[arg(long = "cgroup", value_name = "DIR", required = true)]
    cgroups: Vec<PathBuf>,
    /// Demand of each process for its GPU, above 0 and up to 1; a range such as 0.01..0.4 is drawn from
    #[arg(long, value_name = "DEMAND", value_parser = arguments::demands, default_value = "0.9")]
    demand: (f64, f64),
    /// GPU memory that each process holds, such as 2GiB or 512MiB
    #[arg(long, value_parser = arguments::bytes, default_value = "0")]
    mem: u64,
    #[command(flatten)]
    ways: ways::Options,
    /// Indices of the GPUs; default: all
    #[arg(long, value_name = "GPU,..", value_delimiter = ',')]
    gpus: Vec<usize>,
    /// Take the cgroups in turn, and the GPUs one after the other with equal numbers of processes, instead of drawing both
    #[arg(long)]
    in_turn: bool,
    /// Seed of the draws
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Give every process the pid of the one before; implies one process at a time
    #[arg(long)]
    reuse_pid: bool,
}

/// A process in the output.
#[derive(Serialize)]
struct Reported {
    pid: u32,
    start_time: u64,
    cgroup: String,
    gpu: usize,
    demand: f64,
    begin_us: u64,
    end_us: u64,
    /// When the process had been reaped.
    gone_us: u64,
}

struct Lifetime {
    child: Child,
    load_id: u64,
    due: Instant,
    report: Reported,
}

struct ProcessGroup<'a> {
    options: &'a Lives,
    ways: Ways,
    gpus: Vec<usize>,
    cgroups: Vec<Cgroup>,
    /// Device nodes that a process holds open, by GPU.
    nodes: Vec<Vec<CString>>,
    log: Log,
    alive: Vec<Lifetime>,
    gone: Vec<Reported>,
}

/// Runs the processes and prints them; after an error or a signal, the running ones are ended.
pub fn run(options: &Lives) -> anyhow::Result<()> {
    let mut group = ProcessGroup::new(options)?;
    hold::catch_signals();
    let lived = group.live();
    let ended = group.end(|_| true);
    group.gone.sort_by_key(|report| report.begin_us);
    let mut out = io::BufWriter::new(io::stdout().lock());
    for report in &group.gone {
        writeln!(out, "{}", serde_json::to_string(report)?)?;
    }
    out.flush()?;
    lived.and(ended)
}

impl<'a> ProcessGroup<'a> {
    fn new(options: &'a Lives) -> anyhow::Result<Self> {
        if options.count == 0 || options.at_once == 0 {
            bail!("--count {} --at-once {}: both must be at least 1", options.count, options.at_once);
        }
        let dir = options.dir.display();
        let world = World::read(&options.dir)?;
        let count = world.gpus.len();
        if count == 0 {
            bail!("{dir} has no GPUs; create some with `nvml-sim init --dir {dir} --gpus N`");
        }
        let gpus = if options.gpus.is_empty() { (0..count).collect() } else { options.gpus.clone() };
        gpus.iter().try_for_each(|gpu| options.ways.check(&options.dir, &world, *gpu, "--gpus"))?;
        let ways = options.ways.ways(true)?;
        let cgroups =
            options.cgroups.iter().map(|path| Cgroup::open(path, options.launch.is_some())).collect::<anyhow::Result<_>>()?;
        let path = |path: PathBuf| CString::new(path.into_os_string().into_vec()).context("--dir has a zero byte");
        let nodes = |gpu| world.nodes(&options.dir, Some(gpu)).into_iter().map(path).collect::<anyhow::Result<Vec<_>>>();
        let nodes = (0..count).map(nodes).collect::<anyhow::Result<_>>()?;
        Ok(Self { options, ways, gpus, cgroups, nodes, log: Log::open(&options.dir)?, alive: Vec::new(), gone: Vec::new() })
    }

    fn live(&mut self) -> anyhow::Result<()> {
        let at_once = if self.options.reuse_pid { 1 } else { self.options.at_once };
        let mut born = 0;
        let mut last_pid = None;
        while !hold::signalled() && (born < self.options.count || !self.alive.is_empty()) {
            if born < self.options.count && self.alive.len() < at_once {
                let life = self.begin(born, last_pid.filter(|_| self.options.reuse_pid))?;
                last_pid = Some(life.report.pid);
                self.alive.push(life);
                born += 1;
            } else {
                self.wait()?;
            }
            let now = Instant::now();
            self.end(|life| life.due <= now)?;
        }
        Ok(())
    }

    fn begin(&mut self, number: u64, pid: Option<u32>) -> anyhow::Result<Lifetime> {
        let draw = |what: u64, below: u64| mix(self.options.seed, number, what) % below;
        let (cgroups, gpus) = (self.cgroups.len() as u64, self.gpus.len() as u64);
        let (cgroup, gpu) = if self.options.in_turn {
            (number % cgroups, number * gpus / self.options.count)
        } else {
            (draw(1, cgroups), draw(2, gpus))
        };
        let (cgroup, gpu) = (&self.cgroups[cgroup as usize], self.gpus[gpu as usize]);
        let between =
            |what, (from, to): (Duration, Duration)| from + Duration::from_micros(draw(what, (to - from).as_micros() as u64 + 1));
        let lasts = between(3, self.options.lasting);
        let (least, most) = self.options.demand;
        let demand = least + (most - least) * draw(4, DEMAND_STEPS + 1) as f64 / DEMAND_STEPS as f64;
        let holds = &self.nodes[gpu];
        let child = match (pid, self.options.launch) {
            (Some(pid), _) => Child::start_as(pid, cgroup, holds)?,
            (None, Some(held)) => Child::launch(cgroup, between(5, held), holds)?,
            (None, None) => Child::start(cgroup, holds)?,
        };
        let due = Instant::now() + lasts;
        let pid = child.pid;
        let start_time = devkit::process::start_time(pid)
            .with_context(|| format!("process {pid} ended at once; processes in {} are being killed", cgroup.name))?;
        let (memory_bytes, ways) = (self.options.mem, self.ways.clone());
        let load = Load { id: 0, pid, start_time, gpu, demand, memory_bytes, begin_us: 0, end_us: None, ways };
        let (load_id, begin_us) = self.log.begin(load)?;
        let report = Reported { pid, start_time, cgroup: cgroup.name.clone(), gpu, demand, begin_us, end_us: 0, gone_us: 0 };
        Ok(Lifetime { child, load_id, due, report })
    }

    /// Waits until the next process is due; a process that ended by itself becomes due, too.
    fn wait(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let left = self.alive.iter().map(|life| life.due.saturating_duration_since(now)).min().unwrap_or_default();
        let left = left.min(hold::CHECK_EVERY);
        let wait = libc::timespec { tv_sec: left.as_secs() as libc::time_t, tv_nsec: left.subsec_nanos().into() };
        let poll = |life: &Lifetime| libc::pollfd { fd: life.child.pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut polls: Vec<libc::pollfd> = self.alive.iter().map(poll).collect();
        // SAFETY: the array has that many valid pollfds, the timespec is valid, and there is no signal mask.
        if unsafe { libc::ppoll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, &raw const wait, std::ptr::null()) } < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
        }
        for (life, _) in self.alive.iter_mut().zip(&polls).filter(|(_, poll)| poll.revents != 0) {
            life.due = now;
        }
        Ok(())
    }

    /// Ends the due processes: first every load, then its process.
    fn end(&mut self, due: impl Fn(&Lifetime) -> bool) -> anyhow::Result<()> {
        for life in self.alive.iter_mut().filter(|life| due(life) && life.report.end_us == 0) {
            life.report.end_us = self.log.end(life.load_id)?;
            life.child.kill()?;
        }
        for mut life in self.alive.extract_if(.., |life| life.report.end_us > 0) {
            life.child.reap()?;
            life.report.gone_us = loads::now_us();
            self.gone.push(life.report);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct LivesCli {
        #[command(flatten)]
        options: Lives,
    }

    /// The error for these arguments in a world with this number of GPUs.
    fn wrong(gpus: usize, arguments: &[&str]) -> String {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("world.toml"), "[[gpus]]\n".repeat(gpus)).unwrap();
        std::fs::write(dir.path().join(loads::FILE), "").unwrap();
        let common = ["lives", "--dir", dir.path().to_str().unwrap()];
        match LivesCli::try_parse_from(common.iter().chain(arguments)) {
            Ok(cli) => ProcessGroup::new(&cli.options).map_or_else(|e| format!("{e:#}"), |group| format!("ok {:?}", group.gpus)),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn invalid_arguments_are_named() {
        let check = |gpus, arguments: &str, expect: &str| {
            let report = wrong(gpus, &arguments.split(' ').collect::<Vec<_>>());
            assert!(report.contains(expect), "{arguments}: {report}");
        };
        check(1, "--count 0 --lasting 5ms..50ms --cgroup /", "--count 0 --at-once 12: both must be at least 1");
        check(1, "--count 1 --at-once 0 --lasting 5ms..50ms --cgroup /", "--count 1 --at-once 0: both must be at least 1");
        check(1, "--count 1 --lasting 50ms..5ms --cgroup /", "shorter..longer");
        check(0, "--count 1 --lasting 5ms..50ms --cgroup /", "has no GPUs; create some with `nvml-sim init");
        check(2, "--count 1 --lasting 5ms..50ms --cgroup / --gpus 1,2", "--gpus 2: ");
        check(2, "--count 1 --lasting 5ms..50ms --cgroup / --demand 2", "at most 1");
        check(2, "--count 1 --lasting 5ms..50ms --cgroup / --demand 0.4..0.1", "smaller..larger");
        check(2, "--count 1 --lasting 5ms..50ms --cgroup / --mig 0", "--mig 0: GPU 0 has 0 MIG devices");
        check(2, "--count 1 --lasting 5ms..50ms --cgroup / --every 5ms", "--on");
        check(2, "--count 1 --lasting 5ms..50ms --cgroup / --every 5ms --on 6ms", "at most --every");
        check(2, "--count 1 --lasting 5ms..50ms --cgroup / --burst 1ms", "--burst must be at least 2ms");
        check(2, "--count 1 --lasting 5ms..50ms --cgroup / --burst 4ms --mps", "'--burst <BURST>' cannot be used with '--mps'");
        check(1, "--count 1 --lasting 5ms..50ms", "--cgroup <DIR>");
        check(1, "--count 1 --lasting 5ms..50ms --cgroup /proc --launch 0ms..1ms --reuse-pid", "cannot be used with");
        check(1, "--count 1 --lasting 5ms..50ms --cgroup /proc --launch 0ms..1ms", "--cgroup /proc: it must be a directory on");
        check(1, "--count 1 --lasting 5ms..50ms --cgroup /proc", "--cgroup /proc: it must be a directory on cgroup2");
        check(1, "--count 1 --lasting 5ms..50ms --cgroup /no/such", "--cgroup /no/such: it must be a directory on cgroup2");
        check(1, "--count 1 --lasting 5ms..50ms --cgroup /proc/version", "/proc/version: it must be a directory on cgroup2");
    }
}
