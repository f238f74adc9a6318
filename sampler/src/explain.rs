//! Who a process is and was, and why: what the core thread knows, put into words for `explain` and `/api/v1/`.
//!
//! Deliberately asks nobody: labels are what the label service already has.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sampler_core::identity::{Identity, KEEP_EXITED_NS, LifeView, Stay};
use sampler_core::labels::{CgroupIdentity, ContainerLabels, Kind, Label, parse};
use sampler_core::observation::Place;
use sampler_core::units::{BootNs, ContainerKey, Tgid};
use serde::Serialize;

use crate::labels::LabelView;
use crate::observe::clock::{boot_now, wall_now};
use crate::observe::kernel::Mode;
use crate::observe::kernel::layout::REMEDY;
use crate::observe::kernel::proc::{group, is_zombie};

const KEEP_EXITED_S: u64 = KEEP_EXITED_NS / 1_000_000_000;

/// What is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    Pid(u32),
    /// A cgroup's path within its hierarchy.
    Cgroup(String),
}

/// What identity knows of a subject. A copy: the core thread does not wait for whoever reads it.
#[derive(Clone, Debug)]
pub struct Known {
    /// Where it is now, or was last; blank when its cgroup is unknown.
    pub path: String,
    pub container: Option<ContainerKey>,
    /// Newest first; empty for a cgroup.
    pub lives: Vec<(LifeView, Vec<StayView>)>,
}

#[derive(Clone, Debug)]
pub struct StayView {
    stay: Stay,
    path: Option<String>,
    container_id: Option<String>,
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
    let one = |(tgid, start, place): (Tgid, BootNs, Place)| LivingProcess {
        pid: tgid.0,
        start_ns: start.0,
        v2_id: place.v2_id,
        v1_id: place.v1_id,
    };
    let mut all: Vec<LivingProcess> = identity.processes.living().map(one).collect();
    all.sort_unstable_by_key(|p| p.pid);
    all
}

pub fn known(identity: &Identity, subject: &Subject) -> Option<Known> {
    match subject {
        Subject::Pid(pid) => process(identity, *pid),
        Subject::Cgroup(path) => {
            let container = identity.cgroups.container_at(identity.cgroups.at_path(path)?);
            Some(Known { path: path.clone(), container, lives: Vec::new() })
        }
    }
}

fn process(identity: &Identity, pid: u32) -> Option<Known> {
    let container = |stay: &Stay| identity.cgroups.container_of(&stay.place, stay.certain_from).ok().flatten();
    let view = |stay: Stay| {
        let record = container(&stay).and_then(|key| identity.cgroups.container(key)).map(|c| &c.record);
        StayView {
            stay,
            path: identity.cgroups.path_of(&stay.place),
            container_id: record.and_then(|r| r.identity.container_id.clone()),
        }
    };
    let lives: Vec<(LifeView, Vec<StayView>)> = identity
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
    Some(Known { path, container, lives })
}

/// Why a pid is not among the known, as far as /proc and the mode can tell. `mode` is none where no agent runs.
pub fn why_unknown(procfs: &Path, pid: u32, mode: Option<Mode>) -> String {
    match group(procfs, pid) {
        Some(group) if group != pid => format!("{pid} is a thread of the process {group}; ask for that"),
        Some(_) if is_zombie(procfs, pid) => format!("the process {pid} has ended (a zombie) and nobody saw where it had been"),
        Some(_) => format!("the process {pid} lives, but its cgroups cannot be seen from here: {REMEDY}"),
        None => match mode {
            Some(Mode::RawTracepoint) => format!("no process with pid {pid} lives or has ended within {KEEP_EXITED_S} s"),
            Some(mode) => format!(
                "no process with pid {pid} lives; in kernel mode {} one that has ended is known only if the driver named it before",
                mode.name()
            ),
            None => {
                format!(
                    "no process with pid {pid} lives; one that has ended is known to a running agent only (`gpu-sampler run`)"
                )
            }
        },
    }
}

#[derive(Serialize)]
struct Value {
    value: String,
    source: &'static str,
}

/// `explain --json`. Ids are whole, unknown is null, times are RFC 3339.
#[derive(Serialize)]
pub struct Explanation {
    kind: &'static str,
    runtime: Option<&'static str>,
    container_id: Option<String>,
    pod_uid: Option<String>,
    outer_container_id: Option<String>,
    cgroup: String,
    labels: std::collections::BTreeMap<&'static str, Value>,
    /// Labels that this kind of container should have and nobody has told yet.
    missing: Vec<&'static str>,
    not_applicable: Vec<&'static str>,
    /// Who answered: `agent` (kernel events), `procfs` (a look into /proc just now) or `path` (nothing but the path).
    pub answered_by: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<ProcessJson>,
}

