//! Resolves the pids that a device names to users, and reports when such a resolution ends.

use foldhash::{HashMap, HashSet};

use crate::device::Reason;
use crate::fact::{AttributedProcess, GpuFact, HostProcess, User};
use crate::identity::{Identity, Verdict};
use crate::observation::{ProcessKind, RunningProcess};
use crate::units::{BootNs, Tgid};

/// A process that was last named or listed this long ago is not a neighbour of any sample that is still to be divided.
const FOLLOW_NS: u64 = 45_000_000_000;
const SECOND_NS: u64 = 1_000_000_000;
/// Clients in a second that are followed.
const MAX_CLIENTS: u32 = 256;
const MAX_CLIENTS_OF_USER: u32 = 32;

#[derive(Debug, Default)]
pub struct ProcessAttribution {
    /// By pid and start of the residency: when it was named last, or called cuInit.
    named: HashMap<(u32, BootNs), BootNs>,
    /// By pid and the clock tick of the process's start. A driver names and lists some hundred pids; older entries expire.
    sightings: HashMap<(u32, u64), DeviceSighting>,
    /// Pids of the multi-process service and of its clients: a sample names any one of them for all.
    mps: HashSet<u32>,
    mps_users: HashSet<User>,
    /// A second, and the clients in it by user.
    clients_in: (u64, HashMap<User, u32>),
}

/// A process on this device.
#[derive(Clone, Copy, Debug)]
struct DeviceSighting {
    /// The process had certainly used the device by then: an image that a later exec replaced may have been a GPU process.
    first: BootNs,
    last: BootNs,
}

impl ProcessAttribution {
    /// The user of the process that had the pid during the whole span, and since when it has been that user without interruption.
    fn resolve(&mut self, pid: u32, span: (BootNs, BootNs), identity: &Identity) -> (User, BootNs) {
        let unknown = BootNs(0);
        if pid == 0 || pid == u32::MAX {
            return (User::Unattributed(Reason::InvalidPid), unknown);
        }
        // In another kernel's pid space this number belongs to an unrelated local process.
        if !identity.driver_pids.is_trusted() {
            return (User::Unattributed(Reason::PidUnknown), unknown);
        }
        let seen = |start| self.first_sighting(pid, start);
        let verdict = identity.resolve(Tgid(pid), span, seen);
        let residency = identity.residency(Tgid(pid), span, seen);
        let (start, since) = residency.map_or((unknown, unknown), |residency| (residency.start, residency.since));
        if residency.is_some() {
            self.record_sighting((pid, start.proc_tick()), span.1);
        }
        match verdict {
            Verdict::Container(key) => (User::Container(key), since),
            Verdict::Host => (User::Host(HostProcess { pid, start }), since),
            Verdict::Unknown => (User::Unattributed(Reason::PidUnknown), unknown),
            Verdict::Lost => (User::Unattributed(Reason::Lost), unknown),
            Verdict::Ambiguous => (User::Unattributed(Reason::Ambiguous), unknown),
        }
    }

    /// By when the process had certainly used the device.
    fn first_sighting(&self, pid: u32, start: BootNs) -> Option<BootNs> {
        self.sightings.get(&(pid, start.proc_tick())).map(|sighting| sighting.first)
    }

    fn record_sighting(&mut self, process: (u32, u64), by: BootNs) {
        let sighting = self.sightings.entry(process).or_insert(DeviceSighting { first: by, last: by });
        // Samples of the other engines arrive later than those of compute.
        *sighting = DeviceSighting { first: sighting.first.min(by), last: sighting.last.max(by) };
    }

    /// The user of each process of a list that was read between `began` and `ended`.
    pub fn attribute_list(
        &mut self,
        processes: &[RunningProcess],
        began: BootNs,
        ended: BootNs,
        identity: &Identity,
    ) -> Vec<User> {
        self.forget_lists();
        let user = |process: &RunningProcess| {
            let (user, _) = self.resolve(process.pid, (began, ended), identity);
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

    /// The user of a sample that names this pid. Clients of the multi-process service run concurrently and the driver names one of them:
    /// the user is known only where all of them are of one container. If the residency has already ended, its end is added to `facts`.
    pub fn attribute(
        &mut self,
        (pid, percent): (u32, u8),
        span: (BootNs, BootNs),
        identity: &Identity,
        facts: &mut Vec<(BootNs, GpuFact)>,
    ) -> AttributedProcess {
        let unknown = BootNs(0);
        if self.mps.contains(&pid) {
            let mut users = self.mps_users.iter();
            let user = match (users.next(), users.next()) {
                (Some(only), None) => *only,
                _ => User::Unattributed(Reason::Mps),
            };
            return AttributedProcess { pid, percent, user, since: unknown };
        }
        let (user, since) = self.resolve(pid, span, identity);
        if matches!(user, User::Container(_) | User::Host(_)) && self.named.insert((pid, since), span.1).is_none() {
            self.report_departure((pid, since), identity, facts);
        }
        AttributedProcess { pid, percent, user, since }
    }

    /// Since when the process has belonged to its user without interruption.
    pub fn since(&self, pid: u32, at: BootNs, identity: &Identity) -> BootNs {
        let seen = |start| self.first_sighting(pid, start);
        identity.residency(Tgid(pid), (at, at), seen).map_or(at, |residency| residency.since)
    }

    /// Follows a client from `at` on, until it ends; false if it is followed already, or its user or all users have started too many in this
    /// second.
    pub fn follow_client(&mut self, process: (u32, BootNs), user: User, at: BootNs) -> bool {
        if at.0 / SECOND_NS > self.clients_in.0 {
            self.clients_in = (at.0 / SECOND_NS, HashMap::default());
        }
        let of_user = self.clients_in.1.get(&user).copied().unwrap_or_default();
        let of_all: u32 = self.clients_in.1.values().sum();
        if self.named.contains_key(&process) || of_user >= MAX_CLIENTS_OF_USER || of_all >= MAX_CLIENTS {
            return false;
        }
        self.clients_in.1.insert(user, of_user + 1);
        self.named.insert(process, at);
        true
    }

    /// Returns true, and adds the end to `facts`, if the residency has ended.
    pub fn report_departure(
        &mut self,
        (pid, since): (u32, BootNs),
        identity: &Identity,
        facts: &mut Vec<(BootNs, GpuFact)>,
    ) -> bool {
        let Some(until) = identity.residency_end(Tgid(pid), since) else { return false };
        facts.push((until, GpuFact::Left { pid, since }));
        self.named.remove(&(pid, since));
        true
    }

    /// Reports the residencies that have ended since they were named, and drops entries that are no longer needed.
    pub fn report_departures(&mut self, now: BootNs, identity: &Identity, facts: &mut Vec<(BootNs, GpuFact)>) {
        self.named.retain(|_, last| now.saturating_since(*last) <= FOLLOW_NS);
        self.sightings.retain(|_, sighting| now.saturating_since(sighting.last) <= FOLLOW_NS);
        let mut named: Vec<(u32, BootNs)> = self.named.keys().copied().collect();
        // Sorted, so that the order of facts is deterministic.
        named.sort_unstable();
        for process in named {
            self.report_departure(process, identity, facts);
        }
    }
}
