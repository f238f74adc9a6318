//! Which requests reach a handler.
//!
//! On loopback a request with a foreign Host or Origin is rejected, so that a web page cannot read the metrics through the browser. Hosts
//! that the operator allows, for a proxy, are accepted. Health has no such condition. A request that changes something is rejected if its
//! Origin is any other page, including a page of another server on this machine.
//!
//! Beyond loopback, and wherever users or client certificates are configured, every route requires a credential, except health, the files
//! of the web page and, if configured, /metrics. With users the files of the page require one as well, so that the browser asks for it.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use rustls::pki_types::CertificateDer;

use super::access::{foreign, from_another_page};
use super::rejections::RejectionReason;
use super::scrapers::ConnectionId;
use super::state::AppState;
use super::web;
use crate::config::Config;
use crate::security::{Rules, Unauthorized};

/// The `Server` header of every response.
pub const SERVER: &str = concat!("gpu-sampler/", env!("CARGO_PKG_VERSION"));

/// The connection of a request.
#[derive(Clone, Debug)]
pub struct Connection {
    pub id: ConnectionId,
    pub peer: IpAddr,
    pub is_tls: bool,
    /// What the client showed when the connection began, if it was verified.
    pub certificates: Option<Arc<[CertificateDer<'static>]>>,
    /// Of the web configuration with which it was accepted.
    pub generation: u64,
}

impl Connection {
    /// For a request without one, in tests.
    fn unknown() -> Self {
        let peer = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        Self { id: ConnectionId(0), peer, is_tls: false, certificates: None, generation: 0 }
    }

    /// Whether the client has a certificate that these rules accept, which may be newer than the connection.
    fn has_certificate(&self, rules: &Rules) -> bool {
        self.certificates
            .as_ref()
            .is_some_and(|chain| self.generation == rules.generation || rules.tls().is_some_and(|tls| tls.verifies(chain)))
    }

    pub fn of(request: &Request) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_else(Self::unknown)
    }
}

/// Whether a request to an open route has credentials of its own.
#[derive(Clone, Copy, Debug)]
pub struct IsAuthorized(pub bool);

struct Rejection {
    reason: RejectionReason,
    status: StatusCode,
    message: String,
}

impl Rejection {
    fn foreign((status, message): (StatusCode, String)) -> Self {
        Self { reason: RejectionReason::ForeignHost, status, message }
    }

    fn unauthorized(problem: &Unauthorized) -> Self {
        let (reason, status) = match problem {
            Unauthorized::TooManyPasswords => (RejectionReason::RateLimit, StatusCode::TOO_MANY_REQUESTS),
            _ => (RejectionReason::Unauthorized, StatusCode::UNAUTHORIZED),
        };
        Self { reason, status, message: format!("{problem}\n") }
    }

    fn response(self, rules: &Rules) -> Response {
        let mut response = (self.status, self.message).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            for challenge in rules.challenges() {
                response.headers_mut().append(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
            }
        }
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

pub async fn guard(State(state): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    let rules = state.security.current().await;
    let connection = Connection::of(&request);
    let config = state.config();
    let (mut head, body) = request.into_parts();
    let mut response = match check(&config, &rules, &connection, &head).await {
        Ok(is_authorized) => {
            head.extensions.insert(is_authorized);
            next.run(Request::from_parts(head, body)).await
        }
        Err(rejection) => {
            state.rejections.record(rejection.reason, connection.peer, &rejection.message);
            rejection.response(&rules)
        }
    };
    let headers = response.headers_mut();
    // `explain` distinguishes the "not found" of an agent from that of another server by this header.
    headers.insert(header::SERVER, HeaderValue::from_static(SERVER));
    add_headers(&rules, headers);
    if connection.generation != state.security.rules().generation {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// The pages of metrics.
fn is_page(path: &str) -> bool {
    path == "/metrics" || path == "/metrics/cadvisor"
}

/// The configured ones; those of a handler take precedence.
fn add_headers(rules: &Rules, headers: &mut HeaderMap) {
    for (name, value) in &rules.web.headers {
        headers.entry(name).or_insert_with(|| value.clone());
    }
}

async fn check(config: &Config, rules: &Rules, connection: &Connection, head: &Parts) -> Result<IsAuthorized, Rejection> {
    let (path, headers) = (head.uri.path(), &head.headers);
    let is_health = path == "/healthz" || path == "/readyz";
    if rules.web.rate_limit.as_ref().is_some_and(|limit| !is_health && !limit.admits(Instant::now())) {
        let message = "too many requests: above the rate limit of the web configuration\n".to_owned();
        return Err(Rejection { reason: RejectionReason::RateLimit, status: StatusCode::TOO_MANY_REQUESTS, message });
    }
    let is_loopback = config.listen.ip().is_loopback();
    if is_loopback {
        // The probes of a kubelet name the pod's address, or a proxy's.
        let foreign = foreign(headers, config.listen.ip(), &config.allowed_hosts).filter(|_| !is_health);
        let rejected =
            foreign.or_else(|| from_another_page(&head.method, headers, &config.allowed_hosts, Some(connection.is_tls)));
        if let Some(rejected) = rejected {
            return Err(Rejection::foreign(rejected));
        }
    }
    if is_health || (is_loopback && !rules.web.has_credentials()) {
        return Ok(IsAuthorized(true));
    }
    let authorized = rules.authorize(headers, connection.has_certificate(rules), connection.peer).await;
    let is_open = (web::is_file(path) && rules.web.users.is_empty()) || (config.open_metrics && is_page(path));
    match authorized {
        Ok(credential) => {
            // TLS may end at a proxy, so either scheme is possible.
            let rejected = credential.is_ambient().then(|| from_another_page(&head.method, headers, &config.allowed_hosts, None));
            rejected.flatten().map_or(Ok(IsAuthorized(true)), |rejected| Err(Rejection::foreign(rejected)))
        }
        Err(_) if is_open => Ok(IsAuthorized(false)),
        Err(problem) => Err(Rejection::unauthorized(&problem)),
    }
}
