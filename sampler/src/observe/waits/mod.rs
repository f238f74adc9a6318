//! Wait probes: how long processes of GPU users are inside blocking calls of the CUDA driver library. Only on request: of a session, or of
//! the setting `wait_probes`.
//!
//! ```text
//!  requests (selections) --> thread `waits`, each second:
//!     processes of GPU users (core) -> selected -> library -> probes attached
//!     sums of the kernel's map -> readings -> core -> facts
//!     over the budget, ended, not selected any more -> detached
//!  no request -> all is detached and unloaded
//! ```
//! Guarantees: without a request nothing is loaded and no process is probed. Probes live as long as the descriptors of this process.
//! A process with more calls a second than the budget loses its probes for as long as it lives, and the session says so.

mod library;
mod multi;
mod patient;
mod process;
mod programs;
mod root_path;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sampler_common::WaitSums;
use sampler_core::observation::{Observation, WaitProbeChange, WaitProbeState};
use sampler_core::pipeline::GpuProcess;
use sampler_core::units::{BootNs, Tgid};

use self::library::{Libraries, Library, LibraryError};
use self::patient::{Patient, Unanswered};
use self::process::ProbedProcess;
use self::programs::{MAX_PROCESSES, ProbeError, Probes};
use crate::error::display_chain;
use crate::health::Health;
use crate::health::condition::Condition;
use crate::inbox::CoreSender;
use crate::observe::clock::boot_now;
use crate::observe::kernel::proc::living_thread;
use crate::wait_selector::WaitSelector;

/// Processes of one user that are probed at a time, so that others have room.
const MAX_OF_USER: usize = 256;
const EVERY: Duration = Duration::from_secs(1);
/// For reading the library of one process; it takes some milliseconds.
const LIBRARY_PATIENCE: Duration = Duration::from_secs(1);
/// Threads that may be in reads of libraries that hang.
const MAX_HANGING: usize = 4;
/// How often new clients are reported: before samples of their time are divided, which wait for the fourth named sample after them.
const CLIENTS_EVERY: Duration = Duration::from_millis(200);
/// Without a request; one ends the pause.
const IDLE: Duration = Duration::from_secs(3600);
/// How often loading is tried again.
const LOAD_AGAIN: Duration = Duration::from_secs(30);
/// How often a process without the library is examined again: often at first, since a program loads it when it starts to use the GPU.
const EXAMINE_SOON: Duration = Duration::from_secs(2);
const EXAMINE_LATER: Duration = Duration::from_secs(30);
const YOUNG: Duration = Duration::from_secs(60);

/// Who requests a selection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Requester {
    Setting,
    Session(String),
}

#[derive(Default)]
struct Requests {
    selectors: BTreeMap<Requester, WaitSelector>,
    /// Counts changes.
    generation: u64,
}

/// Selections that are in force. Clones share them.
#[derive(Clone, Default)]
pub struct WaitRequests(Arc<(Mutex<Requests>, Condvar)>);

impl WaitRequests {
    fn change(&self, change: impl FnOnce(&mut BTreeMap<Requester, WaitSelector>)) {
        let mut requests = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut requests.selectors);
        requests.generation += 1;
        self.0.1.notify_all();
    }

    pub fn set(&self, requester: Requester, selector: WaitSelector) {
        self.change(|selectors| _ = selectors.insert(requester, selector));
    }

    pub fn clear(&self, requester: &Requester) {
        self.change(|selectors| _ = selectors.remove(requester));
    }

    /// The selections, and their generation.
    fn selectors(&self) -> (Vec<WaitSelector>, u64) {
        let requests = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        (requests.selectors.values().cloned().collect(), requests.generation)
    }

    /// Waits until the selections are others than those of `generation`, `at_most` for that long. Returns whether they are.
    fn wait(&self, generation: u64, at_most: Duration) -> bool {
        let requests = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.0.1.wait_timeout_while(requests, at_most, |requests| requests.generation == generation);
        waited.unwrap_or_else(PoisonError::into_inner).0.generation != generation
    }
}

/// Those of the processes that one of the selections includes.
pub type SelectProcesses = Box<dyn Fn(&[WaitSelector], Vec<GpuProcess>) -> Vec<GpuProcess> + Send>;

/// The connections of the thread.
pub struct WaitContext {
    pub to: CoreSender,
    pub health: Arc<Health>,
    pub select: SelectProcesses,
    pub requests: WaitRequests,
    pub procfs: PathBuf,
    pub budget: u64,
    pub stop: Arc<AtomicBool>,
}

