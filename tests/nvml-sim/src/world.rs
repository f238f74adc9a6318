//! The simulated machine: which GPUs, on what grid they sample, by which rule. Written once by `init`, then only read.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use crate::model::SERVED_AFTER_US;

pub const FILE: &str = "world.toml";

/// Whom the driver names in a sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PidRule {
    /// Whoever is on the engine at the instant of the sample.
    #[default]
    Instant,
    /// Whoever was on it last within the period.
    Last,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct World {
    pub seed: u64,
    pub driver_version: String,
    pub pid_rule: PidRule,
    /// The sampling grid, microseconds.
    pub period_us: u64,
    /// How old a sample is when the driver first serves it, microseconds.
    pub delay_us: u64,
    /// Samples the driver keeps.
    pub ring: usize,
    /// When this world began, microseconds since the epoch; `init` fills it in.
    pub begun_us: u64,
    pub gpus: Vec<Gpu>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gpu {
    pub name: String,
    pub uuid: String,
    pub pci_bus_id: String,
    pub memory_bytes: u64,
    /// `/dev/nvidia<minor>`; the index, unless it is given.
    pub minor: Option<u32>,
    /// UUIDs of its MIG devices; with any, it is in MIG mode.
    pub mig: Vec<String>,
    /// Instead of the world's.
    pub pid_rule: Option<PidRule>,
    pub period_us: Option<u64>,
}

impl Default for World {
    fn default() -> Self {
        Self {
            seed: 1,
            driver_version: "535.183.01".into(),
            pid_rule: PidRule::Instant,
            // As measured on real boards: 167.1-169.8 ms.
            period_us: 167_139,
            delay_us: SERVED_AFTER_US,
            ring: 72,
            begun_us: 0,
            gpus: Vec::new(),
        }
    }
}

impl Default for Gpu {
    fn default() -> Self {
        Self {
            name: "Tesla V100-SXM2-16GB".into(),
            uuid: String::new(),
            pci_bus_id: String::new(),
            memory_bytes: 16 << 30,
            minor: None,
            mig: Vec::new(),
            pid_rule: None,
            period_us: None,
        }
    }
}

impl World {
    pub fn read(dir: &Path) -> anyhow::Result<World> {
        let path = dir.join(FILE);
        let text = fs::read_to_string(&path).with_context(|| {
            format!("{}: no simulated GPUs here; make some with `nvml-sim init --dir {}`", path.display(), dir.display())
        })?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    /// Fills in names and checks what is given.
    pub fn parse(text: &str) -> anyhow::Result<World> {
        let mut world: World = toml::from_str(text)?;
        for (index, gpu) in world.gpus.iter_mut().enumerate() {
            if gpu.uuid.is_empty() {
                let mix = crate::model::mix(world.seed, index as u64, 0);
                gpu.uuid = format!(
                    "GPU-{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
                    mix >> 32,
                    mix >> 16 & 0xffff,
                    mix & 0xfff,
                    index,
                    mix & 0xffff_ffff_ffff
                );
            }
            if gpu.pci_bus_id.is_empty() {
                gpu.pci_bus_id = format!("00000000:{:02X}:00.0", 4 + index);
            }
            let period = gpu.period_us.unwrap_or(world.period_us);
            if !(20_000..=2_000_000).contains(&period) {
                bail!("period_us = {period} is outside 20000..2000000");
            }
            if !gpu.uuid.starts_with("GPU-") || gpu.uuid.len() > 79 || gpu.name.len() > 95 {
                bail!("gpus[{index}]: uuid must begin with GPU- and have at most 79 bytes, name at most 95");
            }
        }
        if !(1..=4096).contains(&world.ring) {
            bail!("ring = {} is outside 1..4096", world.ring);
        }
        if !(SERVED_AFTER_US..=10_000_000).contains(&world.delay_us) {
            bail!("delay_us = {} is outside {SERVED_AFTER_US}..10000000", world.delay_us);
        }
        Ok(world)
    }

    pub fn period_us(&self, gpu: usize) -> u64 {
        self.gpus.get(gpu).and_then(|g| g.period_us).unwrap_or(self.period_us)
    }

    pub fn pid_rule(&self, gpu: usize) -> PidRule {
        self.gpus.get(gpu).and_then(|g| g.pid_rule).unwrap_or(self.pid_rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_is_the_floor_when_left_out() {
        assert_eq!(World::parse("").unwrap().delay_us, 20_000);
    }

    #[test]
    fn rows() {
        let check = |toml: &str, expect: &str| {
            let told = World::parse(toml).map_or_else(|e| format!("{e:#}"), |w| format!("ok {}", w.gpus.len()));
            assert!(told.contains(expect), "{toml}: {told}");
        };
        check("", "ok 0");
        check("[[gpus]]\n[[gpus]]\npid_rule = 'last'", "ok 2");
        check("sede = 1", "unknown field `sede`");
        check("pid_rule = 'first'", "unknown variant `first`");
        check("period_us = 1\n[[gpus]]", "period_us = 1 is outside");
        check("delay_us = 10000000\n[[gpus]]", "ok 1");
        check("delay_us = 19999", "delay_us = 19999 is outside 20000..10000000");
        check("delay_us = 10000001", "delay_us = 10000001 is outside 20000..10000000");
        check("[[gpus]]\nuuid = 'x'", "gpus[0]: uuid must begin with GPU-");
    }
}
