//! Observations: all inputs of the core, as one closed enum. They are also its only source of time.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use strum::EnumCount as _;

use crate::device::{DeviceReadings, Engine, GpuInfo, HardwareReadings, ThrottleTimes};
use crate::pid_space::PidSpace;
use crate::units::{BootNs, CgroupKey, ContainerKey, GpuNs, Tgid, WallTime};

/// The cgroups of a process: in v2, and in the one v1 hierarchy that is followed. Ids are inode numbers; 0 means none.
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

/// One kernel event about a process. Events are in the kernel's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessFact {
    pub change: ProcessChange,
    pub tgid: Tgid,
    /// Start of the thread group, ns.
    pub start: BootNs,
    pub at: BootNs,
    pub membership: CgroupMembership,
}

/// A sighting: a living process as it was read at some instant after `began`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessSeen {
    pub tgid: Tgid,
    pub start: BootNs,
    /// `start` is rounded down to 10 ms, as in /proc.
    pub coarse_start: bool,
    pub began: BootNs,
    /// `None` when the process lives but its cgroups could not be read.
    pub membership: Option<CgroupMembership>,
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

/// One entry of the device's utilization buffer: busy share of the period that ends at `at`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceSample {
    pub at: GpuNs,
    pub busy_percent: u32,
    /// The process that it names was queried, and the result is exact. False where the driver had averaged several samples, or where the
    /// call budget did not allow a query: its time is observed, and attributed by the queried samples around it.
    pub queried: bool,
}

/// As [`DeviceSample`], of another engine. Read less often than compute, because the driver keeps some seconds of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EngineSample {
    pub engine: Engine,
    pub at: GpuNs,
    pub busy_percent: u32,
}

/// One entry of the per-process utilization buffer: the process that was on an engine when the sample at `at` was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessSample {
    pub at: GpuNs,
    pub pid: u32,
    /// Indexed as [`Engine`]; above 0 where the driver names the pid for that engine.
    pub percent: [u8; Engine::COUNT],
}

/// The driver's process list that contains the process.
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

/// Result of reading a device's samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PollStatus {
    /// The call succeeded, with or without samples.
    Samples,
    /// The call succeeded, and there has been no sample for a while: the buffer of an idle device becomes empty. `idle`: another reading
    /// also shows that the device is idle.
    Dry { idle: bool },
    /// This device has no utilization buffer.
    Unsupported,
    /// The call failed or was not made: nothing is known.
    #[default]
    Failed,
}

/// Whether the busy counter of a device stays at 100 % while nothing runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BusyLatch {
    #[default]
    Clear,
    /// Its newest samples are full, name no process, and show no memory activity; it is not settled yet.
    Suspected,
    Latched,
}

/// Busy share of a MIG device between two readings, as measured by GPM.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GpmInterval {
    pub from: BootNs,
    pub to: BootNs,
    pub busy_ratio: f64,
}

/// One poll of one GPU. `began`/`ended` bracket the driver calls.
#[derive(Clone, Debug, Default)]
pub struct GpuBatch {
    /// The slot that [`Observation::GpuFound`] assigned.
    pub gpu: usize,
    pub began: BootNs,
    /// Start of the reading of samples, which is the last part of a poll.
    pub ring_began: BootNs,
    pub ended: BootNs,
    pub wall: WallTime,
    pub status: PollStatus,
    pub samples: Vec<DeviceSample>,
    pub engine_samples: Vec<EngineSample>,
    pub process_samples: Vec<ProcessSample>,
    /// Number of rejected samples, indexed as [`Rejected`].
    pub rejected: [u32; Rejected::COUNT],
    pub latch: BusyLatch,
    /// The device's clock was set: the samples of this batch are on the new clock.
    pub stepped: bool,
    pub gpm: Option<GpmInterval>,
    /// `None` when this poll did not read the list (the call is slow) or the call failed.
    pub processes: Option<Vec<RunningProcess>>,
    pub readings: Option<DeviceReadings>,
    /// `None` when this poll did not read them.
    pub hardware: Option<HardwareReadings>,
    /// Read together with `hardware`.
    pub throttle_times: Option<ThrottleTimes>,
}

impl GpuBatch {
    /// An empty batch; `ended` is `began` until it is set.
    pub fn new(gpu: usize, began: BootNs, status: PollStatus) -> Self {
        Self { gpu, began, ring_began: began, ended: began, status, ..Self::default() }
    }
}

