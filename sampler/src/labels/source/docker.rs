//! Docker Engine: one plain inspect per question, and its events through bollard.
//!
//! The inspect goes without bollard and without a version in its path: bollard fails the whole answer on one unknown enum value
//! and cannot be constructed while the socket is absent. Its events are only hints, so losing them costs nothing but time.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bollard::query_parameters::EventsOptionsBuilder;
use futures_util::StreamExt as _;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use sampler_core::labels::Source;
use tokio::net::UnixStream;
use tokio::sync::mpsc::UnboundedSender;

use super::files::DockerRecord;
use super::Answer;
use crate::labels::Word;

/// An engine that takes longer is stuck; the ladder asks again.
const TIMEOUT: Duration = Duration::from_secs(2);
const MAX_BODY_BYTES: usize = 4 << 20;
const RECONNECT_FIRST: Duration = Duration::from_millis(500);
const RECONNECT_LAST: Duration = Duration::from_secs(30);
/// bollard's own limit for one request; events last longer on purpose.
const BOLLARD_SECONDS: u64 = 10;

pub async fn inspect(socket: &Path, id: &str) -> Answer {
    match tokio::time::timeout(TIMEOUT, try_inspect(socket, id)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => Answer::failed("error", format!("asking Docker about {id}: {error:#}")),
        Err(_) => Answer::failed("timeout", format!("Docker did not answer within {} s", TIMEOUT.as_secs())),
    }
}

async fn try_inspect(socket: &Path, id: &str) -> anyhow::Result<Answer> {
    let stream = match UnixStream::connect(socket).await {
        Ok(stream) => stream,
        // No engine here: that is no failure of one.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Answer::not_found()),
        Err(error) => return Err(error.into()),
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = hyper::Request::get(format!("/containers/{id}/json")).header("Host", "docker").body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_BODY_BYTES).collect().await.map_err(|error| anyhow::anyhow!(error));
    connection.abort();
    match status.as_u16() {
        200 => Ok(Answer::found(serde_json::from_slice::<DockerRecord>(&body?.to_bytes())?.facts())),
        404 => Ok(Answer::not_found()),
        _ => anyhow::bail!("HTTP {status}: {}", String::from_utf8_lossy(&body?.to_bytes()).trim()),
    }
}

/// Follows Docker's events for the life of the process.
pub async fn follow(socket: PathBuf, to: UnboundedSender<Word>) {
    let mut pause = RECONNECT_FIRST;
    loop {
        match events(&socket, &to).await {
            Ok(()) => pause = RECONNECT_FIRST,
            Err(error) => {
                tracing::debug!(error = format!("{error:#}"), "Docker's events cannot be followed");
                pause = (pause * 2).min(RECONNECT_LAST);
            }
        }
        if to.is_closed() {
            return;
        }
        tokio::time::sleep(pause).await;
    }
}

async fn events(socket: &Path, to: &UnboundedSender<Word>) -> anyhow::Result<()> {
    // Nothing to connect to yet; looking is cheaper than failing.
    if !socket.exists() {
        return Ok(());
    }
    let path = socket.to_string_lossy();
    let docker = bollard::Docker::connect_with_unix(&path, BOLLARD_SECONDS, bollard::API_DEFAULT_VERSION)?;
    let docker = docker.negotiate_version().await?;
    let filters = std::collections::HashMap::from([("type", vec!["container"])]);
    let mut stream = docker.events(Some(EventsOptionsBuilder::new().filters(&filters).build()));
    to.send(Word::Back(Source::Docker)).map_err(|_| anyhow::anyhow!("the label service ended"))?;
    while let Some(event) = stream.next().await {
        if let Some(id) = event?.actor.and_then(|actor| actor.id) {
            to.send(Word::Hint(id)).map_err(|_| anyhow::anyhow!("the label service ended"))?;
        }
    }
    Ok(())
}
