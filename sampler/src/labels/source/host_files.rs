//! Paths and folders below a root, with what queries of many containers have in common.
//!
//! - **Resolved paths** are reused for [`RESOLVED_FOR`]: below a mounted root each costs a system call per component.
//! - **Lists of folders** are reused while the folder's modification time is unchanged, which is checked at each use, and for
//!   [`LISTED_FOR`] at most, since not every file system maintains that time.
//! - **Absent folders** stay absent for [`ABSENT_FOR`]: those of the runtimes that a machine does not have are most of all that are looked
//!   for.
//!
//! Files are not cached, and no result for a container is.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::file::{self, is_absent};
use crate::labels::root::Root;

/// How long a changed symlink in the path of a runtime's folder may be unnoticed.
const RESOLVED_FOR: Duration = Duration::from_secs(1);
/// How long an entry may be unnoticed in a file system that does not maintain modification times.
const LISTED_FOR: Duration = Duration::from_secs(1);
/// How long a new folder may be unnoticed: the first container of a runtime is looked for again within a second or so.
const ABSENT_FOR: Duration = Duration::from_millis(500);
/// Changes within one tick of the kernel's clock have the same modification time: at most 10 ms. A list of a folder that was modified so
/// recently is not reused.
const CLOCK_TICK: Duration = Duration::from_millis(20);
/// Paths and folders of the runtimes of one machine: some 20, and some 10 for each user with an engine.
const MAX_KEPT: usize = 1_024;
/// Names that are kept in all lists, about 100 bytes each. Other lists are read at each use.
const MAX_KEPT_NAMES: usize = 32_768;

/// The names in one folder.
pub struct FolderList {
    folder: PathBuf,
    names: Vec<String>,
}

impl FolderList {
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub fn paths(&self) -> impl Iterator<Item = (&str, PathBuf)> {
        self.names().map(|name| (name, self.path(name)))
    }
}

/// Device, inode, and modification time.
type FolderStamp = (u64, u64, i64, i64);

struct KeptList {
    stamp: FolderStamp,
    read_at: Instant,
    list: Arc<FolderList>,
}

#[derive(Default)]
struct Kept {
    paths: HashMap<PathBuf, (Instant, PathBuf)>,
    lists: HashMap<PathBuf, KeptList>,
    names: usize,
    /// When each was found to be absent.
    absent: HashMap<PathBuf, Instant>,
}

/// The files of one host, or of one runtime inside a container.
pub struct HostFiles {
    root: Root,
    kept: Mutex<Kept>,
}

impl HostFiles {
    pub fn new(root: Root) -> Self {
        Self { root, kept: Mutex::default() }
    }

