//! One node, or some: each device, its users and its hardware.

use super::model::{Dashboard, Panel, PanelGroup, Thresholds};

/// Of the chosen nodes and devices.
const HERE: &str = "instance=~\"$instance\",uuid=~\"$uuid\"";

pub fn dashboard() -> Dashboard {
    Dashboard {
        name: "node",
        title: "GPU node",
        description: "Devices of the chosen nodes: time, users, memory, power, clocks, links, errors.",
        variables: vec![
            ("instance", "label_values(gpu_sampler_build_info, instance)"),
            ("uuid", "label_values(gpu_info{instance=~\"$instance\"}, uuid)"),
        ],
        rows: vec![overview(), time(), users(), hardware(), errors()],
    }
}

/// `sum by (uuid) (rate(NAME{..}[..]))`, with more matchers.
fn rate_by(labels: &str, name: &str, more: &str) -> String {
    format!("sum by ({labels}) (rate({name}{{{HERE}{more}}}[$__rate_interval]))")
}

fn overview() -> PanelGroup {
    let panels = vec![
        Panel::stat("Devices", "none", "GPUs, and MIG devices in place of the GPUs that are divided into them.")
            .query(format!("count(gpu_time_seconds_total{{{HERE},state=\"busy\"}})"), ""),
        Panel::stat("Busy share", "percentunit", "Mean over the past 10 seconds and the devices.")
            .ratio()
            .query(format!("avg(gpu_utilization_ratio{{{HERE}}})"), ""),
        Panel::stat("Memory in use", "percentunit", "Device memory in use, as a part of the total.")
            .ratio()
            .thresholds(Thresholds::High(0.9, 0.98))
            .query(format!("sum(gpu_memory_used_bytes{{{HERE}}}) / sum(gpu_memory_total_bytes{{{HERE}}})"), ""),
        Panel::stat("Power", "watt", "Power draw of the GPUs.").query(format!("sum(gpu_power_watts{{{HERE}}})"), ""),
        Panel::stat("Hottest GPU", "celsius", "Highest core temperature.")
            .thresholds(Thresholds::High(80.0, 90.0))
            .query(format!("max(gpu_temperature_celsius{{{HERE}}})"), ""),
        Panel::stat("Conditions of the agent", "none", "Conditions in which the agent measures less than it could.")
            .thresholds(Thresholds::AboveZero)
            .query("count(gpu_sampler_degraded{instance=~\"$instance\"}) or vector(0)", ""),
        Panel::table("Devices", "none", "Index, model, driver and MIG mode of each device.").width(24).query(
            format!("max by (instance, index, uuid, model, pci_bus_id, driver_version, mig_mode) (gpu_info{{{HERE}}})"),
            "",
        ),
    ];
    PanelGroup { title: "Overview", panels }
}

fn time() -> PanelGroup {
    let panels = vec![
        Panel::series(
            "Busy share by device",
            "percentunit",
            "Busy share of the past 10 seconds; absent while it is not observed.",
        )
        .ratio()
        .query(format!("max by (instance, uuid) (gpu_utilization_ratio{{{HERE}}})"), "{{instance}} {{uuid}}"),
        Panel::stacked("Device time by state", "none", "Devices that are busy, idle, unobserved or unsupported, on average.")
            .query(rate_by("state", "gpu_time_seconds_total", ""), "{{state}}"),
        Panel::stacked("Unattributed time by reason", "none", "Busy time without a user, in devices.")
            .query(rate_by("reason", "gpu_unattributed_seconds_total", ""), "{{reason}}"),
        Panel::series(
            "Engines other than compute",
            "percentunit",
            "Busy share of memory interface, encoder, decoder, JPEG and OFA.",
        )
        .ratio()
        .query(rate_by("uuid, engine", "gpu_engine_seconds_total", ""), "{{uuid}} {{engine}}"),
    ];
    PanelGroup { title: "Time", panels }
}

