//! `/api/v1/explain`: the attribution of a process, a cgroup or a container, the holders of a GPU, and all containers that lack a label.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Json, Response};
use serde::Deserialize;

use super::state::AppState;
use crate::explain::{AgentTables, plain_id};
use crate::query::Subject;

#[derive(Deserialize)]
pub struct ExplainQuery {
    pid: Option<u32>,
    cgroup: Option<String>,
    container: Option<String>,
    missing: Option<bool>,
    gpu: Option<String>,
}

pub async fn explain(State(state): State<Arc<AppState>>, query: Result<Query<ExplainQuery>, QueryRejection>) -> Response {
    let config = state.config();
    let tables = AgentTables { core: &state.core, labels: &state.labels, health: &state.health, procfs: &config.path_procfs };
    let ExplainQuery { pid, cgroup, container, missing, gpu } = match query {
        Ok(Query(query)) => query,
        Err(rejection) => return (StatusCode::BAD_REQUEST, format!("{}\n", rejection.body_text())).into_response(),
    };
    let subject = match (pid, cgroup, container, missing, gpu) {
        (Some(pid), None, None, None, None) => Subject::Pid(pid),
        (None, Some(path), None, None, None) => Subject::Cgroup(path),
        (None, None, Some(id), None, None) if !plain_id(&id).is_empty() => Subject::Container(plain_id(&id)),
        (None, None, None, Some(true), None) => {
            return Json(tables.incomplete(&state.snapshot.load_full()).await).into_response();
        }
        (None, None, None, None, Some(gpu)) => {
            state.refresh().await;
            return match state.gpu_holders(&gpu) {
                Some(holders) => Json(holders).into_response(),
                None => (StatusCode::NOT_FOUND, format!("no GPU with the UUID or index {gpu}\n")).into_response(),
            };
        }
        _ => {
            let message =
                "invalid query: give exactly one of ?pid=NUMBER, ?cgroup=/PATH, ?container=ID, ?gpu=UUID, ?missing=true\n";
            return (StatusCode::BAD_REQUEST, message).into_response();
        }
    };
    match tables.explain(&subject).await {
        Ok(explanation) => Json(explanation).into_response(),
        Err(message) => (StatusCode::NOT_FOUND, format!("{message}\n")).into_response(),
    }
}
