//! GPUs that are lost: let go of, so that they can be reset, and tried ever more rarely.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::super::release::open_nodes;
use super::super::retry::{Backoff, RARELY};
use super::{LOST_AT_FIRST, Watch, Withheld};
use crate::health::condition::Condition;

impl Watch {
    /// The number of lost GPUs that exist and were not tried.
    pub(super) fn waiting_lost(&self, count: u32, tried: &[u32]) -> usize {
        let is_waiting = |uuid: &Arc<str>| self.known.get(uuid).is_some_and(|gpu| !tried.contains(&gpu.index()));
        let lost = self.withheld.iter().filter(|(_, withheld)| matches!(withheld, Withheld::Lost(_)));
        if count == self.counted { lost.filter(|(uuid, _)| is_waiting(uuid)).count() } else { 0 }
    }

    /// A try to open a lost GPU failed.
    pub(super) fn is_still_lost(&mut self, index: u32, now: Instant) -> bool {
        let lost = self.withheld.iter_mut().find_map(|(uuid, withheld)| match withheld {
            Withheld::Lost(backoff) if self.known.get(uuid).is_some_and(|gpu| gpu.index() == index) => Some(backoff),
            _ => None,
        });
        let Some(backoff) = lost else { return false };
        backoff.failed(now);
        self.tried_lost = true;
        true
    }

    /// Withholds GPUs of which the threads ended because they are lost. Returns whether there are new ones.
    pub(super) fn withhold_lost(&mut self) -> bool {
        let now = Instant::now();
        let lost = self.workers.extract_if(|_, worker| worker.thread.is_finished() && worker.lost.load(Ordering::Relaxed));
        let lost: Vec<Arc<str>> = lost.map(|(uuid, _)| uuid).collect();
        for uuid in &lost {
            // One that is lost again and again interrupts the others ever more rarely.
            let backoff = match self.returned.remove(uuid) {
                Some((mut backoff, at)) if now.saturating_duration_since(at) < RARELY => {
                    backoff.failed(now);
                    backoff
                }
                _ => Backoff::new(LOST_AT_FIRST, now),
            };
            self.withheld.insert(Arc::clone(uuid), Withheld::Lost(backoff));
        }
        !lost.is_empty()
    }

    /// Whether a try to open a lost GPU left its device node open, and closing the library can close it.
    pub(super) fn holds_lost(&self) -> bool {
        if !self.tried_lost || self.is_stuck {
            return false;
        }
        let minor_of = |uuid: &Arc<str>| self.known.get(uuid).and_then(|gpu| gpu.minor);
        let in_use: Option<Vec<u32>> = self.workers.keys().map(minor_of).collect();
        let is_lost = |minor: u32| match &in_use {
            // Also one that was lost before it was ever opened, of which nothing is known.
            Some(in_use) => !in_use.contains(&minor),
            None => self.withheld.iter().any(|(uuid, why)| matches!(why, Withheld::Lost(_)) && minor_of(uuid) == Some(minor)),
        };
        let number = |node: &PathBuf| node.file_name()?.to_str()?.strip_prefix("nvidia")?.parse().ok();
        open_nodes().iter().filter_map(number).any(is_lost)
    }

    /// A GPU was opened, perhaps one that was lost.
    pub(super) fn returned(&mut self, uuid: &Arc<str>, slot: usize, now: Instant) {
        if let Some(Withheld::Lost(backoff)) = self.withheld.remove(uuid) {
            self.returned.insert(Arc::clone(uuid), (backoff, now));
            self.context.health.recovered_with(Condition::Gpu { slot }, &format!("{uuid} is back"));
        }
    }
}
