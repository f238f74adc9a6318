//! Identity's answer for the pids that a device names, and when it ceased to hold.

use std::collections::{HashMap, HashSet};

use crate::device::Reason;
use crate::fact::{AttributedProcess, GpuFact, HostProcess, User};
use crate::identity::{Identity, Verdict};
use crate::observation::{ProcessKind, RunningProcess};
use crate::units::{BootNs, Tgid};

/// Who was named or listed so long ago is no neighbour of any tick that is still to be divided.
const FOLLOW_NS: u64 = 45_000_000_000;

#[derive(Debug, Default)]
pub struct Owners {
    /// By pid and since when: when it was named last.
    named: HashMap<(u32, BootNs), BootNs>,
    /// By pid and the tick of the process's start. A driver names and lists some hundred pids; all else is forgotten in time.
    sightings: HashMap<(u32, u64), DeviceSighting>,
    /// Pids of the multi-process service and of its clients: a sample names any of them for all.
    mps: HashSet<u32>,
    mps_users: HashSet<User>,
}

/// A process on this device.
#[derive(Clone, Copy, Debug)]
struct DeviceSighting {
    /// It had certainly been on it by then: what an exec after that ends may have been a GPU process.
    first: BootNs,
    last: BootNs,
}

impl Owners {
    /// The user of the process with that pid in all of the span, and since when without a break.
    fn owner(&mut self, pid: u32, span: (BootNs, BootNs), identity: &Identity) -> (User, BootNs) {
        let unknown = BootNs(0);
        if pid == 0 || pid == u32::MAX {
            return (User::Nobody(Reason::InvalidPid), unknown);
        }
        // In another kernel's pid space this number is an unrelated local process's.
        if !identity.driver_pids.is_trusted() {
            return (User::Nobody(Reason::PidUnknown), unknown);
        }
        let seen = |start: BootNs| self.sightings.get(&(pid, start.proc_tick())).map(|sighting| sighting.first);
        let verdict = identity.resolve(Tgid(pid), span, seen);
        let stay = identity.stay(Tgid(pid), span, seen);
        let (start, since) = stay.map_or((unknown, unknown), |stay| (stay.start, stay.since));
        if stay.is_some() {
            self.sighted((pid, start.proc_tick()), span.1);
        }
        match verdict {
            Verdict::Container(key) => (User::Container(key), since),
            Verdict::Host => (User::Host(HostProcess { pid, start }), since),
            Verdict::Unknown => (User::Nobody(Reason::PidUnknown), unknown),
            Verdict::Lost => (User::Nobody(Reason::Lost), unknown),
            Verdict::Ambiguous => (User::Nobody(Reason::Ambiguous), unknown),
        }
    }

    fn sighted(&mut self, process: (u32, u64), by: BootNs) {
        let sighting = self.sightings.entry(process).or_insert(DeviceSighting { first: by, last: by });
        // Samples of the other engines come later than those of compute.
        *sighting = DeviceSighting { first: sighting.first.min(by), last: sighting.last.max(by) };
    }

    /// A list that was read between `began` and `ended`: whose each process is.
    pub fn listed(&mut self, processes: &[RunningProcess], began: BootNs, ended: BootNs, identity: &Identity) -> Vec<User> {
        self.mps.clear();
        self.mps_users.clear();
        let user = |process: &RunningProcess| {
            let (user, _) = self.owner(process.pid, (began, ended), identity);
            if matches!(process.kind, ProcessKind::Mps | ProcessKind::MpsServer) {
                self.mps.insert(process.pid);
            }
            if process.kind == ProcessKind::Mps {
                self.mps_users.insert(user);
            }
            user
        };
        processes.iter().map(user).collect()
    }

    pub fn forget_lists(&mut self) {
        self.mps.clear();
        self.mps_users.clear();
    }

    /// Whose a sample is that names this pid. Clients of the multi-process service run at once and one of them is named: that is an
    /// answer only where all of them are of one container. `told` gets the end of its owner, if that is in the past already.
    pub fn row(
        &mut self,
        (pid, percent): (u32, u8),
        span: (BootNs, BootNs),
        identity: &Identity,
        told: &mut Vec<(BootNs, GpuFact)>,
    ) -> AttributedProcess {
        let unknown = BootNs(0);
        if self.mps.contains(&pid) {
            let mut users = self.mps_users.iter();
            let user = match (users.next(), users.next()) {
                (Some(only), None) => *only,
                _ => User::Nobody(Reason::Mps),
            };
            return AttributedProcess { pid, percent, user, since: unknown };
        }
        let (user, since) = self.owner(pid, span, identity);
        if matches!(user, User::Container(_) | User::Host(_)) && self.named.insert((pid, since), span.1).is_none() {
            self.left((pid, since), identity, told);
        }
        AttributedProcess { pid, percent, user, since }
    }

    /// True when it has left, which is told.
    fn left(&mut self, (pid, since): (u32, BootNs), identity: &Identity, told: &mut Vec<(BootNs, GpuFact)>) -> bool {
        let Some(until) = identity.stay_since(Tgid(pid), since) else { return false };
        told.push((until, GpuFact::Left { pid, since }));
        self.named.remove(&(pid, since));
        true
    }

    /// Tells of those who have left since they were named, and forgets whom nobody asks about any more.
    pub fn follow(&mut self, now: BootNs, identity: &Identity, told: &mut Vec<(BootNs, GpuFact)>) {
        self.named.retain(|_, last| now.saturating_since(*last) <= FOLLOW_NS);
        self.sightings.retain(|_, sighting| now.saturating_since(sighting.last) <= FOLLOW_NS);
        let mut named: Vec<(u32, BootNs)> = self.named.keys().copied().collect();
        // The order of facts is the same at every run.
        named.sort_unstable();
        for one in named {
            self.left(one, identity, told);
        }
    }
}
