//! Which user a sample names, and at what times that user can have used the device.

use std::collections::HashMap;

use crate::device::Reason;
use crate::fact::{AttributedProcess, User};
use crate::units::{BootNs, ContainerKey};

/// No tick that old is still to be divided, nor remembered for errors.
const KEEP_NS: u64 = 200_000_000_000;

/// Whom a tick names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamedUser {
    pub user: User,
    pub pid: u32,
    pub since: BootNs,
}

/// Processes that have left, with the time.
#[derive(Debug, Default)]
pub struct Left(HashMap<(u32, BootNs), BootNs>);

impl User {
    pub fn is_known(self) -> bool {
        matches!(self, User::Container(_) | User::Host(_) | User::Nobody(Reason::Mps))
    }
}

impl NamedUser {
    /// Whom rows name. More than one user is more than the driver can tell: of those, who is known.
    pub fn of(rows: &[AttributedProcess]) -> Option<NamedUser> {
        let mut named: Vec<NamedUser> =
            rows.iter().map(|row| NamedUser { user: row.user, pid: row.pid, since: row.since }).collect();
        if named.iter().any(|n| n.user.is_known()) {
            named.retain(|n| n.user.is_known());
        } else if named.iter().any(|n| n.user != User::Nobody(Reason::InvalidPid)) {
            named.retain(|n| n.user != User::Nobody(Reason::InvalidPid));
        }
        let first = *named.first()?;
        let one = named.iter().all(|n| n.user == first.user);
        Some(if one { first } else { NamedUser { user: User::Nobody(Reason::Ambiguous), ..first } })
    }
}

impl Left {
    pub fn leave(&mut self, pid: u32, since: BootNs, at: BootNs) {
        self.0.insert((pid, since), at);
    }

    pub fn has_left(&self, pid: u32) -> bool {
        self.0.keys().any(|(left, _)| *left == pid)
    }

    pub fn forget(&mut self, now: BootNs) {
        self.0.retain(|_, at| now.saturating_since(*at) < KEEP_NS);
    }

    /// The part of the span of `ns` that ends at `at` in which that process was this user's. Without knowledge of the process, all of it.
    pub fn part(&self, named: &NamedUser, at: BootNs, ns: f64) -> f64 {
        match named.user {
            User::Container(_) | User::Host(_) => {
                let from = at.minus(ns as u64);
                let until = self.0.get(&(named.pid, named.since)).copied().unwrap_or(at).min(at);
                let there = until.saturating_since(from.max(named.since)) as f64;
                // An end and a sample at one instant.
                if ns > 0.0 { (there / ns).min(1.0) } else { f64::from(u8::from(self.was(named, at))) }
            }
            User::Nobody(_) => 1.0,
        }
    }

    /// Whether that process was this user's at that time. Of whom nothing is known, nothing can be denied.
    pub fn was(&self, named: &NamedUser, at: BootNs) -> bool {
        match named.user {
            User::Container(_) | User::Host(_) => {
                named.since <= at && self.0.get(&(named.pid, named.since)).is_none_or(|left| at <= *left)
            }
            User::Nobody(_) => true,
        }
    }
}

/// From a container's creation to its end, if that is known.
#[derive(Clone, Copy, Debug)]
struct Existence {
    created: BootNs,
    gone: Option<BootNs>,
}

/// When containers existed. One that was restarted has had several lives in a report, which counts them as one container.
#[derive(Debug, Default)]
pub struct Lifetimes(HashMap<ContainerKey, Vec<Existence>>);

impl Lifetimes {
    /// It exists since then.
    pub fn created(&mut self, key: ContainerKey, at: BootNs) {
        let lives = self.0.entry(key).or_default();
        match lives.iter_mut().find(|life| life.created == at) {
            Some(life) => life.gone = None,
            None => lives.push(Existence { created: at, gone: None }),
        }
    }

    /// The end of an earlier life may be known after the next has begun.
    pub fn gone(&mut self, key: ContainerKey, at: BootNs) {
        let lives = self.0.entry(key).or_default();
        let ended = lives.iter_mut().filter(|life| life.created <= at && life.gone.is_none());
        match ended.max_by_key(|life| life.created) {
            Some(life) => life.gone = Some(at),
            // Of one that was not seen to begin.
            None => lives.push(Existence { created: BootNs(0), gone: Some(at) }),
        }
    }

    pub fn forget(&mut self, key: ContainerKey) {
        self.0.remove(&key);
    }

    pub fn is_gone(&self, key: ContainerKey) -> bool {
        self.0.get(&key).is_some_and(|lives| lives.iter().all(|life| life.gone.is_some()))
    }

    /// Whether nothing shows that the user was not there in the span of `ns` that ends at `at`.
    pub fn may_have_existed(&self, user: User, at: BootNs, ns: f64) -> bool {
        match user {
            User::Container(key) => !self.0.contains_key(&key) || self.existed(user, at, ns),
            User::Host(process) => process.start <= at,
            User::Nobody(_) => true,
        }
    }

    /// Whether the container existed at some time of the span of `ns` that ends at `at`. Only a container can have had another
    /// process than the one that was named.
    pub fn existed(&self, user: User, at: BootNs, ns: f64) -> bool {
        let lives = user.container().and_then(|key| self.0.get(&key));
        let then = |life: &Existence| life.created <= at && life.gone.is_none_or(|gone| gone > at.minus(ns as u64));
        lives.is_some_and(|lives| lives.iter().any(then))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restarted_container_has_several_lives() {
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
