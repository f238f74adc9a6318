//! Waiting of containers beyond what they get: their pressure.
//!
//! ```text
//!  readings of probes -> windows of 1 s: waited, probed ----+
//!  closed windows of GPUs: own time, was another active? ---+-> settled -> excess = waited - own GPU time
//!                                                                  alone:  baseline        (the last minutes)
//!                                                                  all:    recent          (the last ten seconds)
//! ```
//! A process that blocks until its own kernel is done waits for about its own GPU time, alone or not. What it waits beyond that while it
//! is alone (launches, copies, other waiting) is its baseline; what it waits beyond both is pressure. A window counts once all GPUs of the
//! container have closed it. Pressure is not negative, since a container can be quicker than its baseline by chance only. What of it falls
//! into windows in which a GPU of the container was saturated is divided over the other users there, by the GPU time they got.
//!
//! A window has five or six samples of a GPU, so a user with a tenth of it has none in every second window. A window is alone if no other
//! user had a sample within five windows of it, which happens next to such a user once in a thousand windows.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use foldhash::HashMap;

use super::coactivity::{COACTIVITY_WINDOW_NS, Window, is_user, other};
use crate::fact::{User, WaitFact};
use crate::snapshot::{ContainerWaits, Other};
use crate::units::{BootNs, ContainerKey};

/// GPUs close a window up to 13 s after its end.
const SETTLE_NS: u64 = 15_000_000_000;
/// Settled windows behind the pressure.
const RECENT: usize = 10;
/// Settled windows alone behind the baseline, and how many there must be.
const ALONE: usize = 300;
const LEAST_ALONE: usize = 5;
/// A window alone has this many on each side without another user.
const NEAR: u64 = 5;
/// A GPU without a closed window for so many windows is gone: the container's windows do not wait for it.
const GONE: u64 = 60;
/// A window counts if its processes were probed for at least this part of it.
const PROBED: f64 = 0.5;
/// Without a reading for this time a container is not probed any more.
const STALE_NS: u64 = 5_000_000_000;
/// Maximum number of containers, of windows of one, and of users of a GPU that are distinguished in one of these.
const MAX_ACCOUNTS: usize = 4096;
const MAX_OPEN: usize = 64;
const MAX_SHARES: usize = 16;

#[derive(Clone, Debug, Default)]
struct WaitWindow {
    waited_ns: f64,
    probed_ns: f64,
    own_ns: f64,
    shared: bool,
    /// The container's GPUs that were observed in it, with their users.
    observed: BTreeSet<usize>,
    /// GPU time of other users, where a GPU of the container was saturated.
    others: Vec<PressureShare>,
}

/// A user on a GPU, with nanoseconds, or with its part of a pressure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PressureShare {
    pub gpu: usize,
    pub other: Other,
    pub amount: f64,
}

fn add_share(shares: &mut Vec<PressureShare>, share: PressureShare) {
    let at = |other| shares.iter().position(|known| known.gpu == share.gpu && known.other == other);
    let of_gpu = || shares.iter().filter(|known| known.gpu == share.gpu).count();
    let other = if at(share.other).is_none() && of_gpu() >= MAX_SHARES { Other::Rest } else { share.other };
    match at(other) {
        Some(known) => shares[known].amount += share.amount,
        None => shares.push(PressureShare { other, ..share }),
    }
}

impl WaitWindow {
    fn excess_ns(&self) -> f64 {
        self.waited_ns - self.own_ns
    }
}

#[derive(Debug, Default)]
struct WaitAccount {
    waited_ns: u64,
    probed_ns: u64,
    last: BootNs,
    open: BTreeMap<u64, WaitWindow>,
    /// GPUs on which it was ever active, with the last window that each has closed.
    gpus: BTreeMap<usize, u64>,
    last_shared: Option<u64>,
    /// Windows that are alone unless another user follows soon.
    undecided: VecDeque<(u64, WaitWindow)>,
    alone: VecDeque<WaitWindow>,
    recent: VecDeque<WaitWindow>,
}

impl WaitAccount {
    /// Whether all of its GPUs were observed in a window.
    fn is_observed(&self, number: u64, window: &WaitWindow) -> bool {
        let mut present = self.gpus.iter().filter(|(_, last)| last.saturating_add(GONE) >= number).peekable();
        // Without a GPU that is known to be the container's, nothing is known of its own time and of others.
        present.peek().is_some() && present.all(|(gpu, _)| window.observed.contains(gpu))
    }

