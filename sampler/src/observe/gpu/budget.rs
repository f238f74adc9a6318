//! Limits how often one GPU is read, so that reading stays within two budgets: processor time, and time spent in driver calls. Pure:
//! time is passed in.
//!
//! Each part of the work (the sample ring, process lists, readings, other engines) has a share of both budgets and an account in each.
//! Credit accrues with time, and the cost of calls is deducted. Intervals follow the averaged cost. A debt stretches them until it is
//! repaid over a minute, so that one slow call does not thin out queries, and calls that stay slow do not exceed the budget.
//!
//! The second budget counts the whole duration of a call, waiting or computing: a waiting call may hold a driver lock.
//!
//! A budget costs precision, never observation: the sample ring is read at least once in half of the time that it covers, and that read
//! shows when the GPU was busy. A budget limits how many samples have their process queried.

use std::collections::VecDeque;
use std::ops::AddAssign;
use std::time::Duration;

/// Unused budget accumulates for this time.
const SAVED_NS: f64 = 5e9;
/// A debt is repaid over this time.
const REPAID_NS: f64 = 60e9;
/// Weight of the newest cost in the moving average.
const WEIGHT: f64 = 0.2;
/// If the median of the last three costs differs from the average by more than this factor, the average is replaced by it at once: calls
/// have become slow or fast.
const SLOWER: f64 = 2.0;
/// Assumed cost of a process query before the first one.
const UNKNOWN_QUERY_NS: f64 = 1e7;
/// Maximum number of process queries per poll: more samples arrive together only if the agent itself was delayed.
const MAX_PROCESS_QUERIES: usize = 12;
/// Sample period of known drivers; doctor does not wait to measure it.
const USUAL_PERIOD_SECONDS: f64 = 0.167;
/// The longest interval, whatever calls cost.
const RAREST: Duration = Duration::from_secs(60);
/// The time covered by the recent shares.
const RECENT_NS: u64 = 30_000_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// In MIG mode, without a ring: all queries of MIG devices.
    SampleRing,
    Lists,
    Readings,
    /// In MIG mode, without engine rings: the list of MIG devices.
    Engines,
}

/// Indexed by [`Part`].
const SHARES: [f64; 4] = [0.6, 0.25, 0.09, 0.06];

#[derive(Clone, Copy, Debug)]
struct Account {
    /// Nanoseconds of credit per nanosecond.
    rate: f64,
    average_ns: Option<f64>,
    /// The last three costs, oldest first: a single one may be an outlier.
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
        // The debt is limited to the amount that doubles the interval: a larger one would stop reading altogether.
        self.credit_ns = (self.credit_ns - cost_ns).max(-REPAID_NS * self.rate / 2.0);
        let [_, second, third] = self.last_ns;
        self.last_ns = if self.average_ns.is_none() { [cost_ns; 3] } else { [second, third, cost_ns] };
        let [a, b, c] = self.last_ns;
        let median = a.max(b).min(a.min(b).max(c));
        self.average_ns = Some(match self.average_ns {
            None => cost_ns,
            Some(average) if median > SLOWER * average || SLOWER * median < average => median,
            Some(average) => average + WEIGHT * (median - average),
        });
    }

    fn interval_ns(&self) -> f64 {
        let rate = self.rate + self.credit_ns.min(0.0) / REPAID_NS;
        self.average_ns.unwrap_or_default() / rate
    }
}

/// Limits for reading one GPU, in percent of time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Percent of one processor.
    pub cpu_percent: f64,
    /// Percent of time spent in driver calls.
    pub wait_percent: f64,
}

/// The cost of some work.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Processor time.
    pub cpu: Duration,
    /// Time in driver calls.
    pub wait: Duration,
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.cpu += other.cpu;
        self.wait += other.wait;
    }
}

impl Cost {
    /// Nanoseconds, by budget.
    fn ns(self) -> [f64; 2] {
        [self.cpu.as_nanos() as f64, self.wait.as_nanos() as f64]
    }
}

/// How many samples have their process queried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// All.
    Whole,
    /// A random part of them.
    Part,
    /// A random part, and one read in half a ring exceeds the budgets; it is made anyway, because samples would be lost otherwise.
    Over,
}

/// The effect of these limits if a poll has this cost: the ratio of samples of which the process can be queried, and the standard error
/// of a share of one half over 10 s.
pub fn expected(limits: Limits, poll: Cost) -> (f64, f64) {
    let [cpu, wait] = poll.ns();
    let allowed = |percent: f64, ns: f64| SHARES[Part::SampleRing as usize] * percent / 100.0 * 1e9 / ns.max(1.0);
    let polls_a_second = allowed(limits.cpu_percent, cpu).min(allowed(limits.wait_percent, wait));
    let queried_ratio = (polls_a_second * USUAL_PERIOD_SECONDS).min(1.0);
    (queried_ratio, 0.5 / (10.0 / USUAL_PERIOD_SECONDS * queried_ratio).sqrt())
}

