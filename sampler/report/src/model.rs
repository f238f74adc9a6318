//! The model that every format is made of. Field names are those of `report --format json`.

use serde::{Serialize, Serializer};

use sampler_core::units::{WallTime, rfc3339};

/// The version of the `json` format.
pub const FORMAT: u32 = 2;

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn time<S: Serializer>(at: &WallTime, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&rfc3339(*at))
}

fn map<S: Serializer>(all: &[Named], to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(all.iter().map(|one| (&one.name, one.value)))
}

fn maybe_map<S: Serializer>(all: &Option<Vec<Named>>, to: S) -> Result<S::Ok, S::Error> {
    match all {
        Some(all) => map(all, to),
        None => to.serialize_none(),
    }
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    pub format: u32,
    #[serde(serialize_with = "time")]
    pub start: WallTime,
    pub duration_seconds: f64,
    /// The file ends before the session did, or parts of it cannot be read: what is here is of what could be.
    pub truncated: bool,
    /// In words: what of the file could not be read, and why.
    pub damage: Vec<String>,
    /// The machine, as it calls itself.
    pub node: String,
    pub agent_version: String,
    /// Width of the windows in which users count as active together.
    pub window_seconds: f64,
    /// A GPU that was busy for this part of a window is saturated in it.
    pub saturation_ratio: f64,
    pub gaps: Vec<Gap>,
    pub gpus: Vec<GpuReport>,
    /// Containers, host processes, and what could not be named: every user of these GPUs, by GPU-seconds, most first.
    pub users: Vec<UserReport>,
    /// Strongest first.
    pub findings: Vec<Finding>,
    #[serde(skip)]
    pub timelines: Vec<Timeline>,
}

/// Time of which nothing is known.
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
    /// Of a MIG device: its GPU.
    pub gpu_uuid: Option<String>,
    pub busy_seconds: f64,
    pub idle_seconds: f64,
    pub unobserved_seconds: f64,
    pub unsupported_seconds: f64,
    pub unattributed_seconds: f64,
    /// Reason to seconds; `host` processes are among `containers`, with kind `host`.
    #[serde(serialize_with = "map")]
    pub unattributed: Vec<Named>,
    /// Of windows in which it was busy for `saturation_ratio` at least.
    pub saturated_seconds: f64,
    pub memory_total_bytes: Option<u64>,
    pub memory_used_max_bytes: Option<u64>,
    /// Seconds by clocks event reason; `None` where the driver does not say.
    #[serde(serialize_with = "maybe_map")]
    pub throttle_seconds: Option<Vec<Named>>,
    /// XID to how often.
    #[serde(serialize_with = "map")]
    pub xids: Vec<Named>,
}

/// A number with a name; a list of them is serialized as a map.
#[derive(Clone, Debug, PartialEq)]
pub struct Named {
    pub name: String,
    pub value: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum UserKind {
    Container,
    /// A process outside any container.
    Host,
    /// GPU time whose user could not be named; `id` is the reason.
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct UserReport {
    pub kind: UserKind,
    /// A container's cgroup path; `pid:PID@START` of a host process; the reason of what is unknown. Unique within the report.
    pub id: String,
    pub container_id: Option<String>,
    pub namespace: String,
    pub pod: String,
    pub container: String,
    pub name: String,
    pub image: String,
    /// Of a host process.
    pub pid: Option<u32>,
    pub comm: Option<String>,
    pub gpus: Vec<Usage>,
}

/// What a user had of one GPU.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Usage {
    pub uuid: String,
    /// Engine-busy time credited.
    pub gpu_seconds: f64,
    /// One standard error, of sampling alone.
    pub gpu_seconds_stderr: f64,
    pub share_of_busy: Option<f64>,
    pub share_stderr: Option<f64>,
    /// Driver samples that named it.
    pub samples: u64,
    /// Of windows in which it had a sample.
    pub active_seconds: f64,
    /// Of those in which somebody else had one, too.
    pub coactive_seconds: f64,
    /// Of those in which the GPU was saturated besides.
    pub contended_seconds: f64,
    pub memory_max_bytes: Option<u64>,
    /// By what they got, most first.
    pub contenders: Vec<Contender>,
    /// What else could explain waiting; for users with contenders or with a finding.
    pub causes: Vec<Cause>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Evidence {
    /// Both were active in the same windows. That one kept the other waiting is possible, not shown.
    Coactive,
    /// The victim's GPU-seconds per second dropped while the other was on and the GPU saturated, over two changes or more.
    OnOffConfirmed,
    /// Reserved: a probe in the application told of its waiting.
    DemandConfirmed,
}

impl Evidence {
    pub fn name(self) -> &'static str {
        match self {
            Evidence::Coactive => "coactive",
            Evidence::OnOffConfirmed => "on-off-confirmed",
            Evidence::DemandConfirmed => "demand-confirmed",
        }
    }
}

/// Another user of the GPU, in the windows in which this one was active.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Contender {
    pub kind: UserKind,
    pub id: String,
    /// What the other got in them.
    pub gpu_seconds: f64,
    pub gpu_seconds_stderr: f64,
    /// The part of it in windows in which the GPU was saturated.
    pub saturated_gpu_seconds: f64,
    /// Windows in which both had a sample.
    pub coactive_seconds: f64,
    pub evidence: Evidence,
    /// The victim's GPU-seconds per second while the other was off, and on; `None` without a change to judge by.
    pub rate_before: Option<f64>,
    pub rate_after: Option<f64>,
    /// Times that the other came or went, as far as they could be judged.
    pub transitions: u32,
    /// Of `rate_before - rate_after`.
    pub interval: Option<[f64; 2]>,
    pub interval_level: Option<f64>,
    /// Why it is not more than coactive, in words; blank when it is.
    pub why_not_confirmed: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
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
    pub const ALL: [CauseKind; 9] = [
        CauseKind::GpuClocks,
        CauseKind::GpuPower,
        CauseKind::GpuThermal,
        CauseKind::GpuError,
        CauseKind::GpuMemory,
        CauseKind::CpuQuota,
        CauseKind::CpuPressure,
        CauseKind::MemoryPressure,
        CauseKind::IoPressure,
    ];

