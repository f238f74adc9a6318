//! An exposition with every family, compared with `golden/metrics.txt` and with the catalogue.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sampler_core::cgroup_path::parse;
use sampler_core::device::{
    ClockView, DeviceReadings, Engine, GpuInfo, HardwareReadings, MigMode, Reason, RecoveryAction, SampleCounts, THROTTLE_REASONS,
};
use sampler_core::identity::ContainerRecord;
use sampler_core::observation::{CpuQuota, PressureFact, Rejected};
use sampler_core::snapshot::{
    ContainerGpu, ContainerView, ContainerWaits, Contention, EngineTime, GpuTime, GpuView, Other, Snapshot, UnattributedEnergy,
    WindowShares,
};
use sampler_core::units::{BootNs, ContainerKey, GpuUuid, WallTime};
use sampler_labels::{AssignmentSource, ContainerLabels, Facts, Label, Source, UserDetails};
use strum::EnumCount as _;

use super::catalogue::{Family, Kind, reference};
use super::encode::{Page, PageTimes, TextFormat};
use super::ledger::{Ledger, tests::scrape_by};
use super::rejections::Rejections;
use super::{families, gpus, nvml_families, pressure, sessions, waits};
use crate::collectors::Selection;
use crate::config::PodLabels;
use crate::health::nvml_calls::DeviceView;
use crate::health::{CALL_BOUNDS, HealthView, IDENTIFY_BOUNDS, Times};
use crate::labels::{LabelStats, LabelView, RESOLVE_BOUNDS};
use crate::observe::pressure::PressureView;
use crate::session::RecorderView;

fn container(n: u64, is_settled: bool) -> (ContainerRecord, LabelView) {
    let cgroup_path = format!("/docker/{n:064x}");
    let identity = parse(&cgroup_path);
    let key = ContainerKey(n);
    let record = ContainerRecord { key, cgroup_path, identity, created: BootNs(0), creation_seen: true };
    let mut facts = Facts { pod_status_known: true, ..Facts::default() };
    for (label, text) in [(Label::Namespace, "prod"), (Label::Pod, "trainer"), (Label::Container, "main")] {
        facts.set(label, Some(text));
    }
    let mut labels = ContainerLabels::from_path(&record);
    labels.merge(Source::Docker, &facts);
    labels.settled = is_settled;
    (record, LabelView::of_one(key, Arc::new(labels)))
}

fn job(n: u64) -> (ContainerRecord, LabelView) {
    let cgroup_path = "/slurm/uid_1000/job_7".to_owned();
    let (identity, key) = (parse(&cgroup_path), ContainerKey(n));
    let record = ContainerRecord { key, cgroup_path, identity, created: BootNs(0), creation_seen: true };
    let details = UserDetails { user_name: Some("ann".into()), partition: Some("gpu".into()), ..UserDetails::default() };
    let mut labels = ContainerLabels::from_path(&record);
    labels.merge(Source::Environ, &Facts { details: Some(Box::new(details)), ..Facts::default() });
    labels.settled = true;
    (record, LabelView::of_one(key, Arc::new(labels)))
}

