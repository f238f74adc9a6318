//! All nodes: how many GPUs are used, by which namespaces, and what needs attention.

use super::model::{Dashboard, Panel, PanelGroup, Thresholds};

pub fn dashboard() -> Dashboard {
    Dashboard {
        name: "fleet",
        title: "GPU fleet",
        description: "All GPUs of all nodes: use, users, time without a user, hardware that needs attention.",
        variables: vec![("namespace", "label_values(gpu_credited_seconds_total, namespace)")],
        rows: vec![overview(), time(), users(), hardware()],
    }
}

fn overview() -> PanelGroup {
    let panels = vec![
        Panel::stat("Nodes", "none", "Agents that Prometheus scrapes.").query("count(gpu_sampler_build_info)", ""),
        Panel::stat("Devices", "none", "GPUs, and MIG devices in place of the GPUs that are divided into them.")
            .query("count(gpu_time_seconds_total{state=\"busy\"})", ""),
        Panel::stat("Devices in use", "none", "Devices that are busy, on average of the interval: the sum of busy shares.")
            .query("sum(rate(gpu_time_seconds_total{state=\"busy\"}[$__rate_interval]))", ""),
        Panel::stat("Busy share", "percentunit", "Busy time as a part of the time of all devices.").ratio().query(
            "sum(rate(gpu_time_seconds_total{state=\"busy\"}[$__rate_interval])) / sum(rate(gpu_time_seconds_total[$__rate_interval]))",
            "",
        ),
        Panel::stat(
            "Unattributed share of busy time",
            "percentunit",
            "Busy time without a user, as a part of all busy time; processes of the host are users here.",
        )
        .ratio()
        .thresholds(Thresholds::High(0.05, 0.2))
        .query(
            "sum(rate(gpu_unattributed_seconds_total{reason!=\"host\"}[$__rate_interval])) \
             / sum(rate(gpu_time_seconds_total{state=\"busy\"}[$__rate_interval]))",
            "",
        ),
        Panel::stat("Unobserved share", "percentunit", "Time of which nothing is known, as a part of the time of all devices.")
            .ratio()
            .thresholds(Thresholds::High(0.01, 0.1))
            .query(
                "sum(rate(gpu_time_seconds_total{state=\"unobserved\"}[$__rate_interval])) \
                 / sum(rate(gpu_time_seconds_total[$__rate_interval]))",
                "",
            ),
        Panel::stat("Held but idle", "none", "Devices that containers hold and do not use, on average; a device that two hold counts twice.")
            .query("sum(rate(container_gpu_held_idle_seconds_total[$__rate_interval]))", ""),
        Panel::stat("Power", "watt", "Power draw of all GPUs.").query("sum(gpu_power_watts)", ""),
        Panel::stat("Containers without a label", "none", "Live containers that lack a label; the alert GpuSamplerLabelsMissing.")
            .thresholds(Thresholds::AboveZero)
            .query("sum(gpu_sampler_label_missing)", ""),
        Panel::stat("Degraded agents", "none", "Agents with a condition in which they measure less than they could.")
            .thresholds(Thresholds::AboveZero)
            .query("count(count by (instance) (gpu_sampler_degraded)) or vector(0)", ""),
    ];
    PanelGroup { title: "Overview", panels }
}

fn time() -> PanelGroup {
    let panels = vec![
        Panel::stacked("Device time by state", "none", "Devices that are busy, idle, unobserved or unsupported, on average.")
            .query("sum by (state) (rate(gpu_time_seconds_total[$__rate_interval]))", "{{state}}"),
        Panel::stacked("Devices in use by namespace", "none", "GPU time credited to the users of a namespace; one device is 1.")
            .query(
                "sum by (namespace, kind) (rate(gpu_credited_seconds_total{namespace=~\"$namespace\"}[$__rate_interval]))",
                "{{kind}} {{namespace}}",
            ),
        Panel::series("Busy share by node", "percentunit", "Mean busy share of the devices of a node.")
            .ratio()
            .query("avg by (instance) (rate(gpu_time_seconds_total{state=\"busy\"}[$__rate_interval]))", "{{instance}}"),
        Panel::stacked(
            "Unattributed time by reason",
            "none",
            "Busy time without a user, in devices. host is a process outside of containers, jobs, units and sessions.",
        )
        .query("sum by (reason) (rate(gpu_unattributed_seconds_total[$__rate_interval]))", "{{reason}}"),
    ];
    PanelGroup { title: "Time", panels }
}

fn users() -> PanelGroup {
    let panels = vec![
        Panel::table("Containers by GPU time", "s", "The 20 containers with the most GPU time in the range.").links_to_user().query(
            "topk(20, sum by (namespace, pod, container) (increase(container_gpu_seconds_total{namespace=~\"$namespace\"}[$__range])))",
            "",
        ),
        Panel::table("Jobs, units and sessions by GPU time", "s", "The 20 with the most GPU time in the range.")
            .query("topk(20, sum by (kind, user) (increase(gpu_user_seconds_total[$__range])))", ""),
        Panel::table("Containers by idle time of held GPUs", "s", "Time in which a container held a GPU and did not use it.")
            .links_to_user()
            .query(
                "topk(20, sum by (namespace, pod, container) \
                 (increase(container_gpu_held_idle_seconds_total{namespace=~\"$namespace\"}[$__range])))",
                "",
            ),
        Panel::stacked(
            "Power by namespace",
            "watt",
            "Energy of GPUs that is attributed to containers, without what a GPU draws when idle. Absent if the driver has no energy counter.",
        )
        .query("sum by (namespace) (rate(container_gpu_energy_joules_total{namespace=~\"$namespace\"}[$__rate_interval]))", "{{namespace}}"),
    ];
    PanelGroup { title: "Users", panels }
}

fn hardware() -> PanelGroup {
    let panels = vec![
        Panel::table(
            "Recovery actions that the driver requires",
            "none",
            "GPUs that have to be reset or drained; empty if there are none.",
        )
        .query("max by (instance, uuid, action) (gpu_recovery_action{action!=\"none\"})", ""),
        Panel::table("XID errors in the range", "none", "Errors by node, GPU and number; empty if there are none.")
            .query("sum by (instance, uuid, xid) (increase(gpu_xid_errors_total[$__range])) > 0", ""),
        Panel::table("Uncorrected ECC errors", "none", "Over the life of the board; empty if there are none.")
            .query("max by (instance, uuid) (gpu_ecc_errors_total{type=\"uncorrected\"}) > 0", ""),
        Panel::table("Row remapping", "none", "GPUs with a memory row that waits for a reset, or that could not be replaced.")
            .query("max by (instance, uuid) (gpu_row_remap_pending) + max by (instance, uuid) (gpu_row_remap_failure) > 0", ""),
    ];
    PanelGroup { title: "Hardware", panels }
}
