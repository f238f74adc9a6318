//! Division of the busy time of samples that name no process: the weights by which it is divided over samples that name one.
//!
//! ```text
//!  pid-less sample   queried, the driver named no process: over the 4 nearest named samples on each side, by `1 - busy` of each
//!  unqueried sample  not queried: over the 8 nearest queried busy samples on each side, weighted by similarity of utilization
//!  both              only over processes that existed in the sample's own period, by the part of it in which they existed, unknown
//!                    ones between two samples that name them, and for a second before and after;
//!                    if there are none, over containers that existed in the period and were named close to it
//!  pid-less sample   where only processes that have ended are not named (`naming`): only over those that ended soon after it, named
//!                    ones and clients (`clients`)
//!  pid-less sample   if no named sample qualifies and the device has no sole holder: over the clients that ended soon after it
//!  unqueried sample  also over containers that existed in the period and are named on both sides, or close to it by successive
//!                    processes, regardless of which processes these were
//! ```
//! **Pid-less samples.** The pid is that of the process on the engine at one instant, but the utilization is that of the whole period. A
//! user that keeps the engine busy for a part `b` of its periods is named in `b` of them, so each of its named samples stands for `1 - b`
//! of a period in which it is not named. A division by the number of named samples alone would disadvantage users with low duty cycles.
//!
//! **Unqueried samples.** Queries are made at times that do not depend on the load, so queried samples are a random subset, and their
//! credits (named samples to their process, pid-less ones as above) are an unbiased estimate for the others. The utilization of an
//! unqueried sample is more significant than its position: it distinguishes a user that saturates the engine from one that uses a tenth of
//! it. So neighbours are weighted by the similarity of their utilization. By distance in time alone, a user of 10 % that alternates with
//! one of 100 % would receive a fifth too much (test `estimator`). A container that runs successive short processes is named by processes
//! that do not exist in the sample's period; if those did not count, one long process next to it would receive all of the time.

use std::collections::VecDeque;

use super::clients::Clients;
use super::exits::{Exits, Lifetimes, NamedUser};
use crate::fact::User;
use crate::units::BootNs;

/// Number of named samples on each side over which a pid-less sample is divided.
pub const NAMED_NEIGHBOURS: usize = 4;
/// Number of queried busy samples on each side over which an unqueried sample is divided.
pub const QUERIED_NEIGHBOURS: usize = 8;
/// Maximum time that a sample waits for later neighbours.
pub const WAIT_NS: u64 = 10_000_000_000;
/// Maximum age of earlier neighbours.
const LOOK_BACK_NS: u64 = 30_000_000_000;
/// A container without an existing process counts for this long before or after a sample that names it, or up to the next queried sample if
/// that is further away: one of its processes may have existed between two queried samples.
const SIBLING_NS: u64 = 1_000_000_000;
/// A succession of processes is assumed to continue for this many mean gaps between the named ones. Twice the mean gap is exceeded by
/// chance in one of seven cases.
const FOLLOWS_GAPS: u64 = 2;
/// A sample is read within so many periods of its time, if its process is queried: polls query their newest samples.
const READ_PERIODS: u64 = 4;
/// Utilization is a whole percent: what a sample stands for is never 0.
const ROUNDING_RATIO: f64 = 0.005;
/// Differences in utilization below this are insignificant: they result from rounding, and from the random content of one period.
const ALIKE_RATIO: f64 = 0.02;

/// A sample that names a process; `weight_ns` is all time that was credited because of it.
#[derive(Clone, Copy, Debug)]
pub struct NamedSample {
    pub at: BootNs,
    pub named: NamedUser,
    stands_for: f64,
    pub weight_ns: f64,
}

impl NamedSample {
    pub fn new(at: BootNs, named: NamedUser, busy_ratio: f64, weight_ns: f64) -> Self {
        Self { at, named, stands_for: stands_for(busy_ratio), weight_ns }
    }
}

/// A sample: the busy time of the span of `span_ns` that ends at `at`.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub at: BootNs,
    pub span_ns: f64,
    pub busy_ns: f64,
    pub queried: bool,
}

impl Sample {
    pub fn busy_ratio(&self) -> f64 {
        self.busy_ns / self.span_ns.max(1.0)
    }

    /// The begin of the sample's period, and the time by which it was read.
    pub fn until_read(&self) -> (BootNs, BootNs) {
        let span_ns = self.span_ns as u64;
        (self.at.minus(span_ns), self.at.plus(READ_PERIODS * span_ns))
    }
}

