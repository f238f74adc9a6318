//! Everything that reaches the core, as one closed enum. Time passes only through these.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::device::{DeviceReadings, Engine, GpuInfo};
use crate::pid_space::PidSpace;
use crate::units::{BootNs, CgroupKey, ContainerKey, GpuNs, Tgid, WallTime};

/// The cgroups a process is in: on v2, and on the one v1 hierarchy that is followed. Ids are inode numbers; 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CgroupMembership {
    pub v2_id: u64,
    pub v1_id: u64,
    pub v1_hierarchy: u32,
}

impl CgroupMembership {
    /// v2 first.
    pub fn keys(&self) -> impl Iterator<Item = CgroupKey> {
        let v2 = CgroupKey { hierarchy: 0, id: self.v2_id };
        let v1 = CgroupKey { hierarchy: self.v1_hierarchy, id: self.v1_id };
        [v2, v1].into_iter().filter(|key| key.id != 0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessChange {
    Fork { parent: Tgid },
    Exec,
    Exit,
    Attach,
}

/// The kernel's word about one process, in the order it happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessFact {
    pub change: ProcessChange,
    pub tgid: Tgid,
    /// Start of the thread group, ns.
    pub start: BootNs,
    pub at: BootNs,
    pub place: CgroupMembership,
}

/// A living process as a look at it showed it, at some moment after `began`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessSeen {
    pub tgid: Tgid,
    pub start: BootNs,
    /// `start` is rounded down to 10 ms, as /proc gives it.
    pub coarse_start: bool,
    pub began: BootNs,
    /// `None` when it lives and where could not be read.
    pub place: Option<CgroupMembership>,
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
pub struct DeviceSample {
    pub at: GpuNs,
    pub busy_percent: u32,
    /// Which process it names was queried, and the answer is exact. False where samples came together and the driver had averaged
    /// them, or where the budgets did not allow a query: its time is observed, and attributed by the queried samples around it.
    pub queried: bool,
}

/// As [`DeviceSample`], of another engine; read once in a while, because the driver keeps seconds of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EngineSample {
    pub engine: Engine,
    pub at: GpuNs,
    pub busy_percent: u32,
}

/// One row of the per-process ring: who was on an engine when the sample at `at` was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessSample {
    pub at: GpuNs,
    pub pid: u32,
    /// Indexed as [`Engine::ALL`]; above 0 where the row names the pid for that engine.
    pub percent: [u8; Engine::ALL.len()],
}

/// The list of a device's processes that it was in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProcessKind {
    Compute,
    Graphics,
    /// A client of NVIDIA's multi-process service.
    Mps,
    /// The multi-process service itself.
    MpsServer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunningProcess {
    pub pid: u32,
    pub memory_bytes: Option<u64>,
    pub kind: ProcessKind,
}

/// What came of asking for a device's samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The driver answered, with samples or with none.
    Samples,
    /// It answered, and has had no sample for a while: the ring runs dry when a device is idle. `idle`: the device says so elsewhere too.
    Dry { idle: bool },
    /// This device has no utilization ring at all.
    Unsupported,
    /// An error, or not asked: nothing is known.
    Failed,
}

/// Busy share of a MIG device between two looks, as GPM measures it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GpmInterval {
    pub from: BootNs,
    pub to: BootNs,
    pub busy_ratio: f64,
}

/// One poll of one GPU. `began`/`ended` bracket the driver calls.
#[derive(Clone, Debug)]
pub struct GpuBatch {
    /// The slot that [`Observation::GpuFound`] gave it.
    pub gpu: usize,
    pub began: BootNs,
    /// When the read of the samples began, which is the last part of a poll.
    pub ring_began: BootNs,
    pub ended: BootNs,
    pub wall: WallTime,
    pub answer: Answer,
    pub samples: Vec<DeviceSample>,
    pub engine_samples: Vec<EngineSample>,
    pub process_samples: Vec<ProcessSample>,
    /// Rows that break the model, indexed as [`Rejected::ALL`].
    pub rejected: [u32; Rejected::ALL.len()],
    /// The device's clock was set: what this batch holds is on the new one.
    pub stepped: bool,
    pub gpm: Option<GpmInterval>,
    /// `None` when this poll did not ask (the call is slow) or the driver did not answer.
    pub processes: Option<Vec<RunningProcess>>,
    pub readings: Option<DeviceReadings>,
}

