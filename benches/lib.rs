//! Shared by the benches: one line per measurement, with its target; and the kernel's figures about programs and maps.

use std::path::Path;

use anyhow::{Context as _, Result};
use gpu_sampler_tests::{Sample, sum};

/// Whether the bench of this name is selected: without filters, or if the name contains one. `cargo bench` passes options of its own.
pub fn wanted(name: &str) -> bool {
    let mut filters = std::env::args().skip(1).filter(|word| !word.starts_with('-')).peekable();
    filters.peek().is_none() || filters.any(|filter| name.contains(&filter))
}

/// `aim` is in the same unit; the last column is the value relative to it.
pub fn line(name: &str, value: f64, unit: &str, aim: Option<f64>) {
    let aim = aim.map_or(String::new(), |aim| format!("aim {aim} {unit}   x{:.2}", value / aim));
    println!("{name:<58} {value:>10.2} {unit:<5} {aim}");
}

/// The quantile `part` of a sorted list.
pub fn quantile(sorted: &[f64], part: f64) -> f64 {
    let at = ((sorted.len() as f64 - 1.0) * part).round() as usize;
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

/// The sum of a family; 0 if it has no series.
pub fn total(page: &[Sample], name: &str) -> f64 {
    sum(page, name, &[]).unwrap_or_default()
}

/// The smallest bucket bound of a histogram below which this share of its observations lies.
pub fn at_most(page: &[Sample], name: &str, part: f64) -> Result<f64> {
    let count = total(page, &format!("{name}_count"));
    let bucket = format!("{name}_bucket");
    let bound = |s: &Sample| s.labels.get("le").and_then(|le| le.parse::<f64>().ok());
    let within = page.iter().filter(|s| s.name == bucket && s.value >= part * count);
    within.filter_map(bound).min_by(f64::total_cmp).with_context(|| format!("{name} has observations"))
}

/// Sums over all BPF descriptors of a process.
#[derive(Clone, Copy, Debug, Default)]
pub struct BpfUse {
    /// Run time of the programs, which the kernel counts while `kernel.bpf_stats_enabled` is 1.
    pub run_time_ns: u64,
    pub runs: u64,
    /// Memory that the kernel charges for maps.
    pub map_bytes: u64,
    pub largest_map_bytes: u64,
}

pub fn bpf_use(pid: u32) -> Result<BpfUse> {
    let mut total = BpfUse::default();
    let mut seen = std::collections::HashSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo"))?.flatten() {
        // A descriptor that was closed meanwhile is skipped.
        let info = std::fs::read_to_string(entry.path()).unwrap_or_default();
        let number = |key: &str| -> Option<u64> { info.lines().find_map(|l| l.strip_prefix(key))?.trim().parse().ok() };
        let id = number("prog_id:").map(|id| (0, id)).or_else(|| number("map_id:").map(|id| (1, id)));
        // A program has a second descriptor for its link.
        let Some(id) = id.filter(|_| number("memlock:").is_some()) else { continue };
        if !seen.insert(id) {
            continue;
        }
        total.run_time_ns += number("run_time_ns:").unwrap_or(0);
        total.runs += number("run_cnt:").unwrap_or(0);
        if id.0 == 1 {
            let bytes = number("memlock:").unwrap_or(0);
            total.map_bytes += bytes;
            total.largest_map_bytes = total.largest_map_bytes.max(bytes);
        }
    }
    Ok(total)
}

/// A sysctl that is restored when this is dropped.
pub struct Sysctl {
    path: std::path::PathBuf,
    before: String,
}

impl Sysctl {
    pub fn set(name: &str, value: &str) -> Result<Self> {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        let before = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        std::fs::write(&path, value).with_context(|| format!("{} = {value}", path.display()))?;
        Ok(Self { path, before })
    }
}

impl Drop for Sysctl {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(&self.path, &self.before) {
            eprintln!("{}: {error}", self.path.display());
        }
    }
}
