//! Writes the families of what containers with a GPU waited for besides it. They have no `uuid`: the waiting is not for a single GPU.

use std::collections::HashSet;

use sampler_core::observation::PressureFact;
use sampler_core::units::ContainerKey;
use strum::VariantArray as _;

use super::catalogue::pressure as families;
use super::encode::{Labels, Page};
use super::exposition::Exposition;
use super::series_starts::{SeriesOwner, SeriesStarts};
use crate::observe::pressure::{Outcome, PressureView};

type StalledNs = fn(&PressureFact) -> Option<u64>;

/// The values of the label `resource`.
const RESOURCES: [(&str, StalledNs); 3] =
    [("cpu", |fact| fact.cpu_some_ns), ("memory", |fact| fact.memory_some_ns), ("io", |fact| fact.io_some_ns)];

/// One series for each container, however many GPUs it has; none for what is unknown.
pub fn containers(page: &Exposition, view: &PressureView, to: &mut Page, starts: &mut SeriesStarts) {
    let [throttled, pressure] = [&families::CPU_THROTTLED_SECONDS, &families::PRESSURE_SECONDS].map(|family| to.family(family));
    let mut exposed = HashSet::new();
    for pair in page.one_pair_of_each_container() {
        exposed.insert(pair.key);
        let Some(fact) = view.facts.get(&pair.key) else { continue };
        let (block, mut series) = (pair.container_block(), starts.of(SeriesOwner::Container(pair.key)));
        if let Some(quota) = fact.cpu {
            to.add_from_zero(throttled, (&mut series, ""), &*block, quota.throttled_ns as f64 / 1e9);
        }
        for (resource, stalled_ns) in RESOURCES {
            let Some(ns) = stalled_ns(fact) else { continue };
            let labels = Labels { blocks: [&block, ""], more: &[("resource", resource)] };
            to.add_from_zero(pressure, (&mut series, resource), labels, ns as f64 / 1e9);
        }
    }
    // One that has released its GPUs may get one again, and not every scraper sees it missing.
    let is_known = |key: &ContainerKey| exposed.contains(key) || view.facts.contains_key(key);
    starts.retain(|owner| !matches!(owner, SeriesOwner::Container(key) if !is_known(key)));
}

/// The cost of reading these values.
pub fn reads(view: &PressureView, to: &mut Page) {
    let reads = Outcome::VARIANTS.iter().zip(view.reads);
    to.add_each(&families::READS, "outcome", reads.map(|(outcome, n)| (outcome.name(), n as f64)));
    to.add_one(&families::READ_SECONDS, view.took.as_secs_f64());
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use sampler_core::cgroup_path::parse;
    use sampler_core::device::GpuInfo;
    use sampler_core::identity::ContainerRecord;
    use sampler_core::observation::CpuQuota;
    use sampler_core::snapshot::ContainerGpu;
    use sampler_core::units::{BootNs, GpuUuid};
    use sampler_labels::ContainerLabels;

    use super::super::encode::TextFormat;
    use super::super::exposition::ExportedPair;
    use super::super::scrapers::tests::scrape;
    use super::*;
    use crate::collectors::Selection;

    fn pair(key: u64, gpu: &str) -> ExportedPair {
        let cgroup_path = format!("/docker/{key:064x}");
        let identity = parse(&cgroup_path);
        let (key, created) = (ContainerKey(key), BootNs(0));
        let labels = ContainerLabels::from_path(&ContainerRecord { key, cgroup_path, identity, created, creation_seen: true });
        ExportedPair {
            key,
            container_id: Arc::from("c"),
            labels: Arc::new(labels),
            device: Arc::new(GpuInfo { uuid: GpuUuid(gpu.into()), ..GpuInfo::default() }),
            memory_total_bytes: None,
            usage: ContainerGpu::default(),
            created: None,
            contenders: Vec::new(),
            gone: false,
            assigned: None,
            waits: None,
            held_idle_seconds: 0.0,
            text: Arc::default(),
        }
    }

    /// "resource value" of each series.
    fn exposed(starts: &mut SeriesStarts, pairs: &[ExportedPair], facts: &[PressureFact]) -> Vec<String> {
        let page = Exposition { pairs: pairs.to_vec(), ..Exposition::default() };
        let facts: HashMap<_, _> = facts.iter().map(|fact| (fact.key, *fact)).collect();
        let mut all = Page::new(Selection::ALL, TextFormat::Prometheus);
        scrape(starts);
        containers(&page, &PressureView { facts, ..PressureView::default() }, &mut all, starts);
        let value = |line: &str| {
            let resource = line.split("resource=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap_or("quota");
            format!("{resource} {}", line.rsplit(' ').next().unwrap())
        };
        all.text().lines().filter(|line| !line.starts_with('#')).map(value).collect()
    }

    #[test]
    fn a_container_has_one_series_for_all_its_gpus_and_none_for_unknown_values() {
        let quota = CpuQuota { throttled_ns: 2_500_000_000, ..CpuQuota::default() };
        let key = ContainerKey(1);
        let fact = PressureFact { key, cpu: Some(quota), memory_some_ns: Some(0), ..PressureFact::default() };
        let pairs = [pair(1, "GPU-a"), pair(1, "GPU-b"), pair(2, "GPU-b")];
        assert_eq!(exposed(&mut SeriesStarts::default(), &pairs, &[fact]), ["quota 2.5", "memory 0"]);
    }

    #[test]
    fn a_series_that_appears_later_starts_at_zero() {
        let mut starts = SeriesStarts::default();
        let fact =
            |io| PressureFact { key: ContainerKey(1), cpu_some_ns: Some(3_000_000_000), io_some_ns: io, ..Default::default() };
        let pairs = [pair(1, "GPU-a")];
        assert_eq!(exposed(&mut starts, &pairs, &[fact(None)]), ["cpu 3"]);
        assert_eq!(exposed(&mut starts, &pairs, &[fact(Some(1_000_000_000))]), ["cpu 3", "io 0"]);
        assert_eq!(exposed(&mut starts, &pairs, &[fact(Some(1_000_000_000))]), ["cpu 3", "io 1"]);
        assert_eq!(exposed(&mut starts, &[], &[fact(None)]), [""; 0], "it has no GPU for a while");
        assert_eq!(exposed(&mut starts, &pairs, &[fact(None)]), ["cpu 3"]);
        assert_eq!(exposed(&mut starts, &[], &[]), [""; 0]);
        assert_eq!(exposed(&mut starts, &pairs, &[fact(None)]), ["cpu 0"]);
    }
}