    fn settle(&mut self, number: u64, window: WaitWindow) {
        if window.shared {
            self.last_shared = Some(number);
            self.undecided.retain(|(of, _)| of.saturating_add(NEAR) < number);
        }
        while let Some((_, alone)) = self.undecided.pop_front_if(|(of, _)| of.saturating_add(NEAR) <= number) {
            push(&mut self.alone, alone, ALONE);
        }
        if window.probed_ns < PROBED * COACTIVITY_WINDOW_NS as f64 || !self.is_observed(number, &window) {
            return;
        }
        if self.last_shared.is_none_or(|last| last.saturating_add(NEAR) < number) {
            self.undecided.push_back((number, WaitWindow { others: Vec::new(), ..window.clone() }));
        }
        push(&mut self.recent, window, RECENT);
    }
}

#[derive(Debug, Default)]
pub struct Waits {
    accounts: HashMap<ContainerKey, WaitAccount>,
}

/// The windows that a span covers, each with the covered part of the span.
pub fn window_parts(from: BootNs, to: BootNs) -> impl Iterator<Item = (u64, f64)> {
    let length = to.saturating_since(from).max(1) as f64;
    let (first, last) = (from.0 / COACTIVITY_WINDOW_NS, to.0.saturating_sub(1) / COACTIVITY_WINDOW_NS);
    // A reading covers a second or two; one after a long pause is not spread over more windows than are kept.
    let last = last.min(first + MAX_OPEN as u64);
    (first..=last).map(move |number| {
        let begin = from.0.max(number * COACTIVITY_WINDOW_NS);
        // A file has any times.
        let end = to.0.min((number + 1).saturating_mul(COACTIVITY_WINDOW_NS));
        (number, end.saturating_sub(begin) as f64 / length)
    })
}

fn push(to: &mut VecDeque<WaitWindow>, window: WaitWindow, at_most: usize) {
    if to.len() >= at_most {
        to.pop_front();
    }
    to.push_back(window);
}

/// Variance of this mean excess of windows, by how much they differ; `None` with fewer than two.
fn excess_variance(windows: &VecDeque<WaitWindow>, mean: f64) -> Option<f64> {
    let n = windows.len() as f64;
    let distance = |window: &WaitWindow| window.excess_ns() / f64::max(window.probed_ns, 1.0) - mean;
    let squares: f64 = windows.iter().map(|window| distance(window).powi(2)).sum();
    (windows.len() >= 2).then(|| squares / (n - 1.0) / n)
}

/// Excess by probed time.
fn excess_ratio(windows: &VecDeque<WaitWindow>) -> f64 {
    let (excess, probed) =
        windows.iter().fold((0.0, 0.0), |(excess, probed), window| (excess + window.excess_ns(), probed + window.probed_ns));
    excess / f64::max(probed, 1.0)
}

impl Waits {
    pub fn apply(&mut self, wait: &WaitFact) {
        let User::Container(key) = wait.user else { return };
        if self.accounts.len() >= MAX_ACCOUNTS && !self.accounts.contains_key(&key) {
            return;
        }
        let account = self.accounts.entry(key).or_default();
        let probed_ns = wait.to.saturating_since(wait.from);
        if wait.from.saturating_since(account.last) > STALE_NS {
            // Probes are back after a pause. The baseline of the container stays.
            account.open.clear();
            account.undecided.clear();
            account.recent.clear();
        }
        account.waited_ns = account.waited_ns.saturating_add(wait.some_ns.min(probed_ns));
        account.probed_ns = account.probed_ns.saturating_add(probed_ns);
        account.last = account.last.max(wait.to);
        for (number, part) in window_parts(wait.from, wait.to) {
            let window = account.open.entry(number).or_default();
            window.waited_ns += wait.some_ns.min(probed_ns) as f64 * part;
            window.probed_ns += probed_ns as f64 * part;
        }
        while account.open.len() > MAX_OPEN {
            account.open.pop_first();
        }
    }

    /// Whether windows of GPUs are needed.
    pub fn is_needed(&self, now: BootNs) -> bool {
        self.accounts.values().any(|account| now.saturating_since(account.last) < SETTLE_NS + STALE_NS)
    }

