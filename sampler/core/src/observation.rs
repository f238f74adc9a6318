//! Everything that reaches the core, as one closed enum. Time passes only through these.

use std::sync::Arc;

use crate::snapshot::{DeviceReadings, GpuInfo};
use crate::units::{BootNs, CgroupKey, GpuNs, Tgid, WallTime};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessChange {
    Fork {
        parent: Tgid,
    },
    Exec,
    Exit,
    Attach,
    /// Found by a scan of /proc: true at `at`, whatever was before.
    Seen,
}

/// The kernel's word about one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessFact {
    pub change: ProcessChange,
    pub tgid: Tgid,
    /// Start of the thread group, ns. From /proc it is a multiple of 10 ms; see [`ProcessFact::coarse_start`].
    pub start: BootNs,
    /// `start` came from /proc and is floored to 10 ms.
    pub coarse_start: bool,
    pub at: BootNs,
    pub v2: CgroupKey,
    pub v1: Option<CgroupKey>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CgroupChange {
    Created,
    Removed,
    Renamed,
    /// Found by a scan of cgroupfs.
    Seen,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupFact {
    pub change: CgroupChange,
    pub key: CgroupKey,
    /// `None` for a hierarchy's root.
    pub parent: Option<CgroupKey>,
    pub name: String,
    pub at: BootNs,
}

/// One entry of the device's own utilization ring: busy share of the period that ends at `at`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceTick {
    pub at: GpuNs,
    pub busy_percent: u32,
}

/// One row of the per-process ring: who was on the engine when the sample at `at` was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessRow {
    pub at: GpuNs,
    pub pid: u32,
    pub sm_percent: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunningProcess {
    pub pid: u32,
    pub memory_bytes: Option<u64>,
}

/// One poll of one GPU. `began`/`ended` bracket the driver calls.
#[derive(Clone, Debug)]
pub struct GpuBatch {
    pub gpu: usize,
    pub began: BootNs,
    pub ended: BootNs,
    pub wall: WallTime,
    pub ticks: Vec<DeviceTick>,
    pub rows: Vec<ProcessRow>,
    /// `None` when this poll did not ask (the call is slow) or the driver did not answer.
    pub processes: Option<Vec<RunningProcess>>,
    pub readings: Option<DeviceReadings>,
    /// False when this GPU has no utilization ring at all: its time is `unsupported`.
    pub supported: bool,
    /// False when the driver did not answer this poll.
    pub answered: bool,
}

#[derive(Clone, Debug)]
pub enum Observation {
    Process(ProcessFact),
    Cgroup(CgroupFact),
    GpuFound { gpu: usize, info: Arc<GpuInfo>, at: BootNs },
    Gpu(GpuBatch),
    Tick { at: BootNs, wall: WallTime },
}
