//! The state that a reader needs before it can interpret further facts; State frames store it.
//!
//! It also filters the facts for a file: a node may start a thousand containers a second that never use a GPU, so a container is written
//! only when a GPU fact names it for the first time, with its earlier facts before that fact.
//!
//! A State frame may contain `Time`; for each present GPU `Opened` and the latest `Held`, `Readings` and `Clock`; for recently named
//! users `Container`, `Labels`, `Pressure`, `ContainerGone` and `Comm`; and the last experiment. All of these state a current value, so
//! reading one twice has no effect, and each has the time at which it was first emitted. Facts that are summed (utilization samples, idle
//! and unobserved time, XIDs, waiting, `Left`, `Restarted`), `Client`, changes of wait probes and readings of serving engines are never
//! in a State frame.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use sampler_core::aggregate::{NAMED_NEIGHBOURS, QUERIED_NEIGHBOURS, WAIT_NS};
use sampler_core::device::Engine;
use sampler_core::experiment::{ExperimentFact, ExperimentSchedule};
use sampler_core::fact::{ContainerFact, Fact, GpuFact, HostProcess, LabelFact, User, WaitFact, WaitProbeFact};
use sampler_core::observation::PressureFact;
use sampler_core::units::{BootNs, ContainerKey};

/// A user stays in State frames for this long after it was last named; if it is named later, its facts are written again.
const RECENTLY_NAMED_NS: u64 = 60_000_000_000;
/// Busy samples kept per GPU for [`State::is_complete`]: 10 s of a driver with twice the highest known sample rate.
const MAX_SAMPLES: usize = 128;
/// Containers kept; identity forgets them sooner.
const MAX_CONTAINERS: usize = 131_072;
/// Processes outside containers that are kept.
const MAX_HOSTS: usize = 4096;
const MAX_GPUS: usize = 4096;

#[derive(Debug, Default)]
pub struct State {
    now: BootNs,
    time: Option<Fact>,
    gpus: BTreeMap<u32, GpuState>,
    containers: BTreeMap<ContainerKey, ContainerState>,
    hosts: BTreeMap<HostProcess, HostState>,
    experiment: Option<ExperimentState>,
}

/// The last experiment: its schedule, and its freezes by burst.
#[derive(Debug, Default)]
struct ExperimentState {
    schedule: ExperimentSchedule,
    frozen: BTreeMap<u32, ExperimentFact>,
}

#[derive(Debug, Default)]
struct GpuState {
    opened: Option<Fact>,
    held: Option<Fact>,
    readings: Option<Fact>,
    clock: Option<Fact>,
    /// Facts cover its time up to here.
    covered: BootNs,
    /// Its latest busy samples.
    samples: VecDeque<(BootNs, Sampled)>,
}

/// Which process information a busy sample has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sampled {
    Named,
    /// Queried; the driver reported no process.
    PidLess,
    Unqueried,
}

#[derive(Debug, Default)]
struct ContainerState {
    fact: Option<ContainerFact>,
    labels: Option<LabelFact>,
    pressure: Option<PressureFact>,
    gone: Option<BootNs>,
    last_named: Option<BootNs>,
    /// Its facts are in the latest State frame or in a Facts frame after it.
    written: bool,
}

#[derive(Debug, Default)]
struct HostState {
    comm: Option<String>,
    last_named: BootNs,
    written: bool,
}

fn time_of(fact: &Fact) -> Option<BootNs> {
    match fact {
        Fact::Time { at, .. } | Fact::Gpu { at, .. } | Fact::ContainerGone { at, .. } => Some(*at),
        Fact::Pressure(pressure) => Some(pressure.at),
        Fact::Waited(wait) => Some(wait.to),
        Fact::WaitProbe(probe) => Some(probe.at),
        Fact::Engine(engine) => Some(engine.at),
        _ => None,
    }
}

impl GpuState {
    fn has_neighbours(&self, until: BootNs) -> bool {
        self.is_divided(until, Sampled::PidLess, NAMED_NEIGHBOURS, |later| later == Sampled::Named)
            && self.is_divided(until, Sampled::Unqueried, QUERIED_NEIGHBOURS, |later| later != Sampled::Unqueried)
    }

    /// Whether the last sample of this kind up to `until` is followed by all neighbours over which its time is divided.
    fn is_divided(&self, until: BootNs, kind: Sampled, neighbours: usize, is_neighbour: impl Fn(Sampled) -> bool) -> bool {
        let Some(last) = self.samples.iter().rposition(|(at, sampled)| *sampled == kind && *at <= until) else { return true };
        let later = self.samples.range(last..).filter(|(_, sampled)| is_neighbour(*sampled)).count();
        later >= neighbours || self.covered >= self.samples[last].0.plus(WAIT_NS)
    }

