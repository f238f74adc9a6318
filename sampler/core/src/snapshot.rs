//! Snapshots: the immutable state of every GPU and container at one instant, published by aggregation and read by the exporters.
//! Labels are not part of it. They are joined on export, so a late label never changes earlier values.

use std::sync::Arc;

use strum::EnumCount as _;

use crate::device::{ClockView, DeviceReadings, Engine, GpuInfo, HardwareReadings, Reason, SampleCounts, THROTTLE_REASONS};
use crate::identity::ContainerRecord;
use crate::observation::Rejected;
use crate::units::{BootNs, ContainerKey, WallTime};

/// GPU time in seconds, by state. Booked together with the credits, so their sums agree in every snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GpuTime {
    pub busy: f64,
    pub idle: f64,
    pub unobserved: f64,
    pub unsupported: f64,
}

/// Seconds of an engine other than compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EngineTime {
    pub engine: Engine,
    pub busy: f64,
    /// Indexed as [`Reason`].
    pub unattributed: [f64; Reason::COUNT],
}

/// Energy of a GPU that is not a container's, in joules.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UnattributedEnergy {
    /// What the GPU draws when it is idle.
    pub idle: f64,
    /// Indexed as [`Reason`].
    pub reasons: [f64; Reason::COUNT],
}

#[derive(Clone, Debug)]
pub struct GpuView {
    pub info: Arc<GpuInfo>,
    pub readings: DeviceReadings,
    pub hardware: HardwareReadings,
    pub time: GpuTime,
    /// Seconds, indexed as [`Reason`].
    pub unattributed: [f64; Reason::COUNT],
    /// `None` where the driver has not reported an energy counter.
    pub unattributed_energy: Option<UnattributedEnergy>,
    /// Busy share of the last 10 s; absent when none of it was observed.
    pub utilization_ratio: Option<f64>,
    /// Share of the last 10 s, by windows of one second, in which two or more users had a sample.
    pub coactive_ratio: Option<f64>,
    pub last_sample: Option<WallTime>,
    /// The driver's sampling period, as learned from its samples.
    pub sample_period_seconds: Option<f64>,
    pub sample_gaps: u64,
    pub counts: SampleCounts,
    /// One standard error of a share of one half over the last 10 s, at the present rate of queries; absent without queries.
    pub expected_stderr_ratio: Option<f64>,
    /// How often the driver's sample buffer wrapped before it was read.
    pub ring_overruns: u64,
    /// Indexed as [`Rejected`].
    pub rejected: [u64; Rejected::COUNT],
    /// Process samples that match no sample of the device.
    pub off_grid: u64,
    pub clock: ClockView,
    /// Engines other than compute that the driver samples.
    pub engines: Vec<EngineTime>,
    /// Indexed as [`THROTTLE_REASONS`]; `None` where the driver does not report them.
    pub throttle_seconds: Option<[f64; THROTTLE_REASONS.len()]>,
    /// (XID, count), by XID.
    pub xids: Vec<(u64, u64)>,
    /// Listed processes that do not belong to a user, by why, with their memory where the driver reports it for each.
    pub unattributed_holders: Vec<(Reason, Option<u64>)>,
    /// When the device disappeared. It is kept for a while, so that its last values can be scraped.
    pub gone: Option<BootNs>,
}

/// Histogram of windows by share, with cumulative counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WindowShares {
    /// One for each bound of [`WindowShares::BOUNDS`].
    pub buckets: [u64; WindowShares::BOUNDS.len()],
    pub sum: f64,
    pub count: u64,
}

impl WindowShares {
    pub const BOUNDS: [f64; 10] = [0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0];
    /// The whole of a window is the sum of many parts, which rounding may put above 1.
    const ROUNDING: f64 = 5e-4;

    pub fn record(&mut self, share: f64) {
        for (bound, count) in Self::BOUNDS.iter().zip(&mut self.buckets) {
            *count += u64::from(share <= bound + Self::ROUNDING);
        }
        self.sum += share;
        self.count += 1;
    }
}

/// Another user on a container's GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Other {
    Container(ContainerKey),
    /// Processes outside any container.
    Host,
    /// A process that was not resolved.
    Unknown,
    /// All users beyond [`MAX_OTHERS`].
    Rest,
}

/// Maximum number of other users that are distinguished for a container on a GPU; an assigned entry is never replaced.
pub const MAX_OTHERS: usize = 8;

/// GPU-seconds that another user received in windows in which a container was active and the GPU was saturated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Contention {
    pub other: Other,
    pub seconds: f64,
    /// The part of the container's pressure that is attributed to it; `None` where that pressure is not known.
    pub pressure_ratio: Option<f64>,
}

