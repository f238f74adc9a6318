//! Writes the families of containers and of the agent.

use sampler_common::kind;
use sampler_core::snapshot::WindowShares;
use sampler_labels::{ContainerLabels, Label};
use strum::VariantArray as _;

use super::catalogue::{Family, agent as agent_families, cadvisor as cadvisor_families, containers as container_families};
use super::encode::{Families, FamilyWriter, HistogramValue, Labels};
use super::ledger::{ExportedPair, Exposition};
use super::series_starts::{SeriesId, SeriesOwner};
use crate::config::PodLabels;
use crate::health::{HealthView, IDENTIFY_BOUNDS};
use crate::labels::{LabelStats, RESOLVE_BOUNDS};

/// cAdvisor's own constant for this label.
const MAKE: &str = "nvidia";

/// The three families that replace those of cAdvisor, with the configured generations of its pod labels.
pub fn cadvisor(page: &Exposition, pods: PodLabels, to: &mut Families<'_>) {
    accelerator(to.family(&cadvisor_families::DUTY_CYCLE), page, pods, |pair| pair.usage.duty_cycle_percent);
    accelerator(to.family(&cadvisor_families::MEMORY_TOTAL), page, pods, |pair| pair.memory_total_bytes.map(|b| b as f64));
    accelerator(to.family(&cadvisor_families::MEMORY_USED), page, pods, |pair| pair.usage.memory_used_bytes.map(|b| b as f64));
}

fn accelerator(mut family: FamilyWriter<'_>, page: &Exposition, pods: PodLabels, value: impl Fn(&ExportedPair) -> Option<f64>) {
    for pair in &page.pairs {
        let l = &pair.labels;
        let mut labels = vec![
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
                labels.push((new, l.text(label)));
            }
            if pods != PodLabels::New {
                labels.push((old, l.text(label)));
            }
        }
        family.add_known(&labels, value(pair));
    }
}

pub fn containers(page: &Exposition, to: &mut Families<'_>) {
    from_zero(to, &container_families::SECONDS, page, |pair| pair.usage.seconds);
    from_zero(to, &container_families::SECONDS_STDERR, page, |pair| pair.usage.seconds_stderr);
    from_zero(to, &container_families::SAMPLES, page, |pair| pair.usage.samples as f64);
    let ratio = |percent: Option<f64>| percent.map(|p| p / 100.0);
    known(to, &container_families::UTILIZATION, page, |pair| ratio(pair.usage.duty_cycle_percent));
    known(to, &container_families::UTILIZATION_STDERR, page, |pair| ratio(pair.usage.duty_cycle_stderr));
    let mut shares = to.family(&container_families::WINDOW_SHARE);
    for pair in &page.pairs {
        if let Some(w) = &pair.usage.window_shares {
            let value = HistogramValue { bounds: &WindowShares::BOUNDS, cumulative: &w.buckets, sum: w.sum, count: w.count };
            let series = SeriesId { owner: &owner(pair), part: "" };
            with_labels(pair, &[], |labels| shares.add_histogram_from_zero(series, labels, value));
        }
    }
    let mut engines = to.family(&container_families::ENGINE_SECONDS);
    for pair in &page.pairs {
        for (engine, seconds) in &pair.usage.engines {
            let series = SeriesId { owner: &owner(pair), part: engine.name() };
            with_labels(pair, &[("engine", engine.name())], |labels| engines.add_from_zero(series, labels, *seconds));
        }
    }
    contention(page, to);
    known(to, &container_families::MEMORY_USED, page, |pair| pair.usage.memory_used_bytes.map(|b| b as f64));
    known(to, &container_families::MPS_CLIENTS, page, |pair| {
        (pair.usage.mps_clients > 0).then_some(pair.usage.mps_clients.into())
    });
    known(to, &container_families::ASSIGNED, page, |pair| pair.assigned.then_some(1.0));
    let mut info = to.family(&container_families::INFO);
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
        info.add(&labels, 1.0);
    }
}

fn contention(page: &Exposition, to: &mut Families<'_>) {
    from_zero(to, &container_families::COACTIVE_SECONDS, page, |pair| pair.usage.coactive_seconds);
    let mut contention = to.family(&container_families::CONTENTION_SECONDS);
    for pair in &page.pairs {
        for contender in &pair.contenders {
            let labels = [
                ("other_namespace", contender.text(Label::Namespace)),
                ("other_pod", contender.text(Label::Pod)),
                ("other_container", contender.text(Label::Container)),
                ("other_container_id", &contender.container_id),
            ];
            let series = SeriesId { owner: &owner(pair), part: &contender.container_id };
            with_labels(pair, &labels, |labels| contention.add_from_zero(series, labels, contender.seconds));
        }
    }
}

fn owner(pair: &ExportedPair) -> SeriesOwner {
    SeriesOwner::ContainerGpu(pair.key, pair.gpu.clone())
}

