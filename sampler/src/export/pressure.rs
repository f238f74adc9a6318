//! What containers with a GPU waited for beside it: families without `uuid`, as the waiting is of no single GPU.

use std::collections::HashSet;

use sampler_core::observation::PressureFact;
use sampler_core::units::ContainerKey;
use sampler_labels::Label;

use super::encode::{Families, Labels};
use super::ledger::{Exposition, PairRow};
use crate::observe::pressure::{Outcome, PressureView};

/// Which series were shown: as in the ledger, one that appears after the first scrape begins at 0.
#[derive(Debug, Default)]
pub struct Waits {
    shown: HashSet<(ContainerKey, &'static str)>,
    scraped: bool,
}

type Waited = fn(&PressureFact) -> Option<u64>;

/// The value of the label `resource`, and ns by it.
const RESOURCES: [(&str, Waited); 3] =
    [("cpu", |fact| fact.cpu_some_ns), ("memory", |fact| fact.memory_some_ns), ("io", |fact| fact.io_some_ns)];
const QUOTA: &str = "quota";

fn labels<'a>(row: &'a PairRow, resource: Option<&'a str>) -> Vec<(&'a str, &'a str)> {
    let l = &row.labels;
    let mut labels = vec![
        ("namespace", l.text(Label::Namespace)),
        ("pod", l.text(Label::Pod)),
        ("container", l.text(Label::Container)),
        ("container_id", &row.container_id),
    ];
    labels.extend(resource.map(|resource| ("resource", resource)));
    labels
}

impl Waits {
    pub fn add(&mut self, page: &Exposition, view: &PressureView, to: &mut Families) {
        let first = !std::mem::replace(&mut self.scraped, true);
        let mut seen = HashSet::new();
        let containers: Vec<(&PairRow, &PressureFact)> = page
            .rows
            .iter()
            .filter(|row| seen.insert(row.key))
            .filter_map(|row| Some((row, view.facts.get(&row.key)?)))
            .collect();
        self.shown.retain(|(key, _)| seen.contains(key));
        let mut add =
            |family: &mut super::encode::Family<'_>, row: &PairRow, of: &'static str, labels: Labels<'_>, ns: Option<u64>| {
                let Some(ns) = ns else { return };
                let begins = self.shown.insert((row.key, of)) && !first;
                family.add(labels, if begins { 0.0 } else { ns as f64 / 1e9 });
            };
        let help = "Seconds for which the quota on processor time held this container back, its own or its pod's.";
        let mut throttled = to.counter("container_gpu_cpu_throttled_seconds_total", help);
        for (row, fact) in &containers {
            add(&mut throttled, row, QUOTA, &labels(row, None), fact.cpu.map(|quota| quota.throttled_ns));
        }
        let help = "Seconds in which some process of this container waited for the resource (PSI, some).";
        let mut pressure = to.counter("container_gpu_pressure_seconds_total", help);
        for (row, fact) in &containers {
            for (resource, ns) in RESOURCES {
                add(&mut pressure, row, resource, &labels(row, Some(resource)), ns(fact));
            }
        }
    }
}

/// About the reading itself.
pub fn reads(view: &PressureView, to: &mut Families) {
    let mut family = to.counter("gpu_sampler_pressure_reads_total", "Files of cgroups read for what containers wait for.");
    for outcome in Outcome::ALL {
        family.add(&[("outcome", outcome.name())], view.reads[outcome as usize] as f64);
    }
    to.counter("gpu_sampler_pressure_read_seconds_total", "Time that reading them took.").add(&[], view.took.as_secs_f64());
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use sampler_core::cgroup_path::parse;
    use sampler_core::identity::ContainerRecord;
    use sampler_core::observation::CpuQuota;
    use sampler_core::snapshot::ContainerGpu;
    use sampler_core::units::{BootNs, GpuUuid};
    use sampler_labels::ContainerLabels;

    use super::*;

    fn row(key: u64, gpu: &str) -> PairRow {
        let cgroup_path = format!("/docker/{key:064x}");
        let identity = parse(&cgroup_path);
        let (key, created) = (ContainerKey(key), BootNs(0));
        let labels = ContainerLabels::from_path(&ContainerRecord { key, cgroup_path, identity, created, creation_seen: true });
        PairRow {
            key,
            container_id: Arc::from("c"),
            labels: Arc::new(labels),
            gpu: GpuUuid(gpu.into()),
            parent: None,
            model: String::new(),
            memory_total_bytes: None,
            pair: ContainerGpu::default(),
            others: Vec::new(),
            gone: false,
            assigned: false,
        }
    }

    fn lines(waits: &mut Waits, rows: &[PairRow], facts: &[PressureFact]) -> Vec<String> {
        let page = Exposition { rows: rows.to_vec(), ..Exposition::default() };
        let facts: HashMap<_, _> = facts.iter().map(|fact| (fact.key, *fact)).collect();
        let mut all = Families::default();
        waits.add(&page, &PressureView { facts, ..PressureView::default() }, &mut all);
        let value = |line: &str| {
            let resource = line.split("resource=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap_or("quota");
            format!("{resource} {}", line.rsplit(' ').next().unwrap())
        };
        all.text().unwrap().lines().filter(|line| !line.starts_with('#')).map(value).collect()
    }

    #[test]
    fn a_container_has_one_series_each_whatever_its_gpus_and_none_of_what_is_unknown() {
        let quota = CpuQuota { throttled_ns: 2_500_000_000, ..CpuQuota::default() };
        let key = ContainerKey(1);
        let fact = PressureFact { key, cpu: Some(quota), memory_some_ns: Some(0), ..PressureFact::default() };
        let rows = [row(1, "GPU-a"), row(1, "GPU-b"), row(2, "GPU-b")];
        assert_eq!(lines(&mut Waits::default(), &rows, &[fact]), ["quota 2.5", "memory 0"]);
    }

    #[test]
    fn what_appears_later_begins_at_zero() {
        let mut waits = Waits::default();
        let fact =
            |io| PressureFact { key: ContainerKey(1), cpu_some_ns: Some(3_000_000_000), io_some_ns: io, ..Default::default() };
        let rows = [row(1, "GPU-a")];
        assert_eq!(lines(&mut waits, &rows, &[fact(None)]), ["cpu 3"]);
        assert_eq!(lines(&mut waits, &rows, &[fact(Some(1_000_000_000))]), ["cpu 3", "io 0"]);
        assert_eq!(lines(&mut waits, &rows, &[fact(Some(1_000_000_000))]), ["cpu 3", "io 1"]);
        assert_eq!(lines(&mut waits, &[], &[]), [""; 0]);
        assert_eq!(lines(&mut waits, &rows, &[fact(None)]), ["cpu 0"]);
    }
}
