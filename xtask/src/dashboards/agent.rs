//! Whether the agents measure well: what they lack, lose and cost.

use super::model::{Dashboard, Panel, PanelGroup, Thresholds};

const HERE: &str = "instance=~\"$instance\"";

pub fn dashboard() -> Dashboard {
    Dashboard {
        name: "agent",
        title: "GPU agent health",
        description: "The agents themselves: conditions, labels, kernel events, driver calls, cost, sessions, scrapes.",
        variables: vec![("instance", "label_values(gpu_sampler_build_info, instance)")],
        rows: vec![overview(), labels(), kernel(), driver(), cost()],
    }
}

fn rate(by: &str, name: &str) -> String {
    format!("sum by ({by}) (rate({name}{{{HERE}}}[$__rate_interval]))")
}

fn quantile(q: &str, by: &str, name: &str) -> String {
    format!("histogram_quantile({q}, sum by ({by}, le) (rate({name}_bucket{{{HERE}}}[$__rate_interval])))")
}

fn overview() -> PanelGroup {
    let panels = vec![
        Panel::stat("Agents", "none", "Agents that Prometheus scrapes.")
            .query(format!("count(gpu_sampler_build_info{{{HERE}}})"), ""),
        Panel::stat("Conditions", "none", "Conditions in which an agent measures less than it could.")
            .thresholds(Thresholds::AboveZero)
            .query(format!("count(gpu_sampler_degraded{{{HERE}}}) or vector(0)"), ""),
        Panel::stat("Failing sources", "none", "Label sources, or the driver, that do not respond.")
            .thresholds(Thresholds::AboveZero)
            .query(format!("count(gpu_sampler_source_up{{{HERE}}} == 0) or vector(0)"), ""),
        Panel::stat("Hanging driver calls", "none", "GPUs with a driver call that has not returned for 2 seconds.")
            .thresholds(Thresholds::AboveZero)
            .query(format!("sum(gpu_sampler_nvml_stalled{{{HERE}}})"), ""),
        Panel::stat("Queried samples", "percentunit", "Samples of which the process was requested, as a part of all samples.")
            .ratio()
            .query(
                format!(
                    "sum(rate(gpu_sampler_queried_samples_total{{{HERE}}}[$__rate_interval])) \
                     / sum(rate(gpu_sampler_samples_total{{{HERE}}}[$__rate_interval]))"
                ),
                "",
            ),
        Panel::table("Conditions in force", "none", "/api/v1/live, the page of the agent and its log describe each.")
            .query(format!("max by (instance, condition) (gpu_sampler_degraded{{{HERE}}})"), ""),
        Panel::table("Versions", "none", "Version, kernel mode and PID space are one series each.")
            .query(format!("count by (version, commit) (gpu_sampler_build_info{{{HERE}}})"), ""),
        Panel::table("Kernel mode", "none", "Anything but raw_tracepoint loses processes that have ended: docs/operation.md.")
            .query(format!("count by (mode) (gpu_sampler_kernel_mode{{{HERE}}})"), ""),
        Panel::table("PID space", "none", "foreign: the driver belongs to another kernel, and GPU time is pid_unknown.")
            .query(format!("count by (state) (gpu_sampler_pid_space{{{HERE}}})"), ""),
    ];
    PanelGroup { title: "Overview", panels }
}

fn labels() -> PanelGroup {
    let panels = vec![
        Panel::stacked("Containers by state of their labels", "none", "Live containers, with or without a GPU.")
            .query(format!("sum by (state, runtime) (gpu_sampler_containers{{{HERE}}})"), "{{state}} {{runtime}}"),
        Panel::series("Containers without a label", "none", "Live containers that lack a label that their kind should have.")
            .thresholds(Thresholds::AboveZero)
            .query(format!("sum by (instance, label) (gpu_sampler_label_missing{{{HERE}}})"), "{{instance}} {{label}}"),
        Panel::table("Sources", "none", "1 while the source responds, 0 while it fails.")
            .query(format!("min by (instance, source, endpoint) (gpu_sampler_source_up{{{HERE}}})"), ""),
        Panel::series("Time to complete labels", "s", "From the creation of the cgroup of a container.")
            .query(quantile("0.5", "instance", "gpu_sampler_resolve_seconds"), "median {{instance}}")
            .query(quantile("0.95", "instance", "gpu_sampler_resolve_seconds"), "95 % {{instance}}"),
        Panel::series("Queries of runtime sockets", "cps", "Queries by source and outcome.")
            .query(rate("source, outcome", "gpu_sampler_runtime_calls_total"), "{{source}} {{outcome}}"),
        Panel::series("Lookups of runtime files", "cps", "Lookups by source and outcome.")
            .query(rate("source, outcome", "gpu_sampler_file_reads_total"), "{{source}} {{outcome}}"),
    ];
    PanelGroup { title: "Labels", panels }
}

