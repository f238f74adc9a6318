//! Waiting of containers for their GPUs, from wait probes. Not of a single GPU, so without `uuid`.

use super::{Family, families};
use crate::collectors::Collector;

const CONTAINER: &[&str] = &["namespace", "pod", "container", "container_id"];
const WITHOUT_PROBES: &str = "if no process of the container had wait probes";

families! {
    in Containers;
    WAIT_SECONDS: Family::counter("container_gpu_wait_seconds_total", "seconds", CONTAINER)
        .help("Time in which at least one thread of a process was inside a blocking call of the CUDA driver library, in seconds, summed over \
               the processes of the container.")
        .absent(WITHOUT_PROBES)
        .without_created()
        .starts_at_zero();
    WAIT_PROBED_SECONDS: Family::counter("container_gpu_wait_probed_seconds_total", "seconds", CONTAINER)
        .help("Time in which processes had wait probes, in seconds, summed over the processes of the container.")
        .absent(WITHOUT_PROBES)
        .without_created()
        .starts_at_zero();
    PRESSURE_RATIO: Family::gauge("container_gpu_pressure_ratio", "ratio", CONTAINER)
        .help("Part of the probed time of ten seconds, which ended 15 s ago, that the container waited in blocking calls beyond its own GPU \
               time and beyond what it waits when no other user is active (0-1).")
        .absent("without wait probes, or until the container was alone on its GPUs for five seconds");
    PRESSURE_STDERR: Family::gauge("container_gpu_pressure_stderr_ratio", "ratio", CONTAINER)
        .help("Standard error of container_gpu_pressure_ratio, from how much its windows of a second and those alone differ.")
        .absent("if container_gpu_pressure_ratio is, or for its first window");
    PROBED_PROCESSES: Family::gauge("gpu_sampler_wait_probed_processes", "processes", &[])
        .help("Number of processes that have wait probes.")
        .in_collector(Collector::Agent);
}
