//! Sockets in the network namespaces of containers.
//!
//! ```text
//!  agent (without CAP_SYS_ADMIN)                     helper: `gpu-sampler engine-sockets` (CAP_SYS_ADMIN and nothing else)
//!    opens /proc/PID/ns/net  --namespace, family-->    setns, socket, setns back
//!    connects, sends, reads  <--unconnected socket--   never connects, never sees what a tenant sends
//! ```
//! A socket belongs to the namespace in which it was made, whichever process has it. Only entering a namespace needs a privilege that the
//! agent gives up at its start, so a second process keeps that one, and does the system calls that need it. Its seccomp filter has
//! little else. Between requests it is in its own namespace. It is started only if the settings ask for it, before the agent gives up the right to start programs, and ends with it.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketFlags, SocketType, recvmsg, sendmsg, socket_with, socketpair, sockopt,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use sampler_core::units::{BootNs, Tgid};
use thiserror::Error;

use crate::observe::kernel::proc::is_alive;
use crate::privileges;

/// The hidden command that runs [`help`].
pub const COMMAND: &str = "engine-sockets";
/// The helper makes three system calls for a request, none of which waits.
const PATIENCE: Duration = Duration::from_secs(1);
/// A request: the family and its number. A reply: the step that failed and its errno, both 0 with a socket, and the number of its request.
const REQUEST_BYTES: usize = 5;
const REPLY_BYTES: usize = 9;
const ENTER: u8 = 1;
const MAKE: u8 = 2;
const INVALID: u8 = 3;

const REMEDY: &str = "give the agent CAP_SYS_ADMIN, which its helper alone keeps (docs/serving-engines.md)";

#[derive(Debug, Error)]
pub enum NamespaceError {
    #[error("process {0} has ended")]
    Ended(u32),
    #[error("cannot open the network namespace of process {pid}; the agent needs CAP_SYS_PTRACE for processes of other users")]
    Open { pid: u32, source: io::Error },
    #[error("cannot enter the network namespace of process {pid}: {errno}; {REMEDY}")]
    Enter { pid: u32, errno: Errno },
    #[error("the container has a network namespace of its own, and the agent has no helper to enter it: set engine_access")]
    NoHelper,
    #[error("cannot make a socket")]
    Make(#[source] io::Error),
    #[error("the helper that enters network namespaces does not respond; restart the agent")]
    NoResponse(#[source] io::Error),
}

/// The agent's side of the helper.
#[derive(Debug)]
pub struct NamespaceHelper {
    channel: Mutex<HelperChannel>,
    /// Ends when the channel is closed.
    _child: Child,
}

#[derive(Debug)]
struct HelperChannel {
    to: OwnedFd,
    /// Number of the last request: the reply to one that was given up must not count for the next one, which is about another namespace.
    requests: u32,
}

impl HelperChannel {
    fn exchange(&mut self, namespace: BorrowedFd<'_>, family: SocketFamily) -> Result<Result<OwnedFd, (u8, Errno)>, Errno> {
        self.requests = self.requests.wrapping_add(1);
        let [a, b, c, d] = self.requests.to_le_bytes();
        send(self.to.as_fd(), &[family.byte(), a, b, c, d], Some(namespace))?;
        loop {
            let mut reply = [0; REPLY_BYTES];
            let (bytes, socket) = receive(self.to.as_fd(), &mut reply)?;
            // It has ended, which it does if it could not restrict itself.
            if bytes != REPLY_BYTES {
                return Err(Errno::PIPE);
            }
            let [step, e0, e1, e2, e3, number @ ..] = reply;
            if u32::from_le_bytes(number) != self.requests {
                continue;
            }
            return match (step, socket) {
                (0, Some(socket)) => Ok(Ok(socket)),
                // The descriptor was lost: this process has as many as it may.
                (0, None) => Err(Errno::MFILE),
                _ => Ok(Err((step, Errno::from_raw_os_error(i32::from_le_bytes([e0, e1, e2, e3]))))),
            };
        }
    }
}

/// A socket for TCP over IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketFamily {
    V4,
    V6,
}

impl SocketFamily {
    fn byte(self) -> u8 {
        if self == Self::V4 { 4 } else { 6 }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        [Self::V4, Self::V6].into_iter().find(|family| family.byte() == byte)
    }
}

fn make_socket(family: SocketFamily) -> Result<OwnedFd, Errno> {
    let family = if family == SocketFamily::V4 { AddressFamily::INET } else { AddressFamily::INET6 };
    socket_with(family, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)
}

impl NamespaceHelper {
    /// Must be called before the agent gives up the right to start programs.
    pub fn start(seccomp: bool) -> io::Result<Arc<Self>> {
        let (to, from) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        sockopt::set_socket_timeout(&to, sockopt::Timeout::Recv, Some(PATIENCE))?;
        // The same program, also if its file was replaced.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("gpu-sampler").arg(COMMAND).arg("--seccomp").arg(seccomp.to_string()).env_clear();
        let child = command.stdin(Stdio::from(from)).stdout(Stdio::null()).spawn()?;
        Ok(Arc::new(Self { channel: Mutex::new(HelperChannel { to, requests: 0 }), _child: child }))
    }

