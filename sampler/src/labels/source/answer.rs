//! What one source says of one container.

use std::path::{Path, PathBuf};
use std::time::Duration;

use sampler_labels::{Facts, Outcome, QueryAttempt, QueryOutcome};

/// A source that takes longer is stuck. The ladder asks again long before.
pub const TIMEOUT: Duration = Duration::from_secs(5);
/// Details are kept for every container; people want the beginning.
const MAX_DETAIL: usize = 300;

/// A source's answer.
#[derive(Debug)]
pub struct Answer {
    pub outcome: Outcome,
    pub told: QueryOutcome,
    /// What failed, or why it was not found.
    pub detail: String,
    /// The folder or file that had it, where it is not the endpoint asked.
    pub at: Option<PathBuf>,
}

impl Answer {
    pub fn found(facts: Facts) -> Self {
        Self { outcome: Outcome::Found(facts), told: QueryOutcome::Ok, detail: String::new(), at: None }
    }

    pub fn not_found() -> Self {
        Self::not_found_because("it knows no such container")
    }

    pub fn not_found_because(detail: impl ToString) -> Self {
        Self { outcome: Outcome::NotFound, told: QueryOutcome::NotFound, detail: detail.to_string(), at: None }
    }

    /// There was nobody, or nothing, to ask.
    pub fn not_asked(detail: impl ToString) -> Self {
        Self { outcome: Outcome::NotAsked, told: QueryOutcome::NotTried, detail: detail.to_string(), at: None }
    }

    pub fn not_in(folders: &[PathBuf]) -> Self {
        let all: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
        Self::not_found_because(format!("not in {}", all.join(", ")))
    }

    /// Of the first of these places that has one; a problem only where none has.
    pub fn first_of(places: &[PathBuf], look: impl Fn(&Path) -> Result<Option<Answer>, String>) -> Answer {
        let looked = places.iter().map(|place| {
            let found = look(place).map_err(|detail| (detail, place))?;
            Ok(found.map(|answer| answer.at(place)))
        });
        match first_found(looked) {
            Ok(found) => found.unwrap_or_else(|| Answer::not_in(places)),
            Err((detail, place)) => Answer::error(detail).at(place),
        }
    }

    pub fn error(detail: impl ToString) -> Self {
        Self { outcome: Outcome::Failed, told: QueryOutcome::Error, detail: detail.to_string(), at: None }
    }

    pub fn timeout(detail: impl ToString) -> Self {
        Self { outcome: Outcome::Failed, told: QueryOutcome::Timeout, detail: detail.to_string(), at: None }
    }

    pub fn at(self, place: &Path) -> Self {
        Self { at: Some(place.to_owned()), ..self }
    }

    /// As it is kept for `explain`: not longer than needed.
    pub fn tried(&self) -> QueryAttempt {
        let end = self.detail.floor_char_boundary(MAX_DETAIL);
        let nothing = matches!(&self.outcome, Outcome::Found(facts) if facts.labels.iter().all(Option::is_none));
        if nothing {
            return QueryAttempt { told: self.told, at: None, detail: "it has the container, and no labels of it".into() };
        }
        let at = self.at.as_ref().filter(|_| self.told == QueryOutcome::Ok).map(|at| at.to_string_lossy().into());
        QueryAttempt { told: self.told, at, detail: self.detail[..end].into() }
    }
}

/// The first that is there. What is wrong with one does not hide another: a problem only where none is there, and then the last.
pub fn first_found<T, E>(looked: impl Iterator<Item = Result<Option<T>, E>>) -> Result<Option<T>, E> {
    let mut nothing = Ok(None);
    for one in looked {
        match one {
            Ok(None) => {}
            Ok(found) => return Ok(found),
            Err(problem) => nothing = Err(problem),
        }
    }
    nothing
}
