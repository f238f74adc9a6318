//! What the export remembers of a container between scrapes: its labels as text, and for each of its GPUs the credited seconds and when
//! its counters changed.

use std::sync::Arc;

use sampler_core::snapshot::ContainerGpu;
use sampler_core::units::{GpuUuid, WallTime};
use sampler_labels::ContainerLabels;

use super::exposition::ExportedPair;
use super::label_text::ContainerText;
use super::scrapers::ScrapeNumber;
use crate::config::PodLabels;

#[derive(Debug, Default)]
pub struct ContainerState {
    pairs: Vec<PairState>,
    text: Option<KeptText>,
}

/// What the export remembers of a container on a GPU.
#[derive(Debug)]
pub struct PairState {
    gpu: GpuUuid,
    /// When its counters were 0.
    pub created: WallTime,
    /// It has counted something. A GPU may also be assigned or held without use.
    pub is_used: bool,
    /// The last scrape that exposed it.
    pub shown: ScrapeNumber,
    /// Made since the last update: series of before are not its own.
    pub is_new: bool,
    /// Seconds that are credited to a namespace.
    pub counted: f64,
    /// The last scrape in which a counter of the pair changed, and the one in which its newest counter was born; 0 before the first.
    pub changed: ScrapeNumber,
    pub born: ScrapeNumber,
    pub counters: Counters,
    /// Every scraper has these values. Scrapers that come later have no claim to them.
    pub delivered: bool,
    /// If it held the GPU in the last scrape: for how long the GPU had been observed, the pair been active, and the GPU time, in seconds.
    held_since: Option<[f64; 3]>,
    /// Seconds for which it held the GPU and did not use it.
    pub held_idle: f64,
}

#[derive(Debug)]
struct KeptText {
    labels: Arc<ContainerLabels>,
    container_id: Arc<str>,
    text: Arc<ContainerText>,
}

impl ContainerState {
    pub fn pair(&self, gpu: &GpuUuid) -> Option<&PairState> {
        self.pairs.iter().find(|pair| pair.gpu == *gpu)
    }

    /// Its state on this GPU; a new one was `created` then.
    pub fn pair_or_new(&mut self, gpu: &GpuUuid, created: WallTime) -> &mut PairState {
        let known = self.pairs.iter().position(|pair| pair.gpu == *gpu);
        let index = known.unwrap_or_else(|| {
            // Most containers use one GPU, and a growing vector begins with room for four.
            self.pairs.reserve_exact(1);
            self.pairs.push(PairState::new(gpu.clone(), created));
            self.pairs.len() - 1
        });
        &mut self.pairs[index]
    }

    /// Keeps what has counted, and what is 0 and was in the `last` scrape, for as long as the GPU is present. One that has counted and is
    /// not in the snapshot (its processes are not listed, and it has no sample) goes on counting when it comes back: other scrapers may
    /// see no scrape without it. One that is 0 counts from 0 for every scraper.
    pub fn retain(
        &mut self,
        last: ScrapeNumber,
        is_in_snapshot: impl Fn(&GpuUuid) -> bool,
        is_present: impl Fn(&GpuUuid) -> bool,
    ) {
        let is_kept = |pair: &PairState| {
            let has_counted = pair.is_used || pair.held_idle > 0.0;
            (has_counted || pair.shown == last) && is_present(&pair.gpu)
        };
        self.pairs.retain(is_kept);
        for pair in &mut self.pairs {
            pair.is_new = false;
            if pair.shown != last && !is_in_snapshot(&pair.gpu) {
                pair.held_since = None;
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    pub fn text(&mut self, pair: &ExportedPair, pods: PodLabels) -> Arc<ContainerText> {
        let is_current = |kept: &&KeptText| Arc::ptr_eq(&kept.labels, &pair.labels) && kept.container_id == pair.container_id;
        if let Some(kept) = self.text.as_ref().filter(is_current) {
            return Arc::clone(&kept.text);
        }
        let text = Arc::new(ContainerText::new(&pair.labels, &pair.container_id, pods));
        let (labels, container_id) = (Arc::clone(&pair.labels), Arc::clone(&pair.container_id));
        self.text = Some(KeptText { labels, container_id, text: Arc::clone(&text) });
        text
    }
}

impl PairState {
    fn new(gpu: GpuUuid, created: WallTime) -> Self {
        Self {
            gpu,
            created,
            is_used: false,
            shown: 0,
            is_new: true,
            counted: 0.0,
            changed: 0,
            born: 0,
            counters: Counters::default(),
            delivered: false,
            held_since: None,
            held_idle: 0.0,
        }
    }

    /// Books the time since the last scrape, if it held the GPU then. Returns whether there was any.
    pub fn book_held(&mut self, is_held: bool, observed: f64, usage: &ContainerGpu) -> bool {
        let now = [observed, usage.active_seconds, usage.seconds];
        let idle = self.held_since.map_or(0.0, |before| {
            let [observed, active, busy] = [0, 1, 2].map(|n| now[n] - before[n]);
            // Where no sample names a process, there is GPU time without activity.
            observed - active.max(busy)
        });
        // A window of activity may have been booked before all of it was observed: the next time includes it.
        if idle < 0.0 && is_held {
            return false;
        }
        self.held_since = is_held.then_some(now);
        self.held_idle += idle.max(0.0);
        idle > 0.0
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
