//! Compares two sessions: GPU time of each user per second of observed time, and whether the difference exceeds the sampling error.
//!
//! Only utilization is compared. That a user received less in B does not show why: it may have requested less.

mod matching;
mod text;

use std::collections::HashSet;

use serde::Serialize;

use super::model::*;
use super::words::Names;
pub use matching::{GpuMatch, UserMatch};
use matching::{Pair, gpu_pairs, user_pairs};
use sampler_core::units::rfc3339;

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The version of this shape.
    pub format: u32,
    pub a: SessionSide,
    pub b: SessionSide,
    pub gpus: Vec<GpuPair>,
    /// Users in both sessions, by difference, descending.
    pub users: Vec<UserPair>,
    pub only_a: Vec<UnmatchedUser>,
    pub only_b: Vec<UnmatchedUser>,
    /// Descriptions of users that were not matched because they are indistinguishable.
    pub ambiguous: Vec<String>,
}

/// One of the sessions, with the conditions that limit its numbers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SessionSide {
    pub node: String,
    pub start: String,
    pub duration_seconds: f64,
    pub truncated: bool,
    pub damage: Vec<String>,
    pub gaps: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GpuPair {
    pub matched_by: GpuMatch,
    pub uuid_a: String,
    pub uuid_b: String,
    pub index: u32,
    /// Fraction of the observed time; `None` if no time was observed.
    pub busy_ratio_a: Option<f64>,
    pub busy_ratio_b: Option<f64>,
    pub saturated_ratio_a: Option<f64>,
    pub saturated_ratio_b: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct UserPair {
    pub matched_by: UserMatch,
    pub kind: UserKind,
    pub name: String,
    pub id_a: String,
    pub id_b: String,
    /// Part of the probed time in which processes were inside blocking calls; `None` without wait probes.
    pub wait_ratio_a: Option<f64>,
    pub wait_ratio_b: Option<f64>,
    pub gpus: Vec<UsagePair>,
}

/// A user on one GPU, in A and in B.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct UsagePair {
    pub uuid_a: String,
    pub uuid_b: String,
    pub index: u32,
    pub a: Amount,
    pub b: Amount,
    /// B less A, in GPU-seconds per second.
    pub difference: Option<f64>,
    /// One standard error of the difference, of sampling only: variation of the workloads is not included.
    pub difference_stderr: Option<f64>,
    pub exceeds_two_errors: bool,
    pub evidence: Vec<EvidencePair>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Amount {
    /// GPU-seconds per second of observed time.
    pub rate: Option<f64>,
    pub rate_stderr: Option<f64>,
    pub share_of_busy: Option<f64>,
    /// Fraction of the seconds in which the user was active.
    pub coactive_ratio: Option<f64>,
    pub contended_ratio: Option<f64>,
    pub memory_max_bytes: Option<u64>,
}

/// The evidence of contention with one other user in both sessions; `None` if the other user is not a contender there.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvidencePair {
    pub other: String,
    pub a: Option<Evidence>,
    pub b: Option<Evidence>,
}

/// A user that is in only one of the sessions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct UnmatchedUser {
    pub kind: UserKind,
    pub id: String,
    pub name: String,
    pub gpu_seconds: f64,
}

impl Comparison {
    /// Pretty-printed, with a newline at the end.
    pub fn json(&self) -> String {
        super::json::json(self)
    }
}

impl UserPair {
    fn magnitude(&self) -> f64 {
        self.gpus.iter().filter_map(|pair| pair.difference).map(f64::abs).fold(0.0, f64::max)
    }
}

pub fn compare(a: &Report, b: &Report) -> Comparison {
    let gpus = gpu_pairs(a, b);
    let matched = user_pairs(a, b);
    let both = Both { names_a: Names::new(a), names_b: Names::new(b), users: &matched.pairs };
    let mut users: Vec<UserPair> = matched.pairs.iter().map(|(in_a, in_b, by)| both.user(in_a, in_b, *by, &gpus)).collect();
    users.sort_by(|one, other| other.magnitude().total_cmp(&one.magnitude()).then_with(|| one.name.cmp(&other.name)));
    let unmatched = |report: &Report, names: &Names, ids: &HashSet<&str>| {
        let users = report.users.iter().filter(|user| !ids.contains(user.id.as_str()));
        users.map(|user| unmatched_user(user, names)).collect()
    };
    Comparison {
        format: FORMAT,
        a: side(a),
        b: side(b),
        gpus: gpus.iter().map(|(in_a, in_b, by)| gpu_pair(in_a, in_b, *by)).collect(),
        only_a: unmatched(a, &both.names_a, &matched.ids_a),
        only_b: unmatched(b, &both.names_b, &matched.ids_b),
        users,
        ambiguous: matched.ambiguous,
    }
}

fn side(report: &Report) -> SessionSide {
    SessionSide {
        node: report.node.clone(),
        start: rfc3339(report.start),
        duration_seconds: report.duration_seconds,
        truncated: report.truncated,
        damage: report.damage.clone(),
        gaps: report.gaps.len(),
    }
}

fn unmatched_user(user: &UserReport, names: &Names) -> UnmatchedUser {
    let gpu_seconds = user.gpus.iter().map(|usage| usage.gpu_seconds).sum();
    UnmatchedUser { kind: user.kind, id: user.id.clone(), name: names.get(&user.id), gpu_seconds }
}

