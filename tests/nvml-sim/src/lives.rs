//! Short lives in bulk: processes that start inside a cgroup, load a GPU from their first instant and are killed when their time is up.
//!
//! With `--launch` a process starts as a container's first process does: forked outside, moved inside, then exec'd.
//!
//! One thread. Without `--launch` a child is a bare clone that only waits, so that a life costs less than a millisecond. Its load is declared when it is
//! there and ended before it is killed: what the log says lies within the process's life. Children die with this process.

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

/// Between the least and the most demand there are so many to draw.
const DEMAND_STEPS: u64 = 10_000;

#[derive(clap::Args)]
pub struct Lives {
    #[arg(long)]
    dir: PathBuf,
    /// How many processes
    #[arg(long)]
    count: u64,
    /// How many of them live at a time
    #[arg(long, default_value_t = 12)]
    at_once: usize,
    /// How long each lives, drawn between the two: 5ms..50ms
    #[arg(long, value_name = "FROM..TO", value_parser = arguments::durations)]
    lasting: (Duration, Duration),
    /// Launch each as container runtimes do: fork it in this program's own cgroup, move it to its own by writing cgroup.procs, then
    /// exec; so much time, drawn between the two, is between fork and exec. Without it each is born inside its cgroup
    #[arg(long, value_name = "FROM..TO", value_parser = arguments::durations, conflicts_with = "reuse_pid")]
    launch: Option<(Duration, Duration)>,
    /// Directory on cgroup2 that processes start in, with --launch also on cgroup v1; may be given more than once
    #[arg(long = "cgroup", value_name = "DIR", required = true)]
    cgroups: Vec<PathBuf>,
    /// Part of its GPU that each wants, above 0 and up to 1; with two, such as 0.01..0.4, drawn between them
    #[arg(long, value_name = "DEMAND", value_parser = arguments::demands, default_value = "0.9")]
    demand: (f64, f64),
    /// GPU memory that each holds, such as 2GiB or 512MiB
    #[arg(long, value_parser = arguments::bytes, default_value = "0")]
    mem: u64,
    #[command(flatten)]
    ways: ways::Options,
    /// Indices of the GPUs; all when left out
    #[arg(long, value_name = "GPU,..", value_delimiter = ',')]
    gpus: Vec<usize>,
    /// Same seed, same draws
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Give every process the pid of the one before; they live one at a time then
    #[arg(long)]
    reuse_pid: bool,
}

/// A life as it is told on stdout.
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
    told: Reported,
}

struct Crowd<'a> {
    asked: &'a Lives,
    ways: Ways,
    gpus: Vec<usize>,
    cgroups: Vec<Cgroup>,
    /// Device nodes that a process holds, by GPU.
    nodes: Vec<Vec<CString>>,
    log: Log,
    alive: Vec<Lifetime>,
    gone: Vec<Reported>,
}

/// Lets them live and prints them; what went wrong in between, or a signal, ends those that are there.
pub fn run(asked: &Lives) -> anyhow::Result<()> {
    let mut crowd = Crowd::new(asked)?;
    hold::catch_signals();
    let lived = crowd.live();
    let ended = crowd.end(|_| true);
    crowd.gone.sort_by_key(|told| told.begin_us);
    let mut out = io::BufWriter::new(io::stdout().lock());
    for told in &crowd.gone {
        writeln!(out, "{}", serde_json::to_string(told)?)?;
    }
    out.flush()?;
    lived.and(ended)
}

impl<'a> Crowd<'a> {
    fn new(asked: &'a Lives) -> anyhow::Result<Self> {
        if asked.count == 0 || asked.at_once == 0 {
            bail!("--count {} --at-once {}: give at least 1 of each", asked.count, asked.at_once);
        }
        let dir = asked.dir.display();
        let world = World::read(&asked.dir)?;
        let there = world.gpus.len();
        if there == 0 {
            bail!("{dir} has no GPUs; make some with `nvml-sim init --dir {dir} --gpus N`");
        }
        let gpus = if asked.gpus.is_empty() { (0..there).collect() } else { asked.gpus.clone() };
        gpus.iter().try_for_each(|gpu| asked.ways.check(&asked.dir, &world, *gpu, "--gpus"))?;
        let ways = asked.ways.ways(true)?;
        let cgroups =
            asked.cgroups.iter().map(|path| Cgroup::open(path, asked.launch.is_some())).collect::<anyhow::Result<_>>()?;
        let path = |path: PathBuf| CString::new(path.into_os_string().into_vec()).context("--dir has a zero byte");
        let nodes = |gpu| world.nodes(&asked.dir, Some(gpu)).into_iter().map(path).collect::<anyhow::Result<Vec<_>>>();
        let nodes = (0..there).map(nodes).collect::<anyhow::Result<_>>()?;
        Ok(Self { asked, ways, gpus, cgroups, nodes, log: Log::open(&asked.dir)?, alive: Vec::new(), gone: Vec::new() })
    }

