//! Reconstruction against a simulated driver that aggregates like the real one, polled at any rate.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;
use strum::EnumCount as _;

use super::*;

const PERIOD_US: u64 = 167_000;
const COMPUTE: usize = Engine::Compute as usize;

/// (stamp, percent, pid) of each sample, in the order in which they were taken, and the time at which each was taken.
#[derive(Clone, Debug)]
struct Ring {
    /// Whether an entry is the average over all samples, not over those that name its pid.
    over_all: bool,
    /// Whether a third of the responses have invalid entries in addition.
    invalid: bool,
    samples: Vec<(u64, u32, Option<u32>)>,
    taken_us: Vec<u64>,
}

impl Ring {
    fn new(samples: &[(u32, Option<u32>)]) -> Self {
        let taken_us: Vec<u64> = (0..samples.len() as u64).map(|k| 1_000_000 + k * PERIOD_US).collect();
        // The GPU's clock is 12 s ahead.
        let samples = samples.iter().zip(&taken_us).map(|((util, pid), at)| (at + 12_000_000, *util, *pid)).collect();
        Self { over_all: false, invalid: false, samples, taken_us }
    }

    fn held(&self, now_us: u64) -> &[(u64, u32, Option<u32>)] {
        let there = self.taken_us.partition_point(|at| *at <= now_us);
        &self.samples[there.saturating_sub(72)..there]
    }

    fn samples(&self, after: u64, now_us: u64) -> Vec<RawSample> {
        let newer = self.held(now_us).iter().filter(|(at, ..)| *at > after);
        newer.map(|(at_us, percent, _)| RawSample { at_us: *at_us, percent: *percent }).collect()
    }

    /// One entry for each pid: the time of its newest sample, the average.
    fn process_samples(&self, after: u64, now_us: u64) -> Vec<RawProcessSample> {
        let mut process_samples: HashMap<u32, (u64, u32, u32)> = HashMap::new();
        let all = self.held(now_us).iter().filter(|(at, ..)| *at > after).count() as u32;
        for (at, util, pid) in self.held(now_us).iter().filter(|(at, util, _)| *at > after && *util > 0) {
            let Some(pid) = pid else { continue };
            let process_sample = process_samples.entry(*pid).or_insert((0, 0, 0));
            *process_sample = (*at, process_sample.1 + util, process_sample.2 + 1);
        }
        let process_sample = |(pid, (at_us, sum, n)): (u32, (u64, u32, u32))| {
            let mut percent = [0; Engine::COUNT];
            percent[COMPUTE] = sum / if self.over_all { all } else { n };
            RawProcessSample { at_us, pid, percent }
        };
        let mut entries: Vec<RawProcessSample> = process_samples.into_iter().map(process_sample).collect();
        if self.invalid && (now_us / 7 + after).is_multiple_of(3) {
            entries.extend(self.invalid_entries(after, now_us));
        }
        entries
    }

    /// As seen from drivers: two PIDs without a process at the newest stamp, PIDs that are none, a percentage that is none, an entry that is
    /// older than what was asked for.
    fn invalid_entries(&self, after: u64, now_us: u64) -> Vec<RawProcessSample> {
        let Some((newest, _, pid)) = self.held(now_us).last().copied() else { return Vec::new() };
        let entry = |at_us: u64, pid: u32, compute: u32| {
            let mut percent = [0; Engine::COUNT];
            percent[COMPUTE] = compute;
            RawProcessSample { at_us, pid, percent }
        };
        let pid = pid.unwrap_or(1);
        let mut entries =
            vec![entry(newest, 0, 37), entry(newest, u32::MAX, 37), entry(newest, pid, 808_334_905), entry(after, pid, 37)];
        entries.extend((0..6).map(|n| entry(newest, WITHOUT_A_PROCESS + n % 2, 1 + n % 3)));
        entries
    }
}

/// From this PID on there are no processes.
const WITHOUT_A_PROCESS: u32 = 900;

/// Polls at those times with at most `calls` process queries for each poll.
fn poll(ring: &Ring, polls_us: impl Iterator<Item = u64>, calls: usize) -> (Vec<DeviceSample>, Vec<ProcessSample>, bool) {
    let mut recovery = Recovery::default();
    let (mut samples, mut process_samples, mut stepped) = (Vec::new(), Vec::new(), false);
    for now_us in polls_us {
        let now = BootNs(now_us * 1000);
        let after = recovery.samples_after(now);
        recovery.samples(&ring.samples(after, now_us), now, now);
        while let Some(after) = recovery.next_process_query(calls) {
            recovery.process_samples(after, &ring.process_samples(after, now_us));
        }
        let got = recovery.take();
        samples.extend(got.samples);
        process_samples.extend(got.process_samples);
        stepped |= got.stepped;
    }
    (samples, process_samples, stepped)
}