    pub fn name(self) -> &'static str {
        match self {
            CauseKind::GpuClocks => "gpu-clocks",
            CauseKind::GpuPower => "gpu-power",
            CauseKind::GpuThermal => "gpu-thermal",
            CauseKind::GpuError => "gpu-error",
            CauseKind::GpuMemory => "gpu-memory",
            CauseKind::CpuQuota => "cpu-quota",
            CauseKind::CpuPressure => "cpu-pressure",
            CauseKind::MemoryPressure => "memory-pressure",
            CauseKind::IoPressure => "io-pressure",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    RuledOut,
    Possible,
    /// What it would take to tell is not there.
    Unknown,
}

impl Verdict {
    pub fn name(self) -> &'static str {
        match self {
            Verdict::RuledOut => "ruled-out",
            Verdict::Possible => "possible",
            Verdict::Unknown => "unknown",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cause {
    pub cause: CauseKind,
    pub verdict: Verdict,
    /// With its numbers.
    pub detail: String,
}

/// What a reader should know first, in plain words. The numbers behind it are those of the victim's usage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    pub uuid: String,
    /// `id`s of users.
    pub victim: String,
    /// `None` where the victim's own causes are the finding.
    pub aggressor: Option<String>,
    pub evidence: Option<Evidence>,
    pub text: String,
}

/// One GPU by windows, for drawing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timeline {
    pub uuid: String,
    /// Of the first window, in seconds since the report's start; negative where it began before.
    pub first_second: f64,
    pub window_seconds: f64,
    /// Busy share (0-1) by window; `None` where less than half of it was observed.
    pub busy: Vec<Option<f32>>,
    /// Memory used on the GPU, bytes.
    pub memory: Vec<Option<u64>>,
    pub lanes: Vec<Lane>,
    /// Moments to mark, in seconds since the report's start.
    pub marks: Vec<(f64, String)>,
}

/// One user of it; `shares` and `memory` have an entry for each window.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Lane {
    /// Index into [`Report::containers`].
    pub user: usize,
    /// Credited share (0-1) of the window.
    pub shares: Vec<f32>,
    pub memory: Vec<Option<u64>>,
}

impl Report {
    pub fn user(&self, id: &str) -> Option<&UserReport> {
        self.users.iter().find(|user| user.id == id)
    }

    pub fn gpu(&self, uuid: &str) -> Option<&GpuReport> {
        self.gpus.iter().find(|gpu| gpu.uuid == uuid)
    }
}

impl UserReport {
    /// What people call it: namespace/pod/container, a plain container's name, a process's name and pid.
    pub fn called(&self) -> String {
        match self.kind {
            UserKind::Host => match (&self.comm, self.pid) {
                (Some(comm), Some(pid)) => format!("{comm} (host, pid {pid})"),
                (None, Some(pid)) => format!("host process {pid}"),
                _ => self.id.clone(),
            },
            UserKind::Unknown => format!("unknown ({})", self.id),
            UserKind::Container => {
                let parts = [&self.namespace, &self.pod, &self.container];
                let named: Vec<&str> = parts.into_iter().map(String::as_str).filter(|part| !part.is_empty()).collect();
                if !self.pod.is_empty() {
                    named.join("/")
                } else if !self.name.is_empty() {
                    self.name.clone()
                } else if let Some(id) = &self.container_id {
                    id.chars().take(12).collect()
                } else {
                    self.id.clone()
                }
            }
        }
    }
}
