//! Causes other than contention that may explain why a container waited, each with its numbers and a verdict.

use super::gather::{Gathered, GatheredGpu};
use super::model::{Cause, CauseKind, Verdict};
use sampler_core::device::THROTTLE_REASONS;
use sampler_core::fact::User;
use sampler_core::observation::{CpuQuota, PressureFact};
use sampler_core::units::{BootNs, ContainerKey};

/// NVML's clocks event reasons, by what they indicate.
const POWER: u64 = 0x4 | 0x80;
const THERMAL: u64 = 0x20 | 0x40;
const CLOCKS: u64 = 0x2 | 0x8 | 0x10 | 0x100;
/// XIDs about memory errors (ECC, page retirement, row remapping).
const ECC_XIDS: [u64; 6] = [48, 63, 64, 92, 94, 95];

/// Fractions of the time above which a cause is possible.
const THROTTLED_RATIO: f64 = 0.01;
const QUOTA_RATIO: f64 = 0.01;
const CPU_RATIO: f64 = 0.10;
const MEMORY_RATIO: f64 = 0.01;
const IO_RATIO: f64 = 0.10;
/// Fraction of the GPU's memory in use from which a lack of memory is possible.
const FULL_RATIO: f64 = 0.95;
/// Readings that cover less than this fraction of the time rule nothing out.
const KNOWN_RATIO: f64 = 0.8;
/// Readings that are further apart do not cover the time between them.
const READINGS_NS: u64 = 10_000_000_000;

fn cause(cause: CauseKind, verdict: Verdict, detail: String) -> Cause {
    Cause { cause, verdict, detail }
}

/// Seconds in which any of these reasons was in force, and seconds for which that is known: by the driver's own counters, which have what is
/// shorter than the time between two readings, or by the readings of the reasons, if they show more.
pub fn throttled(gpu: &GatheredGpu, bits: u64, range: (BootNs, BootNs)) -> (f64, f64) {
    let (shown, known) = shown(gpu, bits, range);
    let (counted, counted_known) = counted(gpu, bits, range);
    (shown.max(counted), known.max(counted_known))
}

fn counted(gpu: &GatheredGpu, bits: u64, range: (BootNs, BootNs)) -> (f64, f64) {
    let reasons: Vec<usize> = (0..THROTTLE_REASONS.len()).filter(|n| THROTTLE_REASONS[*n].0 & bits != 0).collect();
    let (mut set, mut known) = (0.0, 0.0);
    for pair in gpu.throttle_times.windows(2) {
        let [(from, before), (to, after)] = pair else { continue };
        let whole = to.saturating_since(*from);
        let part = (*to).min(range.1).saturating_since((*from).max(range.0));
        if part == 0 || whole == 0 {
            continue;
        }
        let grown = reasons.iter().filter_map(|n| after.0[*n]?.checked_sub(before.0[*n]?)).max();
        // One that grows faster than time counts something else.
        let Some(grown) = grown.filter(|grown| *grown <= whole.saturating_mul(2)) else { continue };
        let covers_all = reasons.iter().all(|n| after.0[*n].is_some() && before.0[*n].is_some());
        let share = part as f64 / whole as f64;
        set += (grown as f64 * share).min(part as f64);
        known += if covers_all { part as f64 } else { 0.0 };
    }
    (set * 1e-9, known * 1e-9)
}

fn shown(gpu: &GatheredGpu, bits: u64, range: (BootNs, BootNs)) -> (f64, f64) {
    let (mut set, mut known) = (0u64, 0u64);
    for pair in gpu.readings.windows(2) {
        let [(from, _), (to, readings)] = pair else { continue };
        let (from, to) = ((*from).max(range.0), (*to).min(range.1));
        let ns = to.saturating_since(from);
        if let Some(mask) = readings.throttle_reasons.filter(|_| ns <= READINGS_NS) {
            known = u64::saturating_add(known, ns);
            set = u64::saturating_add(set, if mask & bits == 0 { 0 } else { ns });
        }
    }
    (set as f64 * 1e-9, known as f64 * 1e-9)
}

