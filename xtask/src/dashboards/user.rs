//! One user of GPUs: a container, or a job, unit or login session.

use super::model::{Dashboard, Panel, PanelGroup, Thresholds};

const CONTAINER: &str = "namespace=~\"$namespace\",pod=~\"$pod\",container=~\"$container\",uuid=~\"$uuid\"";
/// Of families without a device.
const CONTAINER_ALONE: &str = "namespace=~\"$namespace\",pod=~\"$pod\",container=~\"$container\"";
const USER: &str = "user=~\"$user\",uuid=~\"$uuid\"";
const NAME: &str = "{{namespace}}/{{pod}}/{{container}}";
const OTHER: &str = "{{other_namespace}}/{{other_pod}}/{{other_container}}";

pub fn dashboard() -> Dashboard {
    Dashboard {
        name: "user",
        title: "GPU container or job",
        description: "The GPU time, memory, energy, contenders and waiting of containers, jobs, units and login sessions.",
        variables: vec![
            ("namespace", "label_values(container_gpu_seconds_total, namespace)"),
            ("pod", "label_values(container_gpu_seconds_total{namespace=~\"$namespace\"}, pod)"),
            ("container", "label_values(container_gpu_seconds_total{namespace=~\"$namespace\",pod=~\"$pod\"}, container)"),
            ("user", "label_values(gpu_user_seconds_total, user)"),
            ("uuid", "label_values(gpu_info, uuid)"),
        ],
        rows: vec![container(), waiting(), distribution(), host_user()],
    }
}

fn of_container(labels: &str, name: &str) -> String {
    format!("sum by ({labels}) (rate({name}{{{CONTAINER}}}[$__rate_interval]))")
}

fn of_user(labels: &str, name: &str) -> String {
    format!("sum by ({labels}) (rate({name}{{{USER}}}[$__rate_interval]))")
}

fn container() -> PanelGroup {
    let by_name = "namespace, pod, container";
    let panels = vec![
        Panel::series("GPU time", "none", "Devices that the container keeps busy, on average of the interval.")
            .query(of_container(by_name, "container_gpu_seconds_total"), NAME),
        Panel::series(
            "Share of the device, with its standard error",
            "percentunit",
            "Share of the past 10 seconds; one standard error.",
        )
        .ratio()
        .query(
            format!("max by ({by_name}, uuid) (container_gpu_utilization_ratio{{{CONTAINER}}})"),
            "{{pod}}/{{container}} {{uuid}}",
        )
        .query(
            format!("max by ({by_name}, uuid) (container_gpu_utilization_stderr_ratio{{{CONTAINER}}})"),
            "standard error of {{pod}}/{{container}} {{uuid}}",
        ),
        Panel::series("Memory", "bytes", "Device memory that the processes of the container hold.")
            .query(format!("sum by ({by_name}) (container_gpu_memory_used_bytes{{{CONTAINER}}})"), NAME),
        Panel::series("Power", "watt", "Energy attributed by GPU time, without what the GPU draws when idle.")
            .query(of_container(by_name, "container_gpu_energy_joules_total"), NAME),
        Panel::series("Time held without use", "none", "Devices that the container holds and does not use, on average.")
            .query(of_container(by_name, "container_gpu_held_idle_seconds_total"), NAME),
        Panel::series("Engines other than compute", "percentunit", "Time of memory interface, encoder, decoder, JPEG and OFA.")
            .query(
                of_container(&format!("{by_name}, engine"), "container_gpu_engine_seconds_total"),
                "{{pod}}/{{container}} {{engine}}",
            ),
        Panel::table("GPU time in the range", "s", "By device.")
            .query(format!("sum by ({by_name}, uuid) (increase(container_gpu_seconds_total{{{CONTAINER}}}[$__range]))"), ""),
        Panel::table("Containers", "none", "Image, runtime and ids of the containers.").query(
            format!(
                "max by ({by_name}, container_id, image, runtime, pod_uid) \
                 (container_gpu_info * on (instance, container_id) group_left (namespace, pod, container) \
                 max by (instance, {by_name}, container_id) (0 * container_gpu_seconds_total{{{CONTAINER}}} + 1))"
            ),
            "",
        ),
    ];
    PanelGroup { title: "Container", panels }
}

