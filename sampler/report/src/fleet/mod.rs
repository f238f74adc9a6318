//! One report of several sessions: files of any number of nodes, of one span of time.
//!
//! ```text
//!  file -> Report ---\
//!  file -> Report ----+--> fleet() -> Fleet -> text, json, csv
//!  file that cannot be read: a problem, and a gap of its node
//! ```
//! Nodes are aligned by their wall clocks. GPU-seconds are sums of those of the reports; the caller cuts files that overlap on one GPU
//! ([`Coverage`]). Standard errors of different GPUs and files are independent, so their squares add.

mod coverage;
mod csv;
mod join;
mod text;

use std::collections::BTreeMap;

use sampler_core::units::{WallTime, rfc3339};
use serde::Serialize;

use super::model::{Evidence, Report, UserKind, UserReport};
use super::words;
pub use coverage::{Coverage, Cut};
use join::Identity;
pub use join::{JoinField, JoinedBy};

/// The version of the shape of [`Fleet`].
const FLEET_FORMAT: u32 = 1;
/// Shorter spans without a file are not gaps: a session ends within a window.
const SHORTEST_GAP_NS: u64 = 1_000_000_000;
/// Nodes with spans that differ by more than this share are not compared.
const COMPARABLE_SPANS: f64 = 0.05;
/// All that is known about the alignment of nodes.
const CLOCKS: &str = "Nodes are aligned by their wall clocks. Session files do not record the error of a clock, so spans of different \
                      nodes may be shifted by it; GPU-seconds do not depend on it, except at --from and --to.";

/// A span of wall time, from its start to before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WallSpan {
    pub from: WallTime,
    pub to: WallTime,
}

/// The report of one file.
#[derive(Clone, Debug)]
pub struct FleetFile {
    /// Path or URL.
    pub file: String,
    pub report: Report,
}

/// A file that is not part of the report, or only in part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileProblem {
    pub file: String,
    /// `None` if its header cannot be read.
    pub node: Option<String>,
    pub problem: String,
}

