//! Uploads sessions that have ended to an object store, as `PREFIX/NODE/ID.gpus`.
//!
//! ```text
//!  store --files that do not change--> pending --upload--> uploaded        lost: the local file was removed first
//!                              ^------error: after a delay, which doubles
//! ```
//! What the store has is listed once after the start, so that a restart uploads what is left and nothing twice. Local files are not
//! changed or removed: their retention does not depend on the store. Sampling does not depend on this task.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::store::{EndedSession, Store, file_name};
use crate::error::display_chain;
use crate::health::Health;
use crate::health::condition::Condition;
use crate::health::outcomes::UploadOutcome;
use crate::objects::{ObjectError, Objects};

/// How often the table of sessions is read.
const TURN_EVERY: Duration = Duration::from_secs(1);
/// The delays after failures.
const FIRST_DELAY: Duration = Duration::from_secs(2);
const LONGEST_DELAY: Duration = Duration::from_mins(5);

pub struct Uploader {
    objects: Objects,
    node: String,
    store: Arc<Store>,
    health: Arc<Health>,
    /// Sessions that the object store has; `None` until it was listed.
    uploaded: Option<BTreeSet<String>>,
    pending: BTreeSet<String>,
}

fn name(session: &EndedSession) -> String {
    file_name(&session.id)
}

fn is_gone(error: &ObjectError) -> bool {
    matches!(error, ObjectError::File { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
}

impl Uploader {
    pub fn new(objects: Objects, node: String, store: Arc<Store>, health: Arc<Health>) -> Self {
        health.uploads.turn_on();
        Self { objects, node, store, health, uploaded: None, pending: BTreeSet::new() }
    }

    /// Runs until the process ends; an interrupted upload is repeated after the next start.
    pub async fn run(mut self) {
        tracing::info!(store = %self.objects.url(), node = self.node, "sessions that have ended are uploaded to the object store");
        let mut delay = FIRST_DELAY;
        loop {
            match self.turn().await {
                Ok(()) => {
                    self.health.recovered(Condition::SessionStore);
                    delay = FIRST_DELAY;
                    tokio::time::sleep(TURN_EVERY).await;
                }
                Err(error) => {
                    self.health.uploads.record(UploadOutcome::Error);
                    let problem = [display_chain(&error)];
                    self.health.report(Condition::SessionStore, &problem, |_, first| {
                        format!("sessions are not uploaded, and the local files remain: {first}")
                    });
                    tokio::time::sleep(delay).await;
                    delay = (delay * 2).min(LONGEST_DELAY);
                }
            }
        }
    }

    /// Uploads what has ended and is not uploaded yet. Without such sessions the object store is not accessed.
    async fn turn(&mut self) -> Result<(), ObjectError> {
        let ended = self.store.ended();
        self.forget_removed(&ended);
        if ended.is_empty() {
            return Ok(());
        }
        if self.uploaded.is_none() {
            self.uploaded = Some(self.list(&ended).await?);
        }
        for session in ended {
            let is_uploaded = self.uploaded.as_ref().is_some_and(|uploaded| uploaded.contains(&session.id));
            if !is_uploaded {
                self.pending.insert(session.id.clone());
                self.upload(&session).await?;
            }
        }
        Ok(())
    }

    async fn upload(&mut self, session: &EndedSession) -> Result<(), ObjectError> {
        let key = self.objects.key(&self.node, &name(session));
        let path: PathBuf = session.path.clone();
        match self.objects.put_file(&path, &key).await {
            Ok(bytes) => {
                tracing::debug!(session = session.id, bytes, "session uploaded");
                self.health.uploads.record(UploadOutcome::Ok);
            }
            // Counted when it is missing in the table, too.
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
        self.pending.remove(&session.id);
        self.uploaded.get_or_insert_default().insert(session.id.clone());
        Ok(())
    }

    /// The sessions of which the object store has a file of the same size.
    async fn list(&self, ended: &[EndedSession]) -> Result<BTreeSet<String>, ObjectError> {
        let found = self.objects.list(&self.node).await?;
        let is_there = |session: &&EndedSession| {
            let key = self.objects.key(&self.node, &name(session));
            found.iter().any(|object| object.key == key && object.bytes == session.bytes)
        };
        Ok(ended.iter().filter(is_there).map(|session| session.id.clone()).collect())
    }

    /// Counts sessions that were removed before they were uploaded, and keeps the sets as small as the table.
    fn forget_removed(&mut self, ended: &[EndedSession]) {
        let is_kept = |id: &String| ended.iter().any(|session| session.id == *id);
        if let Some(uploaded) = &mut self.uploaded {
            uploaded.retain(is_kept);
        }
        let lost: Vec<String> = self.pending.iter().filter(|id| !is_kept(id)).cloned().collect();
        for id in lost {
            tracing::warn!(
                session = id,
                "the session was removed before it was uploaded; raise session_dir_max_bytes to keep more"
            );
            self.health.uploads.record(UploadOutcome::Removed);
            self.pending.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use sampler_core::units::WallTime;

    use super::super::store::{Entry, Phase};
    use super::*;

    struct UploadScene {
        dir: tempfile::TempDir,
        store: Arc<Store>,
        health: Arc<Health>,
    }

    impl UploadScene {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::new(dir.path().join("local"), 1 << 20);
            store.prepare().unwrap();
            Self { dir, store, health: Arc::default() }
        }

        fn uploader(&self) -> Uploader {
            let url = format!("file://{}", self.dir.path().join("remote").display());
            Uploader::new(
                Objects::open(url.parse().unwrap()).unwrap(),
                "node-1".into(),
                Arc::clone(&self.store),
                Arc::clone(&self.health),
            )
        }

        fn session(&self) -> String {
            let id = self.store.add(WallTime(0), Entry::new(Phase::Recording, 1, 0, None));
            std::fs::write(self.store.begin_file(&id), "content").unwrap();
            self.store.grew(&id, 7).unwrap();
            id
        }

        fn counts(&self) -> Vec<f64> {
            self.health.uploads.view().unwrap().into_iter().map(|(_, count)| count).collect()
        }
    }

    #[tokio::test]
    async fn a_session_that_has_ended_is_uploaded_once_also_after_a_restart() {
        let scene = UploadScene::new();
        let (id, _active) = (scene.session(), scene.session());
        let mut uploader = scene.uploader();
        uploader.turn().await.unwrap();
        assert_eq!(scene.counts(), [0.0, 0.0, 0.0], "it is still recorded");
        scene.store.finish_file(&id, 1).unwrap();
        for mut uploader in [uploader, scene.uploader()] {
            uploader.turn().await.unwrap();
            uploader.turn().await.unwrap();
            assert_eq!(scene.counts(), [1.0, 0.0, 0.0]);
        }
        assert_eq!(std::fs::read(scene.dir.path().join(format!("remote/node-1/{id}.gpus"))).unwrap(), b"content");
    }

    #[tokio::test]
    async fn a_file_that_is_removed_first_is_counted() {
        let scene = UploadScene::new();
        let id = scene.session();
        scene.store.finish_file(&id, 1).unwrap();
        let blocker = scene.dir.path().join("remote");
        std::fs::write(&blocker, "not a folder").unwrap();
        let mut uploader = scene.uploader();
        uploader.turn().await.unwrap_err();
        // Not listed yet: it counts as pending only when an upload was tried.
        uploader.uploaded = Some(BTreeSet::new());
        uploader.turn().await.unwrap_err();
        scene.store.remove(&id).unwrap();
        uploader.turn().await.unwrap();
        assert_eq!(scene.counts(), [0.0, 0.0, 1.0]);
    }
}
