//! The sessions of this run, and the session files of earlier runs.
//!
//! ```text
//!  armed --trigger fires--> recording --end, stop--> finished
//!    \--stop, timeout--> failed   \--disk--> failed      interrupted: the agent ended during the session
//! ```
//! Two locks: that of the entry table, which the recorder takes and which is never held during IO; and that of the folder, which is held
//! while files are listed. Ids are looked up in the table; an id from a request never becomes a path.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sampler_core::units::{BootNs, WallTime, rfc3339};
use serde::{Deserialize, Serialize};
use strum::{EnumCount, IntoStaticStr, VariantArray};
use thiserror::Error;

/// Maximum number of sessions; above it the oldest ended sessions and their files are removed.
const MAX_ENTRIES: usize = 1000;
/// Bytes read at the beginning and at the end of a file. A header is much shorter, an end has about 40 bytes.
const BEGINNING_BYTES: u64 = 256 << 10;
const LAST_BYTES: u64 = 4096;
/// With less free space on the disk, no session is started.
const MIN_FREE_BYTES: u64 = 1 << 20;
const FINISHED: &str = ".gpus";
/// Of the files of complete sessions, without the dot.
pub const EXTENSION: &str = FINISHED.split_at(1).1;
const PART: &str = ".gpus.part";

#[derive(Debug, Error)]
pub enum StoreError {
    #[error("cannot create the session folder {path}; set --session-dir to a writable folder", path = path.display())]
    Make { path: PathBuf, source: io::Error },
    #[error("cannot use the session folder {path}; set --session-dir to another folder", path = path.display())]
    Use { path: PathBuf, source: io::Error },
    #[error("the session folder {path} is in use by another agent; set --session-dir to another folder", path = path.display())]
    InUse { path: PathBuf },
    #[error("there is no room left on the disk of {path}", path = path.display())]
    Full { path: PathBuf },
    #[error("there is no session {0:?}")]
    Unknown(String),
    #[error("{0}")]
    Conflict(String),
    #[error("cannot read or remove {path}", path = path.display())]
    File { path: PathBuf, source: io::Error },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, EnumCount, IntoStaticStr, VariantArray)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "lowercase")]
pub enum Phase {
    Armed,
    Recording,
    Finished,
    Interrupted,
    Failed,
}

impl Phase {
    pub fn name(self) -> &'static str {
        self.into()
    }

    pub fn is_active(self) -> bool {
        matches!(self, Phase::Armed | Phase::Recording)
    }
}

/// The status of a session in the API.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SessionStatus {
    pub id: String,
    pub state: Phase,
    /// The beginning of the counted span, including the lookback. RFC 3339.
    pub started: Option<String>,
    /// Without the lookback.
    pub duration_seconds: f64,
    pub elapsed_seconds: f64,
    /// The available part of the requested lookback.
    pub lookback_seconds: f64,
    pub size_bytes: u64,
    pub trigger: Option<String>,
    pub error: Option<String>,
    pub dropped_frames: u64,
}

#[derive(Clone, Debug)]
pub struct Entry {
    pub phase: Phase,
    pub started: Option<WallTime>,
    /// When recording began, if in this run.
    pub began: Option<BootNs>,
    pub duration_ns: u64,
    /// Set when it has ended.
    pub elapsed_ns: Option<u64>,
    pub lookback_ns: u64,
    pub size_bytes: u64,
    pub trigger: Option<String>,
    pub error: Option<String>,
    pub dropped_frames: u64,
    path: Option<PathBuf>,
}

impl Entry {
    pub fn new(phase: Phase, duration_ns: u64, lookback_ns: u64, trigger: Option<String>) -> Self {
        Entry {
            phase,
            started: None,
            began: None,
            duration_ns,
            elapsed_ns: None,
            lookback_ns,
            size_bytes: 0,
            trigger,
            error: None,
            dropped_frames: 0,
            path: None,
        }
    }

    fn status(&self, id: &str, now: BootNs) -> SessionStatus {
        let seconds = |ns: u64| ns as f64 / 1e9;
        let so_far = || self.began.map_or(0, |began| now.saturating_since(began).min(self.duration_ns));
        SessionStatus {
            id: id.to_owned(),
            state: self.phase,
            started: self.started.map(rfc3339),
            duration_seconds: seconds(self.duration_ns),
            elapsed_seconds: seconds(self.elapsed_ns.unwrap_or_else(so_far)),
            lookback_seconds: seconds(self.lookback_ns),
            size_bytes: self.size_bytes,
            trigger: self.trigger.clone(),
            error: self.error.clone(),
            dropped_frames: self.dropped_frames,
        }
    }
}

