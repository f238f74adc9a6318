//! `/api/v1/sessions`: start, list, stop, download and delete sessions.

use std::io::Read as _;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, Request as HttpRequest, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use axum::{Router, handler::Handler as _};
use sampler_report::{Format, TextOptions};
use sampler_session::View;
use sampler_session::trigger::Trigger;
use serde::{Deserialize, Serialize};
use strum::VariantArray as _;

use super::catalogue::sessions as families;
use super::encode::Page;
use super::json_request::{BODY_TIMEOUT, ErrorResponse, MAX_BODY_BYTES, bad, body};
use super::state::AppState;
use crate::engine_rules::{self, MAX_RULES, RuleError};
use crate::error::display_chain;
use crate::serving::{DEFAULT_EVERY, EngineRequest, MAX_EVERY, MIN_EVERY};
use crate::session::{MAX_DURATION_S, MAX_LOOKBACK_S, RecorderView, Request, StoreError, read_from};
use crate::wait_selector::{SelectorError, WaitSelector};

const NO_ENGINE_ACCESS: &str = "engine_metrics: this agent may not read the metrics of serving engines in containers: set engine_access = true \
                                in its configuration, give it CAP_SYS_ADMIN, and restart it (docs/serving-engines.md)";
/// Size of the chunks of a download.
const CHUNK_BYTES: usize = 256 << 10;
/// Names in a list of a request, and their length.
const MAX_NAMES: usize = 256;
const MAX_NAME_BYTES: usize = 512;

impl From<StoreError> for ErrorResponse {
    fn from(error: StoreError) -> Self {
        let status = match &error {
            StoreError::Unknown(_) => StatusCode::NOT_FOUND,
            StoreError::Conflict(_) | StoreError::InUse { .. } => StatusCode::CONFLICT,
            StoreError::Full { .. } => StatusCode::INSUFFICIENT_STORAGE,
            StoreError::Make { source, .. } | StoreError::Use { source, .. } | StoreError::File { source, .. } => {
                match source.kind() {
                    std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => StatusCode::INSUFFICIENT_STORAGE,
                    std::io::ErrorKind::NotFound => StatusCode::NOT_FOUND,
                    _ => StatusCode::INTERNAL_SERVER_ERROR,
                }
            }
        };
        ErrorResponse(status, display_chain(&error))
    }
}

/// Body of `POST sessions`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionBody {
    pub duration_seconds: f64,
    #[serde(default)]
    pub lookback_seconds: f64,
    #[serde(default)]
    pub trigger: Option<String>,
    #[serde(default)]
    pub gpus: Vec<String>,
    #[serde(default)]
    pub containers: Vec<String>,
    #[serde(default)]
    pub namespaces: Vec<String>,
    /// `true`, or the selection of the processes that have wait probes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_probes: Option<WaitProbesBody>,
    /// Record the metrics of serving engines.
    #[serde(default)]
    pub engine_metrics: Option<EngineMetricsBody>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum WaitProbesBody {
    All(bool),
    Selection(String),
}

