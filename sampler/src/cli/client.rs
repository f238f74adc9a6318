//! HTTP client for a running agent.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::text::terminal_safe;

/// For the response to begin, and for a whole body.
pub const TIMEOUT: Duration = Duration::from_secs(5);
const MAX_BODY_BYTES: usize = 64 << 20;
/// Characters of an error message: the server may be any program, and an HTML page is not a message.
const MAX_MESSAGE_CHARS: usize = 400;

/// The URL of the agent that listens at this address; one that listens on all addresses is reachable on loopback.
pub fn agent_at(mut listen: SocketAddr) -> String {
    if listen.ip().is_unspecified() {
        listen.set_ip(Ipv4Addr::LOCALHOST.into());
    }
    format!("http://{listen}")
}

#[derive(Clone)]
pub struct Client {
    pub agent: String,
    authority: String,
    token: Option<String>,
}

/// A response; dropping it closes the connection and ends the body.
pub struct HttpReply {
    response: Response<Incoming>,
    connection: JoinHandle<hyper::Result<()>>,
}

impl Drop for HttpReply {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Client {
    /// `agent` is `http://HOST:PORT`.
    pub fn new(agent: &str, token: Option<&str>) -> anyhow::Result<Self> {
        let Some(authority) = agent.strip_prefix("http://").map(|rest| rest.trim_end_matches('/')) else {
            bail!("{agent:?} is not the address of an agent; give http://HOST:PORT");
        };
        Ok(Self { agent: agent.to_owned(), authority: authority.to_owned(), token: token.map(str::to_owned) })
    }

    /// `Err` within `Ok`: the connection failed, no process listens at the address.
    pub async fn send(&self, method: Method, path: &str, body: Vec<u8>) -> anyhow::Result<Result<HttpReply, std::io::Error>> {
        self.send_within(TIMEOUT, method, path, body).await
    }

    /// As [`Client::send`], with another limit for the response to begin.
    pub async fn send_within(
        &self,
        limit: Duration,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> anyhow::Result<Result<HttpReply, std::io::Error>> {
        match tokio::time::timeout(limit, self.try_send(method, path, body)).await {
            Ok(reply) => reply.with_context(|| format!("querying the agent at {}", self.agent)),
            Err(_) => bail!(
                "the agent at {} did not respond within {} s: it hangs, or another program listens there",
                self.agent,
                limit.as_secs()
            ),
        }
    }

    async fn try_send(&self, method: Method, path: &str, body: Vec<u8>) -> anyhow::Result<Result<HttpReply, std::io::Error>> {
        let stream = match TcpStream::connect(&self.authority).await {
            Ok(stream) => stream,
            Err(error) => return Ok(Err(error)),
        };
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let mut request = hyper::Request::builder().method(method).uri(path).header("Host", &self.authority);
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if !body.is_empty() {
            request = request.header("Content-Type", "application/json");
        }
        let response = sender.send_request(request.body(Full::new(Bytes::from(body)))?).await?;
        Ok(Ok(HttpReply { response, connection }))
    }
}

impl HttpReply {
    pub fn status(&self) -> StatusCode {
        self.response.status()
    }

    /// Whether the server is a gpu-sampler agent.
    pub fn is_agent(&self) -> bool {
        self.response.headers().get("Server").is_some_and(|s| s.as_bytes().starts_with(b"gpu-sampler"))
    }

    pub fn length(&self) -> Option<u64> {
        self.response.headers().get("Content-Length")?.to_str().ok()?.parse().ok()
    }

    /// The next chunk of the body; `None` at its end.
    pub async fn chunk(&mut self) -> anyhow::Result<Option<Bytes>> {
        while let Some(frame) = self.response.frame().await {
            if let Ok(bytes) = frame?.into_data() {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }

    pub async fn body(&mut self) -> anyhow::Result<Vec<u8>> {
        let body = Limited::new(self.response.body_mut(), MAX_BODY_BYTES).collect();
        let body = tokio::time::timeout(TIMEOUT, body).await.context("the response did not complete in time")?;
        Ok(body.map_err(|error| anyhow!(error))?.to_bytes().to_vec())
    }

    /// The body of a successful response, or the agent's error message.
    pub async fn success(&mut self) -> anyhow::Result<Vec<u8>> {
        let (status, is_agent) = (self.status(), self.is_agent());
        let body = self.body().await?;
        if !is_agent {
            bail!("HTTP {status}: the server is not a gpu-sampler agent; name one with --agent or --listen");
        }
        if !status.is_success() {
            let message = error_message(&body);
            // No message: perhaps an agent of another version without this endpoint.
            bail!("{}", if message.is_empty() { format!("HTTP {status}") } else { message });
        }
        Ok(body)
    }
}

/// The `error` of a JSON body, or the body's first line; safe to display.
pub fn error_message(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Failure {
        error: String,
    }
    let text = match serde_json::from_slice::<Failure>(body) {
        Ok(failure) => failure.error,
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    let line: String = text.trim().lines().next().unwrap_or_default().chars().take(MAX_MESSAGE_CHARS).collect();
    terminal_safe(&line)
}
