//! Time in which the clocks of a device were limited, by reason: from the driver's own counter of that reason where it has one, else from
//! the reasons in force at each reading, which miss what is shorter than the time between two readings.
//!
//! A counter is not used if the reasons contradict it: drivers give the fields of some counters different numbers, and a wrong number is
//! another value.

use crate::device::{THROTTLE_REASONS, ThrottleTimes};
use crate::units::BootNs;

const REASONS: usize = THROTTLE_REASONS.len();
/// Readings of the reasons that are further apart do not count for the time between. Where driver calls take 10 ms each, they are some 35 s
/// apart.
const READINGS_NS: u64 = 60_000_000_000;
/// Readings of the reasons between two of the counters that can contradict these.
const CONTRADICTING: u32 = 3;
/// A counter that stood still while as many showed its reason is contradicted, too.
/// A counter that grew by less than this part of a time in which every reading showed its reason is contradicted.
const LEAST_PART: u64 = 10;
/// A counter is read some time after the reading is stamped.
const LATE_NS: u64 = 2_000_000_000;

#[derive(Clone, Copy, Debug, Default)]
struct Counter {
    /// The last value, and when it was read.
    last: Option<(u64, BootNs)>,
    is_contradicted: bool,
    /// Readings of the reasons since then, and those that showed this one.
    readings: u32,
    shown: u32,
    /// Time before the readings that showed it.
    shown_ns: u64,
    /// The sums of both over the times in which the counter did not grow.
    frozen: (u32, u64),
}

impl Counter {
    fn is_used(&self) -> bool {
        self.last.is_some() && !self.is_contradicted
    }

    /// Nanoseconds since the last value. `reasons_at`: up to when the reasons were read.
    fn read(&mut self, ns: Option<u64>, at: BootNs, reasons_at: BootNs) -> u64 {
        let last = std::mem::replace(&mut self.last, ns.map(|ns| (ns, at)));
        let (readings, shown) = (std::mem::take(&mut self.readings), std::mem::take(&mut self.shown));
        let shown_ns = std::mem::take(&mut self.shown_ns);
        let (Some((before, since)), Some(ns), false) = (last, ns, self.is_contradicted) else { return 0 };
        let elapsed = at.saturating_since(since);
        // It is lower after the driver was loaded again.
        let grown = ns.saturating_sub(before);
        let is_always_shown = readings >= CONTRADICTING && shown == readings;
        if is_always_shown && grown < elapsed / LEAST_PART {
            self.is_contradicted = true;
            return reasons_at.saturating_since(since);
        }
        self.frozen = if grown > 0 { (0, 0) } else { (self.frozen.0 + shown, self.frozen.1 + shown_ns) };
        if self.frozen.0 >= CONTRADICTING {
            self.is_contradicted = true;
            return self.frozen.1;
        }
        if grown > elapsed.saturating_mul(2).saturating_add(LATE_NS) {
            self.is_contradicted = true;
            return 0;
        }
        grown
    }
}

#[derive(Debug, Default)]
pub struct ThrottleAccount {
    /// When the reasons were last read.
    reasons_at: Option<BootNs>,
    counters: [Counter; REASONS],
    seconds: Option<[f64; REASONS]>,
}

impl ThrottleAccount {
    pub fn read_reasons(&mut self, mask: u64, at: BootNs) {
        let last = self.reasons_at.replace(at).unwrap_or(at);
        let elapsed = at.saturating_since(last);
        let seconds = self.seconds.get_or_insert_default();
        for (((bit, _), counter), sum) in THROTTLE_REASONS.iter().zip(&mut self.counters).zip(seconds) {
            let is_shown = mask & bit != 0;
            if counter.is_used() {
                counter.readings += 1;
                counter.shown += u32::from(is_shown);
                counter.shown_ns += if is_shown && elapsed <= READINGS_NS { elapsed } else { 0 };
            } else if is_shown && elapsed <= READINGS_NS {
                *sum += elapsed as f64 * 1e-9;
            }
        }
    }

