//! Who holds a device: the processes that the driver lists, as users.

use std::collections::{BTreeMap, HashSet};

use crate::device::Reason;
use crate::fact::{Holder, User};
use crate::observation::ProcessKind;
use crate::units::ContainerKey;

/// Of one user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// `None` where the driver does not say it of every process: a part would look like the whole.
    pub memory_bytes: Option<u64>,
    pub mps_clients: u32,
}

const NOTHING: Held = Held { memory_bytes: Some(0), mps_clients: 0 };

#[derive(Debug, Default)]
pub struct Holders {
    /// A list was read.
    known: bool,
    held: BTreeMap<User, Held>,
    /// Of the last two lists: who is in one of them may have been there in between.
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

    /// Whose a device's busy time is where no sample names anybody: of the only one who holds it.
    pub fn only_user(&self) -> User {
        let mut users = self.users[0].union(&self.users[1]);
        match (users.next(), users.next()) {
            (None, _) => User::Nobody(Reason::NoPid),
            (Some(only), None) => *only,
            _ => User::Nobody(Reason::Ambiguous),
        }
    }

    /// As [`Holders::only_user`], for time that no sample says anything about: several are as good as none.
    pub fn sole_user(&self) -> User {
        match self.only_user() {
            User::Nobody(Reason::Ambiguous) => User::Nobody(Reason::NoPid),
            user => user,
        }
    }

    /// Who is not listed holds nothing, once a list was read.
    pub fn of(&self, user: User) -> Option<Held> {
        self.held.get(&user).copied().or(self.known.then_some(NOTHING))
    }

    pub fn containers(&self) -> impl Iterator<Item = ContainerKey> {
        self.held.keys().filter_map(|user| user.container())
    }

    pub fn forget(&mut self, gone: impl Fn(&User) -> bool) {
        self.held.retain(|user, _| !gone(user));
        // Where lists have failed since, these are of long ago.
        for users in &mut self.users {
            users.retain(|user| !gone(user));
        }
    }
}
