//! Joins the snapshot with labels and decides what is shown: the only stateful part of the export.
//!
//! Promises:
//! - A container's series wait until its labels are settled; its seconds wait with them, so at every instant what is credited
//!   plus what is unattributed equals the busy time shown.
//! - What was credited to a namespace stays credited to it, whatever happens to the container or its labels.
//! - A counter that appears after the first scrape begins at 0, so `increase()` sees all of it. At the first scrape of all,
//!   counters show what they hold: the time before it belongs to no interval of that Prometheus.
//! - Series of a container that is gone stay for [`STAY_NS`] and until its final value was scraped twice, [`STAY_AT_MOST_NS`]
//!   at most.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use sampler_core::identity::ContainerRecord;
use sampler_core::labels::{ContainerLabels, Label};
use sampler_core::snapshot::{ContainerGpu, GpuView, Snapshot};
use sampler_core::units::{BootNs, ContainerKey, GpuUuid};

use super::assigned::Assigned;
use crate::labels::LabelView;

const STAY_NS: u64 = 60_000_000_000;
const STAY_AT_MOST_NS: u64 = 300_000_000_000;
const FINAL_SCRAPES: u32 = 2;
/// A container that the label service has never heard of is shown by its path after this long.
const UNLABELLED_NS: u64 = 5_000_000_000;

/// One (container, GPU) pair as shown.
#[derive(Clone, Debug)]
pub struct Row {
    pub key: ContainerKey,
    /// As exported: the container's, unless another container shown has the same.
    pub container_id: Arc<str>,
    pub labels: Arc<ContainerLabels>,
    pub gpu: GpuUuid,
    /// Of a MIG device: its GPU.
    pub parent: Option<GpuUuid>,
    pub model: String,
    pub memory_total_bytes: Option<u64>,
    pub pair: ContainerGpu,
    /// The kubelet has assigned the GPU, or a part of it, to the container.
    pub assigned: bool,
}

#[derive(Clone, Debug)]
pub struct GpuRow {
    pub view: GpuView,
    /// Busy seconds less those that wait for labels.
    pub busy_seconds: f64,
    /// Namespace -> seconds; blank for containers without one.
    pub credited: BTreeMap<String, f64>,
}

#[derive(Clone, Debug, Default)]
pub struct Exposition {
    pub gpus: Vec<GpuRow>,
    pub rows: Vec<Row>,
    /// (state, runtime) -> containers.
    pub containers: BTreeMap<(&'static str, &'static str), u64>,
    /// Label -> live containers that lack it.
    pub missing: BTreeMap<&'static str, u64>,
}

type Pair = (ContainerKey, GpuUuid);

#[derive(Debug, Default)]
struct Shown {
    seconds: f64,
    scrapes: u32,
    engines: HashSet<&'static str>,
    windows: bool,
}

/// The series of a GPU that were shown.
#[derive(Debug, Default)]
struct ShownGpu {
    namespaces: HashSet<String>,
    xids: HashSet<u64>,
    engines: HashSet<&'static str>,
    throttled: bool,
}

#[derive(Debug, Default)]
pub struct Ledger {
    counted: HashMap<Pair, f64>,
    credited: HashMap<GpuUuid, BTreeMap<String, f64>>,
    shown: HashMap<Pair, Shown>,
    gpus: HashMap<GpuUuid, ShownGpu>,
    scraped: bool,
}

impl Ledger {
    /// Takes in what was credited since the last call. Call it at least once within the time that gone containers are kept.
    pub fn update(&mut self, snapshot: &Snapshot, labels: &LabelView) {
        let mut living = HashSet::new();
        for container in &snapshot.containers {
            let settled = labels_of(&container.record, labels, snapshot.at);
            for pair in &container.gpus {
                let Some(gpu) = snapshot.gpus.get(pair.gpu) else { continue };
                let key = (container.record.key, gpu.info.uuid.clone());
                living.insert(key.clone());
                if let Some(labels) = &settled {
                    let namespace = labels.text(Label::Namespace).to_owned();
                    let counted = self.counted.entry(key).or_default();
                    let credited = self.credited.entry(gpu.info.uuid.clone()).or_default().entry(namespace).or_default();
                    *credited += pair.seconds - *counted;
                    *counted = pair.seconds;
                }
            }
        }
        self.counted.retain(|key, _| living.contains(key));
        self.shown.retain(|key, _| living.contains(key));
        // One that comes back after that counts from 0, and so does what is credited of it.
        let gpus: HashSet<&GpuUuid> = snapshot.gpus.iter().map(|gpu| &gpu.info.uuid).collect();
        self.credited.retain(|gpu, _| gpus.contains(gpu));
        self.gpus.retain(|gpu, _| gpus.contains(gpu));
    }

