//! Explains to which container a process belongs and belonged, from the tables of the core thread, for `explain` and `/api/v1/`.
//!
//! Makes no queries: labels and the outcomes of label queries are those that the label service already has.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sampler_core::cgroup_path::{Kind, parse};
use sampler_core::identity::{ContainerRecord, KEEP_EXITED_NS, KEEP_REMOVED_NS, ProcessHistory};
use sampler_core::units::{BootNs, ContainerKey};
use sampler_labels::{ContainerLabels, Label, Source, is_likely};
use serde::{Deserialize, Serialize};
use strum::VariantArray as _;

use crate::health::condition::CGROUPS_REMEDY;
use crate::labels::{AttemptView, FILES};
use crate::observe::clock::{boot_now, wall_now};
use crate::observe::kernel::Mode;
use crate::observe::kernel::proc::{is_zombie, thread_group};
use crate::query::{KnownSubject, ResidencyView, Subject};

/// Maximum number of ids in a message.
const SEVERAL: usize = 4;
const KEEP_EXITED_S: u64 = KEEP_EXITED_NS / 1_000_000_000;

/// Normalizes an id copied from other tools, such as `containerd://1AB..`.
pub fn plain_id(input: &str) -> String {
    let scheme = input.trim().rsplit_once("://");
    let bare = scheme.map_or(input.trim(), |(_, id)| id);
    // A name given with ctr may have upper case, an id of an engine never has.
    let is_engine_id = (scheme.is_some() || bare.len() == 64) && bare.bytes().all(|b| b.is_ascii_hexdigit());
    if is_engine_id { bare.to_ascii_lowercase() } else { bare.trim_start_matches('/').to_owned() }
}

/// Why a container was not found.
pub fn no_container(id: &str, with_prefix: &[String]) -> String {
    match with_prefix {
        [] => format!(
            "no container has an id that begins with {id}, or this name; it may have ended: a running agent keeps containers for {} s \
             after their end, `docker ps -a` or `crictl ps -a` show them longer",
            KEEP_REMOVED_NS / 1_000_000_000
        ),
        several => {
            let more = if several.len() > SEVERAL { ", .." } else { "" };
            let first: Vec<&str> = several.iter().take(SEVERAL).map(String::as_str).collect();
            format!("{} container ids begin with {id}: {}{more}; specify more of the id", several.len(), first.join(", "))
        }
    }
}

/// Why a PID was not found, as far as /proc and the kernel mode show. `mode` is `None` if no agent runs.
pub fn why_unknown(procfs: &Path, pid: u32, mode: Option<Mode>) -> String {
    match thread_group(procfs, pid) {
        Some(thread_group) if thread_group != pid => {
            format!("{pid} is a thread of the process {thread_group}; use --pid {thread_group}")
        }
        Some(_) if is_zombie(procfs, pid) => format!("the process {pid} has ended (a zombie), and its cgroup was not recorded"),
        Some(_) => format!("the process {pid} exists, but its cgroups cannot be read from here: {CGROUPS_REMEDY}"),
        None => match mode {
            Some(Mode::RawTracepoint) => {
                format!("there is no process with PID {pid}, and none has ended within the last {KEEP_EXITED_S} s")
            }
            Some(mode) => format!(
                "there is no process with PID {pid}; in kernel mode {} an ended process is known only if the driver reported it before",
                mode.name()
            ),
            None => format!(
                "there is no process with PID {pid}; ended processes are known only to a running agent (`gpu-sampler run`)"
            ),
        },
    }
}

/// A name that is borrowed where a document is built and owned where it is read.
pub type Name = Cow<'static, str>;

#[derive(Serialize, Deserialize)]
pub struct LabelValue {
    pub value: String,
    pub source: Name,
}

/// The origin of an explanation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// Kernel events, and the sources that the agent queried.
    Agent,
    /// /proc, and every source, queried now.
    Sources,
    /// Only the path.
    Path,
}

/// The output of `explain --json`. Ids are not shortened, unknown values are null, times are RFC 3339.
#[derive(Serialize, Deserialize)]
pub struct Explanation {
    pub kind: Name,
    pub runtime: Option<Name>,
    pub container_id: Option<String>,
    pub pod_uid: Option<String>,
    pub outer_container_id: Option<String>,
    pub cgroup: String,
    /// When the last cgroup of the container was removed; null while it exists.
    pub ended: Option<String>,
    /// False if there is no such cgroup now; absent if this was not checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exists: Option<bool>,
    pub labels: BTreeMap<Name, LabelValue>,
    /// Labels that this kind of container should have and that no source has returned yet.
    pub missing: Vec<Name>,
    pub not_applicable: Vec<Name>,
    /// Every source with its outcome; empty if only the path was used.
    pub tried: Vec<AttemptView>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub would_fill: Providers,
    pub answered_by: Origin,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<ProcessJson>,
}

