//! Coactivity: which users were active in the same windows of one second. It is the basis of the contention analysis.
//!
//! ```text
//!  samples, booked seconds -> open windows -> closed once they cannot change any more -> sums, and for a report all windows
//! ```
//! A user is *active* in a window in which a sample named it, and *co-active* if another user was active too. The GPU is *saturated* in a
//! window if it was busy for a given part of the observed time. The contention of a user is the time that others received in windows in
//! which the user was active and the GPU was saturated. A user with a small share is named in few windows, so the number of samples is
//! reported with every sum.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use foldhash::HashMap;

use crate::device::Reason;
use crate::fact::User;
use crate::snapshot::{Contention, MAX_OTHERS, Other};
use crate::units::{BootNs, ContainerKey};

pub const COACTIVITY_WINDOW_NS: u64 = 1_000_000_000;
/// A window with less observed time than this does not count as saturated.
const OBSERVED_NS: u64 = COACTIVITY_WINDOW_NS / 2;
/// Number of windows behind the live share of coactivity.
const RECENT: u64 = 10;
/// Minimum part of a window's busy time with queried processes, for the window to show which users were active together.
pub const QUERIED_RATIO: f64 = 0.8;

/// The part of one user in a window.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Part {
    pub ns: f64,
    /// Samples that named it.
    pub samples: u32,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Window {
    pub observed_ns: u64,
    pub busy_ns: f64,
    /// The part of `busy_ns` from samples with unqueried processes.
    pub unqueried_ns: f64,
    pub users: BTreeMap<User, Part>,
}

/// Whether it counts as a user of a window. Time that is ambiguous, or without a valid pid, does not belong to an additional user.
pub fn is_user(user: User) -> bool {
    !matches!(user, User::Unattributed(Reason::NoPid | Reason::InvalidPid | Reason::Ambiguous))
}

impl Window {
    pub fn active(&self) -> impl Iterator<Item = User> {
        self.users.iter().filter(|(user, part)| part.samples > 0 && is_user(**user)).map(|(user, _)| *user)
    }

    /// Whether enough of it was queried to show which users were active together.
    pub fn shows_users(&self) -> bool {
        self.unqueried_ns <= (1.0 - QUERIED_RATIO) * self.busy_ns
    }

    pub fn saturated(&self, ratio: f64) -> bool {
        self.observed_ns >= OBSERVED_NS && self.busy_ns >= ratio * self.observed_ns as f64
    }

    pub fn seconds(&self) -> f64 {
        self.observed_ns.min(COACTIVITY_WINDOW_NS) as f64 * 1e-9
    }
}

/// The sums of one container.
#[derive(Clone, Debug, Default)]
pub struct Sums {
    pub active: f64,
    pub coactive: f64,
    /// Shared with snapshots until it changes.
    pub others: Arc<[Contention]>,
}

impl Sums {
    fn add(&mut self, other: Other, seconds: f64) {
        let is_known = self.others.iter().any(|known| known.other == other);
        let distinguished = self.others.iter().filter(|known| known.other != Other::Rest).count();
        let other = if is_known || distinguished < MAX_OTHERS { other } else { Other::Rest };
        match self.others.iter().position(|known| known.other == other) {
            Some(index) => Arc::make_mut(&mut self.others)[index].seconds += seconds,
            None => {
                self.others = self.others.iter().copied().chain([Contention { other, seconds, pressure_ratio: None }]).collect()
            }
        }
    }
}

/// The user as another one's contender.
pub fn other(user: User) -> Other {
    match user {
        User::Container(key) => Other::Container(key),
        User::Host(_) => Other::Host,
        User::Unattributed(_) => Other::Unknown,
    }
}

#[derive(Debug, Default)]
pub struct Coactivity {
    saturation_ratio: f64,
    open: BTreeMap<u64, Window>,
    sums: HashMap<ContainerKey, Sums>,
    /// All closed windows, by number; only kept for reports.
    pub history: Option<BTreeMap<u64, Window>>,
    /// Windows that were closed since they were last taken; only kept for waiting.
    closed: Option<Vec<(u64, Window)>>,
}