/// The end of a scan of cgroupfs and /proc. What it could not have missed and did not find is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanEnd {
    pub began: BootNs,
    pub ended: BootNs,
    /// Every cgroup was read.
    pub all_cgroups: bool,
    /// Every process was read.
    pub all_processes: bool,
    /// Set when the scan followed a loss of kernel events: its changes count as repairs.
    pub repairs_since: Option<BootNs>,
}

/// What the wait probes of one process counted between two readings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WaitReading {
    pub tgid: Tgid,
    /// Start of the process; to the clock tick of /proc.
    pub start: BootNs,
    pub from: BootNs,
    pub to: BootNs,
    /// Time in which at least one thread was inside a blocking call.
    pub some_ns: u64,
    /// Time of all calls that returned, each for itself.
    pub total_ns: u64,
    /// Calls that returned.
    pub calls: u64,
    /// Bucket and calls: bucket `n` has those of 2^n ns to twice that. Without empty buckets.
    pub durations: Vec<(u8, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, strum::IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum WaitProbeState {
    Attached,
    /// The process maps no driver library.
    NoLibrary,
    /// The library has none of the blocking calls.
    NoSymbols,
    /// The kernel or the library file does not permit probes.
    Refused,
    /// More calls a second than the budget: the probes of the process were detached.
    OverBudget,
    /// The process ended, or the selection does not include it any more.
    Ended,
    /// It is probed, but not all of its calls could be counted.
    UncountedCalls,
}

impl WaitProbeState {
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// A change in how a process is probed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitProbeChange {
    pub tgid: Tgid,
    pub start: BootNs,
    pub at: BootNs,
    pub state: WaitProbeState,
    /// The library, or the reason with its remedy.
    pub detail: String,
}

#[derive(Clone, Debug)]
pub enum Observation {
    Process(ProcessFact),
    ProcessSeen(ProcessSeen),
    /// A check of this pid that began at `began` found no living process.
    ProcessGone {
        tgid: Tgid,
        began: BootNs,
    },
    Cgroup(CgroupFact),
    ScanBegan,
    ScanEnded(ScanEnd),
    /// A device was opened, for the first time or again: its sample buffer and its clock may be new.
    GpuFound {
        gpu: usize,
        info: Arc<GpuInfo>,
        at: BootNs,
    },
    /// A device disappeared: it was removed, or it is a MIG device that was destroyed.
    GpuGone {
        gpu: usize,
        at: BootNs,
    },
    /// The agent does not read the device, on request, until it is found again.
    GpuReleased {
        gpu: usize,
        at: BootNs,
    },
    Gpu(Box<GpuBatch>),
    /// XID errors; several of one kind may be combined.
    Xid {
        gpu: usize,
        xid: u64,
        count: u64,
    },
    Pressure(PressureFact),
    /// A process called cuInit: it uses GPUs from now on, before a driver lists it.
    GpuClient {
        tgid: Tgid,
        at: BootNs,
    },
    Waited(Box<WaitReading>),
    WaitProbe(Box<WaitProbeChange>),
    /// A serving engine, of a session that records them.
    Engine(EngineFact),
    /// From now on: whether the driver's pids are pids of this kernel.
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

/// Why a sample was rejected, or counted as implausible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::EnumCount, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Rejected {
    /// Above 100 %.
    Utilization,
    /// Pid 0 or all ones. Such a sample is kept, as `invalid_pid`.
    Pid,
    /// Not newer than the requested time.
    Stale,
    /// Newer than every sample of the device.
    Future,
    /// The same pid twice in one response.
    Duplicate,
}

impl Rejected {
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// Stall times and CPU quota of a container's cgroups, cumulative since their creation. `None`: the file or field does not exist.
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
    /// Quota and period; `None` without a limit.
    pub limit_ns: Option<(u64, u64)>,
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled_ns: u64,
}

/// A latency that a serving engine sums over requests or tokens, since the engine started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LatencySum {
    pub sum_seconds: f64,
    pub count: f64,
}

/// One reading of the metrics page of a serving engine (vLLM, SGLang, Triton, ..) in a container. Values are the engine's own claims, summed
/// over its models. `None`: the page does not have the metric.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EngineFact {
    pub key: ContainerKey,
    pub at: BootNs,
    /// Name of the rules by which the engine was found and its page read, such as `vllm`.
    pub engine: String,
    pub pid: u32,
    /// TCP port of the page; 0 if the engine does not listen.
    pub port: u16,
    /// Requests that wait, and that are processed, at this time.
    pub waiting: Option<f64>,
    pub running: Option<f64>,
    pub time_to_first_token: Option<LatencySum>,
    pub time_per_output_token: Option<LatencySum>,
    pub queue_time: Option<LatencySum>,
    /// Why the page was not read; the values are `None` then.
    pub problem: Option<String>,
}
