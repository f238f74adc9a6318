//! Series that start at zero: which of them a scrape has already exposed.
//!
//! A series is identified by what it counts for, not by its labels: labels may change while the count continues, and a restarted
//! container keeps its labels while its counts begin again.
//!
//! In the first scrape series have their true values: the time before belongs to no interval of that Prometheus.

use std::collections::{HashMap, HashSet};

use sampler_core::units::{ContainerKey, GpuUuid};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SeriesOwner {
    Container(ContainerKey),
    Gpu(GpuUuid),
    ContainerGpu(ContainerKey, GpuUuid),
}

/// The series of a family for one owner: distinguished by an engine, a state, a contender; empty where there is only one.
#[derive(Clone, Copy, Debug)]
pub struct SeriesId<'a> {
    pub owner: &'a SeriesOwner,
    pub part: &'a str,
}

/// Family -> parts.
type Exposed = HashMap<&'static str, HashSet<Box<str>>>;

#[derive(Debug, Default)]
pub struct SeriesStarts {
    exposed: HashMap<SeriesOwner, Exposed>,
    scraped: bool,
}

impl SeriesStarts {
    /// Whether the series is exposed as 0 now. Remembers it.
    pub fn is_start(&mut self, family: &'static str, series: SeriesId<'_>) -> bool {
        let parts = self.exposed.entry(series.owner.clone()).or_default().entry(family).or_default();
        let is_new = !parts.contains(series.part) && parts.insert(series.part.into());
        is_new && self.scraped
    }

    /// The first scrape is over.
    pub fn finish_scrape(&mut self) {
        self.scraped = true;
    }

    /// The series of all other owners start again if they come back.
    pub fn retain(&mut self, is_kept: impl Fn(&SeriesOwner) -> bool) {
        self.exposed.retain(|owner, _| is_kept(owner));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_exposition_after_the_first_scrape_is_a_start() {
        let mut starts = SeriesStarts::default();
        let [first, second] = [1, 2].map(|key| SeriesOwner::Container(ContainerKey(key)));
        let mut start = |owner, part| starts.is_start("family", SeriesId { owner, part });
        assert!(!start(&first, "a"));
        starts.finish_scrape();
        let mut start = |owner, part| starts.is_start("family", SeriesId { owner, part });
        assert_eq!([start(&first, "a"), start(&first, "b"), start(&first, "b"), start(&second, "a")], [false, true, false, true]);
        starts.retain(|owner| *owner == second);
        let mut start = |owner, part| starts.is_start("family", SeriesId { owner, part });
        assert_eq!([start(&first, "a"), start(&second, "a")], [true, false]);
    }
}
