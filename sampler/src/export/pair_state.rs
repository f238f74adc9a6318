//! What the export remembers of a pair between scrapes: its credited seconds, when its counters changed, and its labels as text.

use std::sync::Arc;

use sampler_core::snapshot::ContainerGpu;
use sampler_core::units::WallTime;
use sampler_labels::ContainerLabels;

use super::exposition::ExportedPair;
use super::families::PairText;
use super::scrapers::ScrapeNumber;
use crate::config::PodLabels;

/// What the export remembers of a pair.
#[derive(Debug, Default)]
pub struct PairState {
    /// When its counters were 0.
    pub created: Option<WallTime>,
    /// Seconds that are credited to a namespace.
    pub counted: f64,
    /// The last scrape in which a counter of the pair changed, and the one in which its newest counter was born; 0 before the first.
    pub changed: ScrapeNumber,
    pub born: ScrapeNumber,
    pub counters: Counters,
    /// Every scraper has these values. Scrapers that come later have no claim to them.
    pub delivered: bool,
    text: Option<KeptText>,
}

#[derive(Debug)]
struct KeptText {
    labels: Arc<ContainerLabels>,
    container_id: Arc<str>,
    text: Arc<PairText>,
}

impl PairState {
    pub fn text(&mut self, pair: &ExportedPair, pods: PodLabels) -> Arc<PairText> {
        let is_current = |kept: &&KeptText| Arc::ptr_eq(&kept.labels, &pair.labels) && kept.container_id == pair.container_id;
        if let Some(kept) = self.text.as_ref().filter(is_current) {
            return Arc::clone(&kept.text);
        }
        let text = Arc::new(PairText::new(pair, pods));
        let (labels, container_id) = (Arc::clone(&pair.labels), Arc::clone(&pair.container_id));
        self.text = Some(KeptText { labels, container_id, text: Arc::clone(&text) });
        text
    }
}

/// All counters of a pair: how many, and their sum, which changes with each of them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counters {
    pub number: usize,
    sum: f64,
}

pub fn counters(usage: &ContainerGpu) -> Counters {
    let engines: f64 = usage.engines.iter().map(|(_, seconds)| seconds).sum();
    let contention: f64 = usage.contention.iter().map(|contention| contention.seconds).sum();
    let windows = usage.window_shares.as_ref().map_or(0, |windows| windows.count);
    let energy = usage.energy_joules.unwrap_or_default();
    let sum = usage.seconds + usage.coactive_seconds + energy + engines + contention + (usage.samples + windows) as f64;
    let born_later = usize::from(windows > 0) + usize::from(usage.energy_joules.is_some());
    Counters { number: usage.engines.len() + usage.contention.len() + born_later, sum }
}