    pub fn read_counters(&mut self, times: &ThrottleTimes, at: BootNs) {
        if times.0.iter().all(Option::is_none) && self.seconds.is_none() {
            return;
        }
        let reasons_at = self.reasons_at.unwrap_or(at);
        let seconds = self.seconds.get_or_insert_default();
        for ((counter, ns), sum) in self.counters.iter_mut().zip(times.0).zip(seconds) {
            *sum += counter.read(ns, at, reasons_at) as f64 * 1e-9;
        }
    }

    /// The device was opened again, perhaps by another driver.
    pub fn restart(&mut self) {
        self.counters = Default::default();
    }

    /// `None` where the driver reports neither.
    pub fn seconds(&self) -> Option<[f64; REASONS]> {
        self.seconds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const POWER_CAP: usize = 2;
    const POWER_CAP_BIT: u64 = 0x4;

    /// Reads the reasons every second, and the counter of the power cap every five seconds; its seconds at the end.
    fn seconds(counter: impl Fn(u64) -> Option<u64>, mask: impl Fn(u64) -> u64, until: u64) -> f64 {
        let mut account = ThrottleAccount::default();
        for second in 0..=until {
            let at = BootNs(second * SECOND);
            if second % 5 == 0 {
                let mut times = ThrottleTimes::default();
                times.0[POWER_CAP] = counter(second);
                account.read_counters(&times, at);
            }
            account.read_reasons(mask(second), at);
        }
        account.seconds().unwrap()[POWER_CAP]
    }

    #[test]
    fn a_counter_has_what_readings_of_the_reasons_miss_and_nothing_before_the_first() {
        // 100 ms of each second, never at a reading.
        let counted = seconds(|s| Some(77 * SECOND + s * SECOND / 10), |_| 0, 20);
        assert!((counted - 2.0).abs() < 1e-9, "{counted}");
        assert_eq!(seconds(|_| None, |s| if (3..8).contains(&s) { POWER_CAP_BIT } else { 0 }, 20), 5.0);
        // It is not counted twice.
        let both = seconds(|s| Some(s * SECOND), |_| POWER_CAP_BIT, 20);
        assert!((both - 20.0).abs() < 1e-9, "{both}");
    }

    #[test]
    fn a_counter_that_contradicts_the_reasons_is_not_used() {
        let stands_still = seconds(|_| Some(1), |_| POWER_CAP_BIT, 20);
        assert!((stands_still - 20.0).abs() < 1e-9, "{stands_still}");
        let wild = seconds(|s| Some(s * s * 1000 * SECOND), |_| 0, 20);
        assert_eq!(wild, 0.0);
        // One that stands still is contradicted by a few readings, however far apart they are.
        let some = seconds(|_| Some(1), |s| if s % 2 == 0 { POWER_CAP_BIT } else { 0 }, 20);
        assert!((9.0..=11.0).contains(&some), "{some}");
        let rare = seconds(|_| Some(1), |s| if s % 6 == 0 { POWER_CAP_BIT } else { 0 }, 60);
        assert!((8.0..=11.0).contains(&rare), "{rare}");
        // Some readings of one that grows contradict nothing.
        let short = seconds(|s| Some(s * SECOND / 5), |s| if s % 5 == 0 { POWER_CAP_BIT } else { 0 }, 20);
        assert!((short - 4.0).abs() < 1e-9, "{short}");
    }

    #[test]
    fn a_counter_that_begins_again_or_is_absent_adds_nothing_for_that_time() {
        let again = seconds(|s| Some(if s < 10 { 50 * SECOND + s * SECOND } else { (s - 10) * SECOND }), |_| 0, 20);
        assert!((again - 15.0).abs() < 1e-9, "{again}");
        assert_eq!(ThrottleAccount::default().seconds(), None);
        let mut account = ThrottleAccount::default();
        account.read_counters(&ThrottleTimes::default(), BootNs(1));
        assert_eq!(account.seconds(), None);
    }
}