#[derive(Debug)]
pub struct Budget {
    /// By part, then by budget.
    accounts: [[Account; 2]; SHARES.len()],
    /// Average cost of one process query, by budget.
    process_query_ns: Option<[f64; 2]>,
    /// (time, cost by budget), for the recent shares.
    spent: VecDeque<(u64, [f64; 2])>,
    began_ns: u64,
}

impl Budget {
    pub fn new(limits: Limits, now_ns: u64) -> Self {
        let account = |share: f64, percent: f64| {
            let rate = share * percent / 100.0;
            Account { rate, average_ns: None, last_ns: [0.0; 3], credit_ns: SAVED_NS * rate, at_ns: now_ns }
        };
        let both = |share| [account(share, limits.cpu_percent), account(share, limits.wait_percent)];
        Self { accounts: SHARES.map(both), process_query_ns: None, spent: VecDeque::new(), began_ns: now_ns }
    }

    pub fn spend(&mut self, part: Part, now_ns: u64, cost: Cost) {
        let cost = cost.ns();
        for (account, cost) in self.accounts[part as usize].iter_mut().zip(cost) {
            account.spend(now_ns, cost);
        }
        // One entry per second, because polls are frequent.
        match self.spent.back_mut() {
            Some((at, sum)) if now_ns.saturating_sub(*at) < 1_000_000_000 => *sum = [sum[0] + cost[0], sum[1] + cost[1]],
            _ => self.spent.push_back((now_ns, cost)),
        }
    }

    /// Records the cost of a process query.
    pub fn process_query(&mut self, cost: Cost) {
        let cost = cost.ns();
        let averaged = |average: [f64; 2]| [0, 1].map(|n| average[n] + WEIGHT * (cost[n] - average[n]));
        self.process_query_ns = Some(self.process_query_ns.map_or(cost, averaged));
    }

    /// The interval of the sample ring: at least `wanted`, at most `half_ring`.
    pub fn ring_interval(&self, wanted: Duration, period: Duration, half_ring: Duration) -> (Duration, Coverage) {
        let affordable = self.interval(Part::SampleRing, wanted);
        let coverage = match affordable {
            interval if interval > half_ring => Coverage::Over,
            interval if interval > period => Coverage::Part,
            _ => Coverage::Whole,
        };
        (self.interval_of_ring(Part::SampleRing, wanted, half_ring), coverage)
    }

    /// At least `wanted` and at most a minute, because the results show which processes use the GPU.
    pub fn interval(&self, part: Part, wanted: Duration) -> Duration {
        let [cpu, wait] = self.accounts[part as usize].map(|account| account.interval_ns());
        wanted.max(Duration::from_nanos(cpu.max(wait) as u64).min(RAREST))
    }

    /// As [`Budget::interval`], for a ring that must be read at least once in `half_ring`.
    pub fn interval_of_ring(&self, part: Part, wanted: Duration, half_ring: Duration) -> Duration {
        self.interval(part, wanted).min(half_ring.max(wanted))
    }

