//! Joins the snapshot with labels and decides what is exposed. It holds all state of the export.
//!
//! Guarantees:
//! - A container's series wait until its labels are settled, and its seconds wait with them. So at every instant the credited plus the
//!   unattributed time equals the exposed busy time.
//! - Time credited to a namespace stays credited to it, whatever happens to the container or its labels.
//! - A counter that appears after a scraper's first scrape starts at 0 for it, so `increase()` covers all of it: see [`Scrapers`].
//! - Each counter was 0 at its created time, which does not change: the time of the last snapshot without its pair or GPU, the start of the
//!   agent, or, for a GPU that was assigned before it was used, the first scrape with it.
//! - Series of a container that is gone stay for [`STAY_NS`] and until every scraper has had its final value twice, but no longer than
//!   [`STAY_AT_MOST_NS`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use foldhash::{HashMap, HashSet};
use sampler_core::identity::ContainerRecord;
use sampler_core::snapshot::{ContainerGpu, Snapshot};
use sampler_core::units::{BootNs, ContainerKey, GpuUuid, WallTime};
use sampler_labels::{ContainerLabels, Label};

use super::assigned::AssignedGpus;
use super::container_state::{ContainerState, Counters, PairState, counters};
use super::contenders::ContenderLabels;
use super::exposition::{ExportedGpu, ExportedPair, Exposition, exported_pair};
use super::pods::ExposedPods;
use super::scrapers::{ConnectionId, ScrapeClient, Scrapers};
use super::series_starts::{SeriesOwner, SeriesStarts};
use crate::config::PodLabels;
use crate::labels::LabelView;

const STAY_NS: u64 = 60_000_000_000;
const STAY_AT_MOST_NS: u64 = 300_000_000_000;
/// Busy time without that of containers that wait for labels is a difference of sums. Its rounding must not make a counter go backwards,
/// which would be a counter reset.
const ROUNDING: f64 = 1e-6;
/// A container without a record in the label service is exposed by its path after this long.
const UNLABELLED_NS: u64 = 5_000_000_000;

/// Who scrapes, and when.
#[derive(Debug)]
pub struct Scrape<'a> {
    pub client: &'a ScrapeClient,
    pub connection: ConnectionId,
    pub at: Instant,
    pub pods: PodLabels,
    /// Whether the page is to have the contenders of pairs.
    pub has_contenders: bool,
}

/// What the export remembers of a GPU while it is in the snapshot: one that comes back counts from 0, and so does the time credited on it.
#[derive(Debug)]
struct GpuState {
    /// When its counters were 0.
    created: WallTime,
    /// (namespace, kind of user) -> seconds.
    credited: BTreeMap<(String, &'static str), f64>,
    /// Busy seconds in the last scrape.
    busy: f64,
}

#[derive(Debug, Default)]
pub struct Ledger {
    /// Those that used a GPU, and those with an assigned one.
    containers: HashMap<ContainerKey, ContainerState>,
    gpus: HashMap<GpuUuid, GpuState>,
    /// The time of the last snapshot; before the first, the start of the agent.
    updated: WallTime,
    contender_labels: ContenderLabels,
    pods: ExposedPods,
    pub starts: SeriesStarts,
    pub scrapers: Scrapers,
}

impl Ledger {
    pub fn new(started: WallTime) -> Self {
        Self { updated: started, ..Self::default() }
    }

