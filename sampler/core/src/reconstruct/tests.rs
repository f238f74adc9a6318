//! Against a driver that folds as the real one does, polled at any pace.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;

const PERIOD_US: u64 = 167_000;
const COMPUTE: usize = Engine::Compute as usize;

/// (stamp, percent, pid) of each sample, in the order of their taking, and when it was taken.
#[derive(Clone, Debug)]
struct Ring {
    samples: Vec<(u64, u32, Option<u32>)>,
    taken_us: Vec<u64>,
}

impl Ring {
    fn new(ticks: &[(u32, Option<u32>)]) -> Self {
        let taken_us: Vec<u64> = (0..ticks.len() as u64).map(|k| 1_000_000 + k * PERIOD_US).collect();
        // The GPU's clock is 12 s ahead.
        let samples = ticks.iter().zip(&taken_us).map(|((util, pid), at)| (at + 12_000_000, *util, *pid)).collect();
        Self { samples, taken_us }
    }

    fn held(&self, now_us: u64) -> &[(u64, u32, Option<u32>)] {
        let there = self.taken_us.partition_point(|at| *at <= now_us);
        &self.samples[there.saturating_sub(72)..there]
    }

    fn samples(&self, after: u64, now_us: u64) -> Vec<RawSample> {
        let newer = self.held(now_us).iter().filter(|(at, ..)| *at > after);
        newer.map(|(at_us, percent, _)| RawSample { at_us: *at_us, percent: *percent }).collect()
    }

    /// One row per pid: the time of its newest sample, the average of all.
    fn rows(&self, after: u64, now_us: u64) -> Vec<RawRow> {
        let mut rows: HashMap<u32, (u64, u32, u32)> = HashMap::new();
        for (at, util, pid) in self.held(now_us).iter().filter(|(at, util, _)| *at > after && *util > 0) {
            let Some(pid) = pid else { continue };
            let row = rows.entry(*pid).or_insert((0, 0, 0));
            *row = (*at, row.1 + util, row.2 + 1);
        }
        let row = |(pid, (at_us, sum, n)): (u32, (u64, u32, u32))| {
            let mut percent = [0; Engine::ALL.len()];
            percent[COMPUTE] = sum / n;
            RawRow { at_us, pid, percent }
        };
        rows.into_iter().map(row).collect()
    }
}

/// Polls at those times with so many calls for rows a poll.
fn poll(ring: &Ring, polls_us: impl Iterator<Item = u64>, calls: usize) -> (Vec<DeviceSample>, Vec<ProcessSample>, bool) {
    let mut recovery = Recovery::default();
    let (mut ticks, mut rows, mut stepped) = (Vec::new(), Vec::new(), false);
    for now_us in polls_us {
        let now = BootNs(now_us * 1000);
        let after = recovery.samples_after(now);
        recovery.samples(&ring.samples(after, now_us), now, now);
        while let Some(after) = recovery.next_rows(calls) {
            recovery.rows(after, &ring.rows(after, now_us));
        }
        let got = recovery.take();
        ticks.extend(got.ticks);
        rows.extend(got.rows);
        stepped |= got.stepped;
    }
    (ticks, rows, stepped)
}

/// Checks every tuple against the ring; the parts of the ticks that were recovered, and looked at.
fn check(ring: &Ring, ticks: &[DeviceSample], rows: &[ProcessSample]) -> Result<(usize, usize), TestCaseError> {
    let truth: HashMap<u64, (u32, Option<u32>)> = ring.samples.iter().map(|(at, util, pid)| (at * 1000, (*util, *pid))).collect();
    let mut seen = HashSet::new();
    let mut looked = 0;
    for tick in ticks {
        prop_assert!(seen.insert(tick.at), "{tick:?} twice");
        let (util, pid) = truth[&tick.at.0];
        prop_assert_eq!(util, tick.busy_percent);
        if tick.queried && tick.at != ticks[0].at {
            looked += 1;
            let named: Vec<u32> = rows.iter().filter(|row| row.at == tick.at).map(|row| row.pid).collect();
            let expected: Vec<u32> = pid.filter(|_| util > 0).into_iter().collect();
            prop_assert_eq!(named, expected, "at {:?}", tick);
        }
    }
    let mut once = HashSet::new();
    for row in rows {
        prop_assert!(once.insert((row.at, row.pid)), "{:?} twice", row);
        prop_assert_eq!(truth[&row.at.0].1, Some(row.pid), "{:?} names another", row);
    }
    Ok((seen.len(), looked))
}

