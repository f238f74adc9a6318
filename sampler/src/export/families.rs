//! Every metric family: names, help, labels. The agent never emits instance, job, node, endpoint or service.

use sampler_common::kind;
use sampler_core::snapshot::WindowShares;
use sampler_labels::{ContainerLabels, Label};

use super::encode::{Families, Family, Labels};
use super::ledger::{Exposition, PairRow};
use crate::config::PodLabels;
use crate::health::{HealthView, IDENTIFY_BOUNDS};
use crate::labels::{LabelStats, RESOLVE_BOUNDS};

/// cAdvisor's own constant for this label.
const MAKE: &str = "nvidia";

/// The three families that replace cAdvisor's, with the generations of its pod labels that were asked for.
pub fn cadvisor(page: &Exposition, pods: PodLabels, to: &mut Families) {
    accelerator(
        to.gauge(
            "container_accelerator_duty_cycle",
            "Percent of time over the past 10 seconds in which this container kept the accelerator busy.",
        ),
        page,
        pods,
        |row| row.pair.duty_cycle_percent,
    );
    accelerator(to.gauge("container_accelerator_memory_total_bytes", "Total accelerator memory."), page, pods, |row| {
        row.memory_total_bytes.map(|b| b as f64)
    });
    accelerator(
        to.gauge("container_accelerator_memory_used_bytes", "Accelerator memory held by this container's processes."),
        page,
        pods,
        |row| row.pair.memory_used_bytes.map(|b| b as f64),
    );
}

