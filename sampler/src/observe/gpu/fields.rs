//! Readings that the driver returns as fields: errors and repairs of the memory, recovery, traffic of NVLink and PCIe, and the time for
//! which each clocks event reason was in force.
//!
//! Every one is a count over the life of the board or of the driver, or a state, so they are read rarely. Fields that the device does not
//! support are left out of later calls.

use std::collections::HashMap;
use std::time::Instant;

use nvml_wrapper::FieldIdScheme;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper_sys::bindings::field_id::{
    NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN, NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN,
    NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_POWER_CAP, NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN,
    NVML_FI_DEV_CLOCKS_EVENT_REASON_SYNC_BOOST, NVML_FI_DEV_ECC_DBE_AGG_TOTAL, NVML_FI_DEV_ECC_SBE_AGG_TOTAL,
    NVML_FI_DEV_GET_GPU_RECOVERY_ACTION, NVML_FI_DEV_NVLINK_COUNT_RCV_BYTES, NVML_FI_DEV_NVLINK_COUNT_XMIT_BYTES,
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, NVML_FI_DEV_PCIE_COUNT_RX_BYTES,
    NVML_FI_DEV_PCIE_COUNT_TX_BYTES, NVML_FI_DEV_REMAPPED_COR, NVML_FI_DEV_REMAPPED_FAILURE, NVML_FI_DEV_REMAPPED_PENDING,
    NVML_FI_DEV_REMAPPED_UNC,
};
use sampler_core::device::{HardwareReadings, RecoveryAction, THROTTLE_REASONS, ThrottleTimes};

use super::library::Handle;
use super::nvml_caller::{NvmlCaller, TRY_AGAIN_AFTER};
use crate::health::nvml_calls::Call;

/// Id and scope.
type Field = (u32, u32);

/// The scope of fields of NVLink that stands for the sum of all links; 0 would be the first one.
const ALL_LINKS: u32 = u32::MAX;
const BYTES_PER_KIB: u64 = 1024;
/// Software thermal, hardware thermal and power brake slowdown, as nvml.h numbers them from driver 580.82 on.
const RENUMBERED_SLOWDOWNS: [u32; 3] = [269, 270, 271];

#[derive(Default)]
pub struct FieldReader {
    /// When a field was last found to be unsupported.
    unsupported_since: HashMap<Field, Instant>,
    /// Sent, received.
    pcie: [WideCounter; 2],
    nvlink: FieldChoice,
}

/// The first fields of several that a device had: others count other bytes, and a counter must not go back.
#[derive(Default)]
struct FieldChoice(Option<usize>);

impl FieldChoice {
    fn choose(&mut self, ways: [[Option<u64>; 2]; 2]) -> [Option<u64>; 2] {
        let found = || ways.iter().position(|values| values.iter().any(Option::is_some));
        self.0 = self.0.or_else(found);
        self.0.map_or([None; 2], |way| ways[way])
    }
}

impl FieldReader {
    pub fn hardware(&mut self, handle: &Handle, driver: &mut NvmlCaller) -> HardwareReadings {
        const HEALTH: [u32; 7] = [
            NVML_FI_DEV_ECC_SBE_AGG_TOTAL,
            NVML_FI_DEV_ECC_DBE_AGG_TOTAL,
            NVML_FI_DEV_REMAPPED_COR,
            NVML_FI_DEV_REMAPPED_UNC,
            NVML_FI_DEV_REMAPPED_PENDING,
            NVML_FI_DEV_REMAPPED_FAILURE,
            NVML_FI_DEV_GET_GPU_RECOVERY_ACTION,
        ];
        const NVLINK: [u32; 4] = [
            NVML_FI_DEV_NVLINK_COUNT_XMIT_BYTES,
            NVML_FI_DEV_NVLINK_COUNT_RCV_BYTES,
            NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
            NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
        ];
        const PCIE: [u32; 2] = [NVML_FI_DEV_PCIE_COUNT_TX_BYTES, NVML_FI_DEV_PCIE_COUNT_RX_BYTES];
        let [corrected, uncorrected, correctable, uncorrectable, pending, failure, action] =
            self.read(Call::GetHealthFields, HEALTH.map(|id| (id, 0)), handle, driver);
        let [sent, received, sent_kib, received_kib] =
            self.read(Call::GetNvlinkFields, NVLINK.map(|id| (id, ALL_LINKS)), handle, driver);
        let in_bytes = |kib: Option<u64>| kib.map(|kib| kib.saturating_mul(BYTES_PER_KIB));
        let [pcie_sent, pcie_received] = self.read(Call::GetPcieFields, PCIE.map(|id| (id, 0)), handle, driver);
        HardwareReadings {
            ecc_errors: [corrected, uncorrected],
            remapped_rows: [correctable, uncorrectable],
            remap_pending: pending.map(|rows| rows > 0),
            remap_failure: failure.map(|rows| rows > 0),
            recovery_action: action.map(RecoveryAction::from_nvml),
            nvlink_bytes: self.nvlink.choose([[sent, received], [sent_kib, received_kib].map(in_bytes)]),
            pcie_bytes: [self.pcie[0].read(pcie_sent), self.pcie[1].read(pcie_received)],
        }
    }