fn number(at: BootNs) -> u64 {
    at.0 / COACTIVITY_WINDOW_NS
}

impl Coactivity {
    pub fn new(saturation_ratio: f64, keep_history: bool) -> Self {
        Self { saturation_ratio, history: keep_history.then(BTreeMap::new), ..Self::default() }
    }

    fn window_at(&mut self, at: BootNs) -> &mut Window {
        self.open.entry(number(at)).or_default()
    }

    pub fn unqueried(&mut self, at: BootNs, busy_ns: f64) {
        self.window_at(at).unqueried_ns += busy_ns;
    }

    pub fn observed(&mut self, at: BootNs, ns: u64, busy_ns: f64, named: Option<User>) {
        let window = self.window_at(at);
        window.observed_ns = window.observed_ns.saturating_add(ns);
        window.busy_ns += busy_ns;
        if let Some(user) = named {
            window.users.entry(user).or_default().samples += 1;
        }
    }

    pub fn credited(&mut self, at: BootNs, user: User, ns: f64) {
        self.window_at(at).users.entry(user).or_default().ns += ns;
    }

    /// Counts the windows that end by `complete_until`, which cannot change any more.
    pub fn close(&mut self, complete_until: BootNs) {
        while let Some(first) = self.open.first_entry() {
            let ends = (first.key() + 1).saturating_mul(COACTIVITY_WINDOW_NS);
            if complete_until.0 < ends {
                return;
            }
            let (number, window) = first.remove_entry();
            self.count(number, window);
        }
    }

    /// Counts all open windows, at the end of the input.
    pub fn close_all(&mut self) {
        for (number, window) in std::mem::take(&mut self.open) {
            self.count(number, window);
        }
    }

    fn count(&mut self, number: u64, window: Window) {
        let active: BTreeSet<User> = window.active().collect();
        let saturated = window.saturated(self.saturation_ratio);
        for user in &active {
            let User::Container(key) = user else { continue };
            let sums = self.sums.entry(*key).or_default();
            sums.active += window.seconds();
            if active.len() > 1 {
                sums.coactive += window.seconds();
            }
            if saturated {
                for (with, part) in window.users.iter().filter(|(with, part)| *with != user && is_user(**with) && part.ns > 0.0) {
                    sums.add(other(*with), part.ns * 1e-9);
                }
            }
        }
        if let Some(closed) = &mut self.closed {
            closed.push((number, window.clone()));
        }
        if let Some(history) = &mut self.history {
            history.insert(number, window);
        }
    }

    /// The windows that were closed since the last call. `keep`: whether to keep those that are closed from now on.
    pub fn take_closed(&mut self, keep: bool) -> Vec<(u64, Window)> {
        std::mem::replace(&mut self.closed, keep.then(Vec::new)).unwrap_or_default()
    }

    pub fn sums_of(&self, key: ContainerKey) -> Option<&Sums> {
        self.sums.get(&key)
    }

    /// Share of the last windows in which two or more users were active; `None` when none of them was observed, or too few of their samples
    /// had their process queried.
    pub fn coactive_ratio(&self) -> Option<f64> {
        // The newest window is not complete.
        let (newest, _) = self.open.last_key_value()?;
        let recent =
            self.open.range(newest.saturating_sub(RECENT)..*newest).map(|(_, window)| window).filter(|w| w.shows_users());
        let (mut observed, mut coactive) = (0.0, 0.0);
        for window in recent {
            observed += window.seconds();
            if window.active().nth(1).is_some() {
                coactive += window.seconds();
            }
        }
        (observed > 0.0).then_some(coactive / observed)
    }

