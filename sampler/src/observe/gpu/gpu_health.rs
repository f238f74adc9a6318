//! What is said of one GPU when it is lost, fails, or takes more than its budget; each once, and its end.

use std::sync::Arc;

use super::budget::Coverage;
use crate::health::Health;

/// So many failures in a row are said, and then asked less often.
const FAILURES: u32 = 3;

pub struct GpuHealth {
    key: String,
    uuid: Arc<str>,
    health: Arc<Health>,
    failures: u32,
    /// The thread before this one may have left something said.
    anew: bool,
}

impl GpuHealth {
    pub fn new(key: String, uuid: Arc<str>, health: Arc<Health>) -> Self {
        Self { key, uuid, health, failures: 0, anew: true }
    }

    fn budget_key(&self) -> String {
        format!("{}-budget", self.key)
    }

    /// It is opened by a new thread, of which nothing is known that could be said.
    pub fn opened(&self) {
        self.health.recovered(&self.budget_key(), &format!("{}: its driver was opened anew", self.uuid));
    }

    /// It has failed a few times in a row.
    pub fn fails(&self) -> bool {
        self.failures >= FAILURES
    }

    /// What came of asking for its samples.
    pub fn answered(&mut self, error: Option<&str>) {
        let uuid = &self.uuid;
        match error {
            None if self.fails() || self.anew => {
                (self.failures, self.anew) = (0, false);
                self.health.recovered(&self.key, &format!("{uuid} answers again"));
            }
            None => self.failures = 0,
            Some(error) => {
                self.failures = self.failures.saturating_add(1);
                if self.fails() {
                    let message = format!(
                        "{uuid} does not give its samples ({error}), they are missing meanwhile; see dmesg, and whether nvidia-smi works"
                    );
                    self.health.degraded(&self.key, &message);
                }
            }
        }
    }

    pub fn lost(&self) {
        let message = format!(
            "{} is lost, its samples are missing until it is back; see dmesg for Xid lines, then reset it (nvidia-smi --gpu-reset) or \
             restart the machine",
            self.uuid
        );
        self.health.degraded(&self.key, &message);
    }

    pub fn back(&mut self) {
        self.failures = 0;
        self.health.recovered(&self.key, &format!("{} is back", self.uuid));
    }

    pub fn gone(&self) {
        self.health.recovered(&self.key, "the GPU is gone");
        self.health.recovered(&self.budget_key(), "the GPU is gone");
    }

    /// `setting`: the one that limits it.
    pub fn coverage(&self, coverage: Coverage, setting: &str) {
        let uuid = &self.uuid;
        match coverage {
            Coverage::Whole => {
                self.health.recovered(&self.budget_key(), &format!("{uuid}: the process of every sample is queried again"));
            }
            Coverage::Part => {
                let message = format!(
                    "{uuid}: driver calls are slow: within {setting} the process of only some samples is queried; all GPU time is still \
                     observed, but shares have a larger standard error; raise {setting} for more"
                );
                self.health.degraded(&self.budget_key(), &message);
            }
            Coverage::Over => {
                let message = format!(
                    "{uuid}: driver calls are so slow that one read in half a ring of samples takes more than {setting}; it is made all the \
                     same, so GPU time is still observed; find out what holds the driver up"
                );
                self.health.degraded(&self.budget_key(), &message);
            }
        }
    }
}
