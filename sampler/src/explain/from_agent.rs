//! Explanations from what a running agent knows. Makes no queries: labels and the outcomes of label queries are those that the label
//! service already has.

use std::collections::BTreeMap;
use std::path::Path;

use sampler_core::cgroup_path::Kind;
use sampler_core::snapshot::Snapshot;
use sampler_labels::{ContainerLabels, Label};

use super::document::{Explanation, IncompleteContainer, IncompleteContainers};
use super::unknown::{no_container, why_unknown};
use crate::health::Health;
use crate::inbox::CoreSender;
use crate::labels::{LabelService, LabelView};
use crate::observe::kernel::Mode;
use crate::query::{KnownSubject, Subject};

/// Further ones are only counted: each takes a request to the label service.
const MOST_INCOMPLETE: usize = 200;

/// Access to the tables of the agent.
pub struct AgentTables<'a> {
    pub core: &'a CoreSender,
    pub labels: &'a LabelService,
    pub health: &'a Health,
    pub procfs: &'a Path,
}

impl AgentTables<'_> {
    /// The error is the reason why the subject is not known.
    pub async fn explain(&self, subject: &Subject) -> Result<Explanation, String> {
        let known = self.known(subject).await?;
        let (labels, attempts) = match known.container {
            Some(key) => (self.labels.view().get(&key).cloned(), self.labels.attempts(key).await),
            None => (None, Vec::new()),
        };
        Ok(Explanation::new(subject, &known, labels.as_deref(), attempts, self.procfs))
    }

    async fn known(&self, subject: &Subject) -> Result<KnownSubject, String> {
        if let Some(known) = self.core.explain(subject.clone()).await {
            return Ok(known);
        }
        match subject {
            Subject::Pid(pid) => {
                let mode = self.health.view().kernel_mode.parse::<Mode>().ok();
                Err(why_unknown(self.procfs, *pid, mode))
            }
            Subject::Cgroup(path) => Err(format!("there is no cgroup {path:?} in the followed hierarchies")),
            Subject::Container(wanted) => {
                let ids = self.core.ids(wanted.clone()).await;
                let (known, several) = match &matching(&self.labels.view(), &ids, wanted)[..] {
                    [(id, _)] => (self.core.explain(Subject::Container(id.clone())).await, Vec::new()),
                    all => (None, all.iter().map(|(_, description)| description.clone()).collect()),
                };
                known.ok_or_else(|| no_container(wanted, &several))
            }
        }
    }

    /// The containers that `gpu_sampler_label_missing` counts.
    pub async fn incomplete(&self, snapshot: &Snapshot) -> IncompleteContainers {
        let labels = self.labels.view();
        let living = snapshot.containers.iter().filter(|c| c.gone.is_none());
        let lacking =
            living.filter_map(|c| labels.get(&c.record.key).map(|l| (c, l))).filter(|(_, l)| l.settled && !l.complete());
        let lacking: Vec<_> = lacking.collect();
        let mut all = Vec::new();
        for (container, labels) in lacking.iter().take(MOST_INCOMPLETE) {
            all.push(IncompleteContainer::new(labels, &self.labels.attempts(container.record.key).await));
        }
        IncompleteContainers { more: lacking.len() - all.len(), containers: all }
    }
}

/// Ids and descriptions of the containers that `wanted` may refer to: those with an id that starts with it, otherwise those with this
/// name or pod. `ids`: the matching ids of the core; the labels of some of them may follow later.
fn matching(labels: &LabelView, ids: &[String], wanted: &str) -> Vec<(String, String)> {
    let description = |l: &ContainerLabels| {
        let short: String = l.container_id.chars().take(12).collect();
        let names = [Label::Namespace, Label::Pod, Label::Container, Label::Name].map(|label| l.text(label));
        let name = if names[1].is_empty() { names[3].to_owned() } else { names[..3].join("/") };
        if name.is_empty() { short } else { format!("{short} ({name})") }
    };
    let containers = |is_match: &dyn Fn(&ContainerLabels) -> bool| -> Vec<(String, String)> {
        let found: BTreeMap<&str, String> =
            labels.values().filter(|l| is_match(l)).map(|l| (&*l.container_id, description(l))).collect();
        found.into_iter().map(|(id, description)| (id.to_owned(), description)).collect()
    };
    let has_name = |l: &ContainerLabels| l.text(Label::Name) == wanted || l.text(Label::Pod) == wanted && l.kind != Kind::Sandbox;
    if ids.is_empty() {
        return containers(&has_name);
    }
    let known = containers(&|l| l.container_id.starts_with(wanted));
    let described = |id: &String| known.iter().find(|(known, _)| known == id).cloned();
    ids.iter().map(|id| described(id).unwrap_or_else(|| (id.clone(), id.chars().take(12).collect()))).collect()
}