/// Observed time of the GPU. Rates refer to it, so that a gap does not count as idle.
fn observed_seconds(gpu: &GpuReport) -> f64 {
    gpu.busy_seconds + gpu.idle_seconds
}

fn ratio(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole)
}

fn wait_ratio(user: &UserReport) -> Option<f64> {
    user.waits.as_ref().and_then(|waits| ratio(waits.wait_seconds, waits.probed_seconds))
}

fn gpu_pair(a: &GpuReport, b: &GpuReport, matched_by: GpuMatch) -> GpuPair {
    GpuPair {
        matched_by,
        uuid_a: a.uuid.clone(),
        uuid_b: b.uuid.clone(),
        index: b.index,
        busy_ratio_a: ratio(a.busy_seconds, observed_seconds(a)),
        busy_ratio_b: ratio(b.busy_seconds, observed_seconds(b)),
        saturated_ratio_a: ratio(a.saturated_seconds, observed_seconds(a)),
        saturated_ratio_b: ratio(b.saturated_seconds, observed_seconds(b)),
    }
}

/// The usage of an observed GPU by a user without samples on it is zero, not unknown.
fn amount(usage: Option<&Usage>, gpu: &GpuReport) -> Amount {
    let whole = observed_seconds(gpu);
    let (seconds, stderr) = usage.map_or((0.0, 0.0), |usage| (usage.gpu_seconds, usage.gpu_seconds_stderr));
    Amount {
        rate: ratio(seconds, whole),
        rate_stderr: ratio(stderr, whole),
        share_of_busy: usage.and_then(|usage| usage.share_of_busy),
        coactive_ratio: usage.and_then(|usage| ratio(usage.coactive_seconds, usage.active_seconds)),
        contended_ratio: usage.and_then(|usage| ratio(usage.contended_seconds, usage.active_seconds)),
        memory_max_bytes: usage.and_then(|usage| usage.memory_max_bytes),
    }
}

struct Both<'a> {
    names_a: Names,
    names_b: Names,
    users: &'a [Pair<'a>],
}

impl Both<'_> {
    fn user(
        &self,
        a: &UserReport,
        b: &UserReport,
        matched_by: UserMatch,
        gpus: &[(&GpuReport, &GpuReport, GpuMatch)],
    ) -> UserPair {
        let usage = |user: &UserReport, uuid: &str| user.gpus.iter().find(|usage| usage.uuid == uuid).cloned();
        let pairs = gpus.iter().filter_map(|(gpu_a, gpu_b, _)| {
            let (in_a, in_b) = (usage(a, &gpu_a.uuid), usage(b, &gpu_b.uuid));
            (in_a.is_some() || in_b.is_some()).then(|| self.usage(gpu_a, gpu_b, in_a.as_ref(), in_b.as_ref()))
        });
        UserPair {
            matched_by,
            kind: b.kind,
            name: self.names_b.get(&b.id),
            id_a: a.id.clone(),
            id_b: b.id.clone(),
            wait_ratio_a: wait_ratio(a),
            wait_ratio_b: wait_ratio(b),
            gpus: pairs.collect(),
        }
    }

    fn usage(&self, gpu_a: &GpuReport, gpu_b: &GpuReport, in_a: Option<&Usage>, in_b: Option<&Usage>) -> UsagePair {
        let (a, b) = (amount(in_a, gpu_a), amount(in_b, gpu_b));
        let difference = b.rate.zip(a.rate).map(|(b, a)| b - a);
        let stderr = b.rate_stderr.zip(a.rate_stderr).map(|(b, a)| b.hypot(a));
        UsagePair {
            uuid_a: gpu_a.uuid.clone(),
            uuid_b: gpu_b.uuid.clone(),
            index: gpu_b.index,
            a,
            b,
            difference,
            difference_stderr: stderr,
            exceeds_two_errors: difference.zip(stderr).is_some_and(|(difference, stderr)| difference.abs() > 2.0 * stderr),
            evidence: self.evidence(in_a, in_b),
        }
    }

    /// The contenders with more than coactivity in A or B, or with different evidence in A and B.
    fn evidence<'u>(&self, in_a: Option<&'u Usage>, in_b: Option<&'u Usage>) -> Vec<EvidencePair> {
        let contenders = |usage: Option<&'u Usage>| usage.into_iter().flat_map(|usage| &usage.contenders);
        let evidence_of = |usage, id: &str| contenders(usage).find(|other| other.id == id).map(|other| other.evidence);
        let mut all = Vec::new();
        for contender in contenders(in_a) {
            let id_b = self.users.iter().find(|(a, ..)| a.id == contender.id).map(|(_, b, _)| b.id.as_str());
            let other = id_b.map_or_else(|| self.names_a.get(&contender.id), |id| self.names_b.get(id));
            all.push(EvidencePair { other, a: Some(contender.evidence), b: id_b.and_then(|id| evidence_of(in_b, id)) });
        }
        for contender in contenders(in_b) {
            let id_a = self.users.iter().find(|(_, b, _)| b.id == contender.id).map(|(a, ..)| a.id.as_str());
            if id_a.and_then(|id| evidence_of(in_a, id)).is_none() {
                all.push(EvidencePair { other: self.names_b.get(&contender.id), a: None, b: Some(contender.evidence) });
            }
        }
        all.retain(|pair| pair.a != pair.b || pair.a > Some(Evidence::Coactive));
        all
    }
}

#[cfg(test)]
mod tests;
