//! Sockets on which a service manager listens in place of an engine: a connection to one starts the engine.
//!
//! systemd holds the listening socket of `docker.socket` and `podman.socket`, and passes a copy of its descriptor to the engine that it
//! starts. So before each connection, the guard determines which processes hold the listening socket:
//!
//! ```text
//!   socket file --(device, inode)--> listening socket in /proc/1/net/unix --(socket inode)--> /proc/PID/fd of service managers
//!     no manager holds it                              Listener::Server     connect
//!     one does, and a running engine does, too         Listener::Manager    connect
//!     one does, and no engine                          Listener::Manager    dormant: do not connect
//! ```
//!
//! An engine that ends closes its descriptor before it stops its containers, so it counts as stopped from then on: a connection that it
//! does not accept would wait in the socket's queue and start it again. podman's service ends when it is idle, and a connection would
//! prolong its life, so an activated one is never queried; its files have its labels.
//!
//! What remains: a connection in the microseconds between the check and the end of an engine, and the unanswered connections to an engine
//! that hangs until it is killed.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::net::UnixStream;

use super::root::Root;
use super::source::file;
use super::stamp::{Stamp, stamp};
use crate::observe::kernel::proc::pids;

/// More than there are targets. When it is reached, all are determined again.
const MAX_SOCKETS: usize = 128;
/// Sockets that are bound at one path: by processes in other mount namespaces, or one after the other.
const MAX_BOUND: usize = 64;
/// How long it holds that no manager has a socket. That cannot change for one file, but the file may be seen before its listener is.
const SERVER_VALID_FOR: Duration = Duration::from_secs(60);
/// A busy node has some 50,000 Unix sockets, of about 100 bytes each.
const MAX_UNIX_TABLE_BYTES: u64 = 32 << 20;
/// Descriptors to inspect of one process; a manager has some hundred.
const MAX_DESCRIPTORS: usize = 65_536;
/// A process that was seen before its exec has another name afterwards, so others are inspected twice, and all of them at this interval.
const INSPECTIONS: u8 = 2;
const COMPLETE_EVERY: Duration = Duration::from_secs(30);
/// Beginnings of the names of programs that serve an engine's socket.
const ENGINES: [&str; 8] = ["dockerd", "docker", "balena", "podman", "containerd", "crio", "cri-", "kubelet"];
/// A socket may be mounted under another name; then it is compared with those below these folders only, since a file elsewhere may be in a
/// file system that hangs.
const RUN: [&str; 2] = ["/run", "/var/run"];
/// `EPOLLIN`.
const EPOLL_IN: u64 = 1;

/// Why a socket must not be connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dormant {
    NotRunning,
    /// The engine runs for the duration of its connections.
    OnDemand,
    /// Nothing shows that it runs, and the processes that hold the socket cannot be determined.
    Unreadable,
}

impl fmt::Display for Dormant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotRunning => "socket activated by systemd, engine not running: not queried",
            Self::OnDemand => "socket activated by systemd, engine ends when idle: not queried",
            Self::Unreadable => {
                "no process of the engine runs, and systemd's descriptors cannot be read (CAP_SYS_PTRACE): not queried, since a \
                 connection could start the engine"
            }
        })
    }
}

#[derive(Debug, Error)]
pub enum ConnectError {
    #[error("{0}")]
    Dormant(Dormant),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The state of a socket's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    Absent,
    Dormant(Dormant),
    Present(Stamp),
}

/// Opens all connections to runtimes.
#[derive(Debug)]
pub struct ActivationGuard {
    procfs: PathBuf,
    root: Root,
    state: Mutex<GuardState>,
}

#[derive(Debug, Default)]
struct GuardState {
    listeners: HashMap<Stamp, Listener>,
    processes: NamedProcesses,
}

