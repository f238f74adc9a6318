//! `/api/v1/explain`: the attribution of a process, a cgroup or a container, and all containers that lack a label.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Json, Response};
use sampler_core::cgroup_path::Kind;
use sampler_labels::{ContainerLabels, Label};
use serde::Deserialize;

use super::state::AppState;
use crate::explain::{Explanation, IncompleteContainer, IncompleteContainers, no_container, plain_id, why_unknown};
use crate::labels::LabelView;
use crate::observe::kernel::Mode;
use crate::query::Subject;

#[derive(Deserialize)]
pub struct ExplainQuery {
    pid: Option<u32>,
    cgroup: Option<String>,
    container: Option<String>,
    missing: Option<bool>,
}

/// Further ones are only counted: each takes a request to the label service.
const MOST_INCOMPLETE: usize = 200;

/// The containers that `gpu_sampler_label_missing` counts.
async fn incomplete(state: &AppState) -> IncompleteContainers {
    let (snapshot, labels) = (state.snapshot.load_full(), state.labels.view());
    let living = snapshot.containers.iter().filter(|c| c.gone.is_none());
    let lacking = living.filter_map(|c| labels.get(&c.record.key).map(|l| (c, l))).filter(|(_, l)| l.settled && !l.complete());
    let lacking: Vec<_> = lacking.collect();
    let mut all = Vec::new();
    for (container, labels) in lacking.iter().take(MOST_INCOMPLETE) {
        all.push(IncompleteContainer::new(labels, &state.labels.attempts(container.record.key).await));
    }
    IncompleteContainers { more: lacking.len() - all.len(), containers: all }
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

pub async fn explain(State(state): State<Arc<AppState>>, query: Result<Query<ExplainQuery>, QueryRejection>) -> Response {
    let subject = match query {
        Ok(Query(ExplainQuery { pid: None, cgroup: None, container: None, missing: Some(true) })) => {
            return Json(incomplete(&state).await).into_response();
        }
        Ok(Query(ExplainQuery { pid: Some(pid), cgroup: None, container: None, missing: None })) => Subject::Pid(pid),
        Ok(Query(ExplainQuery { pid: None, cgroup: Some(path), container: None, missing: None })) => Subject::Cgroup(path),
        Ok(Query(ExplainQuery { pid: None, cgroup: None, container: Some(id), missing: None })) if !plain_id(&id).is_empty() => {
            Subject::Container(plain_id(&id))
        }
        Ok(_) => {
            let message = "invalid query: give exactly one of ?pid=NUMBER, ?cgroup=/PATH, ?container=ID, ?missing=true\n";
            return (StatusCode::BAD_REQUEST, message).into_response();
        }
        Err(rejection) => return (StatusCode::BAD_REQUEST, format!("{}\n", rejection.body_text())).into_response(),
    };
    let mut known = state.core.explain(subject.clone()).await;
    let mut several = Vec::new();
    if let (None, Subject::Container(wanted)) = (&known, &subject) {
        let ids = state.core.ids(wanted.clone()).await;
        match &matching(&state.labels.view(), &ids, wanted)[..] {
            [(id, _)] => known = state.core.explain(Subject::Container(id.clone())).await,
            all => several = all.iter().map(|(_, description)| description.clone()).collect(),
        }
    }
    let Some(known) = known else {
        let message = match subject {
            Subject::Pid(pid) => {
                let mode = Mode::named(state.health.view().kernel_mode);
                why_unknown(&state.config.path_procfs, pid, mode)
            }
            Subject::Cgroup(path) => format!("there is no cgroup {path:?} in the followed hierarchies"),
            Subject::Container(id) => no_container(&id, &several),
        };
        return (StatusCode::NOT_FOUND, format!("{message}\n")).into_response();
    };
    let (labels, attempts) = match known.container {
        Some(key) => (state.labels.view().get(&key).cloned(), state.labels.attempts(key).await),
        None => (None, Vec::new()),
    };
    Json(Explanation::new(&subject, &known, labels.as_deref(), attempts, &state.config.path_procfs)).into_response()
}
