//! Credited share of wall time over windows of 10 s, for each container.

use std::collections::BTreeMap;
use std::sync::Arc;

use foldhash::{HashMap, HashSet};

use super::settings::WINDOW_NS;
use crate::snapshot::WindowShares;
use crate::units::{BootNs, ContainerKey};

/// A window is counted if at least this part of it was observed.
const OBSERVED: f64 = 0.95;

#[derive(Debug, Default)]
struct OpenWindow {
    credited: HashMap<ContainerKey, f64>,
    observed_ns: f64,
}

#[derive(Debug, Default)]
pub struct Windows {
    open: BTreeMap<u64, OpenWindow>,
    /// Shared with snapshots, which are older when a window is counted.
    shares: HashMap<ContainerKey, Arc<WindowShares>>,
}

fn ends(number: u64) -> u64 {
    (number + 1).saturating_mul(WINDOW_NS)
}

impl Windows {
    pub fn observed(&mut self, at: BootNs, ns: f64) {
        self.open.entry(at.0 / WINDOW_NS).or_default().observed_ns += ns;
    }

    pub fn credited(&mut self, at: BootNs, key: ContainerKey, ns: f64) {
        *self.open.entry(at.0 / WINDOW_NS).or_default().credited.entry(key).or_default() += ns;
    }

    /// Whether a window ends by `complete_until`.
    pub fn is_due(&self, complete_until: BootNs) -> bool {
        self.open.first_key_value().is_some_and(|(number, _)| ends(*number) <= complete_until.0)
    }

    /// Counts the windows that end by `complete_until`, which cannot change any more. `holders`: containers that have the GPU, used or not.
    pub fn close(&mut self, complete_until: BootNs, holders: &HashSet<ContainerKey>) {
        while let Some(first) = self.open.first_entry() {
            if complete_until.0 < ends(*first.key()) {
                return;
            }
            let window = first.remove();
            if window.observed_ns < OBSERVED * WINDOW_NS as f64 {
                continue;
            }
            let keys: HashSet<ContainerKey> = window.credited.keys().chain(holders).copied().collect();
            for key in keys {
                let share = window.credited.get(&key).copied().unwrap_or_default() / WINDOW_NS as f64;
                Arc::make_mut(self.shares.entry(key).or_default()).record(share);
            }
        }
    }

    pub fn shares_of(&self, key: ContainerKey) -> Option<Arc<WindowShares>> {
        self.shares.get(&key).map(Arc::clone)
    }

    pub fn forget(&mut self, gone: impl Fn(&ContainerKey) -> bool) {
        self.shares.retain(|key, _| !gone(key));
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
        let holders = HashSet::from_iter([b]);
        windows.close(BootNs(WINDOW_NS - 1), &holders);
        assert_eq!(windows.shares_of(a), None);
        windows.close(BootNs(3 * WINDOW_NS), &holders);
        let view = |key| windows.shares_of(key).map(|w| (w.buckets, w.count, (w.sum * 10.0).round()));
        assert_eq!(view(a), Some(([0, 0, 0, 0, 2, 2, 2, 2, 2, 2], 2, 6.0)));
        assert_eq!(view(b), Some(([2; 10], 2, 0.0)));
    }
}
