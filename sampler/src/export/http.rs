//! The routes of the HTTP server, and the pages of metrics.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use tower_http::CompressionLevel;
use tower_http::compression::CompressionLayer;

use super::encode::{Page, PageTimes, TextFormat};
use super::guard::{Connection, guard};
use super::ledger::Scrape;
use super::page_body::PageBody;
use super::scrapers::ScrapeClient;
use super::state::AppState;
use super::{explain, families, gpus, html_tables, live, nvml_families, pressure, release, sessions, waits, web};
use crate::collectors::{Collector, Selection};

pub fn router(state: &Arc<AppState>) -> Router {
    // Pages are repetitive: the fastest level already makes them many times smaller.
    let pages = Router::new().route("/metrics", get(metrics)).route("/metrics/cadvisor", get(cadvisor));
    Router::new()
        .merge(pages.layer(CompressionLayer::new().quality(CompressionLevel::Fastest)))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/", get(web::index))
        .route("/app.js", get(web::script))
        .route("/style.css", get(web::style))
        .route("/api/v1/live", get(live::live))
        .route("/api/v1/containers", get(containers))
        .route("/api/v1/explain", get(explain::explain))
        .route("/api/v1/processes", get(processes))
        .merge(sessions::router())
        .merge(release::router())
        .layer(from_fn_with_state(Arc::clone(state), guard))
        .with_state(Arc::clone(state))
}

/// An empty page as the request wants it: the selected families, in the format that its client prefers.
fn page(request: &Request, default: Selection) -> Result<Page, (StatusCode, String)> {
    let query = request.uri().query().unwrap_or_default();
    let selection = Selection::of_query(query, default)
        .map_err(|error| (StatusCode::BAD_REQUEST, format!("collect[]={} is invalid: {error}\n", error.name)))?;
    // A client may send the header in parts.
    let accept = request.headers().get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    Ok(Page::new(selection, TextFormat::negotiated(&accept.collect::<Vec<_>>().join(","))))
}

fn response(page: Page) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, page.format().content_type())], Body::new(PageBody::new(page)))
}

