//! Series that start at zero: in which scrape each was born.
//!
//! A series is identified by what it counts for, not by its labels: labels may change while the count continues, and a restarted
//! container keeps its labels while its counts begin again. Which scrapers have seen a series follows from its birth and from their last
//! scrapes: see [`super::scrapers`].

use std::hash::{BuildHasher as _, RandomState};

use foldhash::HashMap;
use sampler_core::units::{ContainerKey, GpuUuid, WallTime};

use super::catalogue::Family;
use super::scrapers::{ScrapeHistory, ScrapeNumber};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SeriesOwner {
    Container(ContainerKey),
    Gpu(GpuUuid),
    ContainerGpu(ContainerKey, GpuUuid),
}

/// A node may have ten thousand series that start at zero, so a series is three words.
#[derive(Clone, Copy, Debug)]
struct Birth {
    family: &'static str,
    /// Hash of the engine, state or contender that distinguishes the series of one family and owner; 0 where there is only one.
    part: u64,
    born: ScrapeNumber,
}

#[derive(Debug, Default)]
pub struct SeriesStarts {
    owners: HashMap<SeriesOwner, Vec<Birth>>,
    hasher: RandomState,
    pub number: ScrapeNumber,
    history: ScrapeHistory,
}

/// The series of one owner in one scrape.
pub struct OwnedSeries<'a> {
    /// When all of them were 0.
    pub created: Option<WallTime>,
    births: &'a mut Vec<Birth>,
    hasher: &'a RandomState,
    number: ScrapeNumber,
    history: ScrapeHistory,
}

impl SeriesStarts {
    pub fn begin_scrape(&mut self, number: ScrapeNumber, history: ScrapeHistory) {
        (self.number, self.history) = (number, history);
    }

    pub fn of(&mut self, owner: SeriesOwner) -> OwnedSeries<'_> {
        let births = self.owners.entry(owner).or_default();
        OwnedSeries { created: None, births, hasher: &self.hasher, number: self.number, history: self.history }
    }

    /// The series of all other owners start again if they come back.
    pub fn retain(&mut self, is_kept: impl Fn(&SeriesOwner) -> bool) {
        self.owners.retain(|owner, _| is_kept(owner));
    }
}

impl OwnedSeries<'_> {
    pub fn created(mut self, at: Option<WallTime>) -> Self {
        self.created = at;
        self
    }

    /// Whether the series is 0 in this scrape. Remembers its birth.
    pub fn is_start(&mut self, family: &'static Family, part: &str) -> bool {
        let part = if part.is_empty() { 0 } else { self.hasher.hash_one(part) };
        let known = self.births.iter().find(|birth| std::ptr::eq(birth.family, family.name) && birth.part == part);
        let born = known.map_or(self.number, |birth| birth.born);
        if known.is_none() {
            self.births.push(Birth { family: family.name, part, born });
        }
        self.history.is_start(born)
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalogue::containers::{ENGINE_SECONDS, SECONDS};
    use super::super::scrapers::tests::scrape;
    use super::*;

    #[test]
    fn a_series_starts_in_the_scrape_that_first_has_it_until_its_owner_is_gone() {
        let mut starts = SeriesStarts::default();
        let owner = |key| SeriesOwner::Container(ContainerKey(key));
        let exposed = |starts: &mut SeriesStarts, series: &[(u64, &'static Family, &str)]| -> Vec<bool> {
            scrape(starts);
            series.iter().map(|(key, family, part)| starts.of(owner(*key)).is_start(family, part)).collect()
        };
        assert_eq!(exposed(&mut starts, &[(1, &SECONDS, "")]), [false]);
        let all: [(u64, &'static Family, &str); 4] =
            [(1, &SECONDS, ""), (1, &ENGINE_SECONDS, "encoder"), (1, &ENGINE_SECONDS, "decoder"), (2, &SECONDS, "")];
        assert_eq!(exposed(&mut starts, &all), [false, true, true, true]);
        assert_eq!(exposed(&mut starts, &all), [false; 4]);
        starts.retain(|known| *known == owner(2));
        assert_eq!(exposed(&mut starts, &all), [true, true, true, false]);
    }
}
