//! What is known once samples are attributed: the one stream that is aggregated live, recorded in sessions and replayed from them.
//!
//! ```text
//!  Observation -> identity, attribute -> Fact -> aggregate -> Snapshot
//!                                         |
//!                                         +---> session file -> Fact -> aggregate -> Report
//! ```
//! Aggregation sees nothing else, so a replay gives what live gave. The order of variants and fields is the session format's (see
//! docs/session-format.md): append, do not change. Times are of boot unless their type says otherwise; `at` of a fact about GPU time
//! is the end of the span that it covers.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::device::{DeviceReadings, Engine, GpuInfo, Reason};
use crate::observation::{PressureFact, ProcessKind};
use crate::units::{BootNs, ContainerKey, GpuNs, WallTime};

/// A process outside any container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HostProcess {
    pub pid: u32,
    pub start: BootNs,
}

/// Whose busy time is: somebody's, or nobody's for a named reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum User {
    Container(ContainerKey),
    /// Counted under [`Reason::Host`] where processes are not told apart.
    Host(HostProcess),
    Nobody(Reason),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Fact {
    /// The two clocks at one moment, a few times a second.
    Time {
        at: BootNs,
        wall: WallTime,
    },
    /// `gpu` is the slot of the device; slots are used again only by the same device.
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
    /// Nothing of it is remembered any more.
    ContainerForgotten {
        key: ContainerKey,
    },
    /// All labels that are known of it; told again when one changes.
    Labels(LabelFact),
    Comm {
        process: HostProcess,
        comm: String,
    },
    Pressure(PressureFact),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum GpuFact {
    /// Found, or found again: its ring and its clock may be others than before.
    Opened(Arc<GpuInfo>),
    Gone,
    /// Its clock was set: for samples that wait nobody can be named any more.
    Restarted,
    Utilization(UtilizationSample),
    /// Of an engine that is not compute; not a part of wall time.
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
    /// Busy for a part of the span as GPM measures it, with nobody named.
    Measured {
        ns: u64,
        busy_ratio: f64,
    },
    /// Who holds the device; `None` when that is not known any more.
    Held(Option<Arc<[Holder]>>),
    Readings(DeviceReadings),
    Xid {
        xid: u64,
        count: u64,
    },
    /// The process that rows named as `pid` has ended or moved since, at the fact's time. `since` is that of its rows.
    Left {
        pid: u32,
        since: BootNs,
    },
    Clock(ClockFact),
    /// A sample of an engine that was busy and whose process was not queried: driver calls are too slow to query each. Its time is
    /// attributed in the proportions of the queried samples around it. Only compute is a part of wall time.
    Unqueried(Engine, UnqueriedSample),
}

/// How busy an engine was in a span; which process the driver names for it is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnqueriedSample {
    /// The driver's own time stamp.
    pub stamp: GpuNs,
    pub ns: u64,
    pub busy_percent: u8,
}

/// One sample of the driver: how busy the engine was in a span, and whom it names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UtilizationSample {
    /// The driver's own time stamp.
    pub stamp: GpuNs,
    pub ns: u64,
    pub busy_percent: u8,
    /// Rows that belong to it, as the driver gave them.
    pub processes: Vec<AttributedProcess>,
}

/// A row of the driver's, and identity's answer for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttributedProcess {
    pub pid: u32,
    /// Of the engine that the tick is of.
    pub percent: u8,
    pub user: User,
    /// Since when this process was this user's; 0 where that is not known.
    pub since: BootNs,
}

/// Why time is unobserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum UnobservedReason {
    /// Samples are missing: the driver's ring went round, or never had them.
    Missing,
    /// Written by agents before session format 1.1, which did not attribute samples whose process was not queried.
    NotAsked,
    /// The driver had no samples, and did not say that the device was idle.
    NoSamples,
    /// No answer for longer than the driver's ring holds.
    NoAnswer,
    /// The agent had just started, or the device was opened again.
    Start,
    /// Facts about it were there, and cannot be read any more; only found while reading.
    Unread,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub pid: u32,
    pub user: User,
    pub kind: ProcessKind,
    pub memory_bytes: Option<u64>,
}

/// The device's clock as polls bound it, and what was rejected so far.
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
    /// False where `created` is only when it was first seen.
    pub creation_seen: bool,
}

/// Blank where a label is not known or does not apply.
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
            User::Host(_) | User::Nobody(_) => None,
        }
    }
}

impl GpuFact {
    /// How much of the device's time it tells of; `None` where it is about something else.
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
