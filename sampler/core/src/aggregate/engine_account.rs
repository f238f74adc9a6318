//! One engine's busy time: whose it is, and how sure.
//!
//! ```text
//!  sample, busy, with a pid             -> that pid's user, at once
//!  sample, busy, pid-less or unqueried  -> waits for neighbours after it, 10 s at most; then divided over its neighbours (`divide`);
//!                                          without any, of the only user that the driver lists as holding the device, or no_pid
//! ```
//! Busy time and what it is credited to are booked together, so their sums agree at every instant; what waits is in no state yet.

use std::collections::{HashMap, VecDeque};

use super::divide::{NamedSample, Neighbours, Presence, Sample};
use super::exits::{Left, NamedUser};
use super::settings::Range;
use super::standard_error::{Memory, StandardError};
use crate::device::Reason;
use crate::fact::User;
use crate::units::BootNs;

#[derive(Clone, Copy, Debug)]
pub struct PendingSample {
    pub sample: Sample,
    pub named: Option<NamedUser>,
    /// Whose it is if no process at all is named around it.
    pub otherwise: User,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Credit {
    pub ns: f64,
    pub samples: u64,
    /// Of `ns`, without `one_more`.
    sum_of_variances: f64,
    /// Of a single draw: a few draws say little about how few they could have been.
    one_more: f64,
}

impl Credit {
    /// Of `ns`.
    pub fn variance(&self) -> f64 {
        self.sum_of_variances + self.one_more
    }
}

/// What was booked by one call: to whom, for when.
#[derive(Clone, Copy, Debug)]
pub struct Booked {
    pub at: BootNs,
    pub user: User,
    pub ns: f64,
}

#[derive(Debug)]
pub struct EngineAccount {
    range: Range,
    pub busy_ns: f64,
    pub unattributed: [f64; Reason::ALL.len()],
    /// By user; those of nobody are in `unattributed` too, host processes under [`Reason::Host`].
    credits: HashMap<User, Credit>,
    neighbours: Neighbours,
    waiting: VecDeque<PendingSample>,
    memory: Memory,
    spreads: HashMap<User, StandardError>,
    /// Number and sum of squared weights of the draws that are not in the variances yet.
    drawn: HashMap<User, (u64, f64)>,
}

impl EngineAccount {
    pub fn new(range: Range) -> Self {
        Self {
            range,
            busy_ns: 0.0,
            unattributed: Default::default(),
            credits: HashMap::new(),
            neighbours: Neighbours::default(),
            waiting: VecDeque::new(),
            memory: Memory::default(),
            spreads: HashMap::new(),
            drawn: HashMap::new(),
        }
    }

    pub fn credits(&self) -> &HashMap<User, Credit> {
        &self.credits
    }

    pub fn spread(&self, user: User) -> Option<StandardError> {
        self.spreads.get(&user).copied()
    }

    /// Samples come in their order.
    pub fn tick(&mut self, tick: PendingSample, presence: Presence<'_>, booked: &mut Vec<Booked>) {
        if !tick.sample.queried {
            self.memory.unqueried(tick.sample.at);
        }
        if tick.sample.busy_ns > 0.0 && tick.sample.queried {
            self.neighbours.add_queried(&tick.sample);
        }
        match tick.named {
            Some(named) => self.credit_named(&tick.sample, named, booked),
            None if tick.sample.busy_ns > 0.0 => self.waiting.push_back(tick),
            None => {}
        }
        self.decide(tick.sample.at, presence, booked);
        self.neighbours.forget_before(tick.sample.at);
    }

    fn credit_named(&mut self, sample: &Sample, named: NamedUser, booked: &mut Vec<Booked>) {
        self.book(sample.at, named.user, sample.busy_ns, 1, booked);
        if self.range.has(sample.at) {
            let drawn = self.drawn.entry(named.user).or_default();
            *drawn = (drawn.0 + 1, drawn.1 + sample.busy_ns * sample.busy_ns);
        }
        self.neighbours.add_named(NamedSample::new(sample.at, named, sample.busy_ratio(), sample.busy_ns));
        self.memory.name(sample.at, named);
    }

    /// Divides what has waited long enough at `now`, a time up to which all samples are known.
    pub fn decide(&mut self, now: BootNs, presence: Presence<'_>, booked: &mut Vec<Booked>) {
        while let Some(tick) = self.waiting.pop_front_if(|tick| self.neighbours.is_decided(&tick.sample, now)) {
            self.divide(&tick, presence, booked);
        }
    }

    /// The beginning of the oldest span that waits to be divided.
    pub fn waits_since(&self) -> Option<BootNs> {
        self.waiting.front().map(|tick| tick.sample.at.minus(tick.sample.span_ns as u64))
    }

    fn divide(&mut self, tick: &PendingSample, presence: Presence<'_>, booked: &mut Vec<Booked>) {
        let Sample { at, span_ns, busy_ns, .. } = tick.sample;
        let parts = self.neighbours.divide(&tick.sample, presence);
        if parts.is_empty() {
            // Lists may be younger than the sample.
            let existed = presence.lifetimes.may_have_existed(tick.otherwise, at, span_ns);
            let user = if existed { tick.otherwise } else { User::Nobody(Reason::NoPid) };
            self.book(at, user, busy_ns, 0, booked);
        }
        for (n, part) in parts {
            let Some(neighbour) = self.neighbours.get_mut(n) else { continue };
            let ns = busy_ns * part;
            let user = neighbour.named.user;
            let before = neighbour.weight_ns;
            neighbour.weight_ns += ns;
            let squares = neighbour.weight_ns.powi(2) - before.powi(2);
            if self.range.has(at) {
                self.drawn.entry(user).or_default().1 += squares;
            }
            self.book(at, user, ns, 0, booked);
        }
    }

