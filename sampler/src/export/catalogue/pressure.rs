//! Time for which containers with a GPU waited for another resource. Not of a single GPU, so without `uuid`.

use super::{Family, families};

families! {
    in Pressure;
    CPU_THROTTLED_SECONDS: Family::counter(
        "container_gpu_cpu_throttled_seconds_total", "seconds", &["namespace", "pod", "container", "container_id"])
        .help("Time for which the CPU quota of the container or of its pod throttled the container, in seconds.")
        .absent("if the cgroup does not report it")
        .without_created()
        .starts_at_zero();
    PRESSURE_SECONDS: Family::counter(
        "container_gpu_pressure_seconds_total", "seconds", &["namespace", "pod", "container", "container_id", "resource"])
        .help("Time in which at least one process of the container waited for the resource, in seconds (PSI, some).")
        .absent("if the cgroup does not report it")
        .without_created()
        .starts_at_zero();
    READS: Family::counter("gpu_sampler_pressure_reads_total", "reads", &["outcome"])
        .help("Number of reads of cgroup files for the CPU quota and the pressure of containers, by outcome.");
    READ_SECONDS: Family::counter("gpu_sampler_pressure_read_seconds_total", "seconds", &[])
        .help("Time spent on the reads of gpu_sampler_pressure_reads_total, in seconds.");
}
