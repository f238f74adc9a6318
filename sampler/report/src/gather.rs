//! What a report needs from the facts of a session in addition to the sums: identities and labels of users, and readings over time.

use std::collections::{BTreeMap, HashMap};

use sampler_core::aggregate::Range;
use sampler_core::device::{DeviceReadings, ThrottleTimes};
use sampler_core::fact::{
    AttributedProcess, ContainerFact, Fact, GpuFact, Holder, HostProcess, LabelFact, UnobservedReason, User, UtilizationSample,
    WaitFact, WaitProbeFact,
};
use sampler_core::observation::{EngineFact, PressureFact};
use sampler_core::units::{BootNs, ContainerKey, WallTime};

use super::freeze::{self, GatheredExperiment, ObservedTime};

/// The usual sample period of the driver, for spans without samples.
const SAMPLE_PERIOD_NS: u64 = 167_000_000;
/// Spans of a device are contiguous; a shorter distance between two of them may be drift of the device clock against boot time.
const UNREAD_NS: u64 = 500_000_000;

/// The lifetime of one process of one user, as far as the facts contain it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime {
    pub since: BootNs,
    pub until: Option<BootNs>,
}

#[derive(Debug, Default)]
pub struct GatheredGpu {
    /// Every sample in the range: its end and the user that it names; in order.
    pub samples: Vec<(BootNs, Option<User>)>,
    /// Memory by user, with the time of the reading.
    pub held: Vec<(BootNs, BTreeMap<User, Option<u64>>)>,
    pub readings: Vec<(BootNs, DeviceReadings)>,
    /// The driver's counters of the time for which each reason limited the clocks.
    pub throttle_times: Vec<(BootNs, ThrottleTimes)>,
    /// (from, to, reason), in order.
    pub unobserved: Vec<(BootNs, BootNs, UnobservedReason)>,
    pub xids: Vec<(BootNs, u64, u64)>,
    pub lifetimes: HashMap<User, Vec<Lifetime>>,
    /// Observed time in the range since the schedule of the first experiment; empty without one.
    pub observed: Vec<ObservedTime>,
    open: HashMap<(u32, BootNs), (User, usize)>,
    /// End of the last span.
    until: Option<BootNs>,
}

#[derive(Debug, Default)]
pub struct Gathered {
    pub gpus: BTreeMap<u32, GatheredGpu>,
    pub containers: BTreeMap<ContainerKey, ContainerFact>,
    pub labels: HashMap<ContainerKey, LabelFact>,
    pub comms: HashMap<HostProcess, String>,
    pub pressures: HashMap<ContainerKey, Vec<PressureFact>>,
    pub waits: HashMap<User, Vec<WaitFact>>,
    pub wait_probes: BTreeMap<User, Vec<WaitProbeFact>>,
    /// Readings of serving engines, in order.
    pub engines: HashMap<ContainerKey, Vec<EngineFact>>,
    /// Containers that ended, with the time.
    pub ended: Vec<(ContainerKey, BootNs)>,
    pub experiments: Vec<GatheredExperiment>,
    /// The latest time of any fact.
    pub last: BootNs,
    clocks: Option<(BootNs, WallTime)>,
    /// Restarts of a container with the same cgroup path are one container: its first key.
    first_keys: HashMap<ContainerKey, ContainerKey>,
    by_path: HashMap<String, ContainerKey>,
}

impl Gathered {
    /// The time before this fact that no fact covers, as a fact: spans of a device are contiguous unless some could not be read.
    pub fn unread_span(&self, fact: &Fact) -> Option<Fact> {
        let Fact::Gpu { gpu, at, fact: gpu_fact } = fact else { return None };
        let until = self.gpus.get(gpu)?.until?;
        let ns = at.minus(gpu_fact.span_ns()?).saturating_since(until);
        let unread = GpuFact::Unobserved { ns, why: UnobservedReason::Unread };
        (ns > UNREAD_NS).then(|| Fact::Gpu { gpu: *gpu, at: until.plus(ns), fact: unread })
    }

