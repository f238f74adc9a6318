//! `/api/v1/sessions`: start, watch, stop, fetch and remove recordings.

use std::io::Read as _;
use std::path::PathBuf;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Json, Response};
use axum::routing::{get, post};
use axum::{Router, handler::Handler as _};
use sampler_session::View;
use sampler_session::trigger::Trigger;
use serde::Deserialize;
use serde_json::json;

use super::encode::Families;
use super::state::AppState;
use crate::error::display_chain;
use crate::session::render::{FORMATS, UnknownFormat, render};
use crate::session::{MAX_DURATION_S, MAX_LOOKBACK_S, Recorder, RecorderView, Request, StoreError, read_from};

/// Of a file on its way to who fetches it.
const CHUNK_BYTES: usize = 256 << 10;
/// Chunks that wait for a slow reader.
const CHUNKS: usize = 4;
/// Names in a request's list, and their length.
const MAX_NAMES: usize = 256;
const MAX_NAME_BYTES: usize = 512;
/// Largest body of a request.
const MAX_BODY_BYTES: usize = 1 << 20;

/// An answer that is no success, in words.
struct Refusal(StatusCode, String);

impl From<Refusal> for Response {
    fn from(Refusal(status, error): Refusal) -> Response {
        (status, Json(json!({ "error": error }))).into_response()
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        let status = match &error {
            StoreError::Unknown(_) => StatusCode::NOT_FOUND,
            StoreError::Conflict(_) => StatusCode::CONFLICT,
            StoreError::Full { .. } => StatusCode::INSUFFICIENT_STORAGE,
            StoreError::Make { source, .. } | StoreError::Use { source, .. } | StoreError::File { source, .. } => {
                match source.kind() {
                    std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => StatusCode::INSUFFICIENT_STORAGE,
                    std::io::ErrorKind::NotFound => StatusCode::NOT_FOUND,
                    _ => StatusCode::INTERNAL_SERVER_ERROR,
                }
            }
            StoreError::InUse { .. } => StatusCode::CONFLICT,
        };
        Refusal(status, display_chain(&error))
    }
}

fn bad(error: impl Into<String>) -> Refusal {
    Refusal(StatusCode::BAD_REQUEST, error.into())
}

/// Of `POST sessions`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SessionBody {
    duration_seconds: f64,
    #[serde(default)]
    lookback_seconds: f64,
    #[serde(default)]
    trigger: Option<String>,
    #[serde(default)]
    gpus: Vec<String>,
    #[serde(default)]
    containers: Vec<String>,
    #[serde(default)]
    namespaces: Vec<String>,
}

fn seconds(field: &str, value: f64, from: f64, to: f64) -> Result<u64, Refusal> {
    if (from..=to).contains(&value) {
        return Ok((value * 1e9) as u64);
    }
    Err(bad(format!("{field} = {value} is wrong: give seconds from {from} to {to}")))
}

fn names(field: &str, names: Vec<String>) -> Result<Vec<String>, Refusal> {
    if names.len() > MAX_NAMES || names.iter().any(|name| name.is_empty() || name.len() > MAX_NAME_BYTES) {
        return Err(bad(format!("{field} is wrong: give at most {MAX_NAMES} names of 1 to {MAX_NAME_BYTES} bytes")));
    }
    Ok(names)
}

impl SessionBody {
    fn request(self) -> Result<Request, Refusal> {
        let trigger = self.trigger.map(|text| text.parse::<Trigger>().map_err(|error| bad(format!("trigger: {error}"))));
        Ok(Request {
            duration_ns: seconds("duration_seconds", self.duration_seconds, 0.001, MAX_DURATION_S)?,
            lookback_ns: seconds("lookback_seconds", self.lookback_seconds, 0.0, MAX_LOOKBACK_S)?,
            trigger: trigger.transpose()?,
            view: View {
                gpus: names("gpus", self.gpus)?,
                containers: names("containers", self.containers)?,
                namespaces: names("namespaces", self.namespaces)?,
                from_ns: None,
                to_ns: None,
            },
        })
    }
}

/// Of `GET sessions/{id}/report`. Several names have commas between; `from` and `to` are seconds after the session's start.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ReportQuery {
    format: Option<String>,
    from: Option<String>,
    to: Option<String>,
    gpu: Option<String>,
    container: Option<String>,
    namespace: Option<String>,
}

