//! Holders of a device: the users of the processes that the driver lists.

use std::collections::BTreeMap;

use foldhash::HashSet;

use crate::device::Reason;
use crate::fact::{Holder, User};
use crate::observation::ProcessKind;
use crate::units::ContainerKey;

/// What one user holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// `None` where the driver does not report it for every process: an incomplete sum would look complete.
    pub memory_bytes: Option<u64>,
    pub mps_clients: u32,
}

const NOTHING: Held = Held { memory_bytes: Some(0), mps_clients: 0 };

#[derive(Debug, Default)]
pub struct Holders {
    /// A list was read.
    known: bool,
    held: BTreeMap<User, Held>,
    /// The users of the last two lists: a user in either may have been present between them.
    users: [HashSet<User>; 2],
}

impl Holders {
    pub fn listed(&mut self, holders: &[Holder]) {
        self.known = true;
        self.held.clear();
        self.users.swap(0, 1);
        self.users[0].clear();
        for holder in holders.iter().filter(|holder| holder.kind != ProcessKind::MpsServer) {
            self.users[0].insert(holder.user);
            let held = self.held.entry(holder.user).or_insert(NOTHING);
            held.memory_bytes = held.memory_bytes.zip(holder.memory_bytes).map(|(sum, bytes)| sum.saturating_add(bytes));
            held.mps_clients += u32::from(holder.kind == ProcessKind::Mps);
        }
    }

    /// The user of busy time for which no sample names a process: the only holder of the device.
    pub fn only_user(&self) -> User {
        let mut users = self.users[0].union(&self.users[1]);
        match (users.next(), users.next()) {
            (None, _) => User::Unattributed(Reason::NoPid),
            (Some(only), None) => *only,
            _ => User::Unattributed(Reason::Ambiguous),
        }
    }

    /// As [`Holders::only_user`], for samples without any named neighbour: several holders count as none, and so does an unknown process
    /// that is in one of the lists only. It had ended before its user was looked for, and time after that is not its own.
    pub fn sole_user(&self) -> User {
        let user = self.only_user();
        let is_in_both = self.users.iter().all(|users| users.contains(&user));
        if user.is_known() || is_in_both { user } else { User::Unattributed(Reason::NoPid) }
    }

    /// What a user holds. Once a list was read, a user that is not listed holds nothing.
    pub fn held_by(&self, user: User) -> Option<Held> {
        self.held.get(&user).copied().or(self.known.then_some(NOTHING))
    }

    /// Whether the last list has a process of the user.
    pub fn lists(&self, user: User) -> bool {
        self.held.contains_key(&user)
    }

    /// Those that do not belong to a user, with their memory.
    pub fn unattributed(&self) -> BTreeMap<Reason, Option<u64>> {
        let mut all = BTreeMap::new();
        for (user, held) in &self.held {
            let reason = match user {
                User::Container(_) => continue,
                User::Host(_) => Reason::Host,
                User::Unattributed(reason) => *reason,
            };
            let sum: &mut Option<u64> = all.entry(reason).or_insert(Some(0));
            *sum = sum.zip(held.memory_bytes).map(|(sum, bytes)| sum.saturating_add(bytes));
        }
        all
    }

    pub fn users(&self) -> impl Iterator<Item = User> {
        self.held.keys().copied()
    }

    pub fn containers(&self) -> impl Iterator<Item = ContainerKey> {
        self.held.keys().filter_map(|user| user.container())
    }

    pub fn forget(&mut self, gone: impl Fn(&User) -> bool) {
        self.held.retain(|user, _| !gone(user));
        // These may be old, if lists could not be read since.
        for users in &mut self.users {
            users.retain(|user| !gone(user));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNKNOWN: User = User::Unattributed(Reason::PidUnknown);
    const NONE: User = User::Unattributed(Reason::NoPid);

    fn holder(user: User) -> Holder {
        Holder { pid: 1, user, memory_bytes: None, kind: ProcessKind::Compute }
    }

    #[test]
    fn an_unknown_process_of_one_list_does_not_hold_the_device() {
        let mut holders = Holders::default();
        let mut sole = |users: &[User]| {
            holders.listed(&users.iter().copied().map(holder).collect::<Vec<_>>());
            (holders.only_user(), holders.sole_user())
        };
        assert_eq!(sole(&[UNKNOWN]), (UNKNOWN, NONE));
        assert_eq!(sole(&[UNKNOWN]), (UNKNOWN, UNKNOWN), "still listed, as a process of another machine is");
        assert_eq!(sole(&[]), (UNKNOWN, NONE));
        assert_eq!(sole(&[]), (NONE, NONE));
        let known = User::Container(ContainerKey(1));
        assert_eq!(sole(&[known]), (known, known));
    }
}
