//! Writes the families of containers, of other users and of the agent.

use sampler_common::kind;
use sampler_core::cgroup_path::HostUser;
use sampler_core::snapshot::WindowShares;
use sampler_core::units::WallTime;
use sampler_labels::Label;
use strum::VariantArray as _;

use super::catalogue::{
    agent as agent_families, cadvisor as cadvisor_families, containers as container_families, users as user_families,
};
use super::encode::{FamilyId, HistogramValue, Labels, Page};
use super::exposition::{ExportedPair, Exposition};
use super::label_text::GpuText;
use super::rejections::Rejections;
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
    for pair in page.pairs.iter().filter(|pair| !pair.is_host_user()) {
        let labels = Labels::from([&*gpus[pair.usage.gpu].accelerator, &pair.text.accelerator]);
        to.add_known(duty, labels, pair.usage.duty_cycle_percent);
        to.add_known(total, labels, pair.memory_total_bytes.map(|b| b as f64));
        to.add_known(used, labels, pair.usage.memory_used_bytes.map(|b| b as f64));
    }
}

/// The families of one kind of users: the same quantities for all.
struct UserFamilies {
    seconds: FamilyId,
    stderr: FamilyId,
    samples: FamilyId,
    energy: FamilyId,
    utilization: FamilyId,
    utilization_stderr: FamilyId,
    shares: FamilyId,
    engines: FamilyId,
    coactive: FamilyId,
    held_idle: FamilyId,
    contention: FamilyId,
    memory: FamilyId,
    mps_clients: FamilyId,
}

macro_rules! user_families {
    ($module:ident, $to:ident) => {
        UserFamilies {
            seconds: $to.family(&$module::SECONDS),
            stderr: $to.family(&$module::SECONDS_STDERR),
            samples: $to.family(&$module::SAMPLES),
            energy: $to.family(&$module::ENERGY),
            utilization: $to.family(&$module::UTILIZATION),
            utilization_stderr: $to.family(&$module::UTILIZATION_STDERR),
            shares: $to.family(&$module::WINDOW_SHARE),
            engines: $to.family(&$module::ENGINE_SECONDS),
            coactive: $to.family(&$module::COACTIVE_SECONDS),
            held_idle: $to.family(&$module::HELD_IDLE_SECONDS),
            contention: $to.family(&$module::CONTENTION_SECONDS),
            memory: $to.family(&$module::MEMORY_USED),
            mps_clients: $to.family(&$module::MPS_CLIENTS),
        }
    };
}

/// Containers, and pods.
pub fn containers(page: &Exposition, to: &mut Page, starts: &mut SeriesStarts) {
    let families = user_families!(container_families, to);
    let assigned = to.family(&container_families::ASSIGNED);
    let pressure = to.family(&container_families::CONTENDER_PRESSURE);
    let gpus = gpu_texts(page);
    for pair in page.pairs.iter().filter(|pair| !pair.is_host_user()) {
        let blocks = [&*gpus[pair.usage.gpu].own, &pair.text.own];
        families.add(pair, blocks, to, starts);
        for contender in &pair.contenders {
            to.add_known(pressure, Labels { blocks, more: &contender.series_labels() }, contender.pressure_ratio);
        }
        if let Some(source) = pair.assigned {
            to.add(assigned, Labels { blocks, more: &[("source", source.name())] }, 1.0);
        }
    }
    container_info(page, to);
}

/// Jobs, units and login sessions.
pub fn users(page: &Exposition, to: &mut Page, starts: &mut SeriesStarts) {
    let families = user_families!(user_families, to);
    let gpus = gpu_texts(page);
    for pair in page.pairs.iter().filter(|pair| pair.is_host_user()) {
        families.add(pair, [&*gpus[pair.usage.gpu].own, &pair.text.own], to, starts);
    }
    user_info(page, to);
}