/// Polls after each of these times.
fn poll_after(ring: &Ring, waits_us: &[u64], calls: usize) -> (Vec<DeviceSample>, Vec<ProcessSample>, bool) {
    let polls_us = waits_us.iter().scan(1_000_001, |now_us, wait_us| {
        *now_us += wait_us;
        Some(*now_us)
    });
    poll(ring, polls_us, calls)
}

fn is_valid(pid: u32) -> bool {
    (1..WITHOUT_A_PROCESS).contains(&pid)
}

/// Checks every tuple of a valid pid against the ring; returns the number of samples that were recovered, and of those that were queried.
fn check(ring: &Ring, samples: &[DeviceSample], process_samples: &[ProcessSample]) -> Result<(usize, usize), TestCaseError> {
    let truth: HashMap<u64, (u32, Option<u32>)> = ring.samples.iter().map(|(at, util, pid)| (at * 1000, (*util, *pid))).collect();
    let mut seen = HashSet::new();
    let mut queried = 0;
    for sample in samples {
        prop_assert!(seen.insert(sample.at), "{sample:?} twice");
        let (util, pid) = truth[&sample.at.0];
        prop_assert_eq!(util, sample.busy_percent);
        if sample.queried && sample.at != samples[0].at {
            queried += 1;
            let of_sample = process_samples.iter().filter(|p| p.at == sample.at && is_valid(p.pid));
            let named: Vec<u32> = of_sample.map(|p| p.pid).collect();
            let expected: Vec<u32> = pid.filter(|_| util > 0).into_iter().collect();
            prop_assert_eq!(named, expected, "at {:?}", sample);
        }
    }
    let mut once = HashSet::new();
    for process_sample in process_samples.iter().filter(|process_sample| is_valid(process_sample.pid)) {
        prop_assert!(process_sample.percent[COMPUTE] > 0, "{:?} is not busy", process_sample);
        prop_assert!(once.insert((process_sample.at, process_sample.pid)), "{:?} twice", process_sample);
        prop_assert_eq!(truth[&process_sample.at.0].1, Some(process_sample.pid), "{:?} names another", process_sample);
    }
    Ok((seen.len(), queried))
}

/// Samples by the instant rule: a pid is named with the probability of the busy share.
fn samples() -> impl Strategy<Value = Vec<(u32, Option<u32>)>> {
    let sample = (0u32..=100, 0u32..100, 1u32..5, prop::bool::weighted(0.3));
    let sample = sample.prop_map(|(util, draw, pid, full)| {
        let util = if full { 100 } else { util };
        (util, (draw < util).then_some(pid))
    });
    prop::collection::vec(sample, 20..200)
}

proptest! {
    #[test]
    fn polled_faster_than_the_grid_every_tuple_is_recovered(samples in samples(), every in 30_000u64..166_000, over_all: bool) {
        let ring = Ring { over_all, ..Ring::new(&samples) };
        let end = 1_000_000 + samples.len() as u64 * PERIOD_US + 400_000;
        let (got, process_samples, stepped) = poll(&ring, (1_000_001..end).step_by(every as usize), 12);
        prop_assert_eq!(check(&ring, &got, &process_samples)?, (samples.len(), samples.len() - 1));
        prop_assert!(!stepped);
    }

    #[test]
    fn with_late_polls_no_tuple_is_wrong_and_most_are_separated(
        samples in samples(), waits in prop::collection::vec(20_000u64..1_500_000, 400), calls in 1usize..13, over_all: bool
    ) {
        let ring = Ring { over_all, ..Ring::new(&samples) };
        let (got, process_samples, _) = poll_after(&ring, &waits, calls);
        let (recovered, queried) = check(&ring, &got, &process_samples)?;
        // All but those from before the first poll.
        prop_assert!(recovered + 10 >= samples.len());
        prop_assert!(calls < 12 || queried * 10 >= (recovered - 1) * 6, "{} of {}", queried, recovered);
    }

    #[test]
    fn with_late_polls_and_invalid_entries_no_tuple_is_wrong(
        samples in samples(), waits in prop::collection::vec(20_000u64..1_500_000, 400), calls in 1usize..13, over_all: bool
    ) {
        let ring = Ring { over_all, invalid: true, ..Ring::new(&samples) };
        let (got, process_samples, _) = poll_after(&ring, &waits, calls);
        check(&ring, &got, &process_samples)?;
    }

    #[test]
    fn a_clock_that_is_set_loses_little(at in 20usize..80, by in prop::sample::select(vec![-9_000_000i64, -3_000_000, -1_000_000, 3_000_000, 3_600_000_000])) {
        let samples: Vec<(u32, Option<u32>)> = (0..120).map(|k| (100, Some(1 + k % 3))).collect();
        let mut ring = Ring::new(&samples);
        for (stamp, ..) in &mut ring.samples[at..] {
            *stamp = stamp.saturating_add_signed(by);
        }
        let end = 1_000_000 + 120 * PERIOD_US + 100_000;
        let (got, process_samples, stepped) = poll(&ring, (1_000_001..end).step_by(80_000), 12);
        prop_assert!(stepped);
        prop_assert!((117..=120).contains(&got.len()), "{}", got.len());
        let once: HashSet<_> = got.iter().map(|sample| sample.at).collect();
        prop_assert_eq!(once.len(), got.len());
        // In a ring with two clocks samples may hide each other: none is wrong, and soon none is missing.
        let named: HashMap<u64, u32> = ring.samples.iter().map(|(at, _, pid)| (at * 1000, pid.unwrap())).collect();
        prop_assert!(process_samples.iter().all(|p| named[&p.at.0] == p.pid));
        prop_assert!(process_samples.len() >= 110, "{}", process_samples.len());
    }
}