/// Under the instant rule: busy shares as the engine's, the pid there with that probability.
fn ticks() -> impl Strategy<Value = Vec<(u32, Option<u32>)>> {
    let tick = (0u32..=100, 0u32..100, 1u32..5, prop::bool::weighted(0.3));
    let tick = tick.prop_map(|(util, draw, pid, full)| {
        let util = if full { 100 } else { util };
        (util, (draw < util).then_some(pid))
    });
    prop::collection::vec(tick, 20..200)
}

proptest! {
    #[test]
    fn polled_faster_than_the_grid_every_tuple_is_recovered(ticks in ticks(), every in 30_000u64..166_000) {
        let ring = Ring::new(&ticks);
        let end = 1_000_000 + ticks.len() as u64 * PERIOD_US + 400_000;
        let (got, rows, stepped) = poll(&ring, (1_000_001..end).step_by(every as usize), 12);
        prop_assert_eq!(check(&ring, &got, &rows)?, (ticks.len(), ticks.len() - 1));
        prop_assert!(!stepped);
    }

    #[test]
    fn polled_late_nothing_is_wrong_and_most_is_taken_apart(
        ticks in ticks(), waits in prop::collection::vec(20_000u64..1_500_000, 400), calls in 1usize..13
    ) {
        let ring = Ring::new(&ticks);
        let mut now = 1_000_001;
        let polls: Vec<u64> = waits.iter().map(|wait| { now += wait; now }).collect();
        let (got, rows, _) = poll(&ring, polls.into_iter(), calls);
        let (recovered, looked) = check(&ring, &got, &rows)?;
        // All but those that were there before the first poll.
        prop_assert!(recovered + 10 >= ticks.len());
        prop_assert!(calls < 12 || looked * 10 >= (recovered - 1) * 6, "{} of {}", looked, recovered);
    }

    #[test]
    fn a_clock_that_is_set_loses_little(at in 20usize..80, by in prop::sample::select(vec![-9_000_000i64, -3_000_000, -1_000_000, 3_000_000, 3_600_000_000])) {
        let ticks: Vec<(u32, Option<u32>)> = (0..120).map(|k| (100, Some(1 + k % 3))).collect();
        let mut ring = Ring::new(&ticks);
        for (stamp, ..) in &mut ring.samples[at..] {
            *stamp = stamp.saturating_add_signed(by);
        }
        let end = 1_000_000 + 120 * PERIOD_US + 100_000;
        let (got, rows, stepped) = poll(&ring, (1_000_001..end).step_by(80_000), 12);
        prop_assert!(stepped);
        prop_assert!((117..=120).contains(&got.len()), "{}", got.len());
        let once: HashSet<_> = got.iter().map(|tick| tick.at).collect();
        prop_assert_eq!(once.len(), got.len());
        // Of the ring with two clocks rows may hide each other: nothing wrong, and soon nothing missing.
        let named: HashMap<u64, u32> = ring.samples.iter().map(|(at, _, pid)| (at * 1000, pid.unwrap())).collect();
        prop_assert!(rows.iter().all(|row| named[&row.at.0] == row.pid));
        prop_assert!(rows.len() >= 110, "{}", rows.len());
    }
}

#[test]
fn what_breaks_the_model_is_counted_and_harmless() {
    let mut recovery = Recovery::default();
    let now = |n: u64| BootNs(n * 80_000_000);
    let sample = |n: u64| RawSample { at_us: 1_000_000 + n * PERIOD_US, percent: 50 };
    let row = |at_us, pid, percent| RawRow { at_us, pid, percent: [percent, 0, 0, 0, 0, 0] };
    recovery.samples(&[sample(0), sample(1), sample(2), sample(3)], now(1), now(1));
    recovery.take();
    recovery.samples(&[sample(4), RawSample { at_us: 9, percent: 808_334_905 }], now(2), now(2));
    let after = recovery.next_rows(12).unwrap();
    let at = sample(4).at_us;
    recovery.rows(
        after,
        &[
            row(at, 7, 50),
            row(at, 8, 808_334_905),
            row(at, 0, 50),
            row(after, 9, 50),
            row(at + 3_000_000, 10, 50),
            row(at, 7, 50),
        ],
    );
    assert_eq!(recovery.next_rows(12), None);
    let got = recovery.take();
    assert_eq!(got.ticks, [DeviceSample { at: GpuNs(at * 1000), busy_percent: 50, queried: true }]);
    let mut pids: Vec<u32> = got.rows.iter().map(|row| row.pid).collect();
    pids.sort_unstable();
    assert_eq!(pids, [0, 7]);
    // One of the device's samples and one row; one pid 0; one old, one of the future, one twice.
    assert_eq!(got.rejected, [2, 1, 1, 1, 1]);
    // The row of the future has not moved the watermark.
    recovery.samples(&[sample(5)], now(4), now(4));
    assert_eq!(recovery.next_rows(12), Some(at));
}

