//! Who holds a device: the processes that the driver lists, as users.

use std::collections::{HashMap, HashSet};

use super::user::User;
use crate::identity::Identity;
use crate::observation::{ProcessKind, RunningProcess};
use crate::snapshot::Reason;
use crate::units::{BootNs, ContainerKey};

/// Of one container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// `None` where the driver does not say it of every process: a part would look like the whole.
    pub memory_bytes: Option<u64>,
    pub mps_clients: u32,
}

#[derive(Debug, Default)]
pub struct Holders {
    /// A list was read.
    known: bool,
    containers: HashMap<ContainerKey, Held>,
    /// Of the last two lists: who is in one of them may have been there in between.
    users: [HashSet<User>; 2],
    /// Pids of the multi-process service and of its clients: a sample names any of them for all.
    mps: HashSet<u32>,
    mps_users: HashSet<User>,
}

impl Holders {
    /// A list that was read between `began` and `ended`.
    pub fn listed(&mut self, processes: &[RunningProcess], began: BootNs, ended: BootNs, identity: &Identity) {
        self.known = true;
        self.containers.clear();
        self.mps.clear();
        self.mps_users.clear();
        self.users.swap(0, 1);
        self.users[0].clear();
        for process in processes {
            let user = User::of(process.pid, began, ended, identity);
            match process.kind {
                ProcessKind::Mps => {
                    self.mps.insert(process.pid);
                    self.mps_users.insert(user);
                }
                ProcessKind::MpsServer => {
                    self.mps.insert(process.pid);
                    continue;
                }
                ProcessKind::Compute | ProcessKind::Graphics => {}
            }
            self.users[0].insert(user);
            if let User::Container(key) = user {
                let none = Held { memory_bytes: Some(0), mps_clients: 0 };
                let held = self.containers.entry(key).or_insert(none);
                held.memory_bytes = held.memory_bytes.zip(process.memory_bytes).map(|(sum, bytes)| sum.saturating_add(bytes));
                held.mps_clients += u32::from(process.kind == ProcessKind::Mps);
            }
        }
    }

    /// Whose a sample is that names this pid. Clients of the multi-process service run at once and one of them is named: that is an
    /// answer only where all of them are of one container.
    pub fn user(&self, pid: u32, from: BootNs, to: BootNs, identity: &Identity) -> User {
        if !self.mps.contains(&pid) {
            return User::of(pid, from, to, identity);
        }
        let mut users = self.mps_users.iter();
        match (users.next(), users.next()) {
            (Some(only), None) => *only,
            _ => User::Nobody(Reason::Mps),
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
    pub fn of(&self, key: ContainerKey) -> Option<Held> {
        let none = Held { memory_bytes: Some(0), mps_clients: 0 };
        self.containers.get(&key).copied().or(self.known.then_some(none))
    }

    pub fn containers(&self) -> impl Iterator<Item = ContainerKey> {
        self.containers.keys().copied()
    }

    pub fn forget(&mut self, gone: impl Fn(&ContainerKey) -> bool) {
        self.containers.retain(|key, _| !gone(key));
        // Where lists have failed since, these are of long ago.
        for users in self.users.iter_mut().chain([&mut self.mps_users]) {
            users.retain(|user| !matches!(user, User::Container(key) if gone(key)));
        }
    }
}