    /// Whether the helper can enter namespaces at all: its own needs the same privilege as any other.
    pub fn check(&self) -> Result<(), NamespaceError> {
        let pid = std::process::id();
        let own = File::open("/proc/self/ns/net").map_err(|source| NamespaceError::Open { pid, source })?;
        self.socket(own.as_fd(), pid, SocketFamily::V4).map(drop)
    }

    fn socket(&self, namespace: BorrowedFd<'_>, pid: u32, family: SocketFamily) -> Result<OwnedFd, NamespaceError> {
        // Poisoning is ignored: replies are matched with their requests by number.
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let exchanged = channel.exchange(namespace, family).map_err(|errno| NamespaceError::NoResponse(errno.into()))?;
        exchanged.map_err(|(step, errno)| match step {
            ENTER => NamespaceError::Enter { pid, errno },
            _ => NamespaceError::Make(errno.into()),
        })
    }
}

fn send(to: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(Errno::NOBUFS);
    }
    sendmsg(to, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).map(drop)
}

/// The number of bytes, 0 if the other side is closed, and the descriptor that came with them.
fn receive(from: BorrowedFd<'_>, bytes: &mut [u8]) -> Result<(usize, Option<OwnedFd>), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(from, &mut [IoSliceMut::new(bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let fd = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok((received.bytes, fd))
}

/// What is needed to make sockets in network namespaces.
#[derive(Clone, Debug)]
pub struct NamespaceSockets {
    pub procfs: PathBuf,
    /// `None`: only the agent's own network namespace can be used.
    pub helper: Option<Arc<NamespaceHelper>>,
}

impl NamespaceSockets {
    /// An unconnected, non-blocking socket in the network namespace of a process. Does not wait for anything in that namespace.
    pub fn make(&self, pid: u32, start: BootNs, family: SocketFamily) -> Result<OwnedFd, NamespaceError> {
        let path = self.procfs.join(pid.to_string()).join("ns/net");
        let namespace = File::open(&path).map_err(|source| NamespaceError::Open { pid, source })?;
        // Checked after the namespace was opened: an open one cannot become another's when the PID is reused.
        if !is_alive(&self.procfs, Tgid(pid), start) {
            return Err(NamespaceError::Ended(pid));
        }
        if is_own(&namespace).map_err(|source| NamespaceError::Open { pid, source })? {
            return make_socket(family).map_err(|errno| NamespaceError::Make(errno.into()));
        }
        self.helper.as_ref().ok_or(NamespaceError::NoHelper)?.socket(namespace.as_fd(), pid, family)
    }
}

/// Whether it is the network namespace of this thread.
fn is_own(namespace: &File) -> io::Result<bool> {
    let (own, other) = (Path::new("/proc/thread-self/ns/net").metadata()?, namespace.metadata()?);
    Ok((own.dev(), own.ino()) == (other.dev(), other.ino()))
}

