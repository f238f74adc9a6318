//! The pipeline: observations in, facts and snapshots out. It combines identity, attribution and aggregation, and is driven by one thread.
//!
//! ```
//! use std::sync::Arc;
//!
//! use sampler_core::device::GpuInfo;
//! use sampler_core::observation::{
//!     CgroupChange, CgroupFact, CgroupMembership, DeviceSample, GpuBatch, Observation, PollStatus, ProcessSample, ProcessSeen,
//! };
//! use sampler_core::pipeline::Core;
//! use sampler_core::units::{BootNs, CgroupKey, GpuNs, Tgid, WallTime};
//!
//! let mut core = Core::default();
//! // A process in the cgroup of a container.
//! let key = |id| CgroupKey { hierarchy: 0, id };
//! for (id, parent, name) in [(1, None, String::new()), (2, Some(1), "docker".into()), (3, Some(2), "a".repeat(64))] {
//!     let (parent, at) = (parent.map(key), BootNs(1));
//!     core.observe(Observation::Cgroup(CgroupFact { change: CgroupChange::Seen, key: key(id), parent, name, at }));
//! }
//! let membership = Some(CgroupMembership { v2_id: 3, ..CgroupMembership::default() });
//! let (tgid, start, began) = (Tgid(100), BootNs(5), BootNs(6));
//! core.observe(Observation::ProcessSeen(ProcessSeen { tgid, start, coarse_start: false, began, membership }));
//!
//! // A GPU that is 60 % busy. The driver samples it every 100 ms and names that process.
//! core.observe(Observation::GpuFound { gpu: 0, info: Arc::new(GpuInfo::default()), at: BootNs(1_000_000_000) });
//! for n in 11..41 {
//!     let (at, read) = (GpuNs(n * 100_000_000), BootNs(n * 100_000_000 + 5_000_000));
//!     let mut batch = GpuBatch::new(0, read, PollStatus::Samples);
//!     batch.samples = vec![DeviceSample { at, busy_percent: 60, queried: true }];
//!     batch.process_samples = vec![ProcessSample { at, pid: 100, percent: [60, 0, 0, 0, 0, 0] }];
//!     core.observe(Observation::from(batch));
//! }
//! core.observe(Observation::ClockAdvanced { at: BootNs(4_100_000_000), wall: WallTime(0) });
//!
//! let snapshot = core.snapshot();
//! let busy = snapshot.gpus[0].time.busy;
//! assert!(busy > 1.4);
//! assert!((snapshot.containers[0].gpus[0].seconds - busy).abs() < 1e-9);
//! ```

use std::collections::VecDeque;
use std::sync::Arc;

use foldhash::{HashMap, HashSet};

use crate::aggregate::{Aggregate, Settings};
use crate::attribute::DeviceAttribution;
use crate::device::Reason;
use crate::fact::{ContainerFact, Fact, GpuFact, HostProcess, User, WaitFact, WaitProbeFact};
use crate::identity::{ContainerChange, ContainerRecord, Identity, Verdict};
use crate::observation::{CgroupMembership, Observation, WaitProbeChange, WaitReading};
use crate::snapshot::{ContainerGpu, ContainerView, GpuView, Snapshot};
use crate::units::{BootNs, ContainerKey, Tgid};

#[derive(Debug, Default)]
pub struct Core {
    pub identity: Identity,
    devices: Vec<Option<DeviceAttribution>>,
    aggregate: Aggregate,
    /// Facts since [`Core::take_facts`] was last called.
    facts: Vec<Fact>,
    changes: Vec<ContainerChange>,
    /// Pods, jobs, units and login sessions that no GPU fact has named: a machine has many, and few of them use a GPU.
    unused: HashMap<ContainerKey, Arc<ContainerRecord>>,
    keep_facts: bool,
    /// Processes that called cuInit, with their users; only while wait probes are attached.
    clients: VecDeque<User>,
}

const MAX_CLIENTS: usize = 1024;

