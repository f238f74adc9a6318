//! Whom a tick names, and how long that process was there.

use std::collections::HashMap;

use crate::fact::{Row, User};
use crate::snapshot::Reason;
use crate::units::BootNs;

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
