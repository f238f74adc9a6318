//! Requests to a running agent.

use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// For an answer to begin.
pub const TIMEOUT: Duration = Duration::from_secs(5);
const MAX_BODY_BYTES: usize = 64 << 20;
/// What answers may be anything; a page of it is no message.
const MAX_WORDS: usize = 400;

#[derive(Clone)]
pub struct Client {
    pub agent: String,
    authority: String,
    token: Option<String>,
}

/// An answer; its body comes as long as this lives.
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

    /// `Err` within `Ok`: nobody listens there.
    pub async fn send(&self, method: Method, path: &str, body: Vec<u8>) -> anyhow::Result<Result<HttpReply, std::io::Error>> {
        match tokio::time::timeout(TIMEOUT, self.try_send(method, path, body)).await {
            Ok(answer) => answer.with_context(|| format!("asking the agent at {}", self.agent)),
            Err(_) => bail!(
                "the agent at {} did not answer within {} s: it hangs, or something else listens there",
                self.agent,
                TIMEOUT.as_secs()
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

    /// Whether an agent has answered, and not anybody else.
    pub fn is_ours(&self) -> bool {
        self.response.headers().get("Server").is_some_and(|s| s.as_bytes().starts_with(b"gpu-sampler"))
    }

    pub fn length(&self) -> Option<u64> {
        self.response.headers().get("Content-Length")?.to_str().ok()?.parse().ok()
    }

    /// The next piece of a body that may be long.
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
        let body = tokio::time::timeout(TIMEOUT, body).await.context("the answer broke off")?;
        Ok(body.map_err(|error| anyhow!(error))?.to_bytes().to_vec())
    }

    /// The body of a success; else what the agent says was wrong.
    pub async fn success(&mut self) -> anyhow::Result<Vec<u8>> {
        let (status, ours) = (self.status(), self.is_ours());
        let body = self.body().await?;
        if !ours {
            bail!("HTTP {status}: that is no gpu-sampler agent; name one with --agent or --listen");
        }
        if !status.is_success() {
            let words = words(&body);
            // An agent of another version, perhaps, that has no such thing.
            bail!("{}", if words.is_empty() { format!("HTTP {status}") } else { words });
        }
        Ok(body)
    }
}

/// The first line of an answer, or its `error`.
pub fn words(body: &[u8]) -> String {
    let told = serde_json::from_slice::<serde_json::Value>(body).ok();
    let error = told.as_ref().and_then(|told| told["error"].as_str()).map(str::to_owned);
    let text = error.unwrap_or_else(|| String::from_utf8_lossy(body).into_owned());
    text.trim().lines().next().unwrap_or_default().chars().take(MAX_WORDS).collect()
}
