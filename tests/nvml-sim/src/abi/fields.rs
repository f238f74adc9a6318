//! Values of fields: counters and states of a GPU by number, each with a result of its own.

use std::ffi::{c_int, c_longlong, c_uint, c_ulonglong};

use nvml_wrapper_sys::bindings::field_id::{
    NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN, NVML_FI_DEV_ECC_DBE_AGG_TOTAL, NVML_FI_DEV_ECC_DBE_VOL_TOTAL,
    NVML_FI_DEV_ECC_SBE_AGG_TOTAL, NVML_FI_DEV_ECC_SBE_VOL_TOTAL, NVML_FI_DEV_GET_GPU_RECOVERY_ACTION,
    NVML_FI_DEV_NVLINK_COUNT_RCV_BYTES, NVML_FI_DEV_NVLINK_COUNT_XMIT_BYTES, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, NVML_FI_DEV_PCIE_COUNT_RX_BYTES, NVML_FI_DEV_PCIE_COUNT_TX_BYTES,
    NVML_FI_DEV_PERF_POLICY_POWER, NVML_FI_DEV_PERF_POLICY_SYNC_BOOST, NVML_FI_DEV_REMAPPED_COR, NVML_FI_DEV_REMAPPED_FAILURE,
    NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION,
};
use nvml_wrapper_sys::bindings::{nvmlDevice_t, nvmlFieldValue_t, nvmlReturn_t, nvmlValue_t};

use super::{Call, INVALID_ARGUMENT, NOT_SUPPORTED, failed, get, guard, nvml, put};
use crate::driver::Driver;
use crate::world::{NvlinkFields, RecoveryAction, ThrottleTimes};

/// nvmlValueType_t.
const UNSIGNED_INT: c_uint = 1;
const UNSIGNED_LONG_LONG: c_uint = 3;
/// The scope of a field that stands for the sum of all NVLinks.
const ALL_LINKS: c_uint = c_uint::MAX;
/// Those of a V100.
const LINKS: c_uint = 6;
/// The first driver with the recovery action.
const RECOVERY_ACTION_SINCE: u32 = 570;
/// The first driver with counters of the slowdowns, and the first that has them under later numbers.
const SLOWDOWNS_SINCE: (u32, u32) = (575, 0);
const RENUMBERED_SINCE: (u32, u32) = (580, 82);
const RENUMBERED_SLOWDOWNS: u32 = 269;

/// A value in the type that the driver gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    Int(u32),
    Long(u64),
}

/// Bytes since the world's begin at a constant rate.
fn bytes(driver: &Driver, per_second: u64) -> Result<u64, nvmlReturn_t> {
    if per_second == 0 {
        return Err(NOT_SUPPORTED);
    }
    let us = driver.now().saturating_sub(driver.world.begun_us);
    Ok((u128::from(us) * u128::from(per_second) / 1_000_000) as u64)
}

/// Bytes of one link or of all, of which it receives half as many as it sends.
fn nvlink(driver: &Driver, gpu: usize, fields: NvlinkFields, is_sent: bool, scope: c_uint) -> Result<Number, nvmlReturn_t> {
    if *driver.world.nvlink_fields(gpu) != fields {
        return Err(NOT_SUPPORTED);
    }
    let sent = bytes(driver, *driver.world.nvlink_bytes_per_second(gpu))?;
    let all = if is_sent { sent } else { sent / 2 };
    let of_scope = match scope {
        ALL_LINKS => all,
        link if link < LINKS => all / u64::from(LINKS),
        _ => return Err(INVALID_ARGUMENT),
    };
    Ok(Number::Long(if fields == NvlinkFields::Throughput { of_scope >> 10 } else { of_scope }))
}

fn pcie(driver: &Driver, gpu: usize, is_sent: bool) -> Result<Number, nvmlReturn_t> {
    let sent = bytes(driver, *driver.world.pcie_bytes_per_second(gpu))?;
    let all = if is_sent { sent } else { sent / 2 };
    Ok(if *driver.world.pcie_counter_bits(gpu) == 32 { Number::Int(all as u32) } else { Number::Long(all) })
}

fn at(numbers: &[u64], index: usize) -> Result<Number, nvmlReturn_t> {
    numbers.get(index).map(|number| Number::Long(*number)).ok_or(NOT_SUPPORTED)
}

fn recovery_action(driver: &Driver, gpu: usize) -> Result<Number, nvmlReturn_t> {
    if driver.world.driver_major().is_none_or(|major| major < RECOVERY_ACTION_SINCE) {
        return Err(NOT_SUPPORTED);
    }
    Ok(Number::Int(match driver.world.recovery_action(gpu) {
        RecoveryAction::None => 0,
        RecoveryAction::Reset => 1,
        RecoveryAction::Reboot => 2,
        RecoveryAction::DrainP2p => 3,
        RecoveryAction::DrainAndReset => 4,
    }))
}

