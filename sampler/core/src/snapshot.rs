//! What aggregation publishes and export reads: an immutable picture of every GPU and container at one instant.
//! Labels are not in it; they join at the edge, so a late label never rewrites history.

use std::sync::Arc;

use crate::identity::ContainerRecord;
use crate::units::{BootNs, GpuUuid, WallTime};

/// Why busy time is on no container. Order and names are the `reason` label of `gpu_unattributed_seconds_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    NoPid,
    InvalidPid,
    PidUnknown,
    Host,
    Mps,
    Ambiguous,
    Lost,
}

impl Reason {
    pub const ALL: [Reason; 7] =
        [Reason::NoPid, Reason::InvalidPid, Reason::PidUnknown, Reason::Host, Reason::Mps, Reason::Ambiguous, Reason::Lost];

    pub fn name(self) -> &'static str {
        match self {
            Reason::NoPid => "no_pid",
            Reason::InvalidPid => "invalid_pid",
            Reason::PidUnknown => "pid_unknown",
            Reason::Host => "host",
            Reason::Mps => "mps",
            Reason::Ambiguous => "ambiguous",
            Reason::Lost => "lost",
        }
    }
}

/// GPU time in seconds, by state. Booked together with what it is credited to, so their sums agree at every snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GpuTime {
    pub busy: f64,
    pub idle: f64,
    pub unobserved: f64,
    pub unsupported: f64,
}

/// What does not change about a GPU while it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    pub uuid: GpuUuid,
    pub index: u32,
    /// N of `/dev/nvidiaN`; not always the index.
    pub minor: Option<u32>,
    /// UUIDs of its MIG devices, `MIG-...`.
    pub mig_uuids: Vec<String>,
    pub model: String,
    pub pci_bus_id: String,
    pub driver_version: String,
    /// `enabled`, `disabled` or `unsupported`.
    pub mig_mode: &'static str,
}

/// Device-level readings; `None` is "the driver does not say", never zero.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DeviceReadings {
    pub memory_used_bytes: Option<u64>,
    pub memory_total_bytes: Option<u64>,
    pub power_watts: Option<f64>,
    pub energy_joules: Option<f64>,
    pub temperature_celsius: Option<f64>,
    pub sm_clock_hertz: Option<f64>,
}

#[derive(Clone, Debug)]
pub struct GpuView {
    pub info: Arc<GpuInfo>,
    pub readings: DeviceReadings,
    pub time: GpuTime,
    /// Seconds, indexed like [`Reason::ALL`].
    pub unattributed: [f64; Reason::ALL.len()],
    /// Busy share of the last 10 s, absent when nothing of it was observed.
    pub utilization_ratio: Option<f64>,
    pub last_sample: Option<WallTime>,
    /// The driver's sampling grid as learned.
    pub sample_period_seconds: Option<f64>,
    pub sample_gaps: u64,
}

#[derive(Clone, Debug)]
pub struct ContainerGpu {
    /// Index into [`Snapshot::gpus`].
    pub gpu: usize,
    /// GPU-seconds credited so far.
    pub seconds: f64,
    /// Driver samples behind them.
    pub samples: u64,
    /// Percent (0-100) of the last 10 s; `None` when nothing of them was observed.
    pub duty_cycle_percent: Option<f64>,
    /// One standard error of `duty_cycle_percent`, same unit.
    pub duty_cycle_stderr: Option<f64>,
    pub memory_used_bytes: Option<u64>,
}

#[derive(Clone, Debug)]
pub struct ContainerView {
    pub record: Arc<ContainerRecord>,
    /// When its last cgroup was removed.
    pub gone: Option<BootNs>,
    /// One entry per (container, GPU) pair that exists.
    pub gpus: Vec<ContainerGpu>,
}

#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub at: BootNs,
    pub wall: WallTime,
    pub gpus: Vec<GpuView>,
    /// Every living container, whether it touched a GPU or not, and those with GPU time that are gone for less than the retention.
    pub containers: Vec<ContainerView>,
}