fn gpu(uuid: &str, parent: Option<&str>, scale: f64) -> GpuView {
    let count = scale as u64;
    let info = GpuInfo {
        uuid: GpuUuid(uuid.into()),
        parent: parent.map(|uuid| GpuUuid(uuid.into())),
        model: "Tesla \"V100\"".into(),
        pci_bus_id: "00000000:3B:00.0".into(),
        driver_version: "570.1".into(),
        mig_mode: if uuid == "GPU-mig" { MigMode::Enabled } else { MigMode::Disabled },
        ..GpuInfo::default()
    };
    GpuView {
        info: Arc::new(info),
        readings: DeviceReadings {
            memory_used_bytes: Some(1 << 30),
            memory_total_bytes: Some(16 << 30),
            power_watts: Some(123.5),
            energy_joules: Some(1000.0 * scale),
            temperature_celsius: Some(55.0),
            sm_clock_hertz: Some(1.5e9),
            throttle_reasons: None,
        },
        hardware: HardwareReadings {
            ecc_errors: [Some(12), Some(count)],
            remapped_rows: [Some(3), Some(2 * count)],
            remap_pending: Some(true),
            remap_failure: Some(false),
            recovery_action: Some(RecoveryAction::DrainAndReset),
            nvlink_bytes: [Some(1 << 40), Some(1 << 39)],
            pcie_bytes: [Some(7 << 32), Some(5 << 32)],
        },
        time: GpuTime { busy: 10.0 * scale, idle: 5.0 * scale, unobserved: 0.5 * scale, unsupported: 0.25 * scale },
        unattributed: std::array::from_fn::<f64, { Reason::COUNT }, _>(|n| n as f64 * 0.125 * scale),
        // Of a GPU in MIG mode it is not exposed.
        unattributed_energy: parent.is_none().then(|| UnattributedEnergy {
            idle: 400.0 * scale,
            reasons: std::array::from_fn::<f64, { Reason::COUNT }, _>(|n| n as f64 * 8.0 * scale),
        }),
        utilization_ratio: Some(0.75),
        coactive_ratio: Some(0.5),
        last_sample: Some(WallTime(1_700_000_000_250_000_000)),
        sample_period_seconds: Some(0.02),
        sample_gaps: 2 * count,
        counts: SampleCounts { samples: 100 * count, queried: 50 * count },
        expected_stderr_ratio: Some(0.03),
        ring_overruns: count,
        rejected: std::array::from_fn::<u64, { Rejected::COUNT }, _>(|n| n as u64 * count),
        off_grid: 3 * count,
        clock: ClockView {
            ahead_of_boot_seconds: Some(0.001),
            uncertainty_seconds: Some(0.0005),
            drift_ratio: Some(1e-6),
            steps: count,
        },
        engines: vec![EngineTime { engine: Engine::Encoder, busy: 4.0 * scale, unattributed: [0.5 * scale; Reason::COUNT] }],
        throttle_seconds: Some(std::array::from_fn::<f64, { THROTTLE_REASONS.len() }, _>(|n| n as f64 * scale)),
        xids: vec![(79, count)],
        unattributed_holders: Vec::new(),
        gone: None,
    }
}

fn used(gpu: usize, scale: f64) -> ContainerGpu {
    let count = scale as u64;
    let others = [Other::Container(ContainerKey(2)), Other::Host, Other::Unknown, Other::Rest];
    ContainerGpu {
        gpu,
        seconds: 3.0 * scale,
        seconds_stderr: 0.125 * scale,
        samples: 30 * count,
        energy_joules: (gpu == 0).then_some(200.0 * scale),
        engines: vec![(Engine::Encoder, 2.0 * scale)],
        window_shares: Some(Arc::new(WindowShares { count, sum: 0.3 * scale, buckets: [count; WindowShares::BOUNDS.len()] })),
        active_seconds: 2.0 * scale,
        coactive_seconds: 1.5 * scale,
        contention: others.map(|other| Contention { other, seconds: 0.5 * scale, pressure_ratio: Some(0.0625) }).into(),
        mps_clients: 2,
        duty_cycle_percent: Some(33.0),
        duty_cycle_stderr: Some(1.5),
        memory_used_bytes: Some(512 << 20),
        is_listed: true,
    }
}

/// A node on which every family has a series; `scale` multiplies what counts.
struct RichNode {
    snapshot: Snapshot,
    labels: LabelView,
    pressure: PressureView,
}

impl RichNode {
    fn new(at_s: u64, scale: f64) -> Self {
        let (first, mut labels) = container(1, true);
        let (second, of_second) = container(2, true);
        let (unsettled, of_unsettled) = container(3, false);
        labels.add_all(&of_second);
        labels.add_all(&of_unsettled);
        let (job, of_job) = job(4);
        labels.add_all(&of_job);
        let waits = Some(ContainerWaits {
            wait_seconds: 12.5 * scale,
            probed_seconds: 40.0 * scale,
            pressure_ratio: Some(0.25),
            pressure_stderr: Some(0.03125),
        });
        let view = |record, gpus| ContainerView { record: Arc::new(record), gone: None, gpus, waits };
        let containers = vec![
            view(first, vec![used(0, scale), used(2, scale)]),
            view(second, vec![used(0, scale)]),
            view(unsettled, vec![used(0, 1.0)]),
            view(job, vec![used(0, scale), used(2, scale)]),
        ];
        let gpus = vec![gpu("GPU-1", None, scale), gpu("GPU-mig", None, scale), gpu("MIG-1", Some("GPU-mig"), scale)];
        let fact = |key| PressureFact {
            key: ContainerKey(key),
            cpu: Some(CpuQuota { throttled_ns: scale as u64 * 2_500_000_000, ..CpuQuota::default() }),
            cpu_some_ns: Some(scale as u64 * 1_000_000_000),
            memory_some_ns: Some(0),
            io_some_ns: (scale > 1.0).then_some(scale as u64 * 1_500_000_000),
            ..PressureFact::default()
        };
        let facts = HashMap::from([1, 2].map(|key| (ContainerKey(key), fact(key))));
        let pressure = PressureView { facts, took: Duration::from_millis(250), ..PressureView::default() };
        let at = |second| (second + at_s) * 1_000_000_000;
        let snapshot = Snapshot { at: BootNs(at(0)), wall: WallTime(at(STARTED_S)), gpus, containers };
        Self { snapshot, labels, pressure }
    }

