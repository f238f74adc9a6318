//! Two sessions beside each other: what each user got per second of observed time, and whether the difference is more than sampling.
//!
//! It compares utilization alone. That a user got less in B says nothing of why: it may have asked for less.

mod matching;
mod text;

use serde::Serialize;

use super::model::*;
use super::words::Names;
pub use matching::{GpuMatch, UserMatch};
use matching::{gpu_pairs, user_pairs};
use sampler_core::units::rfc3339;

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The version of this shape.
    pub format: u32,
    pub a: SessionSide,
    pub b: SessionSide,
    pub gpus: Vec<GpuPair>,
    /// Users of both, the largest difference first.
    pub users: Vec<UserPair>,
    pub only_a: Vec<Lone>,
    pub only_b: Vec<Lone>,
    /// In words: users who look alike and were not matched, because which is whose cannot be told.
    pub ambiguous: Vec<String>,
}

/// What to know of one of the sessions before believing numbers of it.
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
    /// Of observed time; `None` where none was observed.
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
    /// One standard error of it, of sampling alone: workloads vary besides.
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
    /// Of the seconds in which it was active.
    pub coactive_ratio: Option<f64>,
    pub contended_ratio: Option<f64>,
    pub memory_max_bytes: Option<u64>,
}

/// What is known about one other user having kept this one waiting; `None`: the two did not meet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvidencePair {
    pub other: String,
    pub a: Option<Evidence>,
    pub b: Option<Evidence>,
}

/// A user of one session alone.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Lone {
    pub kind: UserKind,
    pub id: String,
    pub name: String,
    pub gpu_seconds: f64,
}

impl Comparison {
    /// Pretty-printed, with a newline at the end.
    pub fn json(&self) -> String {
        super::json::pretty(self)
    }
}

impl UsagePair {
    fn size(&self) -> f64 {
        self.difference.map_or(0.0, f64::abs)
    }
}

impl UserPair {
    fn size(&self) -> f64 {
        self.gpus.iter().map(UsagePair::size).fold(0.0, f64::max)
    }
}

pub fn compare(a: &Report, b: &Report) -> Comparison {
    let gpus = gpu_pairs(a, b);
    let matched = user_pairs(a, b);
    let both = Both { names_a: Names::new(a), names_b: Names::new(b), users: &matched.pairs };
    let mut users: Vec<UserPair> = matched.pairs.iter().map(|(one, other, by)| both.user(one, other, *by, &gpus)).collect();
    users.sort_by(|one, other| other.size().total_cmp(&one.size()).then_with(|| one.name.cmp(&other.name)));
    let is_in = |user: &UserReport, side: fn(&(&UserReport, &UserReport, UserMatch)) -> *const UserReport| {
        matched.pairs.iter().any(|pair| std::ptr::eq(side(pair), user))
    };
    let lone = |report: &Report, names: &Names, side: fn(&(&UserReport, &UserReport, UserMatch)) -> *const UserReport| {
        let alone = report.users.iter().filter(|user| !is_in(user, side));
        alone.map(|user| lone(user, names)).collect::<Vec<_>>()
    };
    Comparison {
        format: FORMAT,
        a: side(a),
        b: side(b),
        gpus: gpus.iter().map(|(one, other, by)| gpu_pair(one, other, *by)).collect(),
        only_a: lone(a, &both.names_a, |pair| std::ptr::from_ref(pair.0)),
        only_b: lone(b, &both.names_b, |pair| std::ptr::from_ref(pair.1)),
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

fn lone(user: &UserReport, names: &Names) -> Lone {
    let gpu_seconds = user.gpus.iter().map(|usage| usage.gpu_seconds).sum();
    Lone { kind: user.kind, id: user.id.clone(), name: names.of(&user.id), gpu_seconds }
}

/// Time of which it is known what the GPU did: rates are of that, so that a gap is not an idle GPU.
fn observed(gpu: &GpuReport) -> f64 {
    gpu.busy_seconds + gpu.idle_seconds
}

fn over(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole)
}

fn gpu_pair(a: &GpuReport, b: &GpuReport, matched_by: GpuMatch) -> GpuPair {
    GpuPair {
        matched_by,
        uuid_a: a.uuid.clone(),
        uuid_b: b.uuid.clone(),
        index: b.index,
        busy_ratio_a: over(a.busy_seconds, observed(a)),
        busy_ratio_b: over(b.busy_seconds, observed(b)),
        saturated_ratio_a: over(a.saturated_seconds, observed(a)),
        saturated_ratio_b: over(b.saturated_seconds, observed(b)),
    }
}

/// On a GPU that was observed and that it did not use, a user got nothing: that is known.
fn amount(usage: Option<&Usage>, gpu: &GpuReport) -> Amount {
    let whole = observed(gpu);
    let (seconds, stderr) = usage.map_or((0.0, 0.0), |usage| (usage.gpu_seconds, usage.gpu_seconds_stderr));
    Amount {
        rate: over(seconds, whole),
        rate_stderr: over(stderr, whole),
        share_of_busy: usage.and_then(|usage| usage.share_of_busy),
        coactive_ratio: usage.and_then(|usage| over(usage.coactive_seconds, usage.active_seconds)),
        contended_ratio: usage.and_then(|usage| over(usage.contended_seconds, usage.active_seconds)),
        memory_max_bytes: usage.and_then(|usage| usage.memory_max_bytes),
    }
}

struct Both<'a> {
    names_a: Names,
    names_b: Names,
    users: &'a [(&'a UserReport, &'a UserReport, UserMatch)],
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
            name: self.names_b.of(&b.id),
            id_a: a.id.clone(),
            id_b: b.id.clone(),
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

    /// Of everybody that this user met with more than coactivity in A or B, or in one of them alone.
    fn evidence(&self, in_a: Option<&Usage>, in_b: Option<&Usage>) -> Vec<EvidencePair> {
        let of = |usage: Option<&Usage>, id: &str| {
            usage.and_then(|usage| usage.contenders.iter().find(|one| one.id == id)).map(|one| one.evidence)
        };
        let mut all = Vec::new();
        for contender in in_a.into_iter().flat_map(|usage| &usage.contenders) {
            let twin = self.users.iter().find(|(a, ..)| a.id == contender.id).map(|(_, b, _)| b.id.as_str());
            let other = twin.map_or_else(|| self.names_a.of(&contender.id), |id| self.names_b.of(id));
            all.push(EvidencePair { other, a: Some(contender.evidence), b: twin.and_then(|id| of(in_b, id)) });
        }
        for contender in in_b.into_iter().flat_map(|usage| &usage.contenders) {
            let twin = self.users.iter().find(|(_, b, _)| b.id == contender.id).map(|(a, ..)| a.id.as_str());
            if twin.and_then(|id| of(in_a, id)).is_none() {
                all.push(EvidencePair { other: self.names_b.of(&contender.id), a: None, b: Some(contender.evidence) });
            }
        }
        all.retain(|pair| pair.a != pair.b || pair.a > Some(Evidence::Coactive));
        all
    }
}

#[cfg(test)]
mod tests;