    fn remember(&mut self, at: BootNs, sampled: Sampled) {
        if self.samples.len() >= MAX_SAMPLES {
            self.samples.pop_front();
        }
        self.samples.push_back((at, sampled));
    }
}

impl ExperimentState {
    fn facts(&self) -> impl Iterator<Item = Fact> {
        let schedule = ExperimentFact::Schedule(self.schedule.clone());
        [schedule].into_iter().chain(self.frozen.values().cloned()).map(Fact::Experiment)
    }
}

impl ContainerState {
    /// The facts known about the container.
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
    /// Applies a fact.
    pub fn apply(&mut self, fact: &Fact) {
        self.follow(fact, &mut |_| {});
    }

    /// Applies a fact; passes it to `emit` if it belongs in a file, after the facts that a reader needs to interpret it.
    pub fn follow(&mut self, fact: &Fact, emit: &mut impl FnMut(Fact)) {
        self.now = self.now.max(time_of(fact).unwrap_or_default());
        let in_file = match fact {
            Fact::Time { .. } => {
                self.time = Some(fact.clone());
                true
            }
            Fact::Gpu { gpu, at, fact: of_gpu } => {
                self.gpu(*gpu, *at, of_gpu, fact);
                for user in of_gpu.users() {
                    self.record_named(user, emit);
                }
                true
            }
            Fact::Container(container) => {
                let known = self.container(container.key);
                known.fact = Some(container.clone());
                // Named before its container fact arrived: this happens if facts were dropped.
                known.written = known.last_named.is_some();
                known.written
            }
            Fact::Labels(labels) => {
                let known = self.container(labels.key);
                known.labels = Some(labels.clone());
                known.written
            }
            Fact::Pressure(pressure) => {
                let known = self.container(pressure.key);
                known.pressure = Some(*pressure);
                known.written
            }
            Fact::Engine(engine) => self.containers.get(&engine.key).is_some_and(|known| known.written),
            Fact::ContainerGone { key, at } => {
                let known = self.container(*key);
                known.gone = Some(*at);
                known.written
            }
            Fact::ContainerForgotten { key } => self.containers.remove(key).is_some_and(|known| known.written),
            Fact::Comm { process, comm } => {
                let known = self.host(*process);
                known.comm = Some(comm.clone());
                known.written
            }
            Fact::Waited(WaitFact { user, .. }) | Fact::WaitProbe(WaitProbeFact { user, .. }) => {
                self.record_named(*user, emit);
                true
            }
            Fact::Experiment(experiment) => {
                self.experiment(experiment);
                true
            }
        };
        if in_file {
            emit(fact.clone());
        }
    }

    fn gpu(&mut self, gpu: u32, at: BootNs, of_gpu: &GpuFact, fact: &Fact) {
        if self.gpus.len() >= MAX_GPUS && !self.gpus.contains_key(&gpu) {
            return;
        }
        let known = self.gpus.entry(gpu).or_default();
        if of_gpu.span_ns().is_some() {
            known.covered = known.covered.max(at);
        }
        match of_gpu {
            GpuFact::Opened(_) => {
                // Of a device that is opened again, the time before is reported with its next samples.
                let covered = if known.opened.is_some() { known.covered } else { at };
                *known = GpuState { opened: Some(fact.clone()), covered, ..GpuState::default() };
            }
            GpuFact::Gone => {
                self.gpus.remove(&gpu);
            }
            GpuFact::Held(_) => known.held = Some(fact.clone()),
            GpuFact::Readings(_) => known.readings = Some(fact.clone()),
            GpuFact::Clock(_) => known.clock = Some(fact.clone()),
            GpuFact::Utilization(sample) if sample.busy_percent > 0 => {
                known.remember(at, if sample.processes.is_empty() { Sampled::PidLess } else { Sampled::Named });
            }
            GpuFact::Unqueried(Engine::Compute, _) => known.remember(at, Sampled::Unqueried),
            _ => {}
        }
    }

    fn experiment(&mut self, fact: &ExperimentFact) {
        match fact {
            ExperimentFact::Schedule(schedule) if self.experiment.as_ref().is_some_and(|known| known.schedule == *schedule) => {}
            ExperimentFact::Schedule(schedule) => {
                self.experiment = Some(ExperimentState { schedule: schedule.clone(), frozen: BTreeMap::new() });
            }
            ExperimentFact::Frozen { experiment, burst, .. } => {
                // The schedule bounds the number of bursts.
                let known = self.experiment.as_mut().filter(|known| known.schedule.start == *experiment);
                if let Some(known) = known.filter(|known| *burst < known.schedule.len()) {
                    known.frozen.insert(*burst, fact.clone());
                }
            }
        }
    }