/// A session with a file that does not change any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndedSession {
    pub id: String,
    pub path: PathBuf,
    pub bytes: u64,
}

#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    max_bytes: u64,
    entries: Mutex<BTreeMap<String, Entry>>,
    /// The lock file of the folder, once the folder is used.
    lock: Mutex<Option<File>>,
}

/// Of a complete session.
pub fn file_name(id: &str) -> String {
    format!("{id}{FINISHED}")
}

/// Such as `20261125-222013-00`: begins with the time, so that names sort chronologically.
fn is_id(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let digits = |part: &&str| part.bytes().all(|b| b.is_ascii_digit());
    text.len() <= 24 && parts.len() == 3 && parts[0].len() == 8 && parts[1].len() == 6 && parts.iter().all(digits)
}

impl Store {
    /// Does not access the folder.
    pub fn new(dir: PathBuf, max_bytes: u64) -> Arc<Self> {
        Arc::new(Self { dir, max_bytes, entries: Mutex::default(), lock: Mutex::default() })
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        // Each change is complete, so the table stays usable after a panic of another thread.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists the sessions of earlier runs, if the folder exists. Blocks.
    pub fn list_earlier(&self) -> Result<(), StoreError> {
        if self.dir.is_dir() { self.claim() } else { Ok(()) }
    }

    /// Creates the folder, and checks that there is room for a session. Blocks.
    pub fn prepare(&self) -> Result<(), StoreError> {
        let failed = |source| StoreError::Make { path: self.dir.clone(), source };
        DirBuilder::new().recursive(true).mode(0o750).create(&self.dir).map_err(failed)?;
        self.claim()?;
        self.make_room(0);
        match rustix::fs::statvfs(&self.dir) {
            Ok(disk) if disk.f_bavail.saturating_mul(disk.f_frsize) < MIN_FREE_BYTES => {
                Err(StoreError::Full { path: self.dir.clone() })
            }
            _ => Ok(()),
        }
    }

    fn claim(&self) -> Result<(), StoreError> {
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if lock.is_some() {
            return Ok(());
        }
        let fail = |source| StoreError::Use { path: self.dir.clone(), source };
        let file = File::options().create(true).truncate(false).write(true).open(self.dir.join(".lock")).map_err(fail)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(StoreError::InUse { path: self.dir.clone() }),
            Err(fs::TryLockError::Error(source)) => return Err(fail(source)),
        }
        let found = self.list_files().map_err(fail)?;
        // No session of this run is among them, because none could start before.
        self.entries().extend(found);
        *lock = Some(file);
        Ok(())
    }

    fn list_files(&self) -> io::Result<Vec<(String, Entry)>> {
        let mut found = Vec::new();
        for file in fs::read_dir(&self.dir)? {
            let file = file?;
            let name = file.file_name();
            let Some(name) = name.to_str() else { continue };
            let (id, part) = match (name.strip_suffix(PART), name.strip_suffix(FINISHED)) {
                (Some(id), _) => (id, true),
                (None, Some(id)) => (id, false),
                (None, None) => continue,
            };
            if is_id(id) && file.file_type()?.is_file() {
                found.push((id.to_owned(), listed(&file.path(), part)));
            }
        }
        Ok(found)
    }

    /// Adds a session that starts now; returns its id.
    pub fn add(&self, wall: WallTime, entry: Entry) -> String {
        let mut entries = self.entries();
        let second: String = rfc3339(wall).chars().take(19).filter(|c| !"-:".contains(*c)).collect();
        let second = second.replace('T', "-");
        let id = (0u32..).map(|n| format!("{second}-{n:02}")).find(|id| !entries.contains_key(id)).unwrap_or(second);
        entries.insert(id.clone(), entry);
        id
    }

    pub fn change(&self, id: &str, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.entries().get_mut(id) {
            change(entry);
        }
    }

    pub fn fail(&self, id: &str, now: BootNs, why: String) {
        tracing::warn!(session = id, "{why}");
        self.change(id, |entry| {
            let so_far = entry.began.map(|began| now.saturating_since(began).min(entry.duration_ns));
            (entry.phase, entry.elapsed_ns, entry.error) = (Phase::Failed, so_far, Some(why));
        });
    }

    /// The path of the file while it is written.
    pub fn begin_file(&self, id: &str) -> PathBuf {
        let path = self.dir.join(format!("{id}{PART}"));
        self.change(id, |entry| entry.path = Some(path.clone()));
        path
    }

