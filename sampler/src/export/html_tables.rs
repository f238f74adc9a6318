//! The exposition as HTML tables, and the pairs as JSON.

use sampler_core::device::{GpuInfo, Reason};
use sampler_labels::Label;
use sampler_report::html_escape;
use serde::Serialize;
use strum::VariantArray as _;

use super::exposition::{ExportedPair, Exposition};
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

pub fn json(pair: &ExportedPair) -> ContainerJson<'_> {
    let (l, usage) = (&pair.labels, &pair.usage);
    ContainerJson {
        namespace: l.text(Label::Namespace),
        pod: l.text(Label::Pod),
        container: l.text(Label::Container),
        name: l.text(Label::Name),
        image: l.text(Label::Image),
        container_id: &pair.container_id,
        id: &l.id,
        runtime: l.runtime.map(|r| r.name()),
        pod_uid: l.pod_uid.as_deref(),
        uuid: &pair.gpu().0,
        gpu_uuid: pair.device.parent.as_ref().map(|parent| &*parent.0),
        gpu_seconds: usage.seconds,
        gpu_seconds_stderr: usage.seconds_stderr,
        samples: usage.samples,
        duty_cycle_percent: usage.duty_cycle_percent,
        duty_cycle_stderr: usage.duty_cycle_stderr,
        memory_used_bytes: usage.memory_used_bytes,
    }
}

/// Longer cells are truncated; the whole text is their tooltip.
const CELL_CHARS: usize = 40;

fn cells(tag: &str, cells: &[String]) -> String {
    let cell = |text: &String| {
        let full = html_escape(text);
        match text.char_indices().nth(CELL_CHARS) {
            Some((end, _)) => format!("<{tag} title=\"{full}\">{}…</{tag}>", html_escape(&text[..end])),
            None => format!("<{tag}>{full}</{tag}>"),
        }
    };
    format!("<tr>{}</tr>\n", cells.iter().map(cell).collect::<String>())
}

/// A GPU by its index, a MIG device by the index of its GPU and its own UUID.
fn device_name(info: &GpuInfo) -> String {
    match info.parent {
        None => info.index.to_string(),
        Some(_) => format!("{} {}", info.index, info.uuid),
    }
}

fn wait_cells(pair: &ExportedPair) -> [String; 3] {
    let Some(waits) = pair.waits else { return std::array::from_fn(|_| "–".into()) };
    let pressure = waits.pressure_ratio.map_or("–".into(), |ratio| format!("{:.0}", ratio * 100.0));
    [format!("{:.2}", waits.wait_seconds), format!("{:.2}", waits.probed_seconds), pressure]
}

/// For browsers without scripts, and for curl.
pub fn tables(page: &Exposition, health: &HealthView) -> String {
    let mut body = String::new();
    for (condition, message) in &health.degraded {
        body += &format!("<p class=bad><b>{}</b>: {}</p>\n", html_escape(&condition.key()), html_escape(message));
    }
    body += "<h2>Users</h2>\n<table>\n";
    // Only where wait probes are on.
    let has_waits = page.pairs.iter().any(|pair| pair.waits.is_some());
    let mut heads = vec!["Kind", "Namespace", "Pod", "Container", "Name", "GPU", "Share %", "GPU-seconds", "Memory MiB"];
    if has_waits {
        heads.extend(["Waited s", "Probed s", "Pressure %"]);
    }
    body += &cells("th", &heads.into_iter().map(String::from).collect::<Vec<_>>());
    for pair in &page.pairs {
        let (l, usage) = (&pair.labels, &pair.usage);
        let [namespace, pod, container, mut name] =
            [Label::Namespace, Label::Pod, Label::Container, Label::Name].map(|x| l.text(x).to_owned());
        if pair.is_host_user() {
            name = pair.container_id.to_string();
        }
        let duty = match (usage.duty_cycle_percent, usage.duty_cycle_stderr) {
            (Some(percent), Some(error)) => format!("{percent:.1} ± {error:.1}"),
            (Some(percent), None) => format!("{percent:.1}"),
            _ => "–".into(),
        };
        let memory = usage.memory_used_bytes.map_or("–".into(), |b| (b >> 20).to_string());
        let mut row = vec![
            l.kind.user_kind().to_owned(),
            namespace,
            pod,
            container,
            name,
            device_name(&pair.device),
            duty,
            format!("{:.2}", usage.seconds),
            memory,
        ];
        if has_waits {
            row.extend(wait_cells(pair));
        }
        body += &cells("td", &row);
    }
    if page.pairs.is_empty() {
        body += "<tr><td colspan=9>No container, job or unit has used a GPU since the agent started.</td></tr>\n";
    }
    body += "</table>\n<h2>GPUs</h2>\n<table>\n";
    let head = ["GPU", "UUID", "Model", "Busy s", "Idle s", "Unobserved s", "Unattributed s", "Reasons"];
    body += &cells("th", &head.map(String::from));
    for gpu in page.gpus.iter().filter(|gpu| gpu.view.info.is_leaf()) {
        let (view, i) = (&gpu.view, &gpu.view.info);
        let unattributed: f64 = view.unattributed.iter().sum();
        let unobserved = view.time.unobserved + view.time.unsupported;
        let seconds = [gpu.busy_seconds, view.time.idle, unobserved, unattributed].map(|s| format!("{s:.2}"));
        let [busy, idle, unobserved, unattributed] = seconds;
        let reasons = Reason::VARIANTS.iter().zip(view.unattributed).filter(|(_, s)| *s >= 0.005);
        let reasons: Vec<String> = reasons.map(|(reason, s)| format!("{} {s:.2}", reason.name())).collect();
        let (name, uuid, model) = (device_name(i), i.uuid.to_string(), i.model.clone());
        body += &cells("td", &[name, uuid, model, busy, idle, unobserved, unattributed, reasons.join(", ")]);
    }
    body
}
