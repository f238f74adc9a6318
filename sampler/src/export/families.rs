//! Writes the families of containers and of the agent.

use sampler_common::kind;
use sampler_core::snapshot::WindowShares;
use sampler_labels::Label;
use strum::VariantArray as _;

use super::catalogue::{agent as agent_families, cadvisor as cadvisor_families, containers as container_families};
use super::encode::{HistogramValue, Labels, Page, label_block};
use super::exposition::{ExportedPair, Exposition};
use super::series_starts::{SeriesOwner, SeriesStarts};
use crate::config::PodLabels;
use crate::health::{HealthView, IDENTIFY_BOUNDS};
use crate::labels::{LabelStats, RESOLVE_BOUNDS};

/// cAdvisor's own constant for this label.
const MAKE: &str = "nvidia";

/// The three families that replace those of cAdvisor.
pub fn cadvisor(page: &Exposition, to: &mut Page) {
    let [duty, total, used] =
        [&cadvisor_families::DUTY_CYCLE, &cadvisor_families::MEMORY_TOTAL, &cadvisor_families::MEMORY_USED].map(|f| to.family(f));
    for pair in &page.pairs {
        let labels = &*pair.text.accelerator;
        to.add_known(duty, labels, pair.usage.duty_cycle_percent);
        to.add_known(total, labels, pair.memory_total_bytes.map(|b| b as f64));
        to.add_known(used, labels, pair.usage.memory_used_bytes.map(|b| b as f64));
    }
}

/// Labels of a pair, as they stand in its series. They are written once, and kept with the pair while they stay the same.
#[derive(Debug, Default)]
pub struct PairText {
    /// Of the own families.
    pub pair: String,
    /// Of the families that replace those of cAdvisor.
    pub accelerator: String,
}

impl PairText {
    /// `pods`: the configured generations of the pod labels.
    pub fn new(pair: &ExportedPair, pods: PodLabels) -> Self {
        let l = &pair.labels;
        let mut own = vec![
            ("uuid", &*pair.gpu.0),
            ("namespace", l.text(Label::Namespace)),
            ("pod", l.text(Label::Pod)),
            ("container", l.text(Label::Container)),
            ("container_id", &pair.container_id),
        ];
        own.extend(pair.parent.as_ref().map(|parent| ("gpu_uuid", &*parent.0)));
        let mut accelerator = vec![
            ("acc_id", &*pair.gpu.0),
            ("make", MAKE),
            ("model", &pair.model),
            ("id", &l.id),
            ("name", l.text(Label::Name)),
            ("image", l.text(Label::Image)),
            ("namespace", l.text(Label::Namespace)),
        ];
        for (new, old, label) in [("pod", "pod_name", Label::Pod), ("container", "container_name", Label::Container)] {
            if pods != PodLabels::Old {
                accelerator.push((new, l.text(label)));
            }
            if pods != PodLabels::New {
                accelerator.push((old, l.text(label)));
            }
        }
        Self { pair: label_block(&own), accelerator: label_block(&accelerator) }
    }
}

pub fn containers(page: &Exposition, to: &mut Page, starts: &mut SeriesStarts) {
    let [seconds, stderr, samples] =
        [&container_families::SECONDS, &container_families::SECONDS_STDERR, &container_families::SAMPLES].map(|f| to.family(f));
    let energy = to.family(&container_families::ENERGY);
    let [utilization, utilization_stderr] =
        [&container_families::UTILIZATION, &container_families::UTILIZATION_STDERR].map(|f| to.family(f));
    let [shares, engines, coactive, contention] = [
        &container_families::WINDOW_SHARE,
        &container_families::ENGINE_SECONDS,
        &container_families::COACTIVE_SECONDS,
        &container_families::CONTENTION_SECONDS,
    ]
    .map(|family| to.family(family));
    let [memory, mps_clients, assigned] =
        [&container_families::MEMORY_USED, &container_families::MPS_CLIENTS, &container_families::ASSIGNED].map(|f| to.family(f));
    let ratio = |percent: Option<f64>| percent.map(|p| p / 100.0);
    for pair in &page.pairs {
        let (usage, block) = (&pair.usage, &*pair.text.pair);
        let mut series = starts.of(SeriesOwner::ContainerGpu(pair.key, pair.gpu.clone())).created(pair.created);
        to.add_from_zero(seconds, (&mut series, ""), block, usage.seconds);
        to.add_from_zero(stderr, (&mut series, ""), block, usage.seconds_stderr);
        to.add_from_zero(samples, (&mut series, ""), block, usage.samples as f64);
        if let Some(joules) = usage.energy_joules {
            to.add_from_zero(energy, (&mut series, ""), block, joules);
        }
        to.add_known(utilization, block, ratio(usage.duty_cycle_percent));
        to.add_known(utilization_stderr, block, ratio(usage.duty_cycle_stderr));
        if let Some(w) = &usage.window_shares {
            let value = HistogramValue { bounds: &WindowShares::BOUNDS, cumulative: &w.buckets, sum: w.sum, count: w.count };
            to.add_histogram_from_zero(shares, &mut series, block, value);
        }
        for (engine, seconds) in &usage.engines {
            let labels = Labels { block, more: &[("engine", engine.name())] };
            to.add_from_zero(engines, (&mut series, engine.name()), labels, *seconds);
        }
        to.add_from_zero(coactive, (&mut series, ""), block, usage.coactive_seconds);
        for contender in &pair.contenders {
            let more = [
                ("other_namespace", contender.text(Label::Namespace)),
                ("other_pod", contender.text(Label::Pod)),
                ("other_container", contender.text(Label::Container)),
                ("other_container_id", &contender.container_id),
            ];
            to.add_from_zero(
                contention,
                (&mut series, &contender.container_id),
                Labels { block, more: &more },
                contender.seconds,
            );
        }
        to.add_known(memory, block, usage.memory_used_bytes.map(|b| b as f64));
        to.add_known(mps_clients, block, (usage.mps_clients > 0).then_some(usage.mps_clients.into()));
        to.add_known(assigned, block, pair.assigned.then_some(1.0));
    }
    info(page, to);
}