    /// Renames a complete file to its final name. Blocks.
    pub fn finish_file(&self, id: &str, elapsed_ns: u64) -> io::Result<()> {
        let path = self.dir.join(file_name(id));
        fs::rename(self.dir.join(format!("{id}{PART}")), &path)?;
        self.change(id, |entry| {
            (entry.phase, entry.path, entry.elapsed_ns) = (Phase::Finished, Some(path), Some(elapsed_ns));
        });
        // The rename must also survive a loss of power.
        File::open(&self.dir)?.sync_all()
    }

    /// A file has grown to `bytes`: older ones are removed if necessary. Blocks.
    pub fn grew(&self, id: &str, bytes: u64) -> Result<(), String> {
        self.change(id, |entry| entry.size_bytes = bytes);
        if self.make_room(0) {
            return Ok(());
        }
        Err(format!("the active sessions together have reached session_dir_max_bytes ({})", self.max_bytes))
    }

    /// Removes the oldest ended sessions until all sessions and `more` bytes are within the bounds; returns whether this succeeded.
    fn make_room(&self, more: u64) -> bool {
        loop {
            let oldest = {
                let mut entries = self.entries();
                let total: u64 = entries.values().map(|entry| entry.size_bytes).sum();
                if total + more <= self.max_bytes && entries.len() <= MAX_ENTRIES {
                    return true;
                }
                let oldest = entries.iter().find(|(_, entry)| !entry.phase.is_active()).map(|(id, _)| id.clone());
                oldest.and_then(|id| entries.remove_entry(&id))
            };
            let Some((id, entry)) = oldest else { return false };
            tracing::info!(session = id, bytes = entry.size_bytes, "session removed to make room for newer ones");
            if let Some(Err(error)) = entry.path.as_ref().map(fs::remove_file)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(session = id, %error, "cannot remove the file of a session");
            }
        }
    }

    pub fn list(&self, now: BootNs) -> Vec<SessionStatus> {
        self.entries().iter().map(|(id, entry)| entry.status(id, now)).collect()
    }

    pub fn status(&self, id: &str, now: BootNs) -> Result<SessionStatus, StoreError> {
        self.entries().get(id).map(|entry| entry.status(id, now)).ok_or_else(|| unknown(id))
    }

    /// Number of sessions, indexed like [`Phase`].
    pub fn counts(&self) -> [u64; Phase::COUNT] {
        let mut counts = [0; Phase::COUNT];
        for entry in self.entries().values() {
            counts[entry.phase as usize] += 1;
        }
        counts
    }

    /// The sessions that have ended and can be reported, those of an agent that ended first among them; oldest first.
    pub fn ended(&self) -> Vec<EndedSession> {
        let ended = |(id, entry): (&String, &Entry)| {
            let can_be_reported = match entry.phase {
                Phase::Finished => true,
                Phase::Interrupted => entry.error.is_none(),
                Phase::Armed | Phase::Recording | Phase::Failed => false,
            };
            let path = entry.path.clone().filter(|_| can_be_reported)?;
            Some(EndedSession { id: id.clone(), path, bytes: entry.size_bytes })
        };
        self.entries().iter().filter_map(ended).collect()
    }

    pub fn active(&self) -> usize {
        self.entries().values().filter(|entry| entry.phase.is_active()).count()
    }

    /// Opens the file of a session, which may still grow. Blocks.
    pub fn open(&self, id: &str) -> Result<(File, PathBuf), StoreError> {
        let path = || {
            let entries = self.entries();
            let entry = entries.get(id).ok_or_else(|| unknown(id))?;
            let none = || StoreError::Conflict(format!("session {id} has no file: recording has not begun"));
            entry.path.clone().ok_or_else(none)
        };
        let first = path()?;
        match File::open(&first) {
            // The file was renamed in between.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let path = path()?;
                File::open(&path).map(|file| (file, path.clone())).map_err(|source| StoreError::File { path, source })
            }
            Err(source) => Err(StoreError::File { path: first, source }),
            Ok(file) => Ok((file, first)),
        }
    }

    /// Removes an ended session. Blocks.
    pub fn remove(&self, id: &str) -> Result<(), StoreError> {
        let entry = {
            let mut entries = self.entries();
            let entry = entries.get(id).ok_or_else(|| unknown(id))?;
            if entry.phase.is_active() {
                return Err(StoreError::Conflict(format!("session {id} is {}; stop it first", entry.phase.name())));
            }
            entries.remove(id)
        };
        match entry.and_then(|entry| entry.path).map(|path| (fs::remove_file(&path), path)) {
            Some((Err(source), path)) if source.kind() != io::ErrorKind::NotFound => Err(StoreError::File { path, source }),
            _ => Ok(()),
        }
    }
}

