//! The fallback where eBPF programs cannot be loaded: inotify on every cgroup directory reports creations, removals and renames as
//! they happen. It does not report processes; they are looked up when the driver reports them.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use sampler_core::observation::{CgroupChange, CgroupFact};
use sampler_core::units::{BootNs, CgroupKey};
use thiserror::Error;

use super::cgroup_id;
use super::cgroupfs::{below, fact};
use super::layout::Layout;
use crate::observe::clock::boot_now;

const BUFFER_BYTES: usize = 64 << 10;
/// Maximum number of events per call, so that the call ends; the next call reads the rest.
const MAX_EVENTS: usize = 16_384;

#[derive(Debug, Error)]
pub enum WatchError {
    #[error("cannot watch cgroup directories; raise fs.inotify.max_user_watches and max_user_instances")]
    Watch(#[source] io::Error),
    #[error("no cgroup hierarchy is mounted; mount cgroup2 on /sys/fs/cgroup")]
    NoCgroups,
}

struct WatchedFolder {
    path: PathBuf,
    key: CgroupKey,
}

struct KnownCgroup {
    key: CgroupKey,
    /// `None` if the cgroup was removed before it could be watched.
    watch: Option<i32>,
}

pub struct CgroupWatch {
    fd: OwnedFd,
    watched: HashMap<i32, WatchedFolder>,
    /// By path, because the inode number of a removed cgroup can no longer be read.
    known: HashMap<PathBuf, KnownCgroup>,
    /// Cgroups that were recreated under the same path before the removal event of the first was read.
    displaced: Vec<CgroupKey>,
}

/// The result of reading events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventsRead {
    Complete,
    /// Events were lost, or paths changed: watch and scan again.
    StartOver,
}

