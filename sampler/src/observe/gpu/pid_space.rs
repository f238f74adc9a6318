//! Settles whether the driver's pids are this machine's, from the processes that its answers name; the rules are
//! [`sampler_core::pid_space`]'s.
//!
//! ```text
//!  gpu-N --pids of an answer, unless local is settled--> gpu-pids: /proc --> verdict --> core, health, gpu-N (reads its lists again)
//! ```
//! A thread of its own reads /proc: a poller never waits for another process. Settled pids cost a poller one atomic load; they are
//! checked again once a minute.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
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
use crate::inbox::CoreSender;
use crate::observe::clock::boot_now;

/// What a verdict against local pids comes with.
pub const REMEDY: &str = "run the agent on the machine whose kernel has the NVIDIA module, in its pid namespace";
/// `local` is checked again so often.
const CHECK_EVERY_NS: u64 = 60_000_000_000;
/// One process is looked at so often, named by lists, and by samples.
const LOOK_EVERY_NS: u64 = 1_000_000_000;
/// Answers that wait to be looked at; beyond it they are left out, and the next ones say the same.
const WAITING: usize = 64;
/// Pids of one answer that are looked at.
const PIDS: usize = 256;
/// Whether it shall end is looked at this often.
const NAP: Duration = Duration::from_millis(500);
const KEY: &str = "pid-space";

struct State {
    /// Grows when a driver is opened.
    opened: u64,
    evidence: Evidence,
    nodes: Nodes,
    announced: PidSpace,
}

/// Shared by all that read GPUs.
pub struct PidCheck {
    places: DevicePaths,
    core: CoreSender,
    health: Arc<Health>,
    state: Mutex<State>,
    to: SyncSender<Vec<NamedPid>>,
    /// Nothing is looked at before.
    quiet_until: AtomicU64,
    /// Grows with each change of the verdict.
    changes: AtomicU64,
}

/// In words: what the verdict rests on.
fn reason(evidence: &Evidence, now: BootNs) -> String {
    let holds_none = |pid: u32| format!("such as {pid}, which has no NVIDIA device node open here or does not exist");
    match (evidence.verdict(), evidence.holder(), evidence.against(), evidence.unreadable()) {
        (PidSpace::Local, Some(pid), ..) => format!("process {pid}, which the driver names, has an NVIDIA device node open here"),
        (PidSpace::Local, None, ..) => "the NVIDIA module is loaded in this kernel".into(),
        (PidSpace::Foreign, _, Some((_, pid)), _) => {
            format!("the driver names processes that are not this machine's, {}", holds_none(pid))
        }
        (PidSpace::Unsettled, _, Some((n, pid)), _) => {
            format!(
                "not settled whether the driver's pids are this machine's: {n} of {CONTRADICTIONS} say no, {}",
                holds_none(pid)
            )
        }
        (PidSpace::Unsettled, .., Some(pid)) => {
            format!("cannot check whether the driver's pids are this machine's: descriptors of process {pid} cannot be read")
        }
        (PidSpace::Unsettled, ..) if evidence.is_unchecked(now) => {
            "not settled whether the driver's pids are this machine's: all that it names end too soon or do not exist here".into()
        }
        (PidSpace::Unverifiable, ..) => "cannot be checked: there is no NVIDIA device node here".into(),
        _ => "not settled before the driver names a living process: none uses a GPU now".into(),
    }
}

/// A verdict with its reason, and what to do where attribution suffers.
pub fn words(evidence: &Evidence, now: BootNs) -> (String, Option<&'static str>) {
    const MAY_NOT_READ: &str = "run as root, or with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH";
    let remedy = match evidence.verdict() {
        PidSpace::Foreign => Some(REMEDY),
        PidSpace::Unsettled if evidence.against().is_some() => Some(REMEDY),
        PidSpace::Unsettled if evidence.unreadable().is_some() => Some(MAY_NOT_READ),
        PidSpace::Unsettled => evidence.is_unchecked(now).then_some(REMEDY),
        PidSpace::Local | PidSpace::Unverifiable => None,
    };
    (reason(evidence, now), remedy)
}