/// A living process of a user of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuProcess {
    pub tgid: Tgid,
    pub start: BootNs,
    pub user: User,
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
    /// `keep_facts`: keep facts until [`Core::take_facts`] is called; otherwise they are only aggregated.
    pub fn new(settings: Settings, keep_facts: bool) -> Self {
        Self { aggregate: Aggregate::new(settings), keep_facts, ..Self::default() }
    }

    pub fn observe(&mut self, observation: Observation) {
        let mut facts = Vec::new();
        match observation {
            Observation::GpuFound { gpu, info, at } => {
                if self.devices.len() <= gpu {
                    self.devices.resize_with(gpu + 1, || None);
                }
                match &mut self.devices[gpu] {
                    Some(known) => known.reopen(info, at, &mut facts),
                    empty => *empty = Some(DeviceAttribution::new(info, at, &mut facts)),
                }
                self.push_facts(gpu, facts);
            }
            Observation::GpuGone { gpu, at } => {
                if let Some(Some(device)) = self.devices.get_mut(gpu) {
                    device.gone(at, &mut facts);
                }
                self.push_facts(gpu, facts);
            }
            Observation::GpuReleased { gpu, at } => {
                if let Some(Some(device)) = self.devices.get_mut(gpu) {
                    device.release(at, &mut facts);
                }
                self.push_facts(gpu, facts);
            }
            Observation::Gpu(batch) => {
                self.take_changes();
                if let Some(Some(device)) = self.devices.get_mut(batch.gpu) {
                    device.apply(&batch, &self.identity, &mut facts);
                }
                self.aggregate.now = self.aggregate.now.max(batch.ended);
                self.push_facts(batch.gpu, facts);
            }
            Observation::Xid { gpu, xid, count } => self.push_facts(gpu, vec![(self.aggregate.now, GpuFact::Xid { xid, count })]),
            Observation::Pressure(pressure) => self.push_fact(Fact::Pressure(pressure)),
            Observation::GpuClient { tgid, at } => self.client(tgid, at),
            Observation::Waited(reading) => self.waited(*reading),
            Observation::WaitProbe(change) => self.wait_probe(*change),
            Observation::Engine(engine) => self.push_fact(Fact::Engine(engine)),
            Observation::ClockAdvanced { at, wall } => {
                for slot in 0..self.devices.len() {
                    let mut facts = Vec::new();
                    if let Some(Some(device)) = self.devices.get_mut(slot) {
                        device.advance(at, &mut facts);
                    }
                    self.push_facts(slot, facts);
                }
                let aggregate = &self.aggregate;
                self.identity.expire(at, |key| aggregate.credits(key));
                self.take_changes();
                self.push_fact(Fact::Time { at, wall });
                // Devices that aggregation has dropped are dropped here too.
                for (slot, device) in self.devices.iter_mut().enumerate() {
                    if !self.aggregate.has_gpu(slot) {
                        *device = None;
                    }
                }
            }
            identity => self.identity.observe(identity),
        }
    }

    /// The user of a process that existed during the whole span.
    fn user_of(&self, tgid: Tgid, start: BootNs, span: (BootNs, BootNs)) -> (HostProcess, User) {
        let known = self.identity.residency(tgid, span, |_| None).map_or(start, |residency| residency.start);
        let process = HostProcess { pid: tgid.0, start: known };
        let user = match self.identity.resolve(tgid, span, |_| None) {
            Verdict::Container(key) => User::Container(key),
            Verdict::Host => User::Host(process),
            Verdict::Unknown => User::Unattributed(Reason::PidUnknown),
            Verdict::Lost => User::Unattributed(Reason::Lost),
            Verdict::Ambiguous => User::Unattributed(Reason::Ambiguous),
        };
        (process, user)
    }

    /// The living processes of all users that hold a GPU or were credited with time on one.
    pub fn gpu_processes(&self) -> Vec<GpuProcess> {
        let mut users: HashSet<User> = HashSet::default();
        users.extend(self.clients.iter().copied());
        for (_, gpu) in self.aggregate.gpus() {
            users.extend(gpu.holders().users());
            users.extend(gpu.containers().into_iter().map(User::Container));
        }
        let user = |tgid: Tgid, start: BootNs, membership: &CgroupMembership| match self
            .identity
            .cgroups
            .container_of(membership, BootNs(u64::MAX))
        {
            Ok(Some(key)) => Some(User::Container(key)),
            Ok(None) => Some(User::Host(HostProcess { pid: tgid.0, start })),
            Err(_) => None,
        };
        let process = |(tgid, start, membership)| {
            let user = user(tgid, start, &membership).filter(|user| users.contains(user))?;
            Some(GpuProcess { tgid, start, user })
        };
        self.identity.processes.living().filter_map(process).collect()
    }

    /// Samples of these devices that name no process may be of the client: those that its user is known to use; without such a device the
    /// only one of the machine. MIG devices have no samples.
    fn devices_of_client(&self, user: User) -> Vec<usize> {
        let all = || self.aggregate.gpus().filter(|(_, gpu)| gpu.info.is_leaf());
        let is_only = all().count() == 1;
        let known: Vec<usize> = all().filter(|(_, gpu)| gpu.knows(user)).map(|(slot, _)| slot).collect();
        let may_be = |slot: usize| if known.is_empty() { is_only } else { known.contains(&slot) };
        let present = all().filter(|(slot, gpu)| may_be(*slot) && gpu.gone.is_none() && gpu.info.parent.is_none());
        present.map(|(slot, _)| slot).collect()
    }

    fn client(&mut self, tgid: Tgid, at: BootNs) {
        self.take_changes();
        let (_, user) = self.user_of(tgid, at, (at, at));
        if !matches!(user, User::Container(_) | User::Host(_)) {
            return;
        }
        for slot in self.devices_of_client(user) {
            let mut facts = Vec::new();
            if let Some(Some(device)) = self.devices.get_mut(slot) {
                device.client((tgid.0, user), at, &self.identity, &mut facts);
            }
            self.push_facts(slot, facts);
        }
        // A container counts once, whatever the number of its processes, so that it cannot replace all others; the newest replaces the
        // oldest.
        if self.clients.contains(&user) {
            return;
        }
        if self.clients.len() >= MAX_CLIENTS {
            self.clients.pop_front();
        }
        self.clients.push_back(user);
    }

    fn waited(&mut self, reading: WaitReading) {
        self.take_changes();
        let WaitReading { tgid, start, from, to, some_ns, total_ns, calls, durations } = reading;
        let (process, user) = self.user_of(tgid, start, (from, to));
        self.push_fact(Fact::Waited(WaitFact { process, user, from, to, some_ns, total_ns, calls, durations }));
    }

    fn wait_probe(&mut self, change: WaitProbeChange) {
        self.take_changes();
        let WaitProbeChange { tgid, start, at, state, detail } = change;
        let (process, user) = self.user_of(tgid, start, (at, at));
        self.push_fact(Fact::WaitProbe(WaitProbeFact { process, user, at, state, detail }));
    }

    fn push_fact(&mut self, fact: Fact) {
        if !self.unused.is_empty() {
            match &fact {
                Fact::Gpu { fact: of_gpu, .. } => {
                    of_gpu.users().filter_map(User::container).for_each(|key| self.record_use(key));
                }
                Fact::Waited(WaitFact { user, .. }) => user.container().into_iter().for_each(|key| self.record_use(key)),
                _ => {}
            }
        }
        self.aggregate.apply(&fact);
        if self.keep_facts {
            self.facts.push(fact);
        }
    }

    fn record_use(&mut self, key: ContainerKey) {
        let Some(record) = self.unused.remove(&key) else { return };
        self.changes.push(ContainerChange::Appeared(record));
        let gone = self.identity.cgroups.container(key).and_then(|container| container.gone);
        self.changes.extend(gone.map(|at| ContainerChange::Gone(key, at)));
    }

    fn push_facts(&mut self, gpu: usize, facts: Vec<(BootNs, GpuFact)>) {
        let Ok(gpu) = u32::try_from(gpu) else { return };
        for (at, fact) in facts {
            self.push_fact(Fact::Gpu { gpu, at, fact });
        }
    }

    /// Emits the facts about containers, before the facts that name them.
    fn take_changes(&mut self) {
        for change in self.identity.cgroups.take_changes() {
            match &change {
                ContainerChange::Appeared(record) => self.push_fact(Fact::Container(ContainerFact::from(&**record))),
                ContainerChange::Gone(key, at) => self.push_fact(Fact::ContainerGone { key: *key, at: *at }),
                ContainerChange::Evicted(key) => self.push_fact(Fact::ContainerForgotten { key: *key }),
            }
            match change {
                ContainerChange::Appeared(record) if !record.identity.is_container() => {
                    _ = self.unused.insert(record.key, record)
                }
                ContainerChange::Evicted(key) if self.unused.remove(&key).is_some() => {}
                ContainerChange::Gone(key, _) if self.unused.contains_key(&key) => {}
                change => self.changes.push(change),
            }
        }
    }

    /// Of containers, and of the other users of GPUs once they are used.
    pub fn take_container_changes(&mut self) -> Vec<ContainerChange> {
        self.take_changes();
        std::mem::take(&mut self.changes)
    }

    /// The facts since the last call, in order.
    pub fn take_facts(&mut self) -> Vec<Fact> {
        std::mem::take(&mut self.facts)
    }

    pub fn snapshot(&self) -> Snapshot {
        let now = self.aggregate.now;
        let mut gpus = Vec::new();
        // Of each of `gpus`.
        let mut slots = Vec::new();
        let mut by_container: HashMap<ContainerKey, Vec<ContainerGpu>> = HashMap::default();
        for (slot, gpu) in self.aggregate.gpus() {
            let Some(Some(device)) = self.devices.get(slot) else { continue };
            let (duties, utilization) = gpu.duties(now);
            let index = gpus.len();
            slots.push(slot);
            gpus.push(GpuView {
                info: gpu.info.clone(),
                readings: gpu.readings,
                hardware: device.hardware,
                time: gpu.time(),
                unattributed: gpu.unattributed(),
                unattributed_energy: gpu.unattributed_energy(),
                utilization_ratio: utilization,
                coactive_ratio: gpu.coactivity.coactive_ratio(),
                last_sample: device.last_sample,
                sample_period_seconds: device.period_ns().map(|ns| ns as f64 * 1e-9),
                sample_gaps: device.sample_gaps,
                counts: device.counts,
                expected_stderr_ratio: gpu.expected_stderr(),
                ring_overruns: device.ring_overruns,
                rejected: device.rejected,
                off_grid: device.off_grid,
                clock: device.clock(),
                engines: gpu.engines(),
                throttle_seconds: gpu.throttle_seconds(),
                xids: gpu.xids(),
                unattributed_holders: gpu.holders().unattributed().into_iter().collect(),
                gone: gpu.gone,
            });
            for key in gpu.containers().into_iter().filter(|_| gpu.info.is_leaf()) {
                let credit = gpu.credits().get(&User::Container(key)).copied().unwrap_or_default();
                let duty = duties.get(&key);
                // 0 if observed and idle, absent if not observed.
                let observed = utilization.map(|_| 0.0);
                let held = gpu.holders().held_by(User::Container(key));
                let coactivity = gpu.coactivity.sums_of(key);
                // Most containers use one GPU, and a growing vector begins with room for four.
                by_container.entry(key).or_insert_with(|| Vec::with_capacity(1)).push(ContainerGpu {
                    gpu: index,
                    seconds: credit.ns * 1e-9,
                    seconds_stderr: credit.variance().sqrt() * 1e-9,
                    samples: credit.samples,
                    energy_joules: gpu.energy_of(key),
                    engines: gpu.engine_seconds(key),
                    window_shares: gpu.window_shares(key),
                    active_seconds: coactivity.map_or(0.0, |sums| sums.active),
                    coactive_seconds: coactivity.map_or(0.0, |sums| sums.coactive),
                    contention: coactivity.map_or_else(Arc::default, |sums| Arc::clone(&sums.others)),
                    mps_clients: held.map_or(0, |held| held.mps_clients),
                    duty_cycle_percent: duty.map(|d| d.percent).or(observed),
                    duty_cycle_stderr: duty.map(|d| d.stderr).or(observed),
                    memory_used_bytes: held.and_then(|held| held.memory_bytes),
                    is_listed: gpu.holders().lists(User::Container(key)),
                });
            }
        }
        let mut containers: Vec<ContainerView> = self
            .identity
            .cgroups
            .containers()
            .filter_map(|c| {
                let mut gpus = by_container.remove(&c.record.key).unwrap_or_default();
                let shown = !gpus.is_empty() || c.gone.is_none() && c.record.identity.is_container();
                let waits = self.aggregate.waits.of(c.record.key, now);
                if let Some(pressure) = waits.and_then(|waits| waits.pressure_ratio) {
                    let shares = self.aggregate.waits.pressure_shares(c.record.key, pressure);
                    for usage in &mut gpus {
                        let slot = slots.get(usage.gpu);
                        let of_gpu = shares.iter().filter(|share| slot == Some(&share.gpu));
                        usage.add_pressure(of_gpu.map(|share| (share.other, share.amount)));
                    }
                }
                shown.then(|| ContainerView { record: c.record.clone(), gone: c.gone, gpus, waits })
            })
            .collect();
        containers.sort_by_key(|c| c.record.key);
        Snapshot { at: now, wall: self.aggregate.wall, gpus, containers }
    }
}

#[cfg(test)]
mod tests;