/// A process that has no probes, and when it is examined again.
struct Unprobed {
    /// What was reported of it, with the reason.
    reported: Option<(WaitProbeState, String)>,
    since: Instant,
    /// `None`: not again.
    again: Option<Instant>,
}

/// What identifies a process: its pid, and its start to the clock tick.
type ProcessId = (u32, u64);

/// Why the programs could not be loaded, and when that is tried again.
struct LoadFailure {
    again: Instant,
    problem: String,
}

type LibraryReader = Patient<u32, Result<Library, LibraryError>>;

struct Worker {
    context: WaitContext,
    probes: Option<Probes>,
    /// Reads the library of a process.
    reader: Option<LibraryReader>,
    /// Held by each thread that reads libraries, also by those that are in a read that hangs.
    readers: Arc<()>,
    /// A read of its library hangs.
    hanging: HashSet<ProcessId>,
    probed: HashMap<ProcessId, ProbedProcess>,
    /// Those over the budget stay until they end.
    unprobed: HashMap<ProcessId, Unprobed>,
    /// Of the requests that were last served.
    generation: u64,
    load_failure: Option<LoadFailure>,
    observations: Vec<Observation>,
}

/// The thread of wait probes.
pub struct WaitsThread {
    thread: JoinHandle<()>,
    requests: WaitRequests,
}

impl WaitsThread {
    /// Waits until all probes are detached, `at_most` for that long. The agent has been asked to stop. A thread that the end of its process
    /// interrupts while it detaches leaves breakpoints: the kernel gives up on memory that it has to read for a process that is being killed.
    pub fn end(self, at_most: Duration) {
        // Ends its pause.
        self.requests.change(|_| {});
        let from = Instant::now();
        while !self.thread.is_finished() && from.elapsed() < at_most {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

pub fn start(context: WaitContext) -> std::io::Result<WaitsThread> {
    let requests = context.requests.clone();
    let thread = std::thread::Builder::new().name("waits".into()).spawn(move || {
        let stop = Arc::clone(&context.stop);
        let mut worker = Worker {
            context,
            probes: None,
            reader: None,
            readers: Arc::new(()),
            hanging: HashSet::new(),
            probed: HashMap::new(),
            unprobed: HashMap::new(),
            generation: 0,
            load_failure: None,
            observations: Vec::new(),
        };
        while !stop.load(Ordering::Relaxed) {
            let begun = Instant::now();
            let (selectors, generation) = worker.context.requests.selectors();
            // The core has ended, and with it the agent.
            let Some(()) = worker.turn(&selectors, generation) else { return };
            let pause = if selectors.is_empty() { IDLE } else { EVERY.saturating_sub(begun.elapsed()) };
            let Some(()) = worker.pause(generation, pause) else { return };
        }
        worker.end_all();
    })?;
    Ok(WaitsThread { thread, requests })
}

fn id_of(process: &GpuProcess) -> ProcessId {
    (process.tgid.0, process.start.proc_tick())
}

/// Whether the PID still is that of the process, to the clock tick of its start.
fn is_same_process(procfs: &Path, process: &GpuProcess) -> bool {
    lives(procfs, id_of(process))
}

fn lives(procfs: &Path, (pid, start_tick): ProcessId) -> bool {
    let alive = living_thread(&procfs.join(pid.to_string()));
    alive.is_ok_and(|alive| alive.is_some_and(|(_, start)| start.proc_tick() == start_tick))
}

/// Whether a thread of the process has a seccomp filter. One of which this is not known may have one. Read as bytes, because a process can
/// set any name for itself.
fn has_seccomp(procfs: &Path, pid: u32) -> bool {
    let has_filter = |thread: std::io::Result<std::fs::DirEntry>| {
        let status = match thread.and_then(|thread| std::fs::read(thread.path().join("status"))) {
            Ok(status) => status,
            // The thread has ended.
            Err(error) => return ![Some(libc::ENOENT), Some(libc::ESRCH)].contains(&error.raw_os_error()),
        };
        let mode = status.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"Seccomp:"));
        mode.is_some_and(|mode| mode.trim_ascii() == b"2")
    };
    std::fs::read_dir(procfs.join(pid.to_string()).join("task")).map_or(true, |mut threads| threads.any(has_filter))
}

impl Worker {
    /// `None` if the core has ended.
    fn turn(&mut self, selectors: &[WaitSelector], generation: u64) -> Option<()> {
        if selectors.is_empty() {
            self.end_all();
            return self.send();
        }
        let loaded = self.load();
        self.send_clients()?;
        let wanted = self.wanted(selectors)?;
        self.read();
        self.end_except(&wanted);
        if std::mem::replace(&mut self.generation, generation) != generation {
            self.repeat_reasons(&wanted);
        }
        match loaded {
            Ok(()) => {
                let mut sent = Instant::now();
                for process in wanted {
                    self.examine(&process);
                    if sent.elapsed() > CLIENTS_EVERY {
                        sent = Instant::now();
                        self.send_clients()?;
                    }
                }
                self.report_problems();
            }
            Err(problem) => self.refuse(&wanted, &problem),
        }
        self.send()
    }