fn unknown(id: &str) -> StoreError {
    StoreError::Unknown(id.chars().take(40).collect())
}

/// The entry for a file of an earlier run.
fn listed(path: &Path, part: bool) -> Entry {
    let mut entry = Entry::new(if part { Phase::Interrupted } else { Phase::Finished }, 0, 0, None);
    entry.path = Some(path.to_owned());
    match peek(path) {
        Ok((bytes, beginning, last)) => {
            entry.size_bytes = bytes;
            let end = sampler_session::end(&last);
            match sampler_session::header(&beginning) {
                Some(header) => {
                    entry.started = Some(header.start_wall);
                    let counted = end.map(|end| end.at.saturating_since(header.start));
                    (entry.duration_ns, entry.elapsed_ns) = (counted.unwrap_or_default(), Some(counted.unwrap_or_default()));
                    entry.trigger = header.trigger;
                }
                None => entry.error = Some("cannot read its header".into()),
            }
            match end {
                Some(end) => (entry.phase, entry.dropped_frames) = (Phase::Finished, end.dropped_frames),
                None => entry.phase = Phase::Interrupted,
            }
        }
        Err(error) => entry.error = Some(format!("cannot read the file: {error}")),
    }
    entry
}

/// Size, first bytes and last bytes.
fn peek(path: &Path) -> io::Result<(u64, Vec<u8>, Vec<u8>)> {
    let mut file = File::open(path)?;
    let bytes = file.metadata()?.len();
    let (mut beginning, mut last) = (Vec::new(), Vec::new());
    (&file).take(BEGINNING_BYTES).read_to_end(&mut beginning)?;
    file.seek(SeekFrom::Start(bytes.saturating_sub(LAST_BYTES)))?;
    file.take(LAST_BYTES).read_to_end(&mut last)?;
    Ok((bytes, beginning, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_a_fixed_form() {
        for (text, expect) in [
            ("20261125-222013-00", true),
            ("20261125-222013-1234", true),
            ("../../etc/passwd", false),
            ("20261125-222013-00/..", false),
            ("20261125-222013", false),
            ("", false),
        ] {
            assert_eq!(is_id(text), expect, "{text}");
        }
    }

    #[test]
    fn a_folder_is_used_by_one_agent_only() {
        let dir = tempfile::tempdir().unwrap();
        let new = || Store::new(dir.path().join("a/b"), 1 << 20);
        let first = new();
        assert!(first.list_earlier().is_ok() && !dir.path().join("a").exists(), "listing creates nothing");
        first.prepare().unwrap();
        assert!(matches!(new().prepare(), Err(StoreError::InUse { .. })));
        drop(first);
        new().prepare().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let error = Store::new(dir.path().join("file/x"), 1).prepare().unwrap_err();
        assert!(error.to_string().contains("--session-dir"), "{error}");
    }

    #[test]
    fn the_oldest_ended_sessions_are_removed_first() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path().to_owned(), 100);
        store.prepare().unwrap();
        let ids: Vec<String> = (0..4).map(|_| store.add(WallTime(0), Entry::new(Phase::Recording, 1, 0, None))).collect();
        assert_eq!(ids[1], "19700101-000000-01");
        for id in &ids[..3] {
            std::fs::write(store.begin_file(id), "x").unwrap();
            store.grew(id, 30).unwrap();
        }
        store.finish_file(&ids[1], 5).unwrap();
        store.finish_file(&ids[2], 5).unwrap();
        assert!(store.remove(&ids[0]).unwrap_err().to_string().contains("stop it first"));
        store.grew(&ids[3], 40).unwrap();
        let left = || store.list(BootNs(0)).iter().map(|status| status.id.clone()).collect::<Vec<_>>();
        assert_eq!(left(), [&*ids[0], &ids[2], &ids[3]]);
        assert!(store.grew(&ids[3], 80).unwrap_err().contains("session_dir_max_bytes"));
        assert_eq!(left(), [&*ids[0], &ids[3]]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "a file and the lock");
        assert!(matches!(store.open("../x"), Err(StoreError::Unknown(_))));
        assert!(store.open(&ids[3]).unwrap_err().to_string().contains("has no file"));
    }
}