/// The part of a period without a named process that a named sample stands for.
pub fn stands_for(busy_ratio: f64) -> f64 {
    1.0 - busy_ratio + ROUNDING_RATIO
}

/// The busy time of a sample, times the idle part of its period.
pub fn partly_ns(busy_ns: f64, busy_ratio: f64) -> f64 {
    busy_ns * (1.0 - busy_ratio).max(0.0)
}

/// The weight of a queried neighbour for an unqueried sample, by their utilization.
pub fn likeness(one_ratio: f64, other_ratio: f64) -> f64 {
    (ALIKE_RATIO + (one_ratio - other_ratio).abs()).powi(-2)
}

/// Busy samples of one engine with queried processes, in order.
#[derive(Debug, Default)]
pub struct Neighbours {
    named: VecDeque<NamedSample>,
    /// (time, busy ratio) of named and pid-less samples.
    queried: VecDeque<(BootNs, f64)>,
}

/// When processes and containers existed.
#[derive(Clone, Copy)]
pub struct Presence<'a> {
    pub exits: &'a Exits,
    pub lifetimes: &'a Lifetimes,
    /// Of the compute engine alone: a client of CUDA need not use another one.
    pub clients: Option<&'a Clients>,
}

impl<'a> Presence<'a> {
    /// The clients that ended around the sample, with their parts of its period.
    fn ended_clients(self, sample: &Sample) -> impl Iterator<Item = (NamedUser, f64)> + use<'a> {
        let sample = *sample;
        self.clients.into_iter().flat_map(move |clients| clients.ended(sample, self.exits))
    }
}

/// The basis of a credit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Basis {
    /// The named sample with this index.
    Named(usize),
    Client(NamedUser),
}

impl Neighbours {
    pub fn add_named(&mut self, sample: NamedSample) {
        self.named.push_back(sample);
    }

    pub fn add_queried(&mut self, sample: &Sample) {
        self.queried.push_back((sample.at, sample.busy_ratio()));
    }

    pub fn forget_before(&mut self, now: BootNs) {
        let keep = LOOK_BACK_NS + WAIT_NS;
        while self.named.pop_front_if(|n| now.saturating_since(n.at) > keep).is_some() {}
        while self.queried.pop_front_if(|(at, _)| now.saturating_since(*at) > keep).is_some() {}
    }

    pub fn clear(&mut self) {
        self.named.clear();
        self.queried.clear();
    }

    /// Whether a sample names a process, as far as they are kept.
    pub fn has_named(&self) -> bool {
        !self.named.is_empty()
    }

    pub fn get_mut(&mut self, n: usize) -> Option<&mut NamedSample> {
        self.named.get_mut(n)
    }

    /// Whether no further neighbour is to be waited for at `now`, a time up to which all samples are known.
    pub fn is_decided(&self, sample: &Sample, now: BootNs) -> bool {
        let enough = if sample.queried {
            self.named.len() - self.named.partition_point(|n| n.at <= sample.at) >= NAMED_NEIGHBOURS
        } else {
            self.queried.len() - self.queried.partition_point(|(at, _)| *at <= sample.at) >= QUERIED_NEIGHBOURS
        };
        enough || now.saturating_since(sample.at) >= WAIT_NS
    }

    /// Division over the processes that ended in the sample's period or between it and its read, named ones and, if `has_clients`, clients;
    /// empty if there are none. To be used where the driver names every process that lives when a sample is read.
    pub fn of_ended(&self, sample: &Sample, presence: Presence<'_>, has_clients: bool) -> Vec<(Basis, f64)> {
        let (_, read) = sample.until_read();
        let mut processes: Vec<NamedUser> = Vec::new();
        let mut weights = Vec::new();
        for (n, neighbour) in self.named.iter().enumerate().rev() {
            let named = neighbour.named;
            let ended = presence.exits.end_of(&named).is_some_and(|end| end <= read);
            if !ended || !is_near(neighbour.at, sample.at) || processes.contains(&named) {
                continue;
            }
            processes.push(named);
            weights.push((Basis::Named(n), presence.exits.part(&named, sample.at, sample.span_ns)));
        }
        let unnamed = presence.ended_clients(sample).filter(|(client, _)| has_clients && !processes.contains(client));
        weights.extend(unnamed.map(|(client, part)| (Basis::Client(client), part)));
        normalized(weights)
    }

