//! Order and selection of users and contenders in the formats for people (`text` and `html`).

use super::model::{Contender, DemandEvidence, Evidence, Report, Usage, UserReport};

/// A user with its usage of the GPU in question.
pub type UserUsage<'a> = (&'a UserReport, &'a Usage);

/// The users of a GPU, by GPU-seconds, descending.
pub fn users_of<'a>(report: &'a Report, uuid: &str) -> Vec<UserUsage<'a>> {
    let all = report.users.iter().flat_map(|user| user.gpus.iter().map(move |usage| (user, usage)));
    let mut users: Vec<UserUsage<'a>> = all.filter(|(_, usage)| usage.uuid == uuid).collect();
    users.sort_by(|(_, one), (_, other)| other.gpu_seconds.total_cmp(&one.gpu_seconds));
    users
}

/// GPU-seconds that `other` received while `user` was active and the GPU was saturated.
pub fn received(user: &UserUsage<'_>, other: &UserUsage<'_>) -> f64 {
    let contender = user.1.contenders.iter().find(|contender| contender.id == other.0.id);
    contender.map_or(0.0, |contender| contender.saturated_gpu_seconds)
}

/// What wait probes of `user` show about `other`; `None` without probes.
pub fn demand<'a>(user: &UserUsage<'a>, other: &UserUsage<'_>) -> Option<&'a DemandEvidence> {
    user.1.contenders.iter().find(|contender| contender.id == other.0.id)?.demand.as_ref()
}

/// Whether the matrix of waiting has a number there.
fn waited(user: &UserUsage<'_>, other: &UserUsage<'_>) -> bool {
    demand(user, other).is_some_and(|demand| demand.wait_seconds.or(demand.most_seconds()).is_some())
}

/// The rows of the matrix of waiting, with their positions among the `involved`: users with a number.
pub fn waiters<'a>(involved: &[UserUsage<'a>]) -> Vec<(usize, UserUsage<'a>)> {
    let has_number = |(_, row): &(usize, UserUsage<'_>)| involved.iter().any(|other| waited(row, other));
    involved.iter().copied().enumerate().filter(has_number).collect()
}

/// The users that have a nonzero entry in the matrix of [`received`], or a number in that of waiting.
pub fn involved<'a>(users: &[UserUsage<'a>]) -> Vec<UserUsage<'a>> {
    let meets = |user: &UserUsage<'_>, other: &UserUsage<'_>| received(user, other) > 0.0 || waited(user, other);
    let is_involved = |user: &UserUsage<'_>| users.iter().any(|other| meets(user, other) || meets(other, user));
    users.iter().copied().filter(is_involved).collect()
}

pub fn strongest(usage: &Usage) -> Option<Evidence> {
    usage.contenders.iter().map(|contender| contender.evidence).max()
}

/// Sorts victims by the strongest evidence, then by contended time, both descending.
pub fn sort_victims(victims: &mut [UserUsage<'_>]) {
    victims.sort_by(|(_, one), (_, other)| {
        let by_contended = other.contended_seconds.total_cmp(&one.contended_seconds);
        strongest(other).cmp(&strongest(one)).then(by_contended)
    });
}

/// The first `most` contenders and those with stronger evidence than coactivity; and the others.
pub fn split_contenders(usage: &Usage, most: usize) -> (Vec<&Contender>, Vec<&Contender>) {
    let mut nth = 0;
    usage.contenders.iter().partition(|contender| {
        nth += 1;
        nth <= most || contender.evidence > Evidence::Coactive
    })
}
