//! Driver calls: cost, errors, support, stalls and budgets.

use super::{Collector, Family, families};

const LABELS: &[&str] = &["uuid"];
const WITH_CALL: &[&str] = &["uuid", "call"];

families! {
    in Calls;
    CALL_SECONDS: Family::histogram("gpu_sampler_nvml_call_seconds", "seconds", WITH_CALL)
        .help("Duration of driver calls for the device, in seconds.")
        .absent("until the first call");
    ERRORS: Family::counter("gpu_sampler_nvml_errors_total", "calls", &["uuid", "call", "error"])
        .in_collector(Collector::Agent)
        .help("Number of driver calls for the device that failed, by error.")
        .absent("until the first call with this error");
    SUPPORTED: Family::gauge("gpu_sampler_nvml_supported", "none", WITH_CALL)
        .help("1 if the driver supports the call for the device, 0 if it does not.")
        .absent("until the call was made");
    STALLED: Family::gauge("gpu_sampler_nvml_stalled", "none", LABELS)
        .in_collector(Collector::Agent)
        .help("1 while a driver call for the GPU has not returned for 2 seconds, otherwise 0.")
        .absent("if the GPU has no sampling thread");
    SAMPLE_BUFFER: Family::gauge("gpu_sampler_sample_buffer_used", "none", LABELS)
        .in_collector(Collector::Agent)
        .help("1 while samples of the GPU are read from the driver's own buffer, 0 while they are read through NVML.")
        .absent("before the first poll, and for a GPU in MIG mode");
    POLL_INTERVAL: Family::gauge("gpu_sampler_poll_interval_seconds", "seconds", LABELS)
        .in_collector(Collector::Agent)
        .help("Interval between two polls of the driver's samples of the GPU, in seconds.")
        .absent("before the first poll");
    BUSY: Family::gauge("gpu_sampler_nvml_busy_ratio", "ratio", LABELS)
        .help("Share of the past 30 seconds that was spent in driver calls for the GPU, from 0 to 1.")
        .absent("until it is measured");
    CPU: Family::gauge("gpu_sampler_gpu_cpu_ratio", "ratio", LABELS)
        .help("Processor time spent on reading the GPU in the past 30 seconds, as a share of one processor.")
        .absent("until it is measured");
    CPU_BUDGET: Family::gauge("gpu_sampler_gpu_budget_ratio", "ratio", &[])
        .in_collector(Collector::Agent)
        .help("Limit of the processor time for reading one GPU, as a share of one processor: gpu_budget_percent.");
    WAIT_BUDGET: Family::gauge("gpu_sampler_gpu_wait_budget_ratio", "ratio", &[])
        .in_collector(Collector::Agent)
        .help("Limit of the share of time spent in driver calls for one GPU: gpu_wait_percent.");
}
