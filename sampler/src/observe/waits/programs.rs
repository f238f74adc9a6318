//! The wait probes in the kernel: their maps, and attaching them to a library.
//!
//! ```text
//!  Linux 6.10 on   a uprobe_multi link for each process; from the fifth process of a library on as from 6.6 on
//!  Linux 6.6 on    a uprobe_multi link for each library: its filter is for threads there; the program ignores other processes
//!  before          perf events for each call of each library, which need CAP_SYS_ADMIN
//! ```
//! A program at the end of threads lets those leave their calls that do not return from them.
//!
//! Nothing is pinned: with the agent's descriptors the kernel removes all probes.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::{Arc, Weak};

use aya::maps::{HashMap as KernelMap, MapData, MapError};
use aya::programs::raw_trace_point::RawTracePointLink;
use aya::programs::uprobe::{UProbeAttachLocation, UProbeScope};
use aya::programs::{ProgramError, RawTracePoint, UProbe};
use aya::{Ebpf, EbpfLoader};
use sampler_common::{WaitSums, WaitingCall};
use thiserror::Error;

use super::library::{FileKey, Library};
use super::multi::{self, MultiLink, MultiProgram};
use crate::error::display_chain;
use crate::observe::kernel::{OBJECT, log_loaded};

/// Processes that are probed at a time.
pub const MAX_PROCESSES: u32 = 1024;
/// Threads inside a call at a time: room for the threads of all processes, so that none can use up the room of another.
const MAX_CALLS: u32 = MAX_PROCESSES * WaitSums::MAX_THREADS;
/// Clients that were seen since the last turn.
const MAX_CLIENTS: u32 = 4096;
/// Libraries with a probe on the first call, which keeps the file also when it is removed.
const MAX_FIRST: usize = 64;
/// Processes of one library with links of their own. The kernel asks every link of a library at each call, and for each function of a link that
/// begins or ends it stops the creation of processes and examines all that map the library: with more than these, trapping processes that
/// are not selected costs less, and all probes are gone sooner when the agent ends.
const MOST_OWN_LINKS: usize = 4;
/// From here on the filter of a link is for the process.
const FILTERS_PROCESSES: (u32, u32) = (6, 10);
/// Kernels on which returning from a probed function uses a system call that the seccomp filters of runtimes do not know: they end the
/// process. Fixed in 6.14.
const UNKNOWN_CALL: std::ops::Range<(u32, u32)> = (6, 11)..(6, 14);

#[derive(Debug, Error)]
pub enum ProbeError {
    #[error("this build does not contain the eBPF program; build it with `cargo xtask build`")]
    NoObject,
    #[error("the kernel refused the wait probes; they require Linux 5.15, CAP_BPF and CAP_PERFMON")]
    Load(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the eBPF program does not contain `{0}`: the build is inconsistent, run `cargo xtask build`")]
    Inconsistent(&'static str),
    #[error("cannot use the table of probed processes")]
    Map(#[from] MapError),
    #[error("the kernel refused probes in {path}; {remedy}")]
    Attach { path: String, remedy: &'static str, source: Box<dyn std::error::Error + Send + Sync> },
    #[error(
        "process {pid} has a seccomp filter, and this kernel ({release}) would end it at the first return from a probed call; use Linux \
         6.14 or newer"
    )]
    Seccomp { pid: u32, release: String },
    #[error(
        "probes for process {pid} would be in all processes of its library, of which this kernel ({release}) would end those with a \
         seccomp filter; use Linux 6.14 or newer"
    )]
    Shared { pid: u32, release: String },
}

