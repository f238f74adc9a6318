//! Determines whether the driver's PIDs are this machine's, from the processes that it reports. The rules are in
//! [`sampler_core::pid_space`].
//!
//! ```text
//!  gpu-N --PIDs of a reply, unless settled as local--> gpu-pids: /proc --> verdict --> core, health, gpu-N (reads its lists again)
//! ```
//! A separate thread reads /proc, so that a poller never waits for another process. Once settled, the check costs a poller one atomic
//! load; it is repeated once a minute.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sampler_core::observation::{GpuBatch, Observation};
use sampler_core::pid_space::{CONTRADICTIONS, Evidence, NamedPid, PidSighting, PidSpace};
use sampler_core::units::BootNs;

use super::device_nodes::{DevicePaths, Nodes};
use super::error::{GpuError, spawn};
use crate::config::Config;
use crate::health::Health;
use crate::health::condition::Condition;
use crate::inbox::CoreSender;
use crate::observe::clock::boot_now;

/// The remedy for a verdict against local PIDs.
pub const REMEDY: &str = "run the agent on the machine of which the kernel has the NVIDIA module, in its PID namespace";
/// How often the verdict `local` is checked again.
const CHECK_EVERY_NS: u64 = 60_000_000_000;
/// How often one process is checked, separately for lists and for samples.
const PROCESS_CHECK_EVERY_NS: u64 = 1_000_000_000;
/// Maximum number of replies that wait for the check; more are dropped, and later replies repeat their PIDs.
const WAITING: usize = 64;
/// Maximum number of checked PIDs per reply.
const PIDS: usize = 256;
/// How often the thread checks whether it should end.
const NAP: Duration = Duration::from_millis(500);

#[derive(Default)]
struct State {
    /// Incremented when a driver is opened.
    opened: u64,
    evidence: Evidence,
    nodes: Nodes,
    announced: PidSpace,
}

/// Shared by all threads that read GPUs.
pub struct PidCheck {
    places: DevicePaths,
    core: CoreSender,
    health: Arc<Health>,
    state: Mutex<State>,
    to: SyncSender<Vec<NamedPid>>,
    /// No process is checked before this time.
    quiet_until: AtomicU64,
    /// Incremented with each change of the verdict.
    changes: AtomicU64,
}

/// The reason for the verdict, as text.
fn reason(evidence: &Evidence, now: BootNs) -> String {
    let example = |pid: u32| format!("such as {pid}, which has no NVIDIA device node open here or does not exist");
    match (evidence.verdict(), evidence.holder(), evidence.contradictions(), evidence.unreadable()) {
        (PidSpace::Local, Some(pid), ..) => {
            format!("process {pid}, which the driver reports, has an NVIDIA device node open here")
        }
        (PidSpace::Local, None, ..) => "the NVIDIA module is loaded in this kernel".into(),
        (PidSpace::Foreign, _, Some((_, pid)), _) => {
            format!("the driver reports processes that are not this machine's, {}", example(pid))
        }
        (PidSpace::Unsettled, _, Some((n, pid)), _) => {
            format!(
                "not settled whether the driver's PIDs are this machine's: {n} of the {CONTRADICTIONS} contradictions needed, {}",
                example(pid)
            )
        }
        (PidSpace::Unsettled, .., Some(pid)) => {
            format!("cannot check whether the driver's PIDs are this machine's: cannot read the descriptors of process {pid}")
        }
        (PidSpace::Unsettled, ..) if evidence.is_unchecked(now) => {
            "not settled whether the driver's PIDs are this machine's: all reported processes end too soon or do not exist here"
                .into()
        }
        (PidSpace::Unverifiable, ..) => "cannot be checked: there is no NVIDIA device node here".into(),
        _ => "not settled until the driver reports a living process: none uses a GPU now".into(),
    }
}

/// The reason for the verdict, and a remedy if attribution is impaired.
pub fn verdict_text(evidence: &Evidence, now: BootNs) -> (String, Option<&'static str>) {
    const MAY_NOT_READ: &str = "run as root, or with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH";
    let remedy = match evidence.verdict() {
        PidSpace::Foreign => Some(REMEDY),
        PidSpace::Unsettled if evidence.contradictions().is_some() => Some(REMEDY),
        PidSpace::Unsettled if evidence.unreadable().is_some() => Some(MAY_NOT_READ),
        PidSpace::Unsettled => evidence.is_unchecked(now).then_some(REMEDY),
        PidSpace::Local | PidSpace::Unverifiable => None,
    };
    (reason(evidence, now), remedy)
}

