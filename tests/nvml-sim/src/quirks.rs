//! Tests of the driver's results in worlds with quirks.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use crate::answers::{ProcessSample, RingKind};
use crate::driver::Driver;
use crate::loads::{self, Load, Ways};
use crate::model::DriverSample;
use crate::processes::{List, NO_INSTANCE, UNKNOWN_BYTES};
use crate::world::Unit;

/// Begin of these tests' worlds, and their current time.
const BEGUN: u64 = 1_000_000_000_000;
const NOW: u64 = BEGUN + 60_000_000;

struct QuirkSim {
    driver: Driver,
    dir: tempfile::TempDir,
}

/// Loads as (pid, demand, end) from the world's begin on; the processes need not exist, since the driver does not check for them.
fn sim(keys: &str, loads: &[(u32, f64, Option<u64>)]) -> QuirkSim {
    let plain = loads.iter().map(|(pid, demand, end)| (*pid, *demand, *end, Ways::default()));
    with_ways(keys, &plain.collect::<Vec<_>>())
}

fn with_ways(keys: &str, loads: &[(u32, f64, Option<u64>, Ways)]) -> QuirkSim {
    let dir = tempfile::tempdir().unwrap();
    // Times in the log are those of the world, not of this machine.
    let mut text = String::new();
    for (n, (pid, demand, end_us, ways)) in loads.iter().enumerate() {
        let (gpu, begin_us, ways) = (0, BEGUN, ways.clone());
        let (id, demand, end_us) = (n as u64, *demand, *end_us);
        let load = Load { id, pid: *pid, start_time: 9, gpu, demand, memory_bytes: 5, begin_us, end_us, ways };
        writeln!(text, "{}", serde_json::json!({ "begin": load })).unwrap();
    }
    std::fs::write(dir.path().join(loads::FILE), text).unwrap();
    let keys = if keys.contains("[[gpus]]") { keys.to_owned() } else { format!("{keys}\n[[gpus]]\n") };
    let world = format!("begun_us = {BEGUN}\nbooted_us = {}\n{keys}", BEGUN - 7_000_000);
    std::fs::write(dir.path().join(crate::world::FILE), world).unwrap();
    let mut driver = Driver::open(dir.path()).unwrap();
    driver.never_check_for_ended_processes();
    driver.fixed_us = Some(NOW);
    QuirkSim { driver, dir }
}

impl QuirkSim {
    fn samples(&mut self, after: u64) -> Vec<(u64, u32)> {
        self.driver.samples(0, RingKind::Utilization(0), after).unwrap()
    }

    fn process_samples(&mut self, after: u64) -> Vec<ProcessSample> {
        self.driver.process_samples(0, after).unwrap()
    }

    fn recorded(&mut self) -> Vec<DriverSample> {
        self.driver.sync(0).unwrap();
        self.driver.rings[0].iter().copied().collect()
    }

    fn now(&mut self, after_begin_us: u64) {
        self.driver.fixed_us = Some(BEGUN + after_begin_us);
    }
}

#[test]
fn a_process_sample_is_the_mean_of_its_samples_with_the_newest_stamp() {
    let mut sim = with_ways("", &[(7, 0.5, None, Ways { enc: 0.5, ..Ways::default() }), (8, 0.3, None, Ways::default())]);
    let recorded = sim.recorded();
    for after in [0, recorded[40].at_us, recorded[71].at_us] {
        let folded = sim.process_samples(after);
        for pid in [7, 8] {
            let on = |engine: usize| {
                recorded.iter().filter(move |t| t.at_us > after && t.pid[engine] == Some(pid) && t.util[engine] > 0)
            };
            let mean = |engine: usize| {
                let n = on(engine).count() as u32;
                on(engine).map(|t| t.util[engine]).sum::<u32>() / n.max(1)
            };
            let newest = (0..6).flat_map(on).map(|t| t.at_us).max();
            let sample = folded.iter().find(|r| r.pid == pid);
            assert_eq!(sample.map(|r| r.stamp_us), newest, "pid {pid} after {after}");
            if let Some(sample) = sample {
                assert_eq!(sample.util[..3], [mean(0), mean(1), mean(2)]);
            }
        }
        assert!(folded.windows(2).all(|w| w[0].stamp_us <= w[1].stamp_us));
    }
}

