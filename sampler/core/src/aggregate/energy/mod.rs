//! Energy of a device by user: each increase of the driver's energy counter, divided by the time that was credited meanwhile.
//!
//! ```text
//!  reading ---interval---> reading ---interval---> reading     the counter's increase, and the device's time between the readings:
//!                                                              busy by user, idle, unobserved; added as it is booked, seconds later
//!  all time of an interval is decided -> divided:  idle part       what an idle device draws, for the whole interval
//!                                                  `lost`          the rest, for the part that was not observed
//!                                                  users           the rest, in proportion to their busy time
//! ```
//! The idle part is the idle power times the interval, at most its energy. The idle power is learned from intervals without work. Before
//! the first of them it is not known; then all time of an interval costs the same, and the idle part is that of the idle time: nothing for
//! a device that is always busy. An interval without busy time has no users: what is not lost is idle.
//!
//! Guarantees: the parts sum to the increase of the counter since its first reading, over all settled intervals; no part decreases. The
//! energy of a container that is forgotten is forgotten with it.
//!
//! Not done: intervals are not divided further, so a change of power within one is not followed. Energy in which the device was absent is
//! not counted, as its time is in no state. GPUs in MIG mode have one counter for all of their MIG devices; it is not divided.

use std::collections::{BTreeMap, VecDeque};

use foldhash::HashMap;

use super::engine_account::Booked;
use super::settings::Range;
use crate::device::Reason;
use crate::fact::User;
use crate::snapshot::UnattributedEnergy;
use crate::units::{BootNs, ContainerKey};

/// A counter that rises faster is wrong: no GPU draws a fifth of it.
const MAX_WATTS: f64 = 10_000.0;
/// Maximum number of intervals that wait for their time. They last a second or longer, and their time is decided within 26 s: 15 s until
/// time without an answer is unobserved, 11 s until busy time is divided. Beyond it the oldest is divided by what is known.
const MAX_PENDING: usize = 64;
/// An interval is idle if the device was, for at least this part of it: few devices are without any work for hours.
const IDLE_RATIO: f64 = 0.95;
/// Idle time behind one value of the idle power. Counters step every 100 ms (measured on an H200): it is accurate to 2 %.
const IDLE_POWER_NS: u64 = 5_000_000_000;
/// The idle power is the lowest value of the last twelve parts of this length in which the device was idle at all: an hour.
const IDLE_PART_NS: u64 = 300_000_000_000;
const IDLE_PARTS: u64 = 12;

/// The time between two readings of the counter.
#[derive(Debug)]
struct EnergyInterval {
    from: BootNs,
    /// The maximum for the one that lasts.
    to: BootNs,
    joules: f64,
    was_reset: bool,
    idle_ns: f64,
    unobserved_ns: f64,
    /// In an order, because sums of floating-point numbers depend on it.
    busy_ns: BTreeMap<User, f64>,
}

impl EnergyInterval {
    fn after(reading: BootNs) -> Self {
        Self {
            from: reading,
            to: BootNs(u64::MAX),
            joules: 0.0,
            was_reset: false,
            idle_ns: 0.0,
            unobserved_ns: 0.0,
            busy_ns: BTreeMap::new(),
        }
    }
}

/// The interval that lasts, with the value of the counter at its begin.
#[derive(Debug)]
struct OpenInterval {
    counter_joules: f64,
    interval: EnergyInterval,
}

/// What the device draws when it is idle.
#[derive(Debug, Default)]
struct IdlePower {
    /// Idle intervals that are too short for a value.
    joules: f64,
    ns: u64,
    /// (number of the part of time, lowest watts).
    parts: VecDeque<(u64, f64)>,
}