#[derive(Clone, Debug)]
enum Listener {
    Server {
        determined_at: Instant,
    },
    /// The descriptors of a manager cannot be read, so the names of processes decide.
    Unreadable {
        determined_at: Instant,
    },
    Manager(ManagedSocket),
}

/// A listening socket that a service manager holds.
#[derive(Clone, Debug)]
struct ManagedSocket {
    /// `socket:[INODE]`.
    name: String,
    manager: Descriptor,
    /// The manager's epoll descriptors, by number.
    epolls: Vec<u64>,
    /// The descriptor of the running engine that was found last.
    engine: Option<Descriptor>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Descriptor {
    pid: u32,
    number: u64,
}

impl Default for ActivationGuard {
    fn default() -> Self {
        Self::new(Path::new("/proc"), Root::new(Path::new("/")))
    }
}

impl ActivationGuard {
    pub fn new(procfs: &Path, root: Root) -> Self {
        Self { procfs: procfs.to_owned(), root, state: Mutex::default() }
    }

    /// Connects, unless that would start an engine.
    pub async fn connect(self: &Arc<Self>, socket: &Path) -> Result<UnixStream, ConnectError> {
        self.check(socket).await?;
        Ok(UnixStream::connect(socket).await?)
    }

    /// An error if a connection would start an engine. To be called directly before a connection.
    pub async fn check(self: &Arc<Self>, socket: &Path) -> Result<(), ConnectError> {
        let (guard, path) = (Arc::clone(self), socket.to_owned());
        match tokio::task::spawn_blocking(move || guard.presence(&path)).await.map_err(io::Error::other)? {
            Presence::Dormant(dormant) => Err(ConnectError::Dormant(dormant)),
            // The connection reports the cause.
            Presence::Absent | Presence::Present(_) => Ok(()),
        }
    }

    /// Blocking. Two system calls if the listener is known and an engine serves.
    pub fn presence(&self, socket: &Path) -> Presence {
        let Some(stamp) = stamp(socket) else { return Presence::Absent };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let known = state.listeners.get(&stamp).cloned();
        let listener = match known {
            Some(known) if self.is_current(&known) => known,
            known => match (self.determine(socket, &stamp, &mut state.processes), known) {
                // A list of descriptors that change while it is read may lack one, as during a reload of systemd's configuration. No
                // manager gives up a socket and leaves its file.
                (Ok(Listener::Server { .. }), Some(known @ Listener::Manager(_))) => known,
                (Ok(listener), _) => listener,
                (Err(error), _) => {
                    tracing::debug!(socket = %socket.display(), %error, "cannot determine who listens");
                    Listener::Unreadable { determined_at: Instant::now() }
                }
            },
        };
        let (presence, listener) = match listener {
            Listener::Manager(managed) => {
                let (dormant, managed) = self.managed(managed, &mut state.processes);
                (dormant.map_or(Presence::Present(stamp), Presence::Dormant), Listener::Manager(managed))
            }
            unreadable @ Listener::Unreadable { .. } => (self.by_name(socket, stamp, &mut state.processes), unreadable),
            server @ Listener::Server { .. } => (Presence::Present(stamp), server),
        };
        if state.listeners.len() >= MAX_SOCKETS {
            state.listeners.clear();
        }
        state.listeners.insert(stamp, listener);
        presence
    }

    fn is_current(&self, listener: &Listener) -> bool {
        match listener {
            Listener::Server { determined_at } | Listener::Unreadable { determined_at } => {
                determined_at.elapsed() < SERVER_VALID_FOR
            }
            Listener::Manager(managed) => self.holds(managed.manager, &managed.name),
        }
    }

