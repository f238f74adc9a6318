//! How far shares may be off: who was named lately, one by one, and what their order says of the error.
//!
//! A named tick is one draw. Where draws are independent, a share `s` of `n` has the variance `s (1 - s) / n`. They are not where a
//! load's own period comes close to the grid's: then the same user is named for many ticks in a row, and the means of blocks of ticks
//! scatter more than independent draws would; that factor is measured here, over the last two minutes, and multiplies the variance.
//! It cannot tell such a load from one that really comes and goes while its process lives: there the error is overstated. What is
//! known to have changed, because a process began or ended, is cut off. The factor is never below 1: samples in step with a load
//! scatter less than independent ones and are no better. A load locked to the grid so that it is never named is invisible to samples.

use std::collections::{HashMap, VecDeque};

use super::exits::NamedUser;
use crate::fact::User;
use crate::units::BootNs;

const MEMORY_NS: u64 = 120_000_000_000;
/// 120 s of a 100 ms grid.
const MEMORY_TICKS: usize = 1_200;
/// Ticks in a block.
const BLOCKS: [usize; 3] = [8, 20, 60];
/// The number of blocks below which their scatter says nothing.
const BLOCKS_AT_LEAST: usize = 4;
/// Cycles of ticks looked for; a longer one misses by less than independent draws do.
const CYCLES: std::ops::RangeInclusive<usize> = 2..=4;
/// A sequence is a cycle if this much of what can repeat does.
const CYCLIC: f64 = 0.7;
/// A user with so many processes has further ones, if one was named within this time, or within so many of its usual gaps.
const FOLLOWING: u64 = 3;
const FOLLOWS_NS: u64 = 10_000_000_000;
const FOLLOWS_GAPS: u64 = 8;
/// Draws that a user may have had of which none was seen, as is usual for a share of which nothing was.
const UNSEEN_DRAWS: f64 = 0.5;
/// Ticks of a window of 10 s on the usual grid, for which the error of a cycle is stated.
const WINDOW_TICKS: f64 = 60.0;

/// Of one user.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StandardError {
    /// Share of named ticks.
    pub share: f64,
    /// Variance of its sum over that of independent draws.
    pub factor: f64,
    /// What the share may be off by where none of few draws, or each of them, named the user; 0 where draws are many.
    pub doubt: f64,
}

impl StandardError {
    /// Of a user that uses the device without any draw having named it.
    pub fn unnamed(doubt: f64) -> Self {
        Self { share: 0.0, factor: 1.0, doubt }
    }

    /// Of one draw of weight 1.
    pub fn variance(&self) -> f64 {
        self.share.max(self.doubt) * self.others() * self.factor
    }

    /// The share of all others.
    pub fn others(&self) -> f64 {
        (1.0 - self.share).max(self.doubt)
    }
}

/// The draws that named one user.
struct NamedSamples {
    first: usize,
    last: usize,
    /// By pid.
    processes: HashMap<u32, NamedUser>,
}

/// Processes of one user that follow each other; outlives what is cut off.
#[derive(Debug)]
struct Succession {
    first: BootNs,
    last: BootNs,
    draws: u64,
    pid: u32,
    processes: u64,
}

impl Succession {
    fn goes_on(&self, now: BootNs) -> bool {
        let gap_ns = self.last.saturating_since(self.first) / (self.draws - 1).max(1);
        self.processes >= FOLLOWING && now.saturating_since(self.last) < FOLLOWS_NS.max(FOLLOWS_GAPS * gap_ns)
    }
}

#[derive(Debug, Default)]
pub struct Memory {
    named: VecDeque<(BootNs, NamedUser)>,
    successions: HashMap<User, Succession>,
    /// The latest sample whose process was not queried: until that is long ago, a user may be there that no draw has named.
    unqueried: Option<BootNs>,
}

impl Memory {
    pub fn name(&mut self, at: BootNs, named: NamedUser) {
        if self.named.len() == MEMORY_TICKS {
            self.named.pop_front();
        }
        self.named.push_back((at, named));
        let begins = Succession { first: at, last: at, draws: 0, pid: named.pid, processes: 1 };
        let succession = self.successions.entry(named.user).or_insert(begins);
        succession.processes += u64::from(succession.pid != named.pid);
        (succession.last, succession.draws, succession.pid) = (at, succession.draws + 1, named.pid);
        while self.named.front().is_some_and(|(then, _)| at.saturating_since(*then) > MEMORY_NS) {
            self.named.pop_front();
        }
    }

    pub fn unqueried(&mut self, at: BootNs) {
        self.unqueried = Some(at);
    }

