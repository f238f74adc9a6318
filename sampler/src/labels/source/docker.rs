//! Docker Engine, and podman through the same API: one inspect request per query, and events through bollard.
//!
//! The inspect request does not use bollard and has no version in its path: bollard rejects a whole response with one unknown enum value,
//! and it cannot be constructed while the socket is absent. Events are only hints, so a lost event causes a delay and nothing else.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bollard::query_parameters::EventsOptionsBuilder;
use futures_util::StreamExt as _;
use sampler_core::cgroup_path::Runtime;
use tokio::sync::mpsc::Sender;

use super::docker_file::DockerRecord;
use super::http::HttpClient;
use super::reply::SourceReply;
use crate::labels::activation::{ActivationGuard, Presence};
use crate::labels::message::LabelMessage;

const RECONNECT_FIRST: Duration = Duration::from_millis(500);
const RECONNECT_LAST: Duration = Duration::from_secs(30);
/// bollard's timeout of one request; it does not apply to event streams.
const BOLLARD_SECONDS: u64 = 10;
/// Actions after which a container may have new labels.
const ACTIONS: [&str; 4] = ["create", "start", "rename", "restart"];

pub async fn query(client: &HttpClient, runtime: Runtime, id: &str) -> SourceReply {
    let record = client.record::<DockerRecord>(&format!("/containers/{id}/json")).await;
    record.map_or_else(SourceReply::from, |record| record.reply(runtime, id))
}

/// Follows the engine's events for the life of the process.
pub async fn follow_events(guard: Arc<ActivationGuard>, socket: PathBuf, to: Sender<LabelMessage>) {
    let mut pause = RECONNECT_FIRST;
    loop {
        match events(&guard, &socket, &to).await {
            Ok(()) => pause = RECONNECT_FIRST,
            Err(error) => {
                tracing::debug!(socket = %socket.display(), error = format!("{error:#}"), "cannot follow engine events");
                pause = (pause * 2).min(RECONNECT_LAST);
            }
        }
        if to.is_closed() {
            return;
        }
        tokio::time::sleep(pause).await;
    }
}

async fn events(guard: &Arc<ActivationGuard>, socket: &Path, to: &Sender<LabelMessage>) -> anyhow::Result<()> {
    // bollard opens one connection for its one request. On a blocking thread, since a file system may hang.
    let (guard, path) = (Arc::clone(guard), socket.to_owned());
    if !matches!(tokio::task::spawn_blocking(move || guard.presence(&path)).await?, Presence::Present(_)) {
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
