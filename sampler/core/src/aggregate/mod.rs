//! The pure fold: observations in, [`Snapshot`] out.

mod clock;
mod gpu;

pub use gpu::{Gpu, WINDOW_NS};

use std::collections::HashMap;

use crate::identity::{ContainerChange, Identity};
use crate::observation::Observation;
use crate::snapshot::{ContainerGpu, ContainerView, Snapshot};
use crate::units::{BootNs, ContainerKey, WallTime};

/// Owns identity, attribution and aggregation. One thread drives it.
#[derive(Debug, Default)]
pub struct Core {
    pub identity: Identity,
    gpus: Vec<Option<Gpu>>,
    now: BootNs,
    wall: WallTime,
}

impl Core {
    pub fn observe(&mut self, observation: Observation) {
        match observation {
            Observation::GpuFound { gpu, info, .. } => {
                if self.gpus.len() <= gpu {
                    self.gpus.resize_with(gpu + 1, || None);
                }
                if self.gpus[gpu].is_none() {
                    self.gpus[gpu] = Some(Gpu::new(info));
                }
            }
            Observation::Gpu(batch) => {
                self.now = self.now.max(batch.ended);
                if let Some(Some(gpu)) = self.gpus.get_mut(batch.gpu) {
                    gpu.apply(&batch, &self.identity);
                }
            }
            Observation::Tick { at, wall } => {
                self.now = self.now.max(at);
                self.wall = wall;
                let gpus = &self.gpus;
                self.identity.expire(self.now, |key| gpus.iter().flatten().any(|gpu| gpu.credits().contains_key(&key)));
                let cgroups = &self.identity.cgroups;
                for gpu in self.gpus.iter_mut().flatten() {
                    gpu.forget(|key| cgroups.container(*key).is_none());
                }
            }
            identity => self.identity.observe(identity),
        }
    }

    pub fn take_container_changes(&mut self) -> Vec<ContainerChange> {
        self.identity.cgroups.take_changes()
    }

    pub fn snapshot(&self) -> Snapshot {
        let mut gpus = Vec::new();
        let mut of: HashMap<ContainerKey, Vec<ContainerGpu>> = HashMap::new();
        for gpu in self.gpus.iter().flatten() {
            let (duties, utilization) = gpu.duties();
            let index = gpus.len();
            gpus.push(gpu.view(utilization));
            let mut keys: Vec<ContainerKey> = gpu.credits().keys().chain(gpu.container_memory().keys()).copied().collect();
            keys.sort_unstable();
            keys.dedup();
            for key in keys {
                let credit = gpu.credits().get(&key).copied().unwrap_or_default();
                let duty = duties.get(&key);
                // Observed and idle is 0; not observed is absent.
                let observed = utilization.is_some();
                of.entry(key).or_default().push(ContainerGpu {
                    gpu: index,
                    seconds: credit.ns * 1e-9,
                    samples: credit.samples,
                    duty_cycle_percent: duty.map(|d| d.percent).or(observed.then_some(0.0)),
                    duty_cycle_stderr: duty.map(|d| d.stderr),
                    memory_used_bytes: gpu.container_memory().get(&key).copied(),
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
