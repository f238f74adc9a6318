//! What a reader should know first, in plain words. A slowdown is never claimed: GPU time is all that is seen.

use super::model::{Cause, CauseKind, Contender, Evidence, Finding, Report, Usage, UserReport, Verdict};

/// Sharing a saturated GPU for less is not worth a sentence.
const WORTH_SECONDS: f64 = 3.0;

fn possible(causes: &[Cause]) -> Vec<&Cause> {
    causes.iter().filter(|cause| cause.verdict == Verdict::Possible).collect()
}

fn beside(causes: &[Cause]) -> String {
    let possible: Vec<String> = possible(causes).iter().map(|c| format!("{} ({})", c.cause.name(), c.detail)).collect();
    let unknown = causes.iter().filter(|cause| cause.verdict == Verdict::Unknown).map(|c| c.cause.name());
    let unknown: Vec<&str> = unknown.collect();
    let mut words = if possible.is_empty() {
        " Nothing else that was looked at explains it".to_owned()
    } else {
        format!(" Also possible: {}", possible.join("; "))
    };
    if !unknown.is_empty() {
        words += &format!("; not known: {}", unknown.join(", "));
    }
    words + "."
}

fn confirmed(victim: &UserReport, other: &str, usage: &Usage, contender: &Contender) -> Option<String> {
    let (before, after, [least, most]) = (contender.rate_before?, contender.rate_after?, contender.interval?);
    Some(format!(
        "{} got less of the GPU while {other} was on: {before:.2} GPU-seconds per second without it, {after:.2} with it, over {} \
         changes; the drop is {least:.2} to {most:.2} (95 % interval), and the GPU was saturated then.{}",
        victim.called(),
        contender.transitions,
        beside(&usage.causes),
    ))
}

fn coactive(victim: &UserReport, other: &str, contender: &Contender) -> String {
    format!(
        "{} and {other} were active together for {:.0} s; while it was saturated {other} got {:.1} GPU-seconds of it. Whether \
         that kept {} waiting is not shown: {}.",
        victim.called(),
        contender.coactive_seconds,
        contender.saturated_gpu_seconds,
        victim.called(),
        contender.why_not_confirmed,
    )
}

fn own(victim: &UserReport, usage: &Usage) -> Option<String> {
    let kinds = [CauseKind::CpuQuota, CauseKind::CpuPressure, CauseKind::MemoryPressure, CauseKind::IoPressure];
    let of: Vec<&Cause> = possible(&usage.causes).into_iter().filter(|cause| kinds.contains(&cause.cause)).collect();
    if of.is_empty() {
        return None;
    }
    let words: Vec<String> = of.iter().map(|c| format!("{}: {}", c.cause.name(), c.detail)).collect();
    Some(format!("{} waited for something of its own, beside the GPU: {}.", victim.called(), words.join("; ")))
}

pub fn findings(report: &Report) -> Vec<Finding> {
    let mut all: Vec<(u8, f64, Finding)> = Vec::new();
    let other_called = |id: &str| report.user(id).map_or_else(|| id.to_owned(), UserReport::called);
    for gpu in &report.gpus {
        let limited: Vec<String> = report
            .users
            .iter()
            .flat_map(|user| &user.gpus)
            .find(|usage| usage.uuid == gpu.uuid && !usage.causes.is_empty())
            .into_iter()
            .flat_map(|usage| possible(&usage.causes))
            .filter(|cause| {
                matches!(
                    cause.cause,
                    CauseKind::GpuClocks
                        | CauseKind::GpuPower
                        | CauseKind::GpuThermal
                        | CauseKind::GpuError
                        | CauseKind::GpuMemory
                )
            })
            .map(|cause| format!("{}: {}", cause.cause.name(), cause.detail))
            .collect();
        if !limited.is_empty() {
            let text = format!("The GPU was limited itself, for everybody on it: {}.", limited.join("; "));
            let (uuid, victim) = (gpu.uuid.clone(), String::new());
            all.push((1, gpu.busy_seconds, Finding { uuid, victim, aggressor: None, evidence: None, text }));
        }
    }
    for user in &report.users {
        for usage in &user.gpus {
            let finding = |aggressor: Option<&str>, evidence, text| Finding {
                uuid: usage.uuid.clone(),
                victim: user.id.clone(),
                aggressor: aggressor.map(str::to_owned),
                evidence,
                text,
            };
            for contender in &usage.contenders {
                let other = other_called(&contender.id);
                if contender.evidence == Evidence::OnOffConfirmed
                    && let Some(text) = confirmed(user, &other, usage, contender)
                {
                    let drop = contender.rate_before.unwrap_or_default() - contender.rate_after.unwrap_or_default();
                    all.push((0, drop, finding(Some(&contender.id), Some(contender.evidence), text)));
                } else if contender.saturated_gpu_seconds >= WORTH_SECONDS && contender.coactive_seconds >= WORTH_SECONDS {
                    let text = coactive(user, &other, contender);
                    all.push((3, contender.saturated_gpu_seconds, finding(Some(&contender.id), Some(contender.evidence), text)));
                }
            }
            if let Some(text) = own(user, usage) {
                all.push((2, usage.gpu_seconds, finding(None, None, text)));
            }
        }
    }
    all.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
    all.into_iter().map(|(_, _, finding)| finding).collect()
}
