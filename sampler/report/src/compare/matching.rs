//! Matches GPUs and users of two sessions. Ambiguous matches are not guessed: indistinguishable users stay unmatched and are listed.

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;

use super::super::layout::terminal_safe;
use super::super::model::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum GpuMatch {
    Uuid,
    /// A different GPU with the same index.
    Index,
}

/// In the order of certainty; each is applied to the users that the previous ones did not match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum UserMatch {
    Id,
    /// Namespace, pod and container: a restarted container.
    Pod,
    /// Namespace, container and image: another pod of the same workload.
    Image,
    /// The name of a container, job, unit, login session or host process.
    Name,
}

impl UserMatch {
    pub fn description(self) -> &'static str {
        match self {
            UserMatch::Id => "same id",
            UserMatch::Pod => "same pod and container",
            UserMatch::Image => "same namespace, container and image",
            UserMatch::Name => "same name",
        }
    }

    /// The fields that must be equal; `None` if the user lacks one of them.
    fn key(self, user: &UserReport) -> Option<Vec<&str>> {
        let parts: Vec<&str> = match (self, user.kind) {
            (UserMatch::Id, _) => vec![&user.id],
            (_, UserKind::Unknown) => return None,
            (UserMatch::Name, UserKind::Host) => vec![user.comm.as_deref()?],
            (_, UserKind::Host) => return None,
            // Another run of the same job or unit.
            (UserMatch::Name, UserKind::Job | UserKind::Unit | UserKind::Login) => vec![&user.user],
            (_, UserKind::Job | UserKind::Unit | UserKind::Login) => return None,
            (UserMatch::Pod, _) => vec![&user.namespace, &user.pod, &user.container],
            (UserMatch::Image, _) => vec![&user.namespace, &user.container, &user.image],
            // The name of a container in a pod contains the name of the pod.
            (UserMatch::Name, _) => vec![&user.name],
        };
        parts.iter().all(|part| !part.is_empty()).then_some(parts)
    }
}

pub type Pair<'a> = (&'a UserReport, &'a UserReport, UserMatch);

#[derive(Default)]
pub struct Matched<'a> {
    pub pairs: Vec<Pair<'a>>,
    /// Ids of the matched users of A and of B.
    pub ids_a: HashSet<&'a str>,
    pub ids_b: HashSet<&'a str>,
    pub ambiguous: Vec<String>,
}

pub fn gpu_pairs<'a>(a: &'a Report, b: &'a Report) -> Vec<(&'a GpuReport, &'a GpuReport, GpuMatch)> {
    let mut pairs: Vec<(&GpuReport, &GpuReport, GpuMatch)> =
        a.gpus.iter().filter_map(|gpu| b.gpu(&gpu.uuid).map(|other| (gpu, other, GpuMatch::Uuid))).collect();
    // The index of a MIG device is that of its parent and does not identify the device.
    let whole = |gpu: &&GpuReport| gpu.gpu_uuid.is_none();
    for gpu in a.gpus.iter().filter(whole).filter(|gpu| b.gpu(&gpu.uuid).is_none()) {
        let counterpart = b.gpus.iter().filter(whole).find(|other| other.index == gpu.index && a.gpu(&other.uuid).is_none());
        pairs.extend(counterpart.map(|other| (gpu, other, GpuMatch::Index)));
    }
    pairs.sort_by_key(|(_, other, _)| other.index);
    pairs
}

pub fn user_pairs<'a>(a: &'a Report, b: &'a Report) -> Matched<'a> {
    let mut matched = Matched::default();
    for by in [UserMatch::Id, UserMatch::Pod, UserMatch::Image, UserMatch::Name] {
        let (groups_a, groups_b) = (group(a, by, &matched.ids_a), group(b, by, &matched.ids_b));
        for (key, users_a) in &groups_a {
            let Some(users_b) = groups_b.get(key) else { continue };
            if let ([in_a], [in_b]) = (users_a.as_slice(), users_b.as_slice()) {
                matched.pairs.push((in_a, in_b, by));
                matched.ids_a.insert(&in_a.id);
                matched.ids_b.insert(&in_b.id);
            } else {
                let (n, m, by) = (users_a.len(), users_b.len(), by.description());
                let name = terminal_safe(&key.1.join(" "));
                let text = format!("{name}: {n} users in A and {m} in B are indistinguishable ({by}), so none is matched");
                matched.ambiguous.push(text);
            }
        }
    }
    matched
}

type Groups<'a> = BTreeMap<(UserKind, Vec<&'a str>), Vec<&'a UserReport>>;

fn group<'a>(report: &'a Report, by: UserMatch, matched: &HashSet<&str>) -> Groups<'a> {
    let mut groups = Groups::new();
    for user in report.users.iter().filter(|user| !matched.contains(user.id.as_str())) {
        if let Some(key) = by.key(user) {
            groups.entry((user.kind, key)).or_default().push(user);
        }
    }
    groups
}
