//! The families that replace those of cAdvisor, with its labels.

use super::{Family, families};

const LABELS: &[&str] =
    &["acc_id", "make", "model", "id", "name", "image", "namespace", "pod", "pod_name", "container", "container_name"];

families! {
    in Accelerators;
    DUTY_CYCLE: Family::gauge("container_accelerator_duty_cycle", "percent", LABELS)
        .help("Share of the past 10 seconds in which the container kept the accelerator busy, in percent (0-100).")
        .absent("if nothing of these 10 seconds was observed");
    MEMORY_TOTAL: Family::gauge("container_accelerator_memory_total_bytes", "bytes", LABELS)
        .help("Total memory of the accelerator, in bytes.")
        .absent("if the driver does not report it");
    MEMORY_USED: Family::gauge("container_accelerator_memory_used_bytes", "bytes", LABELS)
        .help("Accelerator memory held by the processes of the container, in bytes.")
        .absent("if the driver does not report it");
}