#[test]
fn stamps_are_on_the_gpus_own_clock() {
    let check = |keys: &str, by: i64| {
        let (mut plain, mut other) = (sim("", &[(7, 0.9, None)]), sim(keys, &[(7, 0.9, None)]));
        let shifted: Vec<u64> = plain.samples(0).iter().map(|(at, _)| at.wrapping_add_signed(by)).collect();
        let stamps: Vec<u64> = other.samples(0).iter().map(|(at, _)| *at).collect();
        assert_eq!(stamps, shifted, "{keys}");
        let (shifted, plain) = (other.process_samples(0)[0].stamp_us, plain.process_samples(0)[0].stamp_us);
        assert_eq!(shifted, plain.wrapping_add_signed(by), "{keys}");
        // lastSeen is on the same clock.
        assert_eq!(other.samples(stamps[70]).len(), 1, "{keys}");
    };
    check("", 0);
    check("clock = 'boot'", -(BEGUN as i64 - 7_000_000));
    check("clock_offset_us = 12000000", 12_000_000);
    check("[[gpus]]\n[[gpus.clock_steps]]\nat = '20s'\nby_us = -3000000", -3_000_000);
}

#[test]
fn after_a_clock_step_back_last_seen_hides_newer_samples() {
    let mut sim = sim("[[gpus]]\n[[gpus.clock_steps]]\nat = '20s'\nby_us = -3000000", &[(7, 0.9, None)]);
    sim.now(20_000_000);
    let newest = sim.samples(0).last().unwrap().0;
    sim.now(22_000_000);
    assert!(sim.samples(newest).is_empty() && sim.samples(0).windows(2).any(|w| w[1].0 < w[0].0));
    // Once the clock has caught up, samples count as newer again.
    sim.now(24_000_000);
    assert!(!sim.samples(newest).is_empty());
}

#[test]
fn idle_samples_are_zero_or_absent() {
    let loads = [(7, 1.0, Some(NOW - 6_000_000))];
    let (zeros, dry) = (sim("", &loads).samples(0), sim("idle_ring = 'dry'", &loads).samples(0));
    let busy: Vec<_> = zeros.iter().filter(|(_, util)| *util > 0).copied().collect();
    assert!(zeros.len() == 72 && busy.len() < 50 && dry == busy);
    assert!(sim("idle_ring = 'dry'", &[]).samples(0).is_empty());
    assert_eq!(sim("idle_ring = 'dry'", &[]).driver.samples(0, RingKind::Power, 0).unwrap().len(), 72);
}

#[test]
fn process_stamps_lie_before_their_samples_stamps() {
    let loads = [(7, 0.5, None), (8, 0.5, None)];
    let (mut device, mut process) = (sim("", &loads), sim("row_stamps = 'process'", &loads));
    for (sample, early) in device.process_samples(0).iter().zip(process.process_samples(0)) {
        let distance = sample.stamp_us - early.stamp_us;
        assert!(sample.pid == early.pid && sample.util == early.util && (0..5_000).contains(&distance));
    }
    // A client that has seen the largest stamp gets none of these samples again.
    let seen = process.process_samples(0).iter().map(|r| r.stamp_us).max().unwrap();
    assert!(process.process_samples(seen).is_empty());
}

