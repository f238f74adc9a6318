//! Reads files of runtimes: with size limits, and a missing file is "not found".

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;

/// Bundles are tens of KiB, lists of a thousand containers a few MiB.
const MAX_FILE_BYTES: u64 = 32 << 20;
/// An incomplete file that was modified within this time counts as being written.
const WRITTEN_WITHIN: Duration = Duration::from_secs(2);
/// Entries beyond this number are not read.
const MAX_ENTRIES: usize = 65_536;

/// Opens a regular file only: a pipe would block until it has a writer, and to open a device may have effects.
pub fn open(path: &Path) -> io::Result<File> {
    Ok(open_with_size(path)?.0)
}

/// Also returns the size; that of a file of the kernel is 0.
fn open_with_size(path: &Path) -> io::Result<(File, u64)> {
    let found = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path)?;
    let meta = found.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let same = format!("/proc/self/fd/{}", found.as_raw_fd());
    Ok((OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(same)?, meta.len()))
}

/// Reads at most the first `bytes` bytes.
pub fn beginning(path: &Path, bytes: u64) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    open(path)?.take(bytes).read_to_end(&mut text)?;
    Ok(text)
}

/// Reads and decodes a file. `Ok(None)` if it does not exist or is being written.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, String> {
    let describe = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let (file, size) = match open_with_size(path) {
        Err(error) if is_absent(&error) => return Ok(None),
        opened => opened.map_err(|error| describe(&error))?,
    };
    // With room for it, a small file takes one read, and one for its end.
    let mut text = Vec::with_capacity(size.min(MAX_FILE_BYTES) as usize + 1);
    (&file).take(MAX_FILE_BYTES + 1).read_to_end(&mut text).map_err(|error| describe(&error))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(describe(&format_args!("larger than {MAX_FILE_BYTES} bytes")));
    }
    match serde_json::from_slice(&text) {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_eof() && is_being_written(&file) => Ok(None),
        Err(error) => Err(describe(&error)),
    }
}

/// Whether a runtime is still writing the file: then its being incomplete is not an error.
fn is_being_written(file: &File) -> bool {
    let modified = file.metadata().and_then(|meta| meta.modified()).ok();
    modified.and_then(|at| at.elapsed().ok()).is_some_and(|age| age < WRITTEN_WITHIN)
}

/// Names in a folder; empty if the folder does not exist.
pub fn list(folder: &Path) -> Result<Vec<String>, String> {
    match fs::read_dir(folder) {
        Ok(entries) => {
            let name = |e: fs::DirEntry| e.file_name().to_string_lossy().into_owned();
            Ok(entries.flatten().take(MAX_ENTRIES).map(name).collect())
        }
        Err(error) if is_absent(&error) => Ok(Vec::new()),
        Err(error) => Err(format!("{}: {error}", folder.display())),
    }
}

/// Whether the file or socket does not exist, which is not a failure.
pub fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn a_file_that_is_being_written_counts_as_absent() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let read = || read::<serde_json::Value>(&path);
        assert_eq!(read(), Ok(None));
        for text in ["", "{\"annotations\":"] {
            fs::write(&path, text).unwrap();
            assert_eq!(read(), Ok(None), "{text:?}");
        }
        // An incomplete file that was not modified for long is an error, and so is one that is invalid before its end.
        File::options().append(true).open(&path).unwrap().set_modified(SystemTime::now() - 2 * WRITTEN_WITHIN).unwrap();
        assert!(read().is_err_and(|error| error.contains("EOF")));
        fs::write(&path, "{]").unwrap();
        assert!(read().is_err());
        fs::write(&path, "{}").unwrap();
        assert_eq!(read(), Ok(Some(serde_json::json!({}))));
    }
}