    /// Adds what was credited since the last call. Must be called at least once within the time for which gone containers are kept.
    pub fn update(&mut self, snapshot: &Snapshot, labels: &LabelView) {
        // The counters of what this snapshot is the first to have were 0 in the one before. Not later than this one, if the clock was set.
        let created = self.updated.min(snapshot.wall);
        let gpus: HashSet<&GpuUuid> = snapshot.gpus.iter().map(|gpu| &gpu.info.uuid).collect();
        self.gpus.retain(|gpu, _| gpus.contains(gpu));
        for gpu in &gpus {
            let new = || GpuState { created, credited: BTreeMap::new(), busy: 0.0 };
            self.gpus.entry((*gpu).clone()).or_insert_with(new);
        }
        let mut living = HashSet::default();
        for container in &snapshot.containers {
            let key = container.record.key;
            let used: Vec<(&GpuUuid, &ContainerGpu)> =
                container.gpus.iter().filter_map(|usage| Some((&snapshot.gpus.get(usage.gpu)?.info.uuid, usage))).collect();
            if used.is_empty() && !self.containers.contains_key(&key) {
                continue;
            }
            living.insert(key);
            let settled = labels_of(&container.record, labels, snapshot.at);
            let state = self.containers.entry(key).or_default();
            let is_in_snapshot = |gpu: &GpuUuid| used.iter().any(|(used, _)| *used == gpu);
            state.retain(self.starts.number, is_in_snapshot, |gpu| gpus.contains(gpu));
            for (gpu, usage) in used {
                let pair = state.pair_or_new(gpu, created);
                pair.is_used = pair.is_used || counters(usage) != Counters::default();
                if let (Some(labels), Some(gpu)) = (&settled, self.gpus.get_mut(gpu)) {
                    gpu.credit(labels, usage.seconds - pair.counted);
                    pair.counted = usage.seconds;
                }
            }
        }
        self.containers.retain(|key, state| living.contains(key) && !state.is_empty());
        // Before the first snapshot of the core there is an empty one without a time.
        if snapshot.wall > WallTime(0) {
            self.updated = snapshot.wall;
        }
        self.starts.retain(|owner| match owner {
            SeriesOwner::ContainerGpu(key, gpu) => {
                self.containers.get(key).and_then(|container| container.pair(gpu)).is_some_and(|pair| !pair.is_new)
            }
            SeriesOwner::Gpu(gpu) => gpus.contains(gpu),
            SeriesOwner::Container(_) => true,
        });
        self.contender_labels.update(snapshot, labels);
    }

    /// The present exposition, without contenders.
    pub fn view(&mut self, snapshot: &Snapshot, labels: &LabelView, assigned: &AssignedGpus) -> Exposition {
        self.pods.update(snapshot, labels, assigned);
        let mut page = Exposition { at: snapshot.wall, ..Exposition::default() };
        let mut waiting = vec![0.0; snapshot.gpus.len()];
        for container in &snapshot.containers {
            let (record, is_gone) = (&container.record, container.gone.is_some());
            let known = labels.get(&record.key);
            if !is_gone && record.identity.is_container() {
                // Without a record in the label service yet, the container is known by its path.
                let state = known.map_or("identified", |labels| labels.state());
                let runtime = known.and_then(|l| l.runtime).or(record.identity.runtime).map_or("unknown", |r| r.name());
                *page.containers.entry((state, runtime)).or_default() += 1;
                for label in known.filter(|l| l.settled).into_iter().flat_map(|l| l.missing()) {
                    *page.missing.entry(label.name()).or_default() += 1;
                }
            }
            let settled = labels_of(record, labels, snapshot.at);
            let state = self.containers.get(&record.key);
            for usage in &container.gpus {
                let Some(gpu) = snapshot.gpus.get(usage.gpu) else { continue };
                let pair = state.and_then(|state| state.pair(&gpu.info.uuid));
                waiting[usage.gpu] += usage.seconds - pair.map_or(0.0, |pair| pair.counted);
                if let Some(labels) = settled.as_ref().filter(|_| stays(pair, usage, container.gone, snapshot.at)) {
                    let created = pair.map(|pair| pair.created);
                    page.pairs.push(ExportedPair { gone: is_gone, created, ..exported_pair(record.key, labels, gpu, usage) });
                }
            }
            if let Some(labels) = settled.as_ref().filter(|_| !is_gone) {
                page.add_assigned(record.key, labels, &assigned.gpus_of(labels, snapshot), snapshot);
            }
            let pairs = page.pairs.iter_mut().rev().take_while(|pair| pair.key == record.key);
            pairs.for_each(|pair| pair.waits = container.waits);
        }
        page.expose_pods_as_containers(&self.pods);
        page.merge_series();
        page.gpus = snapshot
            .gpus
            .iter()
            .zip(waiting)
            .map(|(view, waiting)| {
                let state = self.gpus.get(&view.info.uuid);
                ExportedGpu {
                    view: view.clone(),
                    busy_seconds: (view.time.busy - waiting).max(0.0),
                    credited: state.map(|state| state.credited.clone()).unwrap_or_default(),
                    created: state.map(|state| state.created),
                }
            })
            .collect();
        page
    }

