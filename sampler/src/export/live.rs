//! `/api/v1/live`: everything that `top` and the page show, in one document, with the values that `/metrics` has at that instant.
//!
//! What is not known is null, never 0; counters are at their true values, as they are for whoever does not compute increases.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::response::Json;
use sampler_core::device::Reason;
use sampler_core::units::{WallTime, rfc3339};
use sampler_labels::Label;
use serde::{Deserialize, Serialize};

use super::contenders::ContenderRow;
use super::ledger::{Exposition, GpuRow, PairRow};
use super::state::AppState;
use crate::health::HealthView;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LiveDocument {
    /// RFC 3339; when the agent took this picture.
    pub time: String,
    pub version: String,
    /// The machine, as it calls itself.
    pub node: Option<String>,
    pub kernel_mode: String,
    /// Whether the driver's pids are this machine's: local, foreign, unsettled or unverifiable.
    #[serde(default)]
    pub pid_space: String,
    pub degraded: Vec<Degraded>,
    pub gpus: Vec<LiveGpu>,
    /// A row for each container and GPU.
    pub users: Vec<LiveUser>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Degraded {
    pub what: String,
    /// With its remedy.
    pub message: String,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LiveGpu {
    pub uuid: String,
    pub index: u32,
    pub model: String,
    /// Of a MIG device: its GPU.
    pub gpu_uuid: Option<String>,
    /// False for a GPU in MIG mode: time and memory are its MIG devices'.
    pub is_leaf: bool,
    pub gone: bool,
    /// Of the last 10 s.
    pub utilization_ratio: Option<f64>,
    /// Part of the last 10 s in which two users or more were active.
    pub coactive_ratio: Option<f64>,
    /// Standard error of a share of one half over the last 10 s, at the present rate of process queries; null while the GPU is idle.
    pub share_stderr_ratio: Option<f64>,
    pub memory_used_bytes: Option<u64>,
    pub memory_total_bytes: Option<u64>,
    pub power_watts: Option<f64>,
    pub temperature_celsius: Option<f64>,
    /// Seconds by state; null where they are the MIG devices'.
    pub time_seconds: Option<BTreeMap<String, f64>>,
    /// Busy seconds that are on no container, by reason.
    pub unattributed_seconds: Option<BTreeMap<String, f64>>,
    /// RFC 3339.
    pub last_sample: Option<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LiveUser {
    pub namespace: Option<String>,
    pub pod: Option<String>,
    pub container: Option<String>,
    pub name: Option<String>,
    pub image: Option<String>,
    pub container_id: String,
    /// The cgroup's path.
    pub id: String,
    pub runtime: Option<String>,
    pub uuid: String,
    /// Of the GPU, or of the GPU that the MIG device is a part of.
    pub index: Option<u32>,
    /// Of the last 10 s.
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
    /// The longest first.
    pub contended_by: Vec<LiveOther>,
    pub assigned: bool,
    /// Its last cgroup was removed; the row stays for a while.
    pub gone: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LiveOther {
    /// container, host, unknown, or `_other` for all those beyond the first eight.
    pub kind: String,
    pub namespace: Option<String>,
    pub pod: Option<String>,
    pub container: Option<String>,
    pub name: Option<String>,
    pub container_id: Option<String>,
    pub seconds: f64,
}

fn known(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn gpu(row: &GpuRow) -> LiveGpu {
    let (view, info) = (&row.view, &row.view.info);
    let is_leaf = info.is_leaf();
    let t = view.time;
    let states = [("busy", row.busy_seconds), ("idle", t.idle), ("unobserved", t.unobserved), ("unsupported", t.unsupported)];
    let reasons = Reason::ALL.iter().zip(view.unattributed);
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

fn other(row: &ContenderRow) -> LiveOther {
    let is_container = row.kind() == "container";
    let text = |label| known(row.text(label)).filter(|_| is_container);
    LiveOther {
        kind: row.kind().to_owned(),
        namespace: text(Label::Namespace),
        pod: text(Label::Pod),
        container: text(Label::Container),
        name: text(Label::Name),
        container_id: known(&row.container_id).filter(|_| is_container),
        seconds: row.seconds,
    }
}

fn user(row: &PairRow, page: &Exposition) -> LiveUser {
    let (labels, pair) = (&row.labels, &row.pair);
    let text = |label| known(labels.text(label));
    let mut contended_by: Vec<LiveOther> = row.others.iter().map(other).collect();
    contended_by.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    LiveUser {
        namespace: text(Label::Namespace),
        pod: text(Label::Pod),
        container: text(Label::Container),
        name: text(Label::Name),
        image: text(Label::Image),
        container_id: row.container_id.to_string(),
        id: labels.id.to_string(),
        runtime: labels.runtime.map(|runtime| runtime.name().to_owned()),
        uuid: row.gpu.to_string(),
        index: page.gpus.iter().find(|gpu| gpu.view.info.uuid == row.gpu).map(|gpu| gpu.view.info.index),
        duty_cycle_percent: pair.duty_cycle_percent,
        duty_cycle_stderr: pair.duty_cycle_stderr,
        gpu_seconds: pair.seconds,
        gpu_seconds_stderr: pair.seconds_stderr,
        samples: pair.samples,
        memory_used_bytes: pair.memory_used_bytes,
        active_seconds: pair.active_seconds,
        coactive_seconds: pair.coactive_seconds,
        contention_seconds: contended_by.iter().fold(0.0, |sum, other| sum + other.seconds),
        contended_by,
        assigned: row.assigned,
        gone: row.gone,
    }
}

impl LiveDocument {
    pub fn new(page: &Exposition, health: &HealthView, node: Option<&str>, wall: WallTime) -> Self {
        let degraded = |(what, message): &(String, String)| Degraded { what: what.clone(), message: message.clone() };
        Self {
            time: rfc3339(wall),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: node.map(str::to_owned),
            kernel_mode: health.kernel_mode.to_owned(),
            pid_space: health.pid_space.name().to_owned(),
            degraded: health.degraded.iter().map(degraded).collect(),
            gpus: page.gpus.iter().map(gpu).collect(),
            users: page.rows.iter().map(|row| user(row, page)).collect(),
        }
    }
}

pub async fn answer(State(state): State<Arc<AppState>>) -> Json<LiveDocument> {
    let (page, wall) = state.view();
    Json(LiveDocument::new(&page, &state.health.view(), state.node.as_deref(), wall))
}