    pub fn forget(&mut self, gone: impl Fn(&ContainerKey) -> bool) {
        self.sums.retain(|key, _| !gone(key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fact::HostProcess;

    const A: User = User::Container(ContainerKey(1));
    const B: User = User::Container(ContainerKey(2));
    const HOST: User = User::Host(HostProcess { pid: 7, start: BootNs(1) });

    fn window(coactivity: &mut Coactivity, n: u64, busy: f64, users: &[(User, u32, f64)]) {
        let at = BootNs(n * COACTIVITY_WINDOW_NS + 500_000_000);
        coactivity.observed(at, COACTIVITY_WINDOW_NS, busy * COACTIVITY_WINDOW_NS as f64, None);
        for (user, samples, share) in users {
            for _ in 0..*samples {
                coactivity.observed(at, 0, 0.0, Some(*user));
            }
            coactivity.credited(at, *user, share * COACTIVITY_WINDOW_NS as f64);
        }
    }

    #[test]
    fn active_coactive_and_contended_time_are_distinct() {
        let mut coactivity = Coactivity::new(0.9, false);
        window(&mut coactivity, 0, 1.0, &[(A, 3, 0.6), (B, 2, 0.4)]);
        // Not saturated.
        window(&mut coactivity, 1, 0.6, &[(A, 2, 0.3), (B, 2, 0.3)]);
        // The other user received time, and no sample named it.
        window(&mut coactivity, 2, 1.0, &[(A, 5, 0.9), (HOST, 0, 0.1)]);
        // Ambiguous time is not another user.
        window(&mut coactivity, 3, 1.0, &[(A, 5, 0.9), (User::Unattributed(Reason::Ambiguous), 1, 0.1)]);
        coactivity.close(BootNs(COACTIVITY_WINDOW_NS - 1));
        assert!(coactivity.sums_of(ContainerKey(1)).is_none(), "the first is not complete");
        coactivity.close(BootNs(4 * COACTIVITY_WINDOW_NS - 1));
        let values = |coactivity: &Coactivity, user: User| {
            let sums = coactivity.sums_of(user.container().unwrap()).unwrap();
            (sums.active, sums.coactive, sums.others.iter().map(|c| (c.other, (c.seconds * 10.0).round())).collect::<Vec<_>>())
        };
        let b = Other::Container(ContainerKey(2));
        assert_eq!(values(&coactivity, A), (3.0, 2.0, vec![(b, 4.0), (Other::Host, 1.0)]));
        assert_eq!(values(&coactivity, B), (2.0, 2.0, vec![(Other::Container(ContainerKey(1)), 6.0)]));
        coactivity.close_all();
        assert_eq!(values(&coactivity, A).0, 4.0);
    }

    #[test]
    fn users_beyond_the_limit_are_combined() {
        let mut coactivity = Coactivity::new(0.9, false);
        let others: Vec<(User, u32, f64)> = (2..14).map(|n| (User::Container(ContainerKey(n)), 1, 0.05)).collect();
        window(&mut coactivity, 0, 1.0, &[&[(A, 1, 0.4)], &others[..]].concat());
        // A later user does not replace an earlier one.
        window(&mut coactivity, 1, 1.0, &[(A, 1, 0.5), others[11]]);
        coactivity.close_all();
        let sums = coactivity.sums_of(ContainerKey(1)).unwrap();
        assert_eq!(sums.others.len(), MAX_OTHERS + 1);
        let rest = sums.others.last().unwrap();
        assert_eq!((rest.other, (rest.seconds * 100.0).round()), (Other::Rest, 25.0));
    }

    #[test]
    fn the_coactive_ratio_covers_the_last_ten_seconds() {
        let mut coactivity = Coactivity::new(0.9, false);
        assert_eq!(coactivity.coactive_ratio(), None);
        for n in 0..20 {
            let users = [(A, 1, 0.5), (B, u32::from(n % 2 == 0), 0.5)];
            window(&mut coactivity, n, 1.0, &users);
        }
        assert_eq!(coactivity.coactive_ratio(), Some(0.5));
        // Most samples of a window have an unqueried process.
        let ratio_with_unqueried = |coactivity: &mut Coactivity, unqueried: f64| {
            for n in 20..40 {
                window(coactivity, n, 1.0, &[(A, 1, 0.5)]);
                coactivity.unqueried(BootNs(n * COACTIVITY_WINDOW_NS), unqueried * COACTIVITY_WINDOW_NS as f64);
            }
            coactivity.coactive_ratio()
        };
        assert_eq!(ratio_with_unqueried(&mut coactivity, 0.1), Some(0.0));
        assert_eq!(ratio_with_unqueried(&mut coactivity, 0.5), None);
    }
}
