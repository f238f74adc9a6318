//! HTTP GET over a Unix socket, each on a new connection, so that a runtime that hung or was replaced does not affect later requests.

use std::error::Error;
use std::io;
use std::path::Path;
use std::sync::Arc;

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use sampler_labels::ABSENT;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::task::JoinSet;

use super::file::is_absent;
use super::reply::SourceReply;
use crate::error::display_chain;
use crate::labels::activation::{ActivationGuard, ConnectError, Dormant};

/// The inspect record of a container with a thousand labels is 100 KiB.
pub const MAX_BODY_BYTES: usize = 4 << 20;
/// Longer texts of errors are truncated.
const MAX_ERROR_CHARS: usize = 200;

/// The failure of a request.
#[derive(Debug, Error)]
pub enum HttpClientError {
    /// The socket does not exist, or was removed since it was last seen; not a failure of a server.
    #[error(transparent)]
    NoSocket(io::Error),
    #[error("{0}")]
    Dormant(Dormant),
    /// Connection refused or permission denied.
    #[error(transparent)]
    Connect(io::Error),
    /// The connection failed during the request, or the response is invalid or too large.
    #[error(transparent)]
    Exchange(Box<dyn Error + Send + Sync>),
    #[error("no such object")]
    NotFound,
    #[error("HTTP {status} {text}")]
    Status { status: u16, text: String },
    #[error("invalid record in the response")]
    Record(#[source] serde_json::Error),
}

impl From<HttpClientError> for SourceReply {
    fn from(error: HttpClientError) -> Self {
        match error {
            HttpClientError::NoSocket(_) => SourceReply::not_queried(ABSENT),
            HttpClientError::Dormant(dormant) => SourceReply::not_queried(dormant),
            HttpClientError::NotFound => SourceReply::not_found(),
            error => SourceReply::error(display_chain(&error)),
        }
    }
}

/// Returns status and body.
async fn get(guard: &Arc<ActivationGuard>, socket: &Path, path: &str) -> Result<(u16, Bytes), HttpClientError> {
    match guard.connect(socket).await {
        Ok(stream) => exchange(stream, path).await.map_err(HttpClientError::Exchange),
        Err(ConnectError::Dormant(dormant)) => Err(HttpClientError::Dormant(dormant)),
        Err(ConnectError::Io(error)) if is_absent(&error) => Err(HttpClientError::NoSocket(error)),
        Err(ConnectError::Io(error)) => Err(HttpClientError::Connect(error)),
    }
}

async fn exchange(stream: UnixStream, path: &str) -> Result<(u16, Bytes), Box<dyn Error + Send + Sync>> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends the connection's task on drop, also if the request is cancelled.
    let mut tasks = JoinSet::new();
    tasks.spawn(connection);
    let request = hyper::Request::get(path).header("Host", "localhost").header("Connection", "close");
    let response = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
    let status = response.status().as_u16();
    let body = Limited::new(response.into_body(), MAX_BODY_BYTES).collect().await?;
    Ok((status, body.to_bytes()))
}

/// Gets and decodes a record. Any status other than 200, and an invalid record, is an error.
pub async fn record<T: DeserializeOwned>(guard: &Arc<ActivationGuard>, socket: &Path, path: &str) -> Result<T, HttpClientError> {
    match get(guard, socket, path).await? {
        (200, body) => serde_json::from_slice(&body).map_err(HttpClientError::Record),
        (404, _) => Err(HttpClientError::NotFound),
        (status, body) => {
            let text = String::from_utf8_lossy(&body).trim().chars().take(MAX_ERROR_CHARS).collect();
            Err(HttpClientError::Status { status, text })
        }
    }
}

/// Checks that the server responds with a status other than 5xx.
pub async fn check_responds(guard: &Arc<ActivationGuard>, socket: &Path, path: &str) -> Result<(), String> {
    match get(guard, socket, path).await {
        Ok((status, _)) if status < 500 => Ok(()),
        Ok((status, _)) => Err(format!("HTTP {status}")),
        Err(error) => Err(display_chain(&error)),
    }
}