#[derive(Serialize)]
struct ProcessJson {
    pid: u32,
    /// Lives of this pid, newest first: a pid is used again.
    lives: Vec<LifeJson>,
}

#[derive(Serialize)]
struct LifeJson {
    start: String,
    /// Null while it lives.
    end: Option<String>,
    stays: Vec<StayJson>,
}

#[derive(Serialize)]
struct StayJson {
    cgroup: Option<String>,
    container_id: Option<String>,
    from: String,
    /// Later than `from` where the move itself was not seen.
    certain_from: String,
    to: Option<String>,
}

/// When the machine started, read once for all that is shown together: equal instants are shown equal.
struct Boot(SystemTime);

impl Boot {
    fn now() -> Self {
        Self(UNIX_EPOCH + Duration::from_nanos(wall_now().0.saturating_sub(boot_now().0)))
    }

    fn rfc3339(&self, at: BootNs) -> String {
        humantime::format_rfc3339_millis(self.0 + Duration::from_nanos(at.0)).to_string()
    }

    fn life(&self, life: &LifeView, stays: &[StayView]) -> LifeJson {
        let told = |at| self.rfc3339(at);
        let stay = |view: &StayView| StayJson {
            cgroup: view.path.clone(),
            container_id: view.container_id.clone(),
            from: told(view.stay.from),
            certain_from: told(view.stay.certain_from),
            to: view.stay.to.map(told),
        };
        LifeJson { start: told(life.start), end: life.end.map(told), stays: stays.iter().map(stay).collect() }
    }
}

impl Explanation {
    pub fn new(subject: &Subject, known: &Known, labels: &LabelView) -> Self {
        let mut answer = Self::of_path(&known.path);
        answer.answered_by = "agent";
        if let Some(labels) = known.container.and_then(|key| labels.get(&key)) {
            answer.take(labels);
        }
        if let Subject::Pid(pid) = subject {
            let boot = Boot::now();
            let lives = known.lives.iter().map(|(view, stays)| boot.life(view, stays)).collect();
            answer.process = Some(ProcessJson { pid: *pid, lives });
        }
        answer
    }

    /// What the path alone says.
    pub fn of_path(path: &str) -> Self {
        let CgroupIdentity { kind, runtime, container_id, pod_uid, outer_container_id, root_len } = parse(path);
        let is_container = matches!(kind, Kind::Container | Kind::Sandbox);
        let id = if is_container { path.get(..root_len).unwrap_or(path) } else { path };
        let value = Value { value: id.to_owned(), source: "cgroup" };
        Self {
            kind: kind.name(),
            runtime: runtime.map(|r| r.name()),
            container_id: container_id.filter(|_| is_container),
            pod_uid,
            outer_container_id,
            cgroup: path.to_owned(),
            labels: std::collections::BTreeMap::from([("id", value)]),
            missing: if is_container { Label::ALL.map(|l| l.name()).to_vec() } else { Vec::new() },
            not_applicable: if is_container { Vec::new() } else { Label::ALL.map(|l| l.name()).to_vec() },
            answered_by: "path",
            process: None,
        }
    }

    fn take(&mut self, labels: &ContainerLabels) {
        self.kind = labels.kind.name();
        self.runtime = labels.runtime.map(|r| r.name());
        self.pod_uid.clone_from(&labels.pod_uid);
        for label in Label::ALL {
            if let Some(known) = labels.get(label) {
                let value = Value { value: known.value.to_string(), source: known.source.name() };
                self.labels.insert(label.name(), value);
            }
        }
        self.missing = labels.missing().map(|l| l.name()).collect();
        self.not_applicable = labels.not_applicable().map(|l| l.name()).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_path_says() {
        let id = "a".repeat(64);
        let pod = format!("/kubepods/burstable/pod8bb25662-de9a-11e9-84e7-f8f21e04010c/{id}/init.scope");
        let json = |path: &str| serde_json::to_value(Explanation::of_path(path)).unwrap();
        let told = json(&pod);
        assert_eq!(told["kind"], "container");
        assert_eq!(told["container_id"], id);
        assert_eq!(told["labels"]["id"]["value"], pod.trim_end_matches("/init.scope"));
        assert_eq!(told["missing"].as_array().map(Vec::len), Some(5));
        let told = json("/system.slice/ssh.service");
        assert_eq!((&told["kind"], &told["container_id"]), (&"not-container".into(), &serde_json::Value::Null));
        assert_eq!(told["missing"].as_array().map(Vec::len), Some(0));
    }
}
