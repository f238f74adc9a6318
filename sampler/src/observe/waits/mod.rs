//! Wait probes: how long processes of GPU users are inside blocking calls of the CUDA driver library. Only on request of a
//! session, or the setting `wait_probes`.
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
mod process;
mod programs;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sampler_core::fact::WaitProbeState;
use sampler_core::observation::{Observation, WaitProbeChange};
use sampler_core::pipeline::GpuProcess;
use sampler_core::units::{BootNs, Tgid};

use self::library::{Libraries, LibraryError};
use self::process::ProbedProcess;
use self::programs::{MAX_PROCESSES, ProbeError, Probes};
use crate::error::display_chain;
use crate::health::Health;
use crate::health::condition::Condition;
use crate::inbox::CoreSender;
use crate::labels::LabelService;
use crate::observe::clock::boot_now;
use crate::wait_selector::WaitSelector;

const EVERY: Duration = Duration::from_secs(1);
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

/// Selections that are in force. Clones share them.
#[derive(Clone, Default)]
pub struct WaitRequests(Arc<(Mutex<BTreeMap<Requester, WaitSelector>>, Condvar)>);

impl WaitRequests {
    pub fn set(&self, requester: Requester, selector: WaitSelector) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).insert(requester, selector);
        self.0.1.notify_all();
    }

    pub fn clear(&self, requester: &Requester) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).remove(requester);
        self.0.1.notify_all();
    }

    fn selectors(&self) -> Vec<WaitSelector> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Waits until the selections change, `at_most` for that long.
    fn wait(&self, at_most: Duration) {
        let requests = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _waited = self.0.1.wait_timeout(requests, at_most);
    }
}

/// The connections of the thread.
pub struct WaitWorkerContext {
    pub to: CoreSender,
    pub health: Arc<Health>,
    pub labels: LabelService,
    pub requests: WaitRequests,
    pub procfs: PathBuf,
    pub budget: u64,
    pub stop: Arc<AtomicBool>,
}

/// A process that has no probes, and when it is examined again.
struct Unprobed {
    /// What was reported of it.
    reported: Option<WaitProbeState>,
    since: Instant,
    /// `None`: not again.
    again: Option<Instant>,
}

/// What identifies a process: its pid, and its start to the clock tick.
type ProcessId = (u32, u64);

struct Worker {
    context: WaitWorkerContext,
    probes: Option<Probes>,
    libraries: Libraries,
    probed: HashMap<ProcessId, ProbedProcess>,
    unprobed: HashMap<ProcessId, Unprobed>,
    load_again: Option<Instant>,
    observations: Vec<Observation>,
}

/// Starts the thread. It ends with the agent, which does not wait for it.
pub fn start(context: WaitWorkerContext) -> std::io::Result<()> {
    std::thread::Builder::new().name("waits".into()).spawn(move || {
        let stop = Arc::clone(&context.stop);
        let mut worker = Worker {
            context,
            probes: None,
            libraries: Libraries::default(),
            probed: HashMap::new(),
            unprobed: HashMap::new(),
            load_again: None,
            observations: Vec::new(),
        };
        while !stop.load(Ordering::Relaxed) {
            let begun = Instant::now();
            // The core has ended, and with it the agent.
            let Some(()) = worker.turn() else { return };
            worker.context.requests.wait(EVERY.saturating_sub(begun.elapsed()));
        }
    })?;
    Ok(())
}

fn id_of(process: &GpuProcess) -> ProcessId {
    (process.tgid.0, process.start.proc_tick())
}

/// Whether the process has a seccomp filter.
fn has_seccomp(procfs: &Path, pid: u32) -> bool {
    let status = std::fs::read_to_string(procfs.join(pid.to_string()).join("status")).unwrap_or_default();
    status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2"))
}

impl Worker {
    /// `None` if the core has ended.
    fn turn(&mut self) -> Option<()> {
        let selectors = self.context.requests.selectors();
        if selectors.is_empty() {
            self.end_all();
            return self.send();
        }
        if !self.is_loaded() {
            return Some(());
        }
        self.send_clients()?;
        let wanted = self.wanted(&selectors)?;
        self.read();
        self.end_except(&wanted);
        for process in wanted {
            self.examine(&process);
        }
        self.report_problems();
        self.send()
    }

    /// Before the core is asked for the processes of users of GPUs.
    fn send_clients(&mut self) -> Option<()> {
        let pids = self.probes.as_mut().map(Probes::take_clients).unwrap_or_default();
        let client = |(pid, at)| Observation::GpuClient { tgid: Tgid(pid), at: BootNs(at) };
        self.context.to.observe_all(pids.into_iter().map(client)).ok()
    }

    fn send(&mut self) -> Option<()> {
        self.context.to.observe_all(std::mem::take(&mut self.observations).into_iter()).ok()
    }

    fn is_loaded(&mut self) -> bool {
        if self.probes.is_some() {
            return true;
        }
        if self.load_again.is_some_and(|again| Instant::now() < again) {
            return false;
        }
        match Probes::load(self.context.budget, &self.context.procfs) {
            Ok(probes) => {
                self.probes = Some(probes);
                self.load_again = None;
                true
            }
            Err(error) => {
                self.load_again = Some(Instant::now() + LOAD_AGAIN);
                self.context.health.report(Condition::WaitProbes, &[display_chain(&error)], |_, first| first.to_owned());
                false
            }
        }
    }

