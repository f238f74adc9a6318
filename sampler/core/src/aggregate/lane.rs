//! One engine's busy time: whose it is, and how sure.
//!
//! ```text
//!  tick, busy, with a pid  -> that pid's user, at once
//!  tick, busy, no pid      -> waits for 4 named ticks after it, 10 s at most; then divided over the 4 nearest named ticks on each
//!                             side whose processes were there then; without any, of the only user that the driver lists as
//!                             holding the device, or no_pid
//! ```
//! Crediting only ticks that carry a pid would credit the square of the duty cycle: the pid is whoever was on the engine at one
//! instant, the utilization is the whole period's. A user that keeps the engine busy for a part `b` of its periods is named in `b` of
//! them, so each of its named ticks stands for `1 - b` of a period that no tick names: that is the weight by which pid-less time is
//! divided. Dividing by the number of named ticks alone would take from those with low duty cycles and give to those with high ones.
//! Where a driver names whoever was last in the period, hardly a busy tick is without a pid, and the same holds.
//!
//! Busy time and what it is credited to are booked together, so their sums agree at every instant; what waits is in no state yet.

use std::collections::{HashMap, VecDeque};

use super::Range;
use super::left::{Left, Named};
use super::spread::{Memory, Spread};
use crate::fact::User;
use crate::snapshot::Reason;
use crate::units::BootNs;

/// Named ticks on each side over which a pid-less one is divided.
const NEIGHBOURS: usize = 4;
/// A pid-less tick waits at most this long for named ones after it.
const WAIT_NS: u64 = 10_000_000_000;
/// Named ticks before it count for this long.
const LOOK_BACK_NS: u64 = 30_000_000_000;
/// Utilization is rounded to a percent: a tick of 100 % may be half of one less.
const ROUNDING_RATIO: f64 = 0.005;

#[derive(Clone, Copy, Debug)]
pub struct Tick {
    pub at: BootNs,
    pub span_ns: f64,
    pub busy_ns: f64,
    pub named: Option<Named>,
    /// Whose it is if nobody at all is named around it.
    pub otherwise: User,
}

/// A tick that named somebody; `weight_ns` is all that was credited by it.
#[derive(Clone, Copy, Debug)]
struct NamedTick {
    at: BootNs,
    named: Named,
    stands_for: f64,
    weight_ns: f64,
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
pub struct Lane {
    range: Range,
    pub busy_ns: f64,
    pub unattributed: [f64; Reason::ALL.len()],
    /// By user; those of nobody are in `unattributed` too, host processes under [`Reason::Host`].
    credits: HashMap<User, Credit>,
    named: VecDeque<NamedTick>,
    waiting: VecDeque<Tick>,
    memory: Memory,
    spreads: HashMap<User, Spread>,
    /// Number and sum of squared weights of the draws that are not in the variances yet.
    drawn: HashMap<User, (u64, f64)>,
}

impl Lane {
    pub fn new(range: Range) -> Self {
        Self {
            range,
            busy_ns: 0.0,
            unattributed: Default::default(),
            credits: HashMap::new(),
            named: VecDeque::new(),
            waiting: VecDeque::new(),
            memory: Memory::default(),
            spreads: HashMap::new(),
            drawn: HashMap::new(),
        }
    }

    pub fn credits(&self) -> &HashMap<User, Credit> {
        &self.credits
    }

    pub fn spread(&self, user: User) -> Option<Spread> {
        self.spreads.get(&user).copied()
    }

    /// Ticks come in their order.
    pub fn tick(&mut self, tick: Tick, left: &Left, booked: &mut Vec<Booked>) {
        match tick.named {
            Some(named) => {
                self.book(tick.at, named.user, tick.busy_ns, 1, booked);
                if self.range.has(tick.at) {
                    let drawn = self.drawn.entry(named.user).or_default();
                    *drawn = (drawn.0 + 1, drawn.1 + tick.busy_ns * tick.busy_ns);
                }
                let stands_for = 1.0 - tick.busy_ns / tick.span_ns.max(1.0) + ROUNDING_RATIO;
                self.named.push_back(NamedTick { at: tick.at, named, stands_for, weight_ns: tick.busy_ns });
                self.memory.name(tick.at, named);
            }
            None if tick.busy_ns > 0.0 => self.waiting.push_back(tick),
            None => {}
        }
        self.decide(tick.at, left, booked);
        let keep = LOOK_BACK_NS + WAIT_NS;
        while self.named.front().is_some_and(|n| tick.at.saturating_since(n.at) > keep) {
            self.named.pop_front();
        }
    }

    /// Divides what has waited long enough at `now`, a time up to which all ticks are known.
    pub fn decide(&mut self, now: BootNs, left: &Left, booked: &mut Vec<Booked>) {
        while let Some(tick) = self.waiting.front().copied() {
            let after = self.named.partition_point(|n| n.at <= tick.at);
            let enough = self.named.len() - after >= NEIGHBOURS;
            if !enough && now.saturating_since(tick.at) < WAIT_NS {
                return;
            }
            self.waiting.pop_front();
            self.divide(tick, after, left, booked);
        }
    }

    fn divide(&mut self, tick: Tick, after: usize, left: &Left, booked: &mut Vec<Booked>) {
        let there = |n: &usize| self.named.get(*n).is_some_and(|n| left.was(&n.named, tick.at));
        let near = |n: &usize| self.named.get(*n).is_some_and(|n| tick.at.saturating_since(n.at) <= LOOK_BACK_NS);
        let before = (0..after).rev().take_while(near).filter(there).take(NEIGHBOURS);
        let late = |n: &usize| self.named.get(*n).is_some_and(|n| n.at.saturating_since(tick.at) <= WAIT_NS);
        let later = (after..self.named.len()).take_while(late).filter(there).take(NEIGHBOURS);
        let neighbours: Vec<usize> = before.chain(later).collect();
        let whole: f64 = neighbours.iter().filter_map(|n| self.named.get(*n)).map(|n| n.stands_for).sum();
        if neighbours.is_empty() {
            self.book(tick.at, tick.otherwise, tick.busy_ns, 0, booked);
        }
        for n in neighbours {
            let Some(neighbour) = self.named.get_mut(n) else { continue };
            let ns = tick.busy_ns * neighbour.stands_for / whole;
            let user = neighbour.named.user;
            let before = neighbour.weight_ns;
            neighbour.weight_ns += ns;
            let squares = neighbour.weight_ns.powi(2) - before.powi(2);
            if self.range.has(tick.at) {
                self.drawn.entry(user).or_default().1 += squares;
            }
            self.book(tick.at, user, ns, 0, booked);
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
    pub fn settle_variance(&mut self, now: BootNs, left: &Left) {
        let before = self.memory.cut(now, |named, at| left.was(named, at));
        self.spreads = self.memory.spreads();
        for (user, (draws, squares)) in std::mem::take(&mut self.drawn) {
            // Whoever has ended is cut off, but these draws were its own.
            let spread = self.spreads.get(&user).or(before.get(&user));
            let (Some(credit), Some(spread)) = (self.credits.get_mut(&user), spread) else { continue };
            let others = (1.0 - spread.share) * spread.factor;
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
            self.book(tick.at, tick.otherwise, tick.busy_ns, 0, booked);
        }
        self.named.clear();
        self.memory.clear();
        self.spreads.clear();
    }

    pub fn forget(&mut self, gone: impl Fn(&User) -> bool) {
        self.credits.retain(|user, _| !gone(user));
    }
}
