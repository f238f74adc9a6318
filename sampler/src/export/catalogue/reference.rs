//! `docs/metrics.md`, written from the catalogue.

use std::collections::BTreeSet;

use prometheus::proto::MetricType;

use super::{Family, agent, cadvisor, containers, gpus, nvml, pressure, samples, sessions};

const GROUPS: [(&str, &[&Family]); 8] = [
    ("Replacements for cAdvisor", cadvisor::ALL),
    ("Containers", containers::ALL),
    ("Waiting for other resources", pressure::ALL),
    ("GPUs", gpus::ALL),
    ("Samples and clocks", samples::ALL),
    ("Agent", agent::ALL),
    ("Driver calls", nvml::ALL),
    ("Sessions", sessions::ALL),
];

/// Every label with its meaning.
const LABELS: [(&str, &str); 41] = [
    ("acc_id", "UUID of the accelerator: a GPU or a MIG device"),
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
    ("kind", "kind of the kernel event: `fork`, `exec`, `exit`, `mkdir`, `rmdir`, `rename` or `attach`"),
    ("label", "`name`, `image`, `namespace`, `pod` or `container`"),
    ("make", "always `nvidia`"),
    ("mig_mode", "`enabled`, `disabled` or `unsupported`"),
    ("mode", "kernel mode"),
    ("model", "model of the GPU"),
    ("name", "name of the container in its runtime"),
    ("namespace", "Kubernetes namespace; empty outside Kubernetes"),
    (
        "other_container",
        "`container` of the contender, or its kind: `host`, `unknown`, or `_other` for all beyond the first eight",
    ),
    ("other_container_id", "`container_id` of the contender, or its kind"),
    ("other_namespace", "`namespace` of the contender"),
    ("other_pod", "`pod` of the contender"),
    ("outcome", "outcome of the read or query, such as `ok` or `error`"),
    ("pci_bus_id", "PCI bus id of the GPU"),
    ("pod", "name of the pod; empty outside Kubernetes"),
    ("pod_name", "as `pod`; the name before Kubernetes 1.16, depending on `pod_labels`"),
    ("pod_uid", "UID of the pod"),
    ("reason", "reason: of unattributed time, of the clocks, or of the rejection"),
    ("resource", "`cpu`, `memory` or `io`"),
    ("runtime", "container runtime"),
    ("source", "label source, or `nvml`"),
    ("state", "state of the GPU time, of the labels, of the PID space, or of the session"),
    ("table", "`living` and `exited` processes, or `cgroups`"),
    ("uuid", "UUID of the GPU or the MIG device"),
    ("version", "version of the agent"),
    ("xid", "number of the XID error"),
];

const INTRODUCTION: &str = "\
# Metrics

<!-- Generated from sampler/src/export/catalogue by `cargo xtask docs`; do not edit. -->

`/metrics` has all families, `/metrics/cadvisor` only those of the first table. A family without series is left out.

- Unknown values are absent, never 0. Every series of a container is absent until the labels of the container are settled.
- Series of a container that has ended stay for 60 seconds and until its last values were scraped twice, but no longer
  than 300 seconds.
- Families marked \"from 0\": a series that appears after the first scrape is 0 in its first exposition, so `increase()`
  covers all of it.
- A GPU in MIG mode has readings; its MIG devices have time, samples and memory.
- Histograms have the series `_bucket` (with the label `le`), `_sum` and `_count`.
- The agent never emits the labels `instance`, `job`, `node`, `endpoint` (except on `gpu_sampler_source_up`) or
  `service`: these belong to the scraper.
";

pub fn all() -> impl Iterator<Item = &'static Family> {
    GROUPS.into_iter().flat_map(|(_, families)| families.iter().copied())
}

fn kind(family: &Family) -> &'static str {
    match family.kind {
        MetricType::COUNTER => "counter",
        MetricType::HISTOGRAM => "histogram",
        _ => "gauge",
    }
}

fn row(family: &Family) -> String {
    let labels: Vec<String> = family.labels.iter().map(|label| format!("`{label}`")).collect();
    let start = if family.starts_at_zero { "from 0" } else { "" };
    let absent = family.absent.unwrap_or("never");
    let cells = [&format!("`{}`", family.name), kind(family), start, family.unit, &labels.join(", "), family.help, absent];
    format!("| {} |\n", cells.join(" | "))
}

fn markdown() -> String {
    let mut text = INTRODUCTION.to_owned();
    for (title, families) in GROUPS {
        text += &format!(
            "\n## {title}\n\n| family | type | start | unit | labels | meaning | absent |\n|---|---|---|---|---|---|---|\n"
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
        let (name, is_counter) = (family.name, family.kind == MetricType::COUNTER);
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
