//! Runs scenarios: real processes in real cgroups, with loads declared to the simulated driver.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::kernel::{Actor, CgroupTree, attach};
use gpu_sampler_tests::{Running, Sim, wait_for};

use super::scenarios::{Act, CgroupPlace, Scenario, ScenarioUser};

const ACTOR: &str = env!("CARGO_BIN_EXE_actor");
const JOB: &str = "2500ms..2500ms";

pub struct Runner {
    pub sim: Sim,
    v2: CgroupTree,
    cpu: CgroupTree,
    /// Start of the session.
    pub begin: SystemTime,
}

/// A user as it was run.
pub struct Played {
    pub name: &'static str,
    /// Path of its cgroup; `None` for a host process.
    pub cgroup: Option<String>,
    /// Its processes, by act.
    pub acts: Vec<Vec<u32>>,
}

impl Played {
    pub fn pids(&self) -> Vec<u32> {
        self.acts.iter().flatten().copied().collect()
    }
}

pub fn rfc3339(at: SystemTime) -> Result<String> {
    let us = at.duration_since(SystemTime::UNIX_EPOCH)?.as_micros() as u64;
    Ok(nvidia_ml_sim::time::format(us))
}

/// The cgroups of a user's processes; `None` outside any.
struct Home {
    v2: Option<PathBuf>,
    cpu: Option<PathBuf>,
}

/// A process, and the guard that ends it when dropped.
struct Process {
    pid: u32,
    _ends: Ends,
}

#[expect(dead_code, reason = "held only to be dropped")]
enum Ends {
    Host(Running),
    /// The process is the actor's child.
    Contained(Actor),
}

impl Process {
    fn start(home: &Home, seconds: u32) -> Result<Self> {
        let seconds = seconds.to_string();
        let Some(dir) = &home.v2 else {
            let process = Running(Command::new("sleep").arg(seconds).stdin(Stdio::null()).spawn()?);
            return Ok(Self { pid: process.0.id(), _ends: Ends::Host(process) });
        };
        let mut actor = Actor::start(ACTOR, &["in", &dir.to_string_lossy(), "--", "sleep", &seconds])?;
        let pid = actor.pid()?;
        home.cpu.as_ref().map_or(Ok(()), |cpu| attach(pid, cpu))?;
        Ok(Self { pid, _ends: Ends::Contained(actor) })
    }
}

impl Runner {
    /// One GPU for each scenario, with alternating pid rules.
    pub fn new(gpus: usize, lead: Duration) -> Result<Self> {
        let rules = ["instant", "last"].into_iter().cycle();
        let gpus: String = rules.take(gpus).map(|rule| format!("[[gpus]]\npid_rule = '{rule}'\n")).collect();
        let sim = Sim::new(&format!("seed = 12\n{gpus}"))?;
        let (v2, cpu) = (CgroupTree::new("contention")?, CgroupTree::with_controller("cpu", "contention")?);
        Ok(Self { sim, v2, cpu, begin: SystemTime::now() + lead })
    }

    pub fn wait_until(&self, seconds: f64) {
        let at = if seconds < 0.0 {
            self.begin - Duration::from_secs_f64(-seconds)
        } else {
            self.begin + Duration::from_secs_f64(seconds)
        };
        std::thread::sleep(at.duration_since(SystemTime::now()).unwrap_or_default());
    }

    fn home(&self, n: usize, place: CgroupPlace) -> Result<Home> {
        let id = format!("{:08x}{n:056x}", std::process::id());
        let v2 = if place == CgroupPlace::Host { None } else { Some(self.v2.make(&id)?) };
        let CgroupPlace::WithCpu(quota) = place else { return Ok(Home { v2, cpu: None }) };
        let cpu = self.cpu.make(&id)?;
        if let Some(quota) = quota {
            let file = cpu.join("cpu.cfs_quota_us");
            std::fs::write(&file, quota.to_string()).with_context(|| file.display().to_string())?;
        }
        Ok(Home { v2, cpu: Some(cpu) })
    }

