//! Devices: identity, time, readings and events.

use super::{Collector, DEVICE, Family, IN_MIG_MODE, families};

/// Of a GPU or a MIG device.
const WITH_ENGINE: &[&str] = &["uuid", "gpu_uuid", "engine"];
const WITH_REASON: &[&str] = &["uuid", "gpu_uuid", "reason"];

const WITH_TYPE: &[&str] = &["uuid", "gpu_uuid", "type"];

const UNREPORTED_NARROW_OR_GONE: &str =
    "if the driver does not report it, as long as its counter has not exceeded 32 bits, and if the GPU is gone";
const UNREPORTED_OR_GONE: &str = "if the driver does not report it, and if the GPU is gone";

families! {
    in Gpus;
    INFO: Family::gauge(
        "gpu_info", "none", &["uuid", "gpu_uuid", "index", "model", "pci_bus_id", "driver_version", "mig_mode"])
        .help("Model, PCI bus id, driver version and MIG mode of the GPU; value is always 1.")
        .absent("if the GPU is gone");
    TIME_SECONDS: Family::counter("gpu_time_seconds_total", "seconds", &["uuid", "gpu_uuid", "state"])
        .help("Time of the GPU by state, in seconds. The states sum to the wall time in which the GPU was present, except for \
               samples that are not settled yet.")
        .absent(IN_MIG_MODE)
        .starts_at_zero();
    CREDITED_SECONDS: Family::counter("gpu_credited_seconds_total", "seconds", &["uuid", "gpu_uuid", "namespace", "kind"])
        .help("GPU time credited to the users of this kind (container, pod, job, unit or login) in the namespace, in seconds. Continues \
               after they end.")
        .absent("until such a user with settled labels uses the GPU, and for a GPU in MIG mode")
        .starts_at_zero();
    UNATTRIBUTED_SECONDS: Family::counter("gpu_unattributed_seconds_total", "seconds", WITH_REASON)
        .help("Busy time of the GPU that is not credited to a user, in seconds, by reason.")
        .absent(IN_MIG_MODE)
        .starts_at_zero();
    UNATTRIBUTED_ENERGY: Family::counter("gpu_unattributed_energy_joules_total", "joules", &["uuid", "reason"])
        .help("Energy of the GPU that is not attributed to a user, in joules, by reason; idle is what the GPU draws when idle. With \
               container_gpu_energy_joules_total and gpu_user_energy_joules_total it sums to the increase of gpu_energy_joules_total.")
        .absent("if gpu_energy_joules_total was never reported, for MIG devices, and for a GPU in MIG mode")
        .starts_at_zero();
    ENGINE_SECONDS: Family::counter("gpu_engine_seconds_total", "seconds", WITH_ENGINE)
        .in_collector(Collector::Engines)
        .help("Busy time of the engines other than compute, in seconds. The driver samples each engine separately.")
        .absent("if the driver does not sample the engine, and for a GPU in MIG mode")
        .starts_at_zero();
    ENGINE_UNATTRIBUTED_SECONDS: Family::counter("gpu_engine_unattributed_seconds_total", "seconds", WITH_ENGINE)
        .in_collector(Collector::Engines)
        .help("Busy time in gpu_engine_seconds_total that is not credited to a user, in seconds.")
        .absent("if gpu_engine_seconds_total is")
        .starts_at_zero();
    UTILIZATION: Family::gauge("gpu_utilization_ratio", "ratio", DEVICE)
        .help("Busy share of the past 10 seconds of the GPU, from 0 to 1.")
        .absent("if nothing of these 10 seconds was observed, and for a GPU in MIG mode");
    MEMORY_USED: Family::gauge("gpu_memory_used_bytes", "bytes", DEVICE)
        .help("Device memory in use, in bytes.")
        .absent("if the driver does not report it, and for a GPU in MIG mode");
    MEMORY_TOTAL: Family::gauge("gpu_memory_total_bytes", "bytes", DEVICE)
        .help("Total device memory, in bytes.")
        .absent("if the driver does not report it, and for a GPU in MIG mode");
    POWER: Family::gauge("gpu_power_watts", "watts", DEVICE)
        .help("Power draw of the GPU, in watts.")
        .absent(UNREPORTED_OR_GONE);
    ENERGY: Family::counter("gpu_energy_joules_total", "joules", DEVICE)
        .help("Energy that the GPU consumed since the driver was loaded, in joules.")
        .absent(UNREPORTED_OR_GONE)
        .without_created();
    TEMPERATURE: Family::gauge("gpu_temperature_celsius", "degrees Celsius", DEVICE)
        .help("Core temperature of the GPU, in degrees Celsius.")
        .absent(UNREPORTED_OR_GONE);
    SM_CLOCK: Family::gauge("gpu_sm_clock_hertz", "hertz", DEVICE)
        .help("SM clock of the GPU, in hertz.")
        .absent(UNREPORTED_OR_GONE);
    ECC_ERRORS: Family::counter("gpu_ecc_errors_total", "errors", WITH_TYPE)
        .help("Number of ECC errors of the GPU over the life of the board (the driver's aggregate counts), by type: corrected or \
               uncorrected. They decrease only if they are cleared by hand.")
        .absent(UNREPORTED_OR_GONE)
        .without_created();
    REMAPPED_ROWS: Family::counter("gpu_remapped_rows_total", "rows", WITH_TYPE)
        .help("Number of memory rows that were replaced over the life of the board, by the type of error: correctable or uncorrectable.")
        .absent(UNREPORTED_OR_GONE)
        .without_created();
    ROW_REMAP_PENDING: Family::gauge("gpu_row_remap_pending", "none", DEVICE)
        .help("Whether a memory row will be replaced at the next reset of the GPU: 1 or 0.")
        .absent(UNREPORTED_OR_GONE);
    ROW_REMAP_FAILURE: Family::gauge("gpu_row_remap_failure", "none", DEVICE)
        .help("Whether a memory row could not be replaced: 1 or 0. The board has to be replaced then.")
        .absent(UNREPORTED_OR_GONE);
    RECOVERY_ACTION: Family::gauge("gpu_recovery_action", "none", &["uuid", "gpu_uuid", "action"])
        .help("Action that the driver requires for the recovery of the GPU; value is always 1.")
        .absent(UNREPORTED_OR_GONE);
    NVLINK_TRANSMIT: Family::counter("gpu_nvlink_transmit_bytes_total", "bytes", DEVICE)
        .help("Bytes that the GPU sent over all its NVLinks since the driver was loaded.")
        .absent(UNREPORTED_OR_GONE)
        .without_created();
    NVLINK_RECEIVE: Family::counter("gpu_nvlink_receive_bytes_total", "bytes", DEVICE)
        .help("Bytes that the GPU received over all its NVLinks since the driver was loaded.")
        .absent(UNREPORTED_OR_GONE)
        .without_created();
    PCIE_TRANSMIT: Family::counter("gpu_pcie_transmit_bytes_total", "bytes", DEVICE)
        .help("Bytes that the GPU sent over PCIe since the driver was loaded.")
        .absent(UNREPORTED_NARROW_OR_GONE)
        .without_created();
    PCIE_RECEIVE: Family::counter("gpu_pcie_receive_bytes_total", "bytes", DEVICE)
        .help("Bytes that the GPU received over PCIe since the driver was loaded.")
        .absent(UNREPORTED_NARROW_OR_GONE)
        .without_created();
    THROTTLE_SECONDS: Family::counter("gpu_throttle_seconds_total", "seconds", WITH_REASON)
        .help("Time in which this reason limited the clocks of the GPU, in seconds. By the driver's own counter for the software power cap, \
               sync boost, the thermal slowdowns and the power brake, where it has one; else the reasons in force are read once a second, and \
               once a minute where driver calls are slow.")
        .absent("if the driver does not report reasons")
        .starts_at_zero();
    XID_ERRORS: Family::counter("gpu_xid_errors_total", "errors", &["uuid", "gpu_uuid", "xid"])
        .help("Number of XID errors that the driver reported for the GPU.")
        .absent("until the first error with this XID")
        .starts_at_zero();
}