#[derive(Clone, Debug, Default)]
pub struct FleetOptions {
    /// The span that was requested; by default all that the files cover.
    pub span: Option<WallSpan>,
    /// Fields that containers and pods have in common on different nodes; by default namespace, container and image.
    pub join_by: Vec<JoinField>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fleet {
    pub format: u32,
    pub start: String,
    pub duration_seconds: f64,
    pub clocks: String,
    pub nodes: Vec<FleetNode>,
    /// By GPU-seconds, descending.
    pub users: Vec<FleetUser>,
    pub findings: Vec<FleetFinding>,
    pub gaps: Vec<FleetGap>,
    pub problems: Vec<FileProblem>,
    /// Statements about cut and ambiguous files.
    pub remarks: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FleetNode {
    pub node: String,
    pub files: Vec<String>,
    pub start: String,
    pub end: String,
    /// Seconds that its files cover.
    pub covered_seconds: f64,
    pub gpus: usize,
    pub busy_seconds: f64,
    pub idle_seconds: f64,
    pub unobserved_seconds: f64,
    pub unattributed_seconds: f64,
    /// A file ends before its session did, or parts of it cannot be read.
    pub truncated: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FleetUser {
    pub kind: UserKind,
    pub name: String,
    pub joined_by: JoinedBy,
    pub gpu_seconds: f64,
    /// One standard error, of sampling only.
    pub gpu_seconds_stderr: f64,
    pub gpus: usize,
    /// By GPU-seconds, ascending: the slowest first.
    pub nodes: Vec<UserOnNode>,
    pub imbalance: Option<Imbalance>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct UserOnNode {
    pub node: String,
    /// Names of the users of this node that were joined.
    pub users: Vec<String>,
    pub gpu_seconds: f64,
    pub gpu_seconds_stderr: f64,
    pub gpus: usize,
    pub active_seconds: f64,
    pub coactive_seconds: f64,
    pub contended_seconds: f64,
}

/// The difference between the nodes of a user on several of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Imbalance {
    pub min_node: String,
    pub min_gpu_seconds: f64,
    pub max_node: String,
    pub max_gpu_seconds: f64,
    /// Minimum divided by maximum; 1 is balanced.
    pub ratio: f64,
    /// False if the covered spans of its nodes differ, so that their GPU-seconds would differ anyway.
    pub is_comparable: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FleetFinding {
    pub node: String,
    pub file: String,
    pub uuid: String,
    pub evidence: Option<Evidence>,
    pub text: String,
}

/// Time that is missing on a node: on one GPU, or on all of them where no file covers it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FleetGap {
    pub node: String,
    pub uuid: Option<String>,
    pub from: String,
    pub to: String,
    pub reason: String,
}

impl Fleet {
    /// Pretty-printed, with a newline at the end.
    pub fn json(&self) -> String {
        super::json::json(self)
    }
}

impl FleetFile {
    pub fn end(&self) -> WallTime {
        end(&self.report)
    }
}

fn end(report: &Report) -> WallTime {
    words::after(report.start, report.duration_seconds)
}

/// Merges the reports of files that do not overlap on a GPU.
pub fn fleet(files: &[FleetFile], problems: Vec<FileProblem>, remarks: Vec<String>, options: &FleetOptions) -> Fleet {
    let covered = || {
        let from = files.iter().map(|file| file.report.start).min().unwrap_or_default();
        WallSpan { from, to: files.iter().map(FleetFile::end).max().unwrap_or(from) }
    };
    let span = options.span.unwrap_or_else(covered);
    let mut by_node: BTreeMap<&str, Vec<&FleetFile>> = BTreeMap::new();
    for file in files {
        by_node.entry(&file.report.node).or_default().push(file);
    }
    for files in by_node.values_mut() {
        files.sort_by_key(|file| file.report.start);
    }
    let mut gaps = Vec::new();
    let nodes: Vec<FleetNode> = by_node.iter().map(|(name, files)| node(name, files, span, &mut gaps)).collect();
    // A node without a readable file is missing altogether.
    let mut missing: Vec<&str> = problems.iter().filter_map(|problem| problem.node.as_deref()).collect();
    missing.sort_unstable();
    missing.dedup();
    for name in missing.into_iter().filter(|name| !by_node.contains_key(name)) {
        gaps.push(uncovered(name, span.from, span.to));
    }
    let findings = by_node.iter().flat_map(|(name, files)| {
        files.iter().flat_map(move |file| {
            file.report.findings.iter().map(move |finding| FleetFinding {
                node: (*name).to_owned(),
                file: file.file.clone(),
                uuid: finding.uuid.clone(),
                evidence: finding.evidence,
                text: finding.text.clone(),
            })
        })
    });
    Fleet {
        format: FLEET_FORMAT,
        start: rfc3339(span.from),
        duration_seconds: span.to.0.saturating_sub(span.from.0) as f64 * 1e-9,
        clocks: CLOCKS.to_owned(),
        users: users(&by_node, &nodes, &options.join_by),
        findings: findings.collect(),
        nodes,
        gaps,
        problems,
        remarks,
    }
}

fn uncovered(node: &str, from: WallTime, to: WallTime) -> FleetGap {
    let reason = "no readable session file covers this time".to_owned();
    FleetGap { node: node.to_owned(), uuid: None, from: rfc3339(from), to: rfc3339(to), reason }
}

/// `files`: by start.
fn node(name: &str, files: &[&FleetFile], span: WallSpan, gaps: &mut Vec<FleetGap>) -> FleetNode {
    let mut node = FleetNode { node: name.to_owned(), ..FleetNode::default() };
    let (mut until, mut covered) = (span.from, 0);
    let mut uuids: Vec<&str> = Vec::new();
    for file in files {
        let report = &file.report;
        let (from, to) = (report.start, end(report));
        if from.0.saturating_sub(until.0) > SHORTEST_GAP_NS {
            gaps.push(uncovered(name, until, from));
        }
        covered += to.0.saturating_sub(from.max(until).0);
        until = until.max(to);
        node.files.push(file.file.clone());
        node.truncated |= report.truncated;
        for gpu in &report.gpus {
            uuids.push(&gpu.uuid);
            node.busy_seconds += gpu.busy_seconds;
            node.idle_seconds += gpu.idle_seconds;
            node.unobserved_seconds += gpu.unobserved_seconds;
            node.unattributed_seconds += gpu.unattributed_seconds;
        }
        gaps.extend(report.gaps.iter().map(|gap| FleetGap {
            node: name.to_owned(),
            uuid: Some(gap.uuid.clone()),
            from: rfc3339(gap.from),
            to: rfc3339(gap.to),
            reason: gap.reason.clone(),
        }));
    }
    if span.to.0.saturating_sub(until.0) > SHORTEST_GAP_NS {
        gaps.push(uncovered(name, until, span.to));
    }
    uuids.sort_unstable();
    uuids.dedup();
    node.gpus = uuids.len();
    node.covered_seconds = covered as f64 * 1e-9;
    node.start = files.first().map(|file| rfc3339(file.report.start)).unwrap_or_default();
    node.end = rfc3339(files.iter().map(|file| file.end()).max().unwrap_or(span.from));
    node
}

/// A user while it is summed.
struct JoinedUser<'a> {
    name: String,
    joined_by: JoinedBy,
    /// Its users by node.
    parts: BTreeMap<&'a str, Vec<&'a UserReport>>,
}

fn users(by_node: &BTreeMap<&str, Vec<&FleetFile>>, nodes: &[FleetNode], join_by: &[JoinField]) -> Vec<FleetUser> {
    let mut joined: BTreeMap<(UserKind, Vec<String>), JoinedUser<'_>> = BTreeMap::new();
    for (node, files) in by_node {
        for user in files.iter().flat_map(|file| &file.report.users) {
            let Identity { key, name, joined_by } = Identity::new(node, user, join_by);
            let kind = if joined_by == JoinedBy::Job { UserKind::Job } else { user.kind };
            let entry = joined.entry((kind, key)).or_insert_with(|| JoinedUser { name, joined_by, parts: BTreeMap::new() });
            entry.parts.entry(node).or_default().push(user);
        }
    }
    let mut users: Vec<FleetUser> = joined.into_iter().map(|((kind, _), joined)| sum(kind, joined, nodes)).collect();
    users.sort_by(|a, b| b.gpu_seconds.total_cmp(&a.gpu_seconds).then_with(|| a.name.cmp(&b.name)));
    users
}

fn sum(kind: UserKind, joined: JoinedUser<'_>, nodes: &[FleetNode]) -> FleetUser {
    let mut on_nodes: Vec<UserOnNode> = joined.parts.into_iter().map(|(node, users)| on_node(node, &users)).collect();
    on_nodes.sort_by(|a, b| a.gpu_seconds.total_cmp(&b.gpu_seconds).then_with(|| a.node.cmp(&b.node)));
    FleetUser {
        kind,
        name: joined.name,
        joined_by: joined.joined_by,
        gpu_seconds: on_nodes.iter().map(|part| part.gpu_seconds).sum(),
        gpu_seconds_stderr: on_nodes.iter().map(|part| part.gpu_seconds_stderr).fold(0.0, f64::hypot),
        gpus: on_nodes.iter().map(|part| part.gpus).sum(),
        imbalance: imbalance(&on_nodes, nodes),
        nodes: on_nodes,
    }
}

fn on_node(node: &str, users: &[&UserReport]) -> UserOnNode {
    let mut part = UserOnNode { node: node.to_owned(), ..UserOnNode::default() };
    let mut uuids: Vec<&str> = Vec::new();
    for user in users {
        part.users.push(user.display_name());
        for usage in &user.gpus {
            uuids.push(&usage.uuid);
            part.gpu_seconds += usage.gpu_seconds;
            part.gpu_seconds_stderr = part.gpu_seconds_stderr.hypot(usage.gpu_seconds_stderr);
            part.active_seconds += usage.active_seconds;
            part.coactive_seconds += usage.coactive_seconds;
            part.contended_seconds += usage.contended_seconds;
        }
    }
    uuids.sort_unstable();
    uuids.dedup();
    part.gpus = uuids.len();
    part.users.sort_unstable();
    part.users.dedup();
    part
}

/// `parts`: by GPU-seconds, ascending.
fn imbalance(parts: &[UserOnNode], nodes: &[FleetNode]) -> Option<Imbalance> {
    let [min, .., max] = parts else { return None };
    let covered = |part: &UserOnNode| nodes.iter().find(|node| node.node == part.node).map_or(0.0, |node| node.covered_seconds);
    let (least, most) = parts.iter().map(covered).fold((f64::INFINITY, 0.0_f64), |(least, most), s| (least.min(s), most.max(s)));
    Some(Imbalance {
        min_node: min.node.clone(),
        min_gpu_seconds: min.gpu_seconds,
        max_node: max.node.clone(),
        max_gpu_seconds: max.gpu_seconds,
        ratio: if max.gpu_seconds > 0.0 { min.gpu_seconds / max.gpu_seconds } else { 1.0 },
        is_comparable: most - least <= most * COMPARABLE_SPANS,
    })
}

#[cfg(test)]
mod tests;
