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
    /// A cgroup's path within its hierarchy.
    Cgroup(String),
    /// A container's id, or enough of its beginning.
    Container(String),
}

/// What identity knows of a subject.
#[derive(Clone, Debug)]
pub struct KnownSubject {
    /// Where it is now, or was last; blank when its cgroup is unknown.
    pub path: String,
    pub container: Option<ContainerKey>,
    /// When the container's last cgroup was removed.
    pub gone: Option<BootNs>,
    /// Newest first; empty for a cgroup.
    pub lives: Vec<(ProcessHistory, Vec<ResidencyView>)>,
}

#[derive(Clone, Debug)]
pub struct ResidencyView {
    pub stay: Residency,
    pub path: Option<String>,
    pub container_id: Option<String>,
}

/// A living process in the tables.
#[derive(Clone, Debug, Serialize)]
pub struct LivingProcess {
    pub pid: u32,
    /// CLOCK_BOOTTIME; to 10 ms where it comes from /proc.
    pub start_ns: u64,
    pub v2_id: u64,
    pub v1_id: u64,
}

pub fn living(identity: &Identity) -> Vec<LivingProcess> {
    let one = |(tgid, start, place): (Tgid, BootNs, CgroupMembership)| LivingProcess {
        pid: tgid.0,
        start_ns: start.0,
        v2_id: place.v2_id,
        v1_id: place.v1_id,
    };
    let mut all: Vec<LivingProcess> = identity.processes.living().map(one).collect();
    all.sort_unstable_by_key(|p| p.pid);
    all
}

pub fn known(identity: &Identity, subject: &Subject) -> Option<KnownSubject> {
    match subject {
        Subject::Pid(pid) => process(identity, *pid),
        Subject::Cgroup(path) => {
            let container = identity.cgroups.container_at(identity.cgroups.at_path(path)?);
            Some(KnownSubject { path: path.clone(), container, gone: gone(identity, container), lives: Vec::new() })
        }
        Subject::Container(id) => {
            let all = identity.cgroups.containers();
            let record = by_id(all.map(|c| &*c.record), id)?;
            let container = Some(record.key);
            Some(KnownSubject { path: record.cgroup_path.clone(), container, gone: gone(identity, container), lives: Vec::new() })
        }
    }
}

fn gone(identity: &Identity, container: Option<ContainerKey>) -> Option<BootNs> {
    identity.cgroups.container(container?)?.gone
}

/// The container of this id, the newest of them; or the only one whose id begins so.
fn by_id<'a>(all: impl Iterator<Item = &'a ContainerRecord>, wanted: &str) -> Option<&'a ContainerRecord> {
    let id = |record: &&'a ContainerRecord| record.identity.container_id.as_deref().unwrap_or_default();
    let found: Vec<&ContainerRecord> = all.filter(|record| id(record).starts_with(wanted)).collect();
    let newest = |of: Vec<&'a ContainerRecord>| of.into_iter().max_by_key(|record| record.key);
    let exact: Vec<&ContainerRecord> = found.iter().copied().filter(|record| id(record) == wanted).collect();
    match exact.is_empty() {
        false => newest(exact),
        true if found.windows(2).all(|pair| id(&pair[0]) == id(&pair[1])) => newest(found),
        true => None,
    }
}

/// Ids that begin so, each once.
pub fn ids(identity: &Identity, begin: &str) -> Vec<String> {
    let all = identity.cgroups.containers().filter_map(|container| container.record.identity.container_id.clone());
    let found: std::collections::BTreeSet<String> = all.filter(|id| id.starts_with(begin)).collect();
    found.into_iter().collect()
}

fn process(identity: &Identity, pid: u32) -> Option<KnownSubject> {
    let container = |stay: &Residency| identity.cgroups.container_of(&stay.place, stay.certain_from).ok().flatten();
    let view = |stay: Residency| {
        let record = container(&stay).and_then(|key| identity.cgroups.container(key)).map(|c| &c.record);
        ResidencyView {
            stay,
            path: identity.cgroups.path_of(&stay.place),
            container_id: record.and_then(|r| r.identity.container_id.clone()),
        }
    };
    let lives: Vec<(ProcessHistory, Vec<ResidencyView>)> = identity
        .processes
        .lives(Tgid(pid))
        .into_iter()
        .map(|life| {
            let stays = life.stays.iter().copied().map(view).collect();
            (life, stays)
        })
        .collect();
    let (life, stays) = lives.first()?;
    let path = stays.last().and_then(|s| s.path.clone()).unwrap_or_default();
    let container = life.stays.last().and_then(container);
    Some(KnownSubject { path, container, gone: gone(identity, container), lives })
}