    /// Named samples, each with its part of the sample's busy time; the parts sum to 1. Empty where no user qualifies.
    pub fn divide(&self, sample: &Sample, presence: Presence<'_>) -> Vec<(Basis, f64)> {
        let mut weights = if sample.queried {
            self.of_pidless(sample.at, &|n| self.part(n, sample, presence))
        } else {
            self.of_unqueried(sample, presence)
        };
        if weights.is_empty() {
            weights = self.of_siblings(sample, presence);
        }
        normalized(weights.into_iter().map(|(n, weight)| (Basis::Named(n), weight)).collect())
    }

    /// Division over the clients that ended in the sample's period or between it and its read, for where no named sample qualifies.
    pub fn of_clients(sample: &Sample, presence: Presence<'_>) -> Vec<(Basis, f64)> {
        normalized(presence.ended_clients(sample).map(|(client, part)| (Basis::Client(client), part)).collect())
    }

    fn named_at(&self, at: BootNs) -> Option<usize> {
        self.named.binary_search_by_key(&at, |n| n.at).ok()
    }

    /// The part of the sample's period in which the named sample's process existed.
    fn part(&self, n: usize, sample: &Sample, presence: Presence<'_>) -> f64 {
        let counts = |n: &&NamedSample| n.named.user.is_known() || self.is_present(n, sample.at);
        self.named.get(n).filter(counts).map_or(0.0, |n| presence.exits.part(&n.named, sample.at, sample.span_ns))
    }

    /// Whether an unknown process exists at that time. When it ends is not known, and after all others it would seem to be the only one
    /// that has not ended: it counts close to its own samples, and between two of them.
    fn is_present(&self, named: &NamedSample, at: BootNs) -> bool {
        let is_same = |n: &NamedSample| n.named.pid == named.named.pid && is_near(n.at, at);
        let is_across = |n: &NamedSample| (n.at <= at) != (named.at <= at);
        named.at.0.abs_diff(at.0) <= SIBLING_NS || self.named.iter().any(|n| is_across(n) && is_same(n))
    }

    /// The nearest named samples on each side with a positive `part`, weighted by what they stand for.
    fn of_pidless(&self, at: BootNs, part: &impl Fn(usize) -> f64) -> Vec<(usize, f64)> {
        let after = self.named.partition_point(|n| n.at <= at);
        let near = |n: &usize| self.named.get(*n).is_some_and(|n| is_near(n.at, at));
        let weighed = |n: usize| Some((n, part(n) * self.named.get(n)?.stands_for)).filter(|(_, weight)| *weight > 0.0);
        let before = (0..after).rev().take_while(near).filter_map(weighed).take(NAMED_NEIGHBOURS);
        let later = (after..self.named.len()).take_while(near).filter_map(weighed).take(NAMED_NEIGHBOURS);
        before.chain(later).collect()
    }

    fn of_unqueried(&self, sample: &Sample, presence: Presence<'_>) -> Vec<(usize, f64)> {
        let after = self.queried.partition_point(|(at, _)| *at <= sample.at);
        let near = |q: &&(BootNs, f64)| is_near(q.0, sample.at);
        let before = self.queried.range(..after).rev().take_while(near).take(QUERIED_NEIGHBOURS);
        let later = self.queried.range(after..).take_while(near).take(QUERIED_NEIGHBOURS);
        let named = |(at, _): &(BootNs, f64)| self.named.get(self.named_at(*at)?);
        let sides = [before.clone().filter_map(named).collect(), later.clone().filter_map(named).collect()];
        let part = |n: usize| {
            let Some(user) = self.named.get(n).map(|n| n.named.user) else { return 0.0 };
            let existed = is_between(&sides, user, sample.at) && presence.lifetimes.existed(user, sample.at, sample.span_ns);
            if existed { 1.0 } else { self.part(n, sample, presence) }
        };
        let mut weights: Vec<(usize, f64)> = Vec::new();
        for (at, busy_ratio) in before.chain(later) {
            let like = likeness(*busy_ratio, sample.busy_ratio());
            if let Some(n) = self.named_at(*at) {
                weights.push((n, like * part(n)));
            } else {
                // A pid-less neighbour stands for the samples that it is divided over.
                let over = self.of_pidless(*at, &part);
                let whole: f64 = over.iter().map(|(_, weight)| weight).sum();
                weights.extend(over.into_iter().map(|(n, weight)| (n, like * weight / whole)));
            }
        }
        weights.retain(|(_, weight)| *weight > 0.0);
        weights
    }

