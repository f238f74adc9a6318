//! The reply of one source to a query about one container.

use std::path::{Path, PathBuf};
use std::time::Duration;

use sampler_labels::{Facts, Outcome, QueryAttempt, QueryOutcome};

/// Limit of one query. The resolver repeats a query long before.
pub const TIMEOUT: Duration = Duration::from_secs(5);
/// Details are kept for every container, so longer ones are truncated.
const MAX_DETAIL: usize = 300;

#[derive(Debug)]
pub struct SourceReply {
    pub outcome: Outcome,
    pub status: QueryOutcome,
    /// What failed, or why the container was not found.
    pub detail: String,
    /// The folder or file that has the container, if it is not the endpoint.
    pub at: Option<PathBuf>,
}

impl SourceReply {
    pub fn found(facts: Facts) -> Self {
        Self { outcome: Outcome::Found(facts), status: QueryOutcome::Ok, detail: String::new(), at: None }
    }

    pub fn not_found() -> Self {
        Self::not_found_because("no such container")
    }

    pub fn not_found_because(detail: impl ToString) -> Self {
        Self { outcome: Outcome::NotFound, status: QueryOutcome::NotFound, detail: detail.to_string(), at: None }
    }

    /// There is no endpoint, or nothing to query.
    pub fn not_queried(detail: impl ToString) -> Self {
        Self { outcome: Outcome::NotQueried, status: QueryOutcome::NotTried, detail: detail.to_string(), at: None }
    }

    pub fn not_in(folders: &[PathBuf]) -> Self {
        let all: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
        Self::not_found_because(format!("not in {}", all.join(", ")))
    }

    /// The reply of the first place that has the container; an error only if none has it.
    pub fn first_of(places: &[PathBuf], read: impl Fn(&Path) -> Result<Option<SourceReply>, String>) -> SourceReply {
        let results = places.iter().map(|place| {
            let found = read(place).map_err(|detail| (detail, place))?;
            Ok(found.map(|reply| reply.at(place)))
        });
        match first_found(results) {
            Ok(found) => found.unwrap_or_else(|| SourceReply::not_in(places)),
            Err((detail, place)) => SourceReply::error(detail).at(place),
        }
    }

    pub fn error(detail: impl ToString) -> Self {
        Self { outcome: Outcome::Failed, status: QueryOutcome::Error, detail: detail.to_string(), at: None }
    }

    pub fn timeout(detail: impl ToString) -> Self {
        Self { outcome: Outcome::Failed, status: QueryOutcome::Timeout, detail: detail.to_string(), at: None }
    }

    pub fn at(self, place: &Path) -> Self {
        Self { at: Some(place.to_owned()), ..self }
    }

    /// The form that is kept for `explain`, with a truncated detail.
    pub fn to_attempt(&self) -> QueryAttempt {
        let end = self.detail.floor_char_boundary(MAX_DETAIL);
        let is_empty = matches!(&self.outcome, Outcome::Found(facts) if facts.labels.iter().all(Option::is_none));
        let detail = if is_empty { "the container is known, but has no labels there" } else { &self.detail[..end] };
        let at = self.at.as_ref().filter(|_| self.status == QueryOutcome::Ok && !is_empty);
        QueryAttempt { status: self.status, at: at.map(|at| at.to_string_lossy().into()), detail: detail.into() }
    }
}

/// The first value found. An error does not hide a later value: the last error is returned only if there is no value.
pub fn first_found<T, E>(results: impl Iterator<Item = Result<Option<T>, E>>) -> Result<Option<T>, E> {
    let mut absent = Ok(None);
    for result in results {
        match result {
            Ok(None) => {}
            Ok(found) => return Ok(found),
            Err(problem) => absent = Err(problem),
        }
    }
    absent
}
