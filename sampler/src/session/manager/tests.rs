//! Tests from facts to files, with a simulated clock.

use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use sampler_core::device::GpuInfo;
use sampler_core::fact::{AttributedProcess, ContainerFact, GpuFact, User, UtilizationSample};
use sampler_core::units::{ContainerKey, GpuNs, GpuUuid};
use sampler_session::{FileBytes, Session, View, read};

use super::*;
use crate::labels::LabelView;

/// When the agent starts, in seconds since boot.
const START: u64 = 1_000_000;
const WALL: u64 = 1_700_000_000;

struct Bench {
    dir: tempfile::TempDir,
    store: Arc<Store>,
    manager: SessionManager,
    /// Seconds since the start.
    second: u64,
}

fn boot(second: u64) -> BootNs {
    BootNs((START + second) * SECOND_NS)
}

fn wall(second: u64) -> WallTime {
    WallTime((WALL + second) * SECOND_NS)
}

fn opened() -> Fact {
    let info = GpuInfo { uuid: GpuUuid("GPU-0".into()), model: "model".into(), ..GpuInfo::default() };
    Fact::Gpu { gpu: 0, at: boot(0), fact: GpuFact::Opened(Arc::new(info)) }
}

fn container() -> Fact {
    Fact::Container(ContainerFact {
        key: ContainerKey(1),
        cgroup_path: "/docker/1".into(),
        container_id: None,
        runtime: None,
        pod_uid: None,
        created: BootNs(1),
        creation_seen: true,
    })
}

/// The sample that ends with `second`.
fn sample(second: u64) -> Fact {
    let process = AttributedProcess { pid: 7, percent: 50, user: User::Container(ContainerKey(1)), since: boot(0) };
    let sample = UtilizationSample { stamp: GpuNs(second), ns: SECOND_NS, busy_percent: 50, processes: vec![process] };
    Fact::Gpu { gpu: 0, at: boot(second), fact: GpuFact::Utilization(sample) }
}

/// The seconds of the samples in a session.
fn samples(session: &Session) -> Vec<u64> {
    let second = |fact: &Fact| match fact {
        Fact::Gpu { fact: GpuFact::Utilization(sample), .. } => Some(sample.stamp.0),
        _ => None,
    };
    session.facts.iter().filter_map(second).collect()
}