    /// As [`Ledger::view`] for a scrape: its scraper has the values then.
    pub fn scrape(
        &mut self,
        scrape: &Scrape<'_>,
        snapshot: &Snapshot,
        labels: &LabelView,
        assigned: &AssignedGpus,
    ) -> Exposition {
        self.update(snapshot, labels);
        let mut page = self.view(snapshot, labels, assigned);
        let (number, history) = self.scrapers.begin(scrape.client, scrape.connection, scrape.at);
        self.starts.begin_scrape(number, history);
        for pair in &mut page.pairs {
            let container = self.containers.entry(pair.key).or_default();
            pair.text = container.text(pair, scrape.pods);
            let state = container.pair_or_new(pair.gpu(), self.updated);
            (pair.created, state.shown) = (Some(state.created), number);
            let counters = counters(&pair.usage);
            if state.changed == 0 || state.counters.number != counters.number {
                state.born = number;
            }
            let is_held = !pair.gone && (pair.assigned.is_some() || pair.usage.is_listed);
            let observed = snapshot.gpus.get(pair.usage.gpu).map_or(0.0, |gpu| gpu.time.busy + gpu.time.idle);
            if state.book_held(is_held, observed, &pair.usage) {
                (state.changed, state.delivered) = (number, false);
            }
            pair.held_idle_seconds = state.held_idle;
            if state.changed == 0 || state.counters != counters {
                (state.counters, state.changed, state.delivered) = (counters, number, false);
            }
            state.delivered |= pair.gone && self.scrapers.have_twice(state.born, state.changed, scrape.at);
        }
        for gpu in &mut page.gpus {
            let Some(state) = self.gpus.get_mut(&gpu.view.info.uuid) else { continue };
            if (0.0..ROUNDING).contains(&(state.busy - gpu.busy_seconds)) {
                gpu.busy_seconds = state.busy;
            }
            state.busy = gpu.busy_seconds;
        }
        if scrape.has_contenders {
            self.add_contenders(&mut page);
        }
        page
    }

    /// Adds the labels of the pairs as text.
    pub fn add_texts(&mut self, page: &mut Exposition, pods: PodLabels) {
        for pair in &mut page.pairs {
            pair.text = self.containers.entry(pair.key).or_default().text(pair, pods);
        }
    }

    pub fn add_contenders(&self, page: &mut Exposition) {
        for pair in &mut page.pairs {
            pair.contenders = self.contender_labels.contenders(&pair.usage);
        }
        page.merge_contenders();
    }
}

impl GpuState {
    fn credit(&mut self, labels: &ContainerLabels, seconds: f64) {
        let group = (labels.text(Label::Namespace).to_owned(), labels.kind.user_kind());
        *self.credited.entry(group).or_default() += seconds;
    }
}

fn stays(pair: Option<&PairState>, usage: &ContainerGpu, gone: Option<BootNs>, now: BootNs) -> bool {
    let Some(gone_ns) = gone.map(|at| now.saturating_since(at)) else { return true };
    let is_delivered = || pair.is_some_and(|pair| pair.delivered && pair.counters == counters(usage));
    gone_ns < STAY_NS || (gone_ns < STAY_AT_MOST_NS && !is_delivered())
}

/// The labels to export; `None` while they are not settled.
pub(super) fn labels_of(record: &ContainerRecord, labels: &LabelView, now: BootNs) -> Option<Arc<ContainerLabels>> {
    match labels.get(&record.key) {
        Some(labels) => labels.settled.then(|| Arc::clone(labels)),
        // Others have a record there soon after they first use a GPU, long after they were created.
        None => (now.saturating_since(record.created) > UNLABELLED_NS && record.identity.is_container())
            .then(|| Arc::new(ContainerLabels::from_path(record))),
    }
}

#[cfg(test)]
pub mod tests;