    pub fn clear(&mut self) {
        self.named.clear();
        self.successions.clear();
        self.unqueried = None;
    }

    /// Cuts off what is before a user came or went; the spreads before that, where there is something to cut. It came with the first of its
    /// processes that is named and went with the last; one whose processes follow each other has gone only when none was named for a
    /// while. `was`: whether the process was there at that time.
    pub fn cut(&mut self, now: BootNs, was: impl Fn(&NamedUser, BootNs) -> bool) -> HashMap<User, StandardError> {
        self.unqueried = self.unqueried.filter(|at| now.saturating_since(*at) <= MEMORY_NS);
        self.successions.retain(|_, succession| now.saturating_since(succession.last) <= MEMORY_NS);
        let Some((from, _)) = self.named.front().copied() else { return HashMap::new() };
        let mut stays: HashMap<User, NamedSamples> = HashMap::new();
        for (n, (_, named)) in self.named.iter().enumerate() {
            let stay = stays.entry(named.user).or_insert(NamedSamples { first: n, last: n, processes: HashMap::new() });
            stay.last = n;
            stay.processes.entry(named.pid).or_insert(*named);
        }
        let mut keep_from = 0;
        for (user, stay) in &stays {
            if stay.first > 0 && stay.processes.values().all(|named| !was(named, from)) {
                keep_from = keep_from.max(stay.first);
            }
            let follow = self.successions.get(user).is_some_and(|succession| succession.goes_on(now));
            if !follow && stay.processes.values().all(|named| !was(named, now)) {
                keep_from = keep_from.max(stay.last + 1);
            }
        }
        let before = if keep_from > 0 { self.spreads() } else { HashMap::new() };
        self.named.drain(..keep_from.min(self.named.len()));
        before
    }

    pub fn spreads(&self) -> HashMap<User, StandardError> {
        let mut users: HashMap<User, Vec<usize>> = HashMap::new();
        for (n, (_, named)) in self.named.iter().enumerate() {
            users.entry(named.user).or_default().push(n);
        }
        let (n, doubt) = (self.named.len(), self.doubt());
        users.into_iter().map(|(user, at)| (user, StandardError { doubt, ..spread(&at, n) })).collect()
    }

    /// The share that a user may have without a single draw that names it.
    pub fn doubt(&self) -> f64 {
        if self.unqueried.is_some() { UNSEEN_DRAWS / (self.named.len() as f64 + 1.0) } else { 0.0 }
    }
}

/// `at`: the places of a user's ticks among `n`.
fn spread(at: &[usize], n: usize) -> StandardError {
    let share = at.len() as f64 / n as f64;
    let one = share * (1.0 - share);
    if one <= 0.0 {
        return StandardError { share, factor: 1.0, doubt: 0.0 };
    }
    let mut is = vec![0u32; n];
    for place in at {
        if let Some(is) = is.get_mut(*place) {
            *is = 1;
        }
    }
    let mut factor: f64 = 1.0;
    for size in BLOCKS {
        if n < size * BLOCKS_AT_LEAST {
            break;
        }
        let scatter = size as f64 * block_variance(&is, size, share) / one;
        // Overlapping blocks are worth half as many again as separate ones.
        let freedom = 1.5 * n as f64 / size as f64;
        let by_chance = 1.0 + 2.0 * (2.0 / freedom).sqrt();
        if scatter > by_chance {
            factor = factor.max(scatter);
        }
    }
    if let Some(cycle) = cycle(&is, share) {
        // So many phases are looked at and no other: the share is known to within a part of one.
        factor = factor.max(WINDOW_TICKS / (12.0 * (cycle * cycle) as f64) / one);
    }
    StandardError { share, factor, doubt: 0.0 }
}

/// Variance of the means of all blocks of that size.
fn block_variance(is: &[u32], size: usize, share: f64) -> f64 {
    let mut sum: u32 = is.iter().take(size).sum();
    let mut total = (f64::from(sum) / size as f64 - share).powi(2);
    for n in size..is.len() {
        sum = sum + is[n] - is[n - size];
        total += (f64::from(sum) / size as f64 - share).powi(2);
    }
    let blocks = is.len() - size + 1;
    // The mean is of the same ticks: it takes up a part of the variance.
    total / blocks as f64 / (1.0 - size as f64 / is.len() as f64)
}