    /// Records a fact. Returns it as the aggregation has to receive it: with the first key of a restarted container.
    pub fn take(&mut self, fact: &Fact, range: Range) -> Fact {
        match fact {
            Fact::Time { at, wall } => {
                self.last = self.last.max(*at);
                self.clocks.get_or_insert((*at, *wall));
            }
            Fact::Gpu { gpu, at, fact: gpu_fact } => {
                let gpu_fact = self.with_first_keys(gpu_fact);
                let gathered = self.gpus.entry(*gpu).or_default();
                gathered.take(*at, &gpu_fact, range);
                if !self.experiments.is_empty() && range.has(*at) {
                    gathered.observed.extend(freeze::observed_time(*at, &gpu_fact));
                }
                if !matches!(gpu_fact, GpuFact::Left { .. }) {
                    self.last = self.last.max(*at);
                }
                return Fact::Gpu { gpu: *gpu, at: *at, fact: gpu_fact };
            }
            Fact::Container(container) => {
                let first = *self.by_path.entry(container.cgroup_path.clone()).or_insert(container.key);
                self.first_keys.insert(container.key, first);
                let container = ContainerFact { key: first, ..container.clone() };
                self.containers.entry(first).or_insert_with(|| container.clone());
                return Fact::Container(container);
            }
            Fact::ContainerGone { key, at } => {
                let key = self.key(*key);
                self.ended.push((key, *at));
                return Fact::ContainerGone { key, at: *at };
            }
            Fact::ContainerForgotten { key } => return Fact::ContainerForgotten { key: self.key(*key) },
            Fact::Labels(labels) => {
                let key = self.key(labels.key);
                self.labels.insert(key, LabelFact { key, ..labels.clone() });
            }
            Fact::Comm { process, comm } => {
                self.comms.insert(*process, comm.clone());
            }
            Fact::Pressure(pressure) => {
                let key = self.key(pressure.key);
                self.pressures.entry(key).or_default().push(PressureFact { key, ..*pressure });
            }
            Fact::Waited(wait) => {
                let user = self.user(wait.user);
                self.waits.entry(user).or_default().push(WaitFact { user, ..wait.clone() });
            }
            Fact::WaitProbe(probe) => {
                let user = self.user(probe.user);
                self.wait_probes.entry(user).or_default().push(WaitProbeFact { user, ..probe.clone() });
            }
            Fact::Engine(engine) => {
                let key = self.key(engine.key);
                if range.has(engine.at) {
                    self.engines.entry(key).or_default().push(EngineFact { key, ..engine.clone() });
                }
            }
            Fact::Experiment(experiment) => freeze::gather(&mut self.experiments, experiment),
        }
        fact.clone()
    }

    fn key(&self, key: ContainerKey) -> ContainerKey {
        self.first_keys.get(&key).copied().unwrap_or(key)
    }

    fn user(&self, user: User) -> User {
        match user {
            User::Container(key) => User::Container(self.key(key)),
            other => other,
        }
    }

    fn sample(&self, sample: &UtilizationSample) -> UtilizationSample {
        let processes =
            sample.processes.iter().map(|process| AttributedProcess { user: self.user(process.user), ..*process }).collect();
        UtilizationSample { processes, ..sample.clone() }
    }

    fn with_first_keys(&self, fact: &GpuFact) -> GpuFact {
        match fact {
            GpuFact::Utilization(sample) => GpuFact::Utilization(self.sample(sample)),
            GpuFact::EngineSample(engine, sample) => GpuFact::EngineSample(*engine, self.sample(sample)),
            GpuFact::Held(Some(held)) => {
                GpuFact::Held(Some(held.iter().map(|holder| Holder { user: self.user(holder.user), ..*holder }).collect()))
            }
            GpuFact::Client { pid, user, since } => GpuFact::Client { pid: *pid, user: self.user(*user), since: *since },
            other => other.clone(),
        }
    }

    /// Converts boot time to wall time by the first time at which both are known, so that differences are preserved.
    pub fn wall(&self, at: BootNs, start: (BootNs, WallTime)) -> WallTime {
        let (boot, wall) = if start.1.0 > 0 { start } else { self.clocks.unwrap_or(start) };
        WallTime((wall.0 as i128 + i128::from(at.0) - i128::from(boot.0)).max(0) as u64)
    }
}

