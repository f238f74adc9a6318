//! The conditions in which the agent measures less than it could.
//!
//! The key of a condition is part of the interface: it is the label `condition` of `gpu_sampler_degraded`, and the log, the page and
//! alerts contain it.

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

/// Its text is the key: unique, and stable across versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, strum::Display)]
#[strum(serialize_all = "kebab-case")]
pub enum Condition {
    /// The agent is not in the PID namespace of the host.
    PidNamespace,
    /// Cgroups cannot be identified.
    Cgroups,
    /// Processes and cgroups are tracked without kernel events.
    #[strum(to_string = "kernel")]
    KernelMode,
    /// The counters of lost kernel events cannot be read.
    LossCounters,
    /// A scan could not read some processes or cgroups.
    Scan,
    /// The pressure files of some containers cannot be read.
    Pressure,
    /// Processes that were selected have no wait probes.
    WaitProbes,
    /// Sessions cannot be uploaded to the object store.
    SessionStore,
    /// The token file is invalid: no token is valid.
    TokenFile,
    /// The web configuration is invalid: the previous one stays in force.
    WebConfig,
    /// The certificate of the HTTP server has expired.
    WebCertificate,
    /// The driver's PIDs are not, or not certainly, PIDs of this machine.
    PidSpace,
    /// The driver cannot be used.
    Nvml,
    /// The kernel module drives GPUs that the driver library does not list.
    GpusUnlisted,
    /// A driver call of the thread that lists GPUs does not return.
    #[strum(to_string = "gpu-watch")]
    GpuList,
    /// A driver call of the thread that receives XID errors does not return.
    #[strum(to_string = "gpu-events")]
    XidEvents,
    /// The GPU at this index cannot be opened.
    #[strum(to_string = "gpu-index-{index}")]
    GpuUnopened { index: u32 },
    /// The GPU in this slot is lost, fails, or a call does not return.
    #[strum(to_string = "gpu-{slot}")]
    Gpu { slot: usize },
    /// The GPU in this slot is released on request.
    #[strum(to_string = "gpu-{slot}-released")]
    GpuReleased { slot: usize },
    /// The busy counter of the GPU in this slot stays at 100 % while nothing runs.
    #[strum(to_string = "gpu-{slot}-latched")]
    GpuLatched { slot: usize },
    /// Reading the GPU in this slot within its budget covers only some samples.
    #[strum(to_string = "gpu-{slot}-budget")]
    GpuBudget { slot: usize },
}

impl Condition {
    pub fn key(self) -> String {
        self.to_string()
    }

    pub fn severity(self) -> Severity {
        self.properties().0
    }

    /// The log message for the end of the condition.
    pub fn recovery(self) -> &'static str {
        self.properties().1
    }

    /// The severity, and the log message for the end.
    fn properties(self) -> (Severity, &'static str) {
        use Severity::{Missing, Reduced};
        match self {
            Condition::PidNamespace => (Missing, "the agent is in the host's PID namespace"),
            Condition::Cgroups => (Missing, "cgroups can be identified"),
            Condition::KernelMode => (Missing, "kernel events are received"),
            Condition::LossCounters => (Reduced, "the counters of lost kernel events can be read again"),
            Condition::Scan => (Missing, "all cgroups and processes can be read again"),
            Condition::Pressure => (Reduced, "the pressure of containers can be read again"),
            Condition::WaitProbes => (Reduced, "all selected processes have wait probes, or none is selected"),
            Condition::SessionStore => (Reduced, "sessions are uploaded to the object store again"),
            Condition::TokenFile => (Reduced, "the token file is valid again"),
            Condition::WebConfig => (Reduced, "the web configuration is valid again"),
            Condition::WebCertificate => (Reduced, "the certificate of the HTTP server is valid"),
            Condition::PidSpace => (Missing, "the driver's PIDs are this machine's"),
            Condition::Nvml => (Missing, "the NVIDIA driver can be used"),
            Condition::GpusUnlisted => (Missing, "every GPU of the kernel module is listed"),
            Condition::GpuList => (Missing, "the driver call has returned"),
            Condition::XidEvents => (Reduced, "the driver call has returned"),
            Condition::GpuUnopened { .. } => (Missing, "the GPU can be opened, or was removed"),
            Condition::Gpu { .. } => (Missing, "the GPU can be read again"),
            Condition::GpuReleased { .. } => (Missing, "the release of the GPU is over"),
            Condition::GpuLatched { .. } => (Missing, "the GPU's busy counter is no longer latched"),
            Condition::GpuBudget { .. } => (Reduced, "the process of every sample is queried again"),
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
            Condition::SessionStore,
            Condition::TokenFile,
            Condition::WebConfig,
            Condition::WebCertificate,
            Condition::PidSpace,
            Condition::Nvml,
            Condition::GpusUnlisted,
            Condition::GpuList,
            Condition::XidEvents,
        ];
        for n in [0, 1, 10, 11] {
            let slot = n as usize;
            all.extend([Condition::GpuUnopened { index: n }, Condition::Gpu { slot }]);
            all.extend([Condition::GpuReleased { slot }, Condition::GpuLatched { slot }, Condition::GpuBudget { slot }]);
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
        check(Condition::PidNamespace, "pid-namespace");
        check(Condition::Cgroups, "cgroups");
        check(Condition::KernelMode, "kernel");
        check(Condition::LossCounters, "loss-counters");
        check(Condition::Scan, "scan");
        check(Condition::Pressure, "pressure");
        check(Condition::WaitProbes, "wait-probes");
        check(Condition::SessionStore, "session-store");
        check(Condition::TokenFile, "token-file");
        check(Condition::WebConfig, "web-config");
        check(Condition::WebCertificate, "web-certificate");
        check(Condition::PidSpace, "pid-space");
        check(Condition::Nvml, "nvml");
        check(Condition::GpusUnlisted, "gpus-unlisted");
        check(Condition::GpuList, "gpu-watch");
        check(Condition::XidEvents, "gpu-events");
        check(Condition::GpuUnopened { index: 3 }, "gpu-index-3");
        check(Condition::Gpu { slot: 0 }, "gpu-0");
        check(Condition::GpuReleased { slot: 1 }, "gpu-1-released");
        check(Condition::GpuLatched { slot: 2 }, "gpu-2-latched");
        check(Condition::GpuBudget { slot: 12 }, "gpu-12-budget");
    }
}