    /// The driver's counters of the time for which each reason was in force. The gaps are reasons without one; `PERF_POLICY_THERMAL` does not
    /// distinguish the slowdowns.
    pub fn throttle_times(&mut self, handle: &Handle, driver: &mut NvmlCaller) -> ThrottleTimes {
        // Their numbers changed in driver 580.82. A driver that has them otherwise is found out by the reasons (`aggregate::throttle`).
        let [sw_thermal, hw_thermal, hw_power_brake] = match handle.generation.nvml().field_id_scheme() {
            FieldIdScheme::V12 => [
                NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN,
                NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN,
                NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN,
            ],
            FieldIdScheme::V13Update1 => RENUMBERED_SLOWDOWNS,
        };
        let fields = [
            (0x4, NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_POWER_CAP),
            (0x10, NVML_FI_DEV_CLOCKS_EVENT_REASON_SYNC_BOOST),
            (0x20, sw_thermal),
            (0x40, hw_thermal),
            (0x80, hw_power_brake),
        ];
        let values = self.read(Call::GetThrottleFields, fields.map(|(_, id)| (id, 0)), handle, driver);
        let counted = |bit: u64| fields.iter().zip(values).find(|((of, _), _)| *of == bit).and_then(|(_, value)| value);
        ThrottleTimes(THROTTLE_REASONS.map(|(bit, _)| counted(bit)))
    }

    /// Values of fields, with one call; `None` where the driver does not return one.
    fn read<const N: usize>(
        &mut self,
        call: Call,
        fields: [Field; N],
        handle: &Handle,
        driver: &mut NvmlCaller,
    ) -> [Option<u64>; N] {
        self.unsupported_since.retain(|_, since| since.elapsed() < TRY_AGAIN_AFTER);
        let wanted: Vec<Field> = fields.into_iter().filter(|field| !self.unsupported_since.contains_key(field)).collect();
        if wanted.is_empty() {
            return [None; N];
        }
        let values = driver.call(call, || some_supported(handle.field_values(&wanted)?)).unwrap_or_default();
        let mut known = HashMap::new();
        for (field, value) in wanted.into_iter().zip(values) {
            match value {
                Ok(value) => _ = known.insert(field, value),
                Err(error) if is_unsupported_field(&error) => _ = self.unsupported_since.insert(field, Instant::now()),
                Err(_) => {}
            }
        }
        fields.map(|field| known.get(&field).copied())
    }
}

/// A call of which the device supports no field is not supported.
fn some_supported(values: Vec<Result<u64, NvmlError>>) -> Result<Vec<Result<u64, NvmlError>>, NvmlError> {
    let is_supported = |value: &Result<u64, NvmlError>| !value.as_ref().is_err_and(is_unsupported_field);
    if values.iter().any(is_supported) { Ok(values) } else { Err(NvmlError::NotSupported) }
}

/// Drivers reject ids that they do not know in different ways.
fn is_unsupported_field(error: &NvmlError) -> bool {
    matches!(
        error,
        NvmlError::NotSupported
            | NvmlError::InvalidArg
            | NvmlError::NotFound
            | NvmlError::FunctionNotFound
            | NvmlError::UnexpectedVariant(_)
    )
}

/// A counter of bytes that some drivers keep in 32 bits, which a fast link wraps more than once between two readings. It is reported once
/// it has exceeded 32 bits.
#[derive(Default)]
struct WideCounter {
    is_wide: bool,
}

impl WideCounter {
    fn read(&mut self, value: Option<u64>) -> Option<u64> {
        self.is_wide |= value.is_some_and(|value| value > u32::MAX.into());
        value.filter(|_| self.is_wide)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_reported_once_it_has_exceeded_32_bits() {
        let mut counter = WideCounter::default();
        let mut read = |value| counter.read(value);
        assert_eq!((read(Some(0)), read(Some(u32::MAX.into())), read(None)), (None, None, None));
        assert_eq!(read(Some(1 << 32)), Some(1 << 32));
        // The driver was loaded again.
        assert_eq!((read(None), read(Some(5))), (None, Some(5)));
    }

    #[test]
    fn a_call_is_unsupported_if_no_field_is_supported() {
        let unsupported = || Err(NvmlError::NotSupported);
        assert!(some_supported(vec![unsupported(), Err(NvmlError::InvalidArg)]).is_err());
        assert!(some_supported(vec![unsupported(), Ok(0)]).is_ok_and(|values| values.len() == 2));
        // One that fails may succeed later.
        assert!(some_supported(vec![Err(NvmlError::Unknown)]).is_ok());
    }
}