impl IdlePower {
    fn add(&mut self, at: BootNs, ns: u64, joules: f64) {
        self.joules += joules;
        self.ns = self.ns.saturating_add(ns);
        if self.ns < IDLE_POWER_NS {
            return;
        }
        let watts = self.joules / seconds(self.ns);
        (self.joules, self.ns) = (0.0, 0);
        // A counter that stands still has not shown the power.
        if watts <= 0.0 {
            return;
        }
        let part = at.0 / IDLE_PART_NS;
        match self.parts.back_mut() {
            Some((last, lowest)) if *last == part => *lowest = lowest.min(watts),
            _ => self.parts.push_back((part, watts)),
        }
        while self.parts.pop_front_if(|(first, _)| *first + IDLE_PARTS <= part).is_some() {}
    }

    fn watts(&self) -> Option<f64> {
        self.parts.iter().map(|(_, watts)| *watts).reduce(f64::min)
    }
}

#[derive(Debug, Default)]
struct EnergySums {
    by_container: HashMap<ContainerKey, f64>,
    unattributed: UnattributedEnergy,
}

impl EnergySums {
    fn add(&mut self, user: User, joules: f64) {
        let sum = match (user.container(), user.reason()) {
            (Some(key), _) => Some(self.by_container.entry(key).or_default()),
            (None, reason) => reason.and_then(|reason| self.unattributed.reasons.get_mut(reason as usize)),
        };
        if let Some(sum) = sum {
            *sum += joules;
        }
    }
}

#[derive(Debug, Default)]
pub struct EnergyAccount {
    range: Range,
    /// `None` before the first reading of a counter.
    sums: Option<EnergySums>,
    open: Option<OpenInterval>,
    /// Oldest first.
    pending: VecDeque<EnergyInterval>,
    /// The time up to which the state of the device is known.
    covered_until: BootNs,
    idle_power: IdlePower,
}

impl EnergyAccount {
    pub fn new(range: Range) -> Self {
        Self { range, ..Self::default() }
    }

    /// Adds a reading of the counter; one without a value is left out, and the interval lasts until the next.
    pub fn read(&mut self, at: BootNs, counter_joules: Option<f64>) {
        let Some(joules) = counter_joules.filter(|joules| joules.is_finite() && *joules >= 0.0) else { return };
        self.sums.get_or_insert_default();
        if self.open.as_ref().is_some_and(|open| at <= open.interval.from) {
            return;
        }
        let next = OpenInterval { counter_joules: joules, interval: EnergyInterval::after(at) };
        let Some(OpenInterval { counter_joules: before, mut interval }) = self.open.replace(next) else { return };
        // A lower value is a counter that began again at 0, as `increase()` of Prometheus has it.
        interval.was_reset = joules < before;
        interval.joules = if interval.was_reset { joules } else { joules - before };
        interval.to = at;
        if interval.joules > MAX_WATTS * seconds(at.saturating_since(interval.from)) {
            return;
        }
        self.pending.push_back(interval);
        if self.pending.len() > MAX_PENDING
            && let Some(oldest) = self.pending.pop_front()
        {
            self.divide(&oldest);
        }
    }

    /// The state of the device up to `at` is known, except for busy time that waits to be divided.
    pub fn covered(&mut self, at: BootNs) {
        self.covered_until = self.covered_until.max(at);
    }

    /// Adds `ns` of idle time in the span that ends at `at`.
    pub fn idle(&mut self, at: BootNs, span_ns: f64, ns: f64) {
        self.spread(at, span_ns, |interval, part| interval.idle_ns += ns * part);
    }

    pub fn unobserved(&mut self, at: BootNs, ns: f64) {
        self.spread(at, ns, |interval, part| interval.unobserved_ns += ns * part);
    }

    pub fn credited(&mut self, booked: &Booked) {
        let Booked { at, span_ns, user, ns } = *booked;
        self.spread(at, span_ns, |interval, part| *interval.busy_ns.entry(user).or_default() += ns * part);
    }

