//! Which runtime sockets are there, and when one appears, goes or is replaced: inotify on their directories, and a look every
//! half second where a directory is not there yet or cannot be watched.

use std::collections::HashSet;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use sampler_labels::TargetId;
use tokio::sync::mpsc::Sender;

use super::message::LabelMessage;
use super::stamp::{Stamp, stamp};

/// Below a second.
const LOOK_EVERY: Duration = Duration::from_millis(500);
const BUFFER_BYTES: usize = 16 << 10;

/// A socket to watch, as it was last seen.
pub struct WatchedSocket {
    pub target: TargetId,
    pub path: PathBuf,
    pub seen: Option<Stamp>,
}

/// Tells of changes until the service ends; `wanted` brings more sockets. A thread of its own: it sleeps in `poll`.
pub fn watch(wanted: &Receiver<WatchedSocket>, to: &Sender<LabelMessage>) {
    let fd = match inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC) {
        Ok(fd) => Some(fd),
        Err(error) => {
            tracing::warn!(%error, "no inotify: sockets are only looked at now and then; raise fs.inotify.max_user_instances");
            None
        }
    };
    let (mut sockets, mut told) = (Vec::<WatchedSocket>::new(), HashSet::new());
    loop {
        loop {
            match wanted.try_recv() {
                Ok(new) => sockets.push(new),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            }
        }
        for socket in &mut sockets {
            let now = stamp(&socket.path);
            if now == socket.seen {
                continue;
            }
            socket.seen = now;
            let word = if now.is_some() { LabelMessage::Back(socket.target) } else { LabelMessage::Absent(socket.target) };
            if to.blocking_send(word).is_err() {
                return;
            }
        }
        match &fd {
            Some(fd) => {
                sockets.iter().for_each(|s| watch_parent(fd, &s.path, &mut told));
                wait(fd);
            }
            None => std::thread::sleep(LOOK_EVERY),
        }
    }
}

/// The directory of the socket, or the nearest one above it that is there.
fn watch_parent(fd: &OwnedFd, socket: &Path, told: &mut HashSet<PathBuf>) {
    let Some(folder) = socket.ancestors().skip(1).find(|folder| folder.is_dir()) else { return };
    let flags = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_FROM | WatchFlags::MOVED_TO | WatchFlags::ATTRIB;
    // The same directory again gives the same watch.
    if let Err(error) = inotify::add_watch(fd, folder, flags | WatchFlags::ONLYDIR)
        && told.insert(folder.to_owned())
    {
        tracing::warn!(%error, folder = %folder.display(), "cannot be watched for sockets; it is looked at now and then");
    }
}

/// For an event or the next look, and takes all events that are there.
fn wait(fd: &OwnedFd) {
    let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(LOOK_EVERY.subsec_nanos()) };
    // Interrupted or not: what follows is a look.
    let _why = poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout));
    let mut buffer = [const { MaybeUninit::uninit() }; BUFFER_BYTES];
    let mut events = Reader::new(fd, &mut buffer);
    while events.next().is_ok() {}
}
