//! Facts: the output stream of attribution. The same stream is aggregated live, recorded in sessions and replayed from them.
//!
//! ```text
//!  Observation -> identity, attribute -> Fact -> aggregate -> Snapshot
//!                                         |
//!                                         +---> session file -> Fact -> aggregate -> Report
//! ```
//! Aggregation has no other input, so a replay gives the same result as live use. The order of variants and fields is part of the session
//! format (see docs/session-format.md): append, do not reorder. Times are boot times unless their type is another; `at` of a fact about
//! GPU time is the end of the span that it covers.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::device::{DeviceReadings, Engine, GpuInfo, Reason, ThrottleTimes};
use crate::experiment::ExperimentFact;
use crate::observation::{EngineFact, PressureFact, ProcessKind, WaitProbeState};
use crate::units::{BootNs, ContainerKey, GpuNs, WallTime};

/// A process outside any container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HostProcess {
    pub pid: u32,
    pub start: BootNs,
}

/// What busy time is credited to: a container, a host process, or a reason why there is neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum User {
    Container(ContainerKey),
    /// Counted under [`Reason::Host`] where processes are not distinguished.
    Host(HostProcess),
    Unattributed(Reason),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Fact {
    /// Both clocks at one instant, a few times a second.
    Time {
        at: BootNs,
        wall: WallTime,
    },
    /// `gpu` is the slot of the device; a slot is reused only by the same device.
    Gpu {
        gpu: u32,
        at: BootNs,
        fact: GpuFact,
    },
    Container(ContainerFact),
    ContainerGone {
        key: ContainerKey,
        at: BootNs,
    },
    /// The container was dropped from all tables.
    ContainerForgotten {
        key: ContainerKey,
    },
    /// All known labels of a container; repeated when one changes.
    Labels(LabelFact),
    Comm {
        process: HostProcess,
        comm: String,
    },
    Pressure(PressureFact),
    Waited(WaitFact),
    WaitProbe(WaitProbeFact),
    /// One reading of the metrics page of a serving engine in a container.
    Engine(EngineFact),
    /// A freezing experiment; written on request, by no part of the aggregation.
    Experiment(ExperimentFact),
}

/// What the wait probes of a process counted in the span `from..to`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitFact {
    pub process: HostProcess,
    pub user: User,
    pub from: BootNs,
    pub to: BootNs,
    /// Time in which at least one thread was inside a blocking call of the driver's library.
    pub some_ns: u64,
    /// Time of all calls that returned, each for itself.
    pub total_ns: u64,
    pub calls: u64,
    /// Bucket and calls: bucket `n` has those of 2^n ns to twice that.
    pub durations: Vec<(u8, u64)>,
}

/// How a process is probed from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitProbeFact {
    pub process: HostProcess,
    pub user: User,
    pub at: BootNs,
    pub state: WaitProbeState,
    /// The library, or the reason with its remedy.
    pub detail: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum GpuFact {
    /// Found, or found again: its sample buffer and its clock may be new.
    Opened(Arc<GpuInfo>),
    Gone,
    /// Its clock was set: waiting samples can no longer be attributed to a process.
    Restarted,
    Utilization(UtilizationSample),
    /// A sample of an engine other than compute; not a part of wall time.
    EngineSample(Engine, UtilizationSample),
    Idle {
        ns: u64,
    },
    Unobserved {
        ns: u64,
        why: UnobservedReason,
    },
    Unsupported {
        ns: u64,
    },
    /// Busy share of the span as measured by GPM, which names no process.
    Measured {
        ns: u64,
        busy_ratio: f64,
    },
    /// The holders of the device; `None` when they are no longer known.
    Held(Option<Arc<[Holder]>>),
    Readings(DeviceReadings),
    Xid {
        xid: u64,
        count: u64,
    },
    /// The process that samples named as `pid`, or that became a client, ended or moved at the fact's time. `since` is that of its
    /// [`AttributedProcess`]es.
    Left {
        pid: u32,
        since: BootNs,
    },
    Clock(ClockFact),
    /// A busy sample of an engine with an unqueried process, because driver calls are too slow to query each. Its time is attributed in
    /// the proportions of the queried samples around it. Only compute is a part of wall time.
    Unqueried(Engine, UnqueriedSample),
    ThrottleTimes(ThrottleTimes),
    /// A process that called cuInit at the fact's time, and may use the device from then on. `since` as in [`GpuFact::Left`], which
    /// follows when it ends.
    Client {
        pid: u32,
        user: User,
        since: BootNs,
    },
}

