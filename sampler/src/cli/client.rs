//! HTTP client for a running agent.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

use super::access::AgentAccess;
use super::text::terminal_safe;

/// For the response to begin, and for a whole body.
pub const TIMEOUT: Duration = Duration::from_secs(5);
const MAX_BODY_BYTES: usize = 64 << 20;
/// Characters of an error message: the server may be any program, and an HTML page is not a message.
const MAX_MESSAGE_CHARS: usize = 400;

#[derive(Clone)]
pub struct Client {
    access: AgentAccess,
    authority: String,
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
    pub fn new(access: &AgentAccess) -> anyhow::Result<Self> {
        let rest = access.url.strip_prefix(if access.tls.is_some() { "https://" } else { "http://" });
        let Some(authority) = rest.map(|rest| rest.trim_end_matches('/').to_owned()) else {
            bail!("{:?} is not the address of an agent; give http://HOST:PORT or https://HOST:PORT", access.url);
        };
        Ok(Self { access: access.clone(), authority })
    }

    pub fn url(&self) -> &str {
        &self.access.url
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
            Ok(reply) => reply.with_context(|| format!("querying the agent at {}", self.access.url)),
            Err(_) => bail!(
                "the agent at {} did not respond within {} s: it hangs, or another program listens there",
                self.access.url,
                limit.as_secs()
            ),
        }
    }

    async fn try_send(&self, method: Method, path: &str, body: Vec<u8>) -> anyhow::Result<Result<HttpReply, std::io::Error>> {
        let stream = match TcpStream::connect(&self.authority).await {
            Ok(stream) => stream,
            Err(error) => return Ok(Err(error)),
        };
        let (mut sender, connection) = match &self.access.tls {
            None => handshake(stream).await?,
            Some(tls) => {
                let name = host(&self.authority).and_then(|host| ServerName::try_from(host).ok());
                let name = name.with_context(|| format!("{} has no host name and port", self.access.url))?;
                let within = TlsConnector::from(Arc::clone(tls)).connect(name, stream).await;
                handshake(within.context("the TLS handshake failed")?).await?
            }
        };
        let mut request = hyper::Request::builder().method(method).uri(path).header("Host", &self.authority);
        if let Some(authorization) = &self.access.authorization {
            request = request.header("Authorization", authorization);
        }
        if !body.is_empty() {
            request = request.header("Content-Type", "application/json");
        }
        let response = sender.send_request(request.body(Full::new(Bytes::from(body)))?).await?;
        Ok(Ok(HttpReply { response, connection }))
    }
}

type RequestSender = hyper::client::conn::http1::SendRequest<Full<Bytes>>;

/// The connection runs in a task of its own.
async fn handshake<S>(stream: S) -> anyhow::Result<(RequestSender, JoinHandle<hyper::Result<()>>)>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    Ok((sender, tokio::spawn(connection)))
}

/// The host of `HOST:PORT`, without brackets.
fn host(authority: &str) -> Option<String> {
    let (host, _) = authority.rsplit_once(':')?;
    Some(host.trim_matches(['[', ']']).to_owned())
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
