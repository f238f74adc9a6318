//! One table, for pipes, logs and who wants no more.

use super::rows::{Sort, TopRow, arrange};
use super::words::{DASH, bytes, fit, left, percent, right, share};
use crate::cli::output::{harmless, wrapped};
use crate::export::live::{LiveDocument, LiveGpu};
use unicode_width::UnicodeWidthStr as _;

const HEADS: [&str; 7] = ["CONTAINER", "GPU", "SHARE %", "GPU-SECONDS", "MEMORY", "CONTENTION S", "WITH"];
/// Those whose cells are words; numbers stand to the right.
const WORDS: [usize; 3] = [0, 1, 6];
/// The order in which columns are given up where there is no room for all.
const DISPENSABLE: [usize; 4] = [6, 4, 3, 5];
const GAP: usize = 2;
/// A name is not cut below this.
const LEAST_NAME: usize = 16;

fn cells(row: &TopRow) -> [String; 7] {
    let waits = row.user.contention_seconds >= 0.05;
    let by: Vec<String> = row.by.iter().filter(|(_, s)| *s >= 0.05).map(|(name, s)| format!("{name} {s:.1}")).collect();
    [
        if row.user.gone { format!("{} (ended)", row.name) } else { row.name.clone() },
        row.gpu(),
        share(&row.user),
        format!("{:.2}", row.user.gpu_seconds),
        bytes(row.user.memory_used_bytes),
        format!("{:.1}", row.user.contention_seconds),
        if waits { by.join(", ") } else { DASH.into() },
    ]
}

fn gpu(gpu: &LiveGpu) -> String {
    let sum =
        |all: &Option<std::collections::BTreeMap<String, f64>>| all.as_ref().map(|all| all.values().fold(0.0, |a, b| a + b));
    let watts = gpu.power_watts.map(|watts| format!(", {watts:.0} W"));
    let celsius = gpu.temperature_celsius.map(|celsius| format!(", {celsius:.0} °C"));
    let nobody = sum(&gpu.unattributed_seconds).map(|seconds| format!(", {seconds:.2} s on no container"));
    let more: String = [watts, celsius, nobody].into_iter().flatten().collect();
    let what = if gpu.gpu_uuid.is_some() { "MIG device of GPU" } else { "GPU" };
    if !gpu.is_leaf {
        return format!("{what} {} {}: divided into MIG devices{more}", gpu.index, harmless(&gpu.uuid));
    }
    let memory = format!("{} of {}", bytes(gpu.memory_used_bytes), bytes(gpu.memory_total_bytes));
    let (busy, shared) = (percent(gpu.utilization_ratio), percent(gpu.coactive_ratio));
    format!("{what} {} {}: busy {busy}, shared {shared}, memory {memory}{more}", gpu.index, harmless(&gpu.uuid))
}

/// `width` is a terminal's; elsewhere nothing is cut.
pub fn table(live: &LiveDocument, sort: Sort, filter: &str, width: Option<usize>, bold: bool) -> String {
    let rows = arrange(live, live.users.iter().map(TopRow::new).collect(), sort, filter);
    let cells: Vec<[String; 7]> = rows.iter().map(cells).collect();
    let mut widths = HEADS.map(str::width);
    for row in &cells {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.width());
        }
    }
    let mut columns: Vec<usize> = (0..HEADS.len()).collect();
    let taken = |columns: &[usize], widths: &[usize; 7]| columns.iter().map(|n| widths[*n] + GAP).sum::<usize>() - GAP;
    if let Some(room) = width {
        for last in DISPENSABLE {
            let mut least = widths;
            least[0] = least[0].min(LEAST_NAME);
            // Whom it waited for is cut before it is left out.
            least[6] = least[6].min(LEAST_NAME);
            if taken(&columns, &least) > room {
                columns.retain(|n| *n != last);
            }
        }
        for n in [6, 0] {
            let over = taken(&columns, &widths).saturating_sub(room);
            if columns.contains(&n) {
                widths[n] = widths[n].saturating_sub(over).max(LEAST_NAME.min(widths[n]));
            }
        }
    }
    let line = |cells: &[String]| {
        let one = |n: &usize| if WORDS.contains(n) { left(&cells[*n], widths[*n]) } else { right(&cells[*n], widths[*n]) };
        columns.iter().map(one).collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let head = line(&HEADS.map(str::to_owned));
    let mut out = if bold { format!("\x1b[1m{head}\x1b[0m\n") } else { format!("{head}\n") };
    for row in &cells {
        out += &line(row);
        out.push('\n');
    }
    if rows.is_empty() {
        out += if live.users.is_empty() {
            "No container has used a GPU since the agent started.\n"
        } else {
            "No row has these words.\n"
        };
    }
    let whole = |text: &str| width.map_or_else(|| text.to_owned(), |width| fit(text, width));
    out.push('\n');
    for one in live.gpus.iter().filter(|gpu| !gpu.gone) {
        out += &format!("{}\n", whole(&gpu(one)));
    }
    if live.gpus.is_empty() {
        out += "No GPU is seen; `gpu-sampler doctor` says why.\n";
    }
    for one in &live.degraded {
        out += &wrapped("", 0, &format!("degraded: {}: {}", one.what, one.message));
    }
    out
}
