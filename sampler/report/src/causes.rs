//! What else could explain that a container waited: each cause with its numbers, ruled out or not.

use super::gather::{Gathered, GatheredGpu};
use super::model::{Cause, CauseKind, Verdict};
use sampler_core::fact::User;
use sampler_core::observation::{CpuQuota, PressureFact};
use sampler_core::units::{BootNs, ContainerKey};

/// NVML's clocks event reasons, by what they are a sign of.
const POWER: u64 = 0x4 | 0x80;
const THERMAL: u64 = 0x20 | 0x40;
const CLOCKS: u64 = 0x2 | 0x8 | 0x10 | 0x100;
/// XIDs about memory errors (ECC, page retirement, row remapping).
const ECC_XIDS: [u64; 6] = [48, 63, 64, 92, 94, 95];

/// A part of the time above which a cause is possible.
const THROTTLED_RATIO: f64 = 0.01;
const QUOTA_RATIO: f64 = 0.01;
const CPU_RATIO: f64 = 0.10;
const MEMORY_RATIO: f64 = 0.01;
const IO_RATIO: f64 = 0.10;
/// Of the GPU's memory.
const FULL_RATIO: f64 = 0.95;
/// What is known of less than this part of the time rules nothing out.
const KNOWN_RATIO: f64 = 0.8;
/// Readings further apart say nothing about the time between.
const READINGS_NS: u64 = 10_000_000_000;

fn cause(cause: CauseKind, verdict: Verdict, detail: String) -> Cause {
    Cause { cause, verdict, detail }
}

/// Seconds for which some of the bits were set, and for which they were known.
pub fn throttled(gpu: &GatheredGpu, bits: u64, range: (BootNs, BootNs)) -> (f64, f64) {
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

fn of_clocks(gpu: &GatheredGpu, kind: CauseKind, bits: u64, range: (BootNs, BootNs)) -> Cause {
    let whole = range.1.saturating_since(range.0) as f64 * 1e-9;
    let (set, known) = throttled(gpu, bits, range);
    let names = sampler_core::device::THROTTLE_REASONS.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name);
    let names: Vec<&str> = names.collect();
    if set > THROTTLED_RATIO * whole {
        return cause(kind, Verdict::Possible, format!("{} for {set:.1} of {whole:.1} s", names.join(" or ")));
    }
    if known < KNOWN_RATIO * whole {
        return cause(kind, Verdict::Unknown, "the driver did not tell its clocks' event reasons".into());
    }
    cause(kind, Verdict::RuledOut, format!("no {} in {known:.1} s", names.join(", ")))
}