/// Probes of one library or process; dropping them detaches.
pub struct AttachedProbes(#[expect(dead_code, reason = "kept attached")] Vec<ProbeLink>);

#[expect(dead_code, reason = "dropping it detaches")]
enum ProbeLink {
    Multi(MultiLink),
    Perf(aya::programs::uprobe::UProbeLink),
}

enum Attacher {
    Multi { begin: MultiProgram, end: MultiProgram, client: MultiProgram, for_process: bool },
    Perf,
}

pub struct Probes {
    ebpf: Ebpf,
    attacher: Attacher,
    waits: KernelMap<MapData, u32, WaitSums>,
    /// By thread, the call that it is inside.
    waiting: KernelMap<MapData, u64, WaitingCall>,
    clients: KernelMap<MapData, u32, u64>,
    /// Probes that several processes share.
    shared: HashMap<FileKey, Weak<AttachedProbes>>,
    /// Those of single processes.
    own: HashMap<FileKey, Vec<Weak<AttachedProbes>>>,
    /// Probes on the first call, which are for all processes of a library; the one that was used last at the end.
    first: VecDeque<(FileKey, AttachedProbes)>,
    #[expect(dead_code, reason = "kept attached")]
    thread_exit: Option<RawTracePointLink>,
    release: String,
}

/// Whether returning from a probed function may end the process on this kernel.
fn returns_end_confined(release: &str) -> bool {
    UNKNOWN_CALL.contains(&version(release))
}

fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|text| text.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

impl Probes {
    pub fn load(budget: u64, procfs: &Path) -> Result<Self, ProbeError> {
        let object = OBJECT.ok_or(ProbeError::NoObject)?;
        let load = |error: aya::EbpfError| ProbeError::Load(Box::new(error));
        let mut ebpf = EbpfLoader::new()
            .override_global("WAIT_BUDGET", &budget, true)
            .map_max_entries("WAITS", MAX_PROCESSES)
            .map_max_entries("WAITING", MAX_CALLS)
            .map_max_entries("CLIENTS", MAX_CLIENTS)
            // Those of the other programs, which are not loaded.
            .map_max_entries("CGROUP_EVENTS", 1 << 12)
            .map_max_entries("PROCESS_EVENTS", 1 << 12)
            .load(object)
            .map_err(load)?;
        let release = std::fs::read_to_string(procfs.join("sys/kernel/osrelease")).unwrap_or_default().trim().to_owned();
        let thread_exit = attach_thread_exit(&mut ebpf);
        let thread_exit = thread_exit
            .inspect_err(|error| {
                let problem = display_chain(error);
                tracing::warn!(problem, "a thread that ends inside a blocking call will count as waiting until its process ends");
            })
            .ok();
        let attacher = match multi::load(object, &ebpf, ["wait_begin", "wait_end", "client_begin"]) {
            Ok([begin, end, client]) => {
                Attacher::Multi { begin, end, client, for_process: version(&release) >= FILTERS_PROCESSES }
            }
            Err(error) => {
                tracing::info!("wait probes use perf events: {}", display_chain(&error));
                for name in ["wait_begin", "wait_end", "client_begin"] {
                    let program = uprobe(&mut ebpf, name)?;
                    program.load().map_err(|error| ProbeError::Load(Box::new(error)))?;
                }
                Attacher::Perf
            }
        };
        let multi = match &attacher {
            Attacher::Multi { begin, end, client, .. } => {
                vec![("wait_begin", begin.as_fd()), ("wait_end", end.as_fd()), ("client_begin", client.as_fd())]
            }
            Attacher::Perf => Vec::new(),
        };
        log_loaded(&ebpf, &multi);
        let waits = ebpf.take_map("WAITS").ok_or(ProbeError::Inconsistent("WAITS"))?;
        let waiting = ebpf.take_map("WAITING").ok_or(ProbeError::Inconsistent("WAITING"))?;
        let clients = ebpf.take_map("CLIENTS").ok_or(ProbeError::Inconsistent("CLIENTS"))?;
        let (waits, waiting) = (KernelMap::try_from(waits)?, KernelMap::try_from(waiting)?);
        let clients = KernelMap::try_from(clients)?;
        Ok(Self {
            ebpf,
            attacher,
            waits,
            waiting,
            clients,
            shared: HashMap::new(),
            own: HashMap::new(),
            first: VecDeque::new(),
            thread_exit,
            release,
        })
    }

    /// Starts counting for a process, and attaches to its library if that is not done.
    pub fn attach(
        &mut self,
        pid: u32,
        library: &Library,
        has_seccomp: impl FnOnce() -> bool,
    ) -> Result<Arc<AttachedProbes>, ProbeError> {
        if returns_end_confined(&self.release) {
            let release = self.release.clone();
            if has_seccomp() {
                return Err(ProbeError::Seccomp { pid, release });
            }
            if self.shares_links(library.key) {
                return Err(ProbeError::Shared { pid, release });
            }
        }
        self.attach_first(library)?;
        self.waits.insert(pid, WaitSums::ZERO, 0)?;
        let attached = self.attach_blocking(pid, library);
        if attached.is_err() {
            self.forget(&HashSet::from([pid]));
        }
        attached
    }

    fn attach_blocking(&mut self, pid: u32, library: &Library) -> Result<Arc<AttachedProbes>, ProbeError> {
        let is_shared = self.shares_links(library.key);
        if is_shared && let Some(attached) = self.shared.get(&library.key).and_then(Weak::upgrade) {
            return Ok(attached);
        }
        let path = library.stable_path();
        let offsets = &library.calls.blocking;
        let links = match &self.attacher {
            Attacher::Multi { begin, end, .. } => {
                let pid = if is_shared { 0 } else { pid };
                let attach = |program, is_return| {
                    multi::attach(program, &path, offsets, is_return, pid)
                        .map(ProbeLink::Multi)
                        .map_err(|source| refused(library, "probes need CAP_BPF and CAP_PERFMON", source))
                };
                // Returns first: a call between the two is not counted, instead of never ending.
                let returns = attach(end, true)?;
                vec![returns, attach(begin, false)?]
            }
            Attacher::Perf => {
                let mut links = perf(&mut self.ebpf, "wait_end", library, offsets)?;
                links.extend(perf(&mut self.ebpf, "wait_begin", library, offsets)?);
                links
            }
        };
        let attached = Arc::new(AttachedProbes(links));
        if is_shared {
            self.shared.retain(|_, probes| probes.strong_count() > 0);
            self.shared.insert(library.key, Arc::downgrade(&attached));
        } else {
            self.own.entry(library.key).or_default().push(Arc::downgrade(&attached));
        }
        Ok(attached)
    }

    /// Whether a further process of the library uses probes of all of its processes.
    fn shares_links(&mut self, key: FileKey) -> bool {
        self.own.retain(|_, links| {
            links.retain(|link| link.strong_count() > 0);
            !links.is_empty()
        });
        let has_own = matches!(self.attacher, Attacher::Multi { for_process: true, .. });
        !has_own || self.own.get(&key).is_some_and(|links| links.len() >= MOST_OWN_LINKS)
    }

    /// The probe on the first call of a client: in all processes of the library, since a new one is not known yet.
    fn attach_first(&mut self, library: &Library) -> Result<(), ProbeError> {
        let Some(offset) = library.calls.first else { return Ok(()) };
        if let Some(known) = self.first.iter().position(|(key, _)| *key == library.key) {
            let known = self.first.remove(known);
            self.first.extend(known);
            return Ok(());
        }
        let links = match &self.attacher {
            Attacher::Multi { client, .. } => {
                let link = multi::attach(client, &library.stable_path(), &[offset], false, 0);
                vec![ProbeLink::Multi(link.map_err(|source| refused(library, "probes need CAP_BPF and CAP_PERFMON", source))?)]
            }
            Attacher::Perf => perf(&mut self.ebpf, "client_begin", library, &[offset])?,
        };
        if self.first.len() >= MAX_FIRST {
            self.first.pop_front();
        }
        self.first.push_back((library.key, AttachedProbes(links)));
        Ok(())
    }

    pub fn sums(&self, pid: u32) -> Result<Option<WaitSums>, ProbeError> {
        match self.waits.get(&pid, 0) {
            Ok(sums) => Ok(Some(sums)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends counting for processes. Of the calls that their threads are inside none may stay: they are not removed when the calls return
    /// without probes, and the threads would seem to be inside when their process is probed again.
    pub fn forget(&mut self, pids: &HashSet<u32>) {
        if pids.is_empty() {
            return;
        }
        for pid in pids {
            // Absent if it was never inserted.
            let _absent = self.waits.remove(pid);
        }
        let is_of = |thread: &u64| u32::try_from(thread >> 32).is_ok_and(|pid| pids.contains(&pid));
        // Threads of living processes add and remove calls meanwhile, so that the kernel may begin again.
        let threads: Vec<u64> = self.waiting.keys().take(2 * MAX_CALLS as usize).filter_map(Result::ok).filter(is_of).collect();
        for thread in threads {
            let _absent = self.waiting.remove(&thread);
        }
    }

    /// Processes that called cuInit since the last call of this, with the time of CLOCK_BOOTTIME.
    pub fn take_clients(&mut self) -> Vec<(u32, u64)> {
        let clients: Vec<(u32, u64)> = self.clients.iter().filter_map(Result::ok).collect();
        for (pid, _) in &clients {
            let _absent = self.clients.remove(pid);
        }
        clients
    }
}

/// Until the value is dropped, threads that are ended inside a call leave it.
fn attach_thread_exit(ebpf: &mut Ebpf) -> Result<RawTracePointLink, ProbeError> {
    const NAME: &str = "wait_thread_exit";
    let program = ebpf.program_mut(NAME).ok_or(ProbeError::Inconsistent(NAME))?;
    let program: &mut RawTracePoint = program.try_into().map_err(|_| ProbeError::Inconsistent(NAME))?;
    let load = |error: ProgramError| ProbeError::Load(Box::new(error));
    program.load().map_err(load)?;
    let link = program.attach("sched_process_exit").map_err(load)?;
    program.take_link(link).map_err(load)
}

fn refused<E: std::error::Error + Send + Sync + 'static>(library: &Library, remedy: &'static str, source: E) -> ProbeError {
    ProbeError::Attach { path: library.path.display().to_string(), remedy, source: Box::new(source) }
}

fn uprobe<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut UProbe, ProbeError> {
    let program = ebpf.program_mut(name).ok_or(ProbeError::Inconsistent(name))?;
    program.try_into().map_err(|_| ProbeError::Inconsistent(name))
}

fn perf(ebpf: &mut Ebpf, name: &'static str, library: &Library, offsets: &[u64]) -> Result<Vec<ProbeLink>, ProbeError> {
    const REMEDY: &str = "without uprobe_multi links (Linux 6.6) they need CAP_SYS_ADMIN: set keep_capability = [\"sys_admin\"]";
    let program = uprobe(ebpf, name)?;
    let path = library.stable_path();
    let mut links = Vec::new();
    for offset in offsets {
        let link = program
            .attach(UProbeAttachLocation::AbsoluteOffset(*offset), &path, UProbeScope::AllProcesses)
            .map_err(|source| refused(library, REMEDY, source))?;
        let link = program.take_link(link).map_err(|source| refused(library, REMEDY, source))?;
        links.push(ProbeLink::Perf(link));
    }
    Ok(links)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_their_first_two_numbers() {
        for (release, expect) in
            [("6.18.5-arch1-1", (6, 18)), ("5.15.0-101-generic", (5, 15)), ("6.8", (6, 8)), ("7", (7, 0)), ("", (0, 0))]
        {
            assert_eq!(version(release), expect, "{release:?}");
        }
        assert!(returns_end_confined("6.12.57+deb13-amd64") && !returns_end_confined("6.14.0"));
    }
}
