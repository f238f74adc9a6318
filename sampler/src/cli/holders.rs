//! `explain --gpu`: the holders of a GPU as text.

use unicode_width::UnicodeWidthStr as _;

use crate::cli::text::{bytes_or_dash, left, percent_or_dash, right, terminal_safe, user_name, wrapped};
use crate::export::gpu_holders::{GpuHolder, GpuHolders, UnplacedAssignment};

const HEADS: [&str; 5] = ["HOLDER", "KNOWN FROM", "GPU-SECONDS", "LAST 10 S", "MEMORY"];
/// Columns of text; the others are numbers, which are aligned to the right.
const TEXT_COLUMNS: usize = 2;

fn name(holder: &GpuHolder) -> String {
    match holder.kind.as_str() {
        "host" => return "processes of the host".to_owned(),
        "unknown" => return format!("unknown processes ({})", terminal_safe(&holder.container_id)),
        _ => {}
    }
    let name = if holder.kind != "container" && holder.pod.is_none() {
        terminal_safe(&holder.container_id)
    } else {
        user_name([&holder.namespace, &holder.pod, &holder.container, &holder.name], &holder.container_id, "?")
    };
    if holder.kind == "container" { name } else { format!("{name} ({})", terminal_safe(&holder.kind)) }
}

fn cells(holder: &GpuHolder, has_migs: bool) -> [String; HEADS.len()] {
    let device = if has_migs { format!(" on {}", terminal_safe(&holder.uuid)) } else { String::new() };
    [
        name(holder) + &device,
        if holder.known_from.is_empty() { "samples".to_owned() } else { terminal_safe(&holder.known_from.join(", ")) },
        format!("{:.2}", holder.gpu_seconds),
        percent_or_dash(holder.duty_cycle_percent.map(|percent| percent / 100.0)),
        bytes_or_dash(holder.memory_used_bytes),
    ]
}

fn unplaced_line(assignment: &UnplacedAssignment) -> String {
    let pod = match (&assignment.namespace, &assignment.pod, &assignment.pod_uid) {
        (Some(namespace), Some(pod), _) => format!("{namespace}/{pod}"),
        (.., Some(uid)) => format!("pod {uid}"),
        _ => "a pod".to_owned(),
    };
    let why =
        if assignment.reservation { "reserves the GPU for other pods" } else { "no running container is known by these names" };
    let UnplacedAssignment { container, resource, source, .. } = assignment;
    format!("{pod}, container {container}: {resource} by {source}; {why}")
}

pub fn text(gpu: &GpuHolders) -> String {
    let bus = gpu.pci_bus_id.as_ref().map_or(String::new(), |bus| format!("  {bus}"));
    let mut out =
        format!("GPU {}  {}  {}{}\n\n", gpu.index, terminal_safe(&gpu.uuid), terminal_safe(&gpu.model), terminal_safe(&bus));
    let rows: Vec<_> = gpu.holders.iter().map(|holder| cells(holder, !gpu.mig_devices.is_empty())).collect();
    if rows.is_empty() {
        out += "No user holds it: nothing is assigned to a running container, and the driver lists no process.\n";
    } else {
        let mut widths = HEADS.map(str::width);
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.width());
            }
        }
        for row in std::iter::once(&HEADS.map(str::to_owned)).chain(&rows) {
            let cells = row.iter().zip(widths).enumerate();
            let cells = cells.map(|(n, (cell, width))| if n < TEXT_COLUMNS { left(cell, width) } else { right(cell, width) });
            out += cells.collect::<Vec<_>>().join("  ").trim_end();
            out.push('\n');
        }
    }
    if !gpu.unplaced.is_empty() {
        out += "\nAssigned, but not to a running container:\n";
        for assignment in &gpu.unplaced {
            out += &wrapped("  ", 2, &unplaced_line(assignment));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_have_a_row_each_with_what_they_are_known_from() {
        let known_from = |sources: &[&str]| sources.iter().map(|source| (*source).to_owned()).collect();
        let trainer = GpuHolder {
            kind: "container".to_owned(),
            namespace: Some("ml".to_owned()),
            pod: Some("trainer".to_owned()),
            container: Some("main".to_owned()),
            known_from: known_from(&["checkpoint", "process-list"]),
            memory_used_bytes: Some(2 << 30),
            gpu_seconds: 12.3,
            duty_cycle_percent: Some(45.0),
            ..GpuHolder::default()
        };
        let job = GpuHolder {
            kind: "job".to_owned(),
            container_id: "slurm/7".to_owned(),
            known_from: known_from(&["process-list"]),
            ..GpuHolder::default()
        };
        let reservation = UnplacedAssignment {
            source: "checkpoint".to_owned(),
            resource: "nvidia.com/gpu".to_owned(),
            pod_uid: Some("u1".to_owned()),
            container: "reserve".to_owned(),
            reservation: true,
            ..UnplacedAssignment::default()
        };
        let mut gpu = GpuHolders { uuid: "GPU-1".to_owned(), model: "H100".to_owned(), ..GpuHolders::default() };
        assert_eq!(
            text(&gpu),
            "GPU 0  GPU-1  H100\n\nNo user holds it: nothing is assigned to a running container, and the driver lists no process.\n"
        );
        let host = GpuHolder {
            kind: "host".to_owned(),
            container_id: "host".to_owned(),
            known_from: known_from(&["process-list"]),
            ..GpuHolder::default()
        };
        (gpu.holders, gpu.unplaced) = (vec![trainer, job, host], vec![reservation]);
        let expect = "GPU 0  GPU-1  H100

HOLDER                 KNOWN FROM                GPU-SECONDS  LAST 10 S   MEMORY
ml/trainer/main        checkpoint, process-list        12.30       45 %  2.0 GiB
slurm/7 (job)          process-list                     0.00          –        –
processes of the host  process-list                     0.00          –        –

Assigned, but not to a running container:
  pod u1, container reserve: nvidia.com/gpu by checkpoint; reserves the GPU for other pods
";
        assert_eq!(text(&gpu), expect);
    }
}