fn offset(field: &str, text: Option<String>) -> Result<Option<u64>, Refusal> {
    let Some(text) = text else { return Ok(None) };
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.0..=MAX_DURATION_S + MAX_LOOKBACK_S).contains(seconds));
    let duration = || humantime::parse_duration(&text).ok().map(|duration| duration.as_secs_f64());
    match seconds.or_else(duration) {
        Some(seconds) => Ok(Some((seconds * 1e9) as u64)),
        None => Err(bad(format!("{field} = {text:?} is wrong: give seconds after the session's start, such as 12.5 or 1m"))),
    }
}

impl ReportQuery {
    /// What it asks for itself wins over what was asked for when it was recorded.
    fn view(self, recorded: &View) -> Result<View, Refusal> {
        let list = |text: Option<String>, recorded: &[String]| match text {
            Some(text) => text.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect(),
            None => recorded.to_vec(),
        };
        Ok(View {
            gpus: list(self.gpu, &recorded.gpus),
            containers: list(self.container, &recorded.containers),
            namespaces: list(self.namespace, &recorded.namespaces),
            from_ns: offset("from", self.from)?,
            to_ns: offset("to", self.to)?,
        })
    }
}

pub fn router() -> Router<Arc<AppState>> {
    Router::new()
        .route("/api/v1/sessions", get(list).post(start.layer(axum::extract::DefaultBodyLimit::max(MAX_BODY_BYTES))))
        .route("/api/v1/sessions/{id}", get(status).delete(remove))
        .route("/api/v1/sessions/{id}/file", get(file))
        .route("/api/v1/sessions/{id}/report", get(report))
        .route("/api/v1/sessions/{id}/stop", post(stop))
}

async fn start(State(state): State<Arc<AppState>>, wanted: Result<Json<SessionBody>, JsonRejection>) -> Response {
    let begin = async {
        // Its words name the field.
        let Json(wanted) = wanted.map_err(|rejection| bad(rejection.body_text()))?;
        Ok(state.recorder.start(wanted.request()?).await?)
    };
    match begin.await {
        Ok(id) => (StatusCode::CREATED, Json(json!({ "id": id }))).into_response(),
        Err(refusal) => Refusal::into(refusal),
    }
}

async fn list(State(state): State<Arc<AppState>>) -> Response {
    match state.recorder.look().await {
        Ok(()) => Json(state.recorder.list()).into_response(),
        Err(error) => Refusal::from(error).into(),
    }
}

async fn status(State(state): State<Arc<AppState>>, Path(id): Path<String>) -> Response {
    match state.recorder.status(&id) {
        Ok(status) => Json(status).into_response(),
        Err(error) => Refusal::from(error).into(),
    }
}

async fn stop(State(state): State<Arc<AppState>>, Path(id): Path<String>) -> Response {
    match state.recorder.stop(id.clone()).await.and_then(|()| state.recorder.status(&id)) {
        Ok(status) => Json(status).into_response(),
        Err(error) => Refusal::from(error).into(),
    }
}

async fn remove(State(state): State<Arc<AppState>>, Path(id): Path<String>) -> Response {
    match state.recorder.remove(id).await {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => Refusal::from(error).into(),
    }
}

/// While it is recorded: what is there.
async fn file(State(state): State<Arc<AppState>>, Path(id): Path<String>) -> Response {
    let (file, path) = match state.recorder.open(id).await {
        Ok(opened) => opened,
        Err(error) => return Refusal::from(error).into(),
    };
    let bytes = match file.metadata() {
        Ok(meta) => meta.len(),
        Err(source) => return Refusal::from(StoreError::File { path, source }).into(),
    };
    let (to, from) = tokio::sync::mpsc::channel::<std::io::Result<Bytes>>(CHUNKS);
    tokio::task::spawn_blocking(move || {
        // It may grow meanwhile; its length has been told.
        let mut rest = file.take(bytes);
        loop {
            let mut chunk = Vec::with_capacity(CHUNK_BYTES);
            let read = rest.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut chunk);
            let item = match read {
                Ok(0) => return,
                Ok(_) => Ok(Bytes::from(chunk)),
                Err(error) => Err(error),
            };
            let ends = item.is_err();
            // Nobody reads any more.
            if to.blocking_send(item).is_err() || ends {
                return;
            }
        }
    });
    let stream = futures_util::stream::unfold(from, |mut from| async { from.recv().await.map(|item| (item, from)) });
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("session.gpus").trim_end_matches(".part").to_owned();
    let mut response = Response::new(Body::from_stream(stream));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(bytes));
    if let Ok(value) = HeaderValue::from_str(&format!("attachment; filename=\"{name}\"")) {
        headers.insert(header::CONTENT_DISPOSITION, value);
    }
    response
}