    fn determine(&self, socket: &Path, stamp: &Stamp, processes: &mut NamedProcesses) -> io::Result<Listener> {
        let server = Listener::Server { determined_at: Instant::now() };
        let table = match file::beginning(&self.procfs.join("1/net/unix"), MAX_UNIX_TABLE_BYTES) {
            Ok(table) => table,
            // Not a procfs with the host's processes.
            Err(error) if file::is_absent(&error) => return Ok(server),
            Err(error) => return Err(error),
        };
        let is_candidate = |path: &Path| path.file_name() == socket.file_name() || RUN.iter().any(|run| path.starts_with(run));
        // Several, if processes in other mount namespaces have bound the same path.
        let bound = listening(&table).filter(|(_, path)| is_candidate(path) && self.is_bound_at(path, stamp));
        let names: Vec<String> = bound.map(|(inode, _)| format!("socket:[{inode}]")).take(MAX_BOUND).collect();
        if names.is_empty() {
            return Ok(server);
        }
        processes.refresh(&self.procfs);
        let mut denied = None;
        for pid in processes.managers() {
            for name in &names {
                match self.managed_by(pid, name) {
                    Ok(Some(managed)) => return Ok(Listener::Manager(managed)),
                    Ok(None) => {}
                    // It has ended.
                    Err(error) if file::is_absent(&error) => {}
                    Err(error) => denied = Some(error),
                }
            }
        }
        denied.map_or(Ok(server), Err)
    }

    /// Whether the path, as a process has bound it, leads to this file. Paths are the same in pid 1's mount namespace as in the manager's.
    fn is_bound_at(&self, bound: &Path, file: &Stamp) -> bool {
        let is_same = |root: &Root| stamp(&root.path(bound)).is_some_and(|found| (found.0, found.1) == (file.0, file.1));
        bound.is_absolute() && (is_same(&self.root) || is_same(&Root::new(&self.procfs.join("1/root"))))
    }

    fn managed_by(&self, pid: u32, name: &str) -> io::Result<Option<ManagedSocket>> {
        let (mut found, mut epolls) = (None, Vec::new());
        for (number, target) in descriptors(&self.procfs, pid)? {
            if target == name {
                found = Some(Descriptor { pid, number });
            } else if target == "anon_inode:[eventpoll]" {
                epolls.push(number);
            }
        }
        Ok(found.map(|manager| ManagedSocket { name: name.to_owned(), manager, epolls, engine: None }))
    }

    /// Why the socket must not be connected to, and what was found.
    fn managed(&self, mut managed: ManagedSocket, processes: &mut NamedProcesses) -> (Option<Dormant>, ManagedSocket) {
        let known = managed.engine.filter(|engine| self.holds(*engine, &managed.name));
        managed.engine = match known {
            Some(engine) => Some(engine),
            // It would start the engine for the next connection. Cheaper than a search for a process that does not exist.
            None if self.manager_waits(&managed) => None,
            None => {
                processes.refresh(&self.procfs);
                processes.engines().find_map(|pid| self.held_by(pid, &managed.name))
            }
        };
        let dormant = match managed.engine {
            None => Some(Dormant::NotRunning),
            Some(engine) if comm(&self.procfs, engine.pid).is_none_or(|comm| comm.starts_with("podman")) => {
                Some(Dormant::OnDemand)
            }
            Some(_) => None,
        };
        (dormant, managed)
    }

    fn held_by(&self, pid: u32, name: &str) -> Option<Descriptor> {
        // A process that has ended, or cannot be read, does not count as an engine.
        let (number, _) = descriptors(&self.procfs, pid).ok()?.into_iter().find(|(_, target)| target == name)?;
        Some(Descriptor { pid, number })
    }

    fn holds(&self, descriptor: Descriptor, name: &str) -> bool {
        let link = self.procfs.join(format!("{}/fd/{}", descriptor.pid, descriptor.number));
        fs::read_link(link).is_ok_and(|target| target.as_os_str() == name)
    }

