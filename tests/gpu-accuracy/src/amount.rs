//! Seconds and joules from the pages, as a PromQL query would have them.

use std::collections::BTreeMap;

use crate::mapping::Family;
use crate::page::{Page, Sample};

/// The series of a family that are about a GPU and, if given, about a user.
#[derive(Clone, Copy, Debug)]
pub struct Selector<'a> {
    pub family: &'a Family,
    /// Value of the label of the GPU.
    pub gpu: &'a str,
    /// Values of the label of the user, one of which a series has to have.
    pub user: Option<&'a [String]>,
}

impl Selector<'_> {
    pub fn has(&self, sample: &Sample) -> bool {
        let label = |name: &str| sample.labels.get(name).map(String::as_str);
        let is_of_user = |values: &[String]| {
            let key = self.family.user.as_ref().and_then(|key| label(&key.label));
            key.is_some_and(|key| values.iter().any(|value| value == key))
        };
        sample.metric == self.family.metric
            && self.family.with.iter().all(|(name, value)| label(name) == Some(value))
            && label(&self.family.gpu.label) == Some(self.gpu)
            && self.user.is_none_or(is_of_user)
    }

    /// What the pages show, in seconds or joules; `None` if they never have a series.
    pub fn amount(&self, pages: &[Page]) -> Option<f64> {
        let amount = if self.family.kind.is_gauge() { self.over_time(pages) } else { self.increase(pages) };
        amount.map(|amount| amount * self.family.kind.scale())
    }

    /// A value holds until the next scrape.
    fn over_time(&self, pages: &[Page]) -> Option<f64> {
        let mut amount = None;
        for (page, next) in pages.iter().zip(pages.iter().skip(1)) {
            let values = page.samples.iter().filter(|sample| self.has(sample)).map(|sample| sample.value);
            let sum = values.filter(|value| value.is_finite()).reduce(|a, b| a + b);
            if let Some(sum) = sum {
                *amount.get_or_insert(0.0) += sum * (next.at - page.at);
            }
        }
        amount
    }

    /// Differences between the values of each series. As in Prometheus, the first value of a series that appears later is not an increase, and a
    /// counter that falls begins again at 0.
    fn increase(&self, pages: &[Page]) -> Option<f64> {
        let mut last: BTreeMap<&BTreeMap<String, String>, f64> = BTreeMap::new();
        let mut amount = None;
        for sample in pages.iter().flat_map(|page| &page.samples).filter(|sample| self.has(sample) && sample.value.is_finite()) {
            let before = last.insert(&sample.labels, sample.value);
            let grown = before.map_or(0.0, |before| if sample.value < before { sample.value } else { sample.value - before });
            *amount.get_or_insert(0.0) += grown;
        }
        amount
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::{Identity, Key, Kind};
    use crate::page::parse;

    fn family(kind: Kind) -> Family {
        let key = |label: &str, is| Key { label: label.to_owned(), is };
        let user = Some(key("pid", Identity::Pid));
        Family { metric: "m".to_owned(), kind, with: BTreeMap::new(), gpu: key("gpu", Identity::Index), user }
    }

    fn pages(texts: &[&str]) -> Vec<Page> {
        texts
            .iter()
            .enumerate()
            .map(|(at, text)| Page { at: at as f64, samples: parse(text).unwrap(), ..Page::default() })
            .collect()
    }

    fn amount(kind: Kind, texts: &[&str], pids: &[&str]) -> Option<f64> {
        let (family, pids) = (family(kind), pids.iter().map(|pid| (*pid).to_owned()).collect::<Vec<_>>());
        Selector { family: &family, gpu: "0", user: Some(&pids) }.amount(&pages(texts))
    }

    #[test]
    fn gauges_hold_until_the_next_scrape() {
        let texts =
            ["m{gpu=\"0\",pid=\"1\"} 50", "m{gpu=\"0\",pid=\"1\"} 100\nm{gpu=\"0\",pid=\"2\"} 50", "m{gpu=\"1\",pid=\"1\"} 7"];
        assert_eq!(amount(Kind::Percent, &texts, &["1"]), Some(1.5));
        assert_eq!(amount(Kind::Percent, &texts, &["1", "2"]), Some(2.0));
        assert_eq!(amount(Kind::Percent, &texts, &["3"]), None);
    }

    #[test]
    fn counters_grow_reset_and_begin() {
        let line = |value: &str| format!("m{{gpu=\"0\",pid=\"1\"}} {value}");
        let texts = ["", &line("5"), &line("7"), "", &line("8"), &line("1")];
        assert_eq!(amount(Kind::Seconds, &texts, &["1"]), Some(4.0), "the first value is not an increase");
        assert_eq!(amount(Kind::Seconds, &[&line("NaN")], &["1"]), None);
    }
}
