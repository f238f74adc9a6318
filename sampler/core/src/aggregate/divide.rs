//! Whose busy time is that no sample names a process for: the weights by which it is divided over samples that do.
//!
//! ```text
//!  pid-less sample   queried, the driver named no process: over the 4 nearest named samples on each side, by `1 - busy` of each
//!  unqueried sample  the driver was not asked: over the 8 nearest queried busy samples on each side, those most that were as busy
//!    either          only over processes that existed in the sample's own period, by the part of it in which they did;
//!                    without any, over containers that existed in it and were named close to it
//! ```
//! **Pid-less.** The pid is that of the process on the engine at one instant, the utilization is of the whole period. A user that keeps
//! the engine busy for a part `b` of its periods is named in `b` of them, so each of its named samples stands for `1 - b` of a period
//! in which it is not. Dividing by the number of named samples alone would take from users with low duty cycles.
//!
//! **Unqueried.** Queries are made at times that do not depend on the load, so queried samples are a random subset, and what they are
//! credited with (named ones to their process, pid-less ones as above) is an unbiased estimate for the others. How busy an unqueried
//! sample was says more than its place: a user that saturates the engine and one that uses a tenth of it are told apart by it. So
//! neighbours are weighted by how close their utilization is; by nearness in time alone, a user of 10 % that alternates with one of
//! 100 % would get a fifth too much (test `estimator`).

use std::collections::VecDeque;

use super::left::{Left, Lifetimes, Named};
use crate::units::BootNs;

/// Named samples on each side over which a pid-less one is divided.
pub const NAMED_NEIGHBOURS: usize = 4;
/// Queried busy samples on each side over which an unqueried one is divided.
pub const QUERIED_NEIGHBOURS: usize = 8;
/// A sample waits at most this long for neighbours after it.
pub const WAIT_NS: u64 = 10_000_000_000;
/// Neighbours before it count for this long.
const LOOK_BACK_NS: u64 = 30_000_000_000;
/// A container counts without a process of its own for so long before or after a sample that names it: one of its processes may have
/// lived between two queried samples. Also for as long as the next queried sample is away.
const SIBLING_NS: u64 = 1_000_000_000;
/// Utilization is rounded to a percent: a sample of 100 % may be half of one less.
const ROUNDING_RATIO: f64 = 0.005;
/// Differences in utilization below this are none: rounding, and the chance of what falls into one period.
const ALIKE_RATIO: f64 = 0.02;

/// A sample that names a process; `weight_ns` is all that was credited by it.
#[derive(Clone, Copy, Debug)]
pub struct NamedSample {
    pub at: BootNs,
    pub named: Named,
    stands_for: f64,
    pub weight_ns: f64,
}

impl NamedSample {
    pub fn new(at: BootNs, named: Named, busy_ratio: f64, weight_ns: f64) -> Self {
        Self { at, named, stands_for: 1.0 - busy_ratio + ROUNDING_RATIO, weight_ns }
    }
}

/// What is to be divided: the busy time of the span of `span_ns` that ends at `at`.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub at: BootNs,
    pub span_ns: f64,
    pub busy_ns: f64,
    pub queried: bool,
}

impl Sample {
    fn busy_ratio(&self) -> f64 {
        self.busy_ns / self.span_ns.max(1.0)
    }
}

/// How much a queried neighbour says about an unqueried sample.
pub fn likeness(one_ratio: f64, other_ratio: f64) -> f64 {
    (ALIKE_RATIO + (one_ratio - other_ratio).abs()).powi(-2)
}

/// Busy samples of one engine whose process was queried, in their order.
#[derive(Debug, Default)]
pub struct Neighbours {
    named: VecDeque<NamedSample>,
    /// (time, busy ratio) of named and pid-less ones.
    queried: VecDeque<(BootNs, f64)>,
}

