//! One run of an exporter in one world.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use devkit::process::processor_time;

use crate::mapping::Mapping;
use crate::node::{Node, Running, rest_of, sleep_until};
use crate::page::{Reader, get, parse};
use crate::score::{Cost, Observed, Score};
use crate::world::{ROLES, SHORT, SHORT_DEMAND, SHORT_LASTING, World};

/// Time in which the exporter is read before the loads.
const WARM: Duration = Duration::from_secs(6);
/// Until every exporter has shown the last of them.
const SETTLED: Duration = Duration::from_secs(15);
const STARTS_WITHIN: Duration = Duration::from_secs(60);
/// Mean of [`SHORT_LASTING`], and what a process needs to start and to end.
const SHORT_MEAN_SECONDS: f64 = 1.1;

pub struct Exporter<'a> {
    pub command: &'a [String],
    pub mapping: &'a Mapping,
    pub interval: Duration,
    pub lasts: Duration,
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64
}

impl Exporter<'_> {
    /// Scores it in this world. `sim`: the program `nvml-sim`.
    pub fn score(&self, sim: &Path, world: &World) -> Result<Score> {
        let node = Node::new(sim, world)?;
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut exporter = self.start(&node, port)?;
        let pid = exporter.0.id();
        let reader = Reader::start(port, &self.mapping.path, self.interval);
        sleep_until(Instant::now() + WARM)?;
        let spent = || -> Result<f64> {
            let time = processor_time(pid).context("the exporter ended")?;
            Ok(time.own + time.children - node.driver_seconds())
        };
        let (used, from_us, from) = (spent()?, now_us(), reader.now());
        self.play(&node, world)?;
        let (used, to) = (spent()? - used, reader.now());
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
        let resident_kib: f64 = resident.trim().trim_end_matches(" kB").parse()?;
        sleep_until(Instant::now() + SETTLED)?;
        ensure!(exporter.0.try_wait()?.is_none(), "the exporter ended during the run");
        let pages = reader.end()?;
        let truth = node.truth(&nvidia_ml_sim::time::format(from_us))?;
        let cost = Cost { processor_ratio: used / (to - from), resident_bytes: resident_kib * 1024.0 };
        let observed =
            Observed { mapping: self.mapping, pages: &pages, containers: &node.containers, truth: &truth, played: (from, to) };
        Ok(observed.score(world.name, cost))
    }

    /// The exporter's command, with what stands for this node's values.
    fn start(&self, node: &Node, port: u16) -> Result<Running> {
        let values = [
            ("{port}", port.to_string()),
            ("{library}", node.library().display().to_string()),
            ("{root}", node.root().display().to_string()),
            ("{gpus}", node.gpus().display().to_string()),
            ("{containers}", node.containers_file().display().to_string()),
        ];
        let filled = |word: &String| values.iter().fold(word.clone(), |word, (name, value)| word.replace(name, value));
        let words: Vec<String> = self.command.iter().map(filled).collect();
        let (program, args) = words.split_first().context("the exporter's command is missing")?;
        let mut command = Command::new(program);
        command.args(args).stdout(Stdio::null()).stderr(Stdio::piped());
        let library = node.library();
        command.env("LD_LIBRARY_PATH", library.parent().unwrap_or(&library));
        command.env("NVML_SIM_DIR", node.gpus()).env("NVML_SIM_COST_FILE", node.cost_file());
        let mut exporter = Running::start(&mut command)?;
        let mut stderr = exporter.0.stderr.take();
        let wanted = self.mapping.device.as_ref().or(self.mapping.user.as_ref()).map_or("", |family| &*family.metric);
        let end = Instant::now() + STARTS_WITHIN;
        loop {
            let page = get(port, &self.mapping.path);
            if page.as_ref().is_ok_and(|page| parse(page).is_ok_and(|samples| samples.iter().any(|s| s.metric == wanted))) {
                break;
            }
            if let Some(status) = exporter.0.try_wait()? {
                bail!("the exporter ended ({status}): {}", rest_of(stderr.take()));
            }
            if Instant::now() > end {
                let found =
                    page.map_or_else(|error| format!("{error:#}"), |page| format!("a page of {} bytes without it", page.len()));
                drop(exporter);
                bail!("no {wanted} at port {port}{} within {STARTS_WITHIN:?}: {found}; {}", self.mapping.path, rest_of(stderr));
            }
            sleep_until(Instant::now() + Duration::from_millis(200))?;
        }
        // Read until its end, so that it never waits for a full pipe.
        std::thread::spawn(move || stderr.map(|mut stderr| std::io::copy(&mut stderr, &mut std::io::sink())));
        Ok(exporter)
    }

    /// Loads the GPUs.
    fn play(&self, node: &Node, world: &World) -> Result<()> {
        let begun = Instant::now();
        let lasts = format!("{}ms", self.lasts.as_millis());
        let mut loads = Vec::new();
        for (role, container) in ROLES.iter().zip(&node.containers) {
            for (demand, pid) in role.demands.iter().zip(&container.pids) {
                let (pid, gpu) = (pid.to_string(), role.gpu.to_string());
                let mut args = vec!["load", "--pid", &pid, "--gpu", &gpu, "--mem", "1GiB", "--for", &lasts];
                let demand = demand.map(|demand| demand.to_string());
                if let Some(demand) = &demand {
                    args.extend(["--demand", demand]);
                }
                loads.push(node.start(&args)?);
            }
        }
        let short = node.containers.last().context("the container of short-lived processes")?;
        let count = (self.lasts.as_secs_f64() / SHORT_MEAN_SECONDS) as u64;
        let (count, gpu, cgroup) = (count.max(1).to_string(), SHORT.to_string(), short.cgroup.display().to_string());
        let mut lives = vec!["lives", "--count", &count, "--at-once", "1", "--lasting", SHORT_LASTING, "--demand", SHORT_DEMAND];
        lives.extend(["--gpus", &gpu, "--cgroup", &cgroup]);
        let mut lives = node.start(&lives)?;
        if let Some(fault) = world.fault {
            sleep_until(begun + self.lasts / 3)?;
            node.control(&[&["fault"], fault].concat())?;
        }
        sleep_until(begun + self.lasts)?;
        for load in &mut loads {
            load.wait("nvml-sim load")?;
        }
        lives.wait("nvml-sim lives")
    }
}