impl GatheredGpu {
    fn take(&mut self, at: BootNs, fact: &GpuFact, range: Range) {
        if fact.span_ns().is_some() {
            self.until = Some(at);
        }
        match fact {
            // The device was absent: that time is in no state.
            GpuFact::Gone => self.until = None,
            GpuFact::Utilization(sample) => {
                for process in &sample.processes {
                    self.record_alive(process);
                }
                if range.has(at) {
                    let named =
                        sampler_core::aggregate::named(&sample.processes).filter(|user| sampler_core::aggregate::is_user(*user));
                    self.samples.push((at, named));
                }
            }
            GpuFact::Idle { ns } | GpuFact::Measured { ns, .. } => {
                // As many samples as the driver would have taken.
                let ns = range.part(at, *ns);
                let to = at.min(range.to);
                self.samples.extend((0..ns.div_ceil(SAMPLE_PERIOD_NS)).rev().map(|n| (to.minus(n * SAMPLE_PERIOD_NS), None)));
            }
            GpuFact::Unobserved { ns, why } => {
                let (from, to) = (at.minus(*ns).max(range.after), at.min(range.to));
                if from < to {
                    self.unobserved.push((from, to, *why));
                }
            }
            GpuFact::Held(held) if range.has(at) || at <= range.after => {
                let mut memory: BTreeMap<User, Option<u64>> = BTreeMap::new();
                for holder in held.iter().flat_map(|held| held.iter()) {
                    let sum = memory.entry(holder.user).or_insert(Some(0));
                    *sum = sum.zip(holder.memory_bytes).map(|(sum, bytes)| sum.saturating_add(bytes));
                }
                self.held.push((at, memory));
            }
            GpuFact::Readings(readings) if range.has(at) || at <= range.after => self.readings.push((at, *readings)),
            GpuFact::ThrottleTimes(times) => self.throttle_times.push((at, *times)),
            GpuFact::Xid { xid, count } if range.has(at) => self.xids.push((at, *xid, *count)),
            GpuFact::Left { pid, since } => {
                if let Some((user, n)) = self.open.remove(&(*pid, *since))
                    && let Some(lifetime) = self.lifetimes.get_mut(&user).and_then(|lifetimes| lifetimes.get_mut(n))
                {
                    lifetime.until = Some(at);
                }
            }
            _ => {}
        }
    }

    fn record_alive(&mut self, process: &AttributedProcess) {
        if process.since == BootNs(0) || self.open.contains_key(&(process.pid, process.since)) {
            return;
        }
        let lifetimes = self.lifetimes.entry(process.user).or_default();
        // A sample of a process that is already recorded as ended.
        if lifetimes.iter().any(|lifetime| lifetime.since == process.since && lifetime.until.is_some()) {
            return;
        }
        self.open.insert((process.pid, process.since), (process.user, lifetimes.len()));
        lifetimes.push(Lifetime { since: process.since, until: None });
    }

    /// The last readings at or before that time.
    pub fn readings_at(&self, at: BootNs) -> Option<&DeviceReadings> {
        latest(&self.readings, at)
    }

    pub fn held_at(&self, at: BootNs) -> Option<&BTreeMap<User, Option<u64>>> {
        latest(&self.held, at)
    }

    /// Whether a process of the user existed at any time of the span; true if nothing is known.
    pub fn may_live(&self, user: User, from: BootNs, to: BootNs) -> bool {
        let lived = |lifetime: &Lifetime| lifetime.since <= to && lifetime.until.is_none_or(|until| until >= from);
        self.lifetimes.get(&user).is_none_or(|lifetimes| lifetimes.iter().any(lived))
    }
}

fn latest<T>(all: &[(BootNs, T)], at: BootNs) -> Option<&T> {
    let n = all.partition_point(|(then, _)| *then <= at);
    all.get(n.checked_sub(1)?).map(|(_, value)| value)
}
