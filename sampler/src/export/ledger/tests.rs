use super::*;
use crate::collectors::Selection;
use crate::export::encode::{Page, TextFormat};
use crate::export::{families, gpus};
use sampler_core::cgroup_path::parse;
use sampler_core::device::ClockView;
use sampler_core::device::{DeviceReadings, GpuInfo};
use sampler_core::snapshot::{ContainerView, ContainerWaits, GpuTime, GpuView, WindowShares};
use sampler_labels::{Assignment, Facts, Source};

use crate::labels::AssignedView;

const SECOND: u64 = 1_000_000_000;

/// The next scrape of this scraper.
pub fn scrape_by(scraper: u64, ledger: &mut Ledger, snapshot: &Snapshot, labels: &LabelView, pods: PodLabels) -> Exposition {
    let client = ScrapeClient::new([127, 0, 0, 1].into(), "", "");
    let scrape = Scrape { client: &client, connection: ConnectionId(scraper), at: Instant::now(), pods, has_contenders: true };
    ledger.scrape(&scrape, snapshot, labels, &AssignedGpus::default())
}

fn scraped(ledger: &mut Ledger, snapshot: &Snapshot, labels: &LabelView) -> Exposition {
    scrape_by(1, ledger, snapshot, labels, PodLabels::Both)
}

fn labels(record: &ContainerRecord, settled: bool) -> LabelView {
    let mut facts = Facts { pod_status_known: true, ..Facts::default() };
    facts.set(Label::Namespace, Some("prod"));
    let mut labels = ContainerLabels::from_path(record);
    labels.merge(Source::Docker, &facts);
    labels.settled = settled;
    LabelView::of_one(record.key, Arc::new(labels))
}

/// A GPU of which nothing is known.
pub fn gpu_view(info: GpuInfo) -> GpuView {
    GpuView {
        info: Arc::new(info),
        readings: DeviceReadings::default(),
        hardware: Default::default(),
        time: GpuTime::default(),
        unattributed: [0.0; 7],
        unattributed_energy: None,
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
        unattributed_holders: Vec::new(),
        gone: None,
    }
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
    let time = GpuTime { busy: seconds + 1.0, ..GpuTime::default() };
    let gpu = GpuView { time, unattributed: [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], ..gpu_view(info) };
    let pair = ContainerGpu { seconds, samples: 1, ..ContainerGpu::default() };
    let container = ContainerView { record, gone: gone_s.map(|s| BootNs(s * SECOND)), gpus: vec![pair], waits: None };
    Snapshot { at: BootNs(at_s * SECOND), wall: WallTime(0), gpus: vec![gpu], containers: vec![container] }
}

/// The text of the families of containers and devices.
fn text(ledger: &mut Ledger, page: &Exposition) -> String {
    let mut all = Page::new(Selection::ALL, TextFormat::Prometheus);
    families::containers(page, &mut all, &mut ledger.starts);
    families::users(page, &mut all, &mut ledger.starts);
    gpus::gpus(page, &mut all, &mut ledger.starts);
    all.text()
}