#[derive(Clone, Debug, Default)]
pub struct ContainerGpu {
    /// Index into [`Snapshot::gpus`].
    pub gpu: usize,
    /// GPU-seconds credited so far.
    pub seconds: f64,
    /// One standard error of `seconds`.
    pub seconds_stderr: f64,
    /// Number of driver samples behind `seconds`.
    pub samples: u64,
    /// `None` where the driver has not reported an energy counter.
    pub energy_joules: Option<f64>,
    /// Seconds of the engines other than compute, for those that the container ever used.
    pub engines: Vec<(Engine, f64)>,
    /// Credited share of wall time over windows of 10 s.
    pub window_shares: Option<Arc<WindowShares>>,
    /// Seconds of windows in which it had a sample.
    pub active_seconds: f64,
    /// Seconds of windows in which another user had a sample too.
    pub coactive_seconds: f64,
    /// In the order of the first encounter.
    pub contention: Arc<[Contention]>,
    /// Number of its processes that are clients of the multi-process service.
    pub mps_clients: u32,
    /// Percent (0-100) of the last 10 s; `None` when none of them was observed.
    pub duty_cycle_percent: Option<f64>,
    /// One standard error of `duty_cycle_percent`, same unit.
    pub duty_cycle_stderr: Option<f64>,
    pub memory_used_bytes: Option<u64>,
    /// The driver's last list has a process of it.
    pub is_listed: bool,
}

impl ContainerGpu {
    /// Adds the parts of the container's pressure that are attributed to its contenders on this GPU.
    pub fn add_pressure(&mut self, shares: impl Iterator<Item = (Other, f64)>) {
        let mut all: Vec<Contention> =
            self.contention.iter().map(|contention| Contention { pressure_ratio: Some(0.0), ..*contention }).collect();
        for (other, ratio) in shares {
            let at = |wanted| all.iter().position(|contention| contention.other == wanted);
            // `Rest` has those beyond the first few. The container was never active next to a user that is in neither.
            if let Some(known) = at(other).or_else(|| at(Other::Rest)) {
                *all[known].pressure_ratio.get_or_insert(0.0) += ratio;
            }
        }
        self.contention = all.into();
    }
}

/// Waiting of the processes of a container, from their wait probes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ContainerWaits {
    /// Time in which at least one thread of a process was inside a blocking call; summed over processes.
    pub wait_seconds: f64,
    /// Time in which processes had probes; summed over processes.
    pub probed_seconds: f64,
    /// Part (0-1) of the probed time of the last ten settled seconds that was waited beyond what the container waits when it is alone.
    /// `None` without such seconds, or without enough time alone to compare.
    pub pressure_ratio: Option<f64>,
    /// Its standard error, from how much windows differ; `None` without two recent windows.
    pub pressure_stderr: Option<f64>,
}

#[derive(Clone, Debug)]
pub struct ContainerView {
    pub record: Arc<ContainerRecord>,
    /// When its last cgroup was removed.
    pub gone: Option<BootNs>,
    /// One entry for each existing (container, GPU) pair.
    pub gpus: Vec<ContainerGpu>,
    /// `None` if none of its processes was ever probed.
    pub waits: Option<ContainerWaits>,
}

#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub at: BootNs,
    pub wall: WallTime,
    pub gpus: Vec<GpuView>,
    /// Every living container, with or without GPU use; the pods, jobs, units and login sessions that use a GPU; and those with GPU time
    /// that disappeared within the retention time.
    pub containers: Vec<ContainerView>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_added_to_known_contenders() {
        let [one, two, three] = [1, 2, 3].map(|key| Other::Container(ContainerKey(key)));
        let contention = |other: &Other| Contention { other: *other, seconds: 1.0, pressure_ratio: None };
        let with = |others: &[Other], shares: &[(Other, f64)]| {
            let mut usage = ContainerGpu { contention: others.iter().map(contention).collect(), ..ContainerGpu::default() };
            usage.add_pressure(shares.iter().copied());
            usage.contention.iter().map(|contention| (contention.other, contention.pressure_ratio)).collect::<Vec<_>>()
        };
        assert_eq!(with(&[one, two], &[(one, 0.2)]), [(one, Some(0.2)), (two, Some(0.0))]);
        assert_eq!(with(&[one, Other::Rest], &[(one, 0.2), (two, 0.1), (three, 0.2)])[1].1, Some(0.1 + 0.2));
        // It was never active next to the other one.
        assert_eq!(with(&[one], &[(two, 0.2)]), [(one, Some(0.0))]);
    }
}