    /// Runs all scenarios at once, in real time. Returns the users of each, in the order of the scenarios.
    pub fn play(&self, scenarios: &[Scenario]) -> Result<Vec<Vec<Played>>> {
        let mut homes = Vec::new();
        for user in scenarios.iter().flat_map(|scenario| &scenario.users) {
            homes.push(self.home(homes.len(), user.place)?);
        }
        std::thread::scope(|scope| {
            let mut n = 0;
            let (mut acting, mut happening) = (Vec::new(), Vec::new());
            for (gpu, scenario) in scenarios.iter().enumerate() {
                for user in &scenario.users {
                    let home = &homes[n];
                    n += 1;
                    let act = |act: &'_ Act| {
                        let act = act.clone();
                        scope.spawn(move || self.act(&act, home, gpu).with_context(|| format!("{}: {act:?}", scenario.name)))
                    };
                    acting.push((gpu, user, home, user.acts.iter().map(act).collect::<Vec<_>>()));
                }
                happening.extend(scenario.happens.iter().map(|(at, verb, args)| {
                    scope.spawn(move || {
                        self.wait_until(*at);
                        let gpu = gpu.to_string();
                        let args: Vec<&str> = ["--gpu", &gpu].into_iter().chain(args.split(' ')).collect();
                        self.sim.inject(verb, &args)
                    })
                }));
            }
            let mut all: Vec<Vec<Played>> = scenarios.iter().map(|_| Vec::new()).collect();
            for (gpu, user, home, acts) in acting {
                let acts = acts.into_iter().map(|act| act.join().expect("no act panics")).collect::<Result<_>>()?;
                all[gpu].push(self.played(user, home, acts));
            }
            happening.into_iter().try_for_each(|event| event.join().expect("no event panics"))?;
            Ok(all)
        })
    }

    fn played(&self, user: &ScenarioUser, home: &Home, acts: Vec<Vec<u32>>) -> Played {
        Played { name: user.name, cgroup: home.v2.as_deref().map(|dir| self.v2.path_of(dir)), acts }
    }

    fn act(&self, act: &Act, home: &Home, gpu: usize) -> Result<Vec<u32>> {
        match act {
            Act::Process { from, to, load } => self.process(home, gpu, *from, *to, load),
            Act::Life { from, to, load } => {
                let dir = home.v2.as_deref().context("only a container has lifetimes")?;
                self.wait_until(*from - 0.5);
                std::fs::create_dir_all(dir)?;
                let pids = self.process(home, gpu, *from, *to, load)?;
                removed(dir)?;
                Ok(pids)
            }
            Act::Jobs { from, count } => {
                let dir = home.v2.as_deref().context("only a container runs jobs")?;
                self.wait_until(*from);
                let (gpu, count) = (gpu.to_string(), count.to_string());
                let args = ["--count", &count, "--at-once", "1", "--lasting", JOB, "--demand", "1.0", "--gpus", &gpu];
                let lives = self.sim.lives(&[dir], &args)?.all()?;
                Ok(lives.iter().map(|life| life.pid).collect())
            }
            Act::Spin { from, to } => {
                self.wait_until(*from);
                let mut command = Command::new("sh");
                let spinning = Running(command.args(["-c", "while :; do :; done"]).stdin(Stdio::null()).spawn()?);
                for dir in home.cpu.iter().chain(&home.v2) {
                    attach(spinning.0.id(), dir)?;
                }
                self.wait_until(*to);
                Ok(Vec::new())
            }
        }
    }

    fn process(&self, home: &Home, gpu: usize, from: f64, to: f64, load: &str) -> Result<Vec<u32>> {
        self.wait_until(from);
        let process = Process::start(home, 600)?;
        let pid = process.pid;
        let load = load.replace("SINCE", &rfc3339(self.begin)?);
        let mut loading = self.sim.loads(pid, gpu, &load.split(' ').collect::<Vec<_>>())?;
        self.wait_until(to);
        if let Some(status) = loading.0.try_wait()? {
            ensure!(status.success(), "nvml-sim load {load}: {status}");
        }
        drop(process);
        ensure!(loading.0.wait()?.success(), "nvml-sim load {load} failed");
        Ok(vec![pid])
    }
}

fn removed(dir: &Path) -> Result<()> {
    wait_for("the container's cgroup is removed", Duration::from_secs(5), || Ok(std::fs::remove_dir(dir).ok()))
}
