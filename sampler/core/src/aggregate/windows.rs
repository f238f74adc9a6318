//! Credited share of wall time over windows of 10 s, for each container.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use hdrhistogram::Histogram;

use super::settings::WINDOW_NS;
use crate::snapshot::WindowShares;
use crate::units::{BootNs, ContainerKey};

/// Resolution of shares: parts of a thousand.
const PARTS: f64 = 1000.0;
/// A window is counted if at least this part of it was observed.
const OBSERVED: f64 = 0.95;

#[derive(Debug, Default)]
struct OpenWindow {
    credited: HashMap<ContainerKey, f64>,
    observed_ns: f64,
}

#[derive(Debug)]
struct Shares {
    parts: Histogram<u32>,
    sum: f64,
    view: Arc<WindowShares>,
}

#[derive(Debug, Default)]
pub struct Windows {
    open: BTreeMap<u64, OpenWindow>,
    shares: HashMap<ContainerKey, Shares>,
}

impl Windows {
    pub fn observed(&mut self, at: BootNs, ns: f64) {
        self.open.entry(at.0 / WINDOW_NS).or_default().observed_ns += ns;
    }

    pub fn credited(&mut self, at: BootNs, key: ContainerKey, ns: f64) {
        *self.open.entry(at.0 / WINDOW_NS).or_default().credited.entry(key).or_default() += ns;
    }

    /// Counts the windows that end by `complete_until`, which cannot change any more. `holders`: containers that have the GPU, used or not.
    pub fn close(&mut self, complete_until: BootNs, holders: &HashSet<ContainerKey>) {
        while let Some(first) = self.open.first_entry() {
            let ends = (first.key() + 1).saturating_mul(WINDOW_NS);
            if complete_until.0 < ends {
                return;
            }
            let window = first.remove();
            if window.observed_ns < OBSERVED * WINDOW_NS as f64 {
                continue;
            }
            let keys: HashSet<ContainerKey> = window.credited.keys().chain(holders).copied().collect();
            for key in keys {
                let share = window.credited.get(&key).copied().unwrap_or_default() / WINDOW_NS as f64;
                self.shares.entry(key).or_insert_with(Shares::new).record(share);
            }
        }
    }

    pub fn shares_of(&self, key: ContainerKey) -> Option<Arc<WindowShares>> {
        self.shares.get(&key).map(|shares| Arc::clone(&shares.view))
    }

    pub fn forget(&mut self, gone: impl Fn(&ContainerKey) -> bool) {
        self.shares.retain(|key, _| !gone(key));
    }
}

impl Shares {
    fn new() -> Self {
        let parts = Histogram::new_with_bounds(1, 2 * PARTS as u64, 2).expect("1 to 2000 at two digits are valid bounds");
        Self { parts, sum: 0.0, view: Arc::default() }
    }

    fn record(&mut self, share: f64) {
        self.parts.saturating_record((share * PARTS).round() as u64 + 1);
        self.sum += share;
        let up_to = |bound: &f64| self.parts.count_between(0, (bound * PARTS).round() as u64 + 1);
        let buckets = WindowShares::BOUNDS.iter().map(up_to).collect();
        self.view = Arc::new(WindowShares { buckets, sum: self.sum, count: self.parts.len() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn observed_windows_are_counted_for_users_and_holders() {
        let (a, b) = (ContainerKey(1), ContainerKey(2));
        let mut windows = Windows::default();
        for (n, observed) in [(0, 1.0), (1, 0.5), (2, 1.0)] {
            let at = BootNs(n * WINDOW_NS + 5);
            windows.observed(at, observed * WINDOW_NS as f64);
            windows.credited(at, a, 0.3 * WINDOW_NS as f64);
        }
        let holders = HashSet::from([b]);
        windows.close(BootNs(WINDOW_NS - 1), &holders);
        assert_eq!(windows.shares_of(a), None);
        windows.close(BootNs(3 * WINDOW_NS), &holders);
        let view = |key| windows.shares_of(key).map(|w| (w.buckets.clone(), w.count, (w.sum * 10.0).round()));
        assert_eq!(view(a), Some((vec![0, 0, 0, 0, 2, 2, 2, 2, 2, 2], 2, 6.0)));
        assert_eq!(view(b), Some((vec![2; 10], 2, 0.0)));
    }
}