/// What existed when.
#[derive(Clone, Copy)]
pub struct Presence<'a> {
    pub left: &'a Left,
    pub lifetimes: &'a Lifetimes,
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

    pub fn get_mut(&mut self, n: usize) -> Option<&mut NamedSample> {
        self.named.get_mut(n)
    }

    /// Whether waiting longer would bring nothing more, at a time up to which all samples are known.
    pub fn is_decided(&self, sample: &Sample, now: BootNs) -> bool {
        let enough = if sample.queried {
            self.named.len() - self.named.partition_point(|n| n.at <= sample.at) >= NAMED_NEIGHBOURS
        } else {
            self.queried.len() - self.queried.partition_point(|(at, _)| *at <= sample.at) >= QUERIED_NEIGHBOURS
        };
        enough || now.saturating_since(sample.at) >= WAIT_NS
    }

    /// Indices of named samples, each with its part of the sample's busy time; the parts sum to 1. Empty where no user can have had it.
    pub fn divide(&self, sample: &Sample, presence: Presence<'_>) -> Vec<(usize, f64)> {
        let part = |n: usize| self.part(n, sample, presence);
        let mut weights = if sample.queried { self.of_pidless(sample.at, &part) } else { self.of_unqueried(sample, &part) };
        if weights.is_empty() {
            weights = self.of_siblings(sample, presence);
        }
        let whole: f64 = weights.iter().map(|(_, weight)| weight).sum();
        weights.retain(|(_, weight)| *weight > 0.0);
        for (_, weight) in &mut weights {
            *weight /= whole;
        }
        weights
    }

    /// The part of the sample's period in which the named sample's process existed.
    fn part(&self, n: usize, sample: &Sample, presence: Presence<'_>) -> f64 {
        self.named.get(n).map_or(0.0, |n| presence.left.part(&n.named, sample.at, sample.span_ns))
    }

    /// The nearest named samples on each side that `part` admits; each weighs what it stands for.
    fn of_pidless(&self, at: BootNs, part: &impl Fn(usize) -> f64) -> Vec<(usize, f64)> {
        let after = self.named.partition_point(|n| n.at <= at);
        let near = |n: &usize| self.named.get(*n).is_some_and(|n| is_near(n.at, at));
        let weighed = |n: usize| Some((n, part(n) * self.named.get(n)?.stands_for)).filter(|(_, weight)| *weight > 0.0);
        let before = (0..after).rev().take_while(near).filter_map(weighed).take(NAMED_NEIGHBOURS);
        let later = (after..self.named.len()).take_while(near).filter_map(weighed).take(NAMED_NEIGHBOURS);
        before.chain(later).collect()
    }

    fn of_unqueried(&self, sample: &Sample, part: &impl Fn(usize) -> f64) -> Vec<(usize, f64)> {
        let after = self.queried.partition_point(|(at, _)| *at <= sample.at);
        let near = |q: &&(BootNs, f64)| is_near(q.0, sample.at);
        let before = self.queried.range(..after).rev().take_while(near).take(QUERIED_NEIGHBOURS);
        let later = self.queried.range(after..).take_while(near).take(QUERIED_NEIGHBOURS);
        let mut weights: Vec<(usize, f64)> = Vec::new();
        for (at, busy_ratio) in before.chain(later) {
            let like = likeness(*busy_ratio, sample.busy_ratio());
            if let Ok(n) = self.named.binary_search_by_key(at, |n| n.at) {
                weights.push((n, like * part(n)));
            } else {
                // A pid-less one stands for what it is divided over.
                let over = self.of_pidless(*at, part);
                let whole: f64 = over.iter().map(|(_, weight)| weight).sum();
                weights.extend(over.into_iter().map(|(n, weight)| (n, like * weight / whole)));
            }
        }
        weights.retain(|(_, weight)| *weight > 0.0);
        weights
    }

    /// Containers that existed in the sample's period, of the nearest named samples on each side.
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

/// A neighbour of a sample: not too long before, and not later than is waited for.
fn is_near(neighbour: BootNs, at: BootNs) -> bool {
    if neighbour <= at { at.saturating_since(neighbour) <= LOOK_BACK_NS } else { neighbour.saturating_since(at) <= WAIT_NS }
}
