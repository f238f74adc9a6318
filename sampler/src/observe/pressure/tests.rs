use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::mpsc::channel;

use sampler_core::cgroup_path::parse;
use sampler_core::snapshot::{ContainerGpu, ContainerView};
use sampler_core::units::BootNs;

use super::*;

fn record(n: u64) -> Arc<ContainerRecord> {
    let cgroup_path = format!("/kubepods/pod8bb25662-de9a-11e9-84e7-f8f21e04010c/{n:064x}");
    let (key, identity, created) = (ContainerKey(n), parse(&cgroup_path), BootNs(0));
    Arc::new(ContainerRecord { key, cgroup_path, identity, created, creation_seen: true })
}

fn view(n: u64, gpus: usize, gone: Option<BootNs>) -> ContainerView {
    ContainerView { record: record(n), gone, gpus: vec![ContainerGpu::default(); gpus], waits: None }
}

fn snapshot(containers: Vec<ContainerView>) -> Snapshot {
    Snapshot { containers, ..Snapshot::default() }
}

/// A simulated hybrid host in a folder.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        for mount in ["v2", "cpu", "proc"] {
            fs::create_dir(host.0.path().join(mount)).unwrap();
        }
        host
    }

    fn pressure(&self) -> Pressure {
        let mount = |name: &str| self.0.path().join(name);
        let layout = Layout { v2: Some(mount("v2")), v1: None, v1_cpu: Some((3, mount("cpu"))) };
        Pressure::new(Hierarchies::new(&layout, &mount("proc")), 1024)
    }

    fn dir(&self, mount: &str, cgroup: &str) -> PathBuf {
        let dir = self.0.path().join(mount).join(cgroup.trim_start_matches('/'));
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    fn throttled(&self, cgroup: &str, ns: u64) {
        let dir = self.dir("cpu", cgroup);
        fs::write(dir.join("cpu.stat"), format!("nr_periods 9\nnr_throttled 4\nthrottled_time {ns}\n")).unwrap();
        fs::write(dir.join("cpu.cfs_quota_us"), "50000\n").unwrap();
        fs::write(dir.join("cpu.cfs_period_us"), "100000\n").unwrap();
    }
}

#[test]
fn containers_with_gpus_are_read_in_both_hierarchies() {
    let host = Host::new();
    let path = record(1).cgroup_path.clone();
    let pod = path.rsplit_once('/').unwrap().0.to_owned();
    host.throttled(&path, 1_000);
    host.throttled(&pod, 9_000);
    let dir = host.dir("v2", &path);
    fs::write(dir.join("memory.pressure"), "some avg10=0.00 avg60=0.00 avg300=0.00 total=7\n").unwrap();
    let all = snapshot(vec![view(1, 2, None), view(2, 0, None), view(3, 1, Some(BootNs(1)))]);
    let mut pressure = host.pressure();
    let (facts, problems) = pressure.round(&all);
    assert_eq!((facts.len(), problems), (1, Vec::new()));
    let cpu = facts[0].cpu.unwrap();
    assert_eq!((facts[0].key, cpu.throttled_ns, cpu.limit_ns), (ContainerKey(1), 9_000, Some((50_000_000, 100_000_000))));
    assert_eq!((facts[0].cpu_some_ns, facts[0].memory_some_ns, facts[0].io_some_ns), (None, Some(7_000), None));
    // Now the container is throttled.
    host.throttled(&path, 3_000);
    assert_eq!(pressure.round(&all).0[0].cpu.unwrap().throttled_ns, 11_000);
    // Three files of the container, three of its pod, their limits once; cpu and io have no pressure files.
    assert_eq!(pressure.view.reads, [10, 4, 0, 0]);
    // Its last fact is kept while it is in the snapshot.
    assert!(pressure.round(&snapshot(vec![view(1, 2, Some(BootNs(1)))])).0.is_empty());
    assert_eq!(pressure.view.facts.len(), 1);
    pressure.round(&snapshot(Vec::new()));
    assert!(pressure.view.facts.is_empty() && pressure.known.is_empty());
}

#[test]
fn an_unreadable_quota_is_unknown_and_a_problem() {
    let host = Host::new();
    let path = record(1).cgroup_path.clone();
    host.throttled(&path, 1);
    fs::write(host.dir("cpu", &path).join("cpu.stat"), "nr_periods many\n").unwrap();
    host.dir("v2", &path);
    let (facts, problems) = host.pressure().round(&snapshot(vec![view(1, 1, None)]));
    assert_eq!(facts[0].cpu, None);
    assert!(problems.len() == 1 && problems[0].contains("cpu.stat"), "{problems:?}");
}

/// Reads of these containers hang until the sender is dropped.
fn hanging(pressure: &mut Pressure, keys: std::ops::Range<u64>) -> std::sync::mpsc::Sender<()> {
    let (end, hangs) = channel::<()>();
    let (hangs, read) = (Mutex::new(hangs), Arc::clone(&pressure.read));
    pressure.patience = Duration::from_millis(50);
    pressure.read = Arc::new(move |target| {
        if keys.contains(&target.record.key.0) {
            let _ended = hangs.lock().unwrap().recv();
        }
        read(target)
    });
    end
}

#[test]
fn a_hanging_read_is_abandoned_and_the_others_are_read() {
    let host = Host::new();
    let mut pressure = host.pressure();
    let end = hanging(&mut pressure, 2..3);
    let all = snapshot((1..5).map(|n| view(n, 1, None)).collect());
    for _ in 0..2 {
        let (facts, problems) = pressure.round(&all);
        assert_eq!(facts.iter().map(|fact| fact.key.0).collect::<Vec<_>>(), [1, 3, 4]);
        assert!(problems.len() == 1 && problems[0].contains("hangs"), "{problems:?}");
    }
    assert_eq!(pressure.view.reads[Outcome::Timeout as usize], 1, "it is not read again");
    drop(end);
    let from = Instant::now();
    while pressure.round(&all).0.len() < 4 {
        assert!(from.elapsed() < Duration::from_secs(10), "it is read again after its read has returned");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(pressure.abandoned.is_empty());
}

#[test]
fn few_threads_are_abandoned_if_every_read_hangs() {
    let host = Host::new();
    let mut pressure = host.pressure();
    let end = hanging(&mut pressure, 0..100);
    let all = snapshot((1..50).map(|n| view(n, 1, None)).collect());
    for _ in 0..2 {
        assert!(pressure.round(&all).0.is_empty());
        assert_eq!(pressure.abandoned.len(), MAX_ABANDONED);
    }
    drop(end);
}

#[test]
fn a_container_that_does_not_use_its_gpu_is_read_less_often() {
    let (mut container, zero) = (ContainerPressure::default(), Instant::now());
    let mut is_due = |second: u64, used| container.is_due(used, zero + Duration::from_secs(second));
    // It may have used one before the agent started.
    let due: Vec<u64> = (0..35).filter(|second| is_due(*second, 1.0)).collect();
    assert_eq!(due, [(0..10).collect::<Vec<_>>(), vec![19, 29]].concat());
    assert_eq!((35..40).map(|second| is_due(second, 1.5)).collect::<Vec<_>>(), [true; 5]);
    // In an hour without use about once a minute.
    let due: Vec<u64> = (40..3_640).filter(|second| is_due(*second, 1.5)).collect();
    assert!((60..90).contains(&due.len()), "{due:?}");
    assert!(due.windows(2).all(|pair| pair[1] - pair[0] <= 60), "{due:?}");
}
