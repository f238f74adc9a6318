//! Who was active when, and with whom: windows of a second, the ground of all that is said about contention.
//!
//! ```text
//!  tick, booked seconds -> open windows -> closed once nothing in them can change -> sums, and for a report all of them
//! ```
//! A user is *active* in a window in which a sample named it; *co-active* if another was, too; the GPU is *saturated* in it if it was
//! busy for a given part of what was observed. What others got in windows in which a user was active and the GPU saturated is
//! its contention. A user whose share is small is named in few windows: the number of samples is told with every sum.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::device::Reason;
use crate::fact::User;
use crate::snapshot::{Contention, MAX_OTHERS, Other};
use crate::units::{BootNs, ContainerKey};

pub const TOGETHER_NS: u64 = 1_000_000_000;
/// A window of which less was observed says nothing about saturation.
const OBSERVED_NS: u64 = TOGETHER_NS / 2;
/// Windows of which the live share of co-activity is told.
const RECENT: u64 = 10;
/// Of a window's busy time, the part whose process must have been queried for it to show who was active together.
pub const QUERIED_RATIO: f64 = 0.8;

/// What a user had of a window.
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
    /// Of `busy_ns`, that of samples whose process was not queried.
    pub unqueried_ns: f64,
    pub users: BTreeMap<User, Part>,
}

/// Who counts as a user of a window. Time that one of several had (ambiguous), or that nobody had, is no further one's.
pub fn is_user(user: User) -> bool {
    !matches!(user, User::Nobody(Reason::NoPid | Reason::InvalidPid | Reason::Ambiguous))
}

impl Window {
    pub fn active(&self) -> impl Iterator<Item = User> {
        self.users.iter().filter(|(user, part)| part.samples > 0 && is_user(**user)).map(|(user, _)| *user)
    }

    /// Whether enough of it was queried to show who was active together.
    pub fn shows_users(&self) -> bool {
        self.unqueried_ns <= (1.0 - QUERIED_RATIO) * self.busy_ns
    }

    pub fn saturated(&self, ratio: f64) -> bool {
        self.observed_ns >= OBSERVED_NS && self.busy_ns >= ratio * self.observed_ns as f64
    }

    pub fn seconds(&self) -> f64 {
        self.observed_ns.min(TOGETHER_NS) as f64 * 1e-9
    }
}

/// Of one container.
#[derive(Clone, Debug, Default)]
pub struct Sums {
    pub active: f64,
    pub coactive: f64,
    others: Vec<Contention>,
}

impl Sums {
    pub fn others(&self) -> &[Contention] {
        &self.others
    }

    fn add(&mut self, other: Other, seconds: f64) {
        if let Some(known) = self.others.iter_mut().find(|known| known.other == other) {
            known.seconds += seconds;
            return;
        }
        let told_apart = self.others.iter().filter(|known| known.other != Other::Rest).count();
        if told_apart < MAX_OTHERS {
            self.others.push(Contention { other, seconds });
        } else if let Some(rest) = self.others.iter_mut().find(|known| known.other == Other::Rest) {
            rest.seconds += seconds;
        } else {
            self.others.push(Contention { other: Other::Rest, seconds });
        }
    }
}

fn other(user: User) -> Other {
    match user {
        User::Container(key) => Other::Container(key),
        User::Host(_) => Other::Host,
        User::Nobody(_) => Other::Unknown,
    }
}

#[derive(Debug)]
pub struct Coactivity {
    saturation_ratio: f64,
    open: BTreeMap<u64, Window>,
    sums: HashMap<ContainerKey, Sums>,
    /// All that were closed, by their number; only kept for reports.
    pub history: Option<BTreeMap<u64, Window>>,
}

fn number(at: BootNs) -> u64 {
    at.0 / TOGETHER_NS
}

impl Coactivity {
    pub fn new(saturation_ratio: f64, keep_history: bool) -> Self {
        Self { saturation_ratio, open: BTreeMap::new(), sums: HashMap::new(), history: keep_history.then(BTreeMap::new) }
    }

    fn at(&mut self, at: BootNs) -> &mut Window {
        self.open.entry(number(at)).or_default()
    }

    pub fn unqueried(&mut self, at: BootNs, busy_ns: f64) {
        self.at(at).unqueried_ns += busy_ns;
    }

    pub fn observed(&mut self, at: BootNs, ns: u64, busy_ns: f64, named: Option<User>) {
        let window = self.at(at);
        window.observed_ns = window.observed_ns.saturating_add(ns);
        window.busy_ns += busy_ns;
        if let Some(user) = named {
            window.users.entry(user).or_default().samples += 1;
        }
    }

    pub fn credited(&mut self, at: BootNs, user: User, ns: f64) {
        self.at(at).users.entry(user).or_default().ns += ns;
    }

