//! What a reader must know before the facts that come next: the state that a State frame restores.
//!
//! It follows the facts and passes on what of them belongs in a file: a node may start a thousand containers a second that never touch a
//! GPU, so a container is in the file only from the first GPU fact that names it, with what was known of it until then put before.
//!
//! A State frame may hold `Time`; of a GPU that is there `Opened`, and the latest `Held`, `Readings` and `Clock`; of users that were named
//! lately `Container`, `Labels`, `Pressure`, `ContainerGone` and `Comm`. All of these say what is, not what was added: told twice they
//! say the same, and each has the time at which it was first told. Facts that are added up (ticks, idle and unobserved time,
//! XIDs, `Left`, `Restarted`) are never among them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use sampler_core::aggregate::{NAMED_NEIGHBOURS, QUERIED_NEIGHBOURS, WAIT_NS};
use sampler_core::device::Engine;
use sampler_core::fact::{ContainerFact, Fact, GpuFact, HostProcess, LabelFact, User, UtilizationSample};
use sampler_core::observation::PressureFact;
use sampler_core::units::{BootNs, ContainerKey};

/// A user is in State frames for so long after it was last named; named again, it is told again.
const NAMED_LATELY_NS: u64 = 60_000_000_000;
/// Busy samples remembered to tell that: 10 s of a driver that samples twice as often as any that is known.
const MAX_TICKS: usize = 128;
/// Containers remembered; identity forgets them sooner.
const MAX_CONTAINERS: usize = 131_072;
/// Processes outside containers remembered, and devices.
const MAX_HOSTS: usize = 4096;
const MAX_GPUS: usize = 4096;

#[derive(Debug, Default)]
pub struct State {
    now: BootNs,
    time: Option<Fact>,
    gpus: BTreeMap<u32, GpuState>,
    containers: BTreeMap<ContainerKey, ContainerState>,
    hosts: BTreeMap<HostProcess, HostState>,
}

#[derive(Debug, Default)]
struct GpuState {
    opened: Option<Fact>,
    held: Option<Fact>,
    readings: Option<Fact>,
    clock: Option<Fact>,
    /// Up to here its time is told.
    covered: BootNs,
    /// Its last busy samples.
    samples: VecDeque<(BootNs, Sampled)>,
}

/// What a busy sample says of its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sampled {
    Named,
    /// Queried, and the driver named none.
    PidLess,
    Unqueried,
}

#[derive(Debug, Default)]
struct ContainerState {
    fact: Option<ContainerFact>,
    labels: Option<LabelFact>,
    pressure: Option<PressureFact>,
    gone: Option<BootNs>,
    named: Option<BootNs>,
    /// It is in the file since the last State frame, or in that.
    told: bool,
}

#[derive(Debug, Default)]
struct HostState {
    comm: Option<String>,
    named: BootNs,
    told: bool,
}

/// Whom a fact about a GPU names.
fn users(fact: &GpuFact) -> Vec<User> {
    let of = |sample: &UtilizationSample| sample.processes.iter().map(|process| process.user).collect();
    match fact {
        GpuFact::Utilization(sample) | GpuFact::EngineSample(_, sample) => of(sample),
        GpuFact::Held(Some(holders)) => holders.iter().map(|holder| holder.user).collect(),
        _ => Vec::new(),
    }
}

fn at(fact: &Fact) -> Option<BootNs> {
    match fact {
        Fact::Time { at, .. } | Fact::Gpu { at, .. } | Fact::ContainerGone { at, .. } => Some(*at),
        Fact::Pressure(pressure) => Some(pressure.at),
        _ => None,
    }
}

impl GpuState {
    fn are_neighbours_told(&self, until: BootNs) -> bool {
        self.is_divided(until, Sampled::PidLess, NAMED_NEIGHBOURS, |later| later == Sampled::Named)
            && self.is_divided(until, Sampled::Unqueried, QUERIED_NEIGHBOURS, |later| later != Sampled::Unqueried)
    }

