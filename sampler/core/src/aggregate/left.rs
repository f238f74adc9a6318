//! Which user a sample names, and at what times that user can have used the device.

use std::collections::HashMap;

use crate::fact::{Row, User};
use crate::snapshot::Reason;
use crate::units::{BootNs, ContainerKey};

/// No tick that old is still to be divided, nor remembered for errors.
const KEEP_NS: u64 = 200_000_000_000;

/// Whom a tick names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Named {
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

impl Named {
    /// Whom rows name. More than one user is more than the driver can tell: of those, who is known.
    pub fn of(rows: &[Row]) -> Option<Named> {
        let mut named: Vec<Named> = rows.iter().map(|row| Named { user: row.user, pid: row.pid, since: row.since }).collect();
        if named.iter().any(|n| n.user.is_known()) {
            named.retain(|n| n.user.is_known());
        } else if named.iter().any(|n| n.user != User::Nobody(Reason::InvalidPid)) {
            named.retain(|n| n.user != User::Nobody(Reason::InvalidPid));
        }
        let first = *named.first()?;
        let one = named.iter().all(|n| n.user == first.user);
        Some(if one { first } else { Named { user: User::Nobody(Reason::Ambiguous), ..first } })
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
    pub fn part(&self, named: &Named, at: BootNs, ns: f64) -> f64 {
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
    pub fn was(&self, named: &Named, at: BootNs) -> bool {
        match named.user {
            User::Container(_) | User::Host(_) => {
                named.since <= at && self.0.get(&(named.pid, named.since)).is_none_or(|left| at <= *left)
            }
            User::Nobody(_) => true,
        }
    }
}

/// When containers existed.
#[derive(Debug, Default)]
pub struct Lifetimes(HashMap<ContainerKey, (BootNs, Option<BootNs>)>);

impl Lifetimes {
    /// It exists since then.
    pub fn created(&mut self, key: ContainerKey, at: BootNs) {
        self.0.insert(key, (at, None));
    }

    pub fn gone(&mut self, key: ContainerKey, at: BootNs) {
        self.0.entry(key).or_default().1 = Some(at);
    }

    pub fn forget(&mut self, key: ContainerKey) {
        self.0.remove(&key);
    }

    pub fn is_gone(&self, key: ContainerKey) -> bool {
        self.0.get(&key).is_some_and(|(_, gone)| gone.is_some())
    }

    /// Whether the container existed at some time of the span of `ns` that ends at `at`. Only a container can have had another
    /// process than the one that was named.
    pub fn existed(&self, user: User, at: BootNs, ns: f64) -> bool {
        let span = user.container().and_then(|key| self.0.get(&key));
        span.is_some_and(|(created, gone)| *created <= at && gone.is_none_or(|gone| gone > at.minus(ns as u64)))
    }
}
