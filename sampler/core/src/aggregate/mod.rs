//! The pure fold: observations in, [`Snapshot`] out.

mod clock;
mod gpu;
mod holders;
mod lane;
mod spread;
mod user;
mod wall;
mod windows;

pub use gpu::Gpu;

use std::collections::HashMap;

use crate::fact::PressureFact;
use crate::identity::{ContainerChange, Identity};
use crate::observation::Observation;
use crate::snapshot::{ContainerGpu, ContainerView, Snapshot};
use crate::units::{BootNs, ContainerKey, WallTime};

/// Width of the window of duty cycles and shares.
pub const WINDOW_NS: u64 = 10_000_000_000;
/// A device that is gone stays for who scrapes its last values.
const KEEP_GONE_NS: u64 = 300_000_000_000;

/// Owns identity, attribution and aggregation. One thread drives it.
#[derive(Debug, Default)]
pub struct Core {
    pub identity: Identity,
    /// Those that were not taken yet.
    pub pressures: Vec<PressureFact>,
    gpus: Vec<Option<Gpu>>,
    now: BootNs,
    wall: WallTime,
}

impl Core {
    pub fn observe(&mut self, observation: Observation) {
        match observation {
            Observation::GpuFound { gpu, info, at } => {
                if self.gpus.len() <= gpu {
                    self.gpus.resize_with(gpu + 1, || None);
                }
                match &mut self.gpus[gpu] {
                    Some(known) => known.reopen(info, at),
                    empty => *empty = Some(Gpu::new(info, at)),
                }
            }
            Observation::GpuGone { gpu, at } => {
                if let Some(gpu) = self.gpu(gpu) {
                    gpu.gone(at);
                }
            }
            Observation::Gpu(batch) => {
                self.now = self.now.max(batch.ended);
                if let Some(Some(gpu)) = self.gpus.get_mut(batch.gpu) {
                    gpu.apply(&batch, &self.identity);
                }
            }
            Observation::Xid { gpu, xid, count } => {
                if let Some(gpu) = self.gpu(gpu) {
                    gpu.xid(xid, count);
                }
            }
            Observation::Pressure(fact) => self.pressures.push(fact),
            Observation::Tick { at, wall } => self.tick(at, wall),
            identity => self.identity.observe(identity),
        }
    }

    fn gpu(&mut self, slot: usize) -> Option<&mut Gpu> {
        self.gpus.get_mut(slot)?.as_mut()
    }

    fn tick(&mut self, at: BootNs, wall: WallTime) {
        self.now = self.now.max(at);
        self.wall = wall;
        let now = self.now;
        for slot in &mut self.gpus {
            if slot.as_ref().and_then(|gpu| gpu.gone).is_some_and(|at| now.saturating_since(at) > KEEP_GONE_NS) {
                *slot = None;
            }
        }
        let gpus = &self.gpus;
        self.identity.expire(now, |key| gpus.iter().flatten().any(|gpu| gpu.credits_any(key)));
        for gpu in self.gpus.iter_mut().flatten() {
            gpu.passed(now, &self.identity);
            gpu.forget(|key| self.identity.cgroups.container(*key).is_none());
        }
    }

    pub fn take_container_changes(&mut self) -> Vec<ContainerChange> {
        self.identity.cgroups.take_changes()
    }

    pub fn snapshot(&self) -> Snapshot {
        let mut gpus = Vec::new();
        let mut of: HashMap<ContainerKey, Vec<ContainerGpu>> = HashMap::new();
        for gpu in self.gpus.iter().flatten() {
            let (duties, utilization) = gpu.duties(self.now);
            let index = gpus.len();
            gpus.push(gpu.view(utilization));
            for key in gpu.containers().into_iter().filter(|_| gpu.info.is_leaf()) {
                let credit = gpu.credits().get(&key).copied().unwrap_or_default();
                let duty = duties.get(&key);
                // Observed and idle is 0; not observed is absent.
                let observed = utilization.map(|_| 0.0);
                let held = gpu.holders().of(key);
                of.entry(key).or_default().push(ContainerGpu {
                    gpu: index,
                    seconds: credit.ns * 1e-9,
                    seconds_stderr: credit.variance().sqrt() * 1e-9,
                    samples: credit.samples,
                    engines: gpu.engine_seconds(key),
                    window_shares: gpu.window_shares(key),
                    active_seconds: 0.0,
                    coactive_seconds: 0.0,
                    contention: Vec::new(),
                    mps_clients: held.map_or(0, |held| held.mps_clients),
                    duty_cycle_percent: duty.map(|d| d.percent).or(observed),
                    duty_cycle_stderr: duty.map(|d| d.stderr).or(observed),
                    memory_used_bytes: held.and_then(|held| held.memory_bytes),
                });
            }
        }
        let mut containers: Vec<ContainerView> = self
            .identity
            .cgroups
            .containers()
            .filter_map(|c| {
                let gpus = of.remove(&c.record.key).unwrap_or_default();
                let shown = c.gone.is_none() || !gpus.is_empty();
                shown.then(|| ContainerView { record: c.record.clone(), gone: c.gone, gpus })
            })
            .collect();
        containers.sort_by_key(|c| c.record.key);
        Snapshot { at: self.now, wall: self.wall, gpus, containers }
    }
}

#[cfg(test)]
mod tests;
