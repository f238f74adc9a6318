//! The users of a fleet report by node, as a table for programs: one row per user and node, with the rules of the `csv` of a session.

use super::super::csv::{decimal, table, without_formula};
use super::{Fleet, FleetUser, UserOnNode};

const HEADER: [&str; 11] = [
    "kind",
    "user",
    "joined_by",
    "node",
    "users_on_node",
    "gpus",
    "gpu_seconds",
    "gpu_seconds_stderr",
    "active_seconds",
    "coactive_seconds",
    "contended_seconds",
];

impl Fleet {
    /// Most GPU-seconds first, the nodes of a user with the slowest first.
    pub fn csv(&self) -> String {
        let rows = self.users.iter().flat_map(|user| user.nodes.iter().map(move |part| row(user, part)));
        table(HEADER, rows)
    }
}

fn row(user: &FleetUser, part: &UserOnNode) -> [String; HEADER.len()] {
    let (kind, joined_by): (&str, &str) = (user.kind.into(), user.joined_by.into());
    let seconds = [part.gpu_seconds, part.gpu_seconds_stderr, part.active_seconds, part.coactive_seconds, part.contended_seconds];
    let [gpu_seconds, stderr, active, coactive, contended] = seconds.map(|seconds| decimal(Some(seconds)));
    [
        kind.to_owned(),
        without_formula(&user.name),
        joined_by.to_owned(),
        without_formula(&part.node),
        without_formula(&part.users.join(";")),
        part.gpus.to_string(),
        gpu_seconds,
        stderr,
        active,
        coactive,
        contended,
    ]
}