    /// Counts the windows that end by then, in which nothing can change any more.
    pub fn close(&mut self, complete_until: BootNs) {
        while let Some(first) = self.open.first_entry() {
            let ends = (first.key() + 1).saturating_mul(TOGETHER_NS);
            if complete_until.0 < ends {
                return;
            }
            let (number, window) = first.remove_entry();
            self.count(number, window);
        }
    }

    /// All of them: nothing more will come.
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
        if let Some(history) = &mut self.history {
            history.insert(number, window);
        }
    }

    pub fn of(&self, key: ContainerKey) -> Option<&Sums> {
        self.sums.get(&key)
    }

    /// Part of the last windows in which two users or more were active; `None` when nothing of them was observed, or too few of their
    /// samples had their process queried.
    pub fn coactive_ratio(&self) -> Option<f64> {
        // The newest is not over.
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

    fn window(together: &mut Coactivity, n: u64, busy: f64, users: &[(User, u32, f64)]) {
        let at = BootNs(n * TOGETHER_NS + 500_000_000);
        together.observed(at, TOGETHER_NS, busy * TOGETHER_NS as f64, None);
        for (user, samples, share) in users {
            for _ in 0..*samples {
                together.observed(at, 0, 0.0, Some(*user));
            }
            together.credited(at, *user, share * TOGETHER_NS as f64);
        }
    }

    #[test]
    fn active_together_and_saturated_are_three_things() {
        let mut together = Coactivity::new(0.9, false);
        window(&mut together, 0, 1.0, &[(A, 3, 0.6), (B, 2, 0.4)]);
        // Not saturated.
        window(&mut together, 1, 0.6, &[(A, 2, 0.3), (B, 2, 0.3)]);
        // The other got something, and no sample named it.
        window(&mut together, 2, 1.0, &[(A, 5, 0.9), (HOST, 0, 0.1)]);
        // Nobody in particular is no other user.
        window(&mut together, 3, 1.0, &[(A, 5, 0.9), (User::Nobody(Reason::Ambiguous), 1, 0.1)]);
        together.close(BootNs(TOGETHER_NS - 1));
        assert!(together.of(ContainerKey(1)).is_none(), "the first is not complete");
        together.close(BootNs(4 * TOGETHER_NS - 1));
        let of = |together: &Coactivity, user: User| {
            let sums = together.of(user.container().unwrap()).unwrap();
            (sums.active, sums.coactive, sums.others().iter().map(|c| (c.other, (c.seconds * 10.0).round())).collect::<Vec<_>>())
        };
        let b = Other::Container(ContainerKey(2));
        assert_eq!(of(&together, A), (3.0, 2.0, vec![(b, 4.0), (Other::Host, 1.0)]));
        assert_eq!(of(&together, B), (2.0, 2.0, vec![(Other::Container(ContainerKey(1)), 6.0)]));
        together.close_all();
        assert_eq!(of(&together, A).0, 4.0);
    }

    #[test]
    fn beyond_eight_others_the_rest_are_one() {
        let mut together = Coactivity::new(0.9, false);
        let others: Vec<(User, u32, f64)> = (2..14).map(|n| (User::Container(ContainerKey(n)), 1, 0.05)).collect();
        window(&mut together, 0, 1.0, &[&[(A, 1, 0.4)], &others[..]].concat());
        // Nobody is put into another's place later on.
        window(&mut together, 1, 1.0, &[(A, 1, 0.5), others[11]]);
        together.close_all();
        let sums = together.of(ContainerKey(1)).unwrap();
        assert_eq!(sums.others().len(), MAX_OTHERS + 1);
        let rest = sums.others().last().unwrap();
        assert_eq!((rest.other, (rest.seconds * 100.0).round()), (Other::Rest, 25.0));
    }

    #[test]
    fn how_much_of_the_last_ten_seconds_was_shared() {
        let mut together = Coactivity::new(0.9, false);
        assert_eq!(together.coactive_ratio(), None);
        for n in 0..20 {
            let users = [(A, 1, 0.5), (B, u32::from(n % 2 == 0), 0.5)];
            window(&mut together, n, 1.0, &users);
        }
        assert_eq!(together.coactive_ratio(), Some(0.5));
        // Of most samples in a window the process is not known.
        let named_often = |together: &mut Coactivity, unqueried: f64| {
            for n in 20..40 {
                window(together, n, 1.0, &[(A, 1, 0.5)]);
                together.unqueried(BootNs(n * TOGETHER_NS), unqueried * TOGETHER_NS as f64);
            }
            together.coactive_ratio()
        };
        assert_eq!(named_often(&mut together, 0.1), Some(0.0));
        assert_eq!(named_often(&mut together, 0.5), None);
    }
}