/// Utilization of an engine in a span; the process that the driver names for it is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnqueriedSample {
    /// The driver's own timestamp.
    pub stamp: GpuNs,
    pub ns: u64,
    pub busy_percent: u8,
}

/// One sample of the driver: the utilization of the engine in a span, and the processes that it names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UtilizationSample {
    /// The driver's own timestamp.
    pub stamp: GpuNs,
    pub ns: u64,
    pub busy_percent: u8,
    /// Its process samples, in the driver's order.
    pub processes: Vec<AttributedProcess>,
}

/// A process sample of the driver, and the user that its pid was resolved to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttributedProcess {
    pub pid: u32,
    /// Of the engine of the sample.
    pub percent: u8,
    pub user: User,
    /// Since when this process has belonged to this user; 0 where that is not known.
    pub since: BootNs,
}

/// Why time is unobserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum UnobservedReason {
    /// Samples are missing: the driver's sample buffer wrapped, or never contained them.
    Missing,
    /// Written by agents before session format 1.1, which did not attribute samples with an unqueried process.
    NotAsked,
    /// The driver had no samples, and did not report that the device was idle.
    NoSamples,
    /// No response for longer than the driver's sample buffer holds.
    NoAnswer,
    /// The agent had just started, or the device was opened again.
    Start,
    /// Facts about it were recorded but cannot be read any more. Only produced by readers of sessions.
    Unread,
    /// The agent had released the device on request, and did not read it.
    Released,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub pid: u32,
    pub user: User,
    pub kind: ProcessKind,
    pub memory_bytes: Option<u64>,
}

/// The device's clock as polls bound it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ClockFact {
    pub ahead_of_boot_seconds: Option<f64>,
    pub uncertainty_seconds: Option<f64>,
    pub period_ns: Option<u64>,
    pub steps: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerFact {
    pub key: ContainerKey,
    pub cgroup_path: String,
    pub container_id: Option<String>,
    pub runtime: Option<String>,
    pub pod_uid: Option<String>,
    pub created: BootNs,
    /// False where `created` is only the time of the first sighting.
    pub creation_seen: bool,
}

/// A label is empty where it is not known or does not apply.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelFact {
    pub key: ContainerKey,
    pub namespace: String,
    pub pod: String,
    pub container: String,
    pub name: String,
    pub image: String,
}

impl User {
    pub fn container(self) -> Option<ContainerKey> {
        match self {
            User::Container(key) => Some(key),
            User::Host(_) | User::Unattributed(_) => None,
        }
    }

    /// The reason under which its time is counted where it is not a container's.
    pub fn reason(self) -> Option<Reason> {
        match self {
            User::Container(_) => None,
            User::Host(_) => Some(Reason::Host),
            User::Unattributed(reason) => Some(reason),
        }
    }
}

impl GpuFact {
    /// The users that it names.
    pub fn users(&self) -> impl Iterator<Item = User> {
        let (processes, holders, client): (&[AttributedProcess], &[Holder], Option<User>) = match self {
            GpuFact::Utilization(sample) | GpuFact::EngineSample(_, sample) => (&sample.processes, &[], None),
            GpuFact::Held(Some(holders)) => (&[], holders, None),
            GpuFact::Client { user, .. } => (&[], &[], Some(*user)),
            _ => (&[], &[], None),
        };
        processes.iter().map(|process| process.user).chain(holders.iter().map(|holder| holder.user)).chain(client)
    }

    /// Length of the device time that the fact covers; `None` where it does not cover time.
    pub fn span_ns(&self) -> Option<u64> {
        match self {
            GpuFact::Utilization(UtilizationSample { ns, .. })
            | GpuFact::Idle { ns }
            | GpuFact::Unqueried(Engine::Compute, UnqueriedSample { ns, .. })
            | GpuFact::Unobserved { ns, .. }
            | GpuFact::Unsupported { ns }
            | GpuFact::Measured { ns, .. } => Some(*ns),
            _ => None,
        }
    }
}
