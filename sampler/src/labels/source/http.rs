//! HTTP GET over a Unix socket, each on a new connection, so that a runtime that hung or was replaced does not affect later requests.

use std::io;
use std::path::Path;

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use sampler_labels::ABSENT;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::file::is_absent;
use super::reply::SourceReply;

/// The inspect record of a container with a thousand labels is 100 KiB.
pub const MAX_BODY_BYTES: usize = 4 << 20;
/// Longer texts of errors are truncated.
const MAX_ERROR_CHARS: usize = 200;

/// Ends the connection's task on drop, also if the request is cancelled.
struct Connection(tokio::task::JoinHandle<hyper::Result<()>>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Returns status and body.
pub async fn get(socket: &Path, path: &str) -> anyhow::Result<(u16, Bytes)> {
    let stream = UnixStream::connect(socket).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let _connection = Connection(tokio::spawn(connection));
    let request =
        hyper::Request::get(path).header("Host", "localhost").header("Connection", "close").body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status().as_u16();
    let body = Limited::new(response.into_body(), MAX_BODY_BYTES).collect().await.map_err(|error| anyhow::anyhow!(error))?;
    Ok((status, body.to_bytes()))
}

/// Gets and decodes a record. Status 404 is "not found"; any other status, and an invalid record, is an error.
pub async fn record<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, SourceReply> {
    match get(socket, path).await {
        Ok((200, body)) => {
            serde_json::from_slice(&body).map_err(|error| SourceReply::error(format!("invalid record in the response: {error}")))
        }
        Ok((404, _)) => Err(SourceReply::not_found()),
        Ok((status, body)) => {
            let text: String = String::from_utf8_lossy(&body).trim().chars().take(MAX_ERROR_CHARS).collect();
            Err(SourceReply::error(format!("HTTP {status} {text}")))
        }
        // The socket was removed since it was last seen.
        Err(error) if error.downcast_ref::<io::Error>().is_some_and(is_absent) => Err(SourceReply::not_queried(ABSENT)),
        Err(error) => Err(SourceReply::error(format!("{error:#}"))),
    }
}

/// Checks that the server responds with a status other than 5xx.
pub async fn check_responds(socket: &Path, path: &str) -> Result<(), String> {
    match get(socket, path).await {
        Ok((status, _)) if status < 500 => Ok(()),
        Ok((status, _)) => Err(format!("HTTP {status}")),
        Err(error) => Err(format!("{error:#}")),
    }
}