impl GpuBatch {
    /// Empty, and as yet without an end.
    pub fn new(gpu: usize, began: BootNs, answer: Answer) -> Self {
        Self {
            gpu,
            began,
            ring_began: began,
            ended: began,
            wall: WallTime::default(),
            answer,
            samples: Vec::new(),
            engine_samples: Vec::new(),
            process_samples: Vec::new(),
            rejected: [0; Rejected::ALL.len()],
            stepped: false,
            gpm: None,
            processes: None,
            readings: None,
        }
    }
}

/// A scan of cgroupfs and /proc is over. What it could not have missed and did not find is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanEnd {
    pub began: BootNs,
    pub ended: BootNs,
    /// Every cgroup was looked at.
    pub all_cgroups: bool,
    /// Every process was looked at.
    pub all_processes: bool,
    /// Set when it followed lost kernel events: what it changes is a repair.
    pub repairs_since: Option<BootNs>,
}

#[derive(Clone, Debug)]
pub enum Observation {
    Process(ProcessFact),
    ProcessSeen(ProcessSeen),
    /// A look for this pid, begun at `began`, found no living process.
    ProcessGone {
        tgid: Tgid,
        began: BootNs,
    },
    Cgroup(CgroupFact),
    ScanBegan,
    ScanEnded(ScanEnd),
    /// A device, for the first time or opened again: its ring and its clock may be others than before.
    GpuFound {
        gpu: usize,
        info: Arc<GpuInfo>,
        at: BootNs,
    },
    /// It is not there any more: removed, or a MIG device that was destroyed.
    GpuGone {
        gpu: usize,
        at: BootNs,
    },
    Gpu(Box<GpuBatch>),
    /// XID errors, in one go when there are many.
    Xid {
        gpu: usize,
        xid: u64,
        count: u64,
    },
    Pressure(PressureFact),
    /// Whether the driver's pids are this kernel's, from now on.
    PidSpace(PidSpace),
    ClockAdvanced {
        at: BootNs,
        wall: WallTime,
    },
}

impl From<GpuBatch> for Observation {
    fn from(batch: GpuBatch) -> Self {
        Self::Gpu(Box::new(batch))
    }
}

/// How an answer can break the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// Above 100 %.
    Utilization,
    /// Pid 0 or all ones. Such a row is kept, as `invalid_pid`.
    Pid,
    /// Not newer than what was asked for.
    Stale,
    /// Newer than every sample of the device.
    Future,
    /// A pid twice in one answer.
    Duplicate,
}

impl Rejected {
    pub const ALL: [Rejected; 5] = [Rejected::Utilization, Rejected::Pid, Rejected::Stale, Rejected::Future, Rejected::Duplicate];

    pub fn name(self) -> &'static str {
        match self {
            Rejected::Utilization => "utilization",
            Rejected::Pid => "pid",
            Rejected::Stale => "stale",
            Rejected::Future => "future",
            Rejected::Duplicate => "duplicate",
        }
    }
}

/// What a container's cgroups say of its waiting, cumulative since they were created. `None`: there is no such file or field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PressureFact {
    pub key: ContainerKey,
    pub at: BootNs,
    pub cpu: Option<CpuQuota>,
    /// PSI `some`, total stalled time.
    pub cpu_some_ns: Option<u64>,
    pub memory_some_ns: Option<u64>,
    pub io_some_ns: Option<u64>,
}

/// From `cpu.stat` of the hierarchy that has the cpu controller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuQuota {
    /// The quota and its period; `None` for no limit.
    pub limit_ns: Option<(u64, u64)>,
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled_ns: u64,
}