    /// Whether the last sample of that kind up to `until` has the neighbours after it that it is divided over.
    fn is_divided(&self, until: BootNs, kind: Sampled, neighbours: usize, is_neighbour: impl Fn(Sampled) -> bool) -> bool {
        let Some(last) = self.samples.iter().rposition(|(at, sampled)| *sampled == kind && *at <= until) else { return true };
        let later = self.samples.range(last..).filter(|(_, sampled)| is_neighbour(*sampled)).count();
        later >= neighbours || self.covered >= self.samples[last].0.plus(WAIT_NS)
    }

    fn remember(&mut self, at: BootNs, sampled: Sampled) {
        if self.samples.len() >= MAX_TICKS {
            self.samples.pop_front();
        }
        self.samples.push_back((at, sampled));
    }
}

impl ContainerState {
    /// All that is known of it.
    fn facts(&self, key: ContainerKey) -> impl Iterator<Item = Fact> {
        let gone = self.gone.map(|at| Fact::ContainerGone { key, at });
        let all = [
            self.fact.clone().map(Fact::Container),
            self.labels.clone().map(Fact::Labels),
            self.pressure.map(Fact::Pressure),
            gone,
        ];
        all.into_iter().flatten()
    }
}

impl State {
    /// Follows a fact.
    pub fn apply(&mut self, fact: &Fact) {
        self.follow(fact, &mut |_| {});
    }

    /// Follows a fact; `tell` gets what of it belongs in a file, behind what it takes to understand it.
    pub fn follow(&mut self, fact: &Fact, tell: &mut impl FnMut(Fact)) {
        self.now = self.now.max(at(fact).unwrap_or_default());
        match fact {
            Fact::Time { .. } => self.time = Some(fact.clone()),
            Fact::Gpu { gpu, at, fact: of_gpu } => {
                self.gpu(*gpu, *at, of_gpu, fact);
                for user in users(of_gpu) {
                    self.named(user, tell);
                }
            }
            Fact::Container(container) => {
                let known = self.container(container.key);
                known.fact = Some(container.clone());
                // Named before it was told: that happens where facts were left out.
                known.told = known.named.is_some();
                if !known.told {
                    return;
                }
            }
            Fact::Labels(labels) => {
                let known = self.container(labels.key);
                known.labels = Some(labels.clone());
                if !known.told {
                    return;
                }
            }
            Fact::Pressure(pressure) => {
                let known = self.container(pressure.key);
                known.pressure = Some(*pressure);
                if !known.told {
                    return;
                }
            }
            Fact::ContainerGone { key, at } => {
                let known = self.container(*key);
                known.gone = Some(*at);
                if !known.told {
                    return;
                }
            }
            Fact::ContainerForgotten { key } => {
                if !self.containers.remove(key).is_some_and(|known| known.told) {
                    return;
                }
            }
            Fact::Comm { process, comm } => {
                let known = self.host(*process);
                known.comm = Some(comm.clone());
                if !known.told {
                    return;
                }
            }
        }
        tell(fact.clone());
    }

    fn gpu(&mut self, gpu: u32, at: BootNs, of_gpu: &GpuFact, fact: &Fact) {
        if self.gpus.len() >= MAX_GPUS && !self.gpus.contains_key(&gpu) {
            return;
        }
        let known = self.gpus.entry(gpu).or_default();
        match of_gpu {
            GpuFact::Opened(_) => *known = GpuState { opened: Some(fact.clone()), covered: at, ..GpuState::default() },
            GpuFact::Gone => {
                self.gpus.remove(&gpu);
            }
            GpuFact::Held(_) => known.held = Some(fact.clone()),
            GpuFact::Readings(_) => known.readings = Some(fact.clone()),
            GpuFact::Clock(_) => known.clock = Some(fact.clone()),
            GpuFact::Utilization(sample) => {
                known.covered = known.covered.max(at);
                if sample.busy_percent > 0 {
                    known.remember(at, if sample.processes.is_empty() { Sampled::PidLess } else { Sampled::Named });
                }
            }
            GpuFact::Unqueried(Engine::Compute, _) => {
                known.covered = known.covered.max(at);
                known.remember(at, Sampled::Unqueried);
            }
            GpuFact::Idle { .. } | GpuFact::Unobserved { .. } | GpuFact::Unsupported { .. } | GpuFact::Measured { .. } => {
                known.covered = known.covered.max(at)
            }
            GpuFact::Unqueried(..)
            | GpuFact::EngineSample(..)
            | GpuFact::Restarted
            | GpuFact::Xid { .. }
            | GpuFact::Left { .. } => {}
        }
    }

