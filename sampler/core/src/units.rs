//! Newtypes for values that must not be confused: three clocks, a process id, a GPU.
//!
//! `BootNs` is CLOCK_BOOTTIME, the clock of kernel events. `GpuNs` is a GPU's own timestamp; only a measured offset relates it to
//! another clock. `WallTime` is only used for output, to users and to Prometheus.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// /proc start times are in clock ticks of 10 ms (USER_HZ is 100 on every architecture with NVIDIA drivers), rounded down.
const PROC_TICK_NS: u64 = 10_000_000;

/// Nanoseconds of CLOCK_BOOTTIME.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BootNs(pub u64);

/// Nanoseconds of one GPU's own clock (NVML gives microseconds).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GpuNs(pub u64);

/// Nanoseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WallTime(pub u64);

impl BootNs {
    pub fn saturating_since(self, earlier: BootNs) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
    pub fn plus(self, ns: u64) -> BootNs {
        BootNs(self.0.saturating_add(ns))
    }
    pub fn minus(self, ns: u64) -> BootNs {
        BootNs(self.0.saturating_sub(ns))
    }
    /// The /proc clock tick that contains it: the start of a process may be known to the nanosecond or only to the tick.
    pub fn proc_tick(self) -> u64 {
        self.0 / PROC_TICK_NS
    }
}

impl From<std::time::SystemTime> for WallTime {
    fn from(at: std::time::SystemTime) -> Self {
        let since = at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }
}

impl WallTime {
    pub fn seconds(self) -> f64 {
        self.0 as f64 / 1e9
    }
}

/// A process id in the initial pid namespace (the kernel's tgid).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tgid(pub u32);

impl fmt::Display for Tgid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// NVML's `GPU-...` or `MIG-...` string.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GpuUuid(pub Arc<str>);

impl fmt::Display for GpuUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A cgroup. Ids are per hierarchy (every root has the same inode number), so both halves are needed. Hierarchy 0 is cgroup v2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CgroupKey {
    pub hierarchy: u32,
    pub id: u64,
}

/// Identifies a container within this agent. Never reused, so a late query result for a removed container cannot reach its successor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ContainerKey(pub u64);

/// RFC 3339, UTC, to the millisecond.
pub fn rfc3339(at: WallTime) -> String {
    humantime::format_rfc3339_millis(std::time::UNIX_EPOCH + std::time::Duration::from_nanos(at.0)).to_string()
}