fn of_errors(gpu: &GatheredGpu) -> Cause {
    if gpu.xids.is_empty() {
        if gpu.readings.iter().all(|(_, readings)| *readings == Default::default()) {
            return cause(CauseKind::GpuError, Verdict::Unknown, "the device told nothing".into());
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

/// `called`: what a user is called.
fn of_memory(gpu: &GatheredGpu, range: (BootNs, BootNs), called: &dyn Fn(User) -> String) -> Cause {
    let kind = CauseKind::GpuMemory;
    let within = gpu.readings.iter().filter(|(at, _)| *at >= range.0 && *at <= range.1);
    let used = within.filter_map(|(at, r)| Some((*at, r.memory_used_bytes?, r.memory_total_bytes.filter(|total| *total > 0)?)));
    let Some((at, used, total)) = used.max_by_key(|(_, used, _)| *used) else {
        return cause(kind, Verdict::Unknown, "the driver did not tell its memory".into());
    };
    let ratio = used as f64 / total as f64;
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let told = format!("at most {:.1} of {:.1} GiB in use ({:.0} %)", gib(used), gib(total), 100.0 * ratio);
    if ratio < FULL_RATIO {
        return cause(kind, Verdict::RuledOut, told);
    }
    let held = gpu.held_at(at.plus(1)).into_iter().flatten();
    let mut held: Vec<(u64, User)> = held.filter_map(|(user, bytes)| Some(((*bytes)?, *user))).collect();
    held.sort_unstable_by(|a, b| b.cmp(a));
    let who = held.iter().take(3).map(|(bytes, user)| format!("{} {:.1} GiB", called(*user), gib(*bytes)));
    let who = who.collect::<Vec<_>>().join(", ");
    cause(kind, Verdict::Possible, if who.is_empty() { told } else { format!("{told}: {who}") })
}

/// How much a cumulative number grew in the range, and over how many seconds.
fn grew(facts: &[PressureFact], range: (BootNs, BootNs), of: impl Fn(&PressureFact) -> Option<u64>) -> Option<(u64, f64)> {
    let mut grown = 0u64;
    let mut seconds = 0.0;
    for pair in facts.windows(2) {
        let [a, b] = pair else { continue };
        if a.at < range.0 || b.at > range.1 {
            continue;
        }
        let (Some(before), Some(after)) = (of(a), of(b)) else { continue };
        // A container that was started again counts from zero.
        grown = u64::saturating_add(grown, after.checked_sub(before).unwrap_or(after));
        seconds += b.at.saturating_since(a.at) as f64 * 1e-9;
    }
    (seconds > 0.0).then_some((grown, seconds))
}

fn of_quota(facts: &[PressureFact], range: (BootNs, BootNs)) -> Cause {
    let kind = CauseKind::CpuQuota;
    let quota = |of: fn(&CpuQuota) -> u64| move |fact: &PressureFact| fact.cpu.as_ref().map(of);
    let Some((ns, seconds)) = grew(facts, range, quota(|cpu| cpu.throttled_ns)) else {
        return cause(kind, Verdict::Unknown, "its cgroup does not tell of throttling".into());
    };
    let limit = facts.iter().rev().find_map(|fact| fact.cpu?.limit_ns);
    let limit =
        limit.map_or("no limit".to_owned(), |(quota, period)| format!("limit {:.2} CPUs", quota as f64 / (period.max(1)) as f64));
    let periods = grew(facts, range, quota(|cpu| cpu.periods)).map_or(0, |(n, _)| n);
    let throttled = grew(facts, range, quota(|cpu| cpu.throttled_periods)).map_or(0, |(n, _)| n);
    let part = ns as f64 * 1e-9 / seconds;
    let told = format!("throttled {:.1} of {seconds:.0} s, in {throttled} of {periods} periods; {limit}", ns as f64 * 1e-9);
    let verdict = if part > QUOTA_RATIO { Verdict::Possible } else { Verdict::RuledOut };
    cause(kind, verdict, told)
}

fn of_pressure(
    kind: CauseKind,
    facts: &[PressureFact],
    range: (BootNs, BootNs),
    above: f64,
    of: impl Fn(&PressureFact) -> Option<u64>,
) -> Cause {
    let Some((ns, seconds)) = grew(facts, range, of) else {
        return cause(kind, Verdict::Unknown, "its cgroup has no pressure file".into());
    };
    let part = ns as f64 * 1e-9 / seconds;
    let told = format!("some of its tasks stalled for {:.1} % of {seconds:.0} s", 100.0 * part);
    cause(kind, if part > above { Verdict::Possible } else { Verdict::RuledOut }, told)
}

/// Of a user of that GPU, in that range.
pub fn causes(
    gathered: &Gathered,
    gpu: &GatheredGpu,
    container: Option<ContainerKey>,
    range: (BootNs, BootNs),
    called: &dyn Fn(User) -> String,
) -> Vec<Cause> {
    let mut all = vec![
        of_clocks(gpu, CauseKind::GpuClocks, CLOCKS, range),
        of_clocks(gpu, CauseKind::GpuPower, POWER, range),
        of_clocks(gpu, CauseKind::GpuThermal, THERMAL, range),
        of_errors(gpu),
        of_memory(gpu, range, called),
    ];
    let Some(key) = container else {
        let own = [CauseKind::CpuQuota, CauseKind::CpuPressure, CauseKind::MemoryPressure, CauseKind::IoPressure];
        all.extend(own.map(|kind| cause(kind, Verdict::Unknown, "not in a container: no cgroup of its own is followed".into())));
        return all;
    };
    let none = Vec::new();
    let facts = gathered.pressures.get(&key).unwrap_or(&none);
    all.push(of_quota(facts, range));
    all.push(of_pressure(CauseKind::CpuPressure, facts, range, CPU_RATIO, |fact| fact.cpu_some_ns));
    all.push(of_pressure(CauseKind::MemoryPressure, facts, range, MEMORY_RATIO, |fact| fact.memory_some_ns));
    all.push(of_pressure(CauseKind::IoPressure, facts, range, IO_RATIO, |fact| fact.io_some_ns));
    all
}
