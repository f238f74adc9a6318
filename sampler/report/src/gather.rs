//! What a report needs of a session's facts beside their sums: who is who, and what was read when.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use sampler_core::aggregate::Range;
use sampler_core::device::{DeviceReadings, GpuInfo};
use sampler_core::fact::{
    AttributedProcess, ContainerFact, Fact, GpuFact, Holder, HostProcess, LabelFact, UnobservedReason, User, UtilizationSample,
};
use sampler_core::observation::PressureFact;
use sampler_core::units::{BootNs, ContainerKey, WallTime};

/// A driver's usual period, for spans without ticks.
const TICK_NS: u64 = 167_000_000;
/// Spans of a device follow each other; its clock may differ from boot time by less than this.
const HOLE_NS: u64 = 500_000_000;

/// One process in the hands of one user, as far as the facts tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    pub since: BootNs,
    pub until: Option<BootNs>,
}

#[derive(Debug, Default)]
pub struct GatheredGpu {
    pub info: Option<Arc<GpuInfo>>,
    /// Every tick in the range, its end, and the user that it names; in order.
    pub samples: Vec<(BootNs, Option<User>)>,
    /// Memory by user, whenever it was read.
    pub held: Vec<(BootNs, BTreeMap<User, Option<u64>>)>,
    pub readings: Vec<(BootNs, DeviceReadings)>,
    /// (from, to, why), in order.
    pub unseen: Vec<(BootNs, BootNs, UnobservedReason)>,
    pub xids: Vec<(BootNs, u64, u64)>,
    pub lives: HashMap<User, Vec<Life>>,
    open: HashMap<(u32, BootNs), (User, usize)>,
    /// The end of its last span.
    until: Option<BootNs>,
}

#[derive(Debug, Default)]
pub struct Gathered {
    pub gpus: BTreeMap<u32, GatheredGpu>,
    pub containers: BTreeMap<ContainerKey, ContainerFact>,
    pub labels: HashMap<ContainerKey, LabelFact>,
    pub comms: HashMap<HostProcess, String>,
    pub pressures: HashMap<ContainerKey, Vec<PressureFact>>,
    /// Ends of containers' lives.
    pub gone: Vec<(ContainerKey, BootNs)>,
    /// The last moment that any fact tells of.
    pub last: BootNs,
    clocks: Option<(BootNs, WallTime)>,
    /// Lives of one container, by its cgroup's path, are one.
    same: HashMap<ContainerKey, ContainerKey>,
    by_path: HashMap<String, ContainerKey>,
    told: HashSet<ContainerKey>,
}

impl Gathered {
    /// Time that no fact tells of before this one, as a fact: spans of a device follow each other, unless some could not be read.
    pub fn hole(&self, fact: &Fact) -> Option<Fact> {
        let Fact::Gpu { gpu, at, fact: of } = fact else { return None };
        let until = self.gpus.get(gpu)?.until?;
        let ns = at.minus(of.span_ns()?).saturating_since(until);
        let hole = GpuFact::Unobserved { ns, why: UnobservedReason::Unread };
        (ns > HOLE_NS).then(|| Fact::Gpu { gpu: *gpu, at: until.plus(ns), fact: hole })
    }