fn waiting() -> PanelGroup {
    let panels = vec![
        Panel::series("Time shared with others", "percentunit", "Part of the time in which another user was active on the same device.")
            .query(of_container("namespace, pod, container", "container_gpu_coactive_seconds_total"), NAME),
        Panel::stacked(
            "Contenders",
            "none",
            "GPU time that others received while the container was active and the device saturated: who took the time.",
        )
        .query(
            of_container("other_namespace, other_pod, other_container", "container_gpu_contention_seconds_total"),
            OTHER,
        ),
        Panel::series("Throttled by the CPU quota", "percentunit", "Part of the time in which the CPU quota throttled the container.")
            .thresholds(Thresholds::High(0.1, 0.5))
            .query(
                format!(
                    "sum by (namespace, pod, container) (rate(container_gpu_cpu_throttled_seconds_total{{{CONTAINER_ALONE}}}[$__rate_interval]))"
                ),
                NAME,
            ),
        Panel::series("Waiting for CPU, memory and IO", "percentunit", "Pressure stall information (some) of the container.").query(
            format!(
                "sum by (namespace, pod, container, resource) \
                 (rate(container_gpu_pressure_seconds_total{{{CONTAINER_ALONE}}}[$__rate_interval]))"
            ),
            "{{pod}}/{{container}} {{resource}}",
        ),
    ];
    PanelGroup { title: "Waiting", panels }
}

fn distribution() -> PanelGroup {
    let quantile = |q: &str| {
        format!(
            "histogram_quantile({q}, sum by (namespace, pod, container, le) \
             (rate(container_gpu_window_share_ratio_bucket{{{CONTAINER}}}[$__rate_interval])))"
        )
    };
    let panels = vec![
        Panel::series("Share per window of 10 seconds", "percentunit", "Median and 95th percentile of the share of wall time.")
            .ratio()
            .width(24)
            .query(quantile("0.5"), "median {{pod}}/{{container}}")
            .query(quantile("0.95"), "95 % {{pod}}/{{container}}"),
    ];
    PanelGroup { title: "Distribution", panels }
}

fn host_user() -> PanelGroup {
    let name = "{{kind}} {{user}}";
    let panels = vec![
        Panel::series("GPU time", "none", "Devices that the job, unit or session keeps busy, on average of the interval.")
            .query(of_user("kind, user", "gpu_user_seconds_total"), name),
        Panel::series("Memory", "bytes", "Device memory that its processes hold.")
            .query(format!("sum by (kind, user) (gpu_user_memory_used_bytes{{{USER}}})"), name),
        Panel::series("Power", "watt", "Energy attributed by GPU time, without what the GPU draws when idle.")
            .query(of_user("kind, user", "gpu_user_energy_joules_total"), name),
        Panel::series("Time held without use", "none", "Devices that it holds and does not use, on average.")
            .query(of_user("kind, user", "gpu_user_held_idle_seconds_total"), name),
        Panel::series("Time shared with others", "percentunit", "Part of the time in which another user was active on the same device.")
            .query(of_user("kind, user", "gpu_user_coactive_seconds_total"), name),
        Panel::stacked("Contenders", "none", "GPU time that others received while it was active and the device saturated.")
            .query(of_user("other_namespace, other_pod, other_container", "gpu_user_contention_seconds_total"), OTHER),
        Panel::table("Jobs, units and sessions", "none", "Scheduler, id, name, owner and partition of a job; unit; container around a job.")
            .width(24)
            .query(
                "max by (kind, user, scheduler, job_id, job_name, user_name, uid, partition, unit, namespace, pod) (gpu_user_info{user=~\"$user\"})",
                "",
            ),
    ];
    PanelGroup { title: "Job, unit or login session", panels }
}