fn users() -> PanelGroup {
    let panels = vec![
        Panel::stacked("GPU time by container", "none", "Devices that a container keeps busy, on average.").query(
            rate_by("namespace, pod, container", "container_gpu_seconds_total", ""),
            "{{namespace}}/{{pod}}/{{container}}",
        ),
        Panel::stacked(
            "GPU time by job, unit and session",
            "none",
            "Devices that a user outside of containers keeps busy, on average.",
        )
        .query(rate_by("kind, user", "gpu_user_seconds_total", ""), "{{kind}} {{user}}"),
        Panel::stacked("Memory by container", "bytes", "Device memory that the processes of a container hold.").query(
            format!("sum by (namespace, pod, container) (container_gpu_memory_used_bytes{{{HERE}}})"),
            "{{namespace}}/{{pod}}/{{container}}",
        ),
        Panel::stacked("Memory by job, unit and session", "bytes", "Device memory that the processes of such a user hold.")
            .query(format!("sum by (kind, user) (gpu_user_memory_used_bytes{{{HERE}}})"), "{{kind}} {{user}}"),
        Panel::table("Assigned devices", "none", "Which container a device is assigned to, and where that is known from.")
            .query(format!("max by (instance, uuid, namespace, pod, container, source) (container_gpu_assigned{{{HERE}}})"), ""),
        Panel::table(
            "Clients of the multi-process service",
            "none",
            "Processes that share a device by MPS; samples do not distinguish them.",
        )
        .query(format!("sum by (uuid, namespace, pod, container) (container_gpu_mps_clients{{{HERE}}})"), ""),
    ];
    PanelGroup { title: "Users", panels }
}

fn hardware() -> PanelGroup {
    let by_device = "{{instance}} {{uuid}}";
    let gauge = |name: &str| format!("max by (instance, uuid) ({name}{{{HERE}}})");
    let panels = vec![
        Panel::series("Memory in use", "bytes", "Device memory in use.").query(gauge("gpu_memory_used_bytes"), by_device),
        Panel::series("Power", "watt", "Power draw of each GPU.").query(gauge("gpu_power_watts"), by_device),
        Panel::series("Mean power by the energy counter", "watt", "Increase of the energy counter of the driver, per second.")
            .query(rate_by("instance, uuid", "gpu_energy_joules_total", ""), by_device),
        Panel::series("Temperature", "celsius", "Core temperature.")
            .thresholds(Thresholds::High(80.0, 90.0))
            .query(gauge("gpu_temperature_celsius"), by_device),
        Panel::series("SM clock", "hertz", "Clock of the streaming multiprocessors.")
            .query(gauge("gpu_sm_clock_hertz"), by_device),
        Panel::series(
            "Limited clocks",
            "percentunit",
            "Part of the time in which a reason other than idleness limited the clocks.",
        )
        .ratio()
        .query(rate_by("uuid, reason", "gpu_throttle_seconds_total", ",reason!=\"gpu_idle\"") + " > 0", "{{uuid}} {{reason}}"),
        Panel::series("NVLink", "Bps", "Bytes over all NVLinks of a GPU.")
            .query(rate_by("uuid", "gpu_nvlink_transmit_bytes_total", ""), "{{uuid}} sent")
            .query(rate_by("uuid", "gpu_nvlink_receive_bytes_total", ""), "{{uuid}} received"),
        Panel::series("PCIe", "Bps", "Bytes over PCIe.")
            .query(rate_by("uuid", "gpu_pcie_transmit_bytes_total", ""), "{{uuid}} sent")
            .query(rate_by("uuid", "gpu_pcie_receive_bytes_total", ""), "{{uuid}} received"),
    ];
    PanelGroup { title: "Hardware", panels }
}

fn errors() -> PanelGroup {
    let panels = vec![
        Panel::table("XID errors in the range", "none", "By GPU and number; empty if there are none.")
            .query(format!("sum by (instance, uuid, xid) (increase(gpu_xid_errors_total{{{HERE}}}[$__range])) > 0"), ""),
        Panel::table("ECC errors", "none", "Over the life of the board, by type.")
            .query(format!("max by (instance, uuid, type) (gpu_ecc_errors_total{{{HERE}}})"), ""),
        Panel::table("Remapped rows", "none", "Memory rows that were replaced over the life of the board, by type of error.")
            .query(format!("max by (instance, uuid, type) (gpu_remapped_rows_total{{{HERE}}})"), ""),
        Panel::table("Recovery action", "none", "What the driver requires for the recovery of the GPU; none if it is healthy.")
            .query(format!("max by (instance, uuid, action) (gpu_recovery_action{{{HERE}}})"), ""),
    ];
    PanelGroup { title: "Errors", panels }
}