#[test]
fn implausible_samples_are_counted_and_harmless() {
    let mut recovery = Recovery::default();
    let now = |n: u64| BootNs(n * 80_000_000);
    let sample = |n: u64| RawSample { at_us: 1_000_000 + n * PERIOD_US, percent: 50 };
    let process_sample = |at_us, pid, percent| RawProcessSample { at_us, pid, percent: [percent, 0, 0, 0, 0, 0] };
    recovery.samples(&[sample(0), sample(1), sample(2), sample(3)], now(1), now(1));
    recovery.take();
    recovery.samples(&[sample(4), RawSample { at_us: 9, percent: 808_334_905 }], now(2), now(2));
    let after = recovery.next_process_query(12).unwrap();
    let at = sample(4).at_us;
    recovery.process_samples(
        after,
        &[
            process_sample(at, 7, 50),
            process_sample(at, 8, 808_334_905),
            process_sample(at, 0, 50),
            process_sample(after, 9, 50),
            process_sample(at + 3_000_000, 10, 50),
            process_sample(at, 7, 50),
        ],
    );
    assert_eq!(recovery.next_process_query(12), None);
    let got = recovery.take();
    assert_eq!(got.samples, [DeviceSample { at: GpuNs(at * 1000), busy_percent: 50, queried: true }]);
    let mut pids: Vec<u32> = got.process_samples.iter().map(|p| p.pid).collect();
    pids.sort_unstable();
    assert_eq!(pids, [0, 7]);
    // One device sample and one process sample; one pid 0; one old, one of the future, one duplicate.
    assert_eq!(got.rejected, [2, 1, 1, 1, 1]);
    // The process sample of the future has not moved the watermark.
    recovery.samples(&[sample(5)], now(4), now(4));
    assert_eq!(recovery.next_process_query(12), Some(at));
}

#[test]
fn a_sample_between_the_two_calls_is_read_before_process_samples_are_used() {
    let ring = Ring::new(&[(60, Some(1)), (60, Some(1)), (60, Some(1)), (60, Some(1)), (60, Some(1)), (40, Some(1))]);
    let mut recovery = Recovery::default();
    let now = |us: u64| BootNs(us * 1000);
    let fourth = 1_000_000 + 4 * PERIOD_US;
    recovery.samples(&ring.samples(0, fourth - 1), now(fourth - 1), now(fourth - 1));
    recovery.take();
    let after = recovery.samples_after(now(fourth + 1));
    recovery.samples(&ring.samples(after, fourth + 1), now(fourth + 1), now(fourth + 1));
    let after = recovery.next_process_query(12).unwrap();
    // By now the next sample has been taken.
    recovery.process_samples(after, &ring.process_samples(after, fourth + PERIOD_US));
    assert!(recovery.is_ahead());
    assert_eq!(recovery.next_process_query(12), None);
    let later = fourth + PERIOD_US;
    let after = recovery.samples_after(now(later));
    recovery.samples(&ring.samples(after, later), now(later), now(later));
    while let Some(after) = recovery.next_process_query(12) {
        recovery.process_samples(after, &ring.process_samples(after, later));
    }
    let got = recovery.take();
    assert_eq!(got.samples.len(), 2);
    assert!(got.samples.iter().all(|sample| sample.queried));
    assert_eq!(got.process_samples.len(), 2);
}

