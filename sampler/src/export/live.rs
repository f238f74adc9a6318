//! `/api/v1/live`: one document with everything that `top` and the web page show, with the values of `/metrics` at that instant.
//!
//! Unknown values are null, never 0. Counters have their true values: they do not start at 0 as in `/metrics`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::response::Json;
use sampler_core::device::Reason;
use sampler_core::snapshot::ContainerWaits;
use sampler_core::units::{WallTime, rfc3339};
use sampler_labels::Label;
use serde::{Deserialize, Serialize};
use strum::VariantArray as _;

use super::exposition::{ExportedContender, ExportedGpu, ExportedPair, Exposition};
use super::state::AppState;
use crate::health::HealthView;
use crate::health::condition::Condition;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LiveDocument {
    /// Time of the snapshot, RFC 3339.
    pub time: String,
    pub version: String,
    /// Host name of the machine.
    pub node: Option<String>,
    pub kernel_mode: String,
    /// Whether the PIDs that the driver reports are PIDs of this machine: local, foreign, unsettled or unverifiable.
    #[serde(default)]
    pub pid_space: String,
    #[serde(default)]
    pub kernel_events_lost: u64,
    #[serde(default)]
    pub resyncs: u64,
    pub degraded: Vec<Degraded>,
    pub gpus: Vec<LiveGpu>,
    /// One entry for each pair of a user and a GPU.
    pub users: Vec<LiveUser>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Degraded {
    pub what: String,
    /// Includes the remedy.
    pub message: String,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LiveGpu {
    pub uuid: String,
    pub index: u32,
    pub model: String,
    /// UUID of the GPU of a MIG device.
    pub gpu_uuid: Option<String>,
    /// False for a GPU in MIG mode: its MIG devices have the time and memory.
    pub is_leaf: bool,
    pub gone: bool,
    /// Busy share of the past 10 s.
    pub utilization_ratio: Option<f64>,
    /// Share of the past 10 s in which two or more users were active.
    pub coactive_ratio: Option<f64>,
    /// Standard error of a share of one half over the past 10 s, at the present rate of process queries; null while the GPU is idle.
    pub share_stderr_ratio: Option<f64>,
    pub memory_used_bytes: Option<u64>,
    pub memory_total_bytes: Option<u64>,
    pub power_watts: Option<f64>,
    pub temperature_celsius: Option<f64>,
    /// Seconds by state; null for a GPU in MIG mode.
    pub time_seconds: Option<BTreeMap<String, f64>>,
    /// Busy seconds that are not credited to a container, by reason; null for a GPU in MIG mode.
    pub unattributed_seconds: Option<BTreeMap<String, f64>>,
    /// RFC 3339.
    pub last_sample: Option<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LiveUser {
    /// container, pod, job, unit or login.
    #[serde(default = "container_kind")]
    pub kind: String,
    pub namespace: Option<String>,
    pub pod: Option<String>,
    pub container: Option<String>,
    /// Of a container; the short name of a job, unit or login session.
    pub name: Option<String>,
    pub image: Option<String>,
    /// The UID of a pod, the short name of a job, unit or login session.
    pub container_id: String,
    /// Of a job, unit or login session, as far as its processes show.
    #[serde(default)]
    pub owner: Option<String>,
    #[serde(default)]
    pub job_name: Option<String>,
    #[serde(default)]
    pub partition: Option<String>,
    /// Path of the cgroup.
    pub id: String,
    pub runtime: Option<String>,
    pub uuid: String,
    /// Index of the GPU, also for a MIG device.
    pub index: Option<u32>,
    /// Share of the past 10 s in which the container kept the GPU busy.
    pub duty_cycle_percent: Option<f64>,
    pub duty_cycle_stderr: Option<f64>,
    pub gpu_seconds: f64,
    pub gpu_seconds_stderr: f64,
    pub samples: u64,
    pub memory_used_bytes: Option<u64>,
    pub active_seconds: f64,
    pub coactive_seconds: f64,
    /// Sum of `contended_by`.
    pub contention_seconds: f64,
    /// Longest first.
    pub contended_by: Vec<LiveOther>,
    /// Null unless its processes have had wait probes.
    #[serde(default)]
    pub waits: Option<LiveWaits>,
    pub assigned: bool,
    /// Its last cgroup was removed; the entry stays for a while.
    pub gone: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LiveOther {
    /// container, pod, job, unit, login, host, unknown, or `_other` for all beyond the first eight.
    pub kind: String,
    pub namespace: Option<String>,
    pub pod: Option<String>,
    pub container: Option<String>,
    pub name: Option<String>,
    pub container_id: Option<String>,
    pub seconds: f64,
    /// Part of the user's `waits.pressure_ratio` that is attributed to it; absent where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pressure_ratio: Option<f64>,
}

/// Waiting in blocking calls of the driver library, of all processes of a user on all GPUs.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct LiveWaits {
    pub wait_seconds: f64,
    /// Time in which processes had probes.
    pub probed_seconds: f64,
    /// Part of the recent probed time that it waited beyond its own GPU time and what it waits alone; null without enough time to compare.
    pub pressure_ratio: Option<f64>,
    /// Standard error of it.
    pub pressure_stderr_ratio: Option<f64>,
}

impl From<ContainerWaits> for LiveWaits {
    fn from(waits: ContainerWaits) -> Self {
        let ContainerWaits { wait_seconds, probed_seconds, pressure_ratio, pressure_stderr } = waits;
        Self { wait_seconds, probed_seconds, pressure_ratio, pressure_stderr_ratio: pressure_stderr }
    }
}

impl LiveUser {
    pub fn is_container(&self) -> bool {
        !matches!(self.kind.as_str(), "pod" | "job" | "unit" | "login")
    }
}

fn container_kind() -> String {
    "container".to_owned()
}

fn known(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn live_gpu(gpu: &ExportedGpu) -> LiveGpu {
    let (view, info) = (&gpu.view, &gpu.view.info);
    let is_leaf = info.is_leaf();
    let t = view.time;
    let states = [("busy", gpu.busy_seconds), ("idle", t.idle), ("unobserved", t.unobserved), ("unsupported", t.unsupported)];
    let reasons = Reason::VARIANTS.iter().zip(view.unattributed);
    LiveGpu {
        uuid: info.uuid.to_string(),
        index: info.index,
        model: info.model.clone(),
        gpu_uuid: info.parent.as_ref().map(ToString::to_string),
        is_leaf,
        gone: view.gone.is_some(),
        utilization_ratio: view.utilization_ratio.filter(|_| is_leaf),
        coactive_ratio: view.coactive_ratio.filter(|_| is_leaf),
        share_stderr_ratio: view.expected_stderr_ratio.filter(|_| is_leaf),
        memory_used_bytes: view.readings.memory_used_bytes.filter(|_| is_leaf),
        memory_total_bytes: view.readings.memory_total_bytes.filter(|_| is_leaf),
        power_watts: view.readings.power_watts,
        temperature_celsius: view.readings.temperature_celsius,
        time_seconds: is_leaf.then(|| states.map(|(state, seconds)| (state.to_owned(), seconds)).into()),
        unattributed_seconds: is_leaf.then(|| reasons.map(|(reason, seconds)| (reason.name().to_owned(), seconds)).collect()),
        last_sample: view.last_sample.filter(|_| is_leaf).map(rfc3339),
    }
}

fn live_contender(contender: &ExportedContender) -> LiveOther {
    let is_container = contender.labels.as_ref().is_some_and(|labels| labels.host_user.is_none());
    let text = |label| known(contender.text(label)).filter(|_| is_container);
    let id = || known(&contender.container_id).filter(|_| contender.labels.is_some());
    LiveOther {
        kind: contender.kind().to_owned(),
        namespace: text(Label::Namespace),
        pod: text(Label::Pod),
        container: text(Label::Container),
        name: if is_container { text(Label::Name) } else { id() },
        container_id: id(),
        seconds: contender.seconds,
        pressure_ratio: contender.pressure_ratio,
    }
}

fn live_user(pair: &ExportedPair) -> LiveUser {
    let (labels, usage) = (&pair.labels, &pair.usage);
    let is_container = !pair.is_host_user();
    let text = |label| known(labels.text(label)).filter(|_| is_container);
    let details = labels.details.as_deref().cloned().unwrap_or_default();
    let mut contended_by: Vec<LiveOther> = pair.contenders.iter().map(live_contender).collect();
    contended_by.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    LiveUser {
        kind: labels.kind.user_kind().to_owned(),
        namespace: text(Label::Namespace),
        pod: text(Label::Pod),
        container: text(Label::Container),
        name: if is_container { text(Label::Name) } else { known(&pair.container_id) },
        image: text(Label::Image),
        owner: details.user_name,
        job_name: details.job_name,
        partition: details.partition,
        container_id: pair.container_id.to_string(),
        id: labels.id.to_string(),
        runtime: labels.runtime.map(|runtime| runtime.name().to_owned()),
        uuid: pair.gpu().to_string(),
        index: Some(pair.device.index),
        duty_cycle_percent: usage.duty_cycle_percent,
        duty_cycle_stderr: usage.duty_cycle_stderr,
        gpu_seconds: usage.seconds,
        gpu_seconds_stderr: usage.seconds_stderr,
        samples: usage.samples,
        memory_used_bytes: usage.memory_used_bytes,
        active_seconds: usage.active_seconds,
        coactive_seconds: usage.coactive_seconds,
        contention_seconds: contended_by.iter().fold(0.0, |sum, contender| sum + contender.seconds),
        contended_by,
        waits: pair.waits.map(LiveWaits::from),
        assigned: pair.assigned.is_some(),
        gone: pair.gone,
    }
}

impl LiveDocument {
    pub fn new(page: &Exposition, health: &HealthView, node: Option<&str>, wall: WallTime) -> Self {
        let degraded = |(condition, message): &(Condition, String)| Degraded { what: condition.key(), message: message.clone() };
        Self {
            time: rfc3339(wall),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: node.map(str::to_owned),
            kernel_mode: health.kernel_mode.to_owned(),
            pid_space: health.pid_space.name().to_owned(),
            kernel_events_lost: health.events_lost.sum(),
            resyncs: health.resyncs,
            degraded: health.degraded.iter().map(degraded).collect(),
            gpus: page.gpus.iter().map(live_gpu).collect(),
            users: page.pairs.iter().map(live_user).collect(),
        }
    }
}

pub async fn live(State(state): State<Arc<AppState>>) -> Json<LiveDocument> {
    state.refresh().await;
    let (page, wall) = state.view();
    Json(LiveDocument::new(&page, &state.health.view(), state.node.as_deref(), wall))
}