fn from_zero(to: &mut Families<'_>, family: &'static Family, page: &Exposition, value: impl Fn(&ExportedPair) -> f64) {
    let mut family = to.family(family);
    for pair in &page.pairs {
        let series = SeriesId { owner: &owner(pair), part: "" };
        with_labels(pair, &[], |labels| family.add_from_zero(series, labels, value(pair)));
    }
}

fn known(to: &mut Families<'_>, family: &'static Family, page: &Exposition, value: impl Fn(&ExportedPair) -> Option<f64>) {
    let mut family = to.family(family);
    for pair in &page.pairs {
        with_labels(pair, &[], |labels| family.add_known(labels, value(pair)));
    }
}

fn with_labels(pair: &ExportedPair, more: &[(&str, &str)], add: impl FnOnce(Labels<'_>)) {
    let l: &ContainerLabels = &pair.labels;
    let mut labels = vec![
        ("uuid", &*pair.gpu.0),
        ("namespace", l.text(Label::Namespace)),
        ("pod", l.text(Label::Pod)),
        ("container", l.text(Label::Container)),
        ("container_id", &pair.container_id),
    ];
    labels.extend(pair.parent.as_ref().map(|parent| ("gpu_uuid", &*parent.0)));
    labels.extend(more);
    add(&labels);
}

pub fn agent(page: &Exposition, health: &HealthView, labels: &LabelStats, nvml: &str, to: &mut Families<'_>) {
    let mut containers = to.family(&agent_families::CONTAINERS);
    for ((state, runtime), n) in &page.containers {
        containers.add(&[("state", state), ("runtime", runtime)], *n as f64);
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
    to.family(&agent_families::RESOLVE_SECONDS).add_histogram(&[], resolved);
    let mut up = to.family(&agent_families::SOURCE_UP);
    for ((source, endpoint), is_up) in &labels.up {
        up.add(&[("source", source), ("endpoint", endpoint)], f64::from(*is_up));
    }
    up.add_known(&[("source", "nvml"), ("endpoint", nvml)], health.nvml_up.map(f64::from));
    for (family, counts) in [(&agent_families::RUNTIME_CALLS, &labels.calls), (&agent_families::FILE_READS, &labels.reads)] {
        let mut family = to.family(family);
        for ((source, outcome), n) in counts {
            family.add(&[("source", source), ("outcome", outcome)], *n as f64);
        }
    }
    kernel(health, to);
    tables(health, to);
    to.family(&agent_families::KERNEL_MODE).add(&[("mode", health.kernel_mode)], 1.0);
    to.family(&agent_families::PID_SPACE).add(&[("state", health.pid_space.name())], 1.0);
    to.add_each(&agent_families::DEGRADED, "condition", health.degraded.iter().map(|(condition, _)| (condition.key(), 1.0)));
    let commit = option_env!("GPU_SAMPLER_COMMIT").unwrap_or("unknown");
    to.family(&agent_families::BUILD_INFO).add(&[("version", env!("CARGO_PKG_VERSION")), ("commit", commit)], 1.0);
}

fn kernel(health: &HealthView, to: &mut Families<'_>) {
    for (family, counts) in [
        (&agent_families::KERNEL_EVENTS, &health.events_seen),
        (&agent_families::KERNEL_EVENTS_LOST, &health.events_lost.of_kind),
    ] {
        to.add_each(family, "kind", kind::NAMES.iter().zip(counts).map(|(kind, n)| (kind, *n as f64)));
    }
    to.family(&agent_families::KERNEL_SKIPS).add(&[], health.events_lost.skipped as f64);
    to.family(&agent_families::KERNEL_DRAIN_SECONDS).add(&[], health.drained.as_secs_f64());
    to.family(&agent_families::RESYNCS).add(&[], health.resyncs as f64);
    to.family(&agent_families::RESYNC_REPAIRS).add(&[], health.repairs as f64);
    to.family(&agent_families::LIVENESS_REPAIRS).add(&[], health.liveness_repairs as f64);
}

fn tables(health: &HealthView, to: &mut Families<'_>) {
    let (p, (cgroups, cgroup_bytes, cgroups_evicted)) = (health.processes, health.cgroups);
    let entries = [("living", p.living as f64), ("exited", p.exited as f64), ("cgroups", cgroups as f64)];
    to.add_each(&agent_families::IDENTITY_ENTRIES, "table", entries);
    let bytes = [("living", p.living_bytes as f64), ("exited", p.exited_bytes as f64), ("cgroups", cgroup_bytes as f64)];
    to.add_each(&agent_families::IDENTITY_BYTES, "table", bytes);
    let evicted = [("exited", p.evicted as f64), ("cgroups", cgroups_evicted as f64)];
    to.add_each(&agent_families::IDENTITY_EVICTIONS, "table", evicted);
    to.family(&agent_families::INOTIFY_WATCHES).add(&[], health.watches as f64);
    let t = &health.identified;
    let identified = HistogramValue { bounds: &IDENTIFY_BOUNDS, cumulative: &t.buckets, sum: t.sum_seconds, count: t.count };
    to.family(&agent_families::IDENTIFY_SECONDS).add_histogram(&[], identified);
}