/// The clocks event reason of a field, as the driver's version numbers them.
fn timed_reason(driver: &Driver, id: c_uint) -> Option<u64> {
    const SLOWDOWNS: [u64; 3] = [0x20, 0x40, 0x80];
    let version = (driver.world.driver_major().unwrap_or(0), driver.world.driver_minor());
    let slowdown = |first: c_uint| SLOWDOWNS.get(id.checked_sub(first)? as usize).copied();
    match id {
        NVML_FI_DEV_PERF_POLICY_POWER => Some(0x4),
        NVML_FI_DEV_PERF_POLICY_SYNC_BOOST => Some(0x10),
        _ if version >= RENUMBERED_SINCE => slowdown(RENUMBERED_SLOWDOWNS),
        _ if version >= SLOWDOWNS_SINCE => slowdown(NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN),
        _ => None,
    }
}

/// Nanoseconds in which the reason was in force.
fn throttle_time(driver: &mut Driver, gpu: usize, reason: u64) -> Result<Number, nvmlReturn_t> {
    let now = driver.read_log().map_err(failed)?;
    match driver.world.throttle_times(gpu) {
        ThrottleTimes::Exact => Ok(Number::Long(1_000 * driver.log.faults.throttled_us(gpu, reason, now))),
        ThrottleTimes::Frozen => Ok(Number::Long(0)),
        ThrottleTimes::Missing => Err(NOT_SUPPORTED),
    }
}

/// Power smoothing, which has the former numbers of the slowdowns.
fn power_smoothing(driver: &Driver, id: c_uint) -> Result<Number, nvmlReturn_t> {
    let is_renumbered = (driver.world.driver_major().unwrap_or(0), driver.world.driver_minor()) >= RENUMBERED_SINCE;
    let former = NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN..NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN + 3;
    if is_renumbered && former.contains(&id) { Ok(Number::Int(0)) } else { Err(NOT_SUPPORTED) }
}

fn number(driver: &mut Driver, gpu: usize, id: c_uint, scope: c_uint) -> Result<Number, nvmlReturn_t> {
    match id {
        // The volatile counts are lower than the aggregate ones: they were cleared when the driver was loaded.
        NVML_FI_DEV_ECC_SBE_VOL_TOTAL | NVML_FI_DEV_ECC_DBE_VOL_TOTAL => {
            at(driver.world.ecc_errors(gpu), 0).map(|_| Number::Long(0))
        }
        NVML_FI_DEV_ECC_SBE_AGG_TOTAL => at(driver.world.ecc_errors(gpu), 0),
        NVML_FI_DEV_ECC_DBE_AGG_TOTAL => at(driver.world.ecc_errors(gpu), 1),
        NVML_FI_DEV_REMAPPED_COR..=NVML_FI_DEV_REMAPPED_FAILURE => {
            at(driver.world.remapped_rows(gpu), (id - NVML_FI_DEV_REMAPPED_COR) as usize)
        }
        NVML_FI_DEV_GET_GPU_RECOVERY_ACTION => recovery_action(driver, gpu),
        NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX => nvlink(driver, gpu, NvlinkFields::Throughput, true, scope),
        NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX => nvlink(driver, gpu, NvlinkFields::Throughput, false, scope),
        NVML_FI_DEV_NVLINK_COUNT_XMIT_BYTES => nvlink(driver, gpu, NvlinkFields::Count, true, scope),
        NVML_FI_DEV_NVLINK_COUNT_RCV_BYTES => nvlink(driver, gpu, NvlinkFields::Count, false, scope),
        NVML_FI_DEV_PCIE_COUNT_TX_BYTES => pcie(driver, gpu, true),
        NVML_FI_DEV_PCIE_COUNT_RX_BYTES => pcie(driver, gpu, false),
        NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION if *driver.world.energy(gpu) => {
            Ok(Number::Long(driver.energy_mj(gpu).map_err(failed)?))
        }
        _ => match timed_reason(driver, id) {
            Some(reason) => throttle_time(driver, gpu, reason),
            None => power_smoothing(driver, id),
        },
    }
}

