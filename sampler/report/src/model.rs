//! The model behind every format. Field names are the keys of `report --format json`.

use super::engine_model::EngineReport;
use super::user_name::UserName;
use serde::{Serialize, Serializer};

use sampler_core::cgroup_path::Kind;
use sampler_core::experiment::FreezeConsent;
use sampler_core::units::{WallTime, rfc3339};

/// The version of the `json` format.
pub const FORMAT: u32 = 2;

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn time<S: Serializer>(at: &WallTime, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&rfc3339(*at))
}

fn map<S: Serializer>(all: &[Named], to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(all.iter().map(|named| (&named.name, named.value)))
}

fn maybe_map<S: Serializer>(all: &Option<Vec<Named>>, to: S) -> Result<S::Ok, S::Error> {
    match all {
        Some(all) => map(all, to),
        None => to.serialize_none(),
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    pub format: u32,
    #[serde(serialize_with = "time")]
    pub start: WallTime,
    pub duration_seconds: f64,
    /// The file ends before the session did, or parts of it cannot be read: the report covers the readable parts.
    pub truncated: bool,
    /// Descriptions of the parts of the file that could not be read, and why.
    pub damage: Vec<String>,
    /// Host name of the machine.
    pub node: String,
    pub agent_version: String,
    /// Length of the windows in which users count as coactive.
    pub window_seconds: f64,
    /// A GPU that was busy for at least this fraction of a window is saturated in it.
    pub saturation_ratio: f64,
    pub gaps: Vec<Gap>,
    pub gpus: Vec<GpuReport>,
    /// All users of these GPUs: containers, pods, jobs, units, login sessions, host processes and unidentified ones; by GPU-seconds,
    /// descending.
    pub users: Vec<UserReport>,
    /// Strongest first.
    pub findings: Vec<Finding>,
    /// In the order of their starts.
    pub experiments: Vec<ExperimentReport>,
    #[serde(skip)]
    pub timelines: Vec<Timeline>,
}

/// Unobserved time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gap {
    pub uuid: String,
    #[serde(serialize_with = "time")]
    pub from: WallTime,
    #[serde(serialize_with = "time")]
    pub to: WallTime,
    pub reason: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct GpuReport {
    pub uuid: String,
    pub index: u32,
    pub model: String,
    /// UUID of the parent GPU; `None` if this is not a MIG device.
    pub gpu_uuid: Option<String>,
    pub busy_seconds: f64,
    pub idle_seconds: f64,
    pub unobserved_seconds: f64,
    pub unsupported_seconds: f64,
    pub unattributed_seconds: f64,
    /// Seconds by reason. Host processes are not unattributed: they are among `users`, with kind `host`.
    #[serde(serialize_with = "map")]
    pub unattributed: Vec<Named>,
    /// Seconds of windows in which the GPU was busy for at least `saturation_ratio`.
    pub saturated_seconds: f64,
    pub memory_total_bytes: Option<u64>,
    pub memory_used_max_bytes: Option<u64>,
    /// Seconds by clocks event reason; `None` if the driver does not report them.
    #[serde(serialize_with = "maybe_map")]
    pub throttle_seconds: Option<Vec<Named>>,
    /// Number of XID errors by XID.
    #[serde(serialize_with = "map")]
    pub xids: Vec<Named>,
}

/// A number with a name; a list of them is serialized as a map.
#[derive(Clone, Debug, PartialEq)]
pub struct Named {
    pub name: String,
    pub value: f64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, strum::IntoStaticStr)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum UserKind {
    Container,
    /// Processes in the own cgroup of a pod.
    Pod,
    Job,
    Unit,
    /// The sessions of a user.
    Login,
    /// A process of none of these.
    Host,
    /// GPU time of an unidentified user; `id` is the reason.
    #[default]
    Unknown,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct UserReport {
    pub kind: UserKind,
    /// Short name: as [`UserReport::display_name`], and in metrics `user` of a job, unit or login session.
    pub user: String,
    /// Cgroup path of a container, pod, job, unit or login session; `pid:PID@START` of a host process; the reason if the user is unknown. Unique within the report.
    pub id: String,
    pub container_id: Option<String>,
    pub namespace: String,
    pub pod: String,
    pub container: String,
    pub name: String,
    pub image: String,
    /// Only of a host process.
    pub pid: Option<u32>,
    pub comm: Option<String>,
    pub gpus: Vec<Usage>,
    /// `None` if no process of the user was probed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits: Option<UserWaits>,
    /// Serving engines in the container; only of sessions that recorded their metrics.
    pub engines: Vec<EngineReport>,
}

/// Waiting in blocking calls of the driver library, of all processes of a user with wait probes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct UserWaits {
    /// Time in which processes had probes, summed over processes.
    pub probed_seconds: f64,
    /// Time in which at least one thread of a process was inside a call, summed over processes.
    pub wait_seconds: f64,
    /// Calls that returned.
    pub calls: u64,
    /// Duration of a call, to within a factor of two; `None` without calls.
    pub call_seconds: Option<CallSeconds>,
    /// Processes that could not be probed.
    pub unprobed_processes: usize,
    /// The first of them, each with the reason.
    pub problems: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct CallSeconds {
    pub p50: f64,
    pub p99: f64,
}

/// The usage of one GPU by one user.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Usage {
    pub uuid: String,
    /// Busy time of the engine that is attributed to the user.
    pub gpu_seconds: f64,
    /// One standard error, of sampling only.
    pub gpu_seconds_stderr: f64,
    pub share_of_busy: Option<f64>,
    pub share_stderr: Option<f64>,
    /// Driver samples that name the user.
    pub samples: u64,
    /// Seconds of windows in which the user had a sample.
    pub active_seconds: f64,
    /// The part of `active_seconds` in which another user had a sample as well.
    pub coactive_seconds: f64,
    /// The part of `coactive_seconds` in which the GPU was saturated.
    pub contended_seconds: f64,
    pub memory_max_bytes: Option<u64>,
    /// By GPU-seconds, descending.
    pub contenders: Vec<Contender>,
    /// Other causes that may explain waiting; for containers and for users with contenders.
    pub causes: Vec<Cause>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, strum::IntoStaticStr)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum Evidence {
    /// Both users were active in the same windows. That one of them had to wait for the other is possible, but not shown.
    Coactive,
    /// The victim's GPU-seconds per second dropped while the contender was on and the GPU saturated, over at least two changes.
    OnOffConfirmed,
    /// Blocking calls of the victim took longer while the contender was on, or the contender waited for the victim, over at least two
    /// changes: both had work in flight, and the victim waited.
    DemandConfirmed,
    /// The victim received more GPU time whenever the contender was frozen, at times that were drawn at random.
    ExperimentConfirmed,
}

impl Evidence {
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// Another user of the GPU, in the windows in which the user in question was active.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Contender {
    pub kind: UserKind,
    pub id: String,
    /// GPU time of the contender in those windows.
    pub gpu_seconds: f64,
    pub gpu_seconds_stderr: f64,
    /// The part of `gpu_seconds` in windows in which the GPU was saturated.
    pub saturated_gpu_seconds: f64,
    /// Seconds of windows in which both had a sample.
    pub coactive_seconds: f64,
    pub evidence: Evidence,
    /// Also if `evidence` is stronger.
    pub on_off_confirmed: bool,
    /// The victim's GPU-seconds per second while the contender was off (before) and on (after); `None` without a change to compare.
    pub rate_before: Option<f64>,
    pub rate_after: Option<f64>,
    /// Starts and stops of the contender that could be evaluated.
    pub transitions: u32,
    /// Confidence interval of `rate_before - rate_after`.
    pub interval: Option<[f64; 2]>,
    pub interval_level: Option<f64>,
    /// Why the evidence is not stronger than coactive, as text; empty if it is.
    pub why_not_confirmed: String,
    /// `None` if the victim had no wait probes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub demand: Option<DemandEvidence>,
    /// The effects of freezing this contender, or the pod that it belongs to, by outcome; empty without such an experiment.
    pub experiment: Vec<FreezeEffect>,
}

/// How waiting was compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, strum::IntoStaticStr)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum DemandBasis {
    /// Windows with the contender and without it.
    #[default]
    Changes,
    /// Windows with the contender and those in which calls were shortest; what was longer is booked to all that were on, by GPU time.
    Quietest,
    /// The contender is confirmed to wait for the victim, so both had work in flight at the same time.
    Mutual,
}

