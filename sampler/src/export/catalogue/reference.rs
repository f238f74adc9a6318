//! `docs/metrics.md`, written from the catalogue.

use std::collections::BTreeSet;

use sampler_core::snapshot::WindowShares;
use strum::{EnumCount as _, VariantArray as _};

use super::{Family, Kind, agent, cadvisor, containers, gpus, nvml, pressure, samples, sessions, users, waits};
use crate::collectors::Collector;
use crate::health::nvml_calls::Call;
use crate::health::{CALL_BOUNDS, IDENTIFY_BOUNDS};
use crate::labels::RESOLVE_BOUNDS;

const GROUPS: [(&str, &[&Family]); 10] = [
    ("Replacements for cAdvisor", cadvisor::ALL),
    ("Containers", containers::ALL),
    ("Jobs, units and login sessions", users::ALL),
    ("Waiting for GPUs", waits::ALL),
    ("Waiting for other resources", pressure::ALL),
    ("GPUs", gpus::ALL),
    ("Samples and clocks", samples::ALL),
    ("Agent", agent::ALL),
    ("Driver calls", nvml::ALL),
    ("Sessions", sessions::ALL),
];

/// Every label with its meaning.
const LABELS: [(&str, &str); 51] = [
    ("acc_id", "UUID of the accelerator: a GPU or a MIG device"),
    (
        "action",
        "`none`, `reset`, `reboot`, `drain_p2p`, `drain_and_reset`, or `other` for an action that this version does not know",
    ),
    ("call", "driver call"),
    ("commit", "commit of the build"),
    ("condition", "key of the condition"),
    ("container", "name of the container within its pod"),
    ("container_id", "id of the container; the path of its cgroup if another container has the same id"),
    ("container_name", "as `container`; the name before Kubernetes 1.16, depending on `pod_labels`"),
    ("driver_version", "version of the NVIDIA driver"),
    ("endpoint", "socket, folder or library of the source"),
    ("engine", "`memory`, `encoder`, `decoder`, `jpeg` or `ofa`"),
    ("error", "error of the driver"),
    ("gpu_uuid", "UUID of the GPU of a MIG device; only on series of MIG devices"),
    ("id", "path of the cgroup"),
    ("image", "image of the container"),
    ("index", "index of the GPU"),
    ("job_id", "id or number of the job; empty if it is not a job"),
    ("job_name", "name of the job; empty if unknown"),
    (
        "kind",
        "kind of the user: `container`, `pod`, `job`, `unit` or `login`; or of the kernel event: `fork`, `exec`, `exit`, `mkdir`, `rmdir`, \
         `rename` or `attach`",
    ),
    ("label", "`name`, `image`, `namespace`, `pod` or `container`"),
    ("make", "always `nvidia`"),
    ("mig_mode", "`enabled`, `disabled` or `unsupported`"),
    ("mode", "kernel mode"),
    ("model", "model of the GPU"),
    ("name", "name of the container in its runtime"),
    ("namespace", "Kubernetes namespace; empty outside Kubernetes"),
    (
        "other_container",
        "`container` of the contender, `user` of a job, unit or login session, or its kind: `host`, `unknown`, or `_other` for all beyond \
         the first eight",
    ),
    ("other_container_id", "`container_id` of the contender, or as `other_container`"),
    ("other_namespace", "`namespace` of the contender"),
    ("other_pod", "`pod` of the contender"),
    ("outcome", "outcome of the read or query, such as `ok` or `error`"),
    ("partition", "partition or queue of the job; empty if unknown"),
    ("pci_bus_id", "PCI bus id of the GPU"),
    ("pod", "name of the pod; empty outside Kubernetes"),
    ("pod_name", "as `pod`; the name before Kubernetes 1.16, depending on `pod_labels`"),
    ("pod_uid", "UID of the pod"),
    ("reason", "reason: of unattributed time or energy, of the clocks, or of the rejection"),
    ("resource", "`cpu`, `memory` or `io`"),
    ("runtime", "container runtime"),
    ("scheduler", "`slurm`, `nomad`, `htcondor`, `yarn`, `pbs`, `lsf` or `flux`; empty if it is not a job"),
    ("source", "label source, or `nvml`; of an assignment `checkpoint`, `claim`, `pod-resources` or `bundle`"),
    ("state", "state of the GPU time, of the labels, of the PID space, or of the session"),
    ("table", "`living` and `exited` processes, or `cgroups`"),
    ("type", "type of memory error: `corrected` or `uncorrected`; of remapped rows `correctable` or `uncorrectable`"),
    ("uid", "id of the owner; empty if unknown"),
    ("unit", "name of the unit of systemd; empty if it is not a unit"),
    ("user", "short name of a job, unit or login session: `slurm/12345`, `vllm.service`, `uid/1000`"),
    ("user_name", "name of the owner; empty if unknown"),
    ("uuid", "UUID of the GPU or the MIG device"),
    ("version", "version of the agent"),
    ("xid", "number of the XID error"),
];

