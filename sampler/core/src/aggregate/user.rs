//! Whose busy time is: a container, or nobody's for a named reason.

use crate::identity::{Identity, Verdict};
use crate::snapshot::Reason;
use crate::units::{BootNs, ContainerKey};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum User {
    Container(ContainerKey),
    Nobody(Reason),
}

/// Whom a tick names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Named {
    pub user: User,
    pub pid: u32,
}

impl User {
    /// Who had the pid in all of that time.
    pub fn of(pid: u32, from: BootNs, to: BootNs, identity: &Identity) -> User {
        if pid == 0 || pid == u32::MAX {
            return User::Nobody(Reason::InvalidPid);
        }
        match identity.resolve(pid, from, to) {
            Verdict::Container(key) => User::Container(key),
            Verdict::Host => User::Nobody(Reason::Host),
            Verdict::Unknown => User::Nobody(Reason::PidUnknown),
            Verdict::Lost => User::Nobody(Reason::Lost),
            Verdict::Ambiguous => User::Nobody(Reason::Ambiguous),
        }
    }

    pub fn is_known(self) -> bool {
        matches!(self, User::Container(_) | User::Nobody(Reason::Host | Reason::Mps))
    }
}

impl Named {
    /// Whether that process was this user's at that time. Of whom nothing is known, nothing can be denied.
    pub fn was(&self, at: BootNs, identity: &Identity) -> bool {
        match self.user {
            User::Nobody(Reason::Mps) => true,
            user if user.is_known() => User::of(self.pid, at, at, identity) == user,
            _ => true,
        }
    }
}