fn clocks(gpu: &GatheredGpu, kind: CauseKind, bits: u64, range: (BootNs, BootNs)) -> Cause {
    let whole = range.1.saturating_since(range.0) as f64 * 1e-9;
    let (set, known) = throttled(gpu, bits, range);
    let names = THROTTLE_REASONS.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name);
    let names: Vec<&str> = names.collect();
    if set > THROTTLED_RATIO * whole {
        return cause(kind, Verdict::Possible, format!("{} for {set:.1} of {whole:.1} s", names.join(" or ")));
    }
    if known < KNOWN_RATIO * whole {
        return cause(kind, Verdict::Unknown, "the driver did not report clocks event reasons for enough of the time".into());
    }
    cause(kind, Verdict::RuledOut, format!("no {} in {known:.1} s", names.join(", ")))
}

fn errors(gpu: &GatheredGpu) -> Cause {
    if gpu.xids.is_empty() {
        if gpu.readings.iter().all(|(_, readings)| *readings == Default::default()) {
            return cause(CauseKind::GpuError, Verdict::Unknown, "the device reported no readings".into());
        }
        return cause(CauseKind::GpuError, Verdict::RuledOut, "no XID was reported".into());
    }
    let mut counts: Vec<(u64, u64)> = Vec::new();
    for (_, xid, n) in &gpu.xids {
        match counts.iter_mut().find(|(known, _)| known == xid) {
            Some((_, sum)) => *sum = sum.saturating_add(*n),
            None => counts.push((*xid, *n)),
        }
    }
    let word = |(xid, n): &(u64, u64)| {
        let ecc = if ECC_XIDS.contains(xid) { " (memory error)" } else { "" };
        format!("XID {xid}{ecc} {n} times")
    };
    cause(CauseKind::GpuError, Verdict::Possible, counts.iter().map(word).collect::<Vec<_>>().join(", "))
}

/// `display_name`: the name of a user in the report.
fn gpu_memory(gpu: &GatheredGpu, range: (BootNs, BootNs), display_name: &dyn Fn(User) -> String) -> Cause {
    let kind = CauseKind::GpuMemory;
    let readings = gpu.readings.iter().filter(|(at, _)| *at >= range.0 && *at <= range.1);
    let used = readings.filter_map(|(at, r)| Some((*at, r.memory_used_bytes?, r.memory_total_bytes.filter(|total| *total > 0)?)));
    let Some((at, used, total)) = used.max_by_key(|(_, used, _)| *used) else {
        return cause(kind, Verdict::Unknown, "the driver did not report memory usage".into());
    };
    let ratio = used as f64 / total as f64;
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let detail = format!("at most {:.1} of {:.1} GiB in use ({:.0} %)", gib(used), gib(total), 100.0 * ratio);
    if ratio < FULL_RATIO {
        return cause(kind, Verdict::RuledOut, detail);
    }
    let held = gpu.held_at(at.plus(1)).into_iter().flatten();
    let mut held: Vec<(u64, User)> = held.filter_map(|(user, bytes)| Some(((*bytes)?, *user))).collect();
    held.sort_unstable_by(|a, b| b.cmp(a));
    let holders = held.iter().take(3).map(|(bytes, user)| format!("{} {:.1} GiB", display_name(*user), gib(*bytes)));
    let holders = holders.collect::<Vec<_>>().join(", ");
    cause(kind, Verdict::Possible, if holders.is_empty() { detail } else { format!("{detail}: {holders}") })
}

/// Growth of a cumulative counter within the range, and the seconds that it covers; `None` without two values.
fn growth(facts: &[PressureFact], range: (BootNs, BootNs), counter: impl Fn(&PressureFact) -> Option<u64>) -> Option<(u64, f64)> {
    let mut total = 0u64;
    let mut seconds = 0.0;
    for pair in facts.windows(2) {
        let [a, b] = pair else { continue };
        if a.at < range.0 || b.at > range.1 {
            continue;
        }
        let (Some(before), Some(after)) = (counter(a), counter(b)) else { continue };
        // The counters of a restarted container begin at zero.
        total = u64::saturating_add(total, after.checked_sub(before).unwrap_or(after));
        seconds += b.at.saturating_since(a.at) as f64 * 1e-9;
    }
    (seconds > 0.0).then_some((total, seconds))
}