    fn container(&mut self, key: ContainerKey) -> &mut ContainerState {
        if self.containers.len() >= MAX_CONTAINERS && !self.containers.contains_key(&key) {
            // Keys ascend, so the first is the oldest.
            self.containers.pop_first();
        }
        self.containers.entry(key).or_default()
    }

    fn host(&mut self, process: HostProcess) -> &mut HostState {
        if self.hosts.len() >= MAX_HOSTS && !self.hosts.contains_key(&process) {
            let oldest = self.hosts.iter().min_by_key(|(_, known)| known.last_named).map(|(process, _)| *process);
            oldest.and_then(|process| self.hosts.remove(&process));
        }
        self.hosts.entry(process).or_default()
    }

    fn record_named(&mut self, user: User, emit: &mut impl FnMut(Fact)) {
        let now = self.now;
        match user {
            User::Container(key) => {
                let known = self.container(key);
                known.last_named = Some(now);
                if !known.written && known.fact.is_some() {
                    known.written = true;
                    known.facts(key).for_each(emit);
                }
            }
            User::Host(process) => {
                let known = self.host(process);
                known.last_named = now;
                if !std::mem::replace(&mut known.written, true)
                    && let Some(comm) = known.comm.clone()
                {
                    emit(Fact::Comm { process, comm });
                }
            }
            User::Unattributed(_) => {}
        }
    }

    /// The content of a State frame at this time. The facts of users that are not in it are written again when the user is next named.
    pub fn facts(&mut self) -> Vec<Fact> {
        let held_facts = self.gpus.values().filter_map(|gpu| match &gpu.held {
            Some(Fact::Gpu { fact, .. }) => Some(fact),
            _ => None,
        });
        let held: BTreeSet<User> = held_facts.flat_map(GpuFact::users).collect();
        let recent = self.now.minus(RECENTLY_NAMED_NS);
        let mut all: Vec<Fact> = self.time.clone().into_iter().collect();
        if self.experiment.as_ref().is_some_and(|known| known.schedule.end() < recent) {
            self.experiment = None;
        }
        all.extend(self.experiment.iter().flat_map(ExperimentState::facts));
        all.extend(self.gpus.values().filter_map(|gpu| gpu.opened.clone()));
        for (key, known) in &mut self.containers {
            let wanted = held.contains(&User::Container(*key)) || known.last_named.is_some_and(|last_named| last_named >= recent);
            known.written = wanted && known.fact.is_some();
            if known.written {
                all.extend(known.facts(*key));
            }
        }
        self.hosts.retain(|process, known| held.contains(&User::Host(*process)) || known.last_named >= recent);
        for (process, known) in &mut self.hosts {
            known.written = true;
            all.extend(known.comm.clone().map(|comm| Fact::Comm { process: *process, comm }));
        }
        let latest = |gpu: &GpuState| [gpu.clock.clone(), gpu.readings.clone(), gpu.held.clone()];
        all.extend(self.gpus.values().filter(|gpu| gpu.opened.is_some()).flat_map(latest).flatten());
        all
    }

    /// Containers in the file, with their labels where known.
    pub fn labelled(&self) -> impl Iterator<Item = (ContainerKey, Option<&LabelFact>)> {
        self.containers.iter().filter(|(_, known)| known.written).map(|(key, known)| (*key, known.labels.as_ref()))
    }

    /// Processes outside containers without a known name.
    pub fn unnamed_processes(&self) -> impl Iterator<Item = HostProcess> {
        self.hosts.iter().filter(|(_, known)| known.comm.is_none()).map(|(process, _)| *process)
    }

    /// The latest time of all facts.
    pub fn now(&self) -> BootNs {
        self.now
    }

    /// Whether facts cover the time of every GPU up to `until`, including the later samples that attribution of that time needs.
    pub fn is_complete(&self, until: BootNs) -> bool {
        // A GPU that is divided into MIG devices has no time of its own.
        let has_time = |opened: &Fact| matches!(opened, Fact::Gpu { fact: GpuFact::Opened(info), .. } if info.is_leaf());
        let mut all = self.gpus.values().filter(|gpu| gpu.opened.as_ref().is_some_and(has_time));
        all.all(|gpu| gpu.covered >= until && gpu.has_neighbours(until))
    }
}
