//! A single table, for pipes and logs.

use super::names::share;
use super::rows::{Sort, TopRow, arrange};
use crate::cli::text::{DASH, bytes_or_dash, fit, left, percent_or_dash, right, terminal_safe, wrapped};
use crate::export::live::{LiveDocument, LiveGpu};
use unicode_width::UnicodeWidthStr as _;

const HEADS: [&str; 8] = ["USER", "GPU", "SHARE %", "GPU-SECONDS", "MEMORY", "PRESSURE", "CONTENTION S", "WITH"];
/// Exists only where wait probes are on.
const PRESSURE: usize = 5;
const WITH: usize = 7;
/// Columns of text; the others are numbers, which are aligned to the right.
const TEXT_COLUMNS: [usize; 3] = [0, 1, WITH];
/// The order in which columns are omitted if the terminal is too narrow.
const DISPENSABLE: [usize; 5] = [WITH, 4, 3, PRESSURE, 6];
const GAP: usize = 2;
/// Least width of a name.
const LEAST_NAME: usize = 16;

fn cells(row: &TopRow) -> [String; 8] {
    // Less is displayed as 0.0.
    let is_shown = |seconds: f64| seconds >= 0.05;
    let contenders = row.contenders.iter().filter(|(_, seconds)| is_shown(*seconds));
    let contenders: Vec<String> = contenders.map(|(name, seconds)| format!("{name} {seconds:.1}")).collect();
    [
        if row.user.gone { format!("{} (ended)", row.name) } else { row.name.clone() },
        row.gpu(),
        share(&row.user),
        format!("{:.2}", row.user.gpu_seconds),
        bytes_or_dash(row.user.memory_used_bytes),
        row.pressure(),
        format!("{:.1}", row.user.contention_seconds),
        if is_shown(row.user.contention_seconds) { contenders.join(", ") } else { DASH.into() },
    ]
}

fn gpu_line(gpu: &LiveGpu) -> String {
    let sum =
        |all: &Option<std::collections::BTreeMap<String, f64>>| all.as_ref().map(|all| all.values().fold(0.0, |a, b| a + b));
    let watts = gpu.power_watts.map(|watts| format!(", {watts:.0} W"));
    let celsius = gpu.temperature_celsius.map(|celsius| format!(", {celsius:.0} °C"));
    let unattributed = sum(&gpu.unattributed_seconds).map(|seconds| format!(", {seconds:.2} s unattributed"));
    let details: String = [watts, celsius, unattributed].into_iter().flatten().collect();
    let kind = if gpu.gpu_uuid.is_some() { "MIG device of GPU" } else { "GPU" };
    if gpu.gone {
        return format!("{kind} {} {}: gone", gpu.index, terminal_safe(&gpu.uuid));
    }
    if !gpu.is_leaf {
        return format!("{kind} {} {}: divided into MIG devices{details}", gpu.index, terminal_safe(&gpu.uuid));
    }
    let memory = format!("{} of {}", bytes_or_dash(gpu.memory_used_bytes), bytes_or_dash(gpu.memory_total_bytes));
    let (busy, shared) = (percent_or_dash(gpu.utilization_ratio), percent_or_dash(gpu.coactive_ratio));
    format!("{kind} {} {}: busy {busy}, shared {shared}, memory {memory}{details}", gpu.index, terminal_safe(&gpu.uuid))
}

/// `width` is that of the terminal; without one, nothing is truncated.
pub fn table(live: &LiveDocument, sort: Sort, filter: &str, width: Option<usize>, bold: bool) -> String {
    let rows = arrange(live, live.users.iter().map(TopRow::new).collect(), sort, filter);
    let cells: Vec<[String; 8]> = rows.iter().map(cells).collect();
    let mut widths = HEADS.map(str::width);
    for row in &cells {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.width());
        }
    }
    let has_waits = rows.iter().any(|row| row.user.waits.is_some());
    let mut columns: Vec<usize> = (0..HEADS.len()).filter(|n| has_waits || *n != PRESSURE).collect();
    let taken = |columns: &[usize], widths: &[usize; 8]| columns.iter().map(|n| widths[*n] + GAP).sum::<usize>() - GAP;
    if let Some(room) = width {
        for last in DISPENSABLE {
            let mut least = widths;
            least[0] = least[0].min(LEAST_NAME);
            // The list of contenders is truncated before it is omitted.
            least[WITH] = least[WITH].min(LEAST_NAME);
            if taken(&columns, &least) > room {
                columns.retain(|n| *n != last);
            }
        }
        for n in [WITH, 0] {
            let over = taken(&columns, &widths).saturating_sub(room);
            if columns.contains(&n) {
                widths[n] = widths[n].saturating_sub(over).max(LEAST_NAME.min(widths[n]));
            }
        }
    }
    let line = |cells: &[String]| {
        let cell = |n: &usize| {
            if TEXT_COLUMNS.contains(n) { left(&cells[*n], widths[*n]) } else { right(&cells[*n], widths[*n]) }
        };
        columns.iter().map(cell).collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let head = line(&HEADS.map(str::to_owned));
    let mut out = if bold { format!("\x1b[1m{head}\x1b[0m\n") } else { format!("{head}\n") };
    for row in &cells {
        out += &line(row);
        out.push('\n');
    }
    if rows.is_empty() {
        out += if live.users.is_empty() {
            "No container, job or unit has used a GPU since the agent started.\n"
        } else {
            "No row matches the filter.\n"
        };
    }
    let fitted = |text: &str| width.map_or_else(|| text.to_owned(), |width| fit(text, width));
    out.push('\n');
    // A GPU that is gone has no readings, but its containers still have rows.
    for gpu in &live.gpus {
        out += &format!("{}\n", fitted(&gpu_line(gpu)));
    }
    if live.gpus.iter().all(|gpu| gpu.gone) {
        out += "No GPU is visible; run `gpu-sampler doctor` for the reason.\n";
    }
    for condition in &live.degraded {
        out += &wrapped("", 0, &format!("degraded: {}: {}", condition.what, condition.message));
    }
    out
}