#[test]
fn garbage_comes_in_addition_to_valid_process_samples() {
    let gone = NOW - 4_000_000;
    let check = |kinds: &str, expect: fn(&[ProcessSample], u64) -> bool| {
        let loads = [(7, 0.9, None), (8, 0.9, Some(gone))];
        let seen = NOW - 2_000_000;
        let plain = sim("", &loads).process_samples(seen);
        let all = sim(&format!("garbage = [{kinds}]"), &loads).process_samples(seen);
        assert_eq!(all[..plain.len()], plain, "{kinds}");
        assert!(expect(&all[plain.len()..], seen), "{kinds}: {all:?}");
    };
    check("", |more, _| more.is_empty());
    check("'util'", |more, _| more.len() == 1 && more[0].pid == 7 && more[0].util[0] == 808_334_905);
    check("'pid_zero', 'pid_max'", |more, _| more.iter().map(|r| r.pid).eq([0, u32::MAX]));
    check("'stale'", |more, seen| more.len() == 1 && more[0].stamp_us == seen);
    check("'exited'", |more, seen| more.len() == 1 && more[0].pid == 8 && more[0].stamp_us <= seen);
    check("'zombies'", |more, _| more.len() == 300 && more.iter().all(|r| r.pid > 4_000_000 && r.util[0] > 0));
    let mut some = sim("garbage = ['pid_zero']\ngarbage_every = 4", &[(7, 0.9, None)]);
    let with: usize = (0..400)
        .filter(|n| {
            some.now(30_000_000 + n * 1_000);
            some.process_samples(0).len() > 1
        })
        .count();
    assert!((70..130).contains(&with), "{with} of 400 results contain garbage");
}

#[test]
fn shuffled_process_samples_are_the_same_samples() {
    let loads: Vec<_> = (1..=9).map(|pid| (pid, 0.11, None)).collect();
    let sorted = |mut samples: Vec<ProcessSample>| {
        samples.sort_by_key(|r| r.pid);
        samples
    };
    let (mut plain, mut shuffled) = (sim("", &loads), sim("row_order = 'shuffled'", &loads));
    let (plain, shuffled) = (plain.process_samples(0), shuffled.process_samples(0));
    assert!(plain != shuffled && sorted(plain) == sorted(shuffled));
}

#[test]
fn a_frozen_sample_buffer_keeps_its_samples_and_a_reload_empties_it() {
    let fault = |kind: &str| format!("[[gpus]]\n[[faults]]\nkind = '{kind}'\nfrom = '30s'\nlasts = '20s'");
    let check = |kind: &str, at_s: u64, len: usize, newest_s: f64| {
        let mut sim = sim(&fault(kind), &[(7, 0.9, None)]);
        sim.now(at_s * 1_000_000);
        let recorded = sim.recorded();
        let newest = recorded.last().map_or(0.0, |t| (t.at_us - BEGUN) as f64 / 1e6);
        assert!(
            recorded.len() == len && (newest - newest_s).abs() < 0.2,
            "{kind} at {at_s} s: {} until {newest}",
            recorded.len()
        );
        // A driver that ran all the time has the same.
        sim.now(20_000_000);
        sim.driver.rings[0].clear();
        for second in 20..=at_s {
            sim.now(second * 1_000_000);
            sim.recorded();
        }
        assert_eq!(sim.recorded(), recorded, "{kind}");
    };
    check("freeze", 45, 72, 30.0);
    check("freeze", 51, 72, 51.0);
    check("lost", 45, 72, 30.0);
    check("reload", 45, 0, 0.0);
    check("reload", 55, 30, 55.0);
    check("absent", 55, 30, 55.0);
    check("stall", 45, 72, 45.0);
}

