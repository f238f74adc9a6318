//! GPU time, memory and contention of containers.

use super::{Collector, Family, families};

/// Of a container and a GPU.
const LABELS: &[&str] = &["uuid", "gpu_uuid", "namespace", "pod", "container", "container_id"];
/// Of a container and a GPU that is not a MIG device.
const ON_WHOLE_GPU: &[&str] = &["uuid", "namespace", "pod", "container", "container_id"];
const WITH_ENGINE: &[&str] = &["uuid", "gpu_uuid", "namespace", "pod", "container", "container_id", "engine"];
const WITH_SOURCE: &[&str] = &["uuid", "gpu_uuid", "namespace", "pod", "container", "container_id", "source"];
const WITH_CONTENDER: &[&str] = &[
    "uuid",
    "gpu_uuid",
    "namespace",
    "pod",
    "container",
    "container_id",
    "other_namespace",
    "other_pod",
    "other_container",
    "other_container_id",
];

families! {
    in Containers;
    SECONDS: Family::counter("container_gpu_seconds_total", "seconds", LABELS)
        .help("GPU time credited to the container, in seconds.")
        .absent("until the labels of the container are settled")
        .starts_at_zero();
    SECONDS_STDERR: Family::gauge("container_gpu_seconds_stderr", "seconds", LABELS)
        .in_collector(Collector::Precision)
        .help("One standard error of container_gpu_seconds_total, in seconds.")
        .absent("if container_gpu_seconds_total is")
        .starts_at_zero();
    SAMPLES: Family::counter("container_gpu_samples_total", "samples", LABELS)
        .in_collector(Collector::Samples)
        .help("Number of driver samples behind container_gpu_seconds_total.")
        .absent("if container_gpu_seconds_total is")
        .starts_at_zero();
    ENERGY: Family::counter("container_gpu_energy_joules_total", "joules", ON_WHOLE_GPU)
        .help("Energy of the GPU that is attributed to the container by its GPU time, without what the GPU draws when idle, in joules. \
               Follows the GPU time by 11 seconds and the interval of readings.")
        .absent("if gpu_energy_joules_total was never reported, and for MIG devices")
        .starts_at_zero();
    UTILIZATION: Family::gauge("container_gpu_utilization_ratio", "ratio", LABELS)
        .in_collector(Collector::Precision)
        .help("Share of the past 10 seconds in which the container kept the GPU busy, from 0 to 1.")
        .absent("if nothing of these 10 seconds was observed");
    UTILIZATION_STDERR: Family::gauge("container_gpu_utilization_stderr_ratio", "ratio", LABELS)
        .in_collector(Collector::Precision)
        .help("One standard error of container_gpu_utilization_ratio, in the same unit.")
        .absent("if container_gpu_utilization_ratio is");
    WINDOW_SHARE: Family::histogram("container_gpu_window_share_ratio", "ratio", LABELS)
        .in_collector(Collector::Shares)
        .help("Share of wall time that is credited to the container, from 0 to 1, observed once per window of 10 seconds.")
        .absent("before the first complete window")
        .starts_at_zero();
    ENGINE_SECONDS: Family::counter("container_gpu_engine_seconds_total", "seconds", WITH_ENGINE)
        .in_collector(Collector::Engines)
        .help("Time of the engines other than compute that is credited to the container, in seconds. \
               The driver samples each engine separately.")
        .absent("until the container uses the engine")
        .starts_at_zero();
    COACTIVE_SECONDS: Family::counter("container_gpu_coactive_seconds_total", "seconds", LABELS)
        .help("Time in which the container and another user were active on the same GPU, in seconds. Too small where \
               gpu_sampler_queried_samples_total grows much slower than gpu_sampler_samples_total.")
        .absent("if container_gpu_seconds_total is")
        .starts_at_zero();
    HELD_IDLE_SECONDS: Family::counter("container_gpu_held_idle_seconds_total", "seconds", LABELS)
        .in_collector(Collector::Holding)
        .help("Time in which the container held the GPU and did not use it, in seconds: the GPU was assigned to it, or a process of \
               it was listed by the driver, and it had no sample in that second; where samples \
               name no process, the time beyond its GPU time. As exact as the interval between scrapes.")
        .absent("if container_gpu_seconds_total is")
        .starts_at_zero();
    CONTENTION_SECONDS: Family::counter("container_gpu_contention_seconds_total", "seconds", WITH_CONTENDER)
        .in_collector(Collector::Contenders)
        .help("GPU time that another user received while the container was active and the GPU was saturated, in seconds. Too small \
               where gpu_sampler_queried_samples_total grows much slower than gpu_sampler_samples_total.")
        .absent("until there is a contender with settled labels")
        .starts_at_zero();
    CONTENDER_PRESSURE: Family::gauge("container_gpu_contender_pressure_ratio", "ratio", WITH_CONTENDER)
        .in_collector(Collector::Contenders)
        .help("Part of container_gpu_pressure_ratio, of the same ten seconds, that is attributed to another user of this GPU (0-1): the \
               excess of waiting while the GPU was saturated, divided over the others by the GPU time they got then. The sum over GPUs and \
               others is at most the pressure. 0: no pressure by it now.")
        .absent("if container_gpu_pressure_ratio is, or until there is a contender with settled labels");
    MEMORY_USED: Family::gauge("container_gpu_memory_used_bytes", "bytes", LABELS)
        .help("GPU memory held by the processes of the container, in bytes.")
        .absent("if the driver does not report it");
    MPS_CLIENTS: Family::gauge("container_gpu_mps_clients", "processes", LABELS)
        .help("Number of processes of the container that share the GPU through the multi-process service (MPS); samples do not \
               distinguish them.")
        .absent("if there are none");
    ASSIGNED: Family::gauge("container_gpu_assigned", "none", WITH_SOURCE)
        .help("Whether this GPU, or a part of it, is assigned to the container, and where that is known from; value is always 1.")
        .absent("if it has not");
    INFO: Family::gauge("container_gpu_info", "none", &["container_id", "image", "name", "runtime", "pod_uid", "id"])
        .help("Image, name, runtime, pod UID and cgroup path of the container with this container_id; value is always 1.")
        .absent("until the labels of the container are settled");
}
