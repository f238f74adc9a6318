//! Clients of a device: processes that called cuInit, whether a sample names them or not. They are known only where wait probes are attached.
//!
//! A driver that names no process that has ended by the read of a sample (`naming`) does not name a process of a fraction of a second at
//! all: only its first call shows that it was there.

use std::collections::VecDeque;

use foldhash::{HashMap, HashSet};

use super::divide::Sample;
use super::exits::{Exits, NamedUser};
use crate::fact::User;
use crate::units::BootNs;

/// A client that called cuInit that long before a sample is named by the driver if it uses the device.
const FRESH_NS: u64 = 30_000_000_000;
/// No sample of that age is still to be divided.
const KEEP_NS: u64 = FRESH_NS + 20_000_000_000;
/// Clients kept, and those of one user; the newest replace the oldest.
const MAX_CLIENTS: usize = 4096;
const MAX_OF_USER: u32 = 256;

#[derive(Clone, Copy, Debug)]
struct Client {
    process: NamedUser,
    /// When it called cuInit.
    from: BootNs,
}

#[derive(Debug, Default)]
pub struct Clients {
    /// In the order of their facts.
    all: VecDeque<Client>,
    known: HashSet<(u32, BootNs)>,
    of_user: HashMap<User, u32>,
}

impl Clients {
    /// A process that is added again keeps its first call.
    pub fn add(&mut self, process: NamedUser, from: BootNs) {
        if self.known.contains(&(process.pid, process.since)) {
            return;
        }
        if self.of_user.get(&process.user).is_some_and(|n| *n >= MAX_OF_USER) {
            let oldest = self.all.iter().position(|client| client.process.user == process.user);
            oldest.into_iter().for_each(|oldest| self.remove(oldest));
        } else if self.all.len() >= MAX_CLIENTS {
            self.remove(0);
        }
        self.known.insert((process.pid, process.since));
        *self.of_user.entry(process.user).or_default() += 1;
        self.all.push_back(Client { process, from });
    }

    fn remove(&mut self, n: usize) {
        let Some(Client { process, .. }) = self.all.remove(n) else { return };
        self.known.remove(&(process.pid, process.since));
        match self.of_user.get_mut(&process.user) {
            Some(n) if *n > 1 => *n -= 1,
            _ => _ = self.of_user.remove(&process.user),
        }
    }

    /// Drops clients that called cuInit long before `now`.
    pub fn forget(&mut self, now: BootNs) {
        while self.all.front().is_some_and(|client| now.saturating_since(client.from) >= KEEP_NS) {
            self.remove(0);
        }
    }

    /// Each client that existed in the sample's period and had ended when the sample was read, with the part of the period in which it
    /// existed.
    pub fn ended(&self, sample: Sample, exits: &Exits) -> impl Iterator<Item = (NamedUser, f64)> {
        let (begin, read) = sample.until_read();
        self.all.iter().filter_map(move |Client { process, from }| {
            let end = exits.end_of(process).filter(|end| *end <= read && sample.at.saturating_since(*from) < FRESH_NS)?;
            let present_ns = end.min(sample.at).saturating_since(begin.max(*from));
            (present_ns > 0).then(|| (*process, present_ns as f64 / sample.span_ns.max(1.0)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ContainerKey;

    const MS: u64 = 1_000_000;

    #[test]
    fn ended_clients_count_by_the_part_of_the_period_in_which_they_existed() {
        let process = |pid: u32| NamedUser { user: User::Container(ContainerKey(pid.into())), pid, since: BootNs(0) };
        let (mut clients, mut exits) = (Clients::default(), Exits::default());
        for (pid, from, until) in [(1, 950, Some(1_050)), (2, 1_050, None), (3, 500, Some(900)), (4, 1_050, Some(2_000))] {
            clients.add(process(pid), BootNs(from * MS));
            if let Some(until) = until {
                exits.record(pid, BootNs(0), BootNs(until * MS));
            }
        }
        let sample = Sample { at: BootNs(1_100 * MS), span_ns: 100e6, busy_ns: 50e6, queried: true };
        let ended: Vec<(u32, f64)> = clients.ended(sample, &exits).map(|(process, part)| (process.pid, part)).collect();
        assert_eq!(ended, [(1, 0.5)], "the second lives, the third ended before, the fourth long after the read");
        // A second call changes nothing.
        clients.add(process(1), BootNs(1_040 * MS));
        assert_eq!(clients.ended(sample, &exits).map(|(_, part)| part).collect::<Vec<_>>(), [0.5]);
        clients.forget(BootNs(950 * MS + KEEP_NS));
        assert_eq!(clients.all.len(), 3);
    }

    #[test]
    fn users_with_many_clients_leave_room_for_others() {
        let process = |pid: u32, key: u64| NamedUser { user: User::Container(ContainerKey(key)), pid, since: BootNs(0) };
        let mut clients = Clients::default();
        for pid in 0..1_000 {
            clients.add(process(pid, 1), BootNs(MS));
        }
        let pids: Vec<u32> = clients.all.iter().map(|client| client.process.pid).collect();
        assert_eq!((pids.len(), pids.last()), (MAX_OF_USER as usize, Some(&999)), "the newest");
        for n in 0..10_000 {
            clients.add(process(1_000 + n, 2 + u64::from(n)), BootNs(MS));
        }
        assert_eq!((clients.all.len(), clients.known.len(), clients.of_user.len()), (MAX_CLIENTS, MAX_CLIENTS, MAX_CLIENTS));
        clients.forget(BootNs(MS + KEEP_NS));
        assert_eq!((clients.all.len(), clients.known.len(), clients.of_user.len()), (0, 0, 0));
    }
}
