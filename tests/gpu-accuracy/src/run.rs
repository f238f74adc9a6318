//! One run of an exporter in one world.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nvidia_ml_sim::{loads, time};

use crate::exporter::Exporter;
use crate::mapping::Mapping;
use crate::node::{Node, sleep_until};
use crate::page::Reader;
use crate::score::{Cost, Observed, Score};
use crate::world::{ROLES, SHORT, SHORT_DEMAND, SHORT_LASTING, World};

/// Time in which the exporter is read before the loads.
const WARM: Duration = Duration::from_secs(6);
/// Until every exporter has shown the last of them.
const SETTLED: Duration = Duration::from_secs(15);
/// More short-lived processes than there are in a second; they end with the other loads.
const SHORT_PER_SECOND: u64 = 3;

pub struct Run<'a> {
    /// The exporter's.
    pub command: &'a [String],
    pub mapping: &'a Mapping,
    pub interval: Duration,
    pub lasts: Duration,
}

impl Run<'_> {
    /// Scores the exporter in this world. `sim`: the program `nvml-sim`.
    pub fn score(&self, sim: &Path, world: &World) -> Result<Score> {
        let node = Node::new(sim, world)?;
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut exporter = Exporter::start(self.command, &node, port)?;
        exporter.wait_for_page(self.mapping, port)?;
        let reader = Reader::start(port, &self.mapping.path, self.interval);
        sleep_until(Instant::now() + WARM, &mut || exporter.check())?;
        let (used, from_us, from) = (node.exporter_seconds()?, loads::now_us(), reader.now());
        self.play(&node, world, &mut exporter)?;
        let processor_ratio = (node.exporter_seconds()? - used) / (reader.now() - from);
        let cost = Cost { processor_ratio, resident_bytes: node.exporter_bytes() };
        sleep_until(Instant::now() + SETTLED, &mut || exporter.check())?;
        let pages = reader.end()?;
        let truth = node.truth(&time::format(from_us))?;
        let played = (from, from + self.lasts.as_secs_f64());
        let observed = Observed { mapping: self.mapping, pages: &pages, containers: &node.containers, truth: &truth, played };
        observed.score(world.name, cost)
    }

    /// Loads the GPUs.
    fn play(&self, node: &Node, world: &World, exporter: &mut Exporter) -> Result<()> {
        let begun = Instant::now();
        let lasts = format!("{}ms", self.lasts.as_millis());
        let mut steady = Vec::new();
        for (role, container) in ROLES.iter().zip(&node.containers) {
            for (demand, pid) in role.demands.iter().zip(&container.pids) {
                let (pid, gpu) = (pid.to_string(), role.gpu.to_string());
                let mut args = vec!["load", "--pid", &pid, "--gpu", &gpu, "--mem", "1GiB", "--for", &lasts];
                let demand = demand.map(|demand| demand.to_string());
                if let Some(demand) = &demand {
                    args.extend(["--demand", demand]);
                }
                steady.push(node.start(&args)?);
            }
        }
        let short = node.containers.last().context("the container of short-lived processes")?;
        let count = (SHORT_PER_SECOND * (self.lasts.as_secs() + 1)).to_string();
        let (gpu, cgroup) = (SHORT.to_string(), short.cgroup.display().to_string());
        let mut lives = vec!["lives", "--count", &count, "--at-once", "1", "--lasting", SHORT_LASTING, "--demand", SHORT_DEMAND];
        lives.extend(["--gpus", &gpu, "--cgroup", &cgroup]);
        let mut lives = node.start(&lives)?;
        if let Some(fault) = world.fault {
            sleep_until(begun + self.lasts / 3, &mut || exporter.check())?;
            node.control(&[&["fault"], fault].concat())?;
        }
        sleep_until(begun + self.lasts, &mut || exporter.check())?;
        lives.terminate();
        lives.wait("nvml-sim lives")?;
        steady.iter_mut().try_for_each(|load| load.wait("nvml-sim load"))
    }
}
