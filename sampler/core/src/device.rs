//! GPUs: engines, static information, readings, and the reasons of unattributed time.

use serde::{Deserialize, Serialize};
use strum::{EnumCount, IntoStaticStr, VariantArray};

use crate::units::GpuUuid;

/// An engine of a GPU that the driver samples separately. The names are the values of the `engine` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, EnumCount, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Engine {
    Compute,
    Memory,
    Encoder,
    Decoder,
    Jpeg,
    Ofa,
}

impl Engine {
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// Why busy time is not attributed to a container. The names, in this order, are the values of the `reason` label of
/// `gpu_unattributed_seconds_total`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, EnumCount, IntoStaticStr, VariantArray,
)]
#[strum(serialize_all = "snake_case")]
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
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// Whether a GPU is divided into MIG devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum MigMode {
    Enabled,
    Disabled,
    #[default]
    Unsupported,
}

impl MigMode {
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// Properties of a GPU that do not change while it is present.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuInfo {
    pub uuid: GpuUuid,
    pub index: u32,
    /// N of `/dev/nvidiaN`; not always the index.
    pub minor: Option<u32>,
    /// UUIDs of its MIG devices, `MIG-...`.
    pub mig_uuids: Vec<String>,
    /// The parent GPU of a MIG device.
    pub parent: Option<GpuUuid>,
    /// The number of the GPU instance of a MIG device. Sessions do not have it.
    #[serde(skip)]
    pub gpu_instance: Option<u32>,
    pub model: String,
    pub pci_bus_id: String,
    pub driver_version: String,
    pub mig_mode: MigMode,
}

impl GpuInfo {
    /// Whether seconds and memory are counted for this device. For a GPU in MIG mode they are counted for its MIG devices instead.
    pub fn is_leaf(&self) -> bool {
        self.parent.is_some() || self.mig_mode != MigMode::Enabled
    }
}

/// Device-level readings; `None` means that the driver does not report the value, never zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceReadings {
    pub memory_used_bytes: Option<u64>,
    pub memory_total_bytes: Option<u64>,
    pub power_watts: Option<f64>,
    pub energy_joules: Option<f64>,
    pub temperature_celsius: Option<f64>,
    pub sm_clock_hertz: Option<f64>,
    /// NVML's clocks event reasons, one bit each.
    pub throttle_reasons: Option<u64>,
}

/// Errors, repairs and traffic of a device, as the driver counts them; `None` means that it does not report the value, never zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardwareReadings {
    /// Over the life of the board: corrected, uncorrected.
    pub ecc_errors: [Option<u64>; 2],
    /// Over the life of the board: for correctable, for uncorrectable errors.
    pub remapped_rows: [Option<u64>; 2],
    /// A row is remapped at the next reset.
    pub remap_pending: Option<bool>,
    /// A row could not be remapped.
    pub remap_failure: Option<bool>,
    pub recovery_action: Option<RecoveryAction>,
    /// Sent, received.
    pub nvlink_bytes: [Option<u64>; 2],
    /// Sent, received.
    pub pcie_bytes: [Option<u64>; 2],
}

/// What the driver requires for the recovery of a device. The names are the values of the `action` label of `gpu_recovery_action`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum RecoveryAction {
    None,
    Reset,
    Reboot,
    DrainP2p,
    DrainAndReset,
    /// One that this version does not know.
    Other,
}

impl RecoveryAction {
    /// From nvmlDeviceGpuRecoveryAction_t.
    pub fn from_nvml(value: u64) -> Self {
        match value {
            0 => Self::None,
            1 => Self::Reset,
            2 => Self::Reboot,
            3 => Self::DrainP2p,
            4 => Self::DrainAndReset,
            _ => Self::Other,
        }
    }

    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// NVML's clocks event reasons (formerly: throttle reasons): the bit, and the `reason` label of `gpu_throttle_seconds_total`.
pub const THROTTLE_REASONS: [(u64, &str); 9] = [
    (0x1, "gpu_idle"),
    (0x2, "applications_clocks_setting"),
    (0x4, "sw_power_cap"),
    (0x8, "hw_slowdown"),
    (0x10, "sync_boost"),
    (0x20, "sw_thermal_slowdown"),
    (0x40, "hw_thermal_slowdown"),
    (0x80, "hw_power_brake_slowdown"),
    (0x100, "display_clock_setting"),
];

/// Nanoseconds in which each reason was in force, by the driver's own counters; indexed as [`THROTTLE_REASONS`]. `None` where it has no
/// counter of the reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThrottleTimes(pub [Option<u64>; THROTTLE_REASONS.len()]);

/// A GPU's clock, as polls bound it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ClockView {
    /// The GPU's clock minus boot time; the true offset is at most `uncertainty_seconds` below it.
    pub ahead_of_boot_seconds: Option<f64>,
    /// Width of the interval that contains the true offset.
    pub uncertainty_seconds: Option<f64>,
    /// Seconds that the GPU's clock gains per second; available after a minute.
    pub drift_ratio: Option<f64>,
    pub steps: u64,
}

/// Samples of the compute engine since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SampleCounts {
    /// Samples with booked time.
    pub samples: u64,
    /// Those of `samples` that had their process queried.
    pub queried: u64,
}