    fn container(&mut self, key: ContainerKey) -> &mut ContainerState {
        if self.containers.len() >= MAX_CONTAINERS && !self.containers.contains_key(&key) {
            // Keys grow: the oldest.
            self.containers.pop_first();
        }
        self.containers.entry(key).or_default()
    }

    fn host(&mut self, process: HostProcess) -> &mut HostState {
        if self.hosts.len() >= MAX_HOSTS && !self.hosts.contains_key(&process) {
            let oldest = self.hosts.iter().min_by_key(|(_, known)| known.named).map(|(process, _)| *process);
            oldest.and_then(|process| self.hosts.remove(&process));
        }
        self.hosts.entry(process).or_default()
    }

    fn named(&mut self, user: User, tell: &mut impl FnMut(Fact)) {
        let now = self.now;
        match user {
            User::Container(key) => {
                let known = self.container(key);
                known.named = Some(now);
                if !known.told && known.fact.is_some() {
                    known.told = true;
                    known.facts(key).for_each(tell);
                }
            }
            User::Host(process) => {
                let known = self.host(process);
                known.named = now;
                if !std::mem::replace(&mut known.told, true)
                    && let Some(comm) = known.comm.clone()
                {
                    tell(Fact::Comm { process, comm });
                }
            }
            User::Nobody(_) => {}
        }
    }

    /// What a State frame holds now. From here on whoever is not in it is told again when it is named.
    pub fn facts(&mut self) -> Vec<Fact> {
        let held: BTreeSet<User> = self
            .gpus
            .values()
            .filter_map(|gpu| match &gpu.held {
                Some(Fact::Gpu { fact, .. }) => Some(users(fact)),
                _ => None,
            })
            .flatten()
            .collect();
        let lately = self.now.minus(NAMED_LATELY_NS);
        let mut all: Vec<Fact> = self.time.clone().into_iter().collect();
        all.extend(self.gpus.values().filter_map(|gpu| gpu.opened.clone()));
        for (key, known) in &mut self.containers {
            let wanted = held.contains(&User::Container(*key)) || known.named.is_some_and(|named| named >= lately);
            known.told = wanted && known.fact.is_some();
            if known.told {
                all.extend(known.facts(*key));
            }
        }
        self.hosts.retain(|process, known| held.contains(&User::Host(*process)) || known.named >= lately);
        for (process, known) in &mut self.hosts {
            known.told = true;
            all.extend(known.comm.clone().map(|comm| Fact::Comm { process: *process, comm }));
        }
        let latest = |gpu: &GpuState| [gpu.clock.clone(), gpu.readings.clone(), gpu.held.clone()];
        all.extend(self.gpus.values().filter(|gpu| gpu.opened.is_some()).flat_map(latest).flatten());
        all
    }

    /// Containers in the file, with the labels that are there.
    pub fn labelled(&self) -> impl Iterator<Item = (ContainerKey, Option<&LabelFact>)> {
        self.containers.iter().filter(|(_, known)| known.told).map(|(key, known)| (*key, known.labels.as_ref()))
    }

    /// Processes outside containers whose name is not known.
    pub fn nameless(&self) -> impl Iterator<Item = HostProcess> {
        self.hosts.iter().filter(|(_, known)| known.comm.is_none()).map(|(process, _)| *process)
    }

    /// The time of the last fact that had one.
    pub fn now(&self) -> BootNs {
        self.now
    }

    /// Whether the time of every GPU is told up to here, with the later samples that it takes to say whose it was.
    pub fn is_told(&self, until: BootNs) -> bool {
        // One that is divided into MIG devices has no time of its own.
        let has_time = |opened: &Fact| matches!(opened, Fact::Gpu { fact: GpuFact::Opened(info), .. } if info.is_leaf());
        let mut all = self.gpus.values().filter(|gpu| gpu.opened.as_ref().is_some_and(has_time));
        all.all(|gpu| gpu.covered >= until && gpu.are_neighbours_told(until))
    }
}