impl PidCheck {
    pub fn start(config: &Config, core: &CoreSender, health: &Arc<Health>, stop: Arc<AtomicBool>) -> Result<Arc<Self>, GpuError> {
        let (to, named) = sync_channel(WAITING);
        let check = Arc::new(Self {
            places: DevicePaths::new(config),
            core: core.clone(),
            health: Arc::clone(health),
            state: Mutex::default(),
            to,
            quiet_until: AtomicU64::new(0),
            changes: AtomicU64::new(0),
        });
        let checking = Arc::clone(&check);
        spawn("gpu-pids", move || checking.run(&named, &stop))?;
        Ok(check)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A driver was opened: discards the evidence about the previous one. Must be called before its GPUs are read.
    pub fn opened(&self) {
        let nodes = self.places.nodes();
        let mut state = self.state();
        state.opened += 1;
        state.evidence = Evidence::new(nodes.is_some(), nodes.as_ref().is_some_and(|nodes| nodes.module));
        state.nodes = nodes.unwrap_or_default();
        self.quiet_until.store(if state.evidence.has_nodes() { 0 } else { u64::MAX }, Ordering::Relaxed);
        self.announce(&mut state);
    }

    /// Number of changes of the verdict so far: lists that were read before the last change are read again.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// Checks the PIDs of a batch. Must be called before the batch is sent to the core.
    pub fn check(&self, batch: &GpuBatch) {
        if batch.ended.0 < self.quiet_until.load(Ordering::Relaxed) {
            return;
        }
        let listed = batch.processes.iter().flatten().map(|process| (process.pid, true));
        let sampled = batch.process_samples.iter().map(|sample| (sample.pid, false));
        let mut pids: Vec<NamedPid> = Vec::new();
        for (pid, listed) in listed.chain(sampled).filter(|(pid, _)| !matches!(*pid, 0 | u32::MAX)) {
            if pids.len() < PIDS && pids.iter().all(|named| named.pid != pid) {
                pids.push(NamedPid { pid, listed, at: batch.began });
            }
        }
        if !pids.is_empty() {
            // Full: the thread is behind, and later replies repeat the PIDs.
            let _dropped = self.to.try_send(pids);
        }
    }

    fn run(&self, named: &Receiver<Vec<NamedPid>>, stop: &AtomicBool) {
        let mut checked = HashMap::new();
        while !stop.load(Ordering::Relaxed) {
            match named.recv_timeout(NAP) {
                Ok(pids) => self.check_processes(&pids, &mut checked),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// `checked`: when each process was checked, separately for PIDs from lists and from samples, which have different meanings.
    fn check_processes(&self, pids: &[NamedPid], checked: &mut HashMap<(u32, bool), BootNs>) {
        let now = boot_now();
        checked.retain(|_, at| now.saturating_since(*at) < PROCESS_CHECK_EVERY_NS);
        let (opened, nodes) = {
            let state = self.state();
            (state.opened, state.nodes.clone())
        };
        for named in pids {
            if now.0 < self.quiet_until.load(Ordering::Relaxed) || checked.contains_key(&(named.pid, named.listed)) {
                continue;
            }
            checked.insert((named.pid, named.listed), now);
            let Some(sighting) = self.places.sighting(&nodes, named.pid) else { continue };
            let mut state = self.state();
            // Another driver was opened in the meantime: its nodes and PIDs may differ.
            if state.opened != opened {
                return;
            }
            state.evidence.record(*named, boot_now(), sighting);
            if sighting == PidSighting::Holder {
                self.quiet_until.store(now.plus(CHECK_EVERY_NS).0, Ordering::Relaxed);
            }
            self.announce(&mut state);
        }
    }

    /// Called with the lock held, so that verdicts reach the core in order.
    fn announce(&self, state: &mut State) {
        let (verdict, (reason, remedy)) = (state.evidence.verdict(), verdict_text(&state.evidence, boot_now()));
        self.health.update(|view| view.pid_space = verdict);
        match remedy {
            Some(remedy) => {
                let message = format!("{reason}; until it is settled as local, GPU time is pid_unknown; {remedy}");
                self.health.degraded(Condition::PidSpace, &message);
            }
            None => self.health.recovered_with(Condition::PidSpace, &reason),
        }
        if std::mem::replace(&mut state.announced, verdict) != verdict {
            tracing::info!(state = verdict.name(), reason, "PID space of the driver");
            // Closed: the core has ended, and with it the agent.
            let _sent = self.core.observe(Observation::PidSpace(verdict));
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
    }
}
