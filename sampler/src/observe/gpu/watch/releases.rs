//! GPUs that are released on request.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use sampler_core::observation::Observation;
use sampler_core::units::{WallTime, rfc3339};

use super::super::release::{ReleaseError, ReleaseRequest, Released, ReleasedGpu, open_nodes};
use super::{Watch, Withheld};
use crate::health::condition::Condition;
use crate::observe::clock::{boot_now, wall_now};

impl Watch {
    pub(super) fn is_releasing(&self) -> bool {
        self.withheld.values().any(|withheld| matches!(withheld, Withheld::Released { .. }))
    }

    /// The GPUs that a request selects; an error if it names one that is not known.
    pub(super) fn selected(&self, request: &ReleaseRequest) -> Result<Vec<Arc<str>>, ReleaseError> {
        let Some(wanted) = &request.gpu else { return Ok(self.known.keys().cloned().collect()) };
        let selected: Vec<Arc<str>> =
            self.known.iter().filter(|(uuid, gpu)| wanted.matches(gpu.index(), uuid)).map(|(uuid, _)| Arc::clone(uuid)).collect();
        if !selected.is_empty() {
            return Ok(selected);
        }
        let mut known: Vec<(u32, &str)> = self.known.iter().map(|(uuid, gpu)| (gpu.index(), &**uuid)).collect();
        known.sort_unstable();
        let known: Vec<String> = known.into_iter().map(|(index, uuid)| format!("{index} ({uuid})")).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        Err(ReleaseError::Unknown { wanted: wanted.clone(), known })
    }

    pub(super) fn release_while_closed(&mut self, request: ReleaseRequest) {
        match self.selected(&request) {
            Ok(selected) => self.release(request, selected, &[]),
            Err(error) => request.reply(Err(error)),
        }
    }

    /// Withholds GPUs after the library was closed. `before`: the nodes that were open until then.
    pub(super) fn release(&mut self, request: ReleaseRequest, selected: Vec<Arc<str>>, before: &[PathBuf]) {
        let now = Instant::now();
        // If no GPU is known, there is nothing to keep closed, and what would be opened is not known.
        let is_all = request.gpu.is_none() && !selected.is_empty();
        // One of GPUs that are all released stays so for as long as they do.
        let of_all = self.closed_until.filter(|_| !is_all).unwrap_or(now);
        let until = (now + request.lasting).max(of_all);
        let resumes_at = WallTime(wall_now().0 + (until - now).as_nanos() as u64);
        if is_all {
            // Shorter than an earlier request, too: the last one counts.
            self.closed_until = Some(until);
            self.context.health.update(|view| view.nvml_up = Some(false));
        }
        let mut released = Vec::new();
        for uuid in selected {
            let Some(gpu) = self.known.get(&uuid) else { continue };
            let message = format!(
                "{uuid} is released on request until {}; until then its time is unobserved, and no process of the agent uses it",
                rfc3339(resumes_at)
            );
            self.context.health.degraded(Condition::GpuReleased { slot: gpu.slot }, &message);
            let migs = self.context.mig_left.lock().unwrap_or_else(PoisonError::into_inner);
            let migs: Vec<usize> = migs.get(&uuid).into_iter().flatten().map(|(_, slot)| *slot).collect();
            for slot in [gpu.slot].into_iter().chain(migs) {
                // If the core has ended, the next list detects it.
                let _sent = self.context.to.observe(Observation::GpuReleased { gpu: slot, at: boot_now() });
            }
            released.push(ReleasedGpu { index: gpu.index(), uuid: uuid.to_string() });
            self.withheld.insert(uuid, Withheld::Released { until });
        }
        released.sort_unstable_by_key(|gpu| gpu.index);
        let after = open_nodes();
        let result = if after.is_empty() {
            let seconds = (until - now).as_secs();
            let closed = before.to_vec();
            Ok(Released { released, closed, seconds, resumes: rfc3339(resumes_at) })
        } else {
            Err(ReleaseError::Hangs { nodes: after.iter().map(|node| node.display().to_string()).collect() })
        };
        request.reply(result);
    }

    /// Ends the releases that have lasted their time.
    pub(super) fn end_releases(&mut self, now: Instant) {
        let is_over = |withheld: &Withheld| matches!(withheld, Withheld::Released { until } if now >= *until);
        for (uuid, _) in self.withheld.extract_if(|_, withheld| is_over(withheld)) {
            if let Some(gpu) = self.known.get(&uuid) {
                let message = format!("the release of {uuid} is over");
                self.context.health.recovered_with(Condition::GpuReleased { slot: gpu.slot }, &message);
            }
        }
    }
}