/// How much longer the victim waited in blocking calls while the contender was on.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct DemandEvidence {
    pub basis: DemandBasis,
    /// Seconds of waiting per second, beyond what its own work takes; `None` without a comparison.
    pub wait_rate: Option<f64>,
    /// Confidence interval of `wait_rate`.
    pub interval: Option<[f64; 2]>,
    pub interval_level: Option<f64>,
    /// Seconds of waiting per second at most, by the time that the contender was on the GPU; `None` if the basis is `changes`.
    pub wait_rate_most: Option<f64>,
    /// `wait_rate` times the seconds in which the contender was on; `None` if the interval includes 0.
    pub wait_seconds: Option<f64>,
    /// Windows that were compared, with the contender on and off; with the basis `quietest`, those with it and the quietest.
    pub windows_with: usize,
    pub windows_without: usize,
    /// Starts and stops of the contender, or of the quietest windows.
    pub transitions: usize,
    /// Empty if it is confirmed.
    pub why_not_confirmed: String,
}

impl DemandEvidence {
    /// Seconds of waiting in all, at most, where only that is known.
    pub fn most_seconds(&self) -> Option<f64> {
        let most = self.wait_rate_most.filter(|_| self.basis == DemandBasis::Mutual)?;
        Some(most * self.windows_with as f64)
    }
}