async fn report(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
    query: Result<Query<ReportQuery>, QueryRejection>,
) -> Response {
    match make_report(&state.recorder, id, query).await {
        Ok((content_type, bytes)) => ([(header::CONTENT_TYPE, content_type)], bytes).into_response(),
        Err(refusal) => refusal.into(),
    }
}

async fn make_report(
    recorder: &Recorder,
    id: String,
    query: Result<Query<ReportQuery>, QueryRejection>,
) -> Result<(&'static str, String), Refusal> {
    let Query(mut query) = query.map_err(|rejection| bad(rejection.body_text()))?;
    let format = query.format.take().unwrap_or_else(|| "json".to_owned());
    if !FORMATS.contains(&format.as_str()) {
        return Err(bad(format!("format: {}", UnknownFormat(format))));
    }
    let (file, path): (std::fs::File, PathBuf) = recorder.open(id).await?;
    let made = tokio::task::spawn_blocking(move || {
        let internal = |error: &dyn std::error::Error| Refusal(StatusCode::INTERNAL_SERVER_ERROR, display_chain(error));
        let session = read_from(&file, &path).map_err(|error| internal(&error))?;
        let view = query.view(&session.header.view)?;
        render(&sampler_report::build(&session, &view), &format).map_err(|error| internal(&error))
    });
    made.await.unwrap_or_else(|_| Err(Refusal(StatusCode::INTERNAL_SERVER_ERROR, "the report cannot be made".into())))
}

pub fn metrics(view: &RecorderView, to: &mut Families) {
    let mut sessions = to.gauge("gpu_sampler_sessions", "Sessions there are, with those of earlier runs.");
    for (phase, n) in crate::session::Phase::ALL.iter().zip(view.sessions) {
        sessions.add(&[("state", phase.name())], n as f64);
    }
    let help = "Frames left out of session files, because the disk or the recorder did not keep up.";
    to.counter("gpu_sampler_session_dropped_frames_total", help).add(&[], view.dropped_frames as f64);
    to.gauge("gpu_sampler_session_ring_bytes", "Size of what is kept in memory to look back to.")
        .add(&[], view.ring_bytes as f64);
    to.gauge("gpu_sampler_session_ring_seconds", "How far one can look back.").add(&[], view.ring_seconds);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: &str, expect: &str) {
        let told = match serde_json::from_str::<SessionBody>(body) {
            Err(error) => error.to_string(),
            Ok(wanted) => wanted.request().map_or_else(|refusal| refusal.1, |request| format!("{request:?}")),
        };
        assert!(told.contains(expect), "{body}: {told}");
    }

    #[test]
    fn requests() {
        check(r#"{"duration_seconds": 60}"#, "duration_ns: 60000000000, lookback_ns: 0, trigger: None");
        check(r#"{"duration_seconds": 1, "lookback_seconds": 30, "trigger": "busy>0.9"}"#, "measure: Busy");
        check(r#"{"duration_seconds": 1, "trigger": null, "gpus": ["0"]}"#, r#"gpus: ["0"]"#);
        check("{}", "missing field `duration_seconds`");
        check(r#"{"duration_seconds": 0}"#, "duration_seconds = 0 is wrong");
        check(r#"{"duration_seconds": 1e9}"#, "duration_seconds = 1000000000 is wrong");
        check(r#"{"duration_seconds": 1, "lookback_seconds": -1}"#, "lookback_seconds = -1 is wrong");
        check(r#"{"duration_seconds": 1, "trigger": "x>1"}"#, "trigger: \"x\" is nothing to watch");
        check(r#"{"duration_seconds": 1, "gpus": [""]}"#, "gpus is wrong");
        check(r#"{"duration_seconds": 1, "lookbak": 3}"#, "unknown field `lookbak`");
    }

    #[test]
    fn views() {
        let recorded = View { namespaces: vec!["a".into()], ..View::default() };
        let query =
            ReportQuery { container: Some("x,y".into()), from: Some("1.5".into()), to: Some("1m".into()), ..Default::default() };
        let Ok(view) = query.view(&recorded) else { panic!() };
        assert_eq!((view.containers, view.namespaces), (vec!["x".to_owned(), "y".into()], vec!["a".to_owned()]));
        assert_eq!((view.from_ns, view.to_ns), (Some(1_500_000_000), Some(60_000_000_000)));
        for wrong in ["-1", "nan", "soon", "1e300"] {
            let query = ReportQuery { from: Some(wrong.into()), ..Default::default() };
            assert!(query.view(&recorded).is_err_and(|refusal| refusal.1.contains("from = ")), "{wrong}");
        }
    }
}
