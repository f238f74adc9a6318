//! How often one GPU may be asked, so that asking stays within its budget. Pure: time is passed in.
//!
//! Each part of the work (the ring of samples, the lists of processes, the readings, the other engines) has its share of the budget and an account: credit
//! comes in with time, what a call took is taken out. Intervals follow the averaged cost; a debt stretches them until it is paid
//! back over a minute, so one hiccup does not blind the agent, and calls that stay slow do not take more than they may.
//!
//! Time in a call counts whole, waited or computed: a call that waits may hold a lock of the driver's.

use std::collections::VecDeque;
use std::time::Duration;

/// Unused budget is saved up for this long.
const SAVED_NS: f64 = 5e9;
/// A debt is paid back over this long.
const REPAID_NS: f64 = 60e9;
/// Weight of the newest cost in the average.
const WEIGHT: f64 = 0.2;
/// Calls have become slow, at once, where even the middle one of the last three costs is this many averages.
const SLOWER: f64 = 2.0;
/// What a question for rows is taken to cost before there was one.
const UNKNOWN_ROW_CALL_NS: f64 = 1e7;
/// Questions for rows in one poll, at most: more samples than that came together only if the agent itself was held up.
const MOST_ROW_CALLS: usize = 12;
/// What is told as the recent share of time covers this long.
const RECENT_NS: u64 = 30_000_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// In MIG mode, when there is no ring: all that MIG devices are asked.
    Ring,
    Lists,
    Readings,
    /// In MIG mode, when they have no rings: which MIG devices there are.
    Engines,
}

/// Indexed as [`Part`].
const SHARES: [f64; 4] = [0.6, 0.25, 0.09, 0.06];

#[derive(Clone, Copy, Debug)]
struct Account {
    /// Nanoseconds that come in each nanosecond.
    rate: f64,
    average_ns: Option<f64>,
    /// The last three costs, oldest first: one alone may be a hiccup.
    last_ns: [f64; 3],
    credit_ns: f64,
    at_ns: u64,
}

impl Account {
    fn until(&mut self, now_ns: u64) {
        self.credit_ns = (self.credit_ns + now_ns.saturating_sub(self.at_ns) as f64 * self.rate).min(SAVED_NS * self.rate);
        self.at_ns = now_ns;
    }

    fn spend(&mut self, now_ns: u64, cost_ns: f64) {
        self.until(now_ns);
        // A debt beyond what doubles the interval would be paid for by not looking at all.
        self.credit_ns = (self.credit_ns - cost_ns).max(-REPAID_NS * self.rate / 2.0);
        let [_, second, third] = self.last_ns;
        self.last_ns = if self.average_ns.is_none() { [cost_ns; 3] } else { [second, third, cost_ns] };
        let [a, b, c] = self.last_ns;
        let middle = a.max(b).min(a.min(b).max(c));
        self.average_ns = Some(match self.average_ns {
            None => cost_ns,
            Some(average) if middle > SLOWER * average => middle,
            Some(average) => average + WEIGHT * (middle - average),
        });
    }

    fn interval_ns(&self) -> f64 {
        let rate = self.rate + self.credit_ns.min(0.0) / REPAID_NS;
        self.average_ns.unwrap_or_default() / rate
    }
}

/// How well the budget covers the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// Each sample can be looked at.
    Whole,
    /// Some samples go by without a look at who caused them.
    Thin,
    /// Not even one look in half a ring is within the budget; it is taken all the same, or whole rings would be lost.
    Over,
}

#[derive(Debug)]
pub struct Budget {
    accounts: [Account; SHARES.len()],
    row_call_ns: Option<f64>,
    /// (when, time in calls), for the recent share.
    calls: VecDeque<(u64, u64)>,
    began_ns: u64,
}