impl Bench {
    fn new(max_bytes: u64, ring_bytes: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path().join("sessions"), max_bytes);
        store.prepare().unwrap();
        let sources = SessionInputs {
            waits: WaitRequests::default(),
            labels: Box::new(|| Arc::new(LabelView::new())),
            snapshot: Arc::default(),
            procfs: dir.path().to_owned(),
            node: "node".into(),
            saturation_percent: 90,
            engines: tokio::sync::watch::channel(None).0,
        };
        let mut manager = SessionManager::new(sources, Arc::clone(&store), ring_bytes).unwrap();
        manager.facts(&[opened(), container()], boot(0));
        Self { dir, store, manager, second: 0 }
    }

    /// Advances to `second`, with a sample for each second that arrives a second late.
    fn until(&mut self, second: u64) {
        while self.second < second {
            self.second += 1;
            self.manager.facts(&[sample(self.second - 1)], boot(self.second));
            self.manager.turn(boot(self.second), wall(self.second));
            // The writer threads are real and would not keep up with a simulated clock without pauses.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn start(&mut self, request: &Request) -> String {
        self.manager.start(request.clone(), boot(self.second), wall(self.second)).unwrap()
    }

    fn phase(&self, id: &str) -> (Phase, String) {
        let status = self.store.status(id, boot(self.second)).unwrap();
        (status.state, status.error.unwrap_or_default())
    }

    /// Waits for the writer thread.
    fn wait(&self, id: &str, phase: Phase) {
        let begun = Instant::now();
        while self.phase(id).0 != phase {
            assert!(begun.elapsed() < Duration::from_secs(10), "{id} is {:?}", self.phase(id));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn read(&self, id: &str) -> Session {
        let (file, path) = self.store.open(id).unwrap();
        crate::session::read_from(&file, &path).unwrap()
    }
}

fn request(duration: u64, lookback: u64) -> Request {
    Request { duration_ns: duration * SECOND_NS, lookback_ns: lookback * SECOND_NS, ..Request::default() }
}

#[test]
fn serving_engines_are_requested_while_a_session_that_wants_them_counts() {
    let mut bench = Bench::new(1 << 20, 1 << 20);
    let requests = bench.manager.sources.engines.subscribe();
    let every = || requests.borrow().as_ref().map(|request| request.every.as_secs());
    let wanted = |duration, every| Request {
        engines: Some(EngineRequest { every: Duration::from_secs(every), rules: Vec::new() }),
        ..request(duration, 0)
    };
    bench.until(10);
    bench.start(&request(100, 0));
    assert_eq!(every(), None);
    bench.start(&wanted(30, 5));
    assert_eq!(every(), Some(5));
    bench.start(&wanted(10, 2));
    assert_eq!(every(), Some(2));
    let armed = Request { trigger: Some("busy>0.9".parse().unwrap()), ..wanted(10, 1) };
    bench.start(&armed);
    assert_eq!(every(), Some(2));
    bench.until(25);
    assert_eq!(every(), Some(5));
    bench.until(45);
    assert_eq!(every(), None);
}

#[test]
fn a_session_must_not_change_the_engine_rules_of_another() {
    let mut bench = Bench::new(1 << 20, 1 << 20);
    let with = |rule: &str| Request {
        engines: Some(EngineRequest { every: Duration::from_secs(5), rules: vec![Arc::new(rule.parse().unwrap())] }),
        ..request(10, 0)
    };
    bench.until(10);
    bench.start(&Request { trigger: Some("busy>0.9".parse().unwrap()), ..with("a=/metrics,x=waiting") });
    bench.start(&with("a=/metrics,x=waiting"));
    bench.start(&with("b=/metrics,x=waiting"));
    let refused = bench.manager.start(with("a=/metrics,y=waiting"), boot(10), wall(10)).unwrap_err();
    assert!(matches!(&refused, StoreError::Conflict(text) if text.contains("the engine rule a differs")), "{refused:?}");
    assert_eq!(bench.manager.sessions.len(), 3);
}

#[test]
fn a_session_contains_its_lookback_its_context_and_its_tail() {
    let mut bench = Bench::new(1 << 20, 1 << 20);
    bench.until(100);
    let mut wanted = request(10, 20);
    wanted.view.gpus = vec!["0".into()];
    let id = bench.start(&wanted);
    bench.until(111);
    assert_eq!(bench.phase(&id).0, Phase::Recording, "the last seconds are not complete yet");
    bench.until(113);
    bench.wait(&id, Phase::Finished);
    let session = bench.read(&id);
    assert_eq!(session.damage, [""; 0]);
    assert_eq!((session.header.start, session.end), (boot(80), Some(boot(110))));
    assert_eq!(session.header.start_wall, wall(80));
    assert_eq!(
        (session.header.node.as_str(), &session.header.view),
        ("node", &View { gpus: vec!["0".into()], ..View::default() })
    );
    let samples = samples(&session);
    // From the section that contains the time 40 s before the start, to a second after the end.
    let first = samples[0];
    assert!((25..40).contains(&first), "{first}");
    assert_eq!(samples, (first..=111).collect::<Vec<_>>());
    assert_eq!(session.facts.iter().filter(|fact| **fact == container()).count(), 1);
    let status = bench.store.status(&id, boot(500)).unwrap();
    assert_eq!((status.elapsed_seconds, status.lookback_seconds, status.dropped_frames), (10.0, 20.0, 0));
    assert_eq!(status.size_bytes, std::fs::metadata(bench.store.open(&id).unwrap().1).unwrap().len());
}

#[test]
fn the_lookback_is_limited_by_the_ring() {
    let mut bench = Bench::new(1 << 20, 1 << 20);
    bench.until(5);
    let id = bench.start(&request(2, 60));
    bench.until(9);
    bench.wait(&id, Phase::Finished);
    assert_eq!(bench.read(&id).header.start, boot(0));
    assert_eq!(bench.store.status(&id, boot(9)).unwrap().lookback_seconds, 5.0);
    // A small ring has less, and stays within its size.
    let mut small = Bench::new(1 << 20, 20_000);
    small.until(300);
    assert!(small.manager.ring.bytes() <= 20_000);
    let since = small.manager.ring.since().unwrap();
    assert!(since > boot(100) && since < boot(280), "{since:?}");
}

#[test]
fn a_stopped_session_cannot_be_stopped_again() {
    let mut bench = Bench::new(1 << 20, 1 << 20);
    bench.until(5);
    let id = bench.start(&request(1000, 0));
    bench.until(10);
    bench.manager.stop(&id, boot(10)).unwrap();
    bench.until(12);
    bench.wait(&id, Phase::Finished);
    assert_eq!(bench.read(&id).end, Some(boot(10)));
    assert!(bench.manager.stop(&id, boot(12)).unwrap_err().to_string().contains("is finished already"));
    assert!(matches!(bench.manager.stop("x", boot(12)), Err(StoreError::Unknown(_))));
}

#[test]
fn the_number_of_active_sessions_is_limited_and_a_later_run_lists_their_files() {
    let mut bench = Bench::new(1 << 20, 1 << 20);
    let ids: Vec<String> = (0..MAX_ACTIVE).map(|_| bench.start(&request(1000, 0))).collect();
    let refused = bench.manager.start(request(1, 0), boot(0), wall(0)).unwrap_err();
    assert!(refused.to_string().contains("stop one first"));
    bench.until(3);
    bench.manager.close(boot(3));
    for id in &ids {
        bench.wait(id, Phase::Finished);
    }
    // Another run lists them, and also the files that it cannot read.
    let path = bench.dir.path().join("sessions");
    std::fs::write(path.join("20260101-000000-00.gpus"), "nonsense").unwrap();
    std::fs::rename(path.join(format!("{}.gpus", ids[0])), path.join("20260101-000000-01.gpus.part")).unwrap();
    let cut = &std::fs::read(path.join(format!("{}.gpus", ids[1]))).unwrap()[..400];
    std::fs::write(path.join("20260101-000000-02.gpus.part"), cut).unwrap();
    std::fs::write(path.join("../20260101-000000-02.gpus"), "").unwrap();
    drop(bench.manager);
    drop(bench.store);
    let next = Store::new(path, 1 << 20);
    // The writer threads may not have ended yet.
    let begun = Instant::now();
    while next.list_earlier().is_err() && begun.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let all = next.list(boot(0));
    let phases: Vec<Phase> = all.iter().map(|status| status.state).collect();
    assert_eq!(all.len(), MAX_ACTIVE - 1 + 3);
    assert!(phases[..MAX_ACTIVE - 1].iter().all(|phase| *phase == Phase::Finished));
    let [nonsense, whole, part] = &all[MAX_ACTIVE - 1..] else { panic!() };
    assert_eq!((nonsense.state, nonsense.error.as_deref()), (Phase::Interrupted, Some("cannot read its header")));
    assert_eq!((whole.state, whole.elapsed_seconds), (Phase::Finished, 3.0));
    assert_eq!((part.state, part.started.as_deref()), (Phase::Interrupted, Some("2023-11-14T22:13:20.000Z")));
}

#[test]
fn an_armed_session_waits_for_its_trigger() {
    let mut bench = Bench::new(1 << 20, 1 << 20);
    let armed = Request { trigger: Some("busy>0.5".parse().unwrap()), ..request(5, 10) };
    let (id, stopped, never) = (bench.start(&armed), bench.start(&armed), bench.start(&armed));
    bench.manager.stop(&stopped, boot(0)).unwrap();
    assert!(bench.store.open(&id).unwrap_err().to_string().contains("recording has not begun"));
    bench.until(50);
    assert_eq!((bench.phase(&id).0, bench.phase(&stopped).0), (Phase::Armed, Phase::Failed));
    let LivePhase::Armed { until, .. } = &mut bench.manager.sessions[1].phase else { panic!() };
    *until = boot(51);
    bench.until(52);
    assert_eq!(bench.phase(&never), (Phase::Failed, "its condition was not met within 24 hours".into()));
    bench.manager.sources.snapshot.store(Arc::new(busy_snapshot()));
    bench.until(60);
    bench.wait(&id, Phase::Finished);
    let header = bench.read(&id).header;
    assert_eq!((header.start, header.trigger.as_deref()), (boot(43), Some("busy>0.5: 0.80 on GPU-0")));
}

fn busy_snapshot() -> Snapshot {
    let Fact::Gpu { fact: GpuFact::Opened(info), .. } = opened() else { panic!() };
    let gpu = sampler_core::snapshot::GpuView {
        info,
        readings: Default::default(),
        hardware: Default::default(),
        time: Default::default(),
        unattributed: Default::default(),
        unattributed_energy: None,
        utilization_ratio: Some(0.8),
        coactive_ratio: None,
        last_sample: None,
        sample_period_seconds: None,
        sample_gaps: 0,
        counts: Default::default(),
        expected_stderr_ratio: None,
        ring_overruns: 0,
        rejected: Default::default(),
        off_grid: 0,
        clock: Default::default(),
        engines: Vec::new(),
        throttle_seconds: None,
        xids: Vec::new(),
        unattributed_holders: Vec::new(),
        gone: None,
    };
    Snapshot { at: boot(1), gpus: vec![gpu], ..Snapshot::default() }
}

/// The disk hangs: written frames are not received. Neither the recorder nor another session waits for it.
#[test]
fn a_hanging_disk_affects_only_its_session_which_recovers() {
    let mut bench = Bench::new(1 << 20, 1 << 20);
    let other = bench.start(&request(1000, 0));
    let id = bench.start(&request(1000, 0));
    let (to, from) = sync_channel(4);
    let LivePhase::Recording(recording) = &mut bench.manager.sessions[1].phase else { panic!() };
    // The real writer waits.
    let _kept = std::mem::replace(&mut recording.to, to);
    recording.sequence = 0;
    // The file begins here.
    recording.broken = true;
    let mut file = FileBytes::default();
    let drain = |file: &mut FileBytes| {
        while let Ok(item) = from.try_recv() {
            file.sequence = item.sequence;
            file.put(&item.frame);
        }
    };
    for second in 1..10 {
        bench.until(second);
        drain(&mut file);
    }
    bench.until(40);
    for second in 40..60 {
        bench.until(second);
        drain(&mut file);
    }
    let status = bench.store.status(&id, boot(60)).unwrap();
    assert!(status.dropped_frames > 20 && bench.manager.dropped_frames == status.dropped_frames, "{status:?}");
    let session = read(&file.bytes).unwrap();
    assert!(session.damage.iter().any(|words| words.contains("are missing before byte")), "{:?}", session.damage);
    let had = samples(&session);
    assert!(had.contains(&5) && !had.contains(&30) && had.contains(&55), "{had:?}");
    // The state was written again.
    assert_eq!(session.facts.iter().filter(|fact| **fact == opened()).count(), 2);
    bench.manager.stop(&other, boot(59)).unwrap();
    bench.until(62);
    bench.wait(&other, Phase::Finished);
    assert_eq!(bench.read(&other).damage, [""; 0]);
}

#[test]
fn lost_facts_are_reported_as_damage() {
    let mut bench = Bench::new(1 << 20, 1 << 20);
    let id = bench.start(&request(20, 0));
    bench.until(10);
    bench.manager.lost(5, boot(10));
    bench.until(25);
    bench.wait(&id, Phase::Finished);
    let late = bench.start(&request(1, 20));
    bench.until(30);
    bench.wait(&late, Phase::Finished);
    for id in [&id, &late] {
        let damage = bench.read(id).damage.join("; ");
        assert!(damage.contains("is missing before byte") && damage.contains("the agent dropped 1 frames"), "{damage}");
    }
}

#[test]
fn a_full_store_ends_a_session_and_keeps_its_file() {
    let mut bench = Bench::new(2000, 1 << 20);
    let id = bench.start(&request(1000, 0));
    bench.until(60);
    bench.wait(&id, Phase::Failed);
    assert!(bench.phase(&id).1.contains("session_dir_max_bytes (2000)"), "{:?}", bench.phase(&id));
    let session = bench.read(&id);
    assert!(samples(&session).len() > 5 && session.end.is_none());
    assert_eq!(session.damage, [""; 0], "it ends early, and its content is intact");
    bench.until(61);
    assert!(bench.manager.sessions.is_empty());
    bench.store.remove(&id).unwrap();
    assert_eq!(std::fs::read_dir(bench.dir.path().join("sessions")).unwrap().count(), 1, "only the lock");
}

#[test]
fn a_removed_folder_fails_the_session() {
    let mut bench = Bench::new(1 << 20, 1 << 20);
    std::fs::remove_dir_all(bench.dir.path().join("sessions")).unwrap();
    let id = bench.start(&request(10, 0));
    bench.wait(&id, Phase::Failed);
    assert!(bench.phase(&id).1.contains("cannot create"), "{:?}", bench.phase(&id));
    assert!(!Path::new("sessions").exists());
}

#[test]
fn a_session_of_which_the_end_cannot_be_packed_fails_with_the_reason_and_keeps_its_file() {
    let mut bench = Bench::new(1 << 20, 1 << 20);
    let id = bench.start(&request(1000, 0));
    bench.until(10);
    bench.manager.end(boot(10), |_, _| true, |_, _| Err(PackError::TooLong(9)));
    assert!(bench.manager.sessions.is_empty());
    // The writer ends without an end of the session.
    let begun = Instant::now();
    let read = || {
        let (file, path) = bench.store.open(&id).ok()?;
        crate::session::read_from(&file, &path).ok().filter(|session| samples(session).len() >= 8)
    };
    let session = loop {
        if let Some(session) = read() {
            break session;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "the writer has not written what it was given");
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(session.end, None);
    let (phase, reason) = bench.phase(&id);
    assert!(phase == Phase::Failed && reason.contains("a record of 9 bytes exceeds"), "{phase:?}: {reason}");
}

#[test]
fn facts_of_an_experiment_are_written_into_a_session_that_records() {
    use sampler_core::experiment::{ExperimentDesign, FreezeConsent};
    let mut bench = Bench::new(1 << 20, 1 << 20);
    bench.until(5);
    let id = bench.start(&request(60, 0));
    bench.until(7);
    let design = ExperimentDesign { seed: 1, bursts: 6, window_ns: SECOND_NS, pause_ns: 0, consent: FreezeConsent::Operator };
    let schedule = ExperimentFact::Schedule(design.draw("/docker/1".into(), "/docker/2".into(), boot(9)));
    let frozen = ExperimentFact::Frozen { experiment: boot(9), burst: 0, from: boot(9), to: boot(10) };
    let post = |bench: &mut Bench, fact: &ExperimentFact| bench.manager.experiment(&id, fact.clone(), boot(bench.second));
    assert!(matches!(post(&mut bench, &frozen), Err(StoreError::Conflict(_))), "there is no schedule");
    post(&mut bench, &schedule).unwrap();
    bench.until(12);
    post(&mut bench, &frozen).unwrap();
    for again in [&schedule, &frozen] {
        assert!(matches!(post(&mut bench, again), Err(StoreError::Conflict(_))), "{again:?}");
    }
    bench.until(40);
    bench.manager.stop(&id, boot(bench.second)).unwrap();
    bench.until(70);
    bench.wait(&id, Phase::Finished);
    let refused = bench.manager.experiment(&id, frozen.clone(), boot(bench.second)).unwrap_err();
    assert!(matches!(refused, StoreError::Conflict(_)), "{refused}");
    assert!(matches!(bench.manager.experiment("none", frozen.clone(), boot(bench.second)), Err(StoreError::Unknown(_))));
    let facts = bench.read(&id).facts;
    let of_experiment: Vec<&Fact> = facts.iter().filter(|fact| matches!(fact, Fact::Experiment(_))).collect();
    assert_eq!(of_experiment, [&Fact::Experiment(schedule), &Fact::Experiment(frozen)]);
}