#[test]
fn each_process_is_in_the_list_of_its_kind() {
    let mps = Ways { mps: true, ..Ways::default() };
    let graphics = Ways { graphics: true, ..Ways::default() };
    let loads =
        [(7, 0.1, None, Ways::default()), (8, 0.1, None, mps), (9, 0.1, None, graphics), (6, 0.1, Some(NOW), Ways::default())];
    let mut sim = with_ways("", &loads);
    for (list, pid) in [(List::Compute, 7), (List::Mps, 8), (List::Graphics, 9)] {
        let found = sim.driver.processes(0.into(), list).unwrap();
        assert_eq!(found.iter().map(|p| (p.pid, p.bytes, p.gi)).collect::<Vec<_>>(), [(pid, 5, NO_INSTANCE)], "{list:?}");
    }
    assert_eq!(sim.driver.memory(0.into()).unwrap().used, 15);
    let mut unknown = with_ways("list_memory = 'unknown'", &loads);
    assert_eq!(unknown.driver.processes(0.into(), List::Compute).unwrap()[0].bytes, UNKNOWN_BYTES);
    assert_eq!(unknown.driver.memory(0.into()).unwrap().used, 15);
}

#[test]
fn mig_devices_have_their_own_lists_and_the_gpus_list_has_all() {
    let on = |mig| Ways { mig: Some(mig), ..Ways::default() };
    let keys = "[[gpus]]\nmig = ['MIG-a', { uuid = 'MIG-b', gi = 9, ci = 3 }]";
    let mut sim = with_ways(keys, &[(7, 0.1, None, on(0)), (8, 0.1, None, on(1))]);
    let mut listed = |mig| {
        let found = sim.driver.processes(Unit { gpu: 0, mig }, List::Compute).unwrap();
        found.iter().map(|p| (p.pid, p.gi, p.ci)).collect::<Vec<_>>()
    };
    assert_eq!(listed(None), [(7, 1, 0), (8, 9, 3)]);
    assert_eq!((listed(Some(0)), listed(Some(1))), (vec![(7, 1, 0)], vec![(8, 9, 3)]));
    assert_eq!(sim.driver.memory(Unit { gpu: 0, mig: Some(1) }).unwrap().used, 5);
}

#[test]
fn sums_continue_after_their_loads_are_forgotten() {
    let loads = [(7, 0.6, Some(BEGUN + 10_000_000)), (8, 0.2, None)];
    let mut sim = sim("energy = true\naccounting = true\ngpm = true", &loads);
    sim.now(20_020_000);
    let before = sim.driver.readings(0, None).unwrap();
    let (seven, eight) = (sim.driver.accounts(0).unwrap()[0].clone(), sim.driver.accounts(0).unwrap()[1].clone());
    assert_eq!((seven.0, seven.1.end_us, eight.1.end_us), ((7, 9), Some(BEGUN + 10_000_000), None));
    assert!((seven.1.seconds[0] - 6.0).abs() < 0.3 && (eight.1.seconds[0] - 4.0).abs() < 0.4, "{seven:?} {eight:?}");
    let mj = sim.driver.energy_mj(0).unwrap() as f64;
    assert!((mj - (40_000.0 * 20.0 + 220_000.0 * 10.0)).abs() < 100_000.0, "{mj} mJ");
    sim.now(50_020_000);
    let after = sim.driver.readings(0, None).unwrap();
    let busy = (after[0].1.seconds[0] - before[0].1.seconds[0]) / ((after[0].1.at_us - before[0].1.at_us) as f64 / 1e6);
    assert!((busy - 0.2).abs() < 0.02, "{busy}");
    assert!(sim.dir.path().exists() && sim.driver.accounts(0).unwrap().len() == 2);
}