impl WaitProbesBody {
    fn selector(self) -> Result<Option<WaitSelector>, ErrorResponse> {
        match self {
            Self::All(all) => Ok(all.then_some(WaitSelector::All)),
            Self::Selection(text) => text.parse().map(Some).map_err(|error: SelectorError| bad(format!("wait_probes: {error}"))),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineMetricsBody {
    pub every_seconds: f64,
    /// As NAME=PATH,METRIC=MEANING,..
    pub rules: Vec<String>,
}

impl Default for EngineMetricsBody {
    fn default() -> Self {
        Self { every_seconds: DEFAULT_EVERY.as_secs_f64(), rules: Vec::new() }
    }
}

/// Response to `POST sessions`.
#[derive(Debug, Serialize, Deserialize)]
pub struct StartedSession {
    pub id: String,
}

fn seconds(field: &str, value: f64, from: f64, to: f64) -> Result<u64, ErrorResponse> {
    if (from..=to).contains(&value) {
        return Ok((value * 1e9) as u64);
    }
    Err(bad(format!("invalid {field} = {value}: give seconds from {from} to {to}")))
}

fn names(field: &str, names: Vec<String>) -> Result<Vec<String>, ErrorResponse> {
    if names.len() > MAX_NAMES || names.iter().any(|name| name.is_empty() || name.len() > MAX_NAME_BYTES) {
        return Err(bad(format!("invalid {field}: give at most {MAX_NAMES} names of 1 to {MAX_NAME_BYTES} bytes")));
    }
    Ok(names)
}

impl EngineMetricsBody {
    fn request(self) -> Result<EngineRequest, ErrorResponse> {
        let (from, to) = (MIN_EVERY.as_secs_f64(), MAX_EVERY.as_secs_f64());
        let every = Duration::from_nanos(seconds("engine_metrics.every_seconds", self.every_seconds, from, to)?);
        if self.rules.len() > MAX_RULES {
            return Err(bad(format!("invalid engine_metrics.rules: give at most {MAX_RULES} rules")));
        }
        let rule = |text: &String| text.parse().map(Arc::new).map_err(|error: RuleError| bad(error.to_string()));
        Ok(EngineRequest { every, rules: self.rules.iter().map(rule).collect::<Result<_, _>>()? })
    }
}

impl SessionBody {
    fn request(self) -> Result<Request, ErrorResponse> {
        let trigger = self.trigger.map(|text| text.parse::<Trigger>().map_err(|error| bad(format!("trigger: {error}"))));
        Ok(Request {
            duration_ns: seconds("duration_seconds", self.duration_seconds, 0.001, MAX_DURATION_S)?,
            lookback_ns: seconds("lookback_seconds", self.lookback_seconds, 0.0, MAX_LOOKBACK_S)?,
            trigger: trigger.transpose()?,
            wait_probes: self.wait_probes.map(WaitProbesBody::selector).transpose()?.flatten(),
            view: View {
                gpus: names("gpus", self.gpus)?,
                containers: names("containers", self.containers)?,
                namespaces: names("namespaces", self.namespaces)?,
                from_ns: None,
                to_ns: None,
            },
            engines: self.engine_metrics.map(EngineMetricsBody::request).transpose()?,
        })
    }
}

/// Query of `GET sessions/{id}/report`. Names are separated by commas; `from` and `to` are offsets from the start of the session.
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

fn offset(field: &str, text: Option<String>) -> Result<Option<u64>, ErrorResponse> {
    let Some(text) = text else { return Ok(None) };
    let duration = || humantime::parse_duration(&text).ok().map(|duration| duration.as_secs_f64());
    let seconds = text.parse::<f64>().ok().or_else(duration);
    match seconds.filter(|seconds| (0.0..=MAX_DURATION_S + MAX_LOOKBACK_S).contains(seconds)) {
        Some(seconds) => Ok(Some((seconds * 1e9) as u64)),
        None => Err(bad(format!("invalid {field} = {text:?}: give an offset from the start of the session, such as 12.5 or 1m"))),
    }
}

impl ReportQuery {
    /// The filters of this query replace those that were given when the session was started.
    fn view(self, recorded: &View) -> Result<View, ErrorResponse> {
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
        .merge(super::experiments::router())
}

async fn start(State(state): State<Arc<AppState>>, request: HttpRequest) -> Result<impl IntoResponse, ErrorResponse> {
    let body: SessionBody = body(request, BODY_TIMEOUT).await?;
    let mut request = body.request()?;
    if let Some(engines) = &mut request.engines {
        let config = state.config();
        if !config.engine_access {
            return Err(ErrorResponse(StatusCode::CONFLICT, NO_ENGINE_ACCESS.into()));
        }
        engine_rules::check_session(&engines.rules, &config.engine_rules)
            .map_err(|conflict| ErrorResponse(StatusCode::CONFLICT, format!("engine_metrics.rules: {conflict}")))?;
        engines.rules.splice(0..0, config.engine_rules.iter().cloned());
    }
    let id = state.recorder.start(request).await?;
    Ok((StatusCode::CREATED, Json(StartedSession { id })))
}

async fn list(State(state): State<Arc<AppState>>) -> Result<impl IntoResponse, ErrorResponse> {
    state.recorder.list_earlier().await?;
    Ok(Json(state.recorder.list()))
}

async fn status(State(state): State<Arc<AppState>>, Path(id): Path<String>) -> Result<impl IntoResponse, ErrorResponse> {
    Ok(Json(state.recorder.status(&id)?))
}

async fn stop(State(state): State<Arc<AppState>>, Path(id): Path<String>) -> Result<impl IntoResponse, ErrorResponse> {
    state.recorder.stop(id.clone()).await?;
    Ok(Json(state.recorder.status(&id)?))
}

async fn remove(State(state): State<Arc<AppState>>, Path(id): Path<String>) -> Result<StatusCode, ErrorResponse> {
    state.recorder.remove(id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// During the recording: the part that is written.
async fn file(State(state): State<Arc<AppState>>, Path(id): Path<String>) -> Result<Response, ErrorResponse> {
    let (file, path) = state.recorder.open(id).await?;
    let bytes = match file.metadata() {
        Ok(meta) => meta.len(),
        Err(source) => return Err(StoreError::File { path, source }.into()),
    };
    // The file may grow meanwhile; the response states its present length.
    let stream = futures_util::stream::try_unfold(file.take(bytes), |mut rest| async move {
        let chunk = tokio::task::spawn_blocking(move || {
            let mut chunk = Vec::with_capacity(CHUNK_BYTES);
            let read = rest.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut chunk)?;
            std::io::Result::Ok((read > 0).then(|| (Bytes::from(chunk), rest)))
        });
        chunk.await?
    });
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("session.gpus").trim_end_matches(".part").to_owned();
    let mut response = Response::new(Body::from_stream(stream));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(bytes));
    if let Ok(value) = HeaderValue::from_str(&format!("attachment; filename=\"{name}\"")) {
        headers.insert(header::CONTENT_DISPOSITION, value);
    }
    Ok(response)
}

fn format_named(name: &str) -> Result<Format, ErrorResponse> {
    name.parse().map_err(|_| {
        let name: String = name.chars().take(40).collect();
        let names: Vec<&str> = Format::VARIANTS.iter().map(|format| format.name()).collect();
        bad(format!("unknown format {name:?}; choose from {}", names.join(", ")))
    })
}

async fn report(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
    query: Result<Query<ReportQuery>, QueryRejection>,
) -> Result<impl IntoResponse, ErrorResponse> {
    let Query(mut query) = query.map_err(|rejection| bad(rejection.body_text()))?;
    let format = query.format.take().map_or(Ok(Format::Json), |name| format_named(&name))?;
    let (file, path) = state.recorder.open(id).await?;
    let internal = |error| ErrorResponse(StatusCode::INTERNAL_SERVER_ERROR, error);
    let report = tokio::task::spawn_blocking(move || {
        let session = read_from(&file, &path).map_err(|error| internal(display_chain(&error)))?;
        let view = query.view(&session.header.view)?;
        let options = TextOptions { width: None, colour: false, unicode: true };
        Ok::<_, ErrorResponse>(format.render(&sampler_report::build(&session, &view), &options))
    });
    let text = report.await.map_err(|_| internal("cannot create the report: its task failed".into()))??;
    Ok(([(header::CONTENT_TYPE, format.content_type())], text))
}

pub fn metrics(view: &RecorderView, uploads: Option<Vec<(&'static str, f64)>>, to: &mut Page) {
    let sessions = crate::session::Phase::VARIANTS.iter().zip(view.sessions);
    to.add_each(&families::SESSIONS, "state", sessions.map(|(phase, n)| (phase.name(), n as f64)));
    to.add_one(&families::DROPPED_FRAMES, view.dropped_frames as f64);
    to.add_each(&families::UPLOADS, "outcome", uploads.into_iter().flatten());
    to.add_one(&families::RING_BYTES, view.ring_bytes as f64);
    to.add_one(&families::RING_SECONDS, view.ring_seconds);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: &str, expect: &str) {
        let result = match serde_json::from_str::<SessionBody>(body) {
            Err(error) => error.to_string(),
            Ok(body) => body.request().map_or_else(|error| error.1, |request| format!("{request:?}")),
        };
        assert!(result.contains(expect), "{body}: {result}");
    }

    #[tokio::test]
    async fn a_request_body_is_limited_in_bytes_and_time() {
        const LIMIT: Duration = Duration::from_millis(50);
        let json = r#"{"duration_seconds": 60}"#;
        let read = async |content: Body| {
            let request = HttpRequest::builder().header(header::CONTENT_TYPE, "application/json").body(content).unwrap();
            let layer = axum::extract::DefaultBodyLimit::max(MAX_BODY_BYTES);
            // The limit as the router has it.
            let handler = async |request: HttpRequest| {
                let body: Result<SessionBody, ErrorResponse> = body(request, LIMIT).await;
                body.map(|body| body.duration_seconds.to_string())
            };
            let response = handler.layer(layer).call(request, ()).await;
            let status = response.status().as_u16();
            (status, String::from_utf8(axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap().into()).unwrap())
        };
        assert_eq!(read(Body::from(json)).await, (200, "60".to_owned()));
        let long = format!("{json}{}", " ".repeat(MAX_BODY_BYTES));
        // With its length in the head, and without.
        let parts = futures_util::stream::iter([std::io::Result::Ok(Bytes::from(long.clone()))]);
        for long in [Body::from(long), Body::from_stream(parts)] {
            let (status, error) = read(long).await;
            assert!(status == 413 && error.contains("at most 1048576 bytes"), "{status}: {error}");
        }
        // A part that no other follows, and parts that follow for too long.
        let first = futures_util::stream::once(std::future::ready(std::io::Result::Ok(Bytes::from("{"))));
        let half = Body::from_stream(futures_util::StreamExt::chain(first, futures_util::stream::pending()));
        let parts = futures_util::stream::unfold((), |()| async {
            tokio::time::sleep(LIMIT / 10).await;
            Some((std::io::Result::Ok(Bytes::from(" ")), ()))
        });
        for slow in [half, Body::from_stream(parts)] {
            let (status, error) = read(slow).await;
            assert!(status == 408 && error.contains("did not arrive within"), "{status}: {error}");
        }
    }

    #[test]
    fn a_request_body_is_validated() {
        check(r#"{"duration_seconds": 60}"#, "duration_ns: 60000000000, lookback_ns: 0, trigger: None");
        check(r#"{"duration_seconds": 1, "lookback_seconds": 30, "trigger": "busy>0.9"}"#, "measure: Busy");
        check(r#"{"duration_seconds": 1, "trigger": null, "gpus": ["0"]}"#, r#"gpus: ["0"]"#);
        check("{}", "missing field `duration_seconds`");
        check(r#"{"duration_seconds": 0}"#, "invalid duration_seconds = 0:");
        check(r#"{"duration_seconds": 1e9}"#, "invalid duration_seconds = 1000000000:");
        check(r#"{"duration_seconds": 1, "lookback_seconds": -1}"#, "invalid lookback_seconds = -1:");
        check(r#"{"duration_seconds": 1, "trigger": "x>1"}"#, "trigger: unknown measure \"x\"");
        check(r#"{"duration_seconds": 1, "gpus": [""]}"#, "invalid gpus:");
        check(r#"{"duration_seconds": 1, "engine_metrics": {}}"#, "engines: Some(EngineRequest { every: 5s, rules: [] })");
        check(
            r#"{"duration_seconds": 1, "engine_metrics": {"every_seconds": 0.1}}"#,
            "invalid engine_metrics.every_seconds = 0.1:",
        );
        check(r#"{"duration_seconds": 1, "engine_metrics": {"rules": ["a=/x,b=waiting"]}}"#, "invalid engine rule");
        check(r#"{"duration_seconds": 1, "lookbak": 3}"#, "unknown field `lookbak`");
    }

    #[test]
    fn a_report_query_replaces_the_filters_of_the_session() {
        let recorded = View { namespaces: vec!["a".into()], ..View::default() };
        let query =
            ReportQuery { container: Some("x,y".into()), from: Some("1.5".into()), to: Some("1m".into()), ..Default::default() };
        let Ok(view) = query.view(&recorded) else { panic!() };
        assert_eq!((view.containers, view.namespaces), (vec!["x".to_owned(), "y".into()], vec!["a".to_owned()]));
        assert_eq!((view.from_ns, view.to_ns), (Some(1_500_000_000), Some(60_000_000_000)));
        for invalid in ["-1", "nan", "soon", "1e300"] {
            let query = ReportQuery { from: Some(invalid.into()), ..Default::default() };
            assert!(query.view(&recorded).is_err_and(|error| error.1.contains("from = ")), "{invalid}");
        }
    }

    /// The body of a request for a session, and the query of a report: what is accepted is within the limits.
    #[test]
    fn fuzz_session_request() {
        devkit::fuzz(file!(), "session_request", move |bytes| {
            if let Ok(Ok(request)) = serde_json::from_slice::<SessionBody>(bytes).map(SessionBody::request) {
                assert!((1_000_000..=(MAX_DURATION_S * 1e9) as u64).contains(&request.duration_ns), "{}", request.duration_ns);
                assert!(request.lookback_ns <= (MAX_LOOKBACK_S * 1e9) as u64, "{}", request.lookback_ns);
                let lists = [&request.view.gpus, &request.view.containers, &request.view.namespaces];
                assert!(lists.iter().all(|list| list.len() <= MAX_NAMES && list.iter().all(|name| name.len() <= MAX_NAME_BYTES)));
            }
            let Ok(uri) = format!("/?{}", String::from_utf8_lossy(bytes)).parse() else { return };
            let Ok(Query(mut query)) = Query::<ReportQuery>::try_from_uri(&uri) else { return };
            if let Some(Err(error)) = query.format.take().map(|name| format_named(&name)) {
                assert!(error.1.len() < 600, "{}", error.1);
            }
            if let Ok(view) = query.view(&View::default()) {
                let most = ((MAX_DURATION_S + MAX_LOOKBACK_S) * 1e9) as u64;
                assert!(view.from_ns.into_iter().chain(view.to_ns).all(|ns| ns <= most), "{view:?}");
            }
        });
    }
}
