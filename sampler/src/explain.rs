//! Who a process is and was, and why: what the core thread knows, put into words for `explain` and `/api/v1/`.
//!
//! Deliberately asks nobody: labels, and what became of asking for them, are what the label service already has.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sampler_core::cgroup_path::{Kind, parse};
use sampler_core::identity::{ContainerRecord, KEEP_EXITED_NS, KEEP_REMOVED_NS, ProcessHistory};
use sampler_core::units::{BootNs, ContainerKey};
use sampler_labels::{ContainerLabels, Label, Source, is_likely};
use serde::Serialize;

use crate::labels::{FILES, TriedView};
use crate::observe::clock::{boot_now, wall_now};
use crate::observe::kernel::Mode;
use crate::observe::kernel::layout::REMEDY;
use crate::observe::kernel::proc::{group, is_zombie};
use crate::query::{KnownSubject, ResidencyView, Subject};

/// As many ids as one line holds.
const SEVERAL: usize = 4;
const KEEP_EXITED_S: u64 = KEEP_EXITED_NS / 1_000_000_000;

/// What people copy from other tools: `containerd://1AB..` and the like.
pub fn plain_id(given: &str) -> String {
    let scheme = given.trim().rsplit_once("://");
    let bare = scheme.map_or(given.trim(), |(_, id)| id);
    // A name of ctr's may be upper case, an engine's id never is.
    let engines = (scheme.is_some() || bare.len() == 64) && bare.bytes().all(|b| b.is_ascii_hexdigit());
    if engines { bare.to_ascii_lowercase() } else { bare.trim_start_matches('/').to_owned() }
}

/// Why a container is not among the known.
pub fn no_container(id: &str, begin_so: &[String]) -> String {
    match begin_so {
        [] => format!(
            "no container's id begins with {id} and none is called so; it may have ended: a running agent knows containers for {} s after \
             their end, and `docker ps -a` or `crictl ps -a` longer",
            KEEP_REMOVED_NS / 1_000_000_000
        ),
        several => {
            let more = if several.len() > SEVERAL { ", .." } else { "" };
            let first: Vec<&str> = several.iter().take(SEVERAL).map(String::as_str).collect();
            format!("{} containers begin with {id}: {}{more}; give more of the id", several.len(), first.join(", "))
        }
    }
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
    /// When the container's last cgroup was removed; null while it is there.
    ended: Option<String>,
    /// False where there is no such cgroup now; absent where nobody has looked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exists: Option<bool>,
    labels: BTreeMap<&'static str, Value>,
    /// Labels that this kind of container should have and nobody has told yet.
    missing: Vec<&'static str>,
    not_applicable: Vec<&'static str>,
    /// Every source, and what came of it; empty where only the path was looked at.
    tried: Vec<TriedView>,
    /// For each missing label, who would tell it, and why that one has not.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    would_fill: BTreeMap<&'static str, Vec<String>>,
    /// Who answered: `agent` (kernel events, and the sources it asked), `sources` (a look into /proc and every source asked just
    /// now) or `path` (nothing but the path).
    pub answered_by: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<ProcessJson>,
}

#[derive(Serialize)]
struct ProcessJson {
    pid: u32,
    /// Its name now; null once it has ended.
    comm: Option<String>,
    /// Lives of this pid, newest first: a pid is used again.
    lives: Vec<LifetimeJson>,
}

#[derive(Serialize)]
struct LifetimeJson {
    start: String,
    /// Null while it lives.
    end: Option<String>,
    stays: Vec<ResidencyJson>,
}

#[derive(Serialize)]
struct ResidencyJson {
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

    fn life(&self, life: &ProcessHistory, stays: &[ResidencyView]) -> LifetimeJson {
        let told = |at| self.rfc3339(at);
        let stay = |view: &ResidencyView| ResidencyJson {
            cgroup: view.path.clone(),
            container_id: view.container_id.clone(),
            from: told(view.stay.from),
            certain_from: told(view.stay.certain_from),
            to: view.stay.to.map(told),
        };
        LifetimeJson { start: told(life.start), end: life.end.map(told), stays: stays.iter().map(stay).collect() }
    }
}

