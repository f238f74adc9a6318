//! The thread that writes the file of one session, so that a slow or failing disk affects only that session.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use sampler_session::Frame;

use super::store::{Phase, Store};
use crate::observe::clock::boot_now;

/// Maximum number of frames that wait for the disk: a minute of them.
pub const QUEUE: usize = 64;
/// Maximum time span that is lost with a loss of power.
const SYNC_EVERY: Duration = Duration::from_secs(5);

pub struct Item {
    pub sequence: u32,
    pub frame: Arc<Frame>,
    /// For the last item: the recorded duration.
    pub ends_after_ns: Option<u64>,
}

/// Begins a file with `first`. It ends with an item that has `ends_after_ns`, or as interrupted when the sender is dropped.
pub fn spawn(store: Arc<Store>, id: String, first: Vec<Item>) -> io::Result<SyncSender<Item>> {
    let (to, from) = sync_channel(QUEUE);
    std::thread::Builder::new().name("session".into()).spawn(move || {
        let path = store.begin_file(&id);
        let mut writer = Writer { store: &store, id: &id, written: 0, synced: Instant::now(), unsynced: false };
        if let Err(error) = writer.run(&path, first, &from) {
            store.fail(&id, boot_now(), error);
        }
    })?;
    Ok(to)
}

struct Writer<'a> {
    store: &'a Store,
    id: &'a str,
    written: u64,
    synced: Instant,
    unsynced: bool,
}

impl Writer<'_> {
    fn run(&mut self, path: &Path, first: Vec<Item>, from: &Receiver<Item>) -> Result<(), String> {
        let message = |error: io::Error| format!("cannot create {}: {error}", path.display());
        // `create_new` does not follow a link at this path.
        let mut file = File::options().write(true).create_new(true).mode(0o640).open(path).map_err(message)?;
        for item in first {
            if self.take(&mut file, item)? {
                return Ok(());
            }
        }
        loop {
            match from.recv_timeout(SYNC_EVERY) {
                Ok(item) => {
                    if self.take(&mut file, item)? {
                        return Ok(());
                    }
                }
                Err(RecvTimeoutError::Timeout) => self.sync(&file)?,
                Err(RecvTimeoutError::Disconnected) => {
                    self.sync(&file)?;
                    // A session that failed keeps its reason.
                    self.store.change(self.id, |entry| {
                        if entry.phase != Phase::Failed {
                            entry.phase = Phase::Interrupted;
                        }
                    });
                    return Ok(());
                }
            }
        }
    }

    /// Writes a frame; returns whether it was the last.
    fn take(&mut self, file: &mut File, item: Item) -> Result<bool, String> {
        let mut bytes = Vec::with_capacity(item.frame.bytes());
        item.frame.put(item.sequence, &mut bytes);
        if let Err(error) = file.write_all(&bytes) {
            // A partial frame would be read as damage.
            let _truncated = file.set_len(self.written).and_then(|()| file.sync_all());
            return Err(format!("cannot write: {error}; the part recorded until then can be read"));
        }
        self.unsynced = true;
        self.written += bytes.len() as u64;
        self.store.grew(self.id, self.written)?;
        if let Some(elapsed_ns) = item.ends_after_ns {
            self.sync(file)?;
            self.store.finish_file(self.id, elapsed_ns).map_err(|error| format!("cannot rename the file: {error}"))?;
            return Ok(true);
        }
        if self.synced.elapsed() >= SYNC_EVERY {
            self.sync(file)?;
        }
        Ok(false)
    }

    fn sync(&mut self, file: &File) -> Result<(), String> {
        if std::mem::take(&mut self.unsynced) {
            file.sync_data().map_err(|error| format!("cannot sync the file to the disk: {error}"))?;
        }
        self.synced = Instant::now();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::store::Entry;
    use super::*;
    use sampler_core::units::{BootNs, WallTime};
    use sampler_session::Packer;

    #[test]
    fn without_an_end_a_session_is_interrupted_and_one_that_failed_stays_failed() {
        let dir = tempfile::tempdir().unwrap();
        for (fails, expect) in [(false, (Phase::Interrupted, None)), (true, (Phase::Failed, Some("because".to_owned())))] {
            let store = Store::new(dir.path().join(fails.to_string()), 1 << 20);
            store.prepare().unwrap();
            let id = store.add(WallTime(0), Entry::new(Phase::Recording, 1, 0, None));
            if fails {
                store.fail(&id, BootNs(0), "because".into());
            }
            let (to, from) = sync_channel(1);
            drop(to);
            let path = store.begin_file(&id);
            let mut writer = Writer { store: &store, id: &id, written: 0, synced: Instant::now(), unsynced: false };
            writer.run(&path, Vec::new(), &from).unwrap();
            let status = store.status(&id, BootNs(0)).unwrap();
            assert_eq!((status.state, status.error), expect);
        }
    }

    #[test]
    fn a_full_disk_is_reported_with_its_consequence() {
        let store = Store::new("/nowhere".into(), 1 << 20);
        let frame = Arc::new(Packer::new().unwrap().facts(&[]).unwrap().pop());
        assert!(frame.is_none(), "without facts there is no frame");
        let frame = Arc::new(Packer::new().unwrap().state(&[]).unwrap().remove(0));
        let mut writer = Writer { store: &store, id: "x", written: 0, synced: Instant::now(), unsynced: false };
        let mut full = File::options().write(true).open("/dev/full").unwrap();
        let error = writer.take(&mut full, Item { sequence: 0, frame, ends_after_ns: None }).unwrap_err();
        assert!(error.contains("No space left on device") && error.contains("can be read"), "{error}");
    }
}