    /// The nearest named sample on each side, if its container existed in the sample's period.
    fn of_siblings(&self, sample: &Sample, presence: Presence<'_>) -> Vec<(usize, f64)> {
        let after = self.named.partition_point(|n| n.at <= sample.at);
        let at = self.queried.partition_point(|(at, _)| *at <= sample.at);
        let next = |q: Option<&(BootNs, f64)>| q.map_or(0, |q| q.0.0.abs_diff(sample.at.0)).max(SIBLING_NS);
        let (back, forth) = (next(at.checked_sub(1).and_then(|n| self.queried.get(n))), next(self.queried.get(at)));
        let sibling = |n: usize, within: u64| {
            let n = self.named.get(n)?;
            let counts = n.at.0.abs_diff(sample.at.0) <= within && is_near(n.at, sample.at);
            (counts && presence.lifetimes.existed(n.named.user, sample.at, sample.span_ns)).then_some(1.0)
        };
        let before = after.checked_sub(1).and_then(|n| Some((n, sibling(n, back)?)));
        let later = sibling(after, forth).map(|weight| (after, weight));
        before.into_iter().chain(later).collect()
    }
}

fn normalized(mut weights: Vec<(Basis, f64)>) -> Vec<(Basis, f64)> {
    weights.retain(|(_, weight)| *weight > 0.0);
    let whole: f64 = weights.iter().map(|(_, weight)| weight).sum();
    for (_, weight) in &mut weights {
        *weight /= whole;
    }
    weights
}

/// Whether a user is named on both sides, or on one side by successive processes and recently in relation to their mean gap. `sides`: named
/// neighbours before and after, nearest first.
fn is_between(sides: &[Vec<&NamedSample>; 2], user: User, at: BootNs) -> bool {
    let [before, after] = sides.each_ref().map(|side| side.iter().filter(|n| n.named.user == user).collect::<Vec<_>>());
    let one_side = match (before.first(), after.first()) {
        (Some(_), Some(_)) => return true,
        (Some(_), None) => before,
        (None, _) => after,
    };
    let (Some(nearest), Some(farthest)) = (one_side.first(), one_side.last()) else { return false };
    let follow = one_side.iter().any(|n| n.named.pid != nearest.named.pid);
    let gap_ns = nearest.at.0.abs_diff(farthest.at.0) / (one_side.len() as u64 - 1).max(1);
    follow && nearest.at.0.abs_diff(at.0) <= FOLLOWS_GAPS * gap_ns
}