    /// A window of a GPU was closed, in which it was saturated or not.
    pub fn closed(&mut self, gpu: usize, number: u64, window: &Window, is_saturated: bool) {
        for (key, account) in &mut self.accounts {
            let user = User::Container(*key);
            let own = window.users.get(&user).copied().unwrap_or_default();
            if own.samples > 0 {
                account.gpus.entry(gpu).or_default();
            }
            let used = account.gpus.get_mut(&gpu);
            let is_used = used.map(|last| *last = number.max(*last)).is_some();
            let Some(open) = account.open.get_mut(&number) else { continue };
            open.own_ns += own.ns;
            if !is_used {
                continue;
            }
            let others = || window.users.iter().filter(|(other, _)| **other != user && is_user(**other));
            if window.observed_ns >= COACTIVITY_WINDOW_NS / 2 && window.shows_users() {
                open.observed.insert(gpu);
            }
            // A container that waits for a whole window has no sample in it.
            open.shared |= others().any(|(_, part)| part.samples > 0);
            if is_saturated {
                for (with, part) in others().filter(|(_, part)| part.ns > 0.0) {
                    add_share(&mut open.others, PressureShare { gpu, other: other(*with), amount: part.ns });
                }
            }
        }
    }

    /// Counts the windows that all GPUs have closed.
    pub fn settle(&mut self, now: BootNs) {
        for account in self.accounts.values_mut() {
            while let Some(first) = account.open.first_entry() {
                let number = *first.key();
                let ends = number.saturating_add(1).saturating_mul(COACTIVITY_WINDOW_NS);
                if now.0 < ends.saturating_add(SETTLE_NS) {
                    break;
                }
                let window = first.remove();
                account.settle(number, window);
            }
        }
    }

    pub fn of(&self, key: ContainerKey, now: BootNs) -> Option<ContainerWaits> {
        let account = self.accounts.get(&key)?;
        let is_probed = now.saturating_since(account.last) < STALE_NS;
        let is_comparable = is_probed && !account.recent.is_empty() && account.alone.len() >= LEAST_ALONE;
        let means = is_comparable.then(|| (excess_ratio(&account.recent), excess_ratio(&account.alone)));
        let variance =
            |(recent, alone)| Some(excess_variance(&account.recent, recent)? + excess_variance(&account.alone, alone)?);
        Some(ContainerWaits {
            wait_seconds: account.waited_ns as f64 * 1e-9,
            probed_seconds: account.probed_ns as f64 * 1e-9,
            pressure_ratio: means.map(|(recent, alone)| (recent - alone).clamp(0.0, 1.0)),
            pressure_stderr: means.and_then(variance).map(f64::sqrt),
        })
    }

    /// How the pressure of the container divides over other users: the excess of recent windows in which a GPU of it was saturated, by the
    /// GPU time that they got there. `pressure`: that of the container.
    pub fn pressure_shares(&self, key: ContainerKey, pressure: f64) -> Vec<PressureShare> {
        let Some(account) = self.accounts.get(&key) else { return Vec::new() };
        let (alone, mut shares, mut excess_ns, mut probed_ns) = (excess_ratio(&account.alone), Vec::new(), 0.0, 0.0);
        for window in &account.recent {
            probed_ns += window.probed_ns;
            if !window.others.is_empty() {
                excess_ns += window.excess_ns() - alone * window.probed_ns;
                window.others.iter().for_each(|share| add_share(&mut shares, *share));
            }
        }
        let booked = (excess_ns / f64::max(probed_ns, 1.0)).max(0.0).min(pressure);
        let all_ns: f64 = shares.iter().map(|share| share.amount).sum();
        shares.iter_mut().for_each(|share| share.amount *= booked / f64::max(all_ns, 1.0));
        shares
    }

    pub fn forget(&mut self, key: ContainerKey) {
        self.accounts.remove(&key);
    }
}

#[cfg(test)]
mod tests {
    use super::super::coactivity::Part;
    use super::*;
    use crate::fact::HostProcess;

    const KEY: ContainerKey = ContainerKey(1);
    const OTHER: User = User::Container(ContainerKey(2));
    const S: u64 = COACTIVITY_WINDOW_NS;

    fn reading(from: u64, to: u64, some_ns: u64) -> WaitFact {
        WaitFact {
            process: HostProcess { pid: 1, start: BootNs(1) },
            user: User::Container(KEY),
            from: BootNs(from),
            to: BootNs(to),
            some_ns,
            total_ns: some_ns,
            calls: 1,
            durations: Vec::new(),
        }
    }