    /// Passes each interval that the span touches, with the part of the span in it.
    fn spread(&mut self, at: BootNs, span_ns: f64, mut add: impl FnMut(&mut EnergyInterval, f64)) {
        let from = at.minus(span_ns as u64);
        let open = self.open.as_mut().map(|open| &mut open.interval);
        for interval in open.into_iter().chain(self.pending.iter_mut().rev()) {
            if interval.to <= from {
                return;
            }
            let common_ns = at.min(interval.to).saturating_since(from.max(interval.from));
            if common_ns > 0 {
                add(interval, common_ns as f64 / span_ns);
            }
        }
    }

    /// Divides the intervals that end by `complete_until`, the time up to which all busy time is divided.
    pub fn settle(&mut self, complete_until: BootNs) {
        let until = complete_until.min(self.covered_until);
        while let Some(interval) = self.pending.pop_front_if(|interval| interval.to <= until) {
            self.divide(&interval);
        }
    }

    /// Ends the input for now: the device is gone, or its counter is not its own any more. The energy since the last reading is not known.
    pub fn end(&mut self) {
        self.open = None;
        for interval in std::mem::take(&mut self.pending) {
            self.divide(&interval);
        }
    }

    fn divide(&mut self, interval: &EnergyInterval) {
        let whole_ns = interval.to.saturating_since(interval.from);
        let counted_ns = self.range.part(interval.to, whole_ns);
        let Some(sums) = self.sums.as_mut().filter(|_| counted_ns > 0) else { return };
        let joules = interval.joules * (counted_ns as f64 / whole_ns as f64);
        let busy_ns: f64 = interval.busy_ns.values().sum();
        let known_ns = busy_ns + interval.idle_ns + interval.unobserved_ns;
        if counted_ns == whole_ns && !interval.was_reset && interval.idle_ns > 0.0 && interval.idle_ns >= IDLE_RATIO * known_ns {
            self.idle_power.add(interval.to, whole_ns, joules);
        }
        let watts = self.idle_power.watts();
        let base = watts.map_or(0.0, |watts| joules.min(watts * seconds(counted_ns)));
        let unobserved = if known_ns > 0.0 { interval.unobserved_ns / known_ns } else { 1.0 };
        let lost = (joules - base) * unobserved;
        let of_users = match watts {
            _ if busy_ns <= 0.0 => 0.0,
            Some(_) => joules - base - lost,
            None => joules * (busy_ns / known_ns),
        };
        // A sample may name a user and no busy time.
        for (user, ns) in interval.busy_ns.iter().filter(|(_, ns)| **ns > 0.0) {
            sums.add(*user, of_users * (ns / busy_ns));
        }
        sums.add(User::Unattributed(Reason::Lost), lost);
        sums.unattributed.idle += (joules - lost - of_users).max(0.0);
    }

    /// Joules of the container; `None` where the driver has not reported a counter.
    pub fn of_container(&self, key: ContainerKey) -> Option<f64> {
        self.sums.as_ref().map(|sums| sums.by_container.get(&key).copied().unwrap_or_default())
    }

    pub fn unattributed(&self) -> Option<UnattributedEnergy> {
        self.sums.as_ref().map(|sums| sums.unattributed)
    }

    /// Time of a container that still waits is that of an unknown user.
    pub fn forget(&mut self, gone: impl Fn(&ContainerKey) -> bool) {
        if let Some(sums) = &mut self.sums {
            sums.by_container.retain(|key, _| !gone(key));
        }
        let open = self.open.as_mut().map(|open| &mut open.interval);
        for interval in open.into_iter().chain(&mut self.pending) {
            let is_gone = |user: &User| user.container().is_some_and(|key| gone(&key));
            let removed: f64 = interval.busy_ns.extract_if(.., |user, _| is_gone(user)).map(|(_, ns)| ns).sum();
            if removed > 0.0 {
                *interval.busy_ns.entry(User::Unattributed(Reason::Lost)).or_default() += removed;
            }
        }
    }
}

fn seconds(ns: u64) -> f64 {
    ns as f64 * 1e-9
}

#[cfg(test)]
mod tests;