    fn stays(&self, key: &Pair, pair: &ContainerGpu, gone: Option<BootNs>, now: BootNs) -> bool {
        let Some(gone) = gone.map(|at| now.saturating_since(at)) else { return true };
        let scraped = self.shown.get(key).map_or(0, |s| if s.seconds == pair.seconds { s.scrapes } else { 0 });
        gone < STAY_NS || (scraped < FINAL_SCRAPES && gone < STAY_AT_MOST_NS)
    }

    /// What there is to show now, counters at their true values.
    pub fn view(&self, snapshot: &Snapshot, labels: &LabelView, assigned: &Assigned) -> Exposition {
        let mut page = Exposition::default();
        let mut waiting = vec![0.0; snapshot.gpus.len()];
        for container in &snapshot.containers {
            let record = &container.record;
            let known = labels.get(&record.key);
            if container.gone.is_none() {
                // One that the label service has not heard of yet is known by its path.
                let state = known.map_or("identified", |labels| labels.state());
                let runtime = known.and_then(|l| l.runtime).or(record.identity.runtime).map_or("unknown", |r| r.name());
                *page.containers.entry((state, runtime)).or_default() += 1;
                for label in known.filter(|l| l.settled).into_iter().flat_map(|l| l.missing()) {
                    *page.missing.entry(label.name()).or_default() += 1;
                }
            }
            let settled = labels_of(record, labels, snapshot.at);
            for pair in &container.gpus {
                let Some(gpu) = snapshot.gpus.get(pair.gpu) else { continue };
                let key = (record.key, gpu.info.uuid.clone());
                waiting[pair.gpu] += pair.seconds - self.counted.get(&key).copied().unwrap_or_default();
                if let Some(labels) = settled.as_ref().filter(|_| self.stays(&key, pair, container.gone, snapshot.at)) {
                    page.rows.push(row(record.key, labels, gpu, pair));
                }
            }
            if let Some(labels) = settled.as_ref().filter(|_| container.gone.is_none()) {
                page.add_assigned(record.key, labels, &assigned.gpus_of(labels), snapshot);
            }
        }
        page.one_series_each();
        page.gpus = snapshot
            .gpus
            .iter()
            .zip(waiting)
            .map(|(view, waiting)| GpuRow {
                view: view.clone(),
                busy_seconds: (view.time.busy - waiting).max(0.0),
                credited: self.credited.get(&view.info.uuid).cloned().unwrap_or_default(),
            })
            .collect();
        page
    }

    /// What a scraper gets: as [`Ledger::view`], with new counters at 0, and remembered.
    pub fn scrape(&mut self, snapshot: &Snapshot, labels: &LabelView, assigned: &Assigned) -> Exposition {
        self.update(snapshot, labels);
        let mut page = self.view(snapshot, labels, assigned);
        let first = !std::mem::replace(&mut self.scraped, true);
        for row in &mut page.rows {
            let mut is_new = false;
            let shown = self.shown.entry((row.key, row.gpu.clone())).or_insert_with(|| {
                is_new = true;
                Shown::default()
            });
            let pair = &mut row.pair;
            // These begin later than the others: with the first use of an engine, and the first whole window.
            for (engine, seconds) in &mut pair.engines {
                if shown.engines.insert(engine.name()) && !first {
                    *seconds = 0.0;
                }
            }
            if pair.window_shares.is_some() && !std::mem::replace(&mut shown.windows, true) && !first {
                pair.window_shares = Some(Arc::default());
            }
            if is_new && !first {
                pair.begin_at_zero();
            } else if shown.seconds == pair.seconds {
                shown.scrapes += 1;
            } else {
                (shown.seconds, shown.scrapes) = (pair.seconds, 1);
            }
        }
        for gpu in &mut page.gpus {
            let mut is_new = false;
            let shown = self.gpus.entry(gpu.view.info.uuid.clone()).or_insert_with(|| {
                is_new = true;
                ShownGpu::default()
            });
            for (namespace, seconds) in &mut gpu.credited {
                if shown.namespaces.insert(namespace.clone()) && !first {
                    *seconds = 0.0;
                }
            }
            for (xid, count) in &mut gpu.view.xids {
                if shown.xids.insert(*xid) && !first {
                    *count = 0;
                }
            }
            for engine in &mut gpu.view.engines {
                if shown.engines.insert(engine.engine.name()) && !first {
                    (engine.busy, engine.unattributed) = (0.0, Default::default());
                }
            }
            if let Some(seconds) = &mut gpu.view.throttle_seconds
                && !std::mem::replace(&mut shown.throttled, true)
                && !first
            {
                *seconds = Default::default();
            }
            if is_new && !first {
                gpu.busy_seconds = 0.0;
                gpu.view.begin_at_zero();
            }
        }
        page
    }
}