/// What an experiment compares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, strum::IntoStaticStr)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum Outcome {
    /// GPU-seconds per second of the victim.
    #[default]
    GpuSeconds,
    /// Seconds in which processes of the victim waited, by blocking calls of the driver library.
    CallWait,
    /// Mean seconds to the first token, of the requests of the victim's serving engines.
    TimeToFirstToken,
}

impl Outcome {
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Unit of the means, the effect and the interval.
    pub fn unit(self) -> &'static str {
        match self {
            Self::GpuSeconds => "GPU-seconds per second",
            Self::CallWait => "seconds per blocking call",
            Self::TimeToFirstToken => "seconds",
        }
    }

    /// Whether a victim that gains from the freeze has more of it, not less.
    pub fn is_gain(self) -> bool {
        self == Self::GpuSeconds
    }
}

/// The effect of freezing a suspect on one outcome of the victim. Means are `None` without a burst that counts.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FreezeEffect {
    pub outcome: Outcome,
    /// Of the means, the effect and the interval.
    pub unit: &'static str,
    /// Mean over the frozen windows.
    pub mean_frozen: Option<f64>,
    /// Mean over the windows in which the suspect ran.
    pub mean_running: Option<f64>,
    /// `mean_frozen - mean_running`: above 0 for GPU time that the victim gains, below 0 for waiting and latency that it is spared.
    pub effect: Option<f64>,
    /// Confidence interval of `effect`; `None` with too few bursts for one.
    pub interval: Option<[f64; 2]>,
    pub interval_level: Option<f64>,
    /// One-sided p-value of the randomisation test: more GPU time, or less waiting or latency, while the suspect was frozen.
    pub p_value: Option<f64>,
    /// Bursts that count: the outcome was measured in both windows.
    pub bursts: u32,
    pub confirmed: bool,
    /// Why the effect is not confirmed, as text; empty if it is.
    pub why_not: String,
}

/// A freezing experiment of the session.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExperimentReport {
    /// Cgroup path of the victim, as is `suspect`.
    pub victim: String,
    pub suspect: String,
    /// `annotation` or `operator`: why the suspect might be frozen.
    pub consent: FreezeConsent,
    /// Reproduces the schedule.
    pub seed: u64,
    #[serde(serialize_with = "time")]
    pub start: WallTime,
    pub freeze_seconds: f64,
    pub planned_bursts: u32,
    /// Bursts in which the suspect was frozen.
    pub frozen_bursts: u32,
    /// By GPU that the victim used.
    pub gpus: Vec<ExperimentGpu>,
    /// Of outcomes that belong to no single GPU: waiting, and latency of serving engines. Those that the session has.
    pub effects: Vec<FreezeEffect>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExperimentGpu {
    pub uuid: String,
    pub effects: Vec<FreezeEffect>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, strum::IntoStaticStr)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum CauseKind {
    GpuClocks,
    GpuPower,
    GpuThermal,
    GpuError,
    GpuMemory,
    CpuQuota,
    CpuPressure,
    MemoryPressure,
    IoPressure,
}

