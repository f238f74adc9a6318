//! One GET over a Unix socket: a fresh connection each, so that a runtime that hung or was replaced leaves nothing behind.

use std::io;
use std::path::Path;

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use sampler_labels::ABSENT;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::answer::Answer;
use super::file::is_absent;

/// An inspect of a container with a thousand labels is 100 KiB; anything far beyond is none.
pub const MAX_BODY_BYTES: usize = 4 << 20;
/// As much of an error's text as people want to read.
const MAX_WORDS: usize = 200;

/// Ends the connection with the question, also when the question is given up.
struct Connection(tokio::task::JoinHandle<hyper::Result<()>>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Status and body.
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

/// GETs and decodes a record; 404 is "not found", whatever makes no sense is an error.
pub async fn record<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, Answer> {
    match get(socket, path).await {
        Ok((200, body)) => {
            serde_json::from_slice(&body).map_err(|error| Answer::error(format!("what it answers is no such record: {error}")))
        }
        Ok((404, _)) => Err(Answer::not_found()),
        Ok((status, body)) => {
            let words: String = String::from_utf8_lossy(&body).trim().chars().take(MAX_WORDS).collect();
            Err(Answer::error(format!("HTTP {status} {words}")))
        }
        // It went between its being seen and its being asked.
        Err(error) if error.downcast_ref::<io::Error>().is_some_and(is_absent) => Err(Answer::not_asked(ABSENT)),
        Err(error) => Err(Answer::error(format!("{error:#}"))),
    }
}

/// Whether it answers without an error of its own.
pub async fn answers(socket: &Path, path: &str) -> Result<(), String> {
    match get(socket, path).await {
        Ok((status, _)) if status < 500 => Ok(()),
        Ok((status, _)) => Err(format!("HTTP {status}")),
        Err(error) => Err(format!("{error:#}")),
    }
}
