//! The conditions in which the agent measures less than it could.
//!
//! The key of a condition is part of the interface: it is the label `condition` of `gpu_sampler_degraded`, and the log, the page and
//! alerts contain it.

use std::borrow::Cow;

pub const PID_NAMESPACE_REMEDY: &str = "run with hostPID: true or --pid=host";
pub const CGROUPS_REMEDY: &str = "mount cgroup2 on /sys/fs/cgroup; in a container, mount the host's /sys/fs/cgroup and run in its cgroup \
                                  namespace (--cgroupns=host)";

/// The effect of a condition on the results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum Severity {
    /// Results are complete but less precise, or a diagnostic is missing.
    Reduced,
    /// GPU time or its users are missing from the results.
    Missing,
}

impl Severity {
    pub fn name(self) -> &'static str {
        self.into()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Condition {
    /// The agent is not in the PID namespace of the host.
    PidNamespace,
    /// Cgroups cannot be identified.
    Cgroups,
    /// Processes and cgroups are tracked without kernel events.
    KernelMode,
    /// The counters of lost kernel events cannot be read.
    LossCounters,
    /// A scan could not read some processes or cgroups.
    Scan,
    /// The pressure files of some containers cannot be read.
    Pressure,
    /// The driver's PIDs are not, or not certainly, PIDs of this machine.
    PidSpace,
    /// The driver cannot be used.
    Nvml,
    /// A driver call of the thread that lists GPUs does not return.
    GpuList,
    /// A driver call of the thread that receives XID errors does not return.
    XidEvents,
    /// The GPU at this index cannot be opened.
    GpuUnopened { index: u32 },
    /// The GPU in this slot is lost, fails, or a call does not return.
    Gpu { slot: usize },
    /// Reading the GPU in this slot within its budget covers only some samples.
    GpuBudget { slot: usize },
}

impl Condition {
    /// Unique, and stable across versions.
    pub fn key(self) -> Cow<'static, str> {
        match self {
            Condition::PidNamespace => "pid-namespace".into(),
            Condition::Cgroups => "cgroups".into(),
            Condition::KernelMode => "kernel".into(),
            Condition::LossCounters => "loss-counters".into(),
            Condition::Scan => "scan".into(),
            Condition::Pressure => "pressure".into(),
            Condition::PidSpace => "pid-space".into(),
            Condition::Nvml => "nvml".into(),
            Condition::GpuList => "gpu-watch".into(),
            Condition::XidEvents => "gpu-events".into(),
            Condition::GpuUnopened { index } => format!("gpu-index-{index}").into(),
            Condition::Gpu { slot } => format!("gpu-{slot}").into(),
            Condition::GpuBudget { slot } => format!("gpu-{slot}-budget").into(),
        }
    }

    pub fn severity(self) -> Severity {
        match self {
            Condition::LossCounters | Condition::Pressure | Condition::XidEvents | Condition::GpuBudget { .. } => {
                Severity::Reduced
            }
            Condition::PidNamespace
            | Condition::Cgroups
            | Condition::KernelMode
            | Condition::Scan
            | Condition::PidSpace
            | Condition::Nvml
            | Condition::GpuList
            | Condition::GpuUnopened { .. }
            | Condition::Gpu { .. } => Severity::Missing,
        }
    }

    /// The remedy, if it is the same in all cases; otherwise the message of the condition contains it.
    pub fn remedy(self) -> Option<&'static str> {
        match self {
            Condition::PidNamespace => Some(PID_NAMESPACE_REMEDY),
            Condition::Cgroups => Some(CGROUPS_REMEDY),
            _ => None,
        }
    }

    /// The log message for the end of the condition.
    pub fn recovery(self) -> &'static str {
        match self {
            Condition::PidNamespace => "the agent is in the host's PID namespace",
            Condition::Cgroups => "cgroups can be identified",
            Condition::KernelMode => "kernel events are received",
            Condition::LossCounters => "the counters of lost kernel events can be read again",
            Condition::Scan => "all cgroups and processes can be read again",
            Condition::Pressure => "the pressure of containers can be read again",
            Condition::PidSpace => "the driver's PIDs are this machine's",
            Condition::Nvml => "the NVIDIA driver can be used",
            Condition::GpuList | Condition::XidEvents => "the driver call has returned",
            Condition::GpuUnopened { .. } => "the GPU can be opened, or was removed",
            Condition::Gpu { .. } => "the GPU can be read again",
            Condition::GpuBudget { .. } => "the process of every sample is queried again",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Each condition, with small and large parameters.
    fn all() -> Vec<Condition> {
        let mut all = vec![
            Condition::PidNamespace,
            Condition::Cgroups,
            Condition::KernelMode,
            Condition::LossCounters,
            Condition::Scan,
            Condition::Pressure,
            Condition::PidSpace,
            Condition::Nvml,
            Condition::GpuList,
            Condition::XidEvents,
        ];
        for n in [0, 1, 10, 11] {
            let slot = n as usize;
            all.extend([Condition::GpuUnopened { index: n }, Condition::Gpu { slot }, Condition::GpuBudget { slot }]);
        }
        all
    }

    #[test]
    fn keys_are_unique() {
        let keys: HashSet<_> = all().into_iter().map(Condition::key).collect();
        assert_eq!(keys.len(), all().len());
    }

    #[test]
    fn keys_are_valid_label_values_without_escapes() {
        for key in all().into_iter().map(Condition::key) {
            assert!(key.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'), "{key}");
        }
    }

    #[test]
    fn keys_do_not_change() {
        let check = |condition: Condition, expect: &str| assert_eq!(condition.key(), expect);
        check(Condition::KernelMode, "kernel");
        check(Condition::PidSpace, "pid-space");
        check(Condition::GpuList, "gpu-watch");
        check(Condition::GpuUnopened { index: 3 }, "gpu-index-3");
        check(Condition::Gpu { slot: 0 }, "gpu-0");
        check(Condition::GpuBudget { slot: 12 }, "gpu-12-budget");
    }
}
