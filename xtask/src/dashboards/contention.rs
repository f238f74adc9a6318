//! Which users are slowed by others on the same device, and which other causes there may be.

use super::model::{Dashboard, Panel, PanelGroup, Thresholds};

const HERE: &str = "instance=~\"$instance\",uuid=~\"$uuid\"";
const CONTAINERS: &str = "instance=~\"$instance\",uuid=~\"$uuid\",namespace=~\"$namespace\"";

pub fn dashboard() -> Dashboard {
    Dashboard {
        name: "contention",
        title: "GPU contention",
        description: "Users that were active on the same device at the same time, who received the time, and other causes of slow progress. \
                      Active together is not slowed: reports of sessions grade the evidence.",
        variables: vec![
            ("instance", "label_values(gpu_sampler_build_info, instance)"),
            ("uuid", "label_values(gpu_info{instance=~\"$instance\"}, uuid)"),
            ("namespace", "label_values(container_gpu_seconds_total{instance=~\"$instance\"}, namespace)"),
        ],
        rows: vec![overview(), pairs(), causes()],
    }
}

fn rate(name: &str) -> String {
    format!("rate({name}{{{CONTAINERS}}}[$__rate_interval])")
}

fn of_users(name: &str) -> String {
    format!("rate({name}{{{HERE}}}[$__rate_interval])")
}

fn overview() -> PanelGroup {
    let contention = rate("container_gpu_contention_seconds_total");
    let panels = vec![
        Panel::stat(
            "Contended GPU time",
            "none",
            "Devices of which others had the time while a container wanted it, on average.",
        )
        .query(format!("sum({contention})"), ""),
        Panel::stat("Affected containers", "none", "Containers that lost more than a tenth of a device to others.")
            .query(format!("count(sum by (namespace, pod, container) ({contention}) > 0.1) or vector(0)"), ""),
        Panel::stat("Affected jobs, units and sessions", "none", "Those that lost more than a tenth of a device to others.")
            .query(
                format!("count(sum by (kind, user) ({}) > 0.1) or vector(0)", of_users("gpu_user_contention_seconds_total")),
                "",
            ),
        Panel::stat("Devices with several users", "none", "Devices on which a container was active together with another user.")
            .query(
                format!("count(sum by (instance, uuid) ({}) > 0.01) or vector(0)", rate("container_gpu_coactive_seconds_total")),
                "",
            ),
        Panel::stat(
            "Queried samples",
            "percentunit",
            "Samples with a known process. Contention is too small if this is far below 100 %.",
        )
        .ratio()
        .query(
            format!("sum({}) / sum({})", of_users("gpu_sampler_queried_samples_total"), of_users("gpu_sampler_samples_total")),
            "",
        ),
    ];
    PanelGroup { title: "Overview", panels }
}

fn pairs() -> PanelGroup {
    let pair = "namespace, pod, container, other_namespace, other_pod, other_container";
    let panels = vec![
        Panel::series(
            "Contention by container",
            "none",
            "GPU time that others received while the container was active and the device saturated.",
        )
        .query(
            format!("sum by (namespace, pod, container) ({})", rate("container_gpu_contention_seconds_total")),
            "{{namespace}}/{{pod}}/{{container}}",
        ),
        Panel::stacked("Time taken by contender", "none", "The same by the user that received the time.").query(
            format!("sum by (other_namespace, other_pod, other_container) ({})", rate("container_gpu_contention_seconds_total")),
            "{{other_namespace}}/{{other_pod}}/{{other_container}}",
        ),
        Panel::table("Containers and their contenders", "s", "The 20 pairs with the most contended GPU time in the range.")
            .width(24)
            .links_to_user()
            .query(
                format!("topk(20, sum by ({pair}) (increase(container_gpu_contention_seconds_total{{{CONTAINERS}}}[$__range])))"),
                "",
            ),
        Panel::table(
            "Jobs, units and sessions and their contenders",
            "s",
            "The 20 pairs with the most contended GPU time in the range.",
        )
        .width(24)
        .query(
            format!(
                "topk(20, sum by (kind, user, other_namespace, other_pod, other_container) \
                     (increase(gpu_user_contention_seconds_total{{{HERE}}}[$__range])))"
            ),
            "",
        ),
        Panel::series(
            "Time active together",
            "percentunit",
            "Part of the time in which a container and another user were both active.",
        )
        .query(
            format!("sum by (namespace, pod, container) ({})", rate("container_gpu_coactive_seconds_total")),
            "{{namespace}}/{{pod}}/{{container}}",
        ),
        Panel::series("Shares on the same device", "percentunit", "How the time of a device is divided over its containers.")
            .ratio()
            .query(
                format!("sum by (uuid, namespace, pod, container) ({})", rate("container_gpu_seconds_total")),
                "{{uuid}} {{namespace}}/{{pod}}/{{container}}",
            ),
    ];
    PanelGroup { title: "Pairs", panels }
}

fn causes() -> PanelGroup {
    let panels = vec![
        Panel::series("Limited clocks", "percentunit", "Part of the time in which power, heat or a setting limited the clocks.")
            .ratio()
            .query(
                format!("sum by (uuid, reason) (rate(gpu_throttle_seconds_total{{{HERE},reason!=\"gpu_idle\"}}[$__rate_interval])) > 0"),
                "{{uuid}} {{reason}}",
            ),
        Panel::series("Throttled by the CPU quota", "percentunit", "Part of the time in which the CPU quota throttled the container.")
            .thresholds(Thresholds::High(0.1, 0.5))
            .query(
                "sum by (namespace, pod, container) (rate(container_gpu_cpu_throttled_seconds_total{\
                 instance=~\"$instance\",namespace=~\"$namespace\"}[$__rate_interval]))",
                "{{namespace}}/{{pod}}/{{container}}",
            ),
        Panel::series("Waiting for CPU, memory and IO", "percentunit", "Pressure stall information (some) of containers.").query(
            "sum by (namespace, pod, container, resource) (rate(container_gpu_pressure_seconds_total{\
             instance=~\"$instance\",namespace=~\"$namespace\"}[$__rate_interval]))",
            "{{pod}}/{{container}} {{resource}}",
        ),
        Panel::series("Standard error of a share", "percentunit", "For a share of one half over 10 seconds: how far a difference is chance.")
            .query(format!("max by (uuid) (gpu_sampler_share_stderr_ratio{{{HERE}}})"), "{{uuid}}"),
    ];
    PanelGroup { title: "Other causes and precision", panels }
}