/// Number of values of labels that are neither of a container nor of a GPU, where it is fixed or bounded.
const VALUES: [(&str, usize); 15] = [
    ("call", Call::COUNT),
    ("gpu_sampler_nvml_errors_total call", 1),
    ("engine", 5),
    ("kind", 7),
    ("label", 5),
    ("other_container_id", 9),
    ("resource", 3),
    ("gpu_sampler_identity_entries table", 3),
    ("gpu_sampler_identity_bytes table", 3),
    ("gpu_sampler_identity_evictions_total table", 2),
    ("gpu_throttle_seconds_total reason", 9),
    ("gpu_unattributed_energy_joules_total reason", 8),
    ("reason", 7),
    ("state", 4),
    ("type", 2),
];

const INTRODUCTION: &str = "\
# Metrics

<!-- Generated from sampler/src/export/catalogue by `cargo xtask docs`; do not edit. -->

`/metrics` has the families of the default collectors, `/metrics/cadvisor` only those of the first table. A family
without series is left out. `collect[]` selects other collectors: `/metrics?collect[]=default&collect[]=contenders` has
more families, `/metrics?collect[]=containers` fewer, `/metrics?collect[]=all` every one; in `scrape_configs` of
Prometheus it is `params: {\"collect[]\": [default, contenders]}`. The setting `collect` changes the default.

- Unknown values are absent, never 0. Every series of a container is absent until the labels of the container are settled.
- Series of a container that has ended stay for 60 seconds and until its last values were scraped twice, but no longer
  than 300 seconds.
- Families marked \"from 0\": a series that appears after the first scrape is 0 in its first exposition, so `increase()`
  covers all of it. This holds for every scraper, however many there are; the first scrape of a scraper has true values.
- A GPU in MIG mode has readings; its MIG devices have time, samples and memory.
- Histograms have the series `_bucket` (with the label `le`), `_sum` and `_count`.
- The page is in the text format 0.0.4 or in OpenMetrics 1.0, and compressed with gzip, as the `Accept` and
  `Accept-Encoding` of the request prefer.
- The agent never emits the labels `instance`, `job`, `node`, `endpoint` (except on `gpu_sampler_source_up`) or
  `service`: these belong to the scraper.
";

pub fn all() -> impl Iterator<Item = &'static Family> {
    GROUPS.into_iter().flat_map(|(_, families)| families.iter().copied())
}

const SCOPES: usize = 6;

/// What a family has a series of.
fn scope(family: &Family) -> usize {
    let has = |label: &str| family.labels.contains(&label);
    if has("user") {
        return if has("uuid") { 4 } else { 5 };
    }
    match (has("container_id") || has("acc_id"), has("uuid") || has("acc_id")) {
        (true, true) => 0,
        (true, false) => 1,
        (false, true) => 2,
        (false, false) => 3,
    }
}

/// Number of combinations of its labels for one of its scope, where their values are bounded.
fn combinations(family: &Family) -> usize {
    let values = |label: &str| {
        let of_family = format!("{} {label}", family.name);
        let known = |key: &str| VALUES.iter().find(|(name, _)| *name == key).map(|(_, values)| *values);
        known(&of_family).or_else(|| known(label)).unwrap_or(1)
    };
    // The kind of a user is one of its own labels.
    let is_own = |label: &str| label == "kind" && (family.labels.contains(&"user") || family.labels.contains(&"namespace"));
    family.labels.iter().filter(|label| !is_own(label)).map(|label| values(label)).product()
}

/// Number of series for one of its scope, without `_created`.
fn series(family: &Family) -> usize {
    let bounds = match family.name {
        "container_gpu_window_share_ratio" | "gpu_user_window_share_ratio" => WindowShares::BOUNDS.len(),
        "gpu_sampler_nvml_call_seconds" => CALL_BOUNDS.len(),
        "gpu_sampler_identify_seconds" => IDENTIFY_BOUNDS.len(),
        "gpu_sampler_resolve_seconds" => RESOLVE_BOUNDS.len(),
        _ => 0,
    };
    // A histogram has a bucket without bound, a sum and a count.
    let each = if family.kind == Kind::Histogram { bounds + 3 } else { 1 };
    combinations(family) * each
}

const CREATED_TIMES: &str = "
## Created times

`created` has no families. Added to other collectors, as in `/metrics?collect[]=default&collect[]=created`, it gives
each counter and histogram one more series with the suffix `_created`, only in the format OpenMetrics: the Unix time at
which the count was 0. It does not change as long as the series counts on.

- Counts about the agent: the start of the agent.
- A GPU, and a container on a GPU: the start of the agent, or the time of the last snapshot without it, at most some
  seconds before its first count. One that was assigned before it was used: the first scrape with it. They get a new
  time when they come back after their series have ended.
- Driver calls: when the device was opened.
- Absent where the driver or the kernel began to count before the agent, and while the clock of the machine is set to an
  earlier time.

Prometheus takes it as the start of the counter from version 3.0 on, with
`--enable-feature=created-timestamp-zero-ingestion`. Other versions, and this one without the flag, store each as a
series of its own, so `all` does not include `created`. The most series that it adds:

