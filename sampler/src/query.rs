//! Queries to the core thread about processes and containers, and their results. Results are copies: the core thread does not wait for
//! their readers.

use sampler_core::identity::{ContainerRecord, Identity, ProcessHistory, Residency};
use sampler_core::observation::CgroupMembership;
use sampler_core::units::{BootNs, ContainerKey, Tgid};
use serde::Serialize;

/// The subject of a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    Pid(u32),
    /// The path of a cgroup within its hierarchy.
    Cgroup(String),
    /// A container id, or a unique prefix of one.
    Container(String),
}

/// The result of a query in the identity tables.
#[derive(Clone, Debug)]
pub struct KnownSubject {
    /// The present or last cgroup; empty if unknown.
    pub path: String,
    pub container: Option<ContainerKey>,
    /// When the last cgroup of the container was removed.
    pub gone: Option<BootNs>,
    /// Newest first; empty for a cgroup.
    pub histories: Vec<(ProcessHistory, Vec<ResidencyView>)>,
}

#[derive(Clone, Debug)]
pub struct ResidencyView {
    pub residency: Residency,
    pub path: Option<String>,
    pub container_id: Option<String>,
}

/// A living process in the tables.
#[derive(Clone, Debug, Serialize)]
pub struct LivingProcess {
    pub pid: u32,
    /// CLOCK_BOOTTIME; with a resolution of 10 ms if it was read from /proc.
    pub start_ns: u64,
    pub v2_id: u64,
    pub v1_id: u64,
}

pub fn living(identity: &Identity) -> Vec<LivingProcess> {
    let process = |(tgid, start, membership): (Tgid, BootNs, CgroupMembership)| LivingProcess {
        pid: tgid.0,
        start_ns: start.0,
        v2_id: membership.v2_id,
        v1_id: membership.v1_id,
    };
    let mut all: Vec<LivingProcess> = identity.processes.living().map(process).collect();
    all.sort_unstable_by_key(|p| p.pid);
    all
}

pub fn known(identity: &Identity, subject: &Subject) -> Option<KnownSubject> {
    match subject {
        Subject::Pid(pid) => process(identity, *pid),
        Subject::Cgroup(path) => {
            let container = identity.cgroups.container_at(identity.cgroups.at_path(path)?);
            Some(KnownSubject { path: path.clone(), container, gone: gone(identity, container), histories: Vec::new() })
        }
        Subject::Container(id) => {
            let all = identity.cgroups.containers();
            let record = by_id(all.map(|c| &*c.record), id)?;
            let container = Some(record.key);
            Some(KnownSubject {
                path: record.cgroup_path.clone(),
                container,
                gone: gone(identity, container),
                histories: Vec::new(),
            })
        }
    }
}

fn gone(identity: &Identity, container: Option<ContainerKey>) -> Option<BootNs> {
    identity.cgroups.container(container?)?.gone
}

/// The newest container with this id; or, if the id is a prefix of only one container id, the newest container with that.
fn by_id<'a>(all: impl Iterator<Item = &'a ContainerRecord>, wanted: &str) -> Option<&'a ContainerRecord> {
    let id = |record: &&'a ContainerRecord| record.identity.container_id.as_deref().unwrap_or_default();
    let found: Vec<&ContainerRecord> = all.filter(|record| id(record).starts_with(wanted)).collect();
    let newest = |records: Vec<&'a ContainerRecord>| records.into_iter().max_by_key(|record| record.key);
    let exact: Vec<&ContainerRecord> = found.iter().copied().filter(|record| id(record) == wanted).collect();
    match exact.is_empty() {
        false => newest(exact),
        true if found.windows(2).all(|pair| id(&pair[0]) == id(&pair[1])) => newest(found),
        true => None,
    }
}

/// Container ids with this prefix, each once.
pub fn ids(identity: &Identity, prefix: &str) -> Vec<String> {
    let all = identity.cgroups.containers().filter_map(|container| container.record.identity.container_id.clone());
    let found: std::collections::BTreeSet<String> = all.filter(|id| id.starts_with(prefix)).collect();
    found.into_iter().collect()
}

fn process(identity: &Identity, pid: u32) -> Option<KnownSubject> {
    let container =
        |residency: &Residency| identity.cgroups.container_of(&residency.membership, residency.certain_from).ok().flatten();
    let view = |residency: Residency| {
        let record = container(&residency).and_then(|key| identity.cgroups.container(key)).map(|c| &c.record);
        ResidencyView {
            residency,
            path: identity.cgroups.path_of(&residency.membership),
            container_id: record.and_then(|r| r.identity.container_id.clone()),
        }
    };
    let histories: Vec<(ProcessHistory, Vec<ResidencyView>)> = identity
        .processes
        .histories(Tgid(pid))
        .into_iter()
        .map(|history| {
            let residencies = history.residencies.iter().copied().map(view).collect();
            (history, residencies)
        })
        .collect();
    let (history, residencies) = histories.first()?;
    let path = residencies.last().and_then(|r| r.path.clone()).unwrap_or_default();
    let container = history.residencies.last().and_then(container);
    Some(KnownSubject { path, container, gone: gone(identity, container), histories })
}