/// Whether a neighbour is within [`LOOK_BACK_NS`] before or [`WAIT_NS`] after a sample.
fn is_near(neighbour: BootNs, at: BootNs) -> bool {
    if neighbour <= at { at.saturating_since(neighbour) <= LOOK_BACK_NS } else { neighbour.saturating_since(at) <= WAIT_NS }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ContainerKey;

    const MS: u64 = 1_000_000;
    const PERIOD: u64 = 167 * MS;

    #[derive(Default)]
    struct DivideWorld {
        neighbours: Neighbours,
        exits: Exits,
        lifetimes: Lifetimes,
        clients: Clients,
    }

    impl DivideWorld {
        fn presence(&self) -> Presence<'_> {
            Presence { exits: &self.exits, lifetimes: &self.lifetimes, clients: Some(&self.clients) }
        }

        /// Pids, with their parts in thousandths.
        fn pids(&self, parts: Vec<(Basis, f64)>) -> Vec<(u32, u64)> {
            let pid = |basis| match basis {
                Basis::Named(n) => self.neighbours.named[n].named.pid,
                Basis::Client(client) => client.pid,
            };
            parts.into_iter().map(|(basis, part)| (pid(basis), (part * 1000.0).round() as u64)).collect()
        }

        /// Adds a queried sample that names a process of a container; the process exists in `existence`, in milliseconds.
        fn named(&mut self, at_ms: u64, container: u64, busy_ratio: f64, existence: (u64, Option<u64>)) {
            let (pid, since) = (at_ms as u32, BootNs(existence.0 * MS));
            let named = NamedUser { user: User::Container(ContainerKey(container)), pid, since };
            let sample = sample(at_ms, busy_ratio, true);
            self.neighbours.add_queried(&sample);
            self.neighbours.add_named(NamedSample::new(sample.at, named, busy_ratio, sample.busy_ns));
            if let Some(until) = existence.1 {
                self.exits.record(pid, since, BootNs(until * MS));
            }
        }

        fn pidless(&mut self, at_ms: u64, busy_ratio: f64) {
            self.neighbours.add_queried(&sample(at_ms, busy_ratio, true));
        }

        /// Parts by container, in thousandths.
        fn divide(&self, sample: &Sample) -> Vec<(u64, u64)> {
            let mut parts = std::collections::BTreeMap::new();
            for (basis, part) in self.neighbours.divide(sample, self.presence()) {
                let Basis::Named(n) = basis else { panic!("no client here") };
                let User::Container(key) = self.neighbours.named[n].named.user else { panic!("only containers here") };
                *parts.entry(key.0).or_insert(0.0) += part;
            }
            parts.into_iter().map(|(key, part)| (key, (part * 1000.0_f64).round() as u64)).collect()
        }
    }

    fn sample(at_ms: u64, busy_ratio: f64, queried: bool) -> Sample {
        Sample { at: BootNs(at_ms * MS), span_ns: PERIOD as f64, busy_ns: PERIOD as f64 * busy_ratio, queried }
    }

    #[test]
    fn pidless_time_goes_to_processes_that_existed_in_its_period() {
        let mut world = DivideWorld::default();
        // The first process, of 100 ms, ended within the period of the sample at 1,167; the second began within it.
        world.named(1000, 1, 0.5, (940, Some(1040)));
        world.named(1334, 2, 0.5, (1150, None));
        assert_eq!(world.divide(&sample(1167, 0.5, true)), [(1, 702), (2, 298)]);
        // The first does not exist a period later.
        assert_eq!(world.divide(&sample(1300, 0.5, true)), [(2, 1000)]);
    }

    #[test]
    fn an_unknown_process_counts_close_to_its_samples_and_between_them() {
        let mut world = DivideWorld::default();
        let mut name = |at_ms: u64, pid| {
            let at = BootNs(at_ms * MS);
            let named = NamedUser { user: User::Unattributed(crate::device::Reason::PidUnknown), pid, since: BootNs(0) };
            world.neighbours.add_queried(&sample(at_ms, 0.5, true));
            world.neighbours.add_named(NamedSample::new(at, named, 0.5, 1.0));
        };
        name(1_000, 1);
        name(1_100, 2);
        name(9_000, 2);
        let pids = |at_ms, queried| -> Vec<u32> {
            let parts = world.neighbours.divide(&sample(at_ms, 0.5, queried), world.presence());
            let pid = |(basis, _): (Basis, f64)| match basis {
                Basis::Named(n) => world.neighbours.named[n].named.pid,
                Basis::Client(client) => client.pid,
            };
            parts.into_iter().map(pid).collect()
        };
        for queried in [true, false] {
            assert_eq!(pids(1_500, queried).iter().filter(|pid| **pid == 1).count(), 1, "{queried}");
            assert!(!pids(5_000, queried).contains(&1) && pids(5_000, queried).contains(&2), "{queried}");
            assert_eq!(pids(15_000, queried), [], "{queried}");
        }
    }

    #[test]
    fn time_that_names_none_is_that_of_processes_that_ended_before_the_read() {
        let mut world = DivideWorld::default();
        world.named(1000, 1, 0.5, (100, Some(1500)));
        world.named(1167, 2, 0.5, (100, None));
        world.named(1334, 3, 0.5, (100, Some(9000)));
        let of_ended =
            |world: &DivideWorld, at_ms| world.pids(world.neighbours.of_ended(&sample(at_ms, 0.5, true), world.presence(), true));
        assert_eq!(of_ended(&world, 1300), [(1000, 1000)], "the third lives long after the read");
        assert_eq!(of_ended(&world, 1900), [], "the first had ended before the sample's period");
        assert_eq!(of_ended(&world, 8900), [(1334, 1000)]);
        // A client that no sample names, and one that a sample names.
        let client = NamedUser { user: User::Container(ContainerKey(4)), pid: 7, since: BootNs(1200 * MS) };
        world.clients.add(client, BootNs(1400 * MS));
        world.exits.record(7, client.since, BootNs(1450 * MS));
        world.clients.add(world.neighbours.named[0].named, BootNs(1200 * MS));
        assert_eq!(of_ended(&world, 1500), [(1000, 770), (7, 230)], "167 and 50 ms of the period");
    }

    #[test]
    fn time_without_any_named_sample_is_that_of_clients_that_ended() {
        let mut world = DivideWorld::default();
        let client = |n: u64| NamedUser { user: User::Container(ContainerKey(n)), pid: n as u32, since: BootNs(0) };
        for n in 1..=3 {
            world.clients.add(client(n), BootNs(1000 * MS));
        }
        world.exits.record(2, BootNs(0), BootNs(1100 * MS));
        world.exits.record(3, BootNs(0), BootNs(1100 * MS));
        let parts = world.pids(Neighbours::of_clients(&sample(1100, 0.5, true), world.presence()));
        assert_eq!(parts, [(2, 500), (3, 500)], "the first lives");
    }

    #[test]
    fn a_container_is_credited_between_its_short_processes() {
        let mut world = DivideWorld::default();
        world.named(1000, 1, 0.5, (950, Some(1001)));
        world.named(2000, 1, 0.5, (1950, Some(2001)));
        // It is not known to have existed.
        assert_eq!(world.divide(&sample(1500, 0.5, true)), []);
        world.lifetimes.created(ContainerKey(1), BootNs(100 * MS));
        assert_eq!(world.divide(&sample(1500, 0.5, true)), [(1, 1000)]);
        assert_eq!(world.divide(&sample(1500, 0.5, false)), [(1, 1000)]);
        // Long after its last process, with queried samples in between, its existence is not sufficient.
        world.pidless(3800, 0.5);
        assert_eq!(world.divide(&sample(4000, 0.5, true)), []);
        world.lifetimes.gone(ContainerKey(1), BootNs(1200 * MS));
        assert_eq!(world.divide(&sample(1500, 0.5, true)), []);
    }

    #[test]
    fn unqueried_time_follows_queried_samples_of_similar_utilization() {
        let mut world = DivideWorld::default();
        for n in 0..8 {
            world.named(1000 + n * 334, 1, 1.0, (0, None));
            world.named(1167 + n * 334, 2, 0.1, (0, None));
        }
        let part = |busy: f64| world.divide(&sample(2050, busy, false));
        assert!(part(1.0)[0].1 > 990, "{:?}", part(1.0));
        assert!(part(0.1)[1].1 > 990, "{:?}", part(0.1));
        // Both are equally distant.
        assert!(part(0.55)[0].1.abs_diff(500) < 60, "{:?}", part(0.55));
    }

    #[test]
    fn a_container_of_short_processes_keeps_its_part_next_to_a_long_process() {
        let mut world = DivideWorld::default();
        world.lifetimes.created(ContainerKey(1), BootNs(0));
        for n in 0..8 {
            let at = 1000 + n * 1000;
            world.named(at, 1, 1.0, (at - 100, Some(at + 100)));
            world.named(at + 500, 2, 1.0, (0, None));
        }
        let parts = world.divide(&sample(4700, 1.0, false));
        assert!(parts[0].1.abs_diff(500) < 60, "{parts:?}");
        // Some time after its last process it receives nothing any more, although it exists.
        for n in 8..16 {
            world.named(1000 + n * 1000, 2, 1.0, (0, None));
        }
        assert_eq!(world.divide(&sample(8900, 1.0, false))[0].0, 1);
        assert_eq!(world.divide(&sample(10_100, 1.0, false)), [(2, 1000)]);
    }

    #[test]
    fn a_pidless_neighbour_stands_for_what_it_is_divided_over() {
        let mut world = DivideWorld::default();
        world.named(1000, 1, 0.9, (0, None));
        world.pidless(1167, 0.2);
        world.named(1334, 2, 0.2, (0, None));
        // Most of the pid-less sample goes to the second user, which is named in a fifth of its periods.
        let parts = world.divide(&sample(1200, 0.2, false));
        assert!(parts[1].1 > 930, "{parts:?}");
    }

    #[test]
    fn a_sample_without_near_named_samples_is_not_divided() {
        let mut world = DivideWorld::default();
        assert_eq!(world.divide(&sample(1000, 1.0, true)), []);
        world.named(1000, 1, 0.5, (0, None));
        assert_eq!(world.divide(&sample(40_000, 1.0, true)), []);
        assert!(!world.neighbours.is_decided(&sample(1000, 1.0, true), BootNs(10_999 * MS)));
        assert!(world.neighbours.is_decided(&sample(1000, 1.0, true), BootNs(11_000 * MS)));
    }
}