    /// Waits for other selections, `at_most` for that long, and reports new clients meanwhile. `None` if the core has ended.
    fn pause(&mut self, generation: u64, at_most: Duration) -> Option<()> {
        let until = Instant::now() + at_most;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let slice = if self.probes.is_some() { left.min(CLIENTS_EVERY) } else { left };
            if left.is_zero() || self.context.requests.wait(generation, slice) {
                return Some(());
            }
            self.send_clients()?;
        }
    }

    /// A session that begins has the reasons of processes that were refused before.
    fn repeat_reasons(&mut self, wanted: &[GpuProcess]) {
        for process in wanted {
            let reported = self.unprobed.get(&id_of(process)).and_then(|known| known.reported.clone());
            if let Some((state, detail)) = reported {
                self.probe_change((process.tgid, process.start), state, detail);
            }
        }
    }

    /// Before the core is asked for the processes of users of GPUs.
    fn send_clients(&mut self) -> Option<()> {
        let pids = self.probes.as_mut().map(Probes::take_clients).unwrap_or_default();
        let client = |(pid, at)| Observation::GpuClient { tgid: Tgid(pid), at: BootNs(at) };
        self.context.to.observe_all(pids.into_iter().map(client)).ok()
    }

    fn send(&mut self) -> Option<()> {
        let n = self.probed.len();
        self.context.health.update(|view| view.wait_probed_processes = n);
        self.context.to.observe_all(std::mem::take(&mut self.observations).into_iter()).ok()
    }

    /// Loads the programs, if they are not; returns the reason if they cannot be.
    fn load(&mut self) -> Result<(), String> {
        if self.probes.is_some() {
            return Ok(());
        }
        if let Some(failure) = self.load_failure.as_ref().filter(|failure| Instant::now() < failure.again) {
            return Err(failure.problem.clone());
        }
        match Probes::load(self.context.budget, &self.context.procfs) {
            Ok(probes) => {
                self.probes = Some(probes);
                self.load_failure = None;
                Ok(())
            }
            Err(error) => {
                let problem = display_chain(&error);
                self.load_failure = Some(LoadFailure { again: Instant::now() + LOAD_AGAIN, problem: problem.clone() });
                self.context.health.report(Condition::WaitProbes, std::slice::from_ref(&problem), |_, first| first.to_owned());
                Err(problem)
            }
        }
    }

    /// States for each process, once, why it has no probes: the programs cannot be loaded.
    fn refuse(&mut self, wanted: &[GpuProcess], problem: &str) {
        for process in wanted {
            let now = Instant::now();
            let reported = Some((WaitProbeState::Refused, problem.to_owned()));
            let known = Unprobed { reported, since: now, again: Some(now) };
            if self.unprobed.insert(id_of(process), known).is_none() {
                self.probe_change((process.tgid, process.start), WaitProbeState::Refused, problem.to_owned());
            }
        }
    }

    fn wanted(&self, selectors: &[WaitSelector]) -> Option<Vec<GpuProcess>> {
        Some((self.context.select)(selectors, self.context.to.gpu_processes()?))
    }

    fn probe_change(&mut self, process: (Tgid, BootNs), state: WaitProbeState, detail: String) {
        let (tgid, start) = process;
        self.observations.push(Observation::WaitProbe(Box::new(WaitProbeChange { tgid, start, at: boot_now(), state, detail })));
    }