impl Exposition {
    /// No two rows of a GPU have the same container id. A restarted container keeps its id and its cgroup's path: its series are
    /// those of its present life, and their reset is a counter's reset. Where different cgroups have one id (a container's inside
    /// another, two namespaces of containerd, the apps of a rkt pod), the one that is not inside another keeps it, and
    /// among equals the first by its path, whoever comes or restarts; the others are called by their paths.
    fn one_series_each(&mut self) {
        let mut newest: HashMap<(Arc<str>, GpuUuid), ContainerKey> = HashMap::new();
        let mut owner: HashMap<Arc<str>, (bool, Arc<str>)> = HashMap::new();
        for row in &self.rows {
            let key = newest.entry((Arc::clone(&row.labels.id), row.gpu.clone())).or_insert(row.key);
            *key = row.key.max(*key);
        }
        self.rows.retain(|row| newest.get(&(Arc::clone(&row.labels.id), row.gpu.clone())) == Some(&row.key));
        for row in &self.rows {
            let rank = (row.labels.is_nested, Arc::clone(&row.labels.id));
            let first = owner.entry(Arc::clone(&row.labels.container_id)).or_insert_with(|| rank.clone());
            if rank < *first {
                *first = rank;
            }
        }
        for row in &mut self.rows {
            if owner.get(&row.labels.container_id).is_some_and(|(_, path)| *path != row.labels.id) {
                row.container_id = Arc::clone(&row.labels.id);
            }
        }
    }

    /// Marks the rows of what is assigned; a GPU that is assigned and was not used yet has a row of its own.
    fn add_assigned(&mut self, key: ContainerKey, labels: &Arc<ContainerLabels>, gpus: &[usize], snapshot: &Snapshot) {
        for n in gpus {
            let Some(gpu) = snapshot.gpus.get(*n) else { continue };
            // Rows of one container follow each other.
            let known = self.rows.iter_mut().rev().take_while(|row| row.key == key).find(|row| row.gpu == gpu.info.uuid);
            if let Some(row) = known {
                row.assigned = true;
                continue;
            }
            // Nothing of it was sampled: idle, as far as the GPU was observed.
            let observed = gpu.utilization_ratio.is_some();
            let none = ContainerGpu {
                gpu: *n,
                duty_cycle_percent: observed.then_some(0.0),
                duty_cycle_stderr: observed.then_some(0.0),
                memory_used_bytes: gpu.readings.memory_used_bytes.map(|_| 0),
                ..ContainerGpu::default()
            };
            self.rows.push(Row { assigned: true, ..row(key, labels, gpu, &none) });
        }
    }
}

fn row(key: ContainerKey, labels: &Arc<ContainerLabels>, gpu: &GpuView, pair: &ContainerGpu) -> Row {
    Row {
        key,
        container_id: Arc::clone(&labels.container_id),
        labels: Arc::clone(labels),
        gpu: gpu.info.uuid.clone(),
        parent: gpu.info.parent.clone(),
        model: gpu.info.model.clone(),
        memory_total_bytes: gpu.readings.memory_total_bytes,
        pair: pair.clone(),
        assigned: false,
    }
}