#[test]
fn invalid_stamps_do_not_stop_the_reconstruction() {
    let sample = |at_us| RawSample { at_us, percent: 50 };
    let now = |n: u64| BootNs(n * 80_000_000);
    // In the first read, later, and the same stamp many times.
    for garbage in [vec![u64::MAX], vec![u64::MAX / 1000], vec![7, 8, 9, 10, 11, 12], vec![5; 72]] {
        for first in [true, false] {
            let mut recovery = Recovery::default();
            let mut reported = 0;
            for n in 1..200u64 {
                let newest = n * 80_000 / PERIOD_US;
                let mut ring: Vec<RawSample> =
                    (newest.saturating_sub(20)..=newest).map(|k| sample(1_000_000 + k * PERIOD_US)).collect();
                if (n < 3) == first && n < 20 {
                    ring.splice(0..0, garbage.iter().map(|at| sample(*at)));
                }
                let after = recovery.samples_after(now(n));
                let response: Vec<RawSample> = ring.into_iter().filter(|s| s.at_us > after).collect();
                recovery.samples(&response, now(n), now(n));
                while let Some(after) = recovery.next_process_query(12) {
                    recovery.process_samples(after, &[]);
                }
                reported += recovery.take().samples.len();
                assert!(recovery.period_ns().is_none_or(|ns| ns > 10_000_000), "{garbage:?} {:?}", recovery.period_ns());
            }
            assert!((70..110).contains(&reported), "{garbage:?} {first}: {reported}");
        }
    }
}

/// The ring of an idle device, returned in any order: it contains nothing new, and no clock was set.
#[test]
fn a_ring_returned_from_its_middle_is_not_a_clock_that_was_set() {
    let mut recovery = Recovery::default();
    let sample = |k: u64| RawSample { at_us: 1_000_000 + k * PERIOD_US, percent: 50 };
    let now = |k: u64| BootNs((1_000_000 + k * PERIOD_US) * 1000);
    let turned: Vec<RawSample> = (40..72).chain(0..40).map(sample).collect();
    recovery.samples(&turned, now(72), now(72));
    recovery.take();
    for k in 73..100 {
        let after = recovery.samples_after(now(k));
        let response: Vec<RawSample> = turned.iter().copied().filter(|s| s.at_us > after).collect();
        recovery.samples(&response, now(k), now(k));
        let got = recovery.take();
        assert!(got.samples.is_empty() && !got.stepped, "{k}: {got:?}");
    }
}

/// Numbers from the fuzzer's bytes; zero after their end.
struct Words<'b>(&'b [u8]);

impl Words<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn number(&mut self, bytes: usize) -> u64 {
        (0..bytes).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }

    /// Most stamps are near the present, as those of a driver are; one in four is any number.
    fn stamp(&mut self, now_us: u64) -> u64 {
        match self.byte() {
            0..=191 => now_us.wrapping_add(self.number(3)).wrapping_sub(1 << 23),
            _ => self.number(8),
        }
    }
}

/// Whatever a driver returns: nothing is invented, samples are in the order of their times, and the work of a poll is bounded.
#[test]
fn fuzz_driver_samples() {
    devkit::fuzz(file!(), "driver_samples", move |bytes| {
        let (mut words, mut recovery, mut now_us) = (Words(bytes), Recovery::default(), 1 << 32);
        while !words.0.is_empty() {
            now_us += words.number(3);
            let now = BootNs(now_us * 1000);
            let _after = recovery.samples_after(now);
            let response: Vec<RawSample> = (0..words.byte() % 80)
                .map(|_| RawSample { at_us: words.stamp(now_us), percent: u32::from(words.byte() % 104) })
                .collect();
            recovery.samples(&response, now, now.plus(words.number(2)));
            let process = |words: &mut Words<'_>| {
                let mut percent = [0; Engine::COUNT];
                percent[usize::from(words.byte()) % Engine::COUNT] = u32::from(words.byte() % 104);
                RawProcessSample { at_us: words.stamp(now_us), pid: words.byte().into(), percent }
            };
            let (calls, mut made, mut named) = (usize::from(words.byte() % 80), 0, 0);
            if words.byte() % 8 == 0 {
                let all: Vec<RawProcessSample> = (0..words.byte() % 80).map(|_| process(&mut words)).collect();
                named += all.len();
                recovery.named(all.into_iter());
            }
            while let Some(after) = recovery.next_process_query(calls) {
                let all: Vec<RawProcessSample> = (0..words.byte() % 8).map(|_| process(&mut words)).collect();
                (made, named) = (made + 1, named + all.len());
                recovery.process_samples(after, &all);
            }
            assert!(made <= calls);
            let got = recovery.take();
            assert!(got.samples.len() <= response.len() && got.process_samples.len() <= named);
            let stamps: HashSet<u64> = response.iter().map(|sample| sample.at_us.saturating_mul(1000)).collect();
            assert!(got.samples.iter().all(|sample| stamps.contains(&sample.at.0) && sample.busy_percent <= 100));
            assert!(got.process_samples.iter().all(|sample| sample.percent.iter().all(|percent| *percent <= 100)));
            assert!(got.process_samples.is_sorted_by_key(|sample| sample.at));
            assert!(got.stepped || got.samples.is_sorted_by_key(|sample| sample.at));
        }
    });
}
