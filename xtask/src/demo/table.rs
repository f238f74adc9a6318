//! Makes the table on the screen from a metrics page, and checks the result at the end.

use super::{exposition::Sample, workloads::Spec};
use std::{
    collections::BTreeMap,
    io::{self, Write as _},
};

/// One container on one GPU.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    namespace: String,
    pod: String,
    container: String,
    gpu: String,
}

#[derive(Debug, Default, Clone)]
struct Row {
    duty_percent: Option<f64>,
    gpu_seconds: Option<f64>,
    memory_bytes: Option<f64>,
}

#[derive(Debug, Default, Clone)]
struct Device {
    index: String,
    busy_s: f64,
    idle_s: f64,
    unattributed_s: f64,
    reasons: Vec<(String, f64)>,
}

/// The contents of one page.
#[derive(Debug, Default)]
pub struct View {
    rows: BTreeMap<Key, Row>,
    devices: BTreeMap<String, Device>,
}

impl View {
    pub fn new(samples: &[Sample]) -> Self {
        let mut view = Self::default();
        for sample in samples {
            match sample.name.as_str() {
                "container_accelerator_duty_cycle" => view.row(sample, "acc_id").duty_percent = Some(sample.value),
                "container_accelerator_memory_used_bytes" => view.row(sample, "acc_id").memory_bytes = Some(sample.value),
                "container_gpu_seconds_total" => {
                    // A restarted container has several ids and one row.
                    *view.row(sample, "uuid").gpu_seconds.get_or_insert(0.0) += sample.value;
                }
                "gpu_info" => view.device(sample).index = sample.label("index").to_owned(),
                "gpu_time_seconds_total" => match sample.label("state") {
                    "busy" => view.device(sample).busy_s = sample.value,
                    "idle" => view.device(sample).idle_s = sample.value,
                    _ => {}
                },
                "gpu_unattributed_seconds_total" => {
                    let device = view.device(sample);
                    device.unattributed_s += sample.value;
                    if sample.value > 0.0 {
                        device.reasons.push((sample.label("reason").to_owned(), sample.value));
                    }
                }
                _ => {}
            }
        }
        view
    }

    fn row(&mut self, sample: &Sample, gpu: &str) -> &mut Row {
        let text = |name: &str| sample.label(name).to_owned();
        let key = Key { namespace: text("namespace"), pod: text("pod"), container: text("container"), gpu: text(gpu) };
        self.rows.entry(key).or_default()
    }

    fn device(&mut self, sample: &Sample) -> &mut Device {
        self.devices.entry(sample.label("uuid").to_owned()).or_default()
    }

    pub fn has_devices(&self) -> bool {
        self.devices.values().any(|device| device.busy_s + device.idle_s > 0.0)
    }

    /// One line for each expected workload that lacks its labels or its GPU time.
    pub fn missing(&self, expected: &[Spec]) -> Vec<String> {
        let problem = |spec: &Spec| {
            let mut rows = self
                .rows
                .iter()
                .filter(|(key, _)| key.namespace == spec.namespace && key.pod == spec.pod && key.container == spec.container);
            let name = format!("{}/{}/{}", spec.namespace, spec.pod, spec.container);
            match rows.next() {
                None => Some(format!("{name}: not in the metrics with its namespace, pod and container")),
                Some((_, row)) if row.gpu_seconds.unwrap_or_default() <= 0.0 => {
                    Some(format!("{name}: has its labels but no GPU-seconds"))
                }
                Some(_) => None,
            }
        };
        expected.iter().filter_map(problem).collect()
    }