impl Budget {
    pub fn new(percent: f64, now_ns: u64) -> Self {
        let account = |share: f64| {
            let rate = share * percent / 100.0;
            Account { rate, average_ns: None, last_ns: [0.0; 3], credit_ns: SAVED_NS * rate, at_ns: now_ns }
        };
        Self { accounts: SHARES.map(account), row_call_ns: None, calls: VecDeque::new(), began_ns: now_ns }
    }

    /// `in_calls`: the part of `cost` that was in driver calls.
    pub fn spend(&mut self, part: Part, now_ns: u64, cost: Duration, in_calls: Duration) {
        self.accounts[part as usize].spend(now_ns, cost.as_nanos() as f64);
        let ns = u64::try_from(in_calls.as_nanos()).unwrap_or(u64::MAX);
        // One entry a second: polls are many.
        match self.calls.back_mut() {
            Some((at, sum)) if now_ns.saturating_sub(*at) < 1_000_000_000 => *sum = sum.saturating_add(ns),
            _ => self.calls.push_back((now_ns, ns)),
        }
    }

    pub fn row_call(&mut self, took: Duration) {
        let took = took.as_nanos() as f64;
        self.row_call_ns = Some(self.row_call_ns.map_or(took, |average| average + WEIGHT * (took - average)));
    }

    /// At least `wanted`, at most `half_ring`.
    pub fn ring_interval(&self, wanted: Duration, period: Duration, half_ring: Duration) -> (Duration, Coverage) {
        let affordable = self.interval(Part::Ring, wanted);
        let coverage = match affordable {
            interval if interval > half_ring => Coverage::Over,
            interval if interval > period => Coverage::Thin,
            _ => Coverage::Whole,
        };
        (affordable.min(half_ring.max(wanted)), coverage)
    }

    pub fn interval(&self, part: Part, wanted: Duration) -> Duration {
        wanted.max(Duration::from_nanos(self.accounts[part as usize].interval_ns() as u64))
    }

    /// How many questions for rows the next poll may put. Where polls are rarer than samples it is one, about the newest.
    pub fn row_calls(&mut self, now_ns: u64, coverage: Coverage) -> usize {
        if coverage != Coverage::Whole {
            return 1;
        }
        let account = &mut self.accounts[Part::Ring as usize];
        account.until(now_ns);
        let affordable = account.credit_ns.max(0.0) / self.row_call_ns.unwrap_or(UNKNOWN_ROW_CALL_NS).max(1.0);
        (1 + affordable as usize).min(MOST_ROW_CALLS)
    }

