//! Where kernel programs cannot be loaded: inotify on every cgroup directory tells of creations, removals and renames as they
//! happen. Processes are not told; they are looked up when the driver names them.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use sampler_core::observation::{CgroupChange, CgroupFact};
use sampler_core::units::{BootNs, CgroupKey};
use thiserror::Error;

use super::scan::{self, Layout};
use crate::observe::clock::boot_now;

const BUFFER_BYTES: usize = 64 << 10;

#[derive(Debug, Error)]
pub enum WatchError {
    #[error("cannot watch cgroup directories; raise fs.inotify.max_user_watches and max_user_instances")]
    Watch(#[source] io::Error),
    #[error("no cgroup hierarchy is mounted; mount cgroup2 on /sys/fs/cgroup")]
    NoCgroups,
}

struct Folder {
    path: PathBuf,
    key: CgroupKey,
}

pub struct CgroupWatch {
    fd: OwnedFd,
    watched: HashMap<i32, Folder>,
    /// Keys of directories by path: a removed one cannot be asked for its inode number any more.
    keys: HashMap<PathBuf, CgroupKey>,
}

/// What reading the events came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    Complete,
    /// Events were lost, or paths changed: watch and scan again.
    StartOver,
}

impl CgroupWatch {
    /// Watches everything that is there. What exists already is for a scan to find, after this.
    pub fn new(layout: &Layout) -> Result<Self, WatchError> {
        let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).map_err(|e| WatchError::Watch(e.into()))?;
        let mut watch = Self { fd, watched: HashMap::new(), keys: HashMap::new() };
        let mut failed = None;
        let mut any = false;
        for (hierarchy, mount) in layout.mounts() {
            any = true;
            let walked = scan::walk(
                hierarchy,
                mount,
                boot_now(),
                &mut |folder, key| {
                    if let Err(error) = watch.add(folder.to_path_buf(), key) {
                        failed.get_or_insert(error);
                    }
                },
                &mut |_, _| {},
            );
            walked.map_err(WatchError::Watch)?;
        }
        match failed {
            Some(error) => Err(WatchError::Watch(error)),
            None if any => Ok(watch),
            None => Err(WatchError::NoCgroups),
        }
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn add(&mut self, path: PathBuf, key: CgroupKey) -> io::Result<()> {
        let flags = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVE | WatchFlags::ONLYDIR;
        match inotify::add_watch(&self.fd, &path, flags) {
            Ok(wd) => {
                self.keys.insert(path.clone(), key);
                self.watched.insert(wd, Folder { path, key });
                Ok(())
            }
            // Removed meanwhile.
            Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Everything that has happened since the last call.
    pub fn read(&mut self, give: &mut impl FnMut(CgroupFact)) -> Result<Read, WatchError> {
        let mut events = Vec::new();
        let mut buffer = vec![MaybeUninit::<u8>::uninit(); BUFFER_BYTES];
        let mut reader = Reader::new(&self.fd, &mut buffer);
        loop {
            match reader.next() {
                Ok(event) => {
                    let name = event.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
                    events.push((event.wd(), event.events(), name));
                }
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(WatchError::Watch(error.into())),
            }
        }
        let at = boot_now();
        for (wd, flags, name) in events {
            // The new path is below the old watches' paths.
            if flags.intersects(ReadFlags::QUEUE_OVERFLOW | ReadFlags::MOVED_FROM | ReadFlags::MOVED_TO) {
                return Ok(Read::StartOver);
            }
            if flags.contains(ReadFlags::IGNORED) {
                self.watched.remove(&wd);
            } else if flags.contains(ReadFlags::ISDIR)
                && let Some(folder) = self.watched.get(&wd)
            {
                let (parent, path) = (folder.key, folder.path.join(&name));
                if flags.contains(ReadFlags::CREATE) {
                    self.created(path, name, parent, at, give)?;
                } else if let Some(key) = self.keys.remove(&path) {
                    give(CgroupFact { change: CgroupChange::Removed, key, parent: Some(parent), name, at });
                }
            }
        }
        Ok(Read::Complete)
    }

    fn created(
        &mut self,
        path: PathBuf,
        name: String,
        parent: CgroupKey,
        at: BootNs,
        give: &mut impl FnMut(CgroupFact),
    ) -> Result<(), WatchError> {
        let Ok(meta) = fs::metadata(&path) else { return Ok(()) };
        let key = CgroupKey { hierarchy: parent.hierarchy, id: meta.ino() };
        give(CgroupFact { change: CgroupChange::Created, key, parent: Some(parent), name, at });
        let mut failed = None;
        // What was made in it before the watch stood.
        scan::below(
            path,
            String::new(),
            key,
            at,
            &mut |folder, key| {
                if let Err(error) = self.add(folder.to_path_buf(), key) {
                    failed.get_or_insert(error);
                }
            },
            &mut |_, fact| give(CgroupFact { change: CgroupChange::Created, ..fact }),
        );
        failed.map_or(Ok(()), |error| Err(WatchError::Watch(error)))
    }
}
