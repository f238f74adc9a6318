//! docs/metrics.md is complete: it has every family of a real scrape, with its type and labels.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::kernel::{Actor, CgroupTree};
use gpu_sampler_tests::labels::{UID, bundle};
use gpu_sampler_tests::{Agent, Sim, get, parse, sum, wait_for};

const ACTOR: &str = env!("CARGO_BIN_EXE_actor");
/// A driver that samples all engines.
const WORLD: &str = "driver_version = '550.54.14'\n[[gpus]]";
const REFERENCE: &str = include_str!("../docs/metrics.md");
/// The label of histogram buckets; the reference states it once for all histograms.
const BUCKET: &str = "le";

/// Type and label names of a family.
#[derive(Debug, Default)]
struct Documented {
    kind: String,
    labels: BTreeSet<String>,
}

/// The rows `| family | collector | type | start | unit | labels | ... |` of the reference.
fn documented() -> BTreeMap<String, Documented> {
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, family, _, kind, _, _, labels, ..] = cells[..] else { return None };
        let name = family.strip_prefix('`')?.strip_suffix('`')?.to_owned();
        if !["container_", "gpu_"].iter().any(|prefix| name.starts_with(prefix)) {
            return None;
        }
        let labels = labels.split(", ").map(|label| label.trim_matches('`').to_owned()).collect();
        Some((name, Documented { kind: kind.to_owned(), labels }))
    };
    REFERENCE.lines().filter_map(row).collect()
}

/// Checks every series of the page; returns the number of families.
fn check(page: &str, documented: &BTreeMap<String, Documented>) -> Result<usize> {
    let mut current = None;
    let mut families = 0;
    for line in page.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let row = documented.get(name).with_context(|| format!("{name} has no row in docs/metrics.md"))?;
            ensure!(row.kind == kind, "{name} is a {kind}, but a {} in docs/metrics.md", row.kind);
            current = Some((name, row));
            families += 1;
        }
        for sample in parse(line) {
            let (name, row) = current.context("a series before the first family")?;
            ensure!(sample.name.starts_with(name), "{} is among the series of {name}", sample.name);
            let unlisted = sample.labels.keys().find(|label| *label != BUCKET && !row.labels.contains(*label));
            ensure!(unlisted.is_none(), "{name}: the label {unlisted:?} is not in docs/metrics.md");
        }
    }
    Ok(families)
}

#[test]
fn docs_metrics_md_has_every_family_of_a_scrape() -> Result<()> {
    let (sim, root, tree) = (Sim::new(WORLD)?, tempfile::tempdir()?, CgroupTree::new("metrics")?);
    let (id, dir) = tree.container(1)?;
    bundle(root.path(), &id, "trainer", UID)?;
    let mut actor = Actor::start(ACTOR, &["in", &dir.to_string_lossy(), "--", "sleep", "300"])?;
    let _load = sim.load(actor.pid()?, 0, 0.7, &["--enc", "0.3"])?;
    let root = root.path().to_string_lossy();
    let agent = Agent::start(Some(&sim), &["--path-rootfs", &root, "--label-sources", "bundle"])?;
    // The last series to appear: the encoder is read every 2 s, windows have 10 s.
    wait_for("all series of the container", Duration::from_secs(60), || {
        let samples = agent.scrape()?;
        let all = ["container_gpu_engine_seconds_total", "container_gpu_window_share_ratio_count"];
        Ok(all.iter().all(|name| sum(&samples, name, &[]).is_some()).then_some(()))
    })?;
    let documented = documented();
    ensure!(documented.len() > 60, "docs/metrics.md has {} rows", documented.len());
    let families = check(&agent.page_with_all_families()?, &documented)?;
    ensure!(families > 40, "only {families} families were scraped");
    ensure!(check(&get(agent.port, "/metrics/cadvisor")?, &documented)? == 3);
    Ok(())
}