impl CgroupWatch {
    /// Watches every existing cgroup. A scan after this call reports the cgroups that already exist.
    pub fn new(layout: &Layout) -> Result<Self, WatchError> {
        let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).map_err(|e| WatchError::Watch(e.into()))?;
        let mut watch = Self { fd, watched: HashMap::new(), known: HashMap::new(), displaced: Vec::new() };
        for (hierarchy, mount) in layout.mounts() {
            let id = cgroup_id::of(mount).map_err(WatchError::Watch)?;
            watch.add_tree(mount.to_path_buf(), CgroupKey { hierarchy, id }, boot_now(), &mut |_| {})?;
        }
        if watch.known.is_empty() { Err(WatchError::NoCgroups) } else { Ok(watch) }
    }

    /// Number of watches held.
    pub fn len(&self) -> usize {
        self.watched.len()
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Adds the cgroup to `known` before it is watched, so that its removal is reported even if the watch fails.
    fn add(&mut self, path: PathBuf, key: CgroupKey) -> io::Result<()> {
        let before = self.known.insert(path.clone(), KnownCgroup { key, watch: None });
        if let Some(before) = before.filter(|before| before.key != key) {
            self.unwatch(before.watch);
            self.displaced.push(before.key);
        }
        let flags = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVE | WatchFlags::ONLYDIR;
        match inotify::add_watch(&self.fd, &path, flags) {
            Ok(wd) => {
                if let Some(known) = self.known.get_mut(&path) {
                    known.watch = Some(wd);
                }
                self.watched.insert(wd, WatchedFolder { path, key });
                Ok(())
            }
            // Removed in the meantime.
            Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads the events since the last call. An error means that a new cgroup is not watched; all other events were passed on.
    pub fn read(&mut self, give: &mut impl FnMut(CgroupFact)) -> Result<EventsRead, WatchError> {
        let mut events = Vec::new();
        let mut buffer = vec![MaybeUninit::<u8>::uninit(); BUFFER_BYTES];
        let mut reader = Reader::new(&self.fd, &mut buffer);
        while events.len() < MAX_EVENTS {
            match reader.next() {
                Ok(event) => {
                    let name = event.file_name().map(|n| OsStr::from_bytes(n.to_bytes()).to_owned()).unwrap_or_default();
                    events.push((event.wd(), event.events(), name));
                }
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(WatchError::Watch(error.into())),
            }
        }
        let at = boot_now();
        let mut result = Ok(EventsRead::Complete);
        for (wd, flags, name) in events {
            // After a move, the paths of the existing watches below it are wrong.
            if flags.intersects(ReadFlags::QUEUE_OVERFLOW | ReadFlags::MOVED_FROM | ReadFlags::MOVED_TO) {
                return Ok(EventsRead::StartOver);
            }
            if flags.contains(ReadFlags::IGNORED) {
                self.watched.remove(&wd);
            } else if flags.contains(ReadFlags::ISDIR)
                && let Some(folder) = self.watched.get(&wd)
            {
                let (parent, path) = (folder.key, folder.path.join(&name));
                if flags.contains(ReadFlags::CREATE) {
                    let created = self.created(path, &name, parent, at, give);
                    result = result.and_then(|read| created.map(|()| read));
                } else {
                    self.deleted(&path, &name, parent, at, give);
                }
            }
            for key in std::mem::take(&mut self.displaced) {
                let nowhere = CgroupKey { hierarchy: key.hierarchy, id: 0 };
                give(CgroupFact { change: CgroupChange::Removed, ..fact(key, Some(nowhere), "".as_ref(), at) });
            }
        }
        result
    }

    /// cgroupfs keeps the watch of a removed directory.
    fn unwatch(&mut self, watch: Option<i32>) {
        if let Some(wd) = watch {
            self.watched.remove(&wd);
            // Fails if the kernel has already dropped the watch.
            let _dropped_already = inotify::remove_watch(&self.fd, wd);
        }
    }

    /// A known cgroup that still exists under this path was recreated before the removal event of its predecessor was read, and the
    /// predecessor was never known.
    fn deleted(&mut self, path: &Path, name: &OsStr, parent: CgroupKey, at: BootNs, give: &mut impl FnMut(CgroupFact)) {
        let Some(KnownCgroup { key, .. }) = self.known.get(path) else { return };
        let key = *key;
        if cgroup_id::of(path).is_ok_and(|id| id == key.id) {
            return;
        }
        let watch = self.known.remove(path).and_then(|known| known.watch);
        self.unwatch(watch);
        give(CgroupFact { change: CgroupChange::Removed, ..fact(key, Some(parent), name, at) });
    }

    fn created(
        &mut self,
        path: PathBuf,
        name: &OsStr,
        parent: CgroupKey,
        at: BootNs,
        give: &mut impl FnMut(CgroupFact),
    ) -> Result<(), WatchError> {
        let Ok(id) = cgroup_id::of(&path) else { return Ok(()) };
        let key = CgroupKey { hierarchy: parent.hierarchy, id };
        // The walk after the creation of its parent already found it, with everything below; the event arrives later.
        if self.known.get(&path).is_some_and(|known| known.key == key) {
            return Ok(());
        }
        give(CgroupFact { change: CgroupChange::Created, ..fact(key, Some(parent), name, at) });
        // Cgroups created in it before it was watched.
        self.add_tree(path, key, at, &mut |fact| give(CgroupFact { change: CgroupChange::Created, ..fact }))
    }

    /// Adds a cgroup and all below it, of which `give` receives the latter. Continues after an error and returns the first error.
    fn add_tree(
        &mut self,
        path: PathBuf,
        key: CgroupKey,
        at: BootNs,
        give: &mut impl FnMut(CgroupFact),
    ) -> Result<(), WatchError> {
        let mut failed = None;
        let add = &mut |folder: &Path, key| {
            if let Err(error) = self.add(folder.to_path_buf(), key) {
                failed.get_or_insert(error);
            }
        };
        let walked = below(path, key, at, add, &mut |_, fact| give(fact));
        failed.map_or(walked, Err).map_err(WatchError::Watch)
    }
}
