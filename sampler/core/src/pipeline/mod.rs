//! Observations in, facts and snapshots out: identity, attribution and aggregation, in the hands of one thread.

use std::collections::HashMap;

use crate::aggregate::{Aggregate, Settings};
use crate::attribute::{DeviceAttribution, DeviceView};
use crate::fact::{ContainerFact, Fact, GpuFact, User};
use crate::identity::{ContainerChange, ContainerRecord, Identity};
use crate::observation::Observation;
use crate::snapshot::{ContainerGpu, ContainerView, GpuView, Snapshot};
use crate::units::{BootNs, ContainerKey};

#[derive(Debug, Default)]
pub struct Core {
    pub identity: Identity,
    devices: Vec<Option<DeviceAttribution>>,
    aggregate: Aggregate,
    /// Since they were taken last.
    facts: Vec<Fact>,
    changes: Vec<ContainerChange>,
    keep_facts: bool,
}

impl From<&ContainerRecord> for ContainerFact {
    fn from(record: &ContainerRecord) -> Self {
        let identity = &record.identity;
        Self {
            key: record.key,
            cgroup_path: record.cgroup_path.clone(),
            container_id: identity.container_id.clone(),
            runtime: identity.runtime.map(|runtime| runtime.name().to_owned()),
            pod_uid: identity.pod_uid.clone(),
            created: record.created,
            creation_seen: record.creation_seen,
        }
    }
}

impl Core {
    /// `keep_facts`: they will be taken.
    pub fn new(settings: Settings, keep_facts: bool) -> Self {
        Self { aggregate: Aggregate::new(settings), keep_facts, ..Self::default() }
    }

    pub fn observe(&mut self, observation: Observation) {
        let mut told = Vec::new();
        match observation {
            Observation::GpuFound { gpu, info, at } => {
                if self.devices.len() <= gpu {
                    self.devices.resize_with(gpu + 1, || None);
                }
                match &mut self.devices[gpu] {
                    Some(known) => known.reopen(info, at, &mut told),
                    empty => *empty = Some(DeviceAttribution::new(info, at, &mut told)),
                }
                self.tell(gpu, told);
            }
            Observation::GpuGone { gpu, at } => {
                if let Some(Some(device)) = self.devices.get_mut(gpu) {
                    device.gone(at, &mut told);
                }
                self.tell(gpu, told);
            }
            Observation::Gpu(batch) => {
                self.take_changes();
                if let Some(Some(device)) = self.devices.get_mut(batch.gpu) {
                    device.apply(&batch, &self.identity, &mut told);
                }
                self.aggregate.now = self.aggregate.now.max(batch.ended);
                self.tell(batch.gpu, told);
            }
            Observation::Xid { gpu, xid, count } => self.tell(gpu, vec![(self.aggregate.now, GpuFact::Xid { xid, count })]),
            Observation::Pressure(pressure) => self.fact(Fact::Pressure(pressure)),
            Observation::ClockAdvanced { at, wall } => {
                for slot in 0..self.devices.len() {
                    let mut told = Vec::new();
                    if let Some(Some(device)) = self.devices.get_mut(slot) {
                        device.passed(at, &mut told);
                    }
                    self.tell(slot, told);
                }
                let aggregate = &self.aggregate;
                self.identity.expire(at, |key| aggregate.credits(key));
                self.take_changes();
                self.fact(Fact::Time { at, wall });
                // What was gone for long is forgotten as a whole.
                for (slot, device) in self.devices.iter_mut().enumerate() {
                    if !self.aggregate.knows(slot) {
                        *device = None;
                    }
                }
            }
            identity => self.identity.observe(identity),
        }
    }

    fn fact(&mut self, fact: Fact) {
        self.aggregate.apply(&fact);
        if self.keep_facts {
            self.facts.push(fact);
        }
    }

    fn tell(&mut self, gpu: usize, told: Vec<(BootNs, GpuFact)>) {
        let Ok(gpu) = u32::try_from(gpu) else { return };
        for (at, fact) in told {
            self.fact(Fact::Gpu { gpu, at, fact });
        }
    }

    /// Facts about a container come before those that name it.
    fn take_changes(&mut self) {
        for change in self.identity.cgroups.take_changes() {
            match &change {
                ContainerChange::Appeared(record) => self.fact(Fact::Container(ContainerFact::from(&**record))),
                ContainerChange::Gone(key, at) => self.fact(Fact::ContainerGone { key: *key, at: *at }),
                ContainerChange::Evicted(key) => self.fact(Fact::ContainerForgotten { key: *key }),
            }
            self.changes.push(change);
        }
    }

    pub fn take_container_changes(&mut self) -> Vec<ContainerChange> {
        self.take_changes();
        std::mem::take(&mut self.changes)
    }

    /// Those since the last time, in their order.
    pub fn take_facts(&mut self) -> Vec<Fact> {
        std::mem::take(&mut self.facts)
    }

    fn device(&self, slot: usize) -> Option<DeviceView> {
        Some(self.devices.get(slot)?.as_ref()?.view())
    }

    pub fn snapshot(&self) -> Snapshot {
        let now = self.aggregate.now;
        let mut gpus = Vec::new();
        let mut of: HashMap<ContainerKey, Vec<ContainerGpu>> = HashMap::new();
        for (slot, gpu) in self.aggregate.gpus() {
            let Some(device) = self.device(slot) else { continue };
            let (duties, utilization) = gpu.duties(now);
            let index = gpus.len();
            gpus.push(GpuView {
                info: gpu.info.clone(),
                readings: gpu.readings,
                time: gpu.time(),
                unattributed: gpu.unattributed(),
                utilization_ratio: utilization,
                coactive_ratio: gpu.together.coactive_ratio(),
                last_sample: device.last_sample,
                sample_period_seconds: device.period_ns.map(|ns| ns as f64 * 1e-9),
                sample_gaps: device.sample_gaps,
                counts: device.counts,
                expected_stderr_ratio: gpu.expected_stderr(),
                ring_overruns: device.ring_overruns,
                rejected: device.rejected,
                off_grid: device.off_grid,
                clock: device.clock,
                engines: gpu.engines(),
                throttle_seconds: gpu.throttle_seconds(),
                xids: gpu.xids(),
                gone: gpu.gone,
            });
            for key in gpu.containers().into_iter().filter(|_| gpu.info.is_leaf()) {
                let credit = gpu.credits().get(&User::Container(key)).copied().unwrap_or_default();
                let duty = duties.get(&key);
                // Observed and idle is 0; not observed is absent.
                let observed = utilization.map(|_| 0.0);
                let held = gpu.holders().of(User::Container(key));
                let together = gpu.together.of(key);
                of.entry(key).or_default().push(ContainerGpu {
                    gpu: index,
                    seconds: credit.ns * 1e-9,
                    seconds_stderr: credit.variance().sqrt() * 1e-9,
                    samples: credit.samples,
                    engines: gpu.engine_seconds(key),
                    window_shares: gpu.window_shares(key),
                    active_seconds: together.map_or(0.0, |sums| sums.active),
                    coactive_seconds: together.map_or(0.0, |sums| sums.coactive),
                    contention: together.map_or_else(Vec::new, |sums| sums.others().to_vec()),
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
        Snapshot { at: now, wall: self.aggregate.wall, gpus, containers }
    }
}

#[cfg(test)]
mod tests;