impl UserFamilies {
    fn add(&self, pair: &ExportedPair, blocks: [&str; 2], to: &mut Page, starts: &mut SeriesStarts) {
        let usage = &pair.usage;
        let ratio = |percent: Option<f64>| percent.map(|p| p / 100.0);
        let mut series = starts.of(SeriesOwner::ContainerGpu(pair.key, pair.gpu().clone())).created(pair.created);
        to.add_from_zero(self.seconds, (&mut series, ""), blocks, usage.seconds);
        to.add_from_zero(self.stderr, (&mut series, ""), blocks, usage.seconds_stderr);
        to.add_from_zero(self.samples, (&mut series, ""), blocks, usage.samples as f64);
        if let Some(joules) = usage.energy_joules {
            to.add_from_zero(self.energy, (&mut series, ""), blocks, joules);
        }
        to.add_known(self.utilization, blocks, ratio(usage.duty_cycle_percent));
        to.add_known(self.utilization_stderr, blocks, ratio(usage.duty_cycle_stderr));
        if let Some(w) = &usage.window_shares {
            let value = HistogramValue { bounds: &WindowShares::BOUNDS, cumulative: &w.buckets, sum: w.sum, count: w.count };
            to.add_histogram_from_zero(self.shares, &mut series, blocks, value);
        }
        for (engine, seconds) in &usage.engines {
            let labels = Labels { blocks, more: &[("engine", engine.name())] };
            to.add_from_zero(self.engines, (&mut series, engine.name()), labels, *seconds);
        }
        to.add_from_zero(self.coactive, (&mut series, ""), blocks, usage.coactive_seconds);
        to.add_from_zero(self.held_idle, (&mut series, ""), blocks, pair.held_idle_seconds);
        for contender in &pair.contenders {
            let labels = Labels { blocks, more: &contender.series_labels() };
            to.add_from_zero(self.contention, (&mut series, &contender.container_id), labels, contender.seconds);
        }
        to.add_known(self.memory, blocks, usage.memory_used_bytes.map(|b| b as f64));
        to.add_known(self.mps_clients, blocks, (usage.mps_clients > 0).then_some(usage.mps_clients.into()));
    }
}

/// The first pair of each user, by the name that its series have.
fn each_user(page: &Exposition, is_host_user: bool) -> impl Iterator<Item = &ExportedPair> {
    let mut written = std::collections::HashSet::new();
    page.pairs.iter().filter(move |pair| pair.is_host_user() == is_host_user && written.insert(&pair.container_id))
}

fn container_info(page: &Exposition, to: &mut Page) {
    let info = to.family(&container_families::INFO);
    for pair in each_user(page, false) {
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

fn user_info(page: &Exposition, to: &mut Page) {
    let info = to.family(&user_families::INFO);
    for pair in each_user(page, true) {
        let l = &pair.labels;
        let details = l.details.as_deref().cloned().unwrap_or_default();
        let uid = details.uid.or(l.host_user.as_ref().and_then(HostUser::uid)).map(|uid| uid.to_string());
        let (scheduler, job_id, unit) = match &l.host_user {
            Some(HostUser::Job(job)) => (job.scheduler.name(), details.job_id.as_ref().unwrap_or(&job.id).as_str(), ""),
            Some(HostUser::Unit(unit)) => ("", "", unit.name.as_str()),
            Some(HostUser::Login(_)) | None => ("", "", ""),
        };
        let text = |value: &'_ Option<String>| value.clone().unwrap_or_default();
        let labels = [
            ("kind", l.kind.user_kind()),
            ("user", &*pair.container_id),
            ("scheduler", scheduler),
            ("job_id", job_id),
            ("job_name", &text(&details.job_name)),
            ("uid", &text(&uid)),
            ("user_name", &text(&details.user_name)),
            ("partition", &text(&details.partition)),
            ("unit", unit),
            ("container_id", l.outer_container_id.as_deref().unwrap_or_default()),
            ("namespace", l.text(Label::Namespace)),
            ("pod", l.text(Label::Pod)),
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

/// `exports`: by outcome.
pub fn otlp(exports: Option<Vec<(&'static str, f64)>>, to: &mut Page) {
    to.add_each(&agent_families::OTLP_EXPORTS, "outcome", exports.into_iter().flatten());
}

/// `expires`: the certificate of the server.
pub fn http(rejections: &Rejections, expires: Option<WallTime>, to: &mut Page) {
    to.add_each(&agent_families::HTTP_REJECTIONS, "reason", rejections.counts());
    let expiry = to.family(&agent_families::CERTIFICATE_EXPIRY);
    to.add_known(expiry, "", expires.map(WallTime::seconds));
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