    /// Share of the recent past that was spent in calls.
    pub fn busy_ratio(&mut self, now_ns: u64) -> f64 {
        while self.calls.front().is_some_and(|(at, _)| now_ns.saturating_sub(*at) >= RECENT_NS) {
            self.calls.pop_front();
        }
        let spent: u64 = self.calls.iter().map(|(_, ns)| ns).sum();
        // Shortly after the start a few calls would look like a lot.
        let over = now_ns.saturating_sub(self.began_ns).clamp(1_000_000_000, RECENT_NS);
        (spent as f64 / over as f64).min(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const HALF_PERIOD: Duration = Duration::from_micros(83_500);
    const PERIOD: Duration = Duration::from_millis(167);
    const HALF_RING: Duration = Duration::from_secs(6);

    /// Polls for a while; (share of time spent after the first minute, polls, coverage at the end).
    fn polled(percent: f64, cost: impl Fn(u64) -> u64, seconds: u64) -> (f64, u64, Coverage) {
        let mut budget = Budget::new(percent, 0);
        let (mut now, mut spent, mut polls, mut last) = (0, 0, 0, Coverage::Whole);
        while now < seconds * 1000 * MS {
            let took = cost(polls);
            let begun = now;
            now += took;
            budget.spend(Part::Ring, now, Duration::from_nanos(took), Duration::from_nanos(took));
            let (interval, coverage) = budget.ring_interval(HALF_PERIOD, PERIOD, HALF_RING);
            if begun > 60_000 * MS {
                spent += took;
            }
            last = coverage;
            polls += 1;
            now = now.max(begun + interval.as_nanos() as u64);
        }
        (spent as f64 / ((now - 60_000 * MS) as f64), polls, last)
    }

    #[test]
    fn cheap_calls_are_made_as_often_as_wanted() {
        let (share, polls, coverage) = polled(1.0, |_| 100_000, 120);
        assert_eq!(coverage, Coverage::Whole);
        assert!((1430..=1440).contains(&polls), "{polls}");
        assert!(share < 0.0013, "{share}");
    }

    #[test]
    fn slow_calls_keep_their_share() {
        for ms in [2, 5, 20, 30] {
            let (share, _, coverage) = polled(1.0, |_| ms * MS, 600);
            assert_eq!(coverage, Coverage::Thin, "{ms}");
            assert!((0.004..=0.0062).contains(&share), "{ms} ms: {share}");
        }
        // More budget, more looks.
        assert_eq!(polled(20.0, |_| 5 * MS, 120).2, Coverage::Whole);
    }

    #[test]
    fn calls_that_become_slow_are_found_so_at_once() {
        let mut budget = Budget::new(1.0, 0);
        let ms = |ms: u64| Duration::from_millis(ms);
        let costs = [1, 1, 1, 40, 1, 1, 40, 40];
        let averages = costs.map(|cost| {
            budget.spend(Part::Lists, 0, ms(cost), ms(cost));
            budget.accounts[Part::Lists as usize].average_ns.unwrap_or_default() / 1e6
        });
        assert_eq!(averages, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 40.0]);
    }

    #[test]
    fn a_ring_never_overruns_whatever_calls_take() {
        let (_, polls, coverage) = polled(1.0, |_| 500 * MS, 120);
        assert_eq!(coverage, Coverage::Over);
        assert!((19..=21).contains(&polls), "{polls}");
    }

    #[test]
    fn a_hiccup_blinds_nobody() {
        let (_, polls, coverage) = polled(1.0, |n| if n == 100 { 300 * MS } else { 100_000 }, 60);
        assert_eq!(coverage, Coverage::Whole);
        assert!(polls > 700, "{polls}");
    }

    #[test]
    fn rows_are_asked_for_as_credit_allows() {
        let mut budget = Budget::new(1.0, 0);
        assert_eq!(budget.row_calls(0, Coverage::Whole), 4);
        budget.row_call(Duration::from_micros(50));
        // 30 ms are saved up.
        assert_eq!(budget.row_calls(0, Coverage::Whole), 12);
        assert_eq!(budget.row_calls(0, Coverage::Thin), 1);
        budget.spend(Part::Ring, 0, Duration::from_micros(29_800), Duration::ZERO);
        assert_eq!(budget.row_calls(0, Coverage::Whole), 5);
        budget.spend(Part::Ring, 0, Duration::from_millis(20), Duration::ZERO);
        assert_eq!(budget.row_calls(0, Coverage::Whole), 1);
    }

    #[test]
    fn lists_and_readings_have_their_own_share() {
        let mut budget = Budget::new(1.0, 0);
        for n in 0..100 {
            budget.spend(Part::Lists, n * 4_000 * MS, Duration::from_millis(10), Duration::from_millis(10));
        }
        let every = budget.interval(Part::Lists, Duration::from_secs(2));
        assert!((3.9..4.1).contains(&every.as_secs_f64()), "{every:?}");
        assert_eq!(budget.interval(Part::Readings, Duration::from_secs(1)), Duration::from_secs(1));
    }

    #[test]
    fn the_recent_share_forgets() {
        let mut budget = Budget::new(1.0, 0);
        for s in 0..60 {
            budget.spend(Part::Ring, s * 1000 * MS, Duration::from_millis(10), Duration::from_millis(10));
        }
        assert!((budget.busy_ratio(60_000 * MS) - 0.01).abs() < 0.0005);
        assert_eq!(budget.busy_ratio(120_000 * MS), 0.0);
    }
}