/// The shortest cycle of ticks, if they are one.
fn cycle(is: &[u32], share: f64) -> Option<usize> {
    // What is long past may be another cycle; a few ticks that happen to repeat are none.
    let recent = &is[is.len().saturating_sub(WINDOW_TICKS as usize)..];
    let named = recent.iter().filter(|is| **is == 1).count();
    let least = WINDOW_TICKS as usize / CYCLES.end();
    if recent.len() < WINDOW_TICKS as usize || named.min(recent.len() - named) < least - 1 {
        return None;
    }
    let repeats = |lag: usize| {
        let both = (lag..recent.len()).filter(|n| recent[*n] == 1 && recent[n - lag] == 1).count() as f64;
        (both / (recent.len() - lag) as f64 - share * share) / (share * (1.0 - share))
    };
    CYCLES.into_iter().find(|lag| repeats(*lag) > CYCLIC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Reason;

    /// One user named where `is` says so, another elsewhere.
    fn spread_of(n: usize, is: impl Fn(usize) -> bool) -> StandardError {
        spread(&(0..n).filter(|k| is(*k)).collect::<Vec<_>>(), n)
    }

    fn drawn(k: usize) -> u64 {
        let mut z = (k as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    #[test]
    fn independent_draws_have_the_binomial_error() {
        for percent in [5, 30, 50, 95] {
            let spread = spread_of(720, |k| drawn(k) % 100 < percent);
            assert!((spread.share - percent as f64 / 100.0).abs() < 0.05, "{spread:?}");
            assert_eq!(spread.factor, 1.0, "{percent} %: {spread:?}");
        }
    }

    #[test]
    fn runs_and_cycles_are_worth_less() {
        // A beat of 100 ticks; cycles of two and three ticks; one that is named always.
        assert!(spread_of(720, |k| k % 100 < 50).factor > 8.0);
        assert!(spread_of(720, |k| k % 2 == 0).factor > 4.0);
        assert!(spread_of(720, |k| k % 3 == 0).factor > 2.0);
        assert_eq!(spread_of(720, |_| true).variance(), 0.0);
    }

    #[test]
    fn a_few_draws_leave_room_for_users_that_none_has_named() {
        let user = User::Nobody(Reason::Host);
        let mut memory = Memory::default();
        for k in 0..19 {
            memory.name(BootNs(k), NamedUser { user, pid: 1, since: BootNs(0) });
        }
        assert_eq!(memory.spreads()[&user].variance(), 0.0);
        memory.unqueried(BootNs(18));
        assert!((memory.spreads()[&user].others() - 0.025).abs() < 1e-9);
        // What the one may have too much, the other may have too little.
        assert_eq!(memory.spreads()[&user].variance(), StandardError::unnamed(memory.doubt()).variance());
        memory.cut(BootNs(18 + MEMORY_NS + 1), |_, _| true);
        assert_eq!(memory.doubt(), 0.0, "every sample of the last minutes was queried");
    }

    #[test]
    fn the_past_is_cut_at_births_and_ends() {
        let users = [User::Nobody(Reason::Host), User::Nobody(Reason::Lost)];
        let named = |pid: u32| NamedUser { user: users[pid as usize - 1], pid, since: BootNs(0) };
        let mut memory = Memory::default();
        for k in 0..30 {
            memory.name(BootNs(k), named(if k < 10 { 1 } else { 2 }));
        }
        // Both were there all along.
        memory.cut(BootNs(30), |_, _| true);
        assert_eq!(memory.named.len(), 30);
        // The second was born at 10.
        memory.cut(BootNs(30), |named, at| named.pid == 1 || at.0 >= 10);
        assert_eq!(memory.named.len(), 20);
        // It has ended.
        memory.cut(BootNs(30), |named, at| named.pid == 1 || at.0 < 30);
        assert_eq!(memory.named.len(), 0);
    }

    #[test]
    fn short_processes_that_follow_each_other_are_one_stay() {
        let (stayer, short) = (User::Nobody(Reason::Host), User::Nobody(Reason::Ambiguous));
        let mut memory = Memory::default();
        for k in 0..30 {
            let (user, pid) = if k % 2 == 0 { (stayer, 1) } else { (short, 100 + k as u32) };
            memory.name(BootNs(k), NamedUser { user, pid, since: BootNs(if pid == 1 { 0 } else { k }) });
        }
        // Each of the short ones lived for one draw.
        let was = |named: &NamedUser, at: BootNs| named.pid == 1 || named.since == at;
        memory.cut(BootNs(30), was);
        assert_eq!(memory.named.len(), 29, "from the first short one on");
        memory.cut(BootNs(30 + FOLLOWS_NS), was);
        assert_eq!(memory.named.len(), 0);
    }
}