#[test]
fn a_sample_between_the_two_calls_is_fetched_before_rows_are_believed() {
    let ring = Ring::new(&[(60, Some(1)), (60, Some(1)), (60, Some(1)), (60, Some(1)), (60, Some(1)), (40, Some(1))]);
    let mut recovery = Recovery::default();
    let now = |us: u64| BootNs(us * 1000);
    let fourth = 1_000_000 + 4 * PERIOD_US;
    recovery.samples(&ring.samples(0, fourth - 1), now(fourth - 1), now(fourth - 1));
    recovery.take();
    let after = recovery.samples_after(now(fourth + 1));
    recovery.samples(&ring.samples(after, fourth + 1), now(fourth + 1), now(fourth + 1));
    let after = recovery.next_rows(12).unwrap();
    // By now the next is there.
    recovery.rows(after, &ring.rows(after, fourth + PERIOD_US));
    assert!(recovery.is_ahead());
    assert_eq!(recovery.next_rows(12), None);
    let later = fourth + PERIOD_US;
    let after = recovery.samples_after(now(later));
    recovery.samples(&ring.samples(after, later), now(later), now(later));
    while let Some(after) = recovery.next_rows(12) {
        recovery.rows(after, &ring.rows(after, later));
    }
    let got = recovery.take();
    assert_eq!(got.ticks.len(), 2);
    assert!(got.ticks.iter().all(|tick| tick.queried));
    assert_eq!(got.rows.len(), 2);
}

#[test]
fn stamps_that_no_clock_gives_stop_nothing() {
    let sample = |at_us| RawSample { at_us, percent: 50 };
    let now = |n: u64| BootNs(n * 80_000_000);
    // In the first read, later, and the same one many times.
    for garbage in [vec![u64::MAX], vec![u64::MAX / 1000], vec![7, 8, 9, 10, 11, 12], vec![5; 72]] {
        for first in [true, false] {
            let mut recovery = Recovery::default();
            let mut told = 0;
            for n in 1..200u64 {
                let newest = n * 80_000 / PERIOD_US;
                let mut ring: Vec<RawSample> =
                    (newest.saturating_sub(20)..=newest).map(|k| sample(1_000_000 + k * PERIOD_US)).collect();
                if (n < 3) == first && n < 20 {
                    ring.splice(0..0, garbage.iter().map(|at| sample(*at)));
                }
                let after = recovery.samples_after(now(n));
                let answer: Vec<RawSample> = ring.into_iter().filter(|s| s.at_us > after).collect();
                recovery.samples(&answer, now(n), now(n));
                while let Some(after) = recovery.next_rows(12) {
                    recovery.rows(after, &[]);
                }
                told += recovery.take().ticks.len();
                assert!(recovery.period_ns().is_none_or(|ns| ns > 10_000_000), "{garbage:?} {:?}", recovery.period_ns());
            }
            assert!((70..110).contains(&told), "{garbage:?} {first}: {told}");
        }
    }
}

/// An idle device's ring, whatever order it is told in: nothing new is in it, and no clock was set.
#[test]
fn a_ring_told_from_its_middle_is_not_a_clock_that_was_set() {
    let mut recovery = Recovery::default();
    let sample = |k: u64| RawSample { at_us: 1_000_000 + k * PERIOD_US, percent: 50 };
    let now = |k: u64| BootNs((1_000_000 + k * PERIOD_US) * 1000);
    let turned: Vec<RawSample> = (40..72).chain(0..40).map(sample).collect();
    recovery.samples(&turned, now(72), now(72));
    recovery.take();
    for k in 73..100 {
        let after = recovery.samples_after(now(k));
        let answer: Vec<RawSample> = turned.iter().copied().filter(|s| s.at_us > after).collect();
        recovery.samples(&answer, now(k), now(k));
        let got = recovery.take();
        assert!(got.ticks.is_empty() && !got.stepped, "{k}: {got:?}");
    }
}
