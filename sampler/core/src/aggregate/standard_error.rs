//! Standard errors of shares, from the order in which recent samples named the users.
//!
//! If samples are independent, a share `s` of `n` has the variance `s (1 - s) / n`. They are not independent where the period of a load is
//! close to that of the grid: then many consecutive samples name the same user, and the means of blocks of samples scatter more than those
//! of independent samples. The factor is measured here, over the last two minutes, and multiplies the variance. It does not distinguish
//! such a load from one that really starts and stops while its process is alive; there the error is overstated. Samples from before a
//! known change, the start or end of a process, are cut off. The factor is never below 1: samples in phase with a load scatter less than
//! independent ones but are not more accurate. A load that is locked to the grid so that it is never named cannot be detected by sampling.

use std::collections::VecDeque;

use foldhash::HashMap;

use super::exits::NamedUser;
use crate::fact::User;
use crate::units::BootNs;

const HISTORY_NS: u64 = 120_000_000_000;
/// 120 s of a grid of 100 ms.
const HISTORY_SAMPLES: usize = 1_200;
/// Block sizes, in samples.
const BLOCKS: [usize; 3] = [8, 20, 60];
/// Minimum number of blocks for their scatter to be used.
const BLOCKS_AT_LEAST: usize = 4;
/// Lengths of the cycles that are searched for, in samples; the error of a longer cycle is below that of independent samples.
const CYCLES: std::ops::RangeInclusive<usize> = 2..=4;
/// A sequence is a cycle if its autocorrelation is above this value.
const CYCLIC: f64 = 0.7;
/// A user with this many successive processes is expected to have further ones, if one was named within [`FOLLOWS_NS`], or within
/// [`FOLLOWS_GAPS`] of its mean gaps.
const FOLLOWING: u64 = 3;
const FOLLOWS_NS: u64 = 10_000_000_000;
const FOLLOWS_GAPS: u64 = 8;
/// Number of samples assumed for a user that none has named, as is usual for the estimate of a share without observations.
const UNSEEN_SAMPLES: f64 = 0.5;
/// Samples in a window of 10 s on the usual grid, for which the error of a cycle is stated.
const WINDOW_SAMPLES: f64 = 60.0;

/// The error of the share of one user.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StandardError {
    /// Share of the named samples.
    pub share: f64,
    /// Ratio of the variance of its sum to that of independent samples.
    pub factor: f64,
    /// Possible error of the share where none, or each, of few samples named the user; 0 where every sample was queried.
    pub unseen_share: f64,
}

impl StandardError {
    /// For a user that uses the device without any sample having named it.
    pub fn unnamed(unseen_share: f64) -> Self {
        Self { share: 0.0, factor: 1.0, unseen_share }
    }

    /// Variance of one sample of weight 1.
    pub fn variance(&self) -> f64 {
        self.share.max(self.unseen_share) * self.others() * self.factor
    }

    /// The share of all other users.
    pub fn others(&self) -> f64 {
        (1.0 - self.share).max(self.unseen_share)
    }
}

/// The samples that named one user.
struct NamedSamples {
    first: usize,
    last: usize,
    /// By pid.
    processes: HashMap<u32, NamedUser>,
}

/// Successive processes of one user; kept when samples are cut off.
#[derive(Debug)]
struct Succession {
    first: BootNs,
    last: BootNs,
    samples: u64,
    pid: u32,
    processes: u64,
}

impl Succession {
    fn goes_on(&self, now: BootNs) -> bool {
        let gap_ns = self.last.saturating_since(self.first) / (self.samples - 1).max(1);
        self.processes >= FOLLOWING && now.saturating_since(self.last) < FOLLOWS_NS.max(FOLLOWS_GAPS * gap_ns)
    }
}