    fn window(users: &[(User, f64)]) -> Window {
        let part = |ns: &f64| Part { ns: ns * S as f64, samples: 1 };
        Window { observed_ns: S, users: users.iter().map(|(user, ns)| (*user, part(ns))).collect(), ..Window::default() }
    }

    /// 20 s alone with `baseline` of waiting beyond its own 0.3, then 20 s with another user and `waited` of waiting.
    fn pressure(baseline: f64, waited: f64) -> Option<f64> {
        let mut waits = Waits::default();
        for n in 0..40 {
            let shared = n >= 20;
            let some = if shared { waited } else { 0.3 + baseline };
            waits.apply(&reading(n * S, (n + 1) * S, (some * S as f64) as u64));
            let own = (User::Container(KEY), 0.3);
            waits.closed(
                0,
                n,
                &window(if shared { &[(User::Container(KEY), 0.3), (OTHER, 0.6)] } else { std::slice::from_ref(&own) }),
                shared,
            );
        }
        let now = BootNs(40 * S + SETTLE_NS);
        waits.settle(now);
        // The probe is still attached.
        waits.apply(&reading(40 * S, now.0, 0));
        waits.of(KEY, now)?.pressure_ratio
    }

    #[test]
    fn pressure_is_what_is_waited_beyond_the_own_time_and_the_baseline() {
        for (baseline, waited, expect) in [(0.0, 0.3, 0.0), (0.0, 0.8, 0.5), (0.2, 0.8, 0.3), (0.2, 0.1, 0.0)] {
            let found = pressure(baseline, waited).unwrap();
            assert!((found - expect).abs() < 1e-6, "{baseline} {waited}: {found}, not {expect}");
        }
    }

    #[test]
    fn pressure_is_divided_over_others_by_what_they_got_of_saturated_gpus() {
        let third = User::Container(ContainerKey(3));
        // Alone it waits for its own time; with the others 0.5 more, in windows of which some are saturated.
        let shares = |is_saturated: fn(u64) -> bool| {
            let mut waits = Waits::default();
            for n in 0..40 {
                let shared = n >= 20;
                waits.apply(&reading(n * S, (n + 1) * S, if shared { S * 8 / 10 } else { S * 3 / 10 }));
                let users = [(User::Container(KEY), 0.3), (OTHER, 0.3), (third, 0.1)];
                waits.closed(0, n, &window(if shared { &users } else { &users[..1] }), shared && is_saturated(n));
                waits.closed(1, n, &window(&[(OTHER, 1.0)]), true);
            }
            let now = BootNs(40 * S + SETTLE_NS);
            waits.settle(now);
            waits.apply(&reading(40 * S, now.0, 0));
            let shares = waits.pressure_shares(KEY, waits.of(KEY, now).unwrap().pressure_ratio.unwrap());
            shares.iter().map(|share| (share.gpu, share.other, (share.amount * 1000.0).round())).collect::<Vec<_>>()
        };
        let [second, third] = [2, 3].map(|key| Other::Container(ContainerKey(key)));
        assert_eq!(shares(|_| true), [(0, second, 375.0), (0, third, 125.0)]);
        assert_eq!(shares(|n| n % 5 == 0), [(0, second, 75.0), (0, third, 25.0)], "a fifth of the windows");
        assert_eq!(shares(|_| false), []);
        let mut many = Vec::new();
        for n in 0..40 {
            add_share(&mut many, PressureShare { gpu: 0, other: Other::Container(ContainerKey(n)), amount: 1.0 });
        }
        assert_eq!(many.last(), Some(&PressureShare { gpu: 0, other: Other::Rest, amount: 24.0 }));
    }

    #[test]
    fn without_time_alone_there_is_no_pressure_and_sums_are_kept() {
        let mut waits = Waits::default();
        for n in 0..40 {
            waits.apply(&reading(n * S + S / 2, (n + 1) * S + S / 2, S / 2));
            waits.closed(0, n, &window(&[(User::Container(KEY), 0.3), (OTHER, 0.6)]), true);
        }
        waits.settle(BootNs(60 * S));
        let found = waits.of(KEY, BootNs(41 * S)).unwrap();
        assert_eq!((found.wait_seconds, found.probed_seconds, found.pressure_ratio), (20.0, 40.0, None));
        waits.forget(KEY);
        assert_eq!(waits.of(KEY, BootNs(41 * S)), None);
    }

