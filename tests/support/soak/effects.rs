//! What the agent counts of a fault: a number that rises from its begin until all is as before. A fault that raises nothing was not
//! injected, or not noticed.

use super::faults::{FaultKind, PlannedFault};
use crate::{Sample, sum};

/// A call that a fault delays by 20 ms takes longer than this; a boundary of the histogram.
const SLOW_SECONDS: &str = "0.01";

/// The number, and by how much it has to rise.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Effect {
    counted: f64,
    least: f64,
}

impl Effect {
    /// That of a kind of which the agent counts something. `uuids`: of the GPUs by index.
    fn of(plan: &PlannedFault, page: &[Sample], uuids: &[String]) -> Option<Self> {
        let uuid = uuids.get(plan.gpu).map(String::as_str).unwrap_or_default();
        let total = |name, labels: &[_]| sum(page, name, labels).unwrap_or_default();
        let (counted, least) = match plan.kind {
            FaultKind::RuntimeRestart => (1.0 - sum(page, "gpu_sampler_source_up", &[("source", "docker")]).unwrap_or(1.0), 1.0),
            // Slow calls less the others: more than half have to be slow.
            FaultKind::GpuSlow => {
                let fast = total("gpu_sampler_nvml_call_seconds_bucket", &[("uuid", uuid), ("le", SLOW_SECONDS)]);
                (total("gpu_sampler_nvml_call_seconds_count", &[("uuid", uuid)]) - 2.0 * fast, 5.0)
            }
            FaultKind::GpuError => (total("gpu_sampler_nvml_errors_total", &[("uuid", uuid)]), 1.0),
            // It lasts for at least 3 s.
            FaultKind::GpuFreeze => (total("gpu_time_seconds_total", &[("uuid", uuid), ("state", "unobserved")]), 1.0),
            FaultKind::XidBurst => (total("gpu_xid_errors_total", &[("uuid", uuid)]), 1.0),
            FaultKind::ClockStep => {
                let last = uuids.last().map(String::as_str).unwrap_or_default();
                (total("gpu_sampler_clock_steps_total", &[("uuid", last)]), 1.0)
            }
            _ => return None,
        };
        Some(Self { counted, least })
    }
}

/// The effect of one fault, from its begin on.
#[derive(Clone, Copy, Debug)]
pub struct EffectWatch {
    plan: PlannedFault,
    before: Effect,
    most: f64,
}

impl EffectWatch {
    /// `None` for a kind of which the agent counts nothing.
    pub fn new(plan: PlannedFault, page: &[Sample], uuids: &[String]) -> Option<Self> {
        let before = Effect::of(&plan, page, uuids)?;
        Some(Self { plan, before, most: before.counted })
    }

    pub fn take(&mut self, page: &[Sample], uuids: &[String]) {
        if let Some(effect) = Effect::of(&self.plan, page, uuids) {
            self.most = self.most.max(effect.counted);
        }
    }

    /// What is missing.
    pub fn missing(&self) -> Option<String> {
        let Effect { counted, least } = self.before;
        let rose = self.most - counted;
        (rose < least).then(|| format!("what it counts rose by {rose}, {least} at least were expected"))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::faults::{INJECTED, Reach};
    use super::*;
    use crate::parse;

    const BEFORE: &str = "gpu_sampler_source_up{source=\"docker\"} 1\n\
        gpu_sampler_nvml_call_seconds_bucket{uuid=\"G\",le=\"0.01\"} 90\ngpu_sampler_nvml_call_seconds_count{uuid=\"G\"} 91\n\
        gpu_time_seconds_total{uuid=\"G\",state=\"unobserved\"} 1\n";
    const DURING: &str = "gpu_sampler_source_up{source=\"docker\"} 0\n\
        gpu_sampler_nvml_call_seconds_bucket{uuid=\"G\",le=\"0.01\"} 90\ngpu_sampler_nvml_call_seconds_count{uuid=\"G\"} 99\n\
        gpu_sampler_nvml_errors_total{uuid=\"G\",call=\"get_samples\"} 2\n\
        gpu_time_seconds_total{uuid=\"G\",state=\"unobserved\"} 3\n\
        gpu_xid_errors_total{uuid=\"G\",xid=\"79\"} 2000\ngpu_sampler_clock_steps_total{uuid=\"H\"} 1\n";

    #[test]
    fn a_fault_that_raises_nothing_is_found() {
        let (before, during, uuids) = (parse(BEFORE), parse(DURING), ["G".to_owned(), "H".to_owned()]);
        let mut counted = 0;
        for kind in INJECTED {
            let plan = PlannedFault { kind, gpu: 0, lasts: Duration::from_secs(3), reach: Reach::NoGpu };
            let Some(mut watch) = EffectWatch::new(plan, &before, &uuids) else { continue };
            watch.take(&before, &uuids);
            assert!(watch.missing().is_some(), "{kind:?}");
            watch.take(&during, &uuids);
            watch.take(&before, &uuids);
            assert_eq!(watch.missing(), None, "{kind:?}");
            counted += 1;
        }
        assert_eq!(counted, 6);
    }
}
