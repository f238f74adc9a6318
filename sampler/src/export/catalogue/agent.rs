//! The agent itself: containers and their labels, kernel events, tables, modes.

use super::{Family, families};

families! {
    in Agent;
    CONTAINERS: Family::gauge("gpu_sampler_containers", "containers", &["state", "runtime"])
        .help("Number of live containers, with or without a GPU, by state of their labels and by runtime.")
        .absent("for combinations without a container");
    LABEL_MISSING: Family::gauge("gpu_sampler_label_missing", "containers", &["label"])
        .help("Number of live containers that lack a label that containers of their kind should have.");
    RESOLVE_SECONDS: Family::histogram("gpu_sampler_resolve_seconds", "seconds", &[])
        .help("Time from the creation of a container's cgroup to complete labels, in seconds.");
    SOURCE_UP: Family::gauge("gpu_sampler_source_up", "none", &["source", "endpoint"])
        .help("1 while a label source or the driver responds; 0 while it fails, or while a socket that was present or configured is \
               missing.")
        .absent("until the source is queried");
    RUNTIME_CALLS: Family::counter("gpu_sampler_runtime_calls_total", "queries", &["source", "outcome"])
        .help("Number of queries to sockets of container runtimes and the kubelet, by outcome.")
        .absent("until the first query with this outcome");
    FILE_READS: Family::counter("gpu_sampler_file_reads_total", "reads", &["source", "outcome"])
        .help("Number of lookups of files of label sources, by outcome.")
        .absent("until the first lookup with this outcome");
    KERNEL_EVENTS: Family::counter("gpu_sampler_kernel_events_total", "events", &["kind"])
        .help("Number of kernel events read, by kind.");
    KERNEL_EVENTS_LOST: Family::counter("gpu_sampler_kernel_events_lost_total", "events", &["kind"])
        .help("Number of kernel events that were not delivered, by kind: the ring buffer was full, a field could not be read, or the \
               kernel skipped the program.");
    KERNEL_SKIPS: Family::counter("gpu_sampler_kernel_skips_total", "runs", &[])
        .help("Number of program runs that the kernel skipped; part of gpu_sampler_kernel_events_lost_total. Includes runs for threads, \
               so the number of lost events may be smaller.");
    KERNEL_DRAIN_SECONDS: Family::counter("gpu_sampler_kernel_drain_seconds_total", "seconds", &[])
        .help("Processor time spent on reading kernel events into the tables, in seconds.");
    RESYNCS: Family::counter("gpu_sampler_resyncs_total", "scans", &[])
        .help("Number of resyncs: scans of all processes and cgroups after kernel events were lost.");
    RESYNC_REPAIRS: Family::counter("gpu_sampler_resync_repairs_total", "entries", &[])
        .help("Number of table entries that resyncs corrected.");
    LIVENESS_REPAIRS: Family::counter("gpu_sampler_liveness_repairs_total", "processes", &[])
        .help("Number of dead processes that the check against /proc removed although no kernel event was counted as lost.");
    IDENTITY_ENTRIES: Family::gauge("gpu_sampler_identity_entries", "entries", &["table"])
        .help("Number of entries of the identity tables.");
    IDENTITY_BYTES: Family::gauge("gpu_sampler_identity_bytes", "bytes", &["table"])
        .help("Memory of the identity tables, including spare capacity, in bytes.");
    IDENTITY_EVICTIONS: Family::counter("gpu_sampler_identity_evictions_total", "entries", &["table"])
        .help("Number of entries that were evicted early because the table was full.");
    INOTIFY_WATCHES: Family::gauge("gpu_sampler_inotify_watches", "watches", &[])
        .help("Number of inotify watches held; 0 outside kernel mode inotify.");
    IDENTIFY_SECONDS: Family::histogram("gpu_sampler_identify_seconds", "seconds", &[])
        .help("Time from the creation of a cgroup in the kernel to its entry in the tables, in seconds.");
    KERNEL_MODE: Family::gauge("gpu_sampler_kernel_mode", "none", &["mode"])
        .help("Method by which processes and cgroups are followed; value is always 1.");
    PID_SPACE: Family::gauge("gpu_sampler_pid_space", "none", &["state"])
        .help("Whether the PIDs that the driver reports are PIDs of this machine: local, foreign, unsettled or unverifiable; GPU time is \
               pid_unknown while foreign or unsettled. Value is always 1.");
    DEGRADED: Family::gauge("gpu_sampler_degraded", "none", &["condition"])
        .help("Condition in which the agent measures less than it could; /api/v1/live, the web page and the log describe it. Value is \
               always 1.")
        .absent("while the condition does not hold");
    HTTP_REJECTIONS: Family::counter("gpu_sampler_http_rejections_total", "requests", &["reason"])
        .help("Number of rejected connections and requests: plain_http on a port with TLS, tls_handshake, unauthorized, rate_limit or \
               foreign_host.");
    CERTIFICATE_EXPIRY: Family::gauge("gpu_sampler_web_certificate_expiry_timestamp_seconds", "seconds", &[])
        .help("Unix time when the certificate of the HTTP server expires, in seconds.")
        .absent("without TLS");
    OTLP_EXPORTS: Family::counter("gpu_sampler_otlp_exports_total", "requests", &["outcome"])
        .help("Number of requests to the OTLP receiver, by outcome: ok or error.")
        .absent("unless OTEL_EXPORTER_OTLP_ENDPOINT is set");
    BUILD_INFO: Family::gauge("gpu_sampler_build_info", "none", &["version", "commit"])
        .help("Version and commit of the running agent; value is always 1.");
}