    /// Reads all processes; those over the budget lose their probes.
    fn read(&mut self) {
        let Some(probes) = &mut self.probes else { return };
        let (mut over, mut uncounted) = (HashSet::new(), Vec::new());
        for (id, process) in &mut self.probed {
            // Without an entry, and if it cannot be read, there is nothing to add.
            let Ok(Some(sums)) = probes.sums(id.0) else { continue };
            if sums.over_budget > 0 {
                over.insert(*id);
                continue;
            }
            if process.has_new_uncounted(&sums, self.generation) {
                uncounted.push((process.tgid, process.start));
            }
            self.observations.push(Observation::Waited(Box::new(process.take(&sums, boot_now()))));
        }
        probes.forget(&over.iter().map(|(pid, _)| *pid).collect());
        for process in uncounted {
            let most = WaitSums::MAX_THREADS;
            let detail = format!("some calls are not counted, as where more than {most} threads are inside calls at once");
            self.probe_change(process, WaitProbeState::UncountedCalls, detail);
        }
        for id in over {
            let Some(process) = self.probed.remove(&id) else { continue };
            let budget = self.context.budget;
            let detail = format!("more than {budget} blocking calls a second; wait_probe_budget permits more");
            let (reported, since) = (Some((WaitProbeState::OverBudget, detail.clone())), Instant::now());
            self.unprobed.insert(id, Unprobed { reported, since, again: None });
            self.probe_change((process.tgid, process.start), WaitProbeState::OverBudget, detail);
        }
    }

    fn end_except(&mut self, wanted: &[GpuProcess]) {
        let wanted: HashSet<ProcessId> = wanted.iter().map(id_of).collect();
        let procfs = &self.context.procfs;
        self.unprobed.retain(|id, known| wanted.contains(id) || (known.again.is_none() && lives(procfs, *id)));
        let ended: Vec<ProcessId> = self.probed.keys().filter(|id| !wanted.contains(*id)).copied().collect();
        if let Some(probes) = &mut self.probes {
            probes.forget(&ended.iter().map(|(pid, _)| *pid).collect());
        }
        for id in ended {
            let Some(process) = self.probed.remove(&id) else { continue };
            self.probe_change((process.tgid, process.start), WaitProbeState::Ended, String::new());
        }
    }

    fn end_all(&mut self) {
        if self.probes.is_none() && self.load_failure.is_none() {
            return;
        }
        self.read();
        self.end_except(&[]);
        (self.probes, self.load_failure) = (None, None);
        self.reader = None;
        self.context.health.report(Condition::WaitProbes, &[], |_, first| first.to_owned());
    }

    /// Attaches to a process that has no probes yet.
    fn examine(&mut self, process: &GpuProcess) {
        let (id, now) = (id_of(process), Instant::now());
        let is_due = self.unprobed.get(&id).is_none_or(|known| known.again.is_some_and(|again| now >= again));
        if self.probed.contains_key(&id) || !is_due {
            return;
        }
        let (state, detail) = match self.attach(process) {
            Ok(path) => {
                self.unprobed.remove(&id);
                (WaitProbeState::Attached, path)
            }
            Err(refusal) => {
                let known = self.unprobed.entry(id).or_insert(Unprobed { reported: None, since: now, again: None });
                let is_young = now.saturating_duration_since(known.since) < YOUNG;
                let again = now + if is_young { EXAMINE_SOON } else { EXAMINE_LATER };
                known.again = (!self.hanging.remove(&id)).then_some(again);
                // A process that is starting has no library yet.
                let is_starting = refusal.0 == WaitProbeState::NoLibrary && known.since == now;
                if is_starting || known.reported.as_ref().is_some_and(|(state, _)| *state == refusal.0) {
                    return;
                }
                known.reported = Some(refusal.clone());
                refusal
            }
        };
        self.probe_change((process.tgid, process.start), state, detail);
    }

    /// The library of a process. Its file may be on a file system that hangs: a read that does is left to its thread.
    fn library(&mut self, process: &GpuProcess) -> Result<Library, LibraryError> {
        let pid = process.tgid.0;
        let reader = match self.reader.take() {
            Some(reader) => reader,
            None => self.start_reader()?,
        };
        match reader.ask(pid, LIBRARY_PATIENCE) {
            Ok((library, reader)) => {
                self.reader = Some(reader);
                library
            }
            Err(Unanswered::Late) => {
                self.hanging.insert(id_of(process));
                Err(LibraryError::Late { pid, seconds: LIBRARY_PATIENCE.as_secs() })
            }
            Err(Unanswered::Ended) => Err(LibraryError::ThreadEnded { pid }),
        }
    }

    fn start_reader(&self) -> Result<LibraryReader, LibraryError> {
        let hanging = Arc::strong_count(&self.readers) - 1;
        if hanging >= MAX_HANGING {
            return Err(LibraryError::Hanging(hanging));
        }
        let (procfs, mut libraries, lives) = (self.context.procfs.clone(), Libraries::default(), Arc::clone(&self.readers));
        let read = move |pid| {
            let _lives = &lives;
            libraries.of_process(&procfs, pid)
        };
        Patient::new("wait-libraries", read).map_err(LibraryError::Thread)
    }

