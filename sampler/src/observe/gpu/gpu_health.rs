//! The conditions of one GPU: it is lost, it fails, its busy counter is latched, or reading it exceeds the budget. Each is reported once, and so is its end.

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
    is_latched: bool,
    /// No poll has succeeded yet, and the previous thread may have left a condition.
    is_new: bool,
}

impl GpuHealth {
    pub fn new(slot: usize, uuid: Arc<str>, health: Arc<Health>) -> Self {
        Self { slot, uuid, health, failures: 0, is_latched: false, is_new: true }
    }

    fn degraded(&self, message: &str) {
        self.health.degraded(Condition::Gpu { slot: self.slot }, message);
    }

    fn recovered(&self, message: &str) {
        self.health.recovered_with(Condition::Gpu { slot: self.slot }, message);
    }

    /// A new thread has opened the GPU: the conditions of the previous one no longer hold.
    pub fn opened(&self) {
        let message = format!("{}: the driver library was opened again", self.uuid);
        for condition in [Condition::GpuBudget { slot: self.slot }, Condition::GpuLatched { slot: self.slot }] {
            self.health.recovered_with(condition, &message);
        }
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
        for condition in [Condition::GpuBudget { slot: self.slot }, Condition::GpuLatched { slot: self.slot }] {
            self.health.recovered_with(condition, &message);
        }
    }

    /// Whether the busy counter is latched.
    pub fn latch(&mut self, is_latched: bool) {
        if std::mem::replace(&mut self.is_latched, is_latched) == is_latched {
            return;
        }
        let uuid = &self.uuid;
        let condition = Condition::GpuLatched { slot: self.slot };
        if is_latched {
            let message = format!(
                "{uuid}: the driver reports 100 % utilization, but no process, no memory activity and the power of an idle GPU: its busy \
                 counter is latched, as after a process is killed; this time is counted as no_pid; run a CUDA program on this GPU and let it \
                 end by itself, or reset the GPU (nvidia-smi --gpu-reset)"
            );
            self.health.degraded(condition, &message);
        } else {
            self.health.recovered_with(condition, &format!("{uuid}: the busy counter is no longer latched"));
        }
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
