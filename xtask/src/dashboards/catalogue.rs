//! The metric families as docs/metrics.md lists them, which is generated from the catalogue of the agent.

use crate::tools;
use anyhow::{Context as _, Result, ensure};
use devkit::promql::{Reference, references};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

const FILE: &str = "docs/metrics.md";
/// Series of a histogram are named after the family, and have one more label.
const HISTOGRAM_SUFFIXES: [&str; 3] = ["_bucket", "_sum", "_count"];
/// Set by Prometheus or by the scrape configuration.
const TARGET_LABELS: [&str; 2] = ["instance", "job"];
/// Series about a scrape, which Prometheus writes itself.
const OF_PROMETHEUS: [&str; 3] = ["up", "scrape_duration_seconds", "scrape_samples_scraped"];

pub struct Family {
    pub labels: BTreeSet<String>,
    pub collector: String,
}

pub struct Catalogue {
    families: BTreeMap<String, Family>,
    /// Collectors that `/metrics` has without `collect[]`.
    default: BTreeSet<String>,
}

/// The cells of a line of a table, without backquotes.
fn cells(line: &str) -> Vec<&str> {
    line.split('|').map(|cell| cell.trim().trim_matches('`')).collect()
}

impl Catalogue {
    pub fn read() -> Result<Self> {
        Self::parse(&fs::read_to_string(tools::root().join(FILE)).context(FILE)?)
    }

    pub fn parse(text: &str) -> Result<Self> {
        let (mut families, mut default) = (BTreeMap::new(), BTreeSet::new());
        for line in text.lines().filter(|line| line.starts_with("| `")) {
            match cells(line)[..] {
                // name, collector, type, start, unit, labels, meaning, absent
                ["", name, collector, kind, _, _, labels, ..] if ["gauge", "counter", "histogram"].contains(&kind) => {
                    let mut labels: BTreeSet<String> =
                        labels.split(',').map(|label| label.trim().trim_matches('`').to_owned()).collect();
                    if kind == "histogram" {
                        labels.insert("le".to_owned());
                    }
                    families.insert(name.to_owned(), Family { labels, collector: collector.to_owned() });
                }
                ["", collector, "yes", ..] => {
                    default.insert(collector.to_owned());
                }
                _ => {}
            }
        }
        ensure!(!families.is_empty() && !default.is_empty(), "the tables of {FILE} have another form");
        Ok(Self { families, default })
    }

    pub fn family(&self, series: &str) -> Option<&Family> {
        let of_histogram = HISTOGRAM_SUFFIXES.iter().filter_map(|suffix| series.strip_suffix(suffix));
        std::iter::once(series).chain(of_histogram).find_map(|name| self.families.get(name))
    }

    /// The collectors of the expression that a scrape has to name.
    pub fn optional_collectors(&self, expr: &str) -> BTreeSet<&str> {
        let mut needed = BTreeSet::new();
        for reference in references(expr) {
            if let Reference::Metric(name) = reference
                && let Some(family) = self.family(&name)
                && !self.default.contains(&family.collector)
            {
                needed.insert(family.collector.as_str());
            }
        }
        needed
    }

    /// The labels that series of this name can have; `None` if nothing has the name. `recorded` are the series of recording rules with
    /// their expressions.
    fn labels(&self, series: &str, recorded: &BTreeMap<String, String>) -> Option<BTreeSet<String>> {
        if let Some(family) = self.family(series) {
            return Some(family.labels.clone());
        }
        if OF_PROMETHEUS.contains(&series) {
            return Some(BTreeSet::new());
        }
        let sources = metrics(recorded.get(series)?);
        // A rule that records itself has no labels.
        Some(sources.iter().filter(|name| *name != series).filter_map(|name| self.labels(name, recorded)).flatten().collect())
    }

    /// The labels that the series of an expression can have, and what is wrong with its names.
    pub fn check(&self, expr: &str, recorded: &BTreeMap<String, String>) -> (BTreeSet<String>, Vec<String>) {
        let (mut problems, mut known) = (Vec::new(), BTreeSet::from(TARGET_LABELS.map(str::to_owned)));
        for name in metrics(expr) {
            match self.labels(&name, recorded) {
                Some(labels) => known.extend(labels),
                None => problems.push(format!("{name} is not in {FILE}, and no recording rule has this name")),
            }
        }
        for reference in references(expr) {
            if let Reference::Matcher { label, .. } | Reference::Listed(label) = reference
                && !known.contains(&label)
            {
                problems.push(format!("no family of the expression has the label {label}"));
            }
        }
        (known, problems)
    }
}

fn metrics(expr: &str) -> Vec<String> {
    let name = |reference| if let Reference::Metric(name) = reference { Some(name) } else { None };
    references(expr).into_iter().filter_map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "| `gpus` | yes | 0 |\n| `calls` |  | 0 |\n\
        | `gpu_a_total` | `gpus` | counter | from 0 | seconds | `uuid`, `state` | A. | never |\n\
        | `gpu_b_seconds` | `calls` | histogram |  | seconds | `uuid`, `call` | B. | never |\n";

    fn check(expr: &str, expect: &[&str]) {
        let catalogue = Catalogue::parse(TEXT).expect("a catalogue");
        let recorded = BTreeMap::from([("uuid:gpu_a:rate5m".to_owned(), "sum by (uuid) (rate(gpu_a_total[5m]))".to_owned())]);
        let (_, problems) = catalogue.check(expr, &recorded);
        assert_eq!(problems.len(), expect.len(), "{expr}: {problems:?}");
        for (problem, word) in problems.iter().zip(expect) {
            assert!(problem.contains(word), "{expr}: {problem}");
        }
    }

    #[test]
    fn names_and_labels_of_the_catalogue_are_accepted_and_others_are_not() {
        check("sum by (uuid, instance) (rate(gpu_a_total{state=\"x\"}[5m]))", &[]);
        check("histogram_quantile(0.9, sum by (le, call) (rate(gpu_b_seconds_bucket[5m])))", &[]);
        check("uuid:gpu_a:rate5m{uuid=~\"$uuid\"} and on (job) up", &[]);
        check("gpu_c_total", &["gpu_c_total"]);
        check("sum by (call) (gpu_a_total{le=\"1\"})", &["label call", "label le"]);
        check("gpu_a_total_bucket{pod=\"x\"}", &["label pod"]);
    }

    #[test]
    fn only_collectors_beyond_the_default_are_needed() {
        let catalogue = Catalogue::parse(TEXT).expect("a catalogue");
        let needed = |expr: &str| catalogue.optional_collectors(expr).into_iter().collect::<Vec<_>>();
        assert_eq!(needed("gpu_a_total"), [""; 0]);
        assert_eq!(needed("gpu_b_seconds_sum / gpu_b_seconds_count"), ["calls"]);
    }
}