    /// Whether the manager waits for connections; systemd does not while the service that it has activated runs. `fdinfo` of an epoll
    /// descriptor has a line `tfd: NUMBER events: MASK ..` for each descriptor that it waits for.
    fn manager_waits(&self, managed: &ManagedSocket) -> bool {
        managed.epolls.iter().any(|epoll| {
            let path = self.procfs.join(format!("{}/fdinfo/{epoll}", managed.manager.pid));
            // Unreadable: the search for the engine decides.
            let text = fs::read_to_string(path).unwrap_or_default();
            text.lines().any(|line| {
                let mut words = line.split_whitespace();
                let mut after = |name: &str| (words.next() == Some(name)).then(|| words.next()).flatten();
                after("tfd:").and_then(|word| word.parse().ok()) == Some(managed.manager.number)
                    && after("events:")
                        .and_then(|word| u64::from_str_radix(word, 16).ok())
                        .is_some_and(|mask| mask & EPOLL_IN != 0)
            })
        })
    }

    /// The decision where descriptors cannot be read: sockets named for engines that systemd may activate need a process of that engine.
    fn by_name(&self, socket: &Path, stamp: Stamp, processes: &mut NamedProcesses) -> Presence {
        let name = socket.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        if name.contains("podman") {
            return Presence::Dormant(Dormant::Unreadable);
        }
        processes.refresh(&self.procfs);
        let runs = |wanted: &str| processes.engines().any(|pid| comm(&self.procfs, pid).is_some_and(|comm| comm == wanted));
        if name.contains("docker.sock") && !runs("dockerd") {
            return Presence::Dormant(Dormant::Unreadable);
        }
        Presence::Present(stamp)
    }
}

/// Inode and path of each listening socket in the table: `Num RefCount Protocol Flags Type St Inode Path`.
fn listening(table: &[u8]) -> impl Iterator<Item = (&str, &Path)> {
    /// `__SO_ACCEPTCON`.
    const LISTENS: u64 = 1 << 16;
    table.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut rest = line;
        let mut column = || {
            rest = rest.trim_ascii_start();
            let end = rest.iter().position(|byte| *byte == b' ').unwrap_or(rest.len());
            let (word, after) = rest.split_at(end);
            rest = after;
            std::str::from_utf8(word).ok()
        };
        let flags = u64::from_str_radix([column()?, column()?, column()?, column()?][3], 16).ok()?;
        let inode = [column()?, column()?, column()?][2];
        // A path may contain any byte; one space separates it.
        let path = rest.strip_prefix(b" ").filter(|path| path.first() == Some(&b'/'))?;
        (flags & LISTENS != 0).then(|| (inode, Path::new(std::ffi::OsStr::from_bytes(path))))
    })
}

/// Numbers and targets of a process's descriptors.
fn descriptors(procfs: &Path, pid: u32) -> io::Result<Vec<(u64, String)>> {
    let folder = procfs.join(pid.to_string()).join("fd");
    let mut found = Vec::new();
    for entry in fs::read_dir(&folder)?.take(MAX_DESCRIPTORS) {
        let entry = entry?;
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // Closed meanwhile.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        found.push((number, target.to_string_lossy().into_owned()));
    }
    Ok(found)
}

