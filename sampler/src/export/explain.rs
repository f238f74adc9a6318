//! `/api/v1/explain`: what is known of a process, a cgroup or a container, and of every container that lacks a label.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Json, Response};
use sampler_core::cgroup_path::Kind;
use sampler_labels::{ContainerLabels, Label};
use serde::{Deserialize, Serialize};

use super::state::AppState;
use crate::explain::{Explanation, no_container, plain_id, why_unknown, would_fill};
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

/// A container of which a label is missing.
#[derive(Serialize)]
struct Incomplete {
    container_id: String,
    cgroup: String,
    kind: &'static str,
    runtime: Option<&'static str>,
    missing: Vec<&'static str>,
    /// For each of those, who would tell it, and why that one has not.
    would_fill: BTreeMap<&'static str, Vec<String>>,
}

/// What `?missing=true` answers.
#[derive(Serialize)]
struct AllIncomplete {
    containers: Vec<Incomplete>,
    /// How many there are beside them.
    more: usize,
}

/// More are only counted: each takes a question to the label service.
const MOST_INCOMPLETE: usize = 200;

/// Those that `gpu_sampler_label_missing` counts.
async fn incomplete(state: &AppState) -> AllIncomplete {
    let (snapshot, labels) = (state.snapshot.load_full(), state.labels.view());
    let living = snapshot.containers.iter().filter(|c| c.gone.is_none());
    let lacking = living.filter_map(|c| labels.get(&c.record.key).map(|l| (c, l))).filter(|(_, l)| l.settled && !l.complete());
    let lacking: Vec<_> = lacking.collect();
    let mut all = Vec::new();
    for (container, labels) in lacking.iter().take(MOST_INCOMPLETE) {
        all.push(Incomplete {
            container_id: labels.container_id.to_string(),
            cgroup: labels.id.to_string(),
            kind: labels.kind.name(),
            runtime: labels.runtime.map(|r| r.name()),
            missing: labels.missing().map(Label::name).collect(),
            would_fill: would_fill(labels, &state.labels.tried(container.record.key).await),
        });
    }
    AllIncomplete { more: lacking.len() - all.len(), containers: all }
}

/// Ids and names of the containers that this may mean: those whose ids begin so, else those that are called so, or whose pod is.
/// `ids`: those that begin so; labels may know of some of them a moment later.
fn meant(labels: &LabelView, ids: &[String], wanted: &str) -> Vec<(String, String)> {
    let shown = |l: &ContainerLabels| {
        let short: String = l.container_id.chars().take(12).collect();
        let names = [Label::Namespace, Label::Pod, Label::Container, Label::Name].map(|label| l.text(label));
        let name = if names[1].is_empty() { names[3].to_owned() } else { names[..3].join("/") };
        if name.is_empty() { short } else { format!("{short} ({name})") }
    };
    let of = |which: &dyn Fn(&ContainerLabels) -> bool| -> Vec<(String, String)> {
        let found: BTreeMap<&str, String> = labels.values().filter(|l| which(l)).map(|l| (&*l.container_id, shown(l))).collect();
        found.into_iter().map(|(id, shown)| (id.to_owned(), shown)).collect()
    };
    let called = |l: &ContainerLabels| l.text(Label::Name) == wanted || l.text(Label::Pod) == wanted && l.kind != Kind::Sandbox;
    if ids.is_empty() {
        return of(&called);
    }
    let known = of(&|l| l.container_id.starts_with(wanted));
    let one = |id: &String| known.iter().find(|(known, _)| known == id).cloned();
    ids.iter().map(|id| one(id).unwrap_or_else(|| (id.clone(), id.chars().take(12).collect()))).collect()
}

pub async fn answer(State(state): State<Arc<AppState>>, query: Result<Query<ExplainQuery>, QueryRejection>) -> Response {
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
            let told = "ask with one of ?pid=NUMBER, ?cgroup=/PATH, ?container=ID and ?missing=true\n";
            return (StatusCode::BAD_REQUEST, told).into_response();
        }
        Err(rejection) => return (StatusCode::BAD_REQUEST, format!("{}\n", rejection.body_text())).into_response(),
    };
    let mut known = state.core.explain(subject.clone()).await;
    let mut several = Vec::new();
    if let (None, Subject::Container(wanted)) = (&known, &subject) {
        let ids = state.core.ids(wanted.clone()).await;
        match &meant(&state.labels.view(), &ids, wanted)[..] {
            [(id, _)] => known = state.core.explain(Subject::Container(id.clone())).await,
            all => several = all.iter().map(|(_, shown)| shown.clone()).collect(),
        }
    }
    let Some(known) = known else {
        let told = match subject {
            Subject::Pid(pid) => {
                let mode = Mode::named(state.health.view().kernel_mode);
                why_unknown(&state.config.path_procfs, pid, mode)
            }
            Subject::Cgroup(path) => format!("there is no cgroup {path:?} in the hierarchies that are followed"),
            Subject::Container(id) => no_container(&id, &several),
        };
        return (StatusCode::NOT_FOUND, format!("{told}\n")).into_response();
    };
    let (labels, tried) = match known.container {
        Some(key) => (state.labels.view().get(&key).cloned(), state.labels.tried(key).await),
        None => (None, Vec::new()),
    };
    Json(Explanation::new(&subject, &known, labels.as_deref(), tried, &state.config.path_procfs)).into_response()
}
