//! What aggregation publishes and export reads: an immutable picture of every GPU and container at one instant.
//! Labels are not in it; they join at the edge, so a late label never rewrites history.

use std::sync::Arc;

use crate::device::{ClockView, DeviceReadings, Engine, GpuInfo, Reason, SampleCounts, THROTTLE_REASONS};
use crate::identity::ContainerRecord;
use crate::observation::Rejected;
use crate::units::{BootNs, ContainerKey, WallTime};

/// GPU time in seconds, by state. Booked together with what it is credited to, so their sums agree at every snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GpuTime {
    pub busy: f64,
    pub idle: f64,
    pub unobserved: f64,
    pub unsupported: f64,
}

/// Seconds of an engine that is not compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EngineTime {
    pub engine: Engine,
    pub busy: f64,
    /// Indexed as [`Reason::ALL`].
    pub unattributed: [f64; Reason::ALL.len()],
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
    /// Part of the last 10 s, by windows of one second, in which two users or more had a sample.
    pub coactive_ratio: Option<f64>,
    pub last_sample: Option<WallTime>,
    /// The driver's sampling grid as learned.
    pub sample_period_seconds: Option<f64>,
    pub sample_gaps: u64,
    /// Samples whose time was booked, and those of them whose process was queried.
    pub counts: SampleCounts,
    /// One standard error of a share of one half over the last 10 s, at the present rate of queries; absent without any.
    pub expected_stderr_ratio: Option<f64>,
    /// Times that the driver's ring had gone round before it was read.
    pub ring_overruns: u64,
    /// Indexed as [`Rejected::ALL`].
    pub rejected: [u64; Rejected::ALL.len()],
    /// Rows that belong to no sample of the device.
    pub off_grid: u64,
    pub clock: ClockView,
    /// Engines beside compute that the driver samples.
    pub engines: Vec<EngineTime>,
    /// Indexed as [`THROTTLE_REASONS`]; `None` where the driver does not say.
    pub throttle_seconds: Option<[f64; THROTTLE_REASONS.len()]>,
    /// (XID, how often), by XID.
    pub xids: Vec<(u64, u64)>,
    /// Gone devices stay for a while, for who scrapes their last values.
    pub gone: Option<BootNs>,
}

impl GpuView {
    /// As [`ContainerGpu::begin_at_zero`].
    pub fn begin_at_zero(&mut self) {
        (self.time, self.unattributed) = (GpuTime::default(), Default::default());
        self.counts = SampleCounts::default();
        (self.sample_gaps, self.ring_overruns, self.off_grid, self.clock.steps) = (0, 0, 0, 0);
        self.rejected = Default::default();
    }
}

/// Cumulative counts of windows.
#[derive(Clone, Debug, PartialEq)]
pub struct WindowShares {
    /// One per bound of [`WindowShares::BOUNDS`].
    pub buckets: Vec<u64>,
    pub sum: f64,
    pub count: u64,
}

impl Default for WindowShares {
    fn default() -> Self {
        Self { buckets: vec![0; Self::BOUNDS.len()], sum: 0.0, count: 0 }
    }
}

impl WindowShares {
    pub const BOUNDS: [f64; 10] = [0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0];
}

/// Somebody else on a container's GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Other {
    Container(ContainerKey),
    /// Processes outside any container.
    Host,
    /// Whose process it was is not known.
    Unknown,
    /// Those beyond [`MAX_OTHERS`].
    Rest,
}

/// Others told apart for a container on a GPU; a place once given stays given.
pub const MAX_OTHERS: usize = 8;

/// GPU-seconds that another user got in windows in which a container was active and the GPU saturated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Contention {
    pub other: Other,
    pub seconds: f64,
}

#[derive(Clone, Debug, Default)]
pub struct ContainerGpu {
    /// Index into [`Snapshot::gpus`].
    pub gpu: usize,
    /// GPU-seconds credited so far.
    pub seconds: f64,
    /// One standard error of `seconds`.
    pub seconds_stderr: f64,
    /// Driver samples behind them.
    pub samples: u64,
    /// Seconds of the engines beside compute, for those in which it ever was.
    pub engines: Vec<(Engine, f64)>,
    /// Credited share of wall time over windows of 10 s.
    pub window_shares: Option<Arc<WindowShares>>,
    /// Of windows in which it had a sample.
    pub active_seconds: f64,
    /// Of those in which another user had one, too.
    pub coactive_seconds: f64,
    /// In the order in which they were first met.
    pub contention: Vec<Contention>,
    /// Some of its processes are clients of the multi-process service.
    pub mps_clients: u32,
    /// Percent (0-100) of the last 10 s; `None` when nothing of them was observed.
    pub duty_cycle_percent: Option<f64>,
    /// One standard error of `duty_cycle_percent`, same unit.
    pub duty_cycle_stderr: Option<f64>,
    pub memory_used_bytes: Option<u64>,
}

impl ContainerGpu {
    /// As its series first appear: so that an increase over them sees all there is.
    pub fn begin_at_zero(&mut self) {
        (self.seconds, self.seconds_stderr, self.samples) = (0.0, 0.0, 0);
        (self.active_seconds, self.coactive_seconds) = (0.0, 0.0);
        for contention in &mut self.contention {
            contention.seconds = 0.0;
        }
        for (_, seconds) in &mut self.engines {
            *seconds = 0.0;
        }
        self.window_shares = self.window_shares.as_ref().map(|_| Arc::default());
    }
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
