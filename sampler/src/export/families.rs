//! Writes the families of containers and of the agent.

use sampler_common::kind;
use sampler_core::snapshot::WindowShares;
use sampler_labels::Label;
use strum::VariantArray as _;

use super::catalogue::{agent as agent_families, cadvisor as cadvisor_families, containers as container_families};
use super::encode::{HistogramValue, Labels, Page};
use super::exposition::Exposition;
use super::label_text::GpuText;
use super::series_starts::{SeriesOwner, SeriesStarts};
use crate::health::{HealthView, IDENTIFY_BOUNDS};
use crate::labels::{LabelStats, RESOLVE_BOUNDS};

/// Those of the GPUs, by their index in the snapshot.
fn gpu_texts(page: &Exposition) -> Vec<GpuText> {
    page.gpus.iter().map(|gpu| GpuText::new(&gpu.view.info)).collect()
}

/// The three families that replace those of cAdvisor.
pub fn cadvisor(page: &Exposition, to: &mut Page) {
    let [duty, total, used] =
        [&cadvisor_families::DUTY_CYCLE, &cadvisor_families::MEMORY_TOTAL, &cadvisor_families::MEMORY_USED].map(|f| to.family(f));
    let gpus = gpu_texts(page);
    for pair in &page.pairs {
        let labels = Labels::from([&*gpus[pair.usage.gpu].accelerator, &pair.text.accelerator]);
        to.add_known(duty, labels, pair.usage.duty_cycle_percent);
        to.add_known(total, labels, pair.memory_total_bytes.map(|b| b as f64));
        to.add_known(used, labels, pair.usage.memory_used_bytes.map(|b| b as f64));
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
    let gpus = gpu_texts(page);
    for pair in &page.pairs {
        let (usage, blocks) = (&pair.usage, [&*gpus[pair.usage.gpu].own, &pair.text.own]);
        let mut series = starts.of(SeriesOwner::ContainerGpu(pair.key, pair.gpu().clone())).created(pair.created);
        to.add_from_zero(seconds, (&mut series, ""), blocks, usage.seconds);
        to.add_from_zero(stderr, (&mut series, ""), blocks, usage.seconds_stderr);
        to.add_from_zero(samples, (&mut series, ""), blocks, usage.samples as f64);
        if let Some(joules) = usage.energy_joules {
            to.add_from_zero(energy, (&mut series, ""), blocks, joules);
        }
        to.add_known(utilization, blocks, ratio(usage.duty_cycle_percent));
        to.add_known(utilization_stderr, blocks, ratio(usage.duty_cycle_stderr));
        if let Some(w) = &usage.window_shares {
            let value = HistogramValue { bounds: &WindowShares::BOUNDS, cumulative: &w.buckets, sum: w.sum, count: w.count };
            to.add_histogram_from_zero(shares, &mut series, blocks, value);
        }
        for (engine, seconds) in &usage.engines {
            let labels = Labels { blocks, more: &[("engine", engine.name())] };
            to.add_from_zero(engines, (&mut series, engine.name()), labels, *seconds);
        }
        to.add_from_zero(coactive, (&mut series, ""), blocks, usage.coactive_seconds);
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
                Labels { blocks, more: &more },
                contender.seconds,
            );
        }
        to.add_known(memory, blocks, usage.memory_used_bytes.map(|b| b as f64));
        to.add_known(mps_clients, blocks, (usage.mps_clients > 0).then_some(usage.mps_clients.into()));
        to.add_known(assigned, blocks, pair.assigned.then_some(1.0));
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
