//! Detects when a runtime socket appears, disappears or is replaced: inotify on the directories, and a check every half second for
//! directories that do not exist yet or cannot be watched, and for engines behind sockets that systemd holds.

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

use super::activation::{ActivationGuard, Presence};
use super::message::LabelMessage;

/// Keeps the detection delay below a second.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
const BUFFER_BYTES: usize = 16 << 10;

/// A socket to watch, with its last known state.
pub struct WatchedSocket {
    pub target: TargetId,
    pub path: PathBuf,
    pub presence: Presence,
}

/// Sends changes until the service ends; `new_sockets` adds sockets. Needs its own thread, since it blocks in `poll`.
pub fn watch(new_sockets: &Receiver<WatchedSocket>, guard: &ActivationGuard, to: &Sender<LabelMessage>) {
    let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).inspect_err(|error| {
        tracing::warn!(%error, "inotify is not available, sockets are polled; raise fs.inotify.max_user_instances");
    });
    let (mut sockets, mut warned) = (Vec::<WatchedSocket>::new(), HashSet::new());
    loop {
        loop {
            match new_sockets.try_recv() {
                Ok(new) => sockets.push(new),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            }
        }
        for socket in &mut sockets {
            let presence = guard.presence(&socket.path);
            if presence == socket.presence {
                continue;
            }
            socket.presence = presence;
            let message = LabelMessage::EndpointChanged { target: socket.target, presence };
            if to.blocking_send(message).is_err() {
                return;
            }
        }
        match &fd {
            Ok(fd) => {
                sockets.iter().for_each(|s| watch_parent(fd, &s.path, &mut warned));
                wait(fd);
            }
            Err(_) => std::thread::sleep(CHECK_INTERVAL),
        }
    }
}

/// Watches the directory of the socket, or its nearest existing ancestor.
fn watch_parent(fd: &OwnedFd, socket: &Path, warned: &mut HashSet<PathBuf>) {
    let Some(folder) = socket.ancestors().skip(1).find(|folder| folder.is_dir()) else { return };
    let flags = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_FROM | WatchFlags::MOVED_TO | WatchFlags::ATTRIB;
    // Adding the same directory again returns the same watch.
    if let Err(error) = inotify::add_watch(fd, folder, flags | WatchFlags::ONLYDIR)
        && warned.insert(folder.to_owned())
    {
        tracing::warn!(%error, folder = %folder.display(), "cannot watch the directory of a socket, it is polled");
    }
}

/// Waits for an event or the next check, then drains all events.
fn wait(fd: &OwnedFd) {
    let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(CHECK_INTERVAL.subsec_nanos()) };
    // A check follows in any case.
    let _interrupted = poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout));
    let mut buffer = [const { MaybeUninit::uninit() }; BUFFER_BYTES];
    let mut events = Reader::new(fd, &mut buffer);
    while events.next().is_ok() {}
}