fn info(page: &Exposition, to: &mut Page) {
    let info = to.family(&container_families::INFO);
    let mut written = std::collections::HashSet::new();
    for pair in page.pairs.iter().filter(|pair| written.insert(&pair.container_id)) {
        let l = &pair.labels;
        let labels = [
            ("container_id", &*pair.container_id),
            ("image", l.text(Label::Image)),
            ("name", l.text(Label::Name)),
            ("runtime", l.runtime.map_or("", |r| r.name())),
            ("pod_uid", l.pod_uid.as_deref().unwrap_or_default()),
            ("id", &l.id),
        ];
        to.add(info, &labels, 1.0);
    }
}

pub fn agent(page: &Exposition, health: &HealthView, labels: &LabelStats, nvml: &str, to: &mut Page) {
    let containers = to.family(&agent_families::CONTAINERS);
    for ((state, runtime), n) in &page.containers {
        to.add(containers, &[("state", *state), ("runtime", runtime)], *n as f64);
    }
    let missing = |label: &Label| page.missing.get(label.name()).copied().unwrap_or_default();
    let missing = Label::VARIANTS.iter().map(|label| (label.name(), missing(label) as f64));
    to.add_each(&agent_families::LABEL_MISSING, "label", missing);
    let resolved = HistogramValue {
        bounds: &RESOLVE_BOUNDS,
        cumulative: &labels.resolve_buckets,
        sum: labels.resolve_sum,
        count: labels.resolve_count,
    };
    let resolve_seconds = to.family(&agent_families::RESOLVE_SECONDS);
    to.add_histogram(resolve_seconds, "", resolved);
    let up = to.family(&agent_families::SOURCE_UP);
    for ((source, endpoint), is_up) in &labels.up {
        to.add(up, &[("source", *source), ("endpoint", endpoint)], f64::from(*is_up));
    }
    to.add_known(up, &[("source", "nvml"), ("endpoint", nvml)], health.nvml_up.map(f64::from));
    for (family, counts) in [(&agent_families::RUNTIME_CALLS, &labels.calls), (&agent_families::FILE_READS, &labels.reads)] {
        let family = to.family(family);
        for ((source, outcome), n) in counts {
            to.add(family, &[("source", *source), ("outcome", outcome)], *n as f64);
        }
    }
    kernel(health, to);
    tables(health, to);
    to.add_each(&agent_families::KERNEL_MODE, "mode", [(health.kernel_mode, 1.0)]);
    to.add_each(&agent_families::PID_SPACE, "state", [(health.pid_space.name(), 1.0)]);
    to.add_each(&agent_families::DEGRADED, "condition", health.degraded.iter().map(|(condition, _)| (condition.key(), 1.0)));
    let commit = option_env!("GPU_SAMPLER_COMMIT").unwrap_or("unknown");
    let build_info = to.family(&agent_families::BUILD_INFO);
    to.add(build_info, &[("version", env!("CARGO_PKG_VERSION")), ("commit", commit)], 1.0);
}

fn kernel(health: &HealthView, to: &mut Page) {
    for (family, counts) in [
        (&agent_families::KERNEL_EVENTS, &health.events_seen),
        (&agent_families::KERNEL_EVENTS_LOST, &health.events_lost.of_kind),
    ] {
        to.add_each(family, "kind", kind::NAMES.iter().zip(counts).map(|(kind, n)| (kind, *n as f64)));
    }
    to.add_one(&agent_families::KERNEL_SKIPS, health.events_lost.skipped as f64);
    to.add_one(&agent_families::KERNEL_DRAIN_SECONDS, health.drained.as_secs_f64());
    to.add_one(&agent_families::RESYNCS, health.resyncs as f64);
    to.add_one(&agent_families::RESYNC_REPAIRS, health.repairs as f64);
    to.add_one(&agent_families::LIVENESS_REPAIRS, health.liveness_repairs as f64);
}

fn tables(health: &HealthView, to: &mut Page) {
    let (p, (cgroups, cgroup_bytes, cgroups_evicted)) = (health.processes, health.cgroups);
    let entries = [("living", p.living as f64), ("exited", p.exited as f64), ("cgroups", cgroups as f64)];
    to.add_each(&agent_families::IDENTITY_ENTRIES, "table", entries);
    let bytes = [("living", p.living_bytes as f64), ("exited", p.exited_bytes as f64), ("cgroups", cgroup_bytes as f64)];
    to.add_each(&agent_families::IDENTITY_BYTES, "table", bytes);
    let evicted = [("exited", p.evicted as f64), ("cgroups", cgroups_evicted as f64)];
    to.add_each(&agent_families::IDENTITY_EVICTIONS, "table", evicted);
    to.add_one(&agent_families::INOTIFY_WATCHES, health.watches as f64);
    let t = &health.identified;
    let identified = HistogramValue { bounds: &IDENTIFY_BOUNDS, cumulative: &t.buckets, sum: t.sum_seconds, count: t.count };
    let identify_seconds = to.family(&agent_families::IDENTIFY_SECONDS);
    to.add_histogram(identify_seconds, "", identified);
}