    #[test]
    fn the_error_of_pressure_is_how_far_windows_are_apart() {
        let variance = |excess: &[f64]| {
            let window = |excess: &f64| WaitWindow { waited_ns: excess * S as f64, probed_ns: S as f64, ..WaitWindow::default() };
            let windows = excess.iter().map(window).collect();
            excess_variance(&windows, excess_ratio(&windows))
        };
        assert_eq!(variance(&[0.5]), None);
        assert_eq!(variance(&[0.5, 0.5, 0.5]), Some(0.0));
        // The variance of 0.2, 0.4 and 0.6 is 0.04, that of their mean a third of it.
        let found = variance(&[0.2, 0.4, 0.6]).unwrap();
        assert!((found - 0.04 / 3.0).abs() < 1e-9, "{found}");
    }

    #[test]
    fn next_to_a_user_with_few_samples_no_window_is_alone() {
        let mut waits = Waits::default();
        for n in 0..100 {
            waits.apply(&reading(n * S, (n + 1) * S, S / 2));
            // Named in every fourth window.
            let users = [(User::Container(KEY), 0.3), (OTHER, 0.1)];
            waits.closed(0, n, &window(if n % 4 == 0 { &users } else { &users[..1] }), true);
        }
        waits.settle(BootNs(120 * S));
        let account = &waits.accounts[&KEY];
        assert_eq!((account.alone.len(), account.undecided.len(), account.recent.len()), (0, 0, RECENT));
    }

    #[test]
    fn a_window_counts_when_all_present_gpus_have_closed_it() {
        let own = [(User::Container(KEY), 0.5)];
        let mut waits = Waits::default();
        for n in 0..200 {
            waits.apply(&reading(n * S, (n + 1) * S, S));
            waits.closed(0, n, &window(&own), false);
            // Hangs for 10 s, and is gone after 100.
            if n < 100 && !(40..50).contains(&n) {
                waits.closed(1, n, &window(&own), false);
            }
            waits.settle(BootNs((n + 1) * S));
        }
        waits.settle(BootNs(220 * S));
        let account = &waits.accounts[&KEY];
        // Those before it is taken as gone are missing, and those in which it hung.
        let counted: Vec<f64> = account.alone.iter().map(|window| window.own_ns / S as f64).collect();
        assert_eq!(counted.iter().filter(|own| **own == 1.0).count(), 90);
        assert_eq!(counted.iter().filter(|own| **own == 0.5).count() as u64, 200 - (99 + GONE + 1) - NEAR);
    }

    #[test]
    fn probes_that_return_start_with_new_windows() {
        let mut waits = Waits::default();
        for n in 0..40 {
            waits.apply(&reading(n * S, (n + 1) * S, if n < 20 { S * 3 / 10 } else { S }));
            let users = [(User::Container(KEY), 0.3), (OTHER, 0.7)];
            waits.closed(0, n, &window(if n < 20 { &users[..1] } else { &users }), true);
        }
        let later = BootNs(4_000 * S);
        waits.settle(later);
        waits.apply(&reading(later.0 - S, later.0, S * 3 / 10));
        assert_eq!(waits.of(KEY, later).unwrap().pressure_ratio, None, "not that of an hour before");
    }

    #[test]
    fn a_container_that_gets_nothing_is_not_alone() {
        let mut waits = Waits::default();
        for n in 0..40 {
            waits.apply(&reading(n * S, (n + 1) * S, S));
            // Active once; later it waits for whole windows.
            let own = [(User::Container(KEY), 0.1), (OTHER, 0.9)];
            waits.closed(0, n, &window(if n == 0 { &own } else { &own[1..] }), true);
        }
        waits.settle(BootNs(60 * S));
        assert!(waits.accounts[&KEY].alone.is_empty());
    }

    #[test]
    fn a_span_is_divided_over_the_windows_that_it_covers() {
        let all: Vec<(u64, f64)> = window_parts(BootNs(S / 2), BootNs(2 * S + S / 2)).collect();
        assert_eq!(all, [(0, 0.25), (1, 0.5), (2, 0.25)]);
        assert_eq!(window_parts(BootNs(S), BootNs(2 * S)).collect::<Vec<_>>(), [(1, 1.0)]);
        assert_eq!(window_parts(BootNs(0), BootNs(u64::MAX)).count(), MAX_OPEN + 1);
        assert_eq!(window_parts(BootNs(u64::MAX - 9), BootNs(u64::MAX)).map(|(_, part)| part).sum::<f64>(), 1.0);
    }
}