#[test]
fn pids_of_another_kernel_are_in_every_result() {
    let pids = |sim: &mut QuirkSim| {
        let sampled: BTreeSet<u32> = sim.process_samples(0).iter().map(|sample| sample.pid).collect();
        let listed = sim.driver.processes(Unit::from(0), List::Compute).unwrap();
        let listed: BTreeSet<u32> = listed.iter().map(|process| process.pid).collect();
        assert_eq!(sampled, listed);
        sampled.into_iter().collect::<Vec<_>>()
    };
    let loads = || [(7, 0.5, None, Ways::default()), (8, 0.4, None, Ways { shown_as: Some(99), ..Ways::default() })];
    assert_eq!(pids(&mut with_ways("", &loads())), [7, 99]);
    assert_eq!(pids(&mut with_ways("foreign_pids = true", &loads())), [99, 5_000_007]);
    // The truth has the processes' own pids.
    let mut sim = with_ways("foreign_pids = true", &loads());
    assert!(sim.recorded().iter().filter_map(|sample| sample.pid[0]).all(|pid| matches!(pid, 7 | 8)));
    // A later process with that pid is shown with its own pid.
    let reused = [(7, 0.5, Some(BEGUN + 1), Ways { shown_as: Some(99), ..Ways::default() }), (7, 0.5, None, Ways::default())];
    assert_eq!(pids(&mut with_ways("", &reused)), [7]);
}

#[test]
fn a_sample_is_blank_once_its_process_has_ended() {
    for (keys, expect) in [("pid_rule = 'last'", vec![1, 2]), ("pid_rule = 'last'\nexited_pids = 'blank'", vec![2])] {
        let mut sim = sim(keys, &[(1, 1.0, Some(NOW - 3_000_000)), (2, 1.0, None)]);
        let pids = |sim: &mut QuirkSim| sim.process_samples(0).iter().map(|sample| sample.pid).collect::<BTreeSet<u32>>();
        sim.now(56_999_999);
        assert_eq!(pids(&mut sim), [1, 2].into(), "{keys}");
        // 3 s after its end the buffer still has its samples.
        sim.now(60_000_000);
        assert_eq!(pids(&mut sim), expect.into_iter().collect(), "{keys}");
        // What was recorded, and the device's own samples, are the same.
        assert!(sim.recorded().iter().any(|sample| sample.pid[0] == Some(1)));
        assert_eq!(sim.samples(0).iter().filter(|(_, percent)| *percent == 100).count(), 72);
    }
}

#[test]
fn an_average_is_over_the_samples_of_the_pid_or_over_all() {
    let folded = |keys: &str| {
        let mut sim = sim(keys, &[(1, 1.0, None), (2, 1.0, None)]);
        sim.process_samples(0).iter().map(|sample| sample.util[0]).collect::<Vec<u32>>()
    };
    assert_eq!(folded("pid_rule = 'last'"), [100, 100]);
    let over_all = folded("pid_rule = 'last'\naverage = 'over_all'");
    assert!((98..=100).contains(&over_all.iter().sum::<u32>()) && over_all.iter().all(|p| *p > 20), "{over_all:?}");
}

#[test]
fn samples_of_an_ended_process_count_in_an_average_over_all() {
    let keys = "pid_rule = 'last'\nexited_pids = 'blank'\naverage = 'over_all'";
    let mut sim = sim(keys, &[(1, 1.0, Some(NOW - 6_000_000)), (2, 0.5, None)]);
    let recorded = sim.recorded();
    let of_two: u32 = recorded.iter().filter(|sample| sample.pid[0] == Some(2)).map(|sample| sample.util[0]).sum();
    let samples = sim.process_samples(0);
    assert_eq!((samples.len(), samples[0].pid, samples[0].util[0]), (1, 2, of_two / 72));
}

#[test]
fn the_energy_counter_advances_every_100_ms() {
    let mut sim = sim("energy = true\ngpm = true", &[(7, 0.5, None)]);
    let mut energy_at = |after_begin_us| {
        sim.now(after_begin_us);
        // A reading between two steps does not move the counter.
        sim.driver.readings(0, None).unwrap();
        sim.driver.energy_mj(0).unwrap()
    };
    // The counter is as late as the samples: by 20 ms.
    let [before, first, last, next] = [20_019_999, 20_020_000, 20_119_999, 20_120_000].map(&mut energy_at);
    assert!(before + 4_000 <= first && first == last && last + 4_000 <= next, "{before} {first} {last} {next}");
}
