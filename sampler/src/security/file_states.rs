//! Whether files have changed since they were read, without reading them.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Identity, size and times of a file, through links: replacing any link of its path changes it.
type FileState = (u64, u64, u64, (i64, i64), (i64, i64));

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileStates(Vec<(PathBuf, Option<FileState>)>);

impl FileStates {
    pub fn of<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Self {
        let mut states = Self::default();
        paths.into_iter().for_each(|path| states.add(path));
        states
    }

    /// Adds a file, which must be read after this.
    pub fn add(&mut self, path: &Path) {
        self.0.push((path.to_owned(), state(path)));
    }

    /// The present states of the same files.
    pub fn again(&self) -> Self {
        Self::of(self.0.iter().map(|(path, _)| path.as_path()))
    }
}

/// `None` if it does not exist or cannot be examined.
fn state(path: &Path) -> Option<FileState> {
    let m = path.metadata().ok()?;
    Some((m.dev(), m.ino(), m.size(), (m.mtime(), m.mtime_nsec()), (m.ctime(), m.ctime_nsec())))
}