    fn attach(&mut self, process: &GpuProcess) -> Result<String, (WaitProbeState, String)> {
        let refused = |error: &dyn std::error::Error| (WaitProbeState::Refused, display_chain(error));
        if self.probed.len() >= MAX_PROCESSES as usize {
            return Err((WaitProbeState::Refused, format!("{MAX_PROCESSES} processes are probed; select fewer")));
        }
        if self.probed.values().filter(|probed| probed.user == process.user).count() >= MAX_OF_USER {
            let problem =
                format!("{MAX_OF_USER} processes of its user are probed, the most of one user; select single ones by pid");
            return Err((WaitProbeState::Refused, problem));
        }
        let pid = process.tgid.0;
        let library = self.library(process).map_err(|error| match &error {
            LibraryError::Absent | LibraryError::Maps { .. } => (WaitProbeState::NoLibrary, display_chain(&error)),
            LibraryError::NoSymbols { .. } => (WaitProbeState::NoSymbols, display_chain(&error)),
            _ => refused(&error),
        })?;
        let Some(probes) = &mut self.probes else { return Err((WaitProbeState::Refused, String::new())) };
        let attached = probes.attach(pid, &library, || has_seccomp(&self.context.procfs, pid));
        let attached = attached.map_err(|error: ProbeError| refused(&error))?;
        // What was read by the PID may be of a later process with the same one.
        if !is_same_process(&self.context.procfs, process) {
            probes.forget(&HashSet::from([pid]));
            return Err((WaitProbeState::NoLibrary, format!("process {pid} ended")));
        }
        let probed = ProbedProcess::new(process, boot_now(), Some(attached));
        self.probed.insert(id_of(process), probed);
        Ok(library.path.display().to_string())
    }

    fn report_problems(&self) {
        let is_problem = |known: &&Unprobed| {
            let state = known.reported.as_ref().map(|(state, _)| *state);
            matches!(state, Some(WaitProbeState::NoSymbols | WaitProbeState::Refused | WaitProbeState::OverBudget))
        };
        let problems: Vec<String> =
            self.unprobed.iter().filter(|(_, known)| is_problem(known)).map(|((pid, _), _)| format!("process {pid}")).collect();
        let message =
            |n, first: &str| format!("selected processes without wait probes: {n}, such as {first}; a session states the reason");
        self.context.health.report(Condition::WaitProbes, &problems, message);
    }
}

#[cfg(test)]
mod tests {
    use sampler_core::fact::{HostProcess, User};

    use super::*;

    #[test]
    fn a_seccomp_filter_is_found_whatever_the_name_of_the_process_is() {
        let procfs = tempfile::tempdir().unwrap();
        let threads = procfs.path().join("7/task");
        let (folder, other) = (threads.join("7"), threads.join("8"));
        [&folder, &other].into_iter().for_each(|folder| std::fs::create_dir_all(folder).unwrap());
        for (status, expect) in [
            (b"Name:\tx\nSeccomp:\t0\n".as_slice(), false),
            (b"Name:\t\xff\nSeccomp:\t2\nSeccomp_filters:\t1\n", true),
            (b"Name:\tSeccomp:\t2\nSeccomp:\t0\n", false),
            (b"Name:\tx\n", false),
        ] {
            std::fs::write(folder.join("status"), status).unwrap();
            assert_eq!(has_seccomp(procfs.path(), 7), expect, "{}", status.escape_ascii());
        }
        // Another thread has one.
        std::fs::write(other.join("status"), "Seccomp:\t2\n").unwrap();
        assert!(has_seccomp(procfs.path(), 7));
        assert!(has_seccomp(procfs.path(), 8));
    }

    #[test]
    fn a_later_process_with_the_same_pid_is_another_one() {
        let procfs = Path::new("/proc");
        let pid = std::process::id();
        let (_, start) = living_thread(&procfs.join(pid.to_string())).unwrap().unwrap();
        let is_same = |start: BootNs| {
            let user = User::Host(HostProcess { pid, start });
            is_same_process(procfs, &GpuProcess { tgid: Tgid(pid), start, user })
        };
        assert!(is_same(start) && is_same(start.plus(1)) && !is_same(start.plus(1_000_000_000)));
    }
}