fn comm(procfs: &Path, pid: u32) -> Option<String> {
    let comm = fs::read_to_string(procfs.join(pid.to_string()).join("comm")).ok()?;
    Some(comm.trim_end().to_owned())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProcessRole {
    Manager,
    Engine,
    /// With the number of inspections.
    Other(u8),
}

/// The living processes by the role that their name gives them.
#[derive(Debug, Default)]
struct NamedProcesses {
    roles: HashMap<u32, ProcessRole>,
    complete_at: Option<Instant>,
}

impl NamedProcesses {
    fn managers(&self) -> impl Iterator<Item = u32> {
        self.with(ProcessRole::Manager)
    }

    fn engines(&self) -> impl Iterator<Item = u32> {
        self.with(ProcessRole::Engine)
    }

    fn with(&self, role: ProcessRole) -> impl Iterator<Item = u32> {
        self.roles.iter().filter(move |(_, found)| **found == role).map(|(pid, _)| *pid)
    }

    /// Inspects new processes.
    fn refresh(&mut self, procfs: &Path) {
        if self.complete_at.is_none_or(|at| at.elapsed() >= COMPLETE_EVERY) {
            *self = Self { roles: HashMap::new(), complete_at: Some(Instant::now()) };
        }
        let before = std::mem::take(&mut self.roles);
        // If processes cannot be listed, no engine is found.
        for pid in pids(procfs).unwrap_or_default() {
            let role = match before.get(&pid) {
                Some(ProcessRole::Other(inspections)) if *inspections < INSPECTIONS => role(procfs, pid, inspections + 1),
                Some(known) => *known,
                None => role(procfs, pid, 1),
            };
            self.roles.insert(pid, role);
        }
    }
}

fn role(procfs: &Path, pid: u32, inspections: u8) -> ProcessRole {
    match comm(procfs, pid) {
        Some(comm) if ENGINES.iter().any(|name| comm.starts_with(name)) => ProcessRole::Engine,
        // `systemd`, of the machine and of users, and `systemd-socket-activate`; a service's process before its exec has its own name.
        Some(comm) if pid == 1 || comm.starts_with("systemd") => ProcessRole::Manager,
        _ => ProcessRole::Other(inspections),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A procfs in which pid 1 is systemd and holds a listening socket, as descriptor 40 of epoll descriptor 4.
    struct Machine {
        dir: tempfile::TempDir,
        guard: ActivationGuard,
    }

    const HELD: &str = "socket:[777]";

    impl Machine {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let socket = dir.path().join("docker.sock");
            // Closed at once: only its file matters.
            drop(UnixListener::bind(&socket).unwrap());
            let machine = Self { guard: ActivationGuard::new(dir.path(), Root::new(Path::new("/"))), dir };
            machine.process(1, "systemd", &[(40, HELD), (4, "anon_inode:[eventpoll]")]);
            machine.table(0x10000);
            machine.waits(true);
            machine
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn table(&self, flags: u32) {
            let socket = self.socket();
            let head = "Num       RefCount Protocol Flags    Type St Inode Path\n";
            let other = "0000000000000000: 00000002 00000000 00010000 0001 01   776 /no/such file.sock\n";
            let line = format!("0000000000000000: 00000002 00000000 {flags:08X} 0001 01   777 {}\n", socket.display());
            self.write("1/net/unix", &format!("{head}{other}{line}0000000000000000: 00000003 00000000 00000000 0001 03 9\n"));
        }

        fn waits(&self, waits: bool) {
            let line = if waits { "tfd:       40 events:       19 data: 55  pos:0 ino:1 sdev:8\n" } else { "" };
            self.write("1/fdinfo/4", &format!("pos:\t0\ntfd:       41 events:       19 data: 1\n{line}"));
        }

        fn process(&self, pid: u32, comm: &str, descriptors: &[(u64, &str)]) {
            let folder = self.dir.path().join(pid.to_string());
            // It may exist from an earlier state of the machine.
            let _absent = fs::remove_dir_all(folder.join("fd"));
            self.write(&format!("{pid}/comm"), &format!("{comm}\n"));
            fs::create_dir_all(folder.join("fd")).unwrap();
            for (number, target) in descriptors {
                symlink(target, folder.join("fd").join(number.to_string())).unwrap();
            }
        }

        fn end(&self, pid: u32) {
            fs::remove_dir_all(self.dir.path().join(pid.to_string())).unwrap();
        }

        fn socket(&self) -> PathBuf {
            self.dir.path().join("docker.sock")
        }

        /// The reason for not connecting, if any.
        fn dormant(&self) -> Option<Dormant> {
            match self.guard.presence(&self.socket()) {
                Presence::Dormant(dormant) => Some(dormant),
                Presence::Present(_) => None,
                Presence::Absent => panic!("the socket exists"),
            }
        }
    }

    #[test]
    fn a_socket_that_only_systemd_holds_is_dormant_until_an_engine_holds_it() {
        let machine = Machine::new();
        assert_eq!(machine.dormant(), Some(Dormant::NotRunning));
        // A container engine that does not hold it, and a process that does, but is not an engine.
        machine.process(20, "dockerd", &[(3, "socket:[1]")]);
        machine.process(21, "(dockerd)", &[(3, HELD)]);
        machine.waits(false);
        assert_eq!(machine.dormant(), Some(Dormant::NotRunning));
        machine.process(22, "dockerd", &[(3, "pipe:[1]"), (7, HELD)]);
        assert_eq!(machine.dormant(), None);
        // It closes its descriptor and continues to run.
        machine.process(22, "dockerd", &[(3, "pipe:[1]")]);
        assert_eq!(machine.dormant(), Some(Dormant::NotRunning));
        machine.process(22, "dockerd", &[(9, HELD)]);
        assert_eq!(machine.dormant(), None);
        machine.end(22);
        assert_eq!(machine.dormant(), Some(Dormant::NotRunning));
    }

    #[test]
    fn while_systemd_waits_for_connections_no_process_is_searched() {
        let machine = Machine::new();
        machine.process(22, "dockerd", &[(7, HELD)]);
        assert_eq!(machine.dormant(), Some(Dormant::NotRunning));
        machine.waits(false);
        assert_eq!(machine.dormant(), None);
    }

    #[test]
    fn podmans_service_is_not_queried_where_it_ends_when_idle() {
        let machine = Machine::new();
        machine.waits(false);
        machine.process(22, "podman", &[(3, HELD)]);
        assert_eq!(machine.dormant(), Some(Dormant::OnDemand));
    }

    #[test]
    fn managers_of_users_count_and_other_holders_do_not() {
        let machine = Machine::new();
        machine.process(1, "systemd", &[]);
        machine.process(30, "systemd", &[(5, HELD)]);
        assert_eq!(machine.dormant(), Some(Dormant::NotRunning));
        let machine = Machine::new();
        machine.process(1, "systemd", &[]);
        machine.process(30, "dockerd", &[(5, HELD)]);
        assert_eq!(machine.dormant(), None);
    }

    #[test]
    fn a_new_file_at_the_path_is_determined_again() {
        let machine = Machine::new();
        assert_eq!(machine.dormant(), Some(Dormant::NotRunning));
        // The engine has replaced the file by a socket of its own, which is not in the table.
        fs::rename(machine.socket(), machine.dir.path().join("old.sock")).unwrap();
        drop(UnixListener::bind(machine.socket()).unwrap());
        let line = "0000000000000000: 00000002 00000000 00010000 0001 01   777 /old.sock\n";
        machine.write("1/net/unix", line);
        assert_eq!(machine.dormant(), None);
        fs::remove_file(machine.socket()).unwrap();
        assert_eq!(machine.guard.presence(&machine.socket()), Presence::Absent);
    }

    #[test]
    fn a_socket_stays_that_of_its_manager_while_descriptors_change() {
        let machine = Machine::new();
        assert_eq!(machine.dormant(), Some(Dormant::NotRunning));
        machine.process(1, "systemd", &[]);
        assert_eq!(machine.dormant(), Some(Dormant::NotRunning));
        machine.process(22, "dockerd", &[(3, HELD)]);
        machine.waits(false);
        assert_eq!(machine.dormant(), None);
        machine.end(22);
        machine.process(1, "systemd", &[(25, HELD)]);
        assert_eq!(machine.dormant(), Some(Dormant::NotRunning));
    }

    #[test]
    fn connected_sockets_of_the_same_path_do_not_count() {
        let machine = Machine::new();
        machine.table(0);
        assert_eq!(machine.dormant(), None);
    }
}