#[derive(Debug, Default)]
pub struct SampleHistory {
    named: VecDeque<(BootNs, NamedUser)>,
    successions: HashMap<User, Succession>,
    /// The latest sample with an unqueried process: for [`HISTORY_NS`] after it, there may be a user that no sample has named.
    unqueried: Option<BootNs>,
}

impl SampleHistory {
    pub fn add(&mut self, at: BootNs, named: NamedUser) {
        if self.named.len() == HISTORY_SAMPLES {
            self.named.pop_front();
        }
        self.named.push_back((at, named));
        let begins = Succession { first: at, last: at, samples: 0, pid: named.pid, processes: 1 };
        let succession = self.successions.entry(named.user).or_insert(begins);
        succession.processes += u64::from(succession.pid != named.pid);
        (succession.last, succession.samples, succession.pid) = (at, succession.samples + 1, named.pid);
        while self.named.front().is_some_and(|(then, _)| at.saturating_since(*then) > HISTORY_NS) {
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

    /// Cuts off the samples from before a user appeared or disappeared, and returns the standard errors from before the cut, if there is
    /// one. A user appears with the first of its named processes and disappears with the last. A user with successive processes has
    /// disappeared only when none was named for a while. `was_present`: whether the process was present at that time.
    pub fn cut(&mut self, now: BootNs, was_present: impl Fn(&NamedUser, BootNs) -> bool) -> HashMap<User, StandardError> {
        self.unqueried = self.unqueried.filter(|at| now.saturating_since(*at) <= HISTORY_NS);
        self.successions.retain(|_, succession| now.saturating_since(succession.last) <= HISTORY_NS);
        let Some((from, _)) = self.named.front().copied() else { return HashMap::default() };
        let mut spans: HashMap<User, NamedSamples> = HashMap::default();
        for (n, (_, named)) in self.named.iter().enumerate() {
            let span = spans.entry(named.user).or_insert(NamedSamples { first: n, last: n, processes: HashMap::default() });
            span.last = n;
            span.processes.entry(named.pid).or_insert(*named);
        }
        let mut keep_from = 0;
        for (user, span) in &spans {
            if span.first > 0 && span.processes.values().all(|named| !was_present(named, from)) {
                keep_from = keep_from.max(span.first);
            }
            let follow = self.successions.get(user).is_some_and(|succession| succession.goes_on(now));
            if !follow && span.processes.values().all(|named| !was_present(named, now)) {
                keep_from = keep_from.max(span.last + 1);
            }
        }
        let before = if keep_from > 0 { self.standard_errors() } else { HashMap::default() };
        self.named.drain(..keep_from.min(self.named.len()));
        before
    }

    pub fn standard_errors(&self) -> HashMap<User, StandardError> {
        let mut users: HashMap<User, Vec<usize>> = HashMap::default();
        for (n, (_, named)) in self.named.iter().enumerate() {
            users.entry(named.user).or_default().push(n);
        }
        let (n, unseen_share) = (self.named.len(), self.unseen_share());
        users.into_iter().map(|(user, indices)| (user, StandardError { unseen_share, ..estimate(&indices, n) })).collect()
    }

    /// The share that a user may have without a single sample that names it.
    pub fn unseen_share(&self) -> f64 {
        if self.unqueried.is_some() { UNSEEN_SAMPLES / (self.named.len() as f64 + 1.0) } else { 0.0 }
    }
}

/// `indices`: the indices of a user's samples among `n`.
fn estimate(indices: &[usize], n: usize) -> StandardError {
    let share = indices.len() as f64 / n as f64;
    let independent = share * (1.0 - share);
    if independent <= 0.0 {
        return StandardError { share, factor: 1.0, unseen_share: 0.0 };
    }
    let mut factor: f64 = 1.0;
    for size in BLOCKS {
        if n < size * BLOCKS_AT_LEAST {
            break;
        }
        let scatter = size as f64 * block_variance(indices, n, size, share) / independent;
        // Overlapping blocks have 1.5 times as many degrees of freedom as separate ones.
        let freedom = 1.5 * n as f64 / size as f64;
        let by_chance = 1.0 + 2.0 * (2.0 / freedom).sqrt();
        if scatter > by_chance {
            factor = factor.max(scatter);
        }
    }
    if let Some(cycle) = cycle(indices, n, share) {
        // The samples only hit as many phases of the load as the cycle is long, so the resolution of the share is one phase.
        factor = factor.max(WINDOW_SAMPLES / (12.0 * (cycle * cycle) as f64) / independent);
    }
    StandardError { share, factor, unseen_share: 0.0 }
}

/// Variance of the means of all blocks of a size. Between two blocks in which a sample of the user enters or leaves, the mean stays the
/// same, so the work grows with the user's samples only: a node has hundreds of users with few samples each.
fn block_variance(indices: &[usize], n: usize, size: usize, share: f64) -> f64 {
    let blocks = n - size + 1;
    // The first blocks with and without the sample, by the number of a block's first sample.
    let mut enters = indices.iter().map(|index| (index + 1).saturating_sub(size)).peekable();
    let mut leaves = indices.iter().map(|index| index + 1).peekable();
    let (mut from, mut inside, mut total) = (0, 0u32, 0.0);
    while from < blocks {
        while enters.next_if(|at| *at <= from).is_some() {
            inside += 1;
        }
        while leaves.next_if(|at| *at <= from).is_some() {
            inside -= 1;
        }
        let next = enters.peek().into_iter().chain(leaves.peek()).fold(blocks, |first, at| first.min(*at));
        total += (next - from) as f64 * (f64::from(inside) / size as f64 - share).powi(2);
        from = next;
    }
    // The mean is computed from the same samples, which reduces the variance.
    total / blocks as f64 / (1.0 - size as f64 / n as f64)
}

/// The length of the shortest cycle of the samples, if they form one.
fn cycle(indices: &[usize], n: usize, share: f64) -> Option<usize> {
    const RECENT: usize = WINDOW_SAMPLES as usize;
    // Older samples may have another cycle; a few samples that repeat by chance are not a cycle.
    let from = n.checked_sub(RECENT)?;
    let mut recent = [false; RECENT];
    for index in indices.iter().rev().map_while(|index| index.checked_sub(from)) {
        recent[index] = true;
    }
    let named = recent.iter().filter(|is_named| **is_named).count();
    let least = RECENT / CYCLES.end();
    if named.min(RECENT - named) < least - 1 {
        return None;
    }
    let repeats = |lag: usize| {
        let both = (lag..RECENT).filter(|n| recent[*n] && recent[n - lag]).count() as f64;
        (both / (RECENT - lag) as f64 - share * share) / (share * (1.0 - share))
    };
    CYCLES.into_iter().find(|lag| repeats(*lag) > CYCLIC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Reason;

    /// Variance of the means of all blocks, one after the other.
    fn block_variance_by_definition(indices: &[usize], n: usize, size: usize, share: f64) -> f64 {
        let mean = |from: usize| indices.iter().filter(|index| (from..from + size).contains(index)).count() as f64 / size as f64;
        let blocks = n - size + 1;
        let total: f64 = (0..blocks).map(|from| (mean(from) - share).powi(2)).sum();
        total / blocks as f64 / (1.0 - size as f64 / n as f64)
    }

    #[test]
    fn the_variance_of_blocks_is_that_of_its_definition() {
        for (n, percent) in [(60, 3), (61, 50), (240, 1), (240, 97), (721, 20)] {
            let indices: Vec<usize> = (0..n).filter(|k| random(*k) % 100 < percent).collect();
            let share = indices.len() as f64 / n as f64;
            for size in [1, 8, 20, 59] {
                let [got, expect] = [block_variance, block_variance_by_definition].map(|of| of(&indices, n, size, share));
                assert!((got - expect).abs() < 1e-12, "{n} {percent} {size}: {got} instead of {expect}");
            }
        }
    }

    /// One user is named where `is_named` is true, another elsewhere.
    fn estimate_of(n: usize, is_named: impl Fn(usize) -> bool) -> StandardError {
        estimate(&(0..n).filter(|k| is_named(*k)).collect::<Vec<_>>(), n)
    }

    fn random(k: usize) -> u64 {
        let mut z = (k as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    #[test]
    fn independent_samples_have_the_binomial_error() {
        for percent in [5, 30, 50, 95] {
            let error = estimate_of(720, |k| random(k) % 100 < percent);
            assert!((error.share - percent as f64 / 100.0).abs() < 0.05, "{error:?}");
            assert_eq!(error.factor, 1.0, "{percent} %: {error:?}");
        }
    }

    #[test]
    fn runs_and_cycles_increase_the_error() {
        // A beat of 100 samples; cycles of two and three samples; a user that is always named.
        assert!(estimate_of(720, |k| k % 100 < 50).factor > 8.0);
        assert!(estimate_of(720, |k| k % 2 == 0).factor > 4.0);
        assert!(estimate_of(720, |k| k % 3 == 0).factor > 2.0);
        assert_eq!(estimate_of(720, |_| true).variance(), 0.0);
    }

    #[test]
    fn with_few_samples_a_user_that_none_has_named_is_possible() {
        let user = User::Unattributed(Reason::Host);
        let mut history = SampleHistory::default();
        for k in 0..19 {
            history.add(BootNs(k), NamedUser { user, pid: 1, since: BootNs(0) });
        }
        assert_eq!(history.standard_errors()[&user].variance(), 0.0);
        history.unqueried(BootNs(18));
        assert!((history.standard_errors()[&user].others() - 0.025).abs() < 1e-9);
        // The error of the named user equals that of a user that was not named.
        assert_eq!(history.standard_errors()[&user].variance(), StandardError::unnamed(history.unseen_share()).variance());
        history.cut(BootNs(18 + HISTORY_NS + 1), |_, _| true);
        assert_eq!(history.unseen_share(), 0.0, "every sample of the last minutes was_present queried");
    }

    #[test]
    fn samples_are_cut_off_where_users_appear_and_disappear() {
        let users = [User::Unattributed(Reason::Host), User::Unattributed(Reason::Lost)];
        let named = |pid: u32| NamedUser { user: users[pid as usize - 1], pid, since: BootNs(0) };
        let mut history = SampleHistory::default();
        for k in 0..30 {
            history.add(BootNs(k), named(if k < 10 { 1 } else { 2 }));
        }
        // Both were present all the time.
        history.cut(BootNs(30), |_, _| true);
        assert_eq!(history.named.len(), 30);
        // The second appeared at 10.
        history.cut(BootNs(30), |named, at| named.pid == 1 || at.0 >= 10);
        assert_eq!(history.named.len(), 20);
        // It has ended.
        history.cut(BootNs(30), |named, at| named.pid == 1 || at.0 < 30);
        assert_eq!(history.named.len(), 0);
    }

    #[test]
    fn successive_short_processes_count_as_one_presence() {
        let (long, short) = (User::Unattributed(Reason::Host), User::Unattributed(Reason::Ambiguous));
        let mut history = SampleHistory::default();
        for k in 0..30 {
            let (user, pid) = if k % 2 == 0 { (long, 1) } else { (short, 100 + k as u32) };
            history.add(BootNs(k), NamedUser { user, pid, since: BootNs(if pid == 1 { 0 } else { k }) });
        }
        // Each short process existed for one sample.
        let was_present = |named: &NamedUser, at: BootNs| named.pid == 1 || named.since == at;
        history.cut(BootNs(30), was_present);
        assert_eq!(history.named.len(), 29, "from the first short one on");
        history.cut(BootNs(30 + FOLLOWS_NS), was_present);
        assert_eq!(history.named.len(), 0);
    }
}
