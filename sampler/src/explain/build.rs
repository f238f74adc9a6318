//! Builds the documents from what is known of a process or container: its path, its history, its labels, the outcomes of label queries.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sampler_core::cgroup_path::{CgroupIdentity, Kind, parse};
use sampler_core::identity::{ContainerRecord, ProcessHistory};
use sampler_core::units::{BootNs, ContainerKey};
use sampler_labels::{ContainerLabels, Label, Source, is_likely};
use strum::VariantArray as _;

use super::document::{
    Explanation, IncompleteContainer, LabelValue, LifetimeJson, Name, Origin, ProcessJson, Providers, ResidencyJson,
};
use super::host_users::{DetailsJson, HostUsersJson};
use crate::labels::{AttemptView, FILES};
use crate::observe::clock::{boot_now, wall_now};
use crate::query::{KnownSubject, ResidencyView, Subject};

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
        let mut explanation = Self {
            kind: identity.kind.name().into(),
            runtime: identity.runtime.map(|r| r.name().into()),
            container_id: identity.container_id.clone(),
            pod_uid: identity.pod_uid.clone(),
            outer_container_id: identity.outer_container_id.clone(),
            users: HostUsersJson::new(identity),
            cgroup: path.to_owned(),
            ended: None,
            exists: None,
            labels: BTreeMap::new(),
            missing: Vec::new(),
            not_applicable: names(Label::VARIANTS.iter().copied()),
            tried: Vec::new(),
            would_fill: BTreeMap::new(),
            answered_by: Origin::Path,
            process: None,
        };
        let id = if is_user(identity) { record.cgroup_path.clone() } else { path.to_owned() };
        explanation.labels.insert("id".into(), LabelValue { value: id, source: "cgroup".into() });
        if is_user(identity) {
            explanation.add_labels(&ContainerLabels::from_path(&record), Vec::new());
        }
        explanation
    }

    fn add_labels(&mut self, labels: &ContainerLabels, tried: Vec<AttemptView>) {
        self.kind = labels.kind.name().into();
        self.runtime = labels.runtime.map(|r| r.name().into());
        self.users.user = labels.host_user.as_ref().map(|_| labels.container_id.to_string());
        self.users.details = labels.details.as_deref().map(DetailsJson::from);
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
    let providers = |label: Label| {
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
    labels.missing().map(|l| (l.name().into(), providers(l))).filter(|(_, sources)| !sources.is_empty()).collect()
}

/// Whether GPU time can be attributed to it.
pub(super) fn is_user(identity: &CgroupIdentity) -> bool {
    !matches!(identity.kind, Kind::Monitor | Kind::Build | Kind::NotContainer)
}

/// A container record from its path; `cgroup_path` ends with the root of the container.
pub(super) fn record_of(path: &str) -> ContainerRecord {
    let identity = parse(path);
    let cgroup_path = path.get(..identity.root_len).filter(|root| !root.is_empty()).unwrap_or(path).to_owned();
    ContainerRecord { key: ContainerKey(0), cgroup_path, identity, created: BootNs(0), creation_seen: false }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let explanation = json("/system.slice");
        assert_eq!((&explanation["kind"], &explanation["container_id"]), (&"not-container".into(), &serde_json::Value::Null));
        assert_eq!(explanation["missing"].as_array().map(Vec::len), Some(0));
        let explanation = json("/system.slice/ssh.service/sub");
        assert_eq!((&explanation["kind"], &explanation["unit"]["name"]), (&"unit".into(), &"ssh.service".into()));
        assert_eq!(explanation["labels"]["id"]["value"], "/system.slice/ssh.service");
        let explanation = json(&format!("/docker/{id}/system.slice/slurmstepd.scope/job_7/step_0/user/task_1"));
        let job = serde_json::json!({"scheduler": "slurm", "id": "7", "step": "0", "task": "1", "uid": null});
        assert_eq!((&explanation["kind"], &explanation["job"]), (&"job".into(), &job));
        assert_eq!(explanation["user"], "aaaaaaaaaaaa/slurm/7");
        assert_eq!(explanation["outer"], serde_json::json!({"kind": "container", "container_id": id}));
        let explanation = json(&format!("/slurm/uid_1000/job_9/docker/{id}"));
        assert_eq!((&explanation["kind"], &explanation["outer"]["job"]["id"]), (&"container".into(), &"9".into()));
        let explanation = json("/kubepods/burstable/pod8bb25662-de9a-11e9-84e7-f8f21e04010c");
        assert_eq!((&explanation["kind"], &explanation["missing"]), (&"pod".into(), &serde_json::json!(["namespace", "pod"])));
        let explanation = json(&format!("/docker/{id}"));
        assert_eq!(explanation["missing"], serde_json::json!(["name", "image"]));
        assert_eq!(explanation["not_applicable"], serde_json::json!(["namespace", "pod", "container"]));
    }
}