/// The value of the first series of the family that has all of these `name="value"` labels.
fn value(text: &str, family: &str, labels: &[&str]) -> Option<f64> {
    let is_wanted = |line: &&str| line.starts_with(&format!("{family}{{")) && labels.iter().all(|label| line.contains(label));
    text.lines().find(is_wanted).map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

/// Scrapes: the container's exposed seconds, the credited and the busy seconds of the first GPU.
fn scrape(ledger: &mut Ledger, snapshot: &Snapshot, settled: bool) -> (Option<f64>, Option<f64>, f64) {
    let page = scraped(ledger, snapshot, &labels(&snapshot.containers[0].record, settled));
    let text = text(ledger, &page);
    let seconds = value(&text, "container_gpu_seconds_total", &[]);
    let credited = value(&text, "gpu_credited_seconds_total", &["namespace=\"prod\""]);
    (seconds, credited, value(&text, "gpu_time_seconds_total", &["state=\"busy\""]).unwrap())
}

#[test]
fn seconds_wait_for_labels_and_counters_start_at_zero() {
    let mut ledger = Ledger::default();
    assert_eq!(scrape(&mut ledger, &snapshot(1, 2.0, None), false), (None, None, 1.0));
    assert_eq!(scrape(&mut ledger, &snapshot(2, 3.0, None), true), (Some(0.0), Some(0.0), 4.0));
    assert_eq!(scrape(&mut ledger, &snapshot(3, 5.0, None), true), (Some(5.0), Some(5.0), 6.0));
}

#[test]
fn busy_time_does_not_go_backwards_while_labels_are_missing() {
    let mut ledger = Ledger::default();
    let mut last = 0.0;
    for n in 1..1000 {
        let (.., busy) = scrape(&mut ledger, &snapshot(n, n as f64 * 0.1, None), false);
        assert!(busy >= last, "{busy} after {last}");
        last = busy;
    }
}

#[test]
fn the_first_scrape_exposes_true_values() {
    assert_eq!(scrape(&mut Ledger::default(), &snapshot(9, 2.0, None), true), (Some(2.0), Some(2.0), 3.0));
}

#[test]
fn series_that_appear_later_start_at_zero() {
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
    let mut exposed = || {
        let page = scraped(&mut ledger, &all, &view);
        let text = text(&mut ledger, &page);
        let (first, late) = ("uuid=\"GPU-1\"", "uuid=\"MIG-1\"");
        let value = |family, labels: &[&str]| value(&text, family, labels).unwrap();
        let of_late = value("gpu_time_seconds_total", &[late, "busy"])
            + value("gpu_time_seconds_total", &[late, "idle"])
            + value("gpu_unattributed_seconds_total", &[late, "no_pid"])
            + value("gpu_sampler_sample_gaps_total", &[late]);
        let of_first = ["gpu_engine_seconds_total", "gpu_throttle_seconds_total"].map(|family| value(family, &[first]));
        let of_container =
            ["container_gpu_seconds_total", "container_gpu_engine_seconds_total", "container_gpu_window_share_ratio_count"];
        (of_container.map(|family| value(family, &[])), of_first, of_late)
    };
    assert_eq!(exposed(), ([3.0, 0.0, 0.0], [0.0, 0.0], 0.0));
    assert_eq!(exposed(), ([3.0, 4.0, 3.0], [5.0, 6.0], 20.0));
}

/// The one container, with a second container, the host and unnamed others as contenders.
fn contended(at_s: u64, seconds: f64) -> (Snapshot, LabelView) {
    use sampler_core::snapshot::{Contention, Other};
    let mut all = snapshot(at_s, 9.0, None);
    let path = format!("/docker/{:064x}", 2);
    let (key, identity) = (ContainerKey(2), parse(&path));
    let other = ContainerRecord { key, cgroup_path: path, identity, created: BootNs(0), creation_seen: true };
    let mut view = labels(&all.containers[0].record, true);
    view.add_all(&labels(&other, true));
    all.containers.push(ContainerView { record: Arc::new(other), gone: None, gpus: Vec::new(), waits: None });
    let others = [Other::Container(key), Other::Host, Other::Rest];
    let contention = others.map(|other| Contention { other, seconds, pressure_ratio: None });
    let pair = &mut all.containers[0].gpus[0];
    (pair.coactive_seconds, pair.active_seconds, pair.contention) = (4.0, 5.0, contention.into());
    (all, view)
}

fn contenders(page: &Exposition) -> Vec<(String, f64)> {
    page.pairs[0].contenders.iter().map(|contender| (contender.container_id.to_string(), contender.seconds)).collect()
}

#[test]
fn contenders_start_at_zero_and_keep_their_names() {
    let mut ledger = Ledger::default();
    scrape(&mut ledger, &snapshot(1, 2.0, None), true);
    let id = format!("{:064x}", 2);
    for (at, seconds, expected) in [(2, 3.0, 0.0), (3, 4.0, 4.0)] {
        let (all, view) = contended(at, seconds);
        let page = scraped(&mut ledger, &all, &view);
        let text = text(&mut ledger, &page);
        for contender in [&id, "host", "_other"] {
            let labels = [&*format!("other_container_id=\"{contender}\"")];
            assert_eq!(value(&text, "container_gpu_contention_seconds_total", &labels), Some(expected), "{contender}");
        }
        assert_eq!(value(&text, "container_gpu_coactive_seconds_total", &[]), Some(4.0));
    }
    // The contender is gone, and its labels are not known any more.
    let (mut all, mut view) = contended(4, 5.0);
    all.containers.pop();
    view.remove(&ContainerKey(2));
    let page = scraped(&mut ledger, &all, &view);
    assert_eq!(contenders(&page)[0], (id, 5.0));
    assert_eq!(page.pairs[0].contenders[0].text(Label::Namespace), "prod");
}

#[test]
fn a_contender_waits_for_its_labels_and_its_restarts_are_merged() {
    use sampler_core::snapshot::{Contention, Other};
    let (mut all, mut view) = contended(1, 3.0);
    let second = all.containers[1].record.key;
    let unsettled = labels(&all.containers[1].record, false);
    let settled = view.insert(second, Arc::clone(unsettled.get(&second).unwrap())).unwrap();
    let mut ledger = Ledger::default();
    let page = scraped(&mut ledger, &all, &view);
    assert_eq!(contenders(&page), [("host".to_owned(), 3.0), ("_other".to_owned(), 3.0)]);
    view.insert(second, settled);
    // The same container after a restart.
    let again = ContainerRecord { key: ContainerKey(3), ..ContainerRecord::clone(&all.containers[1].record) };
    view.add_all(&labels(&again, true));
    all.containers.push(ContainerView { record: Arc::new(again), gone: None, gpus: Vec::new(), waits: None });
    let contention = &mut all.containers[0].gpus[0].contention;
    let of_second_run = Contention { other: Other::Container(ContainerKey(3)), seconds: 2.0, pressure_ratio: None };
    *contention = contention.iter().copied().chain([of_second_run]).collect();
    ledger.update(&all, &view);
    let mut page = ledger.view(&all, &view, &AssignedGpus::default());
    ledger.add_contenders(&mut page);
    assert_eq!(contenders(&page)[0], (format!("{:064x}", 2), 5.0));
}

#[test]
fn contention_in_metrics_and_in_the_live_document() {
    use crate::export::html_tables::tables;
    use crate::export::live::LiveDocument;
    use crate::health::HealthView;
    let (mut all, view) = contended(1, 3.0);
    all.containers[0].waits = Some(ContainerWaits { wait_seconds: 2.5, probed_seconds: 4.0, ..ContainerWaits::default() });
    let mut ledger = Ledger::default();
    let page = scraped(&mut ledger, &all, &view);
    let text = text(&mut ledger, &page);
    let own = format!("uuid=\"GPU-1\",namespace=\"prod\",pod=\"\",container=\"\",container_id=\"{:064x}\"", 1);
    for (name, others, value) in [
        ("coactive", String::new(), 4),
        (
            "contention",
            format!(",other_namespace=\"prod\",other_pod=\"\",other_container=\"\",other_container_id=\"{:064x}\"", 2),
            3,
        ),
        ("contention", ",other_namespace=\"\",other_pod=\"\",other_container=\"host\",other_container_id=\"host\"".into(), 3),
        ("contention", ",other_namespace=\"\",other_pod=\"\",other_container=\"_other\",other_container_id=\"_other\"".into(), 3),
    ] {
        let line = format!("container_gpu_{name}_seconds_total{{{own}{others}}} {value}\n");
        assert!(text.contains(&line), "{line} is not in\n{text}");
    }
    let live = LiveDocument::new(&page, &HealthView::default(), Some("node-1"), WallTime(1_700_000_000_250_000_000));
    let document = serde_json::to_value(&live).unwrap();
    assert_eq!((&document["time"], &document["node"]), (&"2023-11-14T22:13:20.250Z".into(), &"node-1".into()));
    let user = &document["users"][0];
    assert_eq!(
        (&user["namespace"], &user["contention_seconds"], &user["coactive_seconds"]),
        (&"prod".into(), &9.0.into(), &4.0.into())
    );
    // Unknown values are null.
    for key in ["pod", "memory_used_bytes", "duty_cycle_percent"] {
        assert!(user[key].is_null(), "{key}: {user}");
    }
    assert_eq!(
        user["contended_by"][1],
        serde_json::json!({"kind": "host", "namespace": null, "pod": null,
        "container": null, "name": null, "container_id": null, "seconds": 3.0})
    );
    let waits =
        serde_json::json!({"wait_seconds": 2.5, "probed_seconds": 4.0, "pressure_ratio": null, "pressure_stderr_ratio": null});
    assert_eq!((&user["waits"], &document["users"][1]["waits"]), (&waits, &serde_json::Value::Null));
    let table = tables(&page, &HealthView::default());
    assert!(table.contains("<th>Pressure %</th>") && table.contains("<td>2.50</td><td>4.00</td><td>–</td>"), "{table}");
    let gpu = &document["gpus"][0];
    assert_eq!((&gpu["utilization_ratio"], &gpu["unattributed_seconds"]["no_pid"]), (&serde_json::Value::Null, &1.0.into()));
    assert!(serde_json::from_value::<LiveDocument>(document).is_ok());
}

#[test]
fn a_gpu_that_returns_after_a_long_absence_counts_from_zero() {
    let mut ledger = Ledger::default();
    scrape(&mut ledger, &snapshot(1, 5.0, None), true);
    let mut away = snapshot(400, 0.0, None);
    (away.gpus, away.containers[0].gpus) = (Vec::new(), Vec::new());
    ledger.update(&away, &labels(&away.containers[0].record, true));
    scrape(&mut ledger, &snapshot(500, 1.0, None), true);
    // The busy time is the credited time plus the unattributed second.
    assert_eq!(scrape(&mut ledger, &snapshot(501, 2.0, None), true), (Some(2.0), Some(2.0), 3.0));
}

#[test]
fn containers_with_one_id_are_distinguished_and_restarts_of_one_container_are_not() {
    let mut all = snapshot(1, 2.0, None);
    let id = "a".repeat(64);
    let paths = [format!("/docker/{}/docker-{id}.scope", "b".repeat(64)), format!("/docker/{id}"), format!("/docker/{id}")];
    let first = all.containers.remove(0);
    let mut view = LabelView::new();
    for (n, path) in paths.iter().enumerate() {
        let (key, created) = (ContainerKey(n as u64 + 1), BootNs(0));
        let record =
            Arc::new(ContainerRecord { key, cgroup_path: path.clone(), identity: parse(path), created, creation_seen: true });
        view.add_all(&labels(&record, true));
        all.containers.push(ContainerView { record, ..first.clone() });
    }
    let page = scraped(&mut Ledger::default(), &all, &view);
    let mut ids: Vec<(u64, &str)> = page.pairs.iter().map(|pair| (pair.key.0, &*pair.container_id)).collect();
    ids.sort_unstable();
    // The one inside another has its path as id. The other two are restarts of one container: the newer one is exposed.
    assert_eq!(ids, [(1, &*paths[0]), (3, &*id)]);
}

#[test]
fn a_gone_container_stays_for_a_minute_and_two_final_scrapes() {
    let mut ledger = Ledger::default();
    let is_exposed = |l: &mut Ledger, at, seconds| scrape(l, &snapshot(at, seconds, Some(10)), true).0.is_some();
    assert!(is_exposed(&mut ledger, 11, 1.0) && is_exposed(&mut ledger, 69, 1.0));
    assert!(!is_exposed(&mut ledger, 71, 1.0));
    let mut ledger = Ledger::default();
    assert!(is_exposed(&mut ledger, 100, 1.0) && is_exposed(&mut ledger, 101, 1.0) && !is_exposed(&mut ledger, 102, 1.0));
    assert!(!is_exposed(&mut Ledger::default(), 311, 1.0));
}

#[test]
fn energy_waits_for_labels_and_for_the_final_value() {
    use sampler_core::snapshot::UnattributedEnergy;
    let mut ledger = Ledger::default();
    let mut joules = |at, energy: f64, settled, gone| {
        let mut all = snapshot(at, 1.0, gone);
        all.gpus[0].unattributed_energy = Some(UnattributedEnergy { idle: 7.0, ..UnattributedEnergy::default() });
        all.containers[0].gpus[0].energy_joules = Some(energy);
        let page = scraped(&mut ledger, &all, &labels(&all.containers[0].record, settled));
        let text = text(&mut ledger, &page);
        (
            value(&text, "container_gpu_energy_joules_total", &[]),
            value(&text, "gpu_unattributed_energy_joules_total", &["reason=\"idle\""]),
        )
    };
    assert_eq!(joules(1, 5.0, false, None), (None, Some(7.0)));
    assert_eq!((joules(2, 5.0, true, None).0, joules(3, 5.0, true, None).0), (Some(0.0), Some(5.0)));
    // It arrives when the container is gone, and changes nothing else.
    assert_eq!((joules(70, 5.0, true, Some(4)).0, joules(71, 6.0, true, Some(4)).0), (Some(5.0), Some(6.0)));
    assert_eq!((joules(72, 6.0, true, Some(4)).0, joules(73, 6.0, true, Some(4)).0), (Some(6.0), None));
}

#[test]
fn a_gpu_that_is_assigned_counts_from_the_scrape_that_first_shows_it_until_it_is_withdrawn() {
    let mut facts = Facts { pod_status_known: true, ..Facts::default() };
    for (label, text) in [(Label::Namespace, "prod"), (Label::Pod, "p"), (Label::Container, "c")] {
        facts.set(label, Some(text));
    }
    let assigned_gpu = Assignment {
        namespace: Some("prod".into()),
        pod: Some("p".into()),
        container: "c".into(),
        resource: "nvidia.com/gpu".into(),
        device_ids: vec!["0".into()],
        ..Assignment::default()
    };
    let record = &snapshot(1, 0.0, None).containers[0].record;
    let mut labels = ContainerLabels::from_path(record);
    labels.merge(Source::Bundle, &facts);
    labels.settled = true;
    let view = LabelView::of_one(record.key, Arc::new(labels));
    let mut ledger = Ledger::default();
    let mut scrape = |at, seconds: Option<f64>, is_assigned: bool| {
        let mut all = snapshot(at, seconds.unwrap_or_default(), None);
        all.wall = WallTime(at * SECOND);
        if seconds.is_none() {
            all.containers[0].gpus.clear();
        }
        let client = ScrapeClient::new([127, 0, 0, 1].into(), "", "");
        let connection = ConnectionId(1);
        let scrape = Scrape { client: &client, connection, at: Instant::now(), pods: PodLabels::Both, has_contenders: false };
        let assignments = if is_assigned { vec![assigned_gpu.clone()] } else { Vec::new() };
        let assigned = AssignedGpus::new(&AssignedView { assignments, assigns_gpus: true }, &all, Arc::default());
        let page = ledger.scrape(&scrape, &all, &view, &assigned);
        let text = text(&mut ledger, &page);
        let (created, kept) = page.pairs.first().map(|pair| (pair.created, Arc::clone(&pair.text))).unzip();
        (value(&text, "container_gpu_seconds_total", &[]), created.flatten(), kept)
    };
    let at = |seconds: u64| Some(WallTime(seconds * SECOND));
    let ((first, created, kept), (second, still, again)) = (scrape(1, None, true), scrape(2, None, true));
    assert_eq!((first, second, created, still), (Some(0.0), Some(0.0), at(1), at(1)));
    assert!(Arc::ptr_eq(&kept.unwrap(), &again.unwrap()), "the labels are not written again");
    // Withdrawn, and then used without an assignment: the series begin again.
    assert_eq!(scrape(3, None, false).0, None);
    let (value, created, _) = scrape(4, Some(2.0), false);
    assert_eq!((value, created), (Some(0.0), at(3)));
    assert_eq!(scrape(5, Some(3.0), true).0, Some(3.0));
}

#[test]
fn what_holds_a_gpu_without_using_it_is_counted_between_scrapes() {
    let mut ledger = Ledger::default();
    // At a time: how long the GPU was observed, how long the container was active, whether the driver lists a process of it.
    let mut held_idle = |at: u64, active: f64, is_listed: bool, gone: Option<u64>| {
        let mut all = snapshot(at, active, gone);
        all.gpus[0].time = GpuTime { busy: active, idle: at as f64 - active, ..GpuTime::default() };
        for usage in &mut all.containers[0].gpus {
            (usage.active_seconds, usage.is_listed) = (active, is_listed);
        }
        let view = labels(&all.containers[0].record, true);
        let page = scraped(&mut ledger, &all, &view);
        page.pairs.first().map(|pair| pair.held_idle_seconds)
    };
    assert_eq!((held_idle(10, 0.0, false, None), held_idle(20, 0.0, true, None)), (Some(0.0), Some(0.0)));
    assert_eq!((held_idle(30, 0.0, true, None), held_idle(40, 4.0, true, None)), (Some(10.0), Some(16.0)));
    // A second of activity is booked before the GPU was observed in all of it.
    assert_eq!((held_idle(41, 6.0, true, None), held_idle(50, 6.0, true, None)), (Some(16.0), Some(24.0)));
    // Released, and held again.
    assert_eq!((held_idle(60, 6.0, false, None), held_idle(90, 6.0, false, None)), (Some(34.0), Some(34.0)));
    assert_eq!((held_idle(100, 6.0, true, None), held_idle(110, 6.0, true, Some(109))), (Some(34.0), Some(44.0)));
    assert_eq!(held_idle(120, 6.0, true, Some(109)), Some(44.0));
}

#[test]
fn what_was_only_held_does_not_fall_for_a_scraper_that_missed_the_release() {
    let mut ledger = Ledger::default();
    // A window of 10 s without GPU time is counted, too.
    let windows = WindowShares { count: 1, ..WindowShares::default() };
    let mut scrape = |scraper: u64, at: u64, is_listed: bool| {
        let mut all = snapshot(at, 0.0, None);
        all.gpus[0].time = GpuTime { idle: at as f64, ..GpuTime::default() };
        let view = labels(&all.containers[0].record, true);
        for usage in &mut all.containers[0].gpus {
            (usage.is_listed, usage.samples) = (true, 0);
            usage.window_shares = (at > 11).then(|| Arc::new(windows.clone()));
        }
        // Its process has ended, and none has ever used the GPU.
        if !is_listed {
            all.containers[0].gpus.clear();
        }
        let page = scrape_by(scraper, &mut ledger, &all, &view, PodLabels::Both);
        let text = text(&mut ledger, &page);
        let series = ["container_gpu_held_idle_seconds_total", "container_gpu_window_share_ratio_count"];
        series.map(|name| value(&text, name, &[]))
    };
    assert_eq!((scrape(1, 10, true), scrape(2, 11, true)), ([Some(0.0), None], [Some(1.0), None]));
    assert_eq!((scrape(1, 12, true), scrape(1, 13, true)), ([Some(2.0), Some(0.0)], [Some(3.0), Some(1.0)]));
    // Only the second scraper comes while it is released.
    assert_eq!((scrape(2, 14, false), scrape(2, 15, false)), ([None, None], [None, None]));
    assert_eq!((scrape(1, 16, true), scrape(1, 17, true)), ([Some(3.0), Some(1.0)], [Some(4.0), Some(1.0)]));
}

#[test]
fn gpu_time_without_a_named_sample_is_not_idle() {
    let mut ledger = Ledger::default();
    // The counters of a MIG device name no process: there is GPU time, and no activity.
    let mut held_idle = |at: u64, seconds: f64| {
        let mut all = snapshot(at, seconds, None);
        all.gpus[0].time = GpuTime { busy: seconds, idle: at as f64 - seconds, ..GpuTime::default() };
        all.containers[0].gpus.iter_mut().for_each(|usage| (usage.is_listed, usage.active_seconds) = (true, 0.0));
        let view = labels(&all.containers[0].record, true);
        scraped(&mut ledger, &all, &view).pairs[0].held_idle_seconds
    };
    assert_eq!((held_idle(10, 0.0), held_idle(20, 10.0), held_idle(30, 14.0)), (0.0, 0.0, 6.0));
}

#[test]
fn each_scraper_sees_a_counter_begin_at_zero_and_its_final_value() {
    let mut ledger = Ledger::default();
    let mut seconds = |scraper, at, seconds, gone| {
        let all = snapshot(at, seconds, gone);
        let view = labels(&all.containers[0].record, at > 2);
        let page = scrape_by(scraper, &mut ledger, &all, &view, PodLabels::Both);
        value(&text(&mut ledger, &page), "container_gpu_seconds_total", &[])
    };
    assert_eq!((seconds(1, 1, 0.0, None), seconds(2, 2, 0.0, None)), (None, None));
    assert_eq!((seconds(1, 3, 2.0, None), seconds(1, 4, 3.0, None)), (Some(0.0), Some(3.0)));
    // The second scraper is slower; the container has ended before its first scrape.
    assert_eq!((seconds(2, 70, 3.0, Some(5)), seconds(1, 70, 3.0, Some(5))), (Some(0.0), Some(3.0)));
    assert_eq!((seconds(2, 100, 3.0, Some(5)), seconds(2, 130, 3.0, Some(5))), (Some(3.0), Some(3.0)));
    assert_eq!((seconds(2, 160, 3.0, Some(5)), seconds(1, 161, 3.0, Some(5))), (None, None));
    // One that comes later does not bring it back.
    assert_eq!((seconds(3, 162, 3.0, Some(5)), seconds(1, 163, 3.0, Some(5))), (None, None));
}