    /// Busy time whose owner is known without any sample's word.
    pub fn book(&mut self, at: BootNs, user: User, ns: f64, samples: u64, booked: &mut Vec<Booked>) {
        if self.range.has(at) {
            self.credit(user, ns, samples);
            booked.push(Booked { at, user, ns });
        }
    }

    fn credit(&mut self, user: User, ns: f64, samples: u64) {
        self.busy_ns += ns;
        let reason = match user {
            User::Container(_) => None,
            User::Host(_) => Some(Reason::Host),
            User::Nobody(reason) => Some(reason),
        };
        if let Some(of_reason) = reason.and_then(|reason| self.unattributed.get_mut(reason as usize)) {
            *of_reason += ns;
        }
        let credit = self.credits.entry(user).or_default();
        credit.ns += ns;
        credit.samples += samples;
    }

    /// Once in a while: what the draws since the last time add to the variances. For `n` independent draws of share `s` that is
    /// `n s (1 - s)`; the `n s` of them that named the user are counted, so `1 - s` is left.
    ///
    /// Where few draws are made, one of `holders` that none has named may have used the device all the same.
    pub fn settle_variance(&mut self, now: BootNs, left: &Left, holders: impl Iterator<Item = User>) {
        let before = self.memory.cut(now, |named, at| left.was(named, at));
        self.spreads = self.memory.spreads();
        let doubt = self.memory.doubt();
        if doubt > 0.0 {
            let all: f64 = self.drawn.values().map(|(_, squares)| squares).sum();
            for user in holders.filter(|user| !before.contains_key(user)) {
                let spread = *self.spreads.entry(user).or_insert(StandardError::unnamed(doubt));
                if spread.share == 0.0 && all > 0.0 {
                    self.credits.entry(user).or_default().sum_of_variances += all * spread.variance();
                }
            }
        }
        for (user, (draws, squares)) in std::mem::take(&mut self.drawn) {
            // Whoever has ended is cut off, but these draws were its own.
            let spread = self.spreads.get(&user).or(before.get(&user));
            let (Some(credit), Some(spread)) = (self.credits.get_mut(&user), spread) else { continue };
            let others = spread.others() * spread.factor;
            credit.sum_of_variances += squares * others;
            if draws > 0 {
                credit.one_more = squares / draws as f64 * others;
            }
        }
    }

    /// Of draws of that sum of squared weights.
    pub fn variance_of(&self, user: User, squares: f64) -> f64 {
        self.spread(user).map_or(0.0, |spread| squares * spread.variance())
    }

    /// A new ring and clock: what is waiting goes to nobody, since nobody can be named for it any more.
    pub fn restart(&mut self, booked: &mut Vec<Booked>) {
        for tick in std::mem::take(&mut self.waiting) {
            self.book(tick.sample.at, tick.otherwise, tick.sample.busy_ns, 0, booked);
        }
        self.neighbours.clear();
        self.memory.clear();
        self.spreads.clear();
    }

    pub fn forget(&mut self, gone: impl Fn(&User) -> bool) {
        self.credits.retain(|user, _| !gone(user));
    }
}

#[cfg(test)]
mod tests {
    use super::super::exits::Lifetimes;
    use super::*;
    use crate::units::ContainerKey;

    #[test]
    fn a_holder_that_no_draw_has_named_may_have_what_the_named_one_may_not() {
        let (seen, unseen) = (User::Container(ContainerKey(1)), User::Container(ContainerKey(2)));
        let (left, lifetimes) = (Left::default(), Lifetimes::default());
        let presence = Presence { left: &left, lifetimes: &lifetimes };
        let errors = |one_queried_in: u64| {
            let mut lane = EngineAccount::new(Range::ALL);
            for n in 0..100 {
                let (at, queried) = (BootNs(n * 167_000_000), n % one_queried_in == 0);
                let sample = Sample { at, span_ns: 167e6, busy_ns: 167e6, queried };
                let named = queried.then_some(NamedUser { user: seen, pid: 1, since: BootNs(0) });
                lane.tick(PendingSample { sample, named, otherwise: seen }, presence, &mut Vec::new());
            }
            lane.decide(BootNs(u64::MAX), presence, &mut Vec::new());
            lane.settle_variance(BootNs(100 * 167_000_000), &left, [seen, unseen].into_iter());
            [seen, unseen].map(|user| lane.credits().get(&user).map_or(0.0, |credit| credit.variance().sqrt() * 1e-9))
        };
        assert_eq!(errors(1), [0.0, 0.0]);
        // 12 draws, each for 1.3 s, that could have missed a share of 0.5 / 13.
        let [of_seen, of_unseen] = errors(8);
        assert!((0.8..1.0).contains(&of_unseen), "{of_unseen}");
        assert!((of_seen / of_unseen - 1.0).abs() < 0.1, "{of_seen} and {of_unseen}");
    }
}