/// The helper: gives up everything that it does not need, and makes sockets until the agent closes its side.
pub fn help(seccomp: bool) -> anyhow::Result<()> {
    // Before the filter, which allows no file.
    let own = File::open("/proc/self/ns/net").context("the helper cannot open its own network namespace")?;
    privileges::restrict_socket_helper(seccomp)?;
    let agent = io::stdin();
    let mut request = [0; REQUEST_BYTES];
    loop {
        let (bytes, namespace) = match receive(agent.as_fd(), &mut request) {
            Ok(received) => received,
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        if bytes == 0 {
            return Ok(());
        }
        let [family, a, b, c, d] = request;
        let (step, errno, socket) = match serve(own.as_fd(), namespace, family)? {
            Ok(socket) => (0, 0, Some(socket)),
            Err((step, errno)) => (step, errno.raw_os_error(), None),
        };
        let [e0, e1, e2, e3] = errno.to_le_bytes();
        send(agent.as_fd(), &[step, e0, e1, e2, e3, a, b, c, d], socket.as_ref().map(OwnedFd::as_fd))?;
    }
}

/// A socket, or the step that failed. The outer error: the helper cannot return to its own namespace, and ends instead of staying in that
/// of a container.
fn serve(own: BorrowedFd<'_>, namespace: Option<OwnedFd>, family: u8) -> anyhow::Result<Result<OwnedFd, (u8, Errno)>> {
    let (Some(namespace), Some(family)) = (namespace, SocketFamily::from_byte(family)) else {
        return Ok(Err((INVALID, Errno::INVAL)));
    };
    if let Err(errno) = enter(namespace.as_fd()) {
        return Ok(Err((ENTER, errno)));
    }
    let made = make_socket(family).map_err(|errno| (MAKE, errno));
    enter(own).context("the helper cannot return to its own network namespace, and ends; restart the agent")?;
    Ok(made)
}

fn enter(namespace: BorrowedFd<'_>) -> Result<(), Errno> {
    move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::kernel::proc::living_thread;

    #[test]
    fn a_socket_of_the_own_namespace_needs_no_helper_and_only_of_the_same_process() {
        let sockets = NamespaceSockets { procfs: "/proc".into(), helper: None };
        let pid = std::process::id();
        let (_, start) = living_thread(Path::new("/proc/self")).unwrap().unwrap();
        assert!(sockets.make(pid, start, SocketFamily::V4).is_ok());
        let reused = sockets.make(pid, start.plus(1_000_000_000), SocketFamily::V4);
        assert!(matches!(reused, Err(NamespaceError::Ended(ended)) if ended == pid), "{reused:?}");
    }

    #[test]
    fn a_reply_to_an_earlier_request_is_dropped() {
        let (to, helper) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let reply = |step: u8, number: u8, socket: Option<BorrowedFd<'_>>| {
            send(helper.as_fd(), &[step, 1, 0, 0, 0, number, 0, 0, 0], socket).unwrap();
        };
        let (late, wanted) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let inode = wanted.metadata().unwrap().ino();
        reply(0, 1, Some(late.as_fd()));
        reply(0, 2, Some(wanted.as_fd()));
        reply(ENTER, 3, None);
        let mut channel = HelperChannel { to, requests: 1 };
        let socket = channel.exchange(late.as_fd(), SocketFamily::V4).unwrap().unwrap();
        assert_eq!(File::from(socket).metadata().unwrap().ino(), inode);
        let refused = channel.exchange(late.as_fd(), SocketFamily::V4).unwrap();
        assert_eq!(refused.unwrap_err(), (ENTER, Errno::PERM));
        drop(helper);
        assert!(channel.exchange(late.as_fd(), SocketFamily::V4).is_err());
    }

    #[test]
    fn descriptors_pass_with_their_bytes_and_an_invalid_request_is_refused() {
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let file = tempfile::tempfile().unwrap();
        send(a.as_fd(), &[4], Some(file.as_fd())).unwrap();
        send(a.as_fd(), &[6], None).unwrap();
        let mut bytes = [0; 1];
        let (n, fd) = receive(b.as_fd(), &mut bytes).unwrap();
        assert_eq!((n, bytes), (1, [4]));
        assert_eq!(File::from(fd.unwrap()).metadata().unwrap().ino(), file.metadata().unwrap().ino());
        assert!(matches!(receive(b.as_fd(), &mut bytes), Ok((1, None))));
        drop(a);
        assert!(matches!(receive(b.as_fd(), &mut bytes), Ok((0, None))));
        let own = File::open("/proc/self/ns/net").unwrap();
        assert_eq!(serve(own.as_fd(), None, 4).unwrap().unwrap_err(), (INVALID, Errno::INVAL));
        // Not a network namespace.
        let (step, _) = serve(own.as_fd(), Some(file.into()), 4).unwrap().unwrap_err();
        assert_eq!(step, ENTER);
        // Its own, for which it needs the same privilege as for any other.
        let served = serve(own.as_fd(), Some(own.try_clone().unwrap().into()), 4).unwrap();
        assert!(matches!(served, Ok(_) | Err((ENTER, Errno::PERM))), "{served:?}");
    }
}
