//! Who of one session is who of the other. What cannot be told is not guessed: users that look alike stay unmatched, and are named.

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;

use super::super::layout::safe;
use super::super::model::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum GpuMatch {
    Uuid,
    /// Another GPU in the same place.
    Index,
}

/// Surest first; a later one is tried with those that the earlier ones left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum UserMatch {
    Id,
    /// Namespace, pod and container: a container that was started again.
    Pod,
    /// Namespace, container and image: another pod of the same work.
    Image,
    /// A container's name, or a host process's.
    Name,
}

impl UserMatch {
    pub fn words(self) -> &'static str {
        match self {
            UserMatch::Id => "same id",
            UserMatch::Pod => "same pod and container",
            UserMatch::Image => "same namespace, container and image",
            UserMatch::Name => "same name",
        }
    }

    /// What must be equal; `None` of a user that does not have it.
    fn key(self, user: &UserReport) -> Option<Vec<&str>> {
        let parts: Vec<&str> = match (self, user.kind) {
            (UserMatch::Id, _) => vec![&user.id],
            (_, UserKind::Unknown) => return None,
            (UserMatch::Name, UserKind::Host) => vec![user.comm.as_deref()?],
            (_, UserKind::Host) => return None,
            (UserMatch::Pod, _) => vec![&user.namespace, &user.pod, &user.container],
            (UserMatch::Image, _) => vec![&user.namespace, &user.container, &user.image],
            // A pod's container has its pod's name in its own.
            (UserMatch::Name, _) => vec![&user.name],
        };
        parts.iter().all(|part| !part.is_empty()).then_some(parts)
    }
}

pub type Pair<'a> = (&'a UserReport, &'a UserReport, UserMatch);

pub struct Matched<'a> {
    pub pairs: Vec<Pair<'a>>,
    pub ambiguous: Vec<String>,
}

pub fn gpu_pairs<'a>(a: &'a Report, b: &'a Report) -> Vec<(&'a GpuReport, &'a GpuReport, GpuMatch)> {
    let mut pairs: Vec<(&GpuReport, &GpuReport, GpuMatch)> =
        a.gpus.iter().filter_map(|one| b.gpu(&one.uuid).map(|other| (one, other, GpuMatch::Uuid))).collect();
    // A MIG device's index is its parent's: it says nothing of which device it is.
    let whole = |gpu: &&GpuReport| gpu.gpu_uuid.is_none();
    for one in a.gpus.iter().filter(whole).filter(|one| b.gpu(&one.uuid).is_none()) {
        let twin = b.gpus.iter().filter(whole).find(|other| other.index == one.index && a.gpu(&other.uuid).is_none());
        pairs.extend(twin.map(|other| (one, other, GpuMatch::Index)));
    }
    pairs.sort_by_key(|(_, other, _)| other.index);
    pairs
}

pub fn user_pairs<'a>(a: &'a Report, b: &'a Report) -> Matched<'a> {
    let mut matched = Matched { pairs: Vec::new(), ambiguous: Vec::new() };
    let (mut done_a, mut done_b): (HashSet<&str>, HashSet<&str>) = Default::default();
    for by in [UserMatch::Id, UserMatch::Pod, UserMatch::Image, UserMatch::Name] {
        let (left_a, left_b) = (group(a, by, &done_a), group(b, by, &done_b));
        for (key, ours) in &left_a {
            let Some(theirs) = left_b.get(key) else { continue };
            if let ([one], [other]) = (ours.as_slice(), theirs.as_slice()) {
                matched.pairs.push((one, other, by));
                done_a.insert(&one.id);
                done_b.insert(&other.id);
            } else {
                let (n, m) = (ours.len(), theirs.len());
                let name = safe(&key.1.join(" "));
                matched.ambiguous.push(format!("{name}: {n} in A and {m} in B look alike ({}); not matched", by.words()));
            }
        }
    }
    matched
}

type Groups<'a> = BTreeMap<(UserKind, Vec<&'a str>), Vec<&'a UserReport>>;

fn group<'a>(report: &'a Report, by: UserMatch, done: &HashSet<&str>) -> Groups<'a> {
    let mut groups = Groups::new();
    for user in report.users.iter().filter(|user| !done.contains(user.id.as_str())) {
        if let Some(key) = by.key(user) {
            groups.entry((user.kind, key)).or_default().push(user);
        }
    }
    groups
}