impl Explanation {
    /// `labels` and `tried` are of the container it is in, if it is in one.
    pub fn new(
        subject: &Subject,
        known: &KnownSubject,
        labels: Option<&ContainerLabels>,
        tried: Vec<TriedView>,
        procfs: &Path,
    ) -> Self {
        let mut answer = Self::of_path(&known.path);
        answer.answered_by = "agent";
        let boot = Boot::now();
        answer.ended = known.gone.map(|at| boot.rfc3339(at));
        if let Some(labels) = labels {
            answer.take(labels, tried);
        }
        if let Subject::Pid(pid) = subject {
            let lives: Vec<LifetimeJson> = known.lives.iter().map(|(view, stays)| boot.life(view, stays)).collect();
            let comm = std::fs::read_to_string(procfs.join(pid.to_string()).join("comm")).ok();
            let comm = comm.filter(|_| lives.first().is_some_and(|life| life.end.is_none())).map(|c| c.trim().to_owned());
            answer.process = Some(ProcessJson { pid: *pid, comm, lives });
        }
        answer
    }

    /// What the path alone says.
    pub fn of_path(path: &str) -> Self {
        let record = record_of(path);
        let identity = &record.identity;
        let is_container = matches!(identity.kind, Kind::Container | Kind::Sandbox);
        let id = if is_container { record.cgroup_path.clone() } else { path.to_owned() };
        let mut answer = Self {
            kind: identity.kind.name(),
            runtime: identity.runtime.map(|r| r.name()),
            container_id: identity.container_id.clone().filter(|_| is_container),
            pod_uid: identity.pod_uid.clone(),
            outer_container_id: identity.outer_container_id.clone(),
            cgroup: path.to_owned(),
            ended: None,
            exists: None,
            labels: BTreeMap::from([("id", Value { value: id, source: "cgroup" })]),
            missing: Vec::new(),
            not_applicable: Label::ALL.map(|l| l.name()).to_vec(),
            tried: Vec::new(),
            would_fill: BTreeMap::new(),
            answered_by: "path",
            process: None,
        };
        if is_container {
            answer.take(&ContainerLabels::from_path(&record), Vec::new());
        }
        answer
    }

    fn take(&mut self, labels: &ContainerLabels, tried: Vec<TriedView>) {
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
        self.would_fill = would_fill(labels, &tried);
        self.tried = tried;
    }
}

/// For each missing label, who would tell it, and why that one has not.
pub fn would_fill(labels: &ContainerLabels, tried: &[TriedView]) -> BTreeMap<&'static str, Vec<String>> {
    let would = |label: Label| {
        let likely = |t: &&TriedView| {
            let source = Source::ASKED.into_iter().find(|s| s.name() == t.source);
            t.outcome != "ok" && source.is_some_and(|s| s.gives(label) && is_likely(s, labels))
        };
        let told = |t: &TriedView| match t.endpoint.as_str() {
            FILES | "" => format!("{} ({})", t.source, t.detail),
            endpoint => format!("{} at {endpoint} ({})", t.source, t.detail),
        };
        // A usual place without anybody is no news where the same source is somewhere else.
        let elsewhere = |t: &&TriedView| !t.is_absent() || !tried.iter().any(|o| o.source == t.source && !o.is_absent());
        tried.iter().filter(likely).filter(elsewhere).map(told).collect::<Vec<_>>()
    };
    labels.missing().map(|l| (l.name(), would(l))).filter(|(_, who)| !who.is_empty()).collect()
}

/// A container as its path tells it; `cgroup_path` ends with the container's root.
pub fn record_of(path: &str) -> ContainerRecord {
    let identity = parse(path);
    let cgroup_path = path.get(..identity.root_len).filter(|root| !root.is_empty()).unwrap_or(path).to_owned();
    ContainerRecord { key: ContainerKey(0), cgroup_path, identity, created: BootNs(0), creation_seen: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_as_people_copy_them() {
        for (given, expect) in [
            ("containerd://1ab4", "1ab4"),
            ("docker://1AB4", "1ab4"),
            ("CAFE", "CAFE"),
            (" 1ab4\n", "1ab4"),
            ("/web", "web"),
            ("Trainer", "Trainer"),
            ("", ""),
        ] {
            assert_eq!(plain_id(given), expect, "{given:?}");
        }
        assert!(no_container("1", &["1a".into(), "1b".into()]).contains("2 containers begin with 1: 1a, 1b; give more"));
        assert!(no_container("x", &[]).contains("no container's id begins with x"));
    }

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
        let told = json(&format!("/docker/{id}"));
        assert_eq!(told["missing"], serde_json::json!(["name", "image"]));
        assert_eq!(told["not_applicable"], serde_json::json!(["namespace", "pod", "container"]));
    }
}