fn accelerator(mut family: Family<'_>, page: &Exposition, pods: PodLabels, value: impl Fn(&PairRow) -> Option<f64>) {
    for row in &page.rows {
        let l = &row.labels;
        let mut labels = vec![
            ("acc_id", &*row.gpu.0),
            ("make", MAKE),
            ("model", &row.model),
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
        family.add_known(&labels, value(row));
    }
}

pub fn containers(page: &Exposition, to: &mut Families) {
    own(to.counter("container_gpu_seconds_total", "GPU-seconds credited to this container."), page, |r| Some(r.pair.seconds));
    own(to.gauge("container_gpu_seconds_stderr", "One standard error of container_gpu_seconds_total."), page, |r| {
        Some(r.pair.seconds_stderr)
    });
    own(to.counter("container_gpu_samples_total", "Driver samples behind container_gpu_seconds_total."), page, |r| {
        Some(r.pair.samples as f64)
    });
    let ratio = |percent: Option<f64>| percent.map(|p| p / 100.0);
    let help = "Part of the past 10 seconds in which this container kept the GPU busy.";
    own(to.gauge("container_gpu_utilization_ratio", help), page, |r| ratio(r.pair.duty_cycle_percent));
    let help = "One standard error of container_gpu_utilization_ratio.";
    own(to.gauge("container_gpu_utilization_stderr_ratio", help), page, |r| ratio(r.pair.duty_cycle_stderr));
    let help = "Credited share of wall time over windows of 10 seconds.";
    let mut shares = to.histogram("container_gpu_window_share_ratio", help);
    for row in &page.rows {
        if let Some(w) = &row.pair.window_shares {
            with_labels(row, &[], |labels| shares.add_histogram(labels, &WindowShares::BOUNDS, &w.buckets, w.sum, w.count));
        }
    }
    let help = "Seconds of the engines beside compute, each sampled by itself, credited to this container.";
    let mut engines = to.counter("container_gpu_engine_seconds_total", help);
    for row in &page.rows {
        for (engine, seconds) in &row.pair.engines {
            with_labels(row, &[("engine", engine.name())], |labels| engines.add(labels, *seconds));
        }
    }
    contention(page, to);
    own(to.gauge("container_gpu_memory_used_bytes", "GPU memory held by this container's processes."), page, |r| {
        r.pair.memory_used_bytes.map(|b| b as f64)
    });
    let help = "Processes of this container that share the GPU through the multi-process service: no sample tells them apart.";
    own(to.gauge("container_gpu_mps_clients", help), page, |r| (r.pair.mps_clients > 0).then_some(r.pair.mps_clients.into()));
    own(
        to.gauge("container_gpu_assigned", "1 where the kubelet has assigned this GPU, or a part of it, to the container."),
        page,
        |r| r.assigned.then_some(1.0),
    );
    let mut info = to.gauge("container_gpu_info", "What a container_id stands for.");
    let mut told = std::collections::HashSet::new();
    for row in page.rows.iter().filter(|row| told.insert(&row.container_id)) {
        let l = &row.labels;
        let labels = [
            ("container_id", &*row.container_id),
            ("image", l.text(Label::Image)),
            ("name", l.text(Label::Name)),
            ("runtime", l.runtime.map_or("", |r| r.name())),
            ("pod_uid", l.pod_uid.as_deref().unwrap_or_default()),
            ("id", &l.id),
        ];
        info.add(&labels, 1.0);
    }
}

fn contention(page: &Exposition, to: &mut Families) {
    let help = "Seconds in which this container and another user were active on the same GPU. Too small where \
                gpu_sampler_queried_samples_total grows much slower than gpu_sampler_samples_total.";
    own(to.counter("container_gpu_coactive_seconds_total", help), page, |r| Some(r.pair.coactive_seconds));
    let help = "GPU-seconds that another user got while this container was active and the GPU saturated. Too small where \
                gpu_sampler_queried_samples_total grows much slower than gpu_sampler_samples_total.";
    let mut contention = to.counter("container_gpu_contention_seconds_total", help);
    for row in &page.rows {
        for other in &row.others {
            let labels = [
                ("other_namespace", other.text(Label::Namespace)),
                ("other_pod", other.text(Label::Pod)),
                ("other_container", other.text(Label::Container)),
                ("other_container_id", &other.container_id),
            ];
            with_labels(row, &labels, |labels| contention.add(labels, other.seconds));
        }
    }
}

fn own(mut family: Family<'_>, page: &Exposition, value: impl Fn(&PairRow) -> Option<f64>) {
    for row in &page.rows {
        if let Some(value) = value(row) {
            with_labels(row, &[], |labels| family.add(labels, value));
        }
    }
}

fn with_labels(row: &PairRow, more: &[(&str, &str)], add: impl FnOnce(Labels<'_>)) {
    let l: &ContainerLabels = &row.labels;
    let mut labels = vec![
        ("uuid", &*row.gpu.0),
        ("namespace", l.text(Label::Namespace)),
        ("pod", l.text(Label::Pod)),
        ("container", l.text(Label::Container)),
        ("container_id", &row.container_id),
    ];
    labels.extend(row.parent.as_ref().map(|parent| ("gpu_uuid", &*parent.0)));
    labels.extend(more);
    add(&labels);
}

pub fn agent(page: &Exposition, health: &HealthView, labels: &LabelStats, nvml: &str, to: &mut Families) {
    let mut containers = to.gauge("gpu_sampler_containers", "Live containers, with a GPU or without.");
    for ((state, runtime), n) in &page.containers {
        containers.add(&[("state", state), ("runtime", runtime)], *n as f64);
    }
    let mut missing = to.gauge("gpu_sampler_label_missing", "Live containers that lack a label their kind should have.");
    for label in Label::ALL {
        missing.add(&[("label", label.name())], page.missing.get(label.name()).copied().unwrap_or_default() as f64);
    }
    to.histogram("gpu_sampler_resolve_seconds", "From a cgroup's creation to complete labels.").add_histogram(
        &[],
        &RESOLVE_BOUNDS,
        &labels.resolve_buckets,
        labels.resolve_sum,
        labels.resolve_count,
    );
    let mut up = to.gauge(
        "gpu_sampler_source_up",
        "1 while a source answers; 0 while it fails, or while a socket that was there or was given is gone.",
    );
    for ((source, endpoint), is_up) in &labels.up {
        up.add(&[("source", source), ("endpoint", endpoint)], f64::from(u8::from(*is_up)));
    }
    up.add_known(&[("source", "nvml"), ("endpoint", nvml)], health.nvml_up.map(|is_up| f64::from(u8::from(is_up))));
    for (name, help, counts) in [
        ("gpu_sampler_runtime_calls_total", "Questions put to runtimes' sockets.", &labels.calls),
        ("gpu_sampler_file_reads_total", "Label sources' files looked for.", &labels.reads),
    ] {
        let mut family = to.counter(name, help);
        for ((source, outcome), n) in counts {
            family.add(&[("source", source), ("outcome", outcome)], *n as f64);
        }
    }
    for (name, help, counts) in [
        ("gpu_sampler_kernel_events_total", "Kernel events read.", &health.events_seen),
        (
            "gpu_sampler_kernel_events_lost_total",
            "Kernel events not delivered: their ring was full, a field could not be read, or the kernel skipped the program.",
            &health.events_lost.of_kind,
        ),
    ] {
        let mut family = to.counter(name, help);
        for (kind, n) in kind::NAMES.iter().zip(counts) {
            family.add(&[("kind", kind)], *n as f64);
        }
    }
    let help = "Of gpu_sampler_kernel_events_lost_total, runs of a program that the kernel skipped. Runs for threads count as well, so fewer \
                events may be lost.";
    to.counter("gpu_sampler_kernel_skips_total", help).add(&[], health.events_lost.skipped as f64);
    to.counter("gpu_sampler_kernel_drain_seconds_total", "Processor time spent on reading kernel events into the tables.")
        .add(&[], health.drained.as_secs_f64());
    to.counter("gpu_sampler_resyncs_total", "Scans after lost kernel events.").add(&[], health.resyncs as f64);
    to.counter("gpu_sampler_resync_repairs_total", "Entries that such scans put right.").add(&[], health.repairs as f64);
    to.counter(
        "gpu_sampler_liveness_repairs_total",
        "Dead processes that the check against /proc removed though no loss was counted.",
    )
    .add(&[], health.liveness_repairs as f64);
    let (p, (cgroups, cgroup_bytes, cgroups_evicted)) = (health.processes, health.cgroups);
    let mut entries = to.gauge("gpu_sampler_identity_entries", "Entries of the identity tables.");
    for (table, n) in [("living", p.living), ("exited", p.exited), ("cgroups", cgroups)] {
        entries.add(&[("table", table)], n as f64);
    }
    let mut bytes = to.gauge("gpu_sampler_identity_bytes", "Memory of the identity tables, spare capacity included.");
    for (table, n) in [("living", p.living_bytes), ("exited", p.exited_bytes), ("cgroups", cgroup_bytes)] {
        bytes.add(&[("table", table)], n as f64);
    }
    let mut evicted = to.counter("gpu_sampler_identity_evictions_total", "Entries given up before their time for want of room.");
    for (table, n) in [("exited", p.evicted), ("cgroups", cgroups_evicted)] {
        evicted.add(&[("table", table)], n as f64);
    }
    to.gauge("gpu_sampler_inotify_watches", "Watches held in kernel mode inotify.").add(&[], health.watches as f64);
    let t = &health.identified;
    to.histogram("gpu_sampler_identify_seconds", "From a cgroup's creation in the kernel to its place in the tables.")
        .add_histogram(&[], &IDENTIFY_BOUNDS, &t.buckets, t.sum_seconds, t.count);
    to.gauge("gpu_sampler_kernel_mode", "How processes and cgroups are followed.").add(&[("mode", health.kernel_mode)], 1.0);
    let help = "Whether the pids that the driver returns are pids of this machine: local, foreign, unsettled or unverifiable; GPU time is \
                pid_unknown while foreign or unsettled. Value is always 1.";
    to.gauge("gpu_sampler_pid_space", help).add(&[("state", health.pid_space.name())], 1.0);
    let mut degraded =
        to.gauge("gpu_sampler_degraded", "A condition that /api/v1/live, the page and the log explain; absent when it is over.");
    for (condition, _) in &health.degraded {
        degraded.add(&[("condition", condition)], 1.0);
    }
    let commit = option_env!("GPU_SAMPLER_COMMIT").unwrap_or("unknown");
    to.gauge("gpu_sampler_build_info", "What runs.").add(&[("version", env!("CARGO_PKG_VERSION")), ("commit", commit)], 1.0);
}
