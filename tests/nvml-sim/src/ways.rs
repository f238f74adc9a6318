//! Options of load, run and lives about how a load uses its GPU.

use std::path::Path;
use std::time::Duration;

use anyhow::bail;
use nvidia_ml_sim::faults::micros;
use nvidia_ml_sim::loads::{Pattern, Ways};
use nvidia_ml_sim::model::SLICE_US;
use nvidia_ml_sim::time;
use nvidia_ml_sim::world::World;

use crate::arguments::demand;

#[derive(clap::Args)]
pub struct Options {
    /// Demand for the memory interface; by default half of it is used while the load computes
    #[arg(long, value_parser = demand)]
    memory: Option<f64>,
    /// Demand for the encoder
    #[arg(long, value_parser = demand)]
    enc: Option<f64>,
    /// Demand for the decoder
    #[arg(long, value_parser = demand)]
    dec: Option<f64>,
    /// Demand for the JPEG engine
    #[arg(long, value_parser = demand)]
    jpeg: Option<f64>,
    /// Demand for the optical flow engine
    #[arg(long, value_parser = demand)]
    ofa: Option<f64>,
    /// With --on: period of a load that is on for a part of each period only
    #[arg(long, value_parser = time::span, requires = "on")]
    every: Option<Duration>,
    #[arg(long, value_parser = time::span, requires = "every")]
    on: Option<Duration>,
    /// Begin of the periods, counted from the epoch
    #[arg(long, value_parser = time::span, requires = "every", default_value = "0s")]
    phase: Duration,
    /// Length of the bursts in which it works, such as 12ms; by default each 2 ms are decided separately
    #[arg(long, value_parser = time::span, conflicts_with = "mps")]
    burst: Option<Duration>,
    /// Number of the MIG device on the GPU, from 0
    #[arg(long)]
    mig: Option<usize>,
    /// Run under MPS, together with other loads that do
    #[arg(long)]
    mps: bool,
    /// List the process as a graphics process
    #[arg(long)]
    graphics: bool,
    /// Pid by which the driver names the process, as if it were another kernel's process
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    shown_as: Option<u32>,
}

impl Options {
    /// The form of the options in the log. `used`: there is a demand for the compute engine, or memory.
    pub fn ways(&self, used: bool) -> anyhow::Result<Ways> {
        let (enc, dec) = (self.enc.unwrap_or(0.0), self.dec.unwrap_or(0.0));
        let (jpeg, ofa) = (self.jpeg.unwrap_or(0.0), self.ofa.unwrap_or(0.0));
        if !used && self.memory.is_none() && enc + dec + jpeg + ofa == 0.0 {
            bail!("one of --demand, --memory, --enc, --dec, --jpeg, --ofa or --mem is required");
        }
        let pattern = match (self.every, self.on) {
            (Some(every), Some(on)) => {
                let pattern = Pattern { every_us: micros(every), on_us: micros(on), phase_us: micros(self.phase) };
                if pattern.on_us == 0 || pattern.on_us > pattern.every_us {
                    bail!("--on must be above 0 and at most --every");
                }
                Some(pattern)
            }
            _ => None,
        };
        let (memory, mig, mps, graphics) = (self.memory, self.mig, self.mps, self.graphics);
        let (shown_as, burst_us) = (self.shown_as, self.burst.map(micros));
        if burst_us.is_some_and(|us| us < SLICE_US) {
            bail!("--burst must be at least 2ms");
        }
        Ok(Ways { memory, enc, dec, jpeg, ofa, pattern, burst_us, mig, mps, graphics, shown_as, ..Ways::default() })
    }

    /// Fails unless the GPU exists and, in MIG mode, the device on it.
    pub fn check(&self, dir: &Path, world: &World, gpu: usize, option: &str) -> anyhow::Result<()> {
        let Some(known) = world.gpus.get(gpu) else {
            bail!("{option} {gpu}: {} has {} GPUs, numbered from 0", dir.display(), world.gpus.len());
        };
        match self.mig {
            None if known.mig.is_empty() => Ok(()),
            None => bail!("{option} {gpu} is in MIG mode: --mig 0 to {} is required", known.mig.len() - 1),
            Some(mig) if mig < known.mig.len() => Ok(()),
            Some(mig) => bail!("--mig {mig}: GPU {gpu} has {} MIG devices, numbered from 0", known.mig.len()),
        }
    }
}