    pub fn lines(&self, page: &str) -> Vec<String> {
        let header = ["NAMESPACE", "POD", "CONTAINER", "GPU", "SHARE%", "GPU-SECONDS", "MEMORY"].map(str::to_owned);
        let mut cells = vec![header];
        for (key, row) in &self.rows {
            let gpu = self.devices.get(&key.gpu).map_or("", |device| device.index.as_str());
            cells.push([
                or_dash(&key.namespace),
                or_dash(&key.pod),
                or_dash(&key.container),
                or_dash(if gpu.is_empty() { &key.gpu } else { gpu }),
                row.duty_percent.map_or("-".into(), |percent| format!("{percent:.1}")),
                row.gpu_seconds.map_or("-".into(), |seconds| format!("{seconds:.2}")),
                row.memory_bytes.map_or("-".into(), size),
            ]);
        }
        let width = |column: usize| cells.iter().map(|line| line[column].chars().count()).max().unwrap_or_default();
        let widths: [usize; 7] = std::array::from_fn(width);
        let mut lines: Vec<String> = cells
            .iter()
            .map(|line| {
                let padded = line.iter().zip(widths).enumerate().map(|(column, (cell, width))| match column {
                    0..=3 => format!("{cell:<width$}"),
                    _ => format!("{cell:>width$}"),
                });
                padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
            })
            .collect();
        lines.push(String::new());
        for (uuid, device) in &self.devices {
            let Device { index, busy_s, idle_s, unattributed_s, reasons } = device;
            let reasons: Vec<String> = reasons.iter().map(|(reason, seconds)| format!("{reason} {seconds:.2} s")).collect();
            let reasons = if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join(", ")) };
            let index = or_dash(index);
            lines.push(format!(
                "GPU {index} {uuid}: busy {busy_s:.2} s, idle {idle_s:.2} s, unattributed {unattributed_s:.2} s{reasons}"
            ));
        }
        lines.push(page.to_owned());
        lines
    }
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.into() }
}

fn size(bytes: f64) -> String {
    const MIB: f64 = 1024.0 * 1024.0;
    if bytes >= 1024.0 * MIB { format!("{:.1} GiB", bytes / 1024.0 / MIB) } else { format!("{:.0} MiB", bytes / MIB) }
}

/// A table that is drawn over the previous one.
#[derive(Default)]
pub struct Screen {
    drawn: usize,
}

impl Screen {
    pub fn draw(&mut self, lines: &[String]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if self.drawn > 0 {
            write!(out, "\x1b[{}A\x1b[J", self.drawn)?;
        }
        // Lines are cut in a narrow terminal: a wrapped line would take two rows.
        write!(out, "\x1b[?7l")?;
        for line in lines {
            writeln!(out, "{line}")?;
        }
        write!(out, "\x1b[?7h")?;
        self.drawn = lines.len();
        out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::exposition::parse;

    const PAGE: &str = r#"
container_accelerator_duty_cycle{acc_id="GPU-1",namespace="prod",pod="p-0",container="c"} 61.25
container_accelerator_memory_used_bytes{acc_id="GPU-1",namespace="prod",pod="p-0",container="c"} 2147483648
container_gpu_seconds_total{uuid="GPU-1",namespace="prod",pod="p-0",container="c",container_id="a"} 6
container_gpu_seconds_total{uuid="GPU-1",namespace="prod",pod="p-1",container="c",container_id="b"} 0
gpu_info{uuid="GPU-1",index="0"} 1
gpu_time_seconds_total{uuid="GPU-1",state="busy"} 6.5
gpu_time_seconds_total{uuid="GPU-1",state="idle"} 3.5
gpu_unattributed_seconds_total{uuid="GPU-1",reason="host"} 0.5
gpu_unattributed_seconds_total{uuid="GPU-1",reason="lost"} 0
"#;

    fn spec(pod: &'static str) -> Spec {
        Spec { namespace: "prod", pod, container: "c", demand: "0.1" }
    }

    #[test]
    fn a_page_is_rendered_as_a_table() {
        let lines = View::new(&parse(PAGE)).lines("metrics: http://x");
        assert_eq!(
            lines,
            [
                "NAMESPACE  POD  CONTAINER  GPU  SHARE%  GPU-SECONDS   MEMORY",
                "prod       p-0  c          0      61.2         6.00  2.0 GiB",
                "prod       p-1  c          0         -         0.00        -",
                "",
                "GPU 0 GPU-1: busy 6.50 s, idle 3.50 s, unattributed 0.50 s (host 0.50 s)",
                "metrics: http://x",
            ]
        );
    }

    #[test]
    fn missing_workloads_are_named() {
        let view = View::new(&parse(PAGE));
        assert!(view.missing(&[spec("p-0")]).is_empty());
        assert_eq!(view.missing(&[spec("p-1")]), ["prod/p-1/c: has its labels but no GPU-seconds"]);
        assert_eq!(view.missing(&[spec("p-2")]).len(), 1);
        assert!(view.has_devices());
        assert!(!View::default().has_devices());
    }
}