/// For each missing label, the sources that could provide it, and why they have not.
pub type Providers = BTreeMap<Name, Vec<String>>;

#[derive(Serialize, Deserialize)]
pub struct ProcessJson {
    pub pid: u32,
    /// Its present name; null after its end.
    pub comm: Option<String>,
    /// The processes that had this PID, newest first, because a PID is reused.
    pub lives: Vec<LifetimeJson>,
}

#[derive(Serialize, Deserialize)]
pub struct LifetimeJson {
    pub start: String,
    /// Null until it ends.
    pub end: Option<String>,
    pub stays: Vec<ResidencyJson>,
}

#[derive(Serialize, Deserialize)]
pub struct ResidencyJson {
    pub cgroup: Option<String>,
    pub container_id: Option<String>,
    pub from: String,
    /// Later than `from` if the move itself was not observed.
    pub certain_from: String,
    pub to: Option<String>,
}

/// A container that lacks a label.
#[derive(Serialize, Deserialize)]
pub struct IncompleteContainer {
    pub container_id: String,
    pub cgroup: String,
    pub kind: Name,
    pub runtime: Option<Name>,
    pub missing: Vec<Name>,
    pub would_fill: Providers,
}

/// The output of `explain --missing --json`.
#[derive(Serialize, Deserialize)]
pub struct IncompleteContainers {
    pub containers: Vec<IncompleteContainer>,
    /// Number of further such containers.
    pub more: usize,
}

/// The boot time of the machine. Read once per document, so that equal instants have equal texts.
struct Boot(SystemTime);

impl Boot {
    fn now() -> Self {
        Self(UNIX_EPOCH + Duration::from_nanos(wall_now().0.saturating_sub(boot_now().0)))
    }

    fn rfc3339(&self, at: BootNs) -> String {
        humantime::format_rfc3339_millis(self.0 + Duration::from_nanos(at.0)).to_string()
    }

    fn lifetime(&self, history: &ProcessHistory, residencies: &[ResidencyView]) -> LifetimeJson {
        let time = |at| self.rfc3339(at);
        let residency = |view: &ResidencyView| ResidencyJson {
            cgroup: view.path.clone(),
            container_id: view.container_id.clone(),
            from: time(view.residency.from),
            certain_from: time(view.residency.certain_from),
            to: view.residency.to.map(time),
        };
        LifetimeJson {
            start: time(history.start),
            end: history.end.map(time),
            stays: residencies.iter().map(residency).collect(),
        }
    }
}

impl Explanation {
    /// `labels` and `tried` belong to the container of the subject, if there is one.
    pub fn new(
        subject: &Subject,
        known: &KnownSubject,
        labels: Option<&ContainerLabels>,
        tried: Vec<AttemptView>,
        procfs: &Path,
    ) -> Self {
        let mut explanation = Self::of_path(&known.path);
        explanation.answered_by = Origin::Agent;
        let boot = Boot::now();
        explanation.ended = known.gone.map(|at| boot.rfc3339(at));
        if let Some(labels) = labels {
            explanation.add_labels(labels, tried);
        }
        if let Subject::Pid(pid) = subject {
            let lives: Vec<LifetimeJson> =
                known.histories.iter().map(|(history, residencies)| boot.lifetime(history, residencies)).collect();
            let comm = std::fs::read_to_string(procfs.join(pid.to_string()).join("comm")).ok();
            let is_running = lives.first().is_some_and(|newest| newest.end.is_none());
            let comm = comm.filter(|_| is_running).map(|c| c.trim().to_owned());
            explanation.process = Some(ProcessJson { pid: *pid, comm, lives });
        }
        explanation
    }

    /// The explanation from the path alone.
    pub fn of_path(path: &str) -> Self {
        let record = record_of(path);
        let identity = &record.identity;
        let is_container = matches!(identity.kind, Kind::Container | Kind::Sandbox);
        let id = if is_container { record.cgroup_path.clone() } else { path.to_owned() };
        let mut explanation = Self {
            kind: identity.kind.name().into(),
            runtime: identity.runtime.map(|r| r.name().into()),
            container_id: identity.container_id.clone().filter(|_| is_container),
            pod_uid: identity.pod_uid.clone(),
            outer_container_id: identity.outer_container_id.clone(),
            cgroup: path.to_owned(),
            ended: None,
            exists: None,
            labels: BTreeMap::from([("id".into(), LabelValue { value: id, source: "cgroup".into() })]),
            missing: Vec::new(),
            not_applicable: names(Label::VARIANTS.iter().copied()),
            tried: Vec::new(),
            would_fill: BTreeMap::new(),
            answered_by: Origin::Path,
            process: None,
        };
        if is_container {
            explanation.add_labels(&ContainerLabels::from_path(&record), Vec::new());
        }
        explanation
    }