/// The labels to show, once they may be shown.
fn labels_of(record: &ContainerRecord, labels: &LabelView, now: BootNs) -> Option<Arc<ContainerLabels>> {
    match labels.get(&record.key) {
        Some(labels) => labels.settled.then(|| Arc::clone(labels)),
        None => (now.saturating_since(record.created) > UNLABELLED_NS).then(|| Arc::new(ContainerLabels::from_path(record))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sampler_core::labels::{Facts, Source, parse};
    use sampler_core::snapshot::{ClockView, ContainerView, DeviceReadings, GpuInfo, GpuTime, MigMode};
    use sampler_core::units::WallTime;

    const SECOND: u64 = 1_000_000_000;

    fn labels(record: &ContainerRecord, settled: bool) -> LabelView {
        let mut facts = Facts { knows_pods: true, ..Facts::default() };
        facts.set(Label::Namespace, Some("prod"));
        let mut labels = ContainerLabels::from_path(record);
        labels.merge(Source::Docker, &facts);
        labels.settled = settled;
        HashMap::from([(record.key, Arc::new(labels))])
    }

    fn snapshot(at_s: u64, seconds: f64, gone_s: Option<u64>) -> Snapshot {
        let path = format!("/docker/{:064x}", 1);
        let identity = parse(&path);
        let (key, created) = (ContainerKey(1), BootNs(0));
        let record = Arc::new(ContainerRecord { key, cgroup_path: path, identity, created, creation_seen: true });
        let info = GpuInfo {
            uuid: GpuUuid("GPU-1".into()),
            index: 0,
            minor: None,
            mig_uuids: Vec::new(),
            parent: None,
            model: "m".into(),
            pci_bus_id: "b".into(),
            driver_version: "1".into(),
            mig_mode: MigMode::Unsupported,
        };
        let gpu = GpuView {
            info: Arc::new(info),
            readings: DeviceReadings::default(),
            time: GpuTime { busy: seconds + 1.0, ..GpuTime::default() },
            unattributed: [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            utilization_ratio: None,
            coactive_ratio: None,
            last_sample: None,
            sample_period_seconds: None,
            sample_gaps: 0,
            ring_overruns: 0,
            rejected: [0; 5],
            off_grid: 0,
            clock: ClockView::default(),
            engines: Vec::new(),
            throttle_seconds: None,
            xids: Vec::new(),
            gone: None,
        };
        let pair = ContainerGpu { seconds, samples: 1, ..ContainerGpu::default() };
        let container = ContainerView { record, gone: gone_s.map(|s| BootNs(s * SECOND)), gpus: vec![pair] };
        Snapshot { at: BootNs(at_s * SECOND), wall: WallTime(0), gpus: vec![gpu], containers: vec![container] }
    }

    /// Scrapes; (seconds shown, credited, busy). The balance is checked wherever credited is not in its first scrape.
    fn scrape(ledger: &mut Ledger, snapshot: &Snapshot, settled: bool) -> (Option<f64>, Option<f64>, f64) {
        let page = ledger.scrape(snapshot, &labels(&snapshot.containers[0].record, settled), &Assigned::default());
        let gpu = &page.gpus[0];
        (page.rows.first().map(|r| r.pair.seconds), gpu.credited.get("prod").copied(), gpu.busy_seconds)
    }

    #[test]
    fn seconds_wait_for_labels_and_counters_begin_at_zero() {
        let mut ledger = Ledger::default();
        assert_eq!(scrape(&mut ledger, &snapshot(1, 2.0, None), false), (None, None, 1.0));
        assert_eq!(scrape(&mut ledger, &snapshot(2, 3.0, None), true), (Some(0.0), Some(0.0), 4.0));
        assert_eq!(scrape(&mut ledger, &snapshot(3, 5.0, None), true), (Some(5.0), Some(5.0), 6.0));
    }

    #[test]
    fn the_first_scrape_of_all_shows_what_there_is() {
        assert_eq!(scrape(&mut Ledger::default(), &snapshot(9, 2.0, None), true), (Some(2.0), Some(2.0), 3.0));
    }

    #[test]
    fn series_that_begin_later_begin_at_zero_too() {
        use sampler_core::snapshot::{Engine, EngineTime, WindowShares};
        let mut ledger = Ledger::default();
        scrape(&mut ledger, &snapshot(1, 2.0, None), true);
        let mut all = snapshot(2, 3.0, None);
        all.containers[0].gpus[0].engines = vec![(Engine::Encoder, 4.0)];
        all.containers[0].gpus[0].window_shares = Some(Arc::new(WindowShares { count: 3, ..WindowShares::default() }));
        all.gpus[0].engines = vec![EngineTime { engine: Engine::Encoder, busy: 5.0, unattributed: [0.5; 7] }];
        all.gpus[0].throttle_seconds = Some([6.0; 9]);
        let mut late = all.gpus[0].clone();
        late.info = Arc::new(GpuInfo { uuid: GpuUuid("MIG-1".into()), ..GpuInfo::clone(&late.info) });
        (late.sample_gaps, late.time.idle) = (7, 8.0);
        all.gpus.push(late);
        let view = labels(&all.containers[0].record, true);
        let mut told = || {
            let page = ledger.scrape(&all, &view, &Assigned::default());
            let (pair, gpu, late) = (&page.rows[0].pair, &page.gpus[0].view, &page.gpus[1]);
            let windows = pair.window_shares.as_ref().map_or(9, |w| w.count);
            let of_late = late.busy_seconds + late.view.time.idle + late.view.unattributed[0] + late.view.sample_gaps as f64;
            (pair.seconds, pair.engines[0].1, windows, gpu.engines[0].busy, gpu.throttle_seconds.map(|s| s[0]), of_late)
        };
        assert_eq!(told(), (3.0, 0.0, 0, 0.0, Some(0.0), 0.0));
        assert_eq!(told(), (3.0, 4.0, 3, 5.0, Some(6.0), 20.0));
    }

    #[test]
    fn a_gpu_that_was_away_for_long_counts_from_zero_in_all() {
        let mut ledger = Ledger::default();
        scrape(&mut ledger, &snapshot(1, 5.0, None), true);
        let mut away = snapshot(400, 0.0, None);
        (away.gpus, away.containers[0].gpus) = (Vec::new(), Vec::new());
        ledger.update(&away, &labels(&away.containers[0].record, true));
        scrape(&mut ledger, &snapshot(500, 1.0, None), true);
        // Busy is what is credited and the second on nobody.
        assert_eq!(scrape(&mut ledger, &snapshot(501, 2.0, None), true), (Some(2.0), Some(2.0), 3.0));
    }

    #[test]
    fn containers_of_one_id_are_told_apart_and_lives_of_one_container_are_not() {
        let mut all = snapshot(1, 2.0, None);
        let id = "a".repeat(64);
        let paths = [format!("/docker/{}/docker-{id}.scope", "b".repeat(64)), format!("/docker/{id}"), format!("/docker/{id}")];
        let first = all.containers.remove(0);
        let mut view = LabelView::new();
        for (n, path) in paths.iter().enumerate() {
            let (key, created) = (ContainerKey(n as u64 + 1), BootNs(0));
            let record =
                Arc::new(ContainerRecord { key, cgroup_path: path.clone(), identity: parse(path), created, creation_seen: true });
            view.extend(labels(&record, true));
            all.containers.push(ContainerView { record, ..first.clone() });
        }
        let page = Ledger::default().scrape(&all, &view, &Assigned::default());
        let mut ids: Vec<(u64, &str)> = page.rows.iter().map(|row| (row.key.0, &*row.container_id)).collect();
        ids.sort_unstable();
        // The one inside another is called by its path; of the other two, lives of one container, the newer is shown.
        assert_eq!(ids, [(1, &*paths[0]), (3, &*id)]);
    }

    #[test]
    fn a_gone_container_stays_a_minute_and_two_final_scrapes() {
        let mut ledger = Ledger::default();
        let shown = |l: &mut Ledger, at, seconds| scrape(l, &snapshot(at, seconds, Some(10)), true).0.is_some();
        assert!(shown(&mut ledger, 11, 1.0) && shown(&mut ledger, 69, 1.0));
        assert!(!shown(&mut ledger, 71, 1.0));
        let mut ledger = Ledger::default();
        assert!(shown(&mut ledger, 100, 1.0) && shown(&mut ledger, 101, 1.0) && !shown(&mut ledger, 102, 1.0));
        assert!(!shown(&mut Ledger::default(), 311, 1.0));
    }
}