    /// The configuration key that limits this part.
    pub fn binding(&self, part: Part) -> &'static str {
        let [cpu, wait] = self.accounts[part as usize].map(|account| account.interval_ns());
        if cpu > wait { "gpu_budget_percent" } else { "gpu_wait_percent" }
    }

    /// Maximum number of process queries of the next poll. If polls are rarer than samples it is one, for the newest sample, which is a
    /// random one of them; earlier samples could be distinguished only where they happen to differ.
    pub fn process_queries(&mut self, now_ns: u64, coverage: Coverage) -> usize {
        if coverage != Coverage::Whole {
            return 1;
        }
        let cost = self.process_query_ns.unwrap_or([0.0, UNKNOWN_QUERY_NS]);
        let affordable = |(account, cost): (&mut Account, f64)| {
            account.until(now_ns);
            account.credit_ns.max(0.0) / cost.max(1.0)
        };
        let least = self.accounts[Part::SampleRing as usize].iter_mut().zip(cost).map(affordable).fold(f64::INFINITY, f64::min);
        (1 + least as usize).min(MAX_PROCESS_QUERIES)
    }

    /// Recent shares of time: processor time, and time in driver calls.
    pub fn recent_ratios(&mut self, now_ns: u64) -> [f64; 2] {
        while self.spent.front().is_some_and(|(at, _)| now_ns.saturating_sub(*at) >= RECENT_NS) {
            self.spent.pop_front();
        }
        // At least a second, because a few calls shortly after the start would look like a large share.
        let over = now_ns.saturating_sub(self.began_ns).clamp(1_000_000_000, RECENT_NS) as f64;
        [0, 1].map(|n| (self.spent.iter().map(|(_, cost)| cost[n]).sum::<f64>() / over).min(1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const HALF_PERIOD: Duration = Duration::from_micros(83_500);
    const PERIOD: Duration = Duration::from_millis(167);
    const HALF_RING: Duration = Duration::from_secs(6);

    fn budget(percent: f64) -> Budget {
        Budget::new(Limits { cpu_percent: 1.0, wait_percent: percent }, 0)
    }

    /// A cost of waiting only.
    fn waited(ns: u64) -> Cost {
        Cost { cpu: Duration::ZERO, wait: Duration::from_nanos(ns) }
    }

    /// Polls for `seconds`; (share of time spent after the first minute, polls, coverage at the end).
    fn polled(percent: f64, cost: impl Fn(u64) -> u64, seconds: u64) -> (f64, u64, Coverage) {
        let mut budget = budget(percent);
        let (mut now, mut spent, mut polls, mut last) = (0, 0, 0, Coverage::Whole);
        while now < seconds * 1000 * MS {
            let took = cost(polls);
            let begun = now;
            now += took;
            budget.spend(Part::SampleRing, now, waited(took));
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
            assert_eq!(coverage, Coverage::Part, "{ms}");
            assert!((0.004..=0.0062).contains(&share), "{ms} ms: {share}");
        }
        // A larger budget allows more polls.
        assert_eq!(polled(20.0, |_| 5 * MS, 120).2, Coverage::Whole);
    }

    #[test]
    fn a_lasting_change_of_cost_replaces_the_average_at_once() {
        let mut budget = budget(1.0);
        let costs = [1, 1, 1, 40, 1, 1, 40, 40];
        let averages = costs.map(|cost| {
            budget.spend(Part::Lists, 0, waited(cost * MS));
            budget.accounts[Part::Lists as usize][1].average_ns.unwrap_or_default() / 1e6
        });
        assert_eq!(averages, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 40.0]);
    }

    #[test]
    fn a_ring_never_overruns_whatever_calls_cost() {
        let (_, polls, coverage) = polled(1.0, |_| 500 * MS, 120);
        assert_eq!(coverage, Coverage::Over);
        assert!((19..=21).contains(&polls), "{polls}");
    }

    #[test]
    fn one_slow_call_does_not_reduce_coverage() {
        let (_, polls, coverage) = polled(1.0, |n| if n == 100 { 300 * MS } else { 100_000 }, 60);
        assert_eq!(coverage, Coverage::Whole);
        assert!(polls > 700, "{polls}");
    }

    #[test]
    fn process_queries_are_limited_by_credit() {
        let mut budget = budget(1.0);
        assert_eq!(budget.process_queries(0, Coverage::Whole), 4);
        budget.process_query(waited(50_000));
        // 30 ms of credit have accumulated.
        assert_eq!(budget.process_queries(0, Coverage::Whole), 12);
        assert_eq!(budget.process_queries(0, Coverage::Part), 1);
        budget.spend(Part::SampleRing, 0, waited(29_800_000));
        assert_eq!(budget.process_queries(0, Coverage::Whole), 5);
        budget.spend(Part::SampleRing, 0, waited(20 * MS));
        assert_eq!(budget.process_queries(0, Coverage::Whole), 1);
    }

    #[test]
    fn lists_and_readings_have_separate_shares() {
        let mut budget = budget(1.0);
        for n in 0..100 {
            budget.spend(Part::Lists, n * 4_000 * MS, waited(10 * MS));
        }
        let every = budget.interval(Part::Lists, Duration::from_secs(2));
        assert!((3.9..4.1).contains(&every.as_secs_f64()), "{every:?}");
        assert_eq!(budget.interval(Part::Readings, Duration::from_secs(1)), Duration::from_secs(1));
    }

    #[test]
    fn the_tighter_of_the_two_budgets_applies() {
        let mut budget = Budget::new(Limits { cpu_percent: 1.0, wait_percent: 10.0 }, 0);
        for n in 0..100 {
            let cost = Cost { cpu: Duration::from_millis(10), wait: Duration::from_millis(20) };
            budget.spend(Part::Lists, n * 4_000 * MS, cost);
        }
        // 10 ms of a quarter of 1 %; the budget for waiting alone would allow an interval of 0.8 s.
        let every = budget.interval(Part::Lists, Duration::from_millis(100));
        assert!((3.9..4.1).contains(&every.as_secs_f64()), "{every:?}");
    }

    #[test]
    fn slower_polls_are_expected_to_query_fewer_processes() {
        let limits = Limits { cpu_percent: 1.0, wait_percent: 2.0 };
        let (whole, stderr) = expected(limits, waited(200_000));
        assert!(whole == 1.0 && (stderr - 0.0646).abs() < 1e-4, "{whole} {stderr}");
        let (part, stderr) = expected(limits, waited(20 * MS));
        assert!((part - 0.1).abs() < 0.001 && (stderr - 0.204).abs() < 0.001, "{part} {stderr}");
    }

    #[test]
    fn the_recent_share_drops_old_costs() {
        let mut budget = budget(1.0);
        for s in 0..60 {
            budget.spend(Part::SampleRing, s * 1000 * MS, waited(10 * MS));
        }
        assert!((budget.recent_ratios(60_000 * MS)[1] - 0.01).abs() < 0.0005);
        assert_eq!(budget.recent_ratios(120_000 * MS), [0.0; 2]);
    }
}
