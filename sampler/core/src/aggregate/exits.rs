//! Which user a sample names, and at what times that user can have used the device.

use std::collections::BTreeSet;

use foldhash::HashMap;

use crate::device::Reason;
use crate::fact::{AttributedProcess, User};
use crate::units::{BootNs, ContainerKey};

/// No sample that old is still to be divided, or kept for standard errors.
const KEEP_NS: u64 = 200_000_000_000;

/// The user and the process that a sample names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamedUser {
    pub user: User,
    pub pid: u32,
    pub since: BootNs,
}

/// By pid and start of a residency: when the process ended or moved to another user.
#[derive(Debug, Default)]
pub struct Exits {
    ends: HashMap<(u32, BootNs), BootNs>,
    in_order: BTreeSet<BootNs>,
}

impl User {
    pub fn is_known(self) -> bool {
        matches!(self, User::Container(_) | User::Host(_) | User::Unattributed(Reason::Mps))
    }
}

impl NamedUser {
    /// The user that the processes of a sample name. Known users take precedence. Several users are ambiguous, as the driver names one
    /// process for each engine.
    pub fn from_processes(processes: &[AttributedProcess]) -> Option<NamedUser> {
        let mut named: Vec<NamedUser> =
            processes.iter().map(|p| NamedUser { user: p.user, pid: p.pid, since: p.since }).collect();
        if named.iter().any(|n| n.user.is_known()) {
            named.retain(|n| n.user.is_known());
        } else if named.iter().any(|n| n.user != User::Unattributed(Reason::InvalidPid)) {
            named.retain(|n| n.user != User::Unattributed(Reason::InvalidPid));
        }
        let first = *named.first()?;
        let same_user = named.iter().all(|n| n.user == first.user);
        Some(if same_user { first } else { NamedUser { user: User::Unattributed(Reason::Ambiguous), ..first } })
    }
}

impl Exits {
    pub fn record(&mut self, pid: u32, since: BootNs, at: BootNs) {
        self.ends.insert((pid, since), at);
        self.in_order.insert(at);
    }

    pub fn has_exited(&self, pid: u32) -> bool {
        self.ends.keys().any(|(exited, _)| *exited == pid)
    }

    pub fn forget(&mut self, now: BootNs) {
        self.ends.retain(|_, at| now.saturating_since(*at) < KEEP_NS);
        self.in_order = self.in_order.split_off(&now.minus(KEEP_NS));
    }

    /// The part of the span of `ns` that ends at `at` in which the process belonged to the user; all of it if the process is not known.
    pub fn part(&self, named: &NamedUser, at: BootNs, ns: f64) -> f64 {
        match named.user {
            User::Container(_) | User::Host(_) => {
                let from = at.minus(ns as u64);
                let until = self.end_of(named).unwrap_or(at).min(at);
                let present_ns = until.saturating_since(from.max(named.since)) as f64;
                // `ns` is 0 if an end and a sample are at one instant.
                if ns > 0.0 { (present_ns / ns).min(1.0) } else { f64::from(u8::from(self.was_present(named, at))) }
            }
            User::Unattributed(_) => 1.0,
        }
    }

    /// When the process ended or moved to another user, if it did.
    pub fn end_of(&self, named: &NamedUser) -> Option<BootNs> {
        self.ends.get(&(named.pid, named.since)).copied()
    }

    /// Whether any process ended in that time.
    pub fn any_between(&self, from: BootNs, to: BootNs) -> bool {
        self.in_order.range(from..=to).next().is_some()
    }

    /// Whether the process belonged to the user at that time; true if the process is not known.
    pub fn was_present(&self, named: &NamedUser, at: BootNs) -> bool {
        match named.user {
            User::Container(_) | User::Host(_) => named.since <= at && self.end_of(named).is_none_or(|end| at <= end),
            User::Unattributed(_) => true,
        }
    }
}

/// The time from a container's creation to its end, if the end is known.
#[derive(Clone, Copy, Debug)]
struct Existence {
    created: BootNs,
    gone: Option<BootNs>,
}

/// When containers existed. A restarted container existed several times in a report, which counts it as one container.
#[derive(Debug, Default)]
pub struct Lifetimes(HashMap<ContainerKey, Vec<Existence>>);

impl Lifetimes {
    /// The container exists since `at`.
    pub fn created(&mut self, key: ContainerKey, at: BootNs) {
        let existences = self.0.entry(key).or_default();
        match existences.iter_mut().find(|existence| existence.created == at) {
            Some(existence) => existence.gone = None,
            None => existences.push(Existence { created: at, gone: None }),
        }
    }

    /// The container ended at `at`. The end of an earlier existence may be reported after the next has begun.
    pub fn gone(&mut self, key: ContainerKey, at: BootNs) {
        let existences = self.0.entry(key).or_default();
        let ended = existences.iter_mut().filter(|existence| existence.created <= at && existence.gone.is_none());
        match ended.max_by_key(|existence| existence.created) {
            Some(existence) => existence.gone = Some(at),
            // The start was not observed.
            None => existences.push(Existence { created: BootNs(0), gone: Some(at) }),
        }
    }

    pub fn forget(&mut self, key: ContainerKey) {
        self.0.remove(&key);
    }

    pub fn is_gone(&self, key: ContainerKey) -> bool {
        self.0.get(&key).is_some_and(|existences| existences.iter().all(|existence| existence.gone.is_some()))
    }

    /// Whether the user may have existed in the span of `ns` that ends at `at`: nothing known excludes it.
    pub fn may_have_existed(&self, user: User, at: BootNs, ns: f64) -> bool {
        match user {
            User::Container(key) => !self.0.contains_key(&key) || self.existed(user, at, ns),
            User::Host(process) => process.start <= at,
            User::Unattributed(_) => true,
        }
    }

    /// Whether the container existed at some time in the span of `ns` that ends at `at`. False for other users: only a container can have
    /// other processes than the named one.
    pub fn existed(&self, user: User, at: BootNs, ns: f64) -> bool {
        let existences = user.container().and_then(|key| self.0.get(&key));
        let then =
            |existence: &Existence| existence.created <= at && existence.gone.is_none_or(|gone| gone > at.minus(ns as u64));
        existences.is_some_and(|existences| existences.iter().any(then))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restarted_container_exists_several_times() {
        let (key, user) = (ContainerKey(1), User::Container(ContainerKey(1)));
        let mut lifetimes = Lifetimes::default();
        assert!(lifetimes.may_have_existed(user, BootNs(5), 1.0), "nothing is known of it");
        lifetimes.created(key, BootNs(10));
        lifetimes.created(key, BootNs(30));
        lifetimes.gone(key, BootNs(20));
        let existed = [5, 15, 25, 35].map(|at| lifetimes.existed(user, BootNs(at), 1.0));
        assert_eq!((existed, lifetimes.is_gone(key)), ([false, true, false, true], false));
        assert!(!lifetimes.may_have_existed(user, BootNs(25), 1.0));
        lifetimes.gone(key, BootNs(40));
        assert!(lifetimes.is_gone(key) && !lifetimes.existed(user, BootNs(50), 1.0));
    }
}