    /// Takes a fact in; the fact as the fold is to see it.
    pub fn take(&mut self, fact: &Fact, range: Range) -> Fact {
        match fact {
            Fact::Time { at, wall } => {
                self.last = self.last.max(*at);
                self.clocks.get_or_insert((*at, *wall));
            }
            Fact::Gpu { gpu, at, fact: of } => {
                let of = self.renamed(of);
                self.gpus.entry(*gpu).or_default().take(*at, &of, range);
                if !matches!(of, GpuFact::Left { .. }) {
                    self.last = self.last.max(*at);
                }
                return Fact::Gpu { gpu: *gpu, at: *at, fact: of };
            }
            Fact::Container(container) => {
                let first = *self.by_path.entry(container.cgroup_path.clone()).or_insert(container.key);
                self.same.insert(container.key, first);
                if self.told.insert(first) {
                    self.containers.insert(first, ContainerFact { key: first, ..container.clone() });
                }
                return Fact::Container(ContainerFact { key: first, ..container.clone() });
            }
            Fact::ContainerGone { key, at } => {
                let key = self.key(*key);
                self.gone.push((key, *at));
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
        }
        fact.clone()
    }

    fn key(&self, key: ContainerKey) -> ContainerKey {
        self.same.get(&key).copied().unwrap_or(key)
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

    fn renamed(&self, fact: &GpuFact) -> GpuFact {
        match fact {
            GpuFact::Utilization(sample) => GpuFact::Utilization(self.sample(sample)),
            GpuFact::EngineSample(engine, sample) => GpuFact::EngineSample(*engine, self.sample(sample)),
            GpuFact::Held(Some(held)) => {
                GpuFact::Held(Some(held.iter().map(|holder| Holder { user: self.user(holder.user), ..*holder }).collect()))
            }
            other => other.clone(),
        }
    }

    /// Boot time in the session's wall time: by the first moment at which both are known, so that differences stay what they are.
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
            // It was away: that time is in no state.
            GpuFact::Gone => self.until = None,
            GpuFact::Opened(info) => self.info = Some(Arc::clone(info)),
            GpuFact::Utilization(sample) => {
                for process in &sample.processes {
                    self.alive(process);
                }
                if range.has(at) {
                    let named =
                        sampler_core::aggregate::named(&sample.processes).filter(|user| sampler_core::aggregate::is_user(*user));
                    self.samples.push((at, named));
                }
            }
            GpuFact::Idle { ns } | GpuFact::Measured { ns, .. } => {
                // As many as there would have been.
                let ns = range.part(at, *ns);
                let to = at.min(range.to);
                self.samples.extend((0..ns.div_ceil(TICK_NS)).rev().map(|n| (to.minus(n * TICK_NS), None)));
            }
            GpuFact::Unobserved { ns, why } => {
                let (from, to) = (at.minus(*ns).max(range.after), at.min(range.to));
                if from < to {
                    self.unseen.push((from, to, *why));
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
            GpuFact::Xid { xid, count } if range.has(at) => self.xids.push((at, *xid, *count)),
            GpuFact::Left { pid, since } => {
                if let Some((user, n)) = self.open.remove(&(*pid, *since))
                    && let Some(life) = self.lives.get_mut(&user).and_then(|lives| lives.get_mut(n))
                {
                    life.until = Some(at);
                }
            }
            _ => {}
        }
    }

    fn alive(&mut self, process: &AttributedProcess) {
        if process.since == BootNs(0) || self.open.contains_key(&(process.pid, process.since)) {
            return;
        }
        let lives = self.lives.entry(process.user).or_default();
        // A sample of a process whose end was told already.
        if lives.iter().any(|life| life.since == process.since && life.until.is_some()) {
            return;
        }
        self.open.insert((process.pid, process.since), (process.user, lives.len()));
        lives.push(Life { since: process.since, until: None });
    }

    /// What was read last at that time.
    pub fn readings_at(&self, at: BootNs) -> Option<&DeviceReadings> {
        let n = self.readings.partition_point(|(then, _)| *then <= at);
        self.readings.get(n.checked_sub(1)?).map(|(_, readings)| readings)
    }

    pub fn held_at(&self, at: BootNs) -> Option<&BTreeMap<User, Option<u64>>> {
        let n = self.held.partition_point(|(then, _)| *then <= at);
        self.held.get(n.checked_sub(1)?).map(|(_, held)| held)
    }

    /// Whether some process of the user was there at some moment of the span; true where nothing is known.
    pub fn may_live(&self, user: User, from: BootNs, to: BootNs) -> bool {
        match self.lives.get(&user) {
            None => true,
            Some(lives) => lives.iter().any(|life| life.since <= to && life.until.is_none_or(|until| until >= from)),
        }
    }
}