    /// Before anything was used: one GPU without engines, one container.
    fn quiet() -> Self {
        let mut node = Self::new(1, 1.0);
        node.snapshot.gpus.truncate(1);
        let gpu = &mut node.snapshot.gpus[0];
        (gpu.engines, gpu.throttle_seconds, gpu.xids) = (Vec::new(), None, Vec::new());
        node.snapshot.containers.truncate(1);
        let pairs = &mut node.snapshot.containers[0].gpus;
        pairs.truncate(1);
        (pairs[0].engines, pairs[0].window_shares, pairs[0].contention) = (Vec::new(), None, Arc::default());
        node.pressure.facts.remove(&ContainerKey(2));
        node
    }
}

fn times(bounds: &[f64]) -> Times {
    Times { count: 3, sum_seconds: 0.75, buckets: vec![2; bounds.len()] }
}

fn devices() -> Vec<DeviceView> {
    vec![DeviceView {
        uuid: "GPU-1".into(),
        created: WallTime((STARTED_S + 1) * 1_000_000_000),
        calls: vec![("get_samples", times(&CALL_BOUNDS))],
        errors: vec![("get_samples", "not_found".into(), 4)],
        supported: vec![("get_samples", true)],
        sample_buffer: Some(true),
        poll_interval_seconds: Some(1.0),
        busy_ratio: Some(0.01),
        cpu_ratio: Some(0.02),
        stalled: Some(false),
    }]
}

fn label_stats() -> LabelStats {
    LabelStats {
        up: BTreeMap::from([(("docker", "/run/docker.sock".to_owned()), true)]),
        calls: BTreeMap::from([(("docker", "ok"), 5)]),
        reads: BTreeMap::from([(("bundle", "absent"), 6)]),
        resolve_count: 2,
        resolve_sum: 0.5,
        resolve_buckets: vec![1; RESOLVE_BOUNDS.len()],
    }
}

/// When the agent starts, in Unix seconds.
const STARTED_S: u64 = 1_700_000_000;

fn started() -> WallTime {
    WallTime(STARTED_S * 1_000_000_000)
}

struct Exporter(Ledger);

impl Exporter {
    fn new() -> Self {
        Self(Ledger::new(started()))
    }

    fn scrape(&mut self, node: &RichNode, pods: PodLabels) -> String {
        self.scrape_as(node, pods, Page::new(Selection::ALL, TextFormat::Prometheus))
    }

    fn scrape_as(&mut self, node: &RichNode, pods: PodLabels, mut all: Page) -> String {
        let mut page = scrape_by(1, &mut self.0, &node.snapshot, &node.labels, pods);
        page.pairs.iter_mut().take(2).for_each(|pair| pair.assigned = Some(AssignmentSource::Checkpoint));
        let starts = &mut self.0.starts;
        all.set_times(PageTimes { started: started(), now: page.at });
        families::cadvisor(&page, &mut all);
        families::containers(&page, &mut all, starts);
        families::users(&page, &mut all, starts);
        pressure::containers(&page, &node.pressure, &mut all, starts);
        pressure::reads(&node.pressure, &mut all);
        waits::containers(&page, &mut all, starts);
        waits::agent(2, &mut all);
        gpus::gpus(&page, &mut all, starts);
        let health = HealthView {
            kernel_mode: "ebpf",
            identified: times(&IDENTIFY_BOUNDS),
            nvml_up: Some(true),
            degraded: vec![(crate::health::condition::Condition::Nvml, "no driver".into())],
            ..HealthView::default()
        };
        families::agent(&page, &health, &label_stats(), "libnvidia-ml.so.1", &mut all);
        families::http(&Rejections::default(), Some(WallTime(1_700_000_000_000_000_000)), &mut all);
        families::otlp(Some(vec![("ok", 3.0), ("error", 0.0)]), &mut all);
        nvml_families::calls(&devices(), [1.0, 2.0], &mut all);
        sessions::metrics(&RecorderView::default(), Some(vec![("ok", 2.0), ("error", 1.0), ("removed", 0.0)]), &mut all);
        all.text()
    }
}