impl CauseKind {
    /// Causes in the cgroup of the container; all others are causes in the GPU, which concern all of its users.
    pub const OF_CONTAINER: [CauseKind; 4] =
        [CauseKind::CpuQuota, CauseKind::CpuPressure, CauseKind::MemoryPressure, CauseKind::IoPressure];

    pub fn name(self) -> &'static str {
        self.into()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, strum::IntoStaticStr)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum Verdict {
    RuledOut,
    Possible,
    /// The data that a verdict requires is not available.
    Unknown,
}

impl Verdict {
    pub fn name(self) -> &'static str {
        self.into()
    }
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cause {
    pub cause: CauseKind,
    pub verdict: Verdict,
    /// Explanation with numbers.
    pub detail: String,
}

/// A conclusion of the report, as text. Its numbers are in the usage of the victim.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    pub uuid: String,
    /// `id` of a user, as is `aggressor`; empty if the finding is about the GPU itself.
    pub victim: String,
    /// `None` if the finding is about causes other than contention.
    pub aggressor: Option<String>,
    pub evidence: Option<Evidence>,
    pub text: String,
}

/// One GPU by windows, for timelines.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timeline {
    pub uuid: String,
    /// Start of the first window, in seconds since the start of the report; negative if it began earlier.
    pub first_second: f64,
    pub window_seconds: f64,
    /// Busy share (0-1) by window; `None` if less than half of the window was observed.
    pub busy: Vec<Option<f32>>,
    /// Memory used on the GPU, in bytes, by window.
    pub memory: Vec<Option<u64>>,
    pub lanes: Vec<Lane>,
    /// Events to mark: seconds since the start of the report, and text.
    pub marks: Vec<(f64, String)>,
}

/// One user of the GPU of a timeline; `shares` and `memory` have an entry for each window.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Lane {
    /// Index into [`Report::users`].
    pub user: usize,
    /// Share (0-1) of the window that is attributed to the user.
    pub shares: Vec<f32>,
    pub memory: Vec<Option<u64>>,
    /// Part of the window in which it waited in a blocking call, summed over its processes; empty if it had no wait probes.
    pub waits: Vec<Option<f32>>,
}

impl FreezeEffect {
    pub fn not_confirmed(outcome: Outcome, why_not: impl Into<String>) -> Self {
        Self { outcome, unit: outcome.unit(), why_not: why_not.into(), ..Self::default() }
    }
}

impl Report {
    pub fn user(&self, id: &str) -> Option<&UserReport> {
        self.users.iter().find(|user| user.id == id)
    }

    pub fn gpu(&self, uuid: &str) -> Option<&GpuReport> {
        self.gpus.iter().find(|gpu| gpu.uuid == uuid)
    }
}

impl From<Kind> for UserKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Pod => UserKind::Pod,
            Kind::Job => UserKind::Job,
            Kind::Unit => UserKind::Unit,
            Kind::Login => UserKind::Login,
            Kind::Container | Kind::Sandbox | Kind::Monitor | Kind::Build | Kind::NotContainer => UserKind::Container,
        }
    }
}

impl UserReport {
    /// Name for people: namespace/pod/container, the name of a container without a pod, or the name and PID of a process.
    pub fn display_name(&self) -> String {
        match self.kind {
            UserKind::Host => match (&self.comm, self.pid) {
                (Some(comm), Some(pid)) => format!("{comm} (host, pid {pid})"),
                (None, Some(pid)) => format!("host process {pid}"),
                _ => self.id.clone(),
            },
            UserKind::Unknown => format!("unknown ({})", self.id),
            UserKind::Job | UserKind::Unit | UserKind::Login => self.user.clone(),
            UserKind::Container | UserKind::Pod => {
                let (namespace, pod, container, name) = (&*self.namespace, &*self.pod, &*self.container, &*self.name);
                let container_id = self.container_id.as_deref().unwrap_or_default();
                UserName { namespace, pod, container, name, container_id, id: &self.id }.to_string()
            }
        }
    }
}