nvml! {
    fn nvmlDeviceGetFieldValues(call, device: nvmlDevice_t, count: c_int, values: *mut nvmlFieldValue_t) {
        call.on(device, |d, gpu| {
            if values.is_null() {
                return Err(INVALID_ARGUMENT);
            }
            for at in 0..usize::try_from(count).map_err(|_| INVALID_ARGUMENT)? {
                // SAFETY: at < count, and the caller passes that many initialised elements.
                let field = unsafe { values.add(at) };
                let mut value = get(field)?;
                (value.timestamp, value.latencyUsec) = (d.now() as c_longlong, 0);
                match number(d, gpu, value.fieldId, value.scopeId) {
                    Ok(Number::Int(number)) => {
                        (value.valueType, value.value, value.nvmlReturn) = (UNSIGNED_INT, nvmlValue_t { uiVal: number }, 0);
                    }
                    Ok(Number::Long(number)) => {
                        let number = nvmlValue_t { ullVal: number as c_ulonglong };
                        (value.valueType, value.value, value.nvmlReturn) = (UNSIGNED_LONG_LONG, number, 0);
                    }
                    Err(code) => value.nvmlReturn = code,
                }
                put(field, value)?;
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{loads, world};

    const BEGUN: u64 = 1_000_000_000_000;

    /// Fields of the GPU, ten seconds after the world's begin.
    fn check(keys: &str, id: c_uint, scope: c_uint, expect: Result<Number, nvmlReturn_t>) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(loads::FILE), "").unwrap();
        std::fs::write(dir.path().join(world::FILE), format!("begun_us = {BEGUN}\n{keys}\n[[gpus]]\n")).unwrap();
        let mut driver = Driver::open(dir.path()).unwrap();
        driver.fixed_us = Some(BEGUN + 10_000_000);
        assert_eq!(number(&mut driver, 0, id, scope), expect, "{keys}: {id}");
    }

    #[test]
    fn fields_have_the_values_and_types_of_the_world() {
        let long = |number| Ok(Number::Long(number));
        check("", NVML_FI_DEV_ECC_DBE_AGG_TOTAL, 0, Err(NOT_SUPPORTED));
        check("ecc_errors = [12, 1]", NVML_FI_DEV_ECC_SBE_AGG_TOTAL, 0, long(12));
        check("ecc_errors = [12, 1]", NVML_FI_DEV_ECC_DBE_AGG_TOTAL, 0, long(1));
        check("ecc_errors = [12, 1]", NVML_FI_DEV_ECC_DBE_VOL_TOTAL, 0, long(0));
        check("remapped_rows = [3, 2, 1, 0]", NVML_FI_DEV_REMAPPED_COR, 0, long(3));
        check("remapped_rows = [3, 2, 0, 1]", NVML_FI_DEV_REMAPPED_FAILURE, 0, long(1));
        check("recovery_action = 'reset'", NVML_FI_DEV_GET_GPU_RECOVERY_ACTION, 0, Err(NOT_SUPPORTED));
        let newer = "driver_version = '570.1'\nrecovery_action = 'drain_and_reset'";
        check(newer, NVML_FI_DEV_GET_GPU_RECOVERY_ACTION, 0, Ok(Number::Int(4)));
        let nvlink = "nvlink_bytes_per_second = 6144000";
        check(nvlink, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, ALL_LINKS, long(60_000));
        check(nvlink, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, ALL_LINKS, long(30_000));
        check(nvlink, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, 0, long(10_000));
        check(nvlink, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, LINKS, Err(INVALID_ARGUMENT));
        check(nvlink, NVML_FI_DEV_NVLINK_COUNT_XMIT_BYTES, ALL_LINKS, Err(NOT_SUPPORTED));
        let fifth = "nvlink_bytes_per_second = 6144000\nnvlink_fields = 'count'";
        check(fifth, NVML_FI_DEV_NVLINK_COUNT_RCV_BYTES, ALL_LINKS, long(30_720_000));
        check(fifth, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, ALL_LINKS, Err(NOT_SUPPORTED));
        let throttled = "[[faults]]\nkind = 'throttle'\nfrom = '2s'\nlasts = '3s'\nreasons = 'sw_power_cap,hw_thermal'";
        check(throttled, 74, 0, long(3_000_000_000));
        check(throttled, 76, 0, long(0));
        check(&format!("throttle_times = 'frozen'\n{throttled}"), 74, 0, long(0));
        check(&format!("throttle_times = 'missing'\n{throttled}"), 74, 0, Err(NOT_SUPPORTED));
        let of = |version: &str| format!("driver_version = '{version}'\n{throttled}");
        check(throttled, 252, 0, Err(NOT_SUPPORTED));
        check(&of("580.65.06"), 252, 0, long(3_000_000_000));
        check(&of("580.65.06"), 270, 0, Err(NOT_SUPPORTED));
        check(&of("580.95.05"), 270, 0, long(3_000_000_000));
        check(&of("580.95.05"), 252, 0, Ok(Number::Int(0)));
        check("pcie_bytes_per_second = 1000000000", NVML_FI_DEV_PCIE_COUNT_TX_BYTES, 0, long(10_000_000_000));
        let narrow = "pcie_bytes_per_second = 1000000000\npcie_counter_bits = 32";
        check(narrow, NVML_FI_DEV_PCIE_COUNT_RX_BYTES, 0, Ok(Number::Int(705_032_704)));
    }
}