| to | container and GPU | container | GPU | agent | user and GPU | user |
|---|---:|---:|---:|---:|---:|---:|
";

fn created_times() -> String {
    let row = |name: &str, is_in: &dyn Fn(&Family) -> bool| {
        let mut counts = [0; SCOPES];
        for family in all().filter(|family| family.has_created && is_in(family)) {
            counts[scope(family)] += combinations(family);
        }
        format!("| `{name}` | {} |\n", counts.map(|count| count.to_string()).join(" | "))
    };
    let mut text = CREATED_TIMES.to_owned() + &row("default", &|family| family.collector.is_default()) + &row("all", &|_| true);
    text += "\nCounters without a created time:\n\n";
    let without = all().filter(|family| !family.has_created && family.kind != Kind::Gauge);
    text.extend(without.map(|family| format!("- `{}`\n", family.name)));
    text
}

/// The most series of each collector, by scope.
fn collectors() -> String {
    let mut text = "\n## Collectors\n\nThe most series for each container and GPU, each container, each GPU, the agent, each job, unit or login session (user)\n\
                    and GPU, and each such user. A label with values that depend on what happens on the node, such as the name of\n\
                    an error, is counted with one value.\n\n\
                    | collector | default | container and GPU | container | GPU | agent | user and GPU | user |\n\
                    |---|---|---:|---:|---:|---:|---:|---:|\n"
        .to_owned();
    let mut of_default = [0; SCOPES];
    for collector in Collector::VARIANTS.iter().filter(|collector| **collector != Collector::Created) {
        let mut counts = [0; SCOPES];
        for family in all().filter(|family| family.collector == *collector) {
            counts[scope(family)] += series(family);
        }
        if collector.is_default() {
            counts.iter().zip(&mut of_default).for_each(|(count, sum)| *sum += count);
        }
        let is_default = if collector.is_default() { "yes" } else { "" };
        text += &format!("| `{}` | {is_default} | {} |\n", collector.name(), counts.map(|count| count.to_string()).join(" | "));
    }
    text + &format!("| `default` | | {} |\n", of_default.map(|count| count.to_string()).join(" | "))
}

#[test]
fn a_pair_has_at_most_fourteen_series_by_default() {
    let default = || all().filter(|family| family.collector.is_default());
    let of_scope = |n: usize| default().filter(|family| scope(family) == n).map(series).sum::<usize>();
    assert!(of_scope(0) + of_scope(1) <= 14, "{} and {}", of_scope(0), of_scope(1));
}

fn row(family: &Family) -> String {
    let labels: Vec<String> = family.labels.iter().map(|label| format!("`{label}`")).collect();
    let start = if family.starts_at_zero { "from 0" } else { "" };
    let absent = family.absent.unwrap_or("never");
    let (name, collector) = (format!("`{}`", family.name), format!("`{}`", family.collector.name()));
    let cells = [&name, &collector, family.kind.name(), start, family.unit, &labels.join(", "), family.help, absent];
    format!("| {} |\n", cells.join(" | "))
}

fn markdown() -> String {
    let mut text = INTRODUCTION.to_owned() + &collectors() + &created_times();
    for (title, families) in GROUPS {
        text += &format!(
            "\n## {title}\n\n| family | collector | type | start | unit | labels | meaning | absent |\n|---|---|---|---|---|---|---|---|\n"
        );
        text.extend(families.iter().map(|family| row(family)));
    }
    text += "\n## Labels\n\n| label | meaning |\n|---|---|\n";
    text.extend(LABELS.map(|(label, meaning)| format!("| `{label}` | {meaning} |\n")));
    text
}

#[test]
fn docs_metrics_md_is_current() {
    super::super::tests::check_file("../docs/metrics.md", &markdown());
}

#[test]
fn every_label_has_a_meaning_and_is_used() {
    let used: BTreeSet<&str> = all().flat_map(|family| family.labels).copied().collect();
    assert_eq!(LABELS.map(|(label, _)| label).into_iter().collect::<BTreeSet<_>>(), used);
}

#[test]
fn names_and_help_texts_follow_the_conventions() {
    let mut names = BTreeSet::new();
    for family in all() {
        let (name, is_counter) = (family.name, family.kind == Kind::Counter);
        assert!(names.insert(name), "{name} is defined twice");
        assert_eq!(name.ends_with("_total"), is_counter, "{name}");
        let prefixes = ["container_accelerator_", "container_gpu_", "gpu_"];
        assert!(prefixes.iter().any(|prefix| name.starts_with(prefix)), "{name}");
        let is_unit_named =
            !matches!(family.unit, "seconds" | "bytes" | "ratio" | "watts" | "joules" | "hertz") || name.contains(family.unit);
        assert!(is_unit_named || name.ends_with("_stderr"), "{name}: {}", family.unit);
        let (help, absent) = (family.help, family.absent.unwrap_or("if it is"));
        assert!(help.ends_with('.') && !help.contains("  ") && !help.contains('|'), "{name}: {help}");
        assert!(!absent.ends_with('.') && absent.starts_with(|c: char| c.is_ascii_lowercase()), "{name}: {absent}");
    }
}