    fn wanted(&self, selectors: &[WaitSelector]) -> Option<Vec<GpuProcess>> {
        let labels = self.context.labels.view();
        let selected = |process: &GpuProcess| {
            let labels = process.user.container().and_then(|key| labels.get(&key));
            selectors.iter().any(|selector| selector.selects(process, labels.map(|labels| &**labels)))
        };
        Some(self.context.to.gpu_processes()?.into_iter().filter(selected).collect())
    }

    fn probe_change(&mut self, process: (Tgid, BootNs), state: WaitProbeState, detail: String) {
        let (tgid, start) = process;
        self.observations.push(Observation::WaitProbe(Box::new(WaitProbeChange { tgid, start, at: boot_now(), state, detail })));
    }

    /// Reads all processes; those over the budget lose their probes.
    fn read(&mut self) {
        let Some(probes) = &mut self.probes else { return };
        let mut over = Vec::new();
        for (id, process) in &mut self.probed {
            // Without an entry, and if it cannot be read, there is nothing to add.
            let Ok(Some(sums)) = probes.sums(id.0) else { continue };
            if sums.over_budget > 0 {
                over.push(*id);
                continue;
            }
            self.observations.push(Observation::Waited(Box::new(process.take(&sums, boot_now()))));
        }
        for id in over {
            let Some(process) = self.probed.remove(&id) else { continue };
            probes.forget(id.0);
            let budget = self.context.budget;
            let detail = format!("more than {budget} blocking calls a second; wait_probe_budget permits more");
            let (reported, since) = (Some(WaitProbeState::OverBudget), Instant::now());
            self.unprobed.insert(id, Unprobed { reported, since, again: None });
            let change = WaitProbeChange {
                tgid: process.tgid,
                start: process.start,
                at: boot_now(),
                state: WaitProbeState::OverBudget,
                detail,
            };
            self.observations.push(Observation::WaitProbe(Box::new(change)));
        }
    }

    fn end_except(&mut self, wanted: &[GpuProcess]) {
        let wanted: HashSet<ProcessId> = wanted.iter().map(id_of).collect();
        self.unprobed.retain(|id, _| wanted.contains(id));
        let ended: Vec<ProcessId> = self.probed.keys().filter(|id| !wanted.contains(*id)).copied().collect();
        for id in ended {
            let Some(process) = self.probed.remove(&id) else { continue };
            if let Some(probes) = &mut self.probes {
                probes.forget(id.0);
            }
            self.probe_change((process.tgid, process.start), WaitProbeState::Ended, String::new());
        }
    }

    fn end_all(&mut self) {
        if self.probes.is_none() && self.load_again.is_none() {
            return;
        }
        self.read();
        self.end_except(&[]);
        (self.probes, self.load_again) = (None, None);
        self.libraries = Libraries::default();
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
                known.again = Some(now + if is_young { EXAMINE_SOON } else { EXAMINE_LATER });
                // A process that is starting has no library yet.
                let is_starting = refusal.0 == WaitProbeState::NoLibrary && known.since == now;
                if is_starting || known.reported == Some(refusal.0) {
                    return;
                }
                known.reported = Some(refusal.0);
                refusal
            }
        };
        self.probe_change((process.tgid, process.start), state, detail);
    }

    fn attach(&mut self, process: &GpuProcess) -> Result<String, (WaitProbeState, String)> {
        let refused = |error: &dyn std::error::Error| (WaitProbeState::Refused, display_chain(error));
        let Some(probes) = &mut self.probes else { return Err((WaitProbeState::Refused, String::new())) };
        if self.probed.len() >= MAX_PROCESSES as usize {
            return Err((WaitProbeState::Refused, format!("{MAX_PROCESSES} processes are probed; select fewer")));
        }
        let pid = process.tgid.0;
        let library = self.libraries.of_process(&self.context.procfs, pid).map_err(|error| match &error {
            LibraryError::Absent | LibraryError::Maps { .. } => (WaitProbeState::NoLibrary, display_chain(&error)),
            LibraryError::NoSymbols { .. } => (WaitProbeState::NoSymbols, display_chain(&error)),
            _ => refused(&error),
        })?;
        let attached = probes.attach(pid, &library, has_seccomp(&self.context.procfs, pid));
        let attached = attached.map_err(|error: ProbeError| refused(&error))?;
        let probed = ProbedProcess::new(process.tgid, process.start, boot_now(), Some(attached));
        self.probed.insert(id_of(process), probed);
        Ok(library.path.display().to_string())
    }

    fn report_problems(&self) {
        let is_problem = |known: &&Unprobed| {
            matches!(known.reported, Some(WaitProbeState::NoSymbols | WaitProbeState::Refused | WaitProbeState::OverBudget))
        };
        let problems: Vec<String> =
            self.unprobed.iter().filter(|(_, known)| is_problem(known)).map(|((pid, _), _)| format!("process {pid}")).collect();
        let message = |n, first: &str| format!("{n} processes have no wait probes, such as {first}; a session states the reason");
        self.context.health.report(Condition::WaitProbes, &problems, message);
    }
}