/// Four scrapes: before anything is used, the first and the second exposition of all other series, then with the newer pod labels only.
fn expositions() -> [String; 4] {
    let mut exporter = Exporter::new();
    let [first, second, third] =
        [RichNode::quiet(), RichNode::new(2, 2.0), RichNode::new(3, 3.0)].map(|node| exporter.scrape(&node, PodLabels::Both));
    [first, second, third, exporter.scrape(&RichNode::new(4, 4.0), PodLabels::New)]
}

/// Compares a file of the repository, by its path from this package. With `UPDATE=1` in the environment writes it instead.
pub(super) fn check_file(path: &str, expected: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, expected).unwrap();
    }
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let differing = text.lines().zip(expected.lines()).find(|(is, expected)| is != expected);
    assert!(text == expected, "{} is not current: run `cargo xtask docs`; first difference: {differing:?}", path.display());
}

#[test]
fn the_exposition_equals_the_golden_text() {
    let [_, second, third, _] = expositions();
    let is_stable = |line: &&str| !line.starts_with("gpu_sampler_build_info{");
    check_file(
        "src/export/golden/metrics.txt",
        &third.lines().filter(is_stable).map(|line| format!("{line}\n")).collect::<String>(),
    );
    // Both have the same series.
    let series = |text: &str| -> Vec<String> {
        text.lines().filter(|line| !line.starts_with('#')).map(|line| line.rsplit_once(' ').unwrap().0.to_owned()).collect()
    };
    assert_eq!(series(&second), series(&third));
}

#[test]
fn every_family_of_the_catalogue_is_exposed_with_all_its_labels_and_no_others() {
    let mut exposed: BTreeMap<String, (String, BTreeSet<String>)> = BTreeMap::new();
    for text in expositions() {
        let mut family = String::new();
        for line in text.lines() {
            if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
                name.clone_into(&mut family);
                exposed.entry(family.clone()).or_default().0 = kind.to_owned();
            }
            let labels = line.split(['{', ',']).filter_map(|part| part.split_once("=\"")).map(|(label, _)| label.to_owned());
            if !line.starts_with('#') {
                exposed.get_mut(&family).unwrap().1.extend(labels.filter(|label| label != "le"));
            }
        }
    }
    let declared = |family: &Family| {
        let labels = family.labels.iter().map(|label| (*label).to_owned()).collect();
        (family.name.to_owned(), (family.kind.name().to_owned(), labels))
    };
    assert_eq!(exposed, reference::all().map(declared).collect());
}

#[test]
fn a_series_that_appears_after_the_first_scrape_is_zero_once() {
    let [first, second, third, _] = expositions();
    let value = |text: &str, series: &str| -> Option<f64> {
        let line = text.lines().find(|line| line.rsplit_once(' ').is_some_and(|(start, _)| start == series))?;
        line.rsplit(' ').next().unwrap().parse().ok()
    };
    for family in reference::all().filter(|family| family.starts_at_zero) {
        for line in second.lines().filter(|line| line.strip_prefix(family.name).is_some_and(|rest| rest.starts_with(['{', '_'])))
        {
            let series = line.rsplit_once(' ').unwrap().0;
            let is_new = value(&first, series).is_none();
            assert!(!is_new || value(&second, series) == Some(0.0), "{line}");
            assert!(value(&third, series).is_some(), "{line}");
        }
    }
}

/// The created times of a page by series, without the suffix; each has to follow the other series of its labels.
fn created_times(text: &str) -> BTreeMap<String, f64> {
    let name_and_labels = |series: &str| {
        let (name, labels) = series.split_once('{').map_or((series, ""), |(name, labels)| (name, labels.trim_end_matches('}')));
        let name = ["_total", "_count", "_created"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name);
        format!("{name}{{{labels}}}")
    };
    let mut times = BTreeMap::new();
    let lines: Vec<&str> = text.lines().collect();
    for pair in lines.windows(2) {
        let [(before, _), (series, value)] = [pair[0], pair[1]].map(|line| line.rsplit_once(' ').unwrap());
        if series.split('{').next().unwrap().ends_with("_created") {
            let known = times.insert(name_and_labels(series), value.parse().unwrap());
            assert_eq!((name_and_labels(before), known), (name_and_labels(series), None));
        }
    }
    times
}

