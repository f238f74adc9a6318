//! The rows as tables in HTML, and as JSON.

use sampler_core::device::{GpuInfo, Reason};
use sampler_labels::Label;
use serde::Serialize;

use super::ledger::{Exposition, PairRow};
use crate::health::HealthView;

#[derive(Serialize)]
pub struct ContainerJson<'a> {
    namespace: &'a str,
    pod: &'a str,
    container: &'a str,
    name: &'a str,
    image: &'a str,
    container_id: &'a str,
    id: &'a str,
    runtime: Option<&'static str>,
    pod_uid: Option<&'a str>,
    uuid: &'a str,
    gpu_uuid: Option<&'a str>,
    gpu_seconds: f64,
    gpu_seconds_stderr: f64,
    samples: u64,
    duty_cycle_percent: Option<f64>,
    duty_cycle_stderr: Option<f64>,
    memory_used_bytes: Option<u64>,
}

pub fn json(row: &PairRow) -> ContainerJson<'_> {
    let l = &row.labels;
    ContainerJson {
        namespace: l.text(Label::Namespace),
        pod: l.text(Label::Pod),
        container: l.text(Label::Container),
        name: l.text(Label::Name),
        image: l.text(Label::Image),
        container_id: &row.container_id,
        id: &l.id,
        runtime: l.runtime.map(|r| r.name()),
        pod_uid: l.pod_uid.as_deref(),
        uuid: &row.gpu.0,
        gpu_uuid: row.parent.as_ref().map(|parent| &*parent.0),
        gpu_seconds: row.pair.seconds,
        gpu_seconds_stderr: row.pair.seconds_stderr,
        samples: row.pair.samples,
        duty_cycle_percent: row.pair.duty_cycle_percent,
        duty_cycle_stderr: row.pair.duty_cycle_stderr,
        memory_used_bytes: row.pair.memory_used_bytes,
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Longer cells are cut for the eye; the whole is their tooltip.
const CELL_CHARS: usize = 40;

fn cells<const N: usize>(tag: &str, cells: [String; N]) -> String {
    let cell = |text: &String| {
        let whole = escape(text);
        match text.char_indices().nth(CELL_CHARS) {
            Some((end, _)) => format!("<{tag} title=\"{whole}\">{}…</{tag}>", escape(&text[..end])),
            None => format!("<{tag}>{whole}</{tag}>"),
        }
    };
    format!("<tr>{}</tr>\n", cells.iter().map(cell).collect::<String>())
}

fn index_of(page: &Exposition, row: &PairRow) -> String {
    let gpu = page.gpus.iter().find(|gpu| gpu.view.info.uuid == row.gpu);
    gpu.map_or_else(|| row.gpu.to_string(), |gpu| called(&gpu.view.info))
}

/// A GPU by its index, a MIG device by its GPU's and its own name.
fn called(info: &GpuInfo) -> String {
    match info.parent {
        None => info.index.to_string(),
        Some(_) => format!("{} {}", info.index, info.uuid),
    }
}

/// For browsers that run no scripts, and for curl.
pub fn tables(page: &Exposition, health: &HealthView) -> String {
    let mut body = String::new();
    for (key, message) in &health.degraded {
        body += &format!("<p class=bad><b>{}</b>: {}</p>\n", escape(key), escape(message));
    }
    body += "<h2>Containers</h2>\n<table>\n";
    body +=
        &cells("th", ["Namespace", "Pod", "Container", "Name", "GPU", "Busy %", "GPU-seconds", "Memory MiB"].map(String::from));
    for row in &page.rows {
        let l = &row.labels;
        let [namespace, pod, container, name] =
            [Label::Namespace, Label::Pod, Label::Container, Label::Name].map(|x| l.text(x).to_owned());
        let duty = match (row.pair.duty_cycle_percent, row.pair.duty_cycle_stderr) {
            (Some(percent), Some(error)) => format!("{percent:.1} ± {error:.1}"),
            (Some(percent), None) => format!("{percent:.1}"),
            _ => "–".into(),
        };
        let memory = row.pair.memory_used_bytes.map_or("–".into(), |b| (b >> 20).to_string());
        body += &cells(
            "td",
            [namespace, pod, container, name, index_of(page, row), duty, format!("{:.2}", row.pair.seconds), memory],
        );
    }
    if page.rows.is_empty() {
        body += "<tr><td colspan=8>No container has used a GPU since the agent started.</td></tr>\n";
    }
    body += "</table>\n<h2>GPUs</h2>\n<table>\n";
    let head = ["GPU", "UUID", "Model", "Busy s", "Idle s", "Unobserved s", "On no container s", "Why"];
    body += &cells("th", head.map(String::from));
    for gpu in page.gpus.iter().filter(|gpu| gpu.view.info.is_leaf()) {
        let (view, i) = (&gpu.view, &gpu.view.info);
        let unattributed: f64 = view.unattributed.iter().sum();
        let unobserved = view.time.unobserved + view.time.unsupported;
        let seconds = [gpu.busy_seconds, view.time.idle, unobserved, unattributed].map(|s| format!("{s:.2}"));
        let [busy, idle, unobserved, unattributed] = seconds;
        let why = Reason::ALL.iter().zip(view.unattributed).filter(|(_, s)| *s >= 0.005);
        let why: Vec<String> = why.map(|(reason, s)| format!("{} {s:.2}", reason.name())).collect();
        let name = [called(i), i.uuid.to_string(), i.model.clone()];
        let [index, uuid, model] = name;
        body += &cells("td", [index, uuid, model, busy, idle, unobserved, unattributed, why.join(", ")]);
    }
    body
}
