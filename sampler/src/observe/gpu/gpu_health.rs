//! The conditions of one GPU: it is lost, it fails, or reading it exceeds the budget. Each is reported once, and so is its end.

use std::sync::Arc;

use super::budget::Coverage;
use crate::health::Health;
use crate::health::condition::Condition;

/// Consecutive failures after which the GPU is reported as degraded and polled less often.
const FAILURES: u32 = 3;

pub struct GpuHealth {
    slot: usize,
    uuid: Arc<str>,
    health: Arc<Health>,
    failures: u32,
    /// No poll has succeeded yet, and the previous thread may have left a condition.
    is_new: bool,
}

impl GpuHealth {
    pub fn new(slot: usize, uuid: Arc<str>, health: Arc<Health>) -> Self {
        Self { slot, uuid, health, failures: 0, is_new: true }
    }

    fn degraded(&self, message: &str) {
        self.health.degraded(Condition::Gpu { slot: self.slot }, message);
    }

    fn recovered(&self, message: &str) {
        self.health.recovered_with(Condition::Gpu { slot: self.slot }, message);
    }

    /// A new thread has opened the GPU: the budget condition of the previous one no longer holds.
    pub fn opened(&self) {
        let message = format!("{}: the driver library was opened again", self.uuid);
        self.health.recovered_with(Condition::GpuBudget { slot: self.slot }, &message);
    }

    /// Whether several consecutive polls have failed.
    pub fn fails(&self) -> bool {
        self.failures >= FAILURES
    }

    /// Records the result of a poll.
    pub fn polled(&mut self, error: Option<&str>) {
        let uuid = &self.uuid;
        match error {
            None if self.fails() || self.is_new => {
                (self.failures, self.is_new) = (0, false);
                self.recovered(&format!("{} can be read again", self.uuid));
            }
            None => self.failures = 0,
            Some(error) => {
                self.failures = self.failures.saturating_add(1);
                if self.fails() {
                    self.degraded(&format!(
                        "cannot read the samples of {uuid} ({error}); they are missing until this succeeds; check dmesg, and whether \
                         nvidia-smi works"
                    ));
                }
            }
        }
    }

    pub fn lost(&self) {
        self.degraded(&format!(
            "{} is lost, its samples are missing until it is back; the agent closes its handles; check dmesg for Xid lines, then reset it \
             (nvidia-smi --gpu-reset) or restart the machine",
            self.uuid
        ));
    }

    pub fn gone(&self) {
        let message = format!("{} was removed", self.uuid);
        self.recovered(&message);
        self.health.recovered_with(Condition::GpuBudget { slot: self.slot }, &message);
    }

    /// `setting`: the configuration key that limits the coverage.
    pub fn coverage(&self, coverage: Coverage, setting: &str) {
        let uuid = &self.uuid;
        let condition = Condition::GpuBudget { slot: self.slot };
        match coverage {
            Coverage::Whole => {
                self.health.recovered_with(condition, &format!("{uuid}: the process of every sample is queried again"));
            }
            Coverage::Part => {
                let message = format!(
                    "{uuid}: driver calls are slow: within {setting} the process of only some samples is queried; all GPU time is still \
                     observed, but shares have a larger standard error; raise {setting} to query more"
                );
                self.health.degraded(condition, &message);
            }
            Coverage::Over => {
                let message = format!(
                    "{uuid}: driver calls are so slow that one read in half a ring of samples exceeds {setting}; it is made anyway, so GPU \
                     time is still observed; find what delays driver calls"
                );
                self.health.degraded(condition, &message);
            }
        }
    }
}