/// Who made a request, as far as the request shows it.
fn client(request: &Request, connection: &Connection) -> ScrapeClient {
    let user_agent = request.headers().get(header::USER_AGENT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    ScrapeClient::new(connection.peer, user_agent, request.uri().query().unwrap_or_default())
}

async fn metrics(State(state): State<Arc<AppState>>, request: Request) -> Result<impl IntoResponse, (StatusCode, String)> {
    let config = state.config();
    let mut page = page(&request, config.collect)?;
    page.expect(state.page_sizes.load_full());
    state.refresh().await;
    let pressure = state.pressure.load();
    let (health, label_stats) = (state.health.view(), state.labels.stats());
    let (devices, recorder) = (state.health.driver.view(), state.recorder.view());
    let nvml = config.nvml_lib.as_ref().map_or("libnvidia-ml.so.1".into(), |p| p.to_string_lossy());
    let connection = Connection::of(&request);
    let client = client(&request, &connection);
    let scrape = Scrape {
        client: &client,
        connection: connection.id,
        at: Instant::now(),
        pods: config.pod_labels,
        has_contenders: page.selects(Collector::Contenders),
    };
    state.scrape(&scrape, |exposition, starts| {
        page.set_times(PageTimes { started: state.started, now: exposition.at });
        families::cadvisor(exposition, &mut page);
        families::containers(exposition, &mut page, starts);
        families::users(exposition, &mut page, starts);
        pressure::containers(exposition, &pressure, &mut page, starts);
        pressure::reads(&pressure, &mut page);
        waits::containers(exposition, &mut page, starts);
        waits::agent(health.wait_probed_processes, &mut page);
        gpus::gpus(exposition, &mut page, starts);
        families::agent(exposition, &health, &label_stats, &nvml, &mut page);
        families::http(&state.rejections, state.security.rules().tls().map(|tls| tls.expires), &mut page);
        families::otlp(state.health.otlp.view(), &mut page);
        nvml_families::calls(&devices, [config.gpu_budget_percent, config.gpu_wait_percent], &mut page);
        sessions::metrics(&recorder, state.health.uploads.view(), &mut page);
    });
    state.page_sizes.store(Arc::new(page.sizes()));
    Ok(response(page))
}

async fn cadvisor(State(state): State<Arc<AppState>>, request: Request) -> Result<impl IntoResponse, (StatusCode, String)> {
    let mut page = page(&request, Selection::default())?;
    state.refresh().await;
    families::cadvisor(&state.view_with_texts(), &mut page);
    Ok(response(page))
}

async fn ready(State(state): State<Arc<AppState>>) -> Response {
    if state.health.ready() {
        return "ready\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, "not ready: the first scan of processes and cgroups is not complete yet\n").into_response()
}

async fn containers(State(state): State<Arc<AppState>>) -> Response {
    state.refresh().await;
    let (view, _) = state.view();
    Json(view.pairs.iter().filter(|pair| !pair.is_host_user()).map(html_tables::json).collect::<Vec<_>>()).into_response()
}

async fn processes(State(state): State<Arc<AppState>>) -> Response {
    match state.core.processes().await {
        Some(processes) => Json(processes).into_response(),
        None => (StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping\n").into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;
    use crate::labels::LabelConfig;
    use crate::observe::kernel::layout::layout;
    use crate::security::Security;
    use crate::session::{Recorder, SessionInputs, Store};
    use arc_swap::ArcSwap;
    use sampler_core::units::WallTime;
    use tower::ServiceExt as _;

    /// The status of one request to an agent with this listen address.
    async fn status(listen: &str, method: &str, path: &str, headers: &[(&str, &str)]) -> u16 {
        status_with(listen, &[], method, path, headers).await
    }

    async fn status_with(listen: &str, allowed: &[&str], method: &str, path: &str, headers: &[(&str, &str)]) -> u16 {
        let (state, _files) = agent(listen, allowed);
        let mut request = axum::http::Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        router(&state).oneshot(request.body(Body::empty()).unwrap()).await.unwrap().status().as_u16()
    }

    /// An agent without threads of GPUs, with the folder of its files.
    fn agent(listen: &str, allowed: &[&str]) -> (Arc<AppState>, tempfile::TempDir) {
        let files = tempfile::tempdir().unwrap();
        let token = files.path().join("token");
        std::fs::write(&token, "secret").unwrap();
        let settings = Settings {
            listen: Some(listen.into()),
            allowed_host: Some(allowed.iter().map(ToString::to_string).collect()),
            token_file: Some(token),
            session_dir: Some(files.path().join("sessions")),
            label_sources: Some(vec!["bundle".into()]),
            ..Settings::default()
        };
        let config = Arc::new(settings.validate(None).unwrap());
        let security = Security::new(config.security_files(), Arc::default(), || WallTime(0)).unwrap();
        let (_events, inbox) = tokio::sync::mpsc::unbounded_channel();
        let labels = crate::labels::spawn(LabelConfig::new(&config, &layout(&config.path_procfs)), inbox).unwrap();
        let (core, _inbox) = crate::inbox::inbox().unwrap();
        let sources = SessionInputs {
            waits: crate::observe::waits::WaitRequests::default(),
            labels: Box::new(Default::default),
            snapshot: Arc::default(),
            procfs: config.path_procfs.clone(),
            node: String::new(),
            saturation_percent: 90,
            engines: tokio::sync::watch::channel(None).0,
        };
        let store = Store::new(config.session_dir.clone(), config.session_dir_max_bytes);
        let recorder = Recorder::spawn(store, sources, config.session_ring_bytes).unwrap();
        let state = AppState {
            config: ArcSwap::new(config),
            security,
            rejections: Default::default(),
            snapshot: Arc::default(),
            labels,
            pressure: Arc::default(),
            health: Arc::default(),
            ledger: Default::default(),
            page_sizes: Default::default(),
            core,
            recorder,
            gpus: crate::observe::gpu::release_channel().0,
            started: WallTime(0),
            node: None,
        };
        (Arc::new(state), files)
    }

    /// A request as text: `METHOD PATH`, headers, an empty line, the body. `None` if a server would not have passed it on.
    fn request_of(bytes: &[u8]) -> Option<Request> {
        let end = bytes.windows(2).position(|two| two == b"\n\n").unwrap_or(bytes.len());
        let mut lines = std::str::from_utf8(&bytes[..end]).ok()?.lines();
        let (method, path) = lines.next()?.split_once(' ')?;
        let mut request = axum::http::Request::builder().method(method).uri(path);
        for line in lines {
            let (name, value) = line.split_once(':')?;
            request = request.header(name, value.trim());
        }
        let body = bytes.get(end + 2..).unwrap_or_default();
        request.body(Body::from(body.to_vec())).ok()
    }

    /// Requests to an agent on loopback and to one with a token: no request is a failure of the server, and without the token only health
    /// and the files of the page are served.
    #[test]
    fn fuzz_http_request() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let agents = runtime.block_on(async { [agent("127.0.0.1:0", &["gpu.example.com"]), agent("0.0.0.0:0", &[])] });
        let [(local, _local_files), (remote, _remote_files)] = agents;
        let routers = [(router(&local), true), (router(&remote), false)];
        devkit::fuzz(file!(), "http_request", move |bytes| {
            for (router, has_token) in &routers {
                let Some(request) = request_of(bytes) else { return };
                let is_open = super::web::is_file(request.uri().path()) || matches!(request.uri().path(), "/healthz" | "/readyz");
                let is_authorized = *has_token || request.headers().contains_key(header::AUTHORIZATION);
                let (status, length) = runtime.block_on(async {
                    let response = router.clone().oneshot(request).await.unwrap();
                    let status = response.status();
                    (status, axum::body::to_bytes(response.into_body(), 4 << 20).await.unwrap().len())
                });
                assert!(status != StatusCode::INTERNAL_SERVER_ERROR && length < 4 << 20, "{status}");
                assert!(is_authorized || is_open || status == StatusCode::UNAUTHORIZED, "{status}");
            }
        });
    }

    #[tokio::test]
    async fn access_depends_on_listen_address_host_origin_and_token() {
        let local = ("Host", "localhost:9836");
        for (method, path, headers, expect) in [
            ("GET", "/", &[local][..], 200),
            ("GET", "/api/v1/live", &[local], 200),
            ("GET", "/api/v1/live", &[local, ("Origin", "http://localhost:9836")], 200),
            ("GET", "/api/v1/live", &[local, ("Origin", "https://evil.example")], 403),
            // Accepted, but the route has no such method: 405.
            ("POST", "/api/v1/live", &[local], 405),
            ("POST", "/api/v1/live", &[local, ("Origin", "http://localhost:9836")], 405),
            ("POST", "/api/v1/live", &[local, ("Origin", "https://evil.example")], 403),
            ("POST", "/api/v1/sessions", &[("Host", "evil.example")], 403),
            ("POST", "/api/v1/sessions", &[local, ("Origin", "null")], 403),
            // For example a notebook server on the same machine.
            ("POST", "/api/v1/sessions", &[local, ("Origin", "http://localhost:8888")], 403),
            ("POST", "/api/v1/gpus/release", &[local, ("Origin", "https://evil.example")], 403),
            // No thread receives the request here.
            ("POST", "/api/v1/gpus/release", &[local], 503),
            ("GET", "/api/v1/gpus/release", &[local], 405),
            ("DELETE", "/api/v1/sessions/x", &[local, ("Origin", "http://127.0.0.1:9836")], 403),
        ] {
            assert_eq!(status("127.0.0.1:0", method, path, headers).await, expect, "{method} {path} {headers:?}");
        }
        let behind_proxy = ("Host", "gpu.example.com");
        for (method, path, headers, expect) in [
            ("GET", "/metrics", &[behind_proxy][..], 200),
            ("GET", "/metrics", &[("Host", "evil.example")], 403),
            ("GET", "/metrics", &[behind_proxy, ("Origin", "https://evil.example")], 403),
            ("GET", "/api/v1/live", &[behind_proxy, ("Origin", "https://gpu.example.com")], 200),
            ("POST", "/api/v1/live", &[behind_proxy, ("Origin", "https://gpu.example.com")], 405),
            ("POST", "/api/v1/live", &[behind_proxy, ("Origin", "https://evil.example")], 403),
            ("GET", "/healthz", &[("Host", "evil.example")], 200),
            // Not ready: the guard lets it pass.
            ("GET", "/readyz", &[("Host", "10.0.0.7:9836")], 503),
        ] {
            let status = status_with("127.0.0.1:0", &["gpu.example.com"], method, path, headers).await;
            assert_eq!(status, expect, "{method} {path} {headers:?}");
        }
        let token = ("Authorization", "Bearer secret");
        for (method, path, headers, expect) in [
            ("GET", "/", &[][..], 200),
            ("GET", "/app.js", &[], 200),
            ("GET", "/style.css", &[], 200),
            ("GET", "/api/v1/live", &[], 401),
            ("GET", "/api/v1/live", &[token], 200),
            ("GET", "/metrics", &[], 401),
            ("POST", "/api/v1/sessions", &[], 401),
            ("POST", "/api/v1/gpus/release", &[], 401),
            ("POST", "/api/v1/live", &[token], 405),
        ] {
            assert_eq!(status("0.0.0.0:0", method, path, headers).await, expect, "{method} {path} {headers:?}");
        }
    }
}
