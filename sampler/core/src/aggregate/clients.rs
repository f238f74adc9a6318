//! Clients of a device: processes that called cuInit, whether a sample names them or not. They are known only where wait probes are attached.
//!
//! A driver that names no process that has ended by the read of a sample (`naming`) does not name a process of a fraction of a second at
//! all: only its first call shows that it was there.

use std::collections::VecDeque;

use foldhash::HashMap;

use super::divide::Sample;
use super::exits::{Exits, NamedUser};
use crate::fact::User;
use crate::units::BootNs;

/// A client of that age is named by the driver if it uses the device, and no older sample is still to be divided.
const FRESH_NS: u64 = 45_000_000_000;
/// Clients kept, and those of one user.
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
    of_user: HashMap<User, u32>,
}

impl Clients {
    /// A process is added once.
    pub fn add(&mut self, process: NamedUser, from: BootNs) {
        let n = self.of_user.entry(process.user).or_default();
        if *n < MAX_OF_USER && self.all.len() < MAX_CLIENTS {
            *n += 1;
            self.all.push_back(Client { process, from });
        }
    }

    /// Drops clients that called cuInit long before `now`.
    pub fn forget(&mut self, now: BootNs) {
        if self.all.is_empty() {
            return;
        }
        self.all.retain(|client| now.saturating_since(client.from) < FRESH_NS);
        self.of_user.clear();
        for client in &self.all {
            *self.of_user.entry(client.process.user).or_default() += 1;
        }
    }

    /// Each client that existed in the sample's period and had ended when the sample was read, with the part of the period in which it
    /// existed.
    pub fn ended(&self, sample: &Sample, exits: &Exits) -> impl Iterator<Item = (NamedUser, f64)> {
        let (begin, read) = sample.until_read();
        self.all.iter().filter_map(move |Client { process, from }| {
            let end = exits.end_of(process).filter(|end| *end <= read)?;
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
        let ended: Vec<(u32, f64)> = clients.ended(&sample, &exits).map(|(process, part)| (process.pid, part)).collect();
        assert_eq!(ended, [(1, 0.5)], "the second lives, the third ended before, the fourth long after the read");
        clients.forget(BootNs(1_000 * MS + FRESH_NS));
        assert_eq!(clients.all.len(), 2);
        for pid in 0..1_000 {
            clients.add(NamedUser { user: process(9).user, ..process(pid) }, BootNs(1_000 * MS));
        }
        assert_eq!(clients.all.len(), 2 + MAX_OF_USER as usize, "others have room");
    }
}