fn kernel() -> PanelGroup {
    let panels = vec![
        Panel::series("Kernel events", "cps", "Events read, by kind.")
            .query(rate("kind", "gpu_sampler_kernel_events_total"), "{{kind}}"),
        Panel::series("Lost kernel events", "cps", "Events that were not delivered, by kind; a scan repairs the tables.")
            .thresholds(Thresholds::AboveZero)
            .query(rate("instance, kind", "gpu_sampler_kernel_events_lost_total"), "{{instance}} {{kind}}"),
        Panel::series(
            "Scans and repairs",
            "cps",
            "Scans after lost events, entries that they corrected, dead processes found by the check.",
        )
        .query(rate("instance", "gpu_sampler_resyncs_total"), "scans {{instance}}")
        .query(rate("instance", "gpu_sampler_resync_repairs_total"), "corrected {{instance}}")
        .query(rate("instance", "gpu_sampler_liveness_repairs_total"), "dead {{instance}}"),
        Panel::series(
            "Time to identify a cgroup",
            "s",
            "From its creation in the kernel to its entry in the tables; 95th percentile.",
        )
        .query(quantile("0.95", "instance", "gpu_sampler_identify_seconds"), "{{instance}}"),
        Panel::series("Identity tables", "none", "Entries of living and ended processes, and of cgroups.")
            .query(format!("sum by (instance, table) (gpu_sampler_identity_entries{{{HERE}}})"), "{{instance}} {{table}}"),
        Panel::series("Early evictions", "cps", "Entries that were evicted because a table was full.")
            .thresholds(Thresholds::AboveZero)
            .query(rate("instance, table", "gpu_sampler_identity_evictions_total"), "{{instance}} {{table}}"),
    ];
    PanelGroup { title: "Kernel", panels }
}

fn driver() -> PanelGroup {
    let panels = vec![
        Panel::series("Samples", "cps", "Samples of a device that are accounted for.")
            .query(rate("instance, uuid", "gpu_sampler_samples_total"), "{{instance}} {{uuid}}"),
        Panel::series("Sample gaps", "cps", "Samples were lost between two polls.")
            .thresholds(Thresholds::AboveZero)
            .query(rate("instance, uuid", "gpu_sampler_sample_gaps_total"), "{{instance}} {{uuid}}"),
        Panel::series("Rejected samples", "cps", "Device and process samples that violate the driver's own rules.")
            .query(rate("uuid, reason", "gpu_sampler_rejected_samples_total"), "{{uuid}} {{reason}}"),
        Panel::series("Failed driver calls", "cps", "By call and error.")
            .thresholds(Thresholds::AboveZero)
            .query(rate("uuid, call, error", "gpu_sampler_nvml_errors_total"), "{{uuid}} {{call}} {{error}}"),
        Panel::series("Duration of driver calls", "s", "95th percentile by call.")
            .query(quantile("0.95", "call", "gpu_sampler_nvml_call_seconds"), "{{call}}"),
        Panel::series("Poll interval", "s", "Interval between two polls of the samples of a device.")
            .query(format!("max by (instance, uuid) (gpu_sampler_poll_interval_seconds{{{HERE}}})"), "{{instance}} {{uuid}}"),
    ];
    PanelGroup { title: "Driver", panels }
}

fn cost() -> PanelGroup {
    let budget = |name: &str| format!("max({name}{{{HERE}}})");
    let panels = vec![
        Panel::series("Processor time per GPU", "percentunit", "As a part of one processor, and the limit gpu_budget_percent.")
            .query(format!("max by (instance, uuid) (gpu_sampler_gpu_cpu_ratio{{{HERE}}})"), "{{instance}} {{uuid}}")
            .query(budget("gpu_sampler_gpu_budget_ratio"), "limit"),
        Panel::series("Time in driver calls per GPU", "percentunit", "As a part of wall time, and the limit gpu_wait_percent.")
            .query(format!("max by (instance, uuid) (gpu_sampler_nvml_busy_ratio{{{HERE}}})"), "{{instance}} {{uuid}}")
            .query(budget("gpu_sampler_gpu_wait_budget_ratio"), "limit"),
        Panel::series(
            "Processor time for kernel events",
            "percentunit",
            "Reading kernel events into the tables, as a part of one processor.",
        )
        .query(rate("instance", "gpu_sampler_kernel_drain_seconds_total"), "{{instance}}"),
        Panel::series("Memory of tables and lookback", "bytes", "Identity tables, and facts kept for the lookback of sessions.")
            .query(format!("sum by (instance) (gpu_sampler_identity_bytes{{{HERE}}})"), "tables {{instance}}")
            .query(format!("max by (instance) (gpu_sampler_session_ring_bytes{{{HERE}}})"), "lookback {{instance}}"),
        Panel::series("Sessions", "none", "Sessions by state, including those of earlier runs.")
            .query(format!("sum by (state) (gpu_sampler_sessions{{{HERE}}})"), "{{state}}"),
        Panel::series("Missing session frames", "cps", "Frames missing in session files because the disk was too slow.")
            .thresholds(Thresholds::AboveZero)
            .query(rate("instance", "gpu_sampler_session_dropped_frames_total"), "{{instance}}"),
        Panel::series("Uploads of sessions", "cps", "To the object store, by outcome; absent without one.")
            .query(rate("outcome", "gpu_sampler_session_uploads_total"), "{{outcome}}"),
        Panel::series("Duration of scrapes", "s", "As Prometheus measures it.").query(
            format!("scrape_duration_seconds * on (job, instance) group_left () gpu_sampler_build_info{{{HERE}}}"),
            "{{instance}}",
        ),
        Panel::series(
            "Rejected requests",
            "cps",
            "Connections and requests without valid credentials, protocol or Host, by reason.",
        )
        .query(rate("reason", "gpu_sampler_http_rejections_total"), "{{reason}}"),
        Panel::series("Series per scrape", "none", "As Prometheus counts them.").query(
            format!("scrape_samples_scraped * on (job, instance) group_left () gpu_sampler_build_info{{{HERE}}}"),
            "{{instance}}",
        ),
    ];
    PanelGroup { title: "Cost", panels }
}
