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
use sampler_core::snapshot::{ContainerGpu, GpuView, Snapshot};
use sampler_core::units::{BootNs, ContainerKey, GpuUuid};
use sampler_labels::{ContainerLabels, Label};

use super::assigned::AssignedGpus;
use super::contenders::{ContenderRow, Others, one_series_each};
use crate::labels::LabelView;

const STAY_NS: u64 = 60_000_000_000;
const STAY_AT_MOST_NS: u64 = 300_000_000_000;
const FINAL_SCRAPES: u32 = 2;
/// A container that the label service has never heard of is shown by its path after this long.
const UNLABELLED_NS: u64 = 5_000_000_000;

/// One (container, GPU) pair as shown.
#[derive(Clone, Debug)]
pub struct PairRow {
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
    /// Of `pair.contention`, those that may be shown.
    pub others: Vec<ContenderRow>,
    /// Its last cgroup was removed.
    pub gone: bool,
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
    pub rows: Vec<PairRow>,
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
    others: HashSet<Arc<str>>,
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
    others: Others,
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
        self.others.update(snapshot, labels);
    }

    fn stays(&self, key: &Pair, pair: &ContainerGpu, gone: Option<BootNs>, now: BootNs) -> bool {
        let Some(gone) = gone.map(|at| now.saturating_since(at)) else { return true };
        let scraped = self.shown.get(key).map_or(0, |s| if s.seconds == pair.seconds { s.scrapes } else { 0 });
        gone < STAY_NS || (scraped < FINAL_SCRAPES && gone < STAY_AT_MOST_NS)
    }

    /// What there is to show now, counters at their true values.
    pub fn view(&self, snapshot: &Snapshot, labels: &LabelView, assigned: &AssignedGpus) -> Exposition {
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
                    let (others, gone) = (self.others.of(pair), container.gone.is_some());
                    page.rows.push(PairRow { others, gone, ..row(record.key, labels, gpu, pair) });
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
    pub fn scrape(&mut self, snapshot: &Snapshot, labels: &LabelView, assigned: &AssignedGpus) -> Exposition {
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
            // These begin later than the others: with the first use of an engine, the first whole window, a contender.
            for (engine, seconds) in &mut pair.engines {
                if shown.engines.insert(engine.name()) && !first {
                    *seconds = 0.0;
                }
            }
            for other in &mut row.others {
                if shown.others.insert(Arc::clone(&other.container_id)) && !first {
                    other.seconds = 0.0;
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
        let by_path = self.rows.iter().filter(|row| row.container_id != row.labels.container_id);
        let called: HashMap<ContainerKey, Arc<str>> = by_path.map(|row| (row.key, Arc::clone(&row.container_id))).collect();
        for row in &mut self.rows {
            one_series_each(&mut row.others, &called);
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
            self.rows.push(PairRow { assigned: true, ..row(key, labels, gpu, &none) });
        }
    }
}

fn row(key: ContainerKey, labels: &Arc<ContainerLabels>, gpu: &GpuView, pair: &ContainerGpu) -> PairRow {
    PairRow {
        key,
        container_id: Arc::clone(&labels.container_id),
        labels: Arc::clone(labels),
        gpu: gpu.info.uuid.clone(),
        parent: gpu.info.parent.clone(),
        model: gpu.info.model.clone(),
        memory_total_bytes: gpu.readings.memory_total_bytes,
        pair: pair.clone(),
        others: Vec::new(),
        gone: false,
        assigned: false,
    }
}

/// The labels to show, once they may be shown.
pub(super) fn labels_of(record: &ContainerRecord, labels: &LabelView, now: BootNs) -> Option<Arc<ContainerLabels>> {
    match labels.get(&record.key) {
        Some(labels) => labels.settled.then(|| Arc::clone(labels)),
        None => (now.saturating_since(record.created) > UNLABELLED_NS).then(|| Arc::new(ContainerLabels::from_path(record))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sampler_core::cgroup_path::parse;
    use sampler_core::device::ClockView;
    use sampler_core::device::{DeviceReadings, GpuInfo};
    use sampler_core::snapshot::{ContainerView, GpuTime};
    use sampler_core::units::WallTime;
    use sampler_labels::{Facts, Source};

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
            model: "m".into(),
            pci_bus_id: "b".into(),
            driver_version: "1".into(),
            ..GpuInfo::default()
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
            counts: Default::default(),
            expected_stderr_ratio: None,
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
        let page = ledger.scrape(snapshot, &labels(&snapshot.containers[0].record, settled), &AssignedGpus::default());
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
        use sampler_core::device::Engine;
        use sampler_core::snapshot::{EngineTime, WindowShares};
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
            let page = ledger.scrape(&all, &view, &AssignedGpus::default());
            let (pair, gpu, late) = (&page.rows[0].pair, &page.gpus[0].view, &page.gpus[1]);
            let windows = pair.window_shares.as_ref().map_or(9, |w| w.count);
            let of_late = late.busy_seconds + late.view.time.idle + late.view.unattributed[0] + late.view.sample_gaps as f64;
            (pair.seconds, pair.engines[0].1, windows, gpu.engines[0].busy, gpu.throttle_seconds.map(|s| s[0]), of_late)
        };
        assert_eq!(told(), (3.0, 0.0, 0, 0.0, Some(0.0), 0.0));
        assert_eq!(told(), (3.0, 4.0, 3, 5.0, Some(6.0), 20.0));
    }

    /// The one container, and another that was in its way beside the host and unnamed others.
    fn contended(at_s: u64, seconds: f64) -> (Snapshot, LabelView) {
        use sampler_core::snapshot::{Contention, Other};
        let mut all = snapshot(at_s, 9.0, None);
        let path = format!("/docker/{:064x}", 2);
        let (key, identity) = (ContainerKey(2), parse(&path));
        let other = ContainerRecord { key, cgroup_path: path, identity, created: BootNs(0), creation_seen: true };
        let mut view = labels(&all.containers[0].record, true);
        view.extend(labels(&other, true));
        all.containers.push(ContainerView { record: Arc::new(other), gone: None, gpus: Vec::new() });
        let others = [Other::Container(key), Other::Host, Other::Rest];
        let contention = others.map(|other| Contention { other, seconds });
        let pair = &mut all.containers[0].gpus[0];
        (pair.coactive_seconds, pair.active_seconds, pair.contention) = (4.0, 5.0, contention.into());
        (all, view)
    }

    fn of_others(page: &Exposition) -> Vec<(String, f64)> {
        page.rows[0].others.iter().map(|other| (other.container_id.to_string(), other.seconds)).collect()
    }

    #[test]
    fn contenders_begin_at_zero_and_keep_their_names() {
        let mut ledger = Ledger::default();
        scrape(&mut ledger, &snapshot(1, 2.0, None), true);
        let id = format!("{:064x}", 2);
        let named = |seconds: f64| ["host", "_other"].map(|kind| (kind.to_owned(), seconds));
        for (at, seconds, shown) in [(2, 3.0, 0.0), (3, 4.0, 4.0)] {
            let (all, view) = contended(at, seconds);
            let page = ledger.scrape(&all, &view, &AssignedGpus::default());
            let [host, rest] = named(shown);
            assert_eq!(of_others(&page), [(id.clone(), shown), host, rest]);
            assert_eq!(page.rows[0].pair.coactive_seconds, 4.0);
        }
        // It is gone, and nobody knows its labels any more.
        let (mut all, mut view) = contended(4, 5.0);
        all.containers.pop();
        view.remove(&ContainerKey(2));
        let page = ledger.scrape(&all, &view, &AssignedGpus::default());
        assert_eq!(of_others(&page)[0], (id, 5.0));
        assert_eq!(page.rows[0].others[0].text(Label::Namespace), "prod");
    }

    #[test]
    fn a_contender_waits_for_its_labels_and_its_lives_are_one() {
        use sampler_core::snapshot::{Contention, Other};
        let (mut all, mut view) = contended(1, 3.0);
        let second = all.containers[1].record.key;
        let unsettled = labels(&all.containers[1].record, false);
        let settled = view.insert(second, Arc::clone(&unsettled[&second])).unwrap();
        let mut ledger = Ledger::default();
        let page = ledger.scrape(&all, &view, &AssignedGpus::default());
        assert_eq!(of_others(&page), [("host".to_owned(), 3.0), ("_other".to_owned(), 3.0)]);
        view.insert(second, settled);
        // Restarted: another life of the same container.
        let again = ContainerRecord { key: ContainerKey(3), ..ContainerRecord::clone(&all.containers[1].record) };
        view.extend(labels(&again, true));
        all.containers.push(ContainerView { record: Arc::new(again), gone: None, gpus: Vec::new() });
        all.containers[0].gpus[0].contention.push(Contention { other: Other::Container(ContainerKey(3)), seconds: 2.0 });
        ledger.update(&all, &view);
        let page = ledger.view(&all, &view, &AssignedGpus::default());
        assert_eq!(of_others(&page)[0], (format!("{:064x}", 2), 5.0));
    }

    #[test]
    fn contention_as_metrics_and_live() {
        use crate::export::encode::Families;
        use crate::export::{families, live::LiveDocument};
        use crate::health::HealthView;
        let (all, view) = contended(1, 3.0);
        let page = Ledger::default().scrape(&all, &view, &AssignedGpus::default());
        let mut metrics = Families::default();
        families::containers(&page, &mut metrics);
        let text = metrics.text().unwrap();
        let own = format!("uuid=\"GPU-1\",namespace=\"prod\",pod=\"\",container=\"\",container_id=\"{:064x}\"", 1);
        for (name, others, value) in [
            ("coactive", String::new(), 4),
            (
                "contention",
                format!(",other_namespace=\"prod\",other_pod=\"\",other_container=\"\",other_container_id=\"{:064x}\"", 2),
                3,
            ),
            ("contention", ",other_namespace=\"\",other_pod=\"\",other_container=\"host\",other_container_id=\"host\"".into(), 3),
            (
                "contention",
                ",other_namespace=\"\",other_pod=\"\",other_container=\"_other\",other_container_id=\"_other\"".into(),
                3,
            ),
        ] {
            let line = format!("container_gpu_{name}_seconds_total{{{own}{others}}} {value}\n");
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
        let live = LiveDocument::new(&page, &HealthView::default(), Some("node-1"), WallTime(1_700_000_000_250_000_000));
        let told = serde_json::to_value(&live).unwrap();
        assert_eq!((&told["time"], &told["node"]), (&"2023-11-14T22:13:20.250Z".into(), &"node-1".into()));
        let user = &told["users"][0];
        assert_eq!(
            (&user["namespace"], &user["contention_seconds"], &user["coactive_seconds"]),
            (&"prod".into(), &9.0.into(), &4.0.into())
        );
        // Not known is null.
        for key in ["pod", "memory_used_bytes", "duty_cycle_percent"] {
            assert!(user[key].is_null(), "{key}: {user}");
        }
        assert_eq!(
            user["contended_by"][1],
            serde_json::json!({"kind": "host", "namespace": null, "pod": null,
            "container": null, "name": null, "container_id": null, "seconds": 3.0})
        );
        let gpu = &told["gpus"][0];
        assert_eq!((&gpu["utilization_ratio"], &gpu["unattributed_seconds"]["no_pid"]), (&serde_json::Value::Null, &1.0.into()));
        assert!(serde_json::from_value::<LiveDocument>(told).is_ok());
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
        let page = Ledger::default().scrape(&all, &view, &AssignedGpus::default());
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
