//! GPU time, memory and contention of jobs, units and login sessions.

use super::{Collector, Family, families};

/// Of a user and a GPU.
const LABELS: &[&str] = &["uuid", "gpu_uuid", "kind", "user"];
/// Of a user and a GPU that is not a MIG device.
const ON_WHOLE_GPU: &[&str] = &["uuid", "kind", "user"];
const WITH_ENGINE: &[&str] = &["uuid", "gpu_uuid", "kind", "user", "engine"];
const WITH_CONTENDER: &[&str] =
    &["uuid", "gpu_uuid", "kind", "user", "other_namespace", "other_pod", "other_container", "other_container_id"];
const INFO_LABELS: &[&str] = &[
    "kind",
    "user",
    "scheduler",
    "job_id",
    "job_name",
    "uid",
    "user_name",
    "partition",
    "unit",
    "container_id",
    "namespace",
    "pod",
    "id",
];

families! {
    in Users;
    SECONDS: Family::counter("gpu_user_seconds_total", "seconds", LABELS)
        .help("GPU time credited to the job, unit or login session (kind), in seconds. Containers and pods have \
               container_gpu_seconds_total instead.")
        .absent("until the user uses the GPU")
        .starts_at_zero();
    SECONDS_STDERR: Family::gauge("gpu_user_seconds_stderr", "seconds", LABELS)
        .in_collector(Collector::Precision)
        .help("One standard error of gpu_user_seconds_total, in seconds.")
        .absent("if gpu_user_seconds_total is")
        .starts_at_zero();
    SAMPLES: Family::counter("gpu_user_samples_total", "samples", LABELS)
        .in_collector(Collector::Samples)
        .help("Number of driver samples behind gpu_user_seconds_total.")
        .absent("if gpu_user_seconds_total is")
        .starts_at_zero();
    ENERGY: Family::counter("gpu_user_energy_joules_total", "joules", ON_WHOLE_GPU)
        .help("Energy of the GPU that is attributed to the job, unit or login session by its GPU time, without what the GPU draws when \
               idle, in joules.")
        .absent("if gpu_energy_joules_total was never reported, and for MIG devices")
        .starts_at_zero();
    UTILIZATION: Family::gauge("gpu_user_utilization_ratio", "ratio", LABELS)
        .in_collector(Collector::Precision)
        .help("Share of the past 10 seconds in which the job, unit or login session kept the GPU busy, from 0 to 1.")
        .absent("if nothing of these 10 seconds was observed");
    UTILIZATION_STDERR: Family::gauge("gpu_user_utilization_stderr_ratio", "ratio", LABELS)
        .in_collector(Collector::Precision)
        .help("One standard error of gpu_user_utilization_ratio, in the same unit.")
        .absent("if gpu_user_utilization_ratio is");
    WINDOW_SHARE: Family::histogram("gpu_user_window_share_ratio", "ratio", LABELS)
        .in_collector(Collector::Shares)
        .help("Share of wall time that is credited to the job, unit or login session, from 0 to 1, observed once per window of 10 seconds.")
        .absent("before the first complete window")
        .starts_at_zero();
    ENGINE_SECONDS: Family::counter("gpu_user_engine_seconds_total", "seconds", WITH_ENGINE)
        .in_collector(Collector::Engines)
        .help("Time of the engines other than compute that is credited to the job, unit or login session, in seconds.")
        .absent("until the user uses the engine")
        .starts_at_zero();
    COACTIVE_SECONDS: Family::counter("gpu_user_coactive_seconds_total", "seconds", LABELS)
        .help("Time in which the job, unit or login session and another user were active on the same GPU, in seconds.")
        .absent("if gpu_user_seconds_total is")
        .starts_at_zero();
    HELD_IDLE_SECONDS: Family::counter("gpu_user_held_idle_seconds_total", "seconds", LABELS)
        .in_collector(Collector::Holding)
        .help("Time in which the job, unit or login session held the GPU and did not use it, in seconds: a process of \
               it was listed by the driver, and it had no sample in that second; where samples \
               name no process, the time beyond its GPU time. As exact as the interval between scrapes.")
        .absent("if gpu_user_seconds_total is")
        .starts_at_zero();
    CONTENTION_SECONDS: Family::counter("gpu_user_contention_seconds_total", "seconds", WITH_CONTENDER)
        .in_collector(Collector::Contenders)
        .help("GPU time that another user received while the job, unit or login session was active and the GPU was saturated, in seconds. \
               The labels of the other user are those of container_gpu_contention_seconds_total.")
        .absent("until there is a contender")
        .starts_at_zero();
    MEMORY_USED: Family::gauge("gpu_user_memory_used_bytes", "bytes", LABELS)
        .help("GPU memory held by the processes of the job, unit or login session, in bytes.")
        .absent("if the driver does not report it");
    MPS_CLIENTS: Family::gauge("gpu_user_mps_clients", "processes", LABELS)
        .help("Number of processes of the job, unit or login session that share the GPU through the multi-process service (MPS).")
        .absent("if there are none");
    INFO: Family::gauge("gpu_user_info", "none", INFO_LABELS)
        .help("What the user stands for: scheduler, id, name and partition (or queue) of a job, owner, unit, the container, namespace and \
               pod around a job, and the path of the cgroup; value is always 1. Name, partition and user name of a job are from the \
               environment of its processes.")
        .absent("if gpu_user_seconds_total is");
}