    fn live(&mut self) -> anyhow::Result<()> {
        let at_once = if self.asked.reuse_pid { 1 } else { self.asked.at_once };
        let mut born = 0;
        let mut last_pid = None;
        while !hold::signalled() && (born < self.asked.count || !self.alive.is_empty()) {
            if born < self.asked.count && self.alive.len() < at_once {
                let life = self.begin(born, last_pid.filter(|_| self.asked.reuse_pid))?;
                last_pid = Some(life.told.pid);
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
        let draw = |what: u64, below: u64| mix(self.asked.seed, number, what) % below;
        let cgroup = &self.cgroups[draw(1, self.cgroups.len() as u64) as usize];
        let gpu = self.gpus[draw(2, self.gpus.len() as u64) as usize];
        let between =
            |what, (from, to): (Duration, Duration)| from + Duration::from_micros(draw(what, (to - from).as_micros() as u64 + 1));
        let lasts = between(3, self.asked.lasting);
        let (least, most) = self.asked.demand;
        let demand = least + (most - least) * draw(4, DEMAND_STEPS + 1) as f64 / DEMAND_STEPS as f64;
        let holds = &self.nodes[gpu];
        let child = match (pid, self.asked.launch) {
            (Some(pid), _) => Child::start_as(pid, cgroup, holds)?,
            (None, Some(held)) => Child::launch(cgroup, between(5, held), holds)?,
            (None, None) => Child::start(cgroup, holds)?,
        };
        let due = Instant::now() + lasts;
        let pid = child.pid;
        let start_time = loads::start_time(pid)
            .with_context(|| format!("process {pid} ended at once; something kills what starts in {}", cgroup.name))?;
        let (memory_bytes, ways) = (self.asked.mem, self.ways.clone());
        let load = Load { id: 0, pid, start_time, gpu, demand, memory_bytes, begin_us: 0, end_us: None, ways };
        let (load_id, begin_us) = self.log.begin(load)?;
        let told = Reported { pid, start_time, cgroup: cgroup.name.clone(), gpu, demand, begin_us, end_us: 0, gone_us: 0 };
        Ok(Lifetime { child, load_id, due, told })
    }

    /// Until the next time is up; a life that something else ended is due then too.
    fn wait(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let left = self.alive.iter().map(|life| life.due.saturating_duration_since(now)).min().unwrap_or_default();
        let left = left.min(hold::LOOK_EVERY);
        let wait = libc::timespec { tv_sec: left.as_secs() as libc::time_t, tv_nsec: left.subsec_nanos().into() };
        let poll = |life: &Lifetime| libc::pollfd { fd: life.child.pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut polls: Vec<libc::pollfd> = self.alive.iter().map(poll).collect();
        // SAFETY: as many valid pollfds as said, a valid timespec and no signal mask.
        if unsafe { libc::ppoll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, &raw const wait, std::ptr::null()) } < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
        }
        for (life, _) in self.alive.iter_mut().zip(&polls).filter(|(_, poll)| poll.revents != 0) {
            life.due = now;
        }
        Ok(())
    }

    /// Ends those that are due: first every load, then its process.
    fn end(&mut self, due: impl Fn(&Lifetime) -> bool) -> anyhow::Result<()> {
        for life in self.alive.iter_mut().filter(|life| due(life) && life.told.end_us == 0) {
            life.told.end_us = self.log.end(life.load_id)?;
            life.child.kill()?;
        }
        for mut life in self.alive.extract_if(.., |life| life.told.end_us > 0) {
            life.child.reap()?;
            life.told.gone_us = loads::now_us();
            self.gone.push(life.told);
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
        asked: Lives,
    }

    /// What is wrong with the arguments, in a world of so many GPUs.
    fn wrong(gpus: usize, arguments: &[&str]) -> String {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("world.toml"), "[[gpus]]\n".repeat(gpus)).unwrap();
        std::fs::write(dir.path().join(loads::FILE), "").unwrap();
        let common = ["lives", "--dir", dir.path().to_str().unwrap()];
        match LivesCli::try_parse_from(common.iter().chain(arguments)) {
            Ok(cli) => Crowd::new(&cli.asked).map_or_else(|e| format!("{e:#}"), |crowd| format!("ok {:?}", crowd.gpus)),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn what_cannot_be_is_named() {
        let check = |gpus, arguments: &str, expect: &str| {
            let told = wrong(gpus, &arguments.split(' ').collect::<Vec<_>>());
            assert!(told.contains(expect), "{arguments}: {told}");
        };
        check(1, "--count 0 --lasting 5ms..50ms --cgroup /", "--count 0 --at-once 12: give at least 1 of each");
        check(1, "--count 1 --at-once 0 --lasting 5ms..50ms --cgroup /", "--count 1 --at-once 0: give at least 1 of each");
        check(1, "--count 1 --lasting 50ms..5ms --cgroup /", "from the shorter to the longer");
        check(0, "--count 1 --lasting 5ms..50ms --cgroup /", "has no GPUs; make some with `nvml-sim init");
        check(2, "--count 1 --lasting 5ms..50ms --cgroup / --gpus 1,2", "--gpus 2: ");
        check(2, "--count 1 --lasting 5ms..50ms --cgroup / --demand 2", "at most 1");
        check(2, "--count 1 --lasting 5ms..50ms --cgroup / --demand 0.4..0.1", "from the smaller to the larger");
        check(2, "--count 1 --lasting 5ms..50ms --cgroup / --mig 0", "--mig 0: GPU 0 has 0 MIG devices");
        check(2, "--count 1 --lasting 5ms..50ms --cgroup / --every 5ms", "--on");
        check(2, "--count 1 --lasting 5ms..50ms --cgroup / --every 5ms --on 6ms", "at most --every");
        check(1, "--count 1 --lasting 5ms..50ms", "--cgroup <DIR>");
        check(1, "--count 1 --lasting 5ms..50ms --cgroup /proc --launch 0ms..1ms --reuse-pid", "cannot be used with");
        check(1, "--count 1 --lasting 5ms..50ms --cgroup /proc --launch 0ms..1ms", "--cgroup /proc: it must be a directory on");
        check(1, "--count 1 --lasting 5ms..50ms --cgroup /proc", "--cgroup /proc: it must be a directory on cgroup2");
        check(1, "--count 1 --lasting 5ms..50ms --cgroup /no/such", "--cgroup /no/such: it must be a directory on cgroup2");
        check(1, "--count 1 --lasting 5ms..50ms --cgroup /proc/version", "/proc/version: it must be a directory on cgroup2");
    }
}