impl PidCheck {
    pub fn start(
        config: &Config,
        core: &CoreSender,
        health: &Arc<Health>,
        stopping: impl Fn() -> bool + Send + 'static,
    ) -> Result<Arc<Self>, GpuError> {
        let (to, named) = sync_channel(WAITING);
        let check = Arc::new(Self {
            places: DevicePaths::new(config),
            core: core.clone(),
            health: Arc::clone(health),
            state: Mutex::new(State {
                opened: 0,
                evidence: Evidence::default(),
                nodes: Nodes::default(),
                announced: PidSpace::default(),
            }),
            to,
            quiet_until: AtomicU64::new(0),
            changes: AtomicU64::new(0),
        });
        let checking = Arc::clone(&check);
        spawn("gpu-pids", move || checking.run(&named, stopping))?;
        Ok(check)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A driver was opened: what was known of the one before holds no longer. Comes before its GPUs are read.
    pub fn opened(&self) {
        let nodes = self.places.nodes();
        let mut state = self.state();
        state.opened += 1;
        state.evidence = Evidence::new(nodes.is_some(), nodes.as_ref().is_some_and(|nodes| nodes.module));
        state.nodes = nodes.unwrap_or_default();
        self.quiet_until.store(if state.evidence.has_nodes() { 0 } else { u64::MAX }, Ordering::Relaxed);
        self.announce(&mut state);
    }

    /// Verdicts so far: lists that were read before the last one are read again.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// Before a batch goes to the core.
    pub fn names(&self, batch: &GpuBatch) {
        if batch.ended.0 < self.quiet_until.load(Ordering::Relaxed) {
            return;
        }
        let listed = batch.processes.iter().flatten().map(|process| (process.pid, true));
        let sampled = batch.process_samples.iter().map(|row| (row.pid, false));
        let mut pids: Vec<NamedPid> = Vec::new();
        for (pid, listed) in listed.chain(sampled).filter(|(pid, _)| !matches!(*pid, 0 | u32::MAX)) {
            if pids.len() < PIDS && pids.iter().all(|named| named.pid != pid) {
                pids.push(NamedPid { pid, listed, at: batch.began });
            }
        }
        if !pids.is_empty() {
            // Full: the thread is behind, and later answers name them again.
            let _left_out = self.to.try_send(pids);
        }
    }

    fn run(&self, named: &Receiver<Vec<NamedPid>>, stopping: impl Fn() -> bool) {
        let mut looked = HashMap::new();
        while !stopping() {
            match named.recv_timeout(NAP) {
                Ok(pids) => self.look(&pids, &mut looked),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// `looked`: when at each, as a list named it and as a sample did, which say different things.
    fn look(&self, pids: &[NamedPid], looked: &mut HashMap<(u32, bool), BootNs>) {
        let now = boot_now();
        looked.retain(|_, at| now.saturating_since(*at) < LOOK_EVERY_NS);
        let (opened, nodes) = {
            let state = self.state();
            (state.opened, state.nodes.clone())
        };
        for named in pids {
            if now.0 < self.quiet_until.load(Ordering::Relaxed) || looked.contains_key(&(named.pid, named.listed)) {
                continue;
            }
            looked.insert((named.pid, named.listed), now);
            let Some(sighting) = self.places.sight(&nodes, named.pid) else { continue };
            let mut state = self.state();
            // Another driver since: its nodes and its pids may be others.
            if state.opened != opened {
                return;
            }
            state.evidence.see(*named, boot_now(), sighting);
            if sighting == PidSighting::Holder {
                self.quiet_until.store(now.plus(CHECK_EVERY_NS).0, Ordering::Relaxed);
            }
            self.announce(&mut state);
        }
    }

    /// Under the lock, so that verdicts reach the core in their order.
    fn announce(&self, state: &mut State) {
        let (verdict, (reason, remedy)) = (state.evidence.verdict(), words(&state.evidence, boot_now()));
        self.health.set_pid_space(verdict);
        match remedy {
            Some(remedy) => self.health.degraded(KEY, &format!("{reason}; GPU time is pid_unknown meanwhile; {remedy}")),
            None => self.health.recovered(KEY, &reason),
        }
        if std::mem::replace(&mut state.announced, verdict) != verdict {
            tracing::info!(state = verdict.name(), reason, "pid space of the driver");
            // Closed: the core has ended, and with it the agent.
            let _sent = self.core.observe(Observation::PidSpace(verdict));
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
    }
}