    fn add_labels(&mut self, labels: &ContainerLabels, tried: Vec<AttemptView>) {
        self.kind = labels.kind.name().into();
        self.runtime = labels.runtime.map(|r| r.name().into());
        self.pod_uid.clone_from(&labels.pod_uid);
        for &label in Label::VARIANTS {
            if let Some(known) = labels.get(label) {
                let value = LabelValue { value: known.value.to_string(), source: known.source.name().into() };
                self.labels.insert(label.name().into(), value);
            }
        }
        self.missing = names(labels.missing());
        self.not_applicable = names(labels.not_applicable());
        self.would_fill = would_fill(labels, &tried);
        self.tried = tried;
    }
}

fn names(labels: impl Iterator<Item = Label>) -> Vec<Name> {
    labels.map(|label| label.name().into()).collect()
}

impl IncompleteContainer {
    /// `tried` belongs to the same container.
    pub fn new(labels: &ContainerLabels, tried: &[AttemptView]) -> Self {
        Self {
            container_id: labels.container_id.to_string(),
            cgroup: labels.id.to_string(),
            kind: labels.kind.name().into(),
            runtime: labels.runtime.map(|r| r.name().into()),
            missing: names(labels.missing()),
            would_fill: would_fill(labels, tried),
        }
    }
}

fn would_fill(labels: &ContainerLabels, tried: &[AttemptView]) -> Providers {
    let would = |label: Label| {
        let likely = |t: &&AttemptView| {
            let source = Source::QUERIED.into_iter().find(|s| s.name() == t.source);
            t.outcome != "ok" && source.is_some_and(|s| s.provides(label) && is_likely(s, labels))
        };
        let text = |t: &AttemptView| match t.endpoint.as_str() {
            FILES | "" => format!("{} ({})", t.source, t.detail),
            endpoint => format!("{} at {endpoint} ({})", t.source, t.detail),
        };
        // An absent default endpoint is omitted if the same source exists at another endpoint.
        let relevant = |t: &&AttemptView| !t.is_absent() || !tried.iter().any(|o| o.source == t.source && !o.is_absent());
        tried.iter().filter(likely).filter(relevant).map(text).collect::<Vec<_>>()
    };
    labels.missing().map(|l| (l.name().into(), would(l))).filter(|(_, sources)| !sources.is_empty()).collect()
}

/// A container record from its path; `cgroup_path` ends with the root of the container.
pub fn record_of(path: &str) -> ContainerRecord {
    let identity = parse(path);
    let cgroup_path = path.get(..identity.root_len).filter(|root| !root.is_empty()).unwrap_or(path).to_owned();
    ContainerRecord { key: ContainerKey(0), cgroup_path, identity, created: BootNs(0), creation_seen: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_copied_from_other_tools_are_normalized() {
        for (input, expect) in [
            ("containerd://1ab4", "1ab4"),
            ("docker://1AB4", "1ab4"),
            ("CAFE", "CAFE"),
            (" 1ab4\n", "1ab4"),
            ("/web", "web"),
            ("Trainer", "Trainer"),
            ("", ""),
        ] {
            assert_eq!(plain_id(input), expect, "{input:?}");
        }
        assert!(no_container("1", &["1a".into(), "1b".into()]).contains("2 container ids begin with 1: 1a, 1b; specify more"));
        assert!(no_container("x", &[]).contains("no container has an id that begins with x"));
    }

    #[test]
    fn a_path_is_explained_without_other_sources() {
        let id = "a".repeat(64);
        let pod = format!("/kubepods/burstable/pod8bb25662-de9a-11e9-84e7-f8f21e04010c/{id}/init.scope");
        let json = |path: &str| serde_json::to_value(Explanation::of_path(path)).unwrap();
        let explanation = json(&pod);
        assert_eq!(explanation["kind"], "container");
        assert_eq!(explanation["container_id"], id);
        assert_eq!(explanation["labels"]["id"]["value"], pod.trim_end_matches("/init.scope"));
        assert_eq!(explanation["missing"].as_array().map(Vec::len), Some(5));
        let explanation = json("/system.slice/ssh.service");
        assert_eq!((&explanation["kind"], &explanation["container_id"]), (&"not-container".into(), &serde_json::Value::Null));
        assert_eq!(explanation["missing"].as_array().map(Vec::len), Some(0));
        let explanation = json(&format!("/docker/{id}"));
        assert_eq!(explanation["missing"], serde_json::json!(["name", "image"]));
        assert_eq!(explanation["not_applicable"], serde_json::json!(["namespace", "pod", "container"]));
    }
}
