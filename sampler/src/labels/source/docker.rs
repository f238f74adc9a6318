//! Docker Engine, and podman through the same API: one plain inspect per question, and events through bollard.
//!
//! The inspect goes without bollard and without a version in its path: bollard fails the whole answer on one unknown enum value
//! and cannot be constructed while the socket is absent. Its events are only hints, so losing them costs nothing but time.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bollard::query_parameters::EventsOptionsBuilder;
use futures_util::StreamExt as _;
use sampler_core::cgroup_path::Runtime;
use tokio::sync::mpsc::Sender;

use super::answer::Answer;
use super::docker_file::DockerRecord;
use super::http;
use crate::labels::message::LabelMessage;

const RECONNECT_FIRST: Duration = Duration::from_millis(500);
const RECONNECT_LAST: Duration = Duration::from_secs(30);
/// bollard's own limit for one request; events last longer on purpose.
const BOLLARD_SECONDS: u64 = 10;
/// What is done to containers of which labels could be new.
const ACTIONS: [&str; 4] = ["create", "start", "rename", "restart"];

pub async fn ask(socket: &Path, runtime: Runtime, id: &str) -> Answer {
    match http::record::<DockerRecord>(socket, &format!("/containers/{id}/json")).await {
        Ok(record) => record.answer(runtime, id),
        Err(answer) => answer,
    }
}

/// Follows the engine's events for the life of the process.
pub async fn follow(socket: PathBuf, to: Sender<LabelMessage>) {
    let mut pause = RECONNECT_FIRST;
    loop {
        match events(&socket, &to).await {
            Ok(()) => pause = RECONNECT_FIRST,
            Err(error) => {
                tracing::debug!(socket = %socket.display(), error = format!("{error:#}"), "events cannot be followed");
                pause = (pause * 2).min(RECONNECT_LAST);
            }
        }
        if to.is_closed() {
            return;
        }
        tokio::time::sleep(pause).await;
    }
}

async fn events(socket: &Path, to: &Sender<LabelMessage>) -> anyhow::Result<()> {
    // Nothing to connect to yet; looking is cheaper than failing, and not done on a thread that serves others.
    let path = socket.to_owned();
    if !tokio::task::spawn_blocking(move || path.exists()).await? {
        return Ok(());
    }
    let docker = bollard::Docker::connect_with_unix(&socket.to_string_lossy(), BOLLARD_SECONDS, bollard::API_DEFAULT_VERSION)?;
    let filters = std::collections::HashMap::from([("type", vec!["container"]), ("event", ACTIONS.to_vec())]);
    let mut stream = docker.events(Some(EventsOptionsBuilder::new().filters(&filters).build()));
    while let Some(event) = stream.next().await {
        if let Some(id) = event?.actor.and_then(|actor| actor.id) {
            to.send(LabelMessage::Hint(id)).await.map_err(|_| anyhow::anyhow!("the label service ended"))?;
        }
    }
    Ok(())
}
