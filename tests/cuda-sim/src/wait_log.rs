//! The file of a process's waiting: records of a [`Meter`], appended every few milliseconds.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, at};
use crate::gpu::now_ns;
use crate::waits::{Meter, Record};

/// Measured by the library, within its functions.
pub const OF_LIBRARY: &str = "waits";
/// Measured by the caller, around its calls.
pub const OF_CALLER: &str = "calls";

/// The folder of the files of all processes.
pub fn folder(dir: &Path, measured: &str) -> PathBuf {
    dir.join(crate::gpu::FOLDER).join(measured)
}

#[derive(Debug)]
pub struct WaitLog {
    meter: Mutex<Meter>,
    file: Mutex<File>,
    path: PathBuf,
}

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl WaitLog {
    pub fn open(dir: &Path, measured: &str, pid: u32, start_time: u64) -> Result<Self, Error> {
        let folder = folder(dir, measured);
        fs::create_dir_all(&folder).map_err(at(&folder, "create"))?;
        let path = folder.join(format!("{pid}-{start_time}"));
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(at(&path, "create"))?;
        Ok(Self { meter: Mutex::default(), file: Mutex::new(file), path })
    }

    /// A thread enters a blocking call.
    pub fn enter(&self, gpu: usize) {
        locked(&self.meter).enter(gpu, now_ns());
    }

    /// The call has returned.
    pub fn leave(&self, gpu: usize) {
        locked(&self.meter).leave(gpu, now_ns());
    }

    /// Appends the records so far; returns whether there were any.
    pub fn write(&self) -> Result<bool, Error> {
        // The file's lock first: records are written in the order in which they are taken.
        let mut file = locked(&self.file);
        let records = locked(&self.meter).take(now_ns());
        let text: String = records.iter().map(Record::line).collect();
        file.write_all(text.as_bytes()).map_err(at(&self.path, "append a record"))?;
        Ok(!records.is_empty())
    }
}