/// Why the growth of a counter is not known. `absent`: the reason where the cgroup has no such counter.
fn unknown(kind: CauseKind, facts: &[PressureFact], counter: impl Fn(&PressureFact) -> Option<u64>, absent: &str) -> Cause {
    let is_read = facts.iter().any(|fact| counter(fact).is_some());
    // Containers that do not use their GPU are read once a minute.
    let detail = if is_read { "it was not read twice in this time" } else { absent };
    cause(kind, Verdict::Unknown, detail.into())
}

fn cpu_quota(facts: &[PressureFact], range: (BootNs, BootNs)) -> Cause {
    let kind = CauseKind::CpuQuota;
    let quota = |field: fn(&CpuQuota) -> u64| move |fact: &PressureFact| fact.cpu.as_ref().map(field);
    let throttled_ns = quota(|cpu| cpu.throttled_ns);
    let Some((ns, seconds)) = growth(facts, range, throttled_ns) else {
        return unknown(kind, facts, throttled_ns, "the cgroup does not report CPU throttling");
    };
    let limit = facts.iter().rev().find_map(|fact| fact.cpu?.limit_ns);
    let limit =
        limit.map_or("no limit".to_owned(), |(quota, period)| format!("limit {:.2} CPUs", quota as f64 / (period.max(1)) as f64));
    let periods = growth(facts, range, quota(|cpu| cpu.periods)).map_or(0, |(n, _)| n);
    let throttled = growth(facts, range, quota(|cpu| cpu.throttled_periods)).map_or(0, |(n, _)| n);
    let part = ns as f64 * 1e-9 / seconds;
    let detail = format!("throttled for {:.1} of {seconds:.0} s, in {throttled} of {periods} periods; {limit}", ns as f64 * 1e-9);
    let verdict = if part > QUOTA_RATIO { Verdict::Possible } else { Verdict::RuledOut };
    cause(kind, verdict, detail)
}

fn pressure(
    kind: CauseKind,
    facts: &[PressureFact],
    range: (BootNs, BootNs),
    threshold: f64,
    counter: impl Fn(&PressureFact) -> Option<u64>,
) -> Cause {
    let Some((ns, seconds)) = growth(facts, range, &counter) else {
        return unknown(kind, facts, counter, "the cgroup has no pressure file");
    };
    let part = ns as f64 * 1e-9 / seconds;
    let detail = format!("at least one task stalled for {:.1} % of {seconds:.0} s", 100.0 * part);
    cause(kind, if part > threshold { Verdict::Possible } else { Verdict::RuledOut }, detail)
}

/// All causes for a user of the GPU within the range; `container` is `None` for users that are not containers.
pub fn causes(
    gathered: &Gathered,
    gpu: &GatheredGpu,
    container: Option<ContainerKey>,
    range: (BootNs, BootNs),
    display_name: &dyn Fn(User) -> String,
) -> Vec<Cause> {
    let mut all = vec![
        clocks(gpu, CauseKind::GpuClocks, CLOCKS, range),
        clocks(gpu, CauseKind::GpuPower, POWER, range),
        clocks(gpu, CauseKind::GpuThermal, THERMAL, range),
        errors(gpu),
        gpu_memory(gpu, range, display_name),
    ];
    let Some(key) = container else {
        let detail = "not a container: the agent does not measure its cgroup";
        all.extend(CauseKind::OF_CONTAINER.map(|kind| cause(kind, Verdict::Unknown, detail.into())));
        return all;
    };
    let facts = gathered.pressures.get(&key).map(Vec::as_slice).unwrap_or_default();
    all.extend([
        cpu_quota(facts, range),
        pressure(CauseKind::CpuPressure, facts, range, CPU_RATIO, |fact| fact.cpu_some_ns),
        pressure(CauseKind::MemoryPressure, facts, range, MEMORY_RATIO, |fact| fact.memory_some_ns),
        pressure(CauseKind::IoPressure, facts, range, IO_RATIO, |fact| fact.io_some_ns),
    ]);
    all
}