    /// Never held during a read.
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Root::path`].
    pub fn path(&self, host: &Path) -> PathBuf {
        if let Some((_, path)) = self.kept().paths.get(host).filter(|(at, _)| at.elapsed() < RESOLVED_FOR) {
            return path.clone();
        }
        let (at, path) = (Instant::now(), self.root.path(host));
        insert_bounded(&mut self.kept().paths, host, (at, path.clone()));
        path
    }

    /// The names in a folder, with its path in this mount namespace; empty if the folder does not exist.
    pub fn list(&self, folder: &Path) -> Result<Arc<FolderList>, String> {
        let describe = |error: std::io::Error| format!("{}: {error}", folder.display());
        let empty = || Arc::new(FolderList { folder: folder.to_owned(), names: Vec::new() });
        if self.kept().absent.get(folder).is_some_and(|at| at.elapsed() < ABSENT_FOR) {
            return Ok(empty());
        }
        let at = Instant::now();
        let stamp = match fs::metadata(folder) {
            Ok(meta) => (meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec()),
            Err(error) if is_absent(&error) => {
                insert_bounded(&mut self.kept().absent, folder, at);
                return Ok(empty());
            }
            Err(error) => return Err(describe(error)),
        };
        let is_current = |kept: &&KeptList| kept.stamp == stamp && kept.read_at.elapsed() < LISTED_FOR;
        if let Some(kept) = self.kept().lists.get(folder).filter(is_current) {
            return Ok(Arc::clone(&kept.list));
        }
        let (read_at, wall) = (Instant::now(), SystemTime::now());
        let names = file::list(folder)?;
        let list = Arc::new(FolderList { folder: folder.to_owned(), names });
        if was_unchanged_at(wall, stamp) {
            self.keep(KeptList { stamp, read_at, list: Arc::clone(&list) });
        }
        Ok(list)
    }

    /// After a new runtime was found, its folders are looked for at once.
    pub fn forget_absent(&self) {
        self.kept().absent.clear();
    }

    fn keep(&self, new: KeptList) {
        let mut kept = self.kept();
        if let Some(old) = kept.lists.remove(&new.list.folder) {
            kept.names -= old.list.names.len();
        }
        let added = new.list.names.len();
        if kept.lists.len() >= MAX_KEPT || kept.names + added > MAX_KEPT_NAMES {
            kept.lists.retain(|_, list| list.read_at.elapsed() < LISTED_FOR);
            kept.names = kept.lists.values().map(|kept| kept.list.names.len()).sum();
        }
        if kept.lists.len() < MAX_KEPT && kept.names + added <= MAX_KEPT_NAMES {
            kept.names += added;
            kept.lists.insert(new.list.folder.clone(), new);
        }
    }
}

/// Beyond [`MAX_KEPT`] the others are forgotten.
fn insert_bounded<V>(all: &mut HashMap<PathBuf, V>, path: &Path, value: V) {
    if all.len() >= MAX_KEPT {
        all.clear();
    }
    all.insert(path.to_owned(), value);
}

/// Whether the folder was last modified clearly before this time. False if the clock was set back meanwhile.
fn was_unchanged_at(wall: SystemTime, (_, _, seconds, nanoseconds): FolderStamp) -> bool {
    let (Ok(seconds), Ok(nanoseconds)) = (u64::try_from(seconds), u32::try_from(nanoseconds)) else { return false };
    let modified = SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds);
    wall.duration_since(modified).is_ok_and(|age| age >= CLOCK_TICK)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn names(files: &HostFiles, folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = files.list(folder).unwrap().names().map(str::to_owned).collect();
        names.sort();
        names
    }

    fn set_modified(folder: &Path, at: SystemTime) {
        File::open(folder).unwrap().set_modified(at).unwrap();
    }

    #[test]
    fn a_list_is_reused_only_while_the_folder_is_unchanged() {
        let dir = tempfile::tempdir().unwrap();
        let (files, folder) = (HostFiles::new(Root::new(Path::new("/"))), dir.path().join("a"));
        assert_eq!(names(&files, &folder), [""; 0]);
        fs::create_dir(&folder).unwrap();
        File::create(folder.join("0")).unwrap();
        assert_eq!(names(&files, &folder), [""; 0], "not looked for again so soon");
        files.forget_absent();
        // Created within the same tick of the clock as the list is read: not kept.
        for n in 0..200 {
            File::create(folder.join(n.to_string())).unwrap();
            assert_eq!(names(&files, &folder).len(), n + 1);
        }
        let long_ago = SystemTime::now() - Duration::from_secs(60);
        set_modified(&folder, long_ago);
        let kept = files.list(&folder).unwrap();
        assert!(Arc::ptr_eq(&kept, &files.list(&folder).unwrap()));
        File::create(folder.join("new")).unwrap();
        assert!(names(&files, &folder).contains(&"new".to_owned()));
        // A file system that does not maintain the time: noticed after a while.
        let later = long_ago + Duration::from_secs(1);
        set_modified(&folder, later);
        assert_eq!(names(&files, &folder).len(), 201);
        File::create(folder.join("newer")).unwrap();
        set_modified(&folder, later);
        std::thread::sleep(LISTED_FOR);
        assert!(names(&files, &folder).contains(&"newer".to_owned()));
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(names(&files, &folder), [""; 0]);
        std::thread::sleep(ABSENT_FOR);
        File::create(&folder).unwrap();
        assert_eq!(names(&files, &folder), [""; 0], "a file is not a folder");
        let looping = dir.path().join("loop");
        std::os::unix::fs::symlink("loop", &looping).unwrap();
        assert!(files.list(&looping).is_err_and(|error| error.contains("loop")));
    }

    #[test]
    fn kept_names_are_bounded() {
        let (dir, files) = (tempfile::tempdir().unwrap(), HostFiles::new(Root::new(Path::new("/"))));
        for n in 0..4 {
            let list = FolderList { folder: dir.path().join(n.to_string()), names: vec![String::new(); MAX_KEPT_NAMES / 2] };
            files.keep(KeptList { stamp: (0, 0, 0, 0), read_at: Instant::now(), list: Arc::new(list) });
        }
        let count = |files: &HostFiles| {
            let kept = files.kept();
            (kept.lists.len(), kept.names)
        };
        assert_eq!(count(&files), (2, MAX_KEPT_NAMES));
        std::thread::sleep(LISTED_FOR);
        let list = FolderList { folder: dir.path().to_owned(), names: vec![String::new(); 3] };
        files.keep(KeptList { stamp: (0, 0, 0, 0), read_at: Instant::now(), list: Arc::new(list) });
        assert_eq!(count(&files), (1, 3));
    }
}