#[test]
fn created_times_are_constant_and_of_every_counter_with_a_known_start() {
    let selection = Selection::of_query("collect[]=all&collect[]=created", Selection::default()).unwrap();
    let mut exporter = Exporter::new();
    let mut scrape = |node: RichNode| exporter.scrape_as(&node, PodLabels::Both, Page::new(selection, TextFormat::OpenMetrics));
    let [first, second, third] = [RichNode::quiet(), RichNode::new(2, 2.0), RichNode::new(3, 3.0)].map(&mut scrape);
    let times = [&first, &second, &third].map(|text| created_times(text));
    assert!(times[0].iter().chain(&times[1]).all(|(series, at)| times[2].get(series) == Some(at)), "{times:?}");
    let at = |series: &str| times[2].iter().find(|(known, _)| known.starts_with(series)).map(|(_, at)| at - STARTED_S as f64);
    // Of the agent; of a GPU and a pair that its first snapshot had, and that only the second one had; of the calls of a device.
    assert_eq!(at("gpu_sampler_resyncs{"), Some(0.0));
    assert_eq!((at("gpu_time_seconds{uuid=\"GPU-1\""), at("gpu_time_seconds{uuid=\"MIG-1\"")), (Some(0.0), Some(1.0)));
    assert_eq!((at("container_gpu_seconds{uuid=\"GPU-1\""), at("container_gpu_seconds{uuid=\"MIG-1\"")), (Some(0.0), Some(1.0)));
    assert_eq!((at("gpu_sampler_nvml_errors{"), at("gpu_sampler_nvml_call_seconds{")), (Some(1.0), Some(1.0)));
    let counted = |family: &Family| {
        let name = format!("{}_created", family.name_in(TextFormat::OpenMetrics));
        third.lines().filter(|line| line.strip_prefix(&name).is_some_and(|rest| rest.starts_with([' ', '{']))).count()
    };
    for family in reference::all() {
        let suffix = if family.kind == Kind::Histogram { "_count" } else { "" };
        let name = format!("{}{suffix}", family.name);
        let series = third.lines().filter(|l| l.strip_prefix(&name).is_some_and(|rest| rest.starts_with([' ', '{']))).count();
        assert_eq!(counted(family), if family.has_created { series } else { 0 }, "{}", family.name);
    }
    assert!(["gpu_energy_joules_total", "container_gpu_pressure_seconds_total"].iter().all(|name| third.contains(name)));
}

#[test]
fn created_times_are_in_openmetrics_alone_and_only_if_selected() {
    let created = Selection::of_query("collect[]=all&collect[]=created", Selection::default()).unwrap();
    let with = |selection, format| {
        Exporter::new().scrape_as(&RichNode::new(1, 1.0), PodLabels::Both, Page::new(selection, format)).contains("_created")
    };
    assert!(with(created, TextFormat::OpenMetrics));
    assert!(!with(created, TextFormat::Prometheus) && !with(Selection::ALL, TextFormat::OpenMetrics));
}

#[test]
fn a_created_time_is_left_out_while_the_clock_is_behind_it() {
    let created = Selection::of_query("collect[]=all&collect[]=created", Selection::default()).unwrap();
    let mut exporter = Exporter::new();
    let mut times = |at_s, wall_s: u64| {
        let mut node = RichNode::new(at_s, 1.0);
        node.snapshot.wall = WallTime(wall_s * 1_000_000_000);
        let text = exporter.scrape_as(&node, PodLabels::Both, Page::new(created, TextFormat::OpenMetrics));
        created_times(&text).into_iter().find(|(series, _)| series.starts_with("gpu_time_seconds{")).map(|(_, at)| at)
    };
    assert_eq!(times(1, STARTED_S + 5), Some(STARTED_S as f64));
    assert_eq!(times(2, STARTED_S - 60), None);
    assert_eq!(times(3, STARTED_S + 7), Some(STARTED_S as f64));
}
