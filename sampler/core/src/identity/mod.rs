//! Who is who: processes over time, cgroups, containers.

mod cgroups;
mod processes;

pub use cgroups::{Cgroups, Container, ContainerChange, KEEP_REMOVED_NS, UnknownCgroup};
pub use processes::{KEEP_EXITED_NS, MAX_EXITED, Owner, Place, Processes};

use crate::labels::CgroupIdentity;
use crate::observation::{CgroupFact, ProcessFact};
use crate::units::{BootNs, ContainerKey};

/// Whom a pid's GPU time belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Container(ContainerKey),
    Host,
    /// No process known with that pid then, or one in a cgroup nobody has named.
    Unknown,
    /// The span covers owners that belong to different users.
    Ambiguous,
}

/// Processes and cgroups together.
#[derive(Debug, Default)]
pub struct Identity {
    pub processes: Processes,
    pub cgroups: Cgroups,
}

impl Identity {
    pub fn process(&mut self, fact: &ProcessFact) {
        self.processes.apply(fact);
    }

    pub fn cgroup(&mut self, fact: &CgroupFact) {
        self.cgroups.apply(fact);
    }

    /// Who had `pid` at `at`, give or take `uncertainty_ns`; `earliest` widens the question for processes that ended within
    /// the sample's own period.
    pub fn resolve(&self, pid: u32, at: BootNs, uncertainty_ns: u64, earliest: BootNs) -> Verdict {
        match self.processes.owner(pid, at.minus(uncertainty_ns), at.plus(uncertainty_ns)) {
            Owner::Places(places) => self.verdict(&places),
            Owner::Unknown => match self.processes.owner(pid, earliest.minus(uncertainty_ns), at.plus(uncertainty_ns)) {
                Owner::Places(places) => self.verdict(&places),
                Owner::Unknown => Verdict::Unknown,
            },
        }
    }

    fn verdict(&self, places: &[Place]) -> Verdict {
        let mut found: Option<Verdict> = None;
        for place in places {
            let verdict = match self.cgroups.container_of(place) {
                Ok(Some(key)) => Verdict::Container(key),
                Ok(None) => Verdict::Host,
                Err(UnknownCgroup) => Verdict::Unknown,
            };
            if found.is_some_and(|f| f != verdict) {
                return Verdict::Ambiguous;
            }
            found = Some(verdict);
        }
        found.unwrap_or(Verdict::Unknown)
    }

    pub fn expire(&mut self, now: BootNs) {
        self.processes.expire(now);
        self.cgroups.expire(now);
    }
}

/// A container as its cgroups tell it. Never changes; labels live elsewhere.
#[derive(Clone, Debug)]
pub struct ContainerRecord {
    pub key: ContainerKey,
    /// The `id` label: the container root's cgroup path. Never blank.
    pub cgroup_path: String,
    pub identity: CgroupIdentity,
    /// When its cgroup was created, or first seen by the startup scan.
    pub created: BootNs,
    /// False when it was there before the agent, so `created` is only "first seen".
    pub creation_seen: bool,
}
