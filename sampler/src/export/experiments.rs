//! `POST /api/v1/sessions/{id}/experiment`: facts of a freezing experiment, for the session that records it.
//!
//! The agent freezes nothing. It refuses a schedule that would freeze itself, since its session would stop with it, and where it cannot
//! determine that, and states whether it could thaw the suspect if all of the experiment is killed. Which freezes a session accepts is decided by `session::manager`.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, Request as HttpRequest, State};
use axum::handler::Handler as _;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Json, Response};
use axum::routing::post;
use sampler_core::experiment::{ExperimentFact, ExperimentSchedule};
use serde::{Deserialize, Serialize};

use super::json_request::{BODY_TIMEOUT, ErrorResponse, MAX_BODY_BYTES, bad, body};
use super::state::AppState;
use crate::error::display_chain;
use crate::freeze::{Freezer, FreezerError, contains_process};
use crate::observe::clock::boot_now;
use crate::observe::kernel::layout::{layout, namespace_problem};

/// An experiment starts within this time: boot times of another machine differ by more.
const MAX_LEAD_NS: u64 = 60_000_000_000;

/// What the agent does if a command and its guard are killed during a freeze: the reply to a schedule.
#[derive(Debug, Serialize, Deserialize)]
pub struct ThawSupport {
    /// Where the agent finds what was left frozen.
    pub runtime_dir: PathBuf,
    /// `None` if it does not exist there.
    pub folder: Option<FolderId>,
    /// Why it could not thaw the suspect, if so.
    pub cannot_thaw: Option<String>,
}

/// A folder, whatever its path is in the mounts of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FolderId {
    device: u64,
    inode: u64,
}

impl FolderId {
    pub fn of(folder: &FsPath) -> Option<Self> {
        let meta = std::fs::metadata(folder).ok()?;
        Some(Self { device: meta.dev(), inode: meta.ino() })
    }
}

impl ThawSupport {
    fn of(procfs: &FsPath, runtime_dir: &FsPath, suspect: &str) -> Self {
        let writable = Freezer::find(&layout(procfs), procfs, suspect).and_then(|freezer| freezer.check_writable());
        let cannot_thaw = writable.err().map(|error| match error {
            // The remedy in its text is one for a person who runs a command.
            FreezerError::File { action, path, source } => format!("it cannot {action} {}: {source}", path.display()),
            other => display_chain(&other),
        });
        Self { runtime_dir: runtime_dir.to_owned(), folder: FolderId::of(runtime_dir), cannot_thaw }
    }
}

pub fn router() -> Router<Arc<AppState>> {
    let limited = add.layer(axum::extract::DefaultBodyLimit::max(MAX_BODY_BYTES));
    Router::new().route("/api/v1/sessions/{id}/experiment", post(limited))
}

async fn add(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
    request: HttpRequest,
) -> Result<Response, ErrorResponse> {
    let fact: ExperimentFact = body(request, BODY_TIMEOUT).await?;
    if let ExperimentFact::Schedule(schedule) = &fact {
        if let Some(problem) = schedule.problem() {
            return Err(bad(format!("invalid schedule: {problem}")));
        }
        if schedule.start.0.abs_diff(boot_now().0) > MAX_LEAD_NS {
            return Err(bad("the schedule does not start now: run the experiment on the machine of the agent"));
        }
        let refused = |reason: String| ErrorResponse(StatusCode::CONFLICT, reason);
        if let Some(problem) = namespace_problem() {
            let remedy = "run the agent on the host, or in a container with --cgroupns=host (in Kubernetes, a privileged one)";
            return Err(refused(format!("the agent cannot check that it is not in the suspect: it is {problem}; {remedy}")));
        }
        match contains_process(&state.config().path_procfs, "self", &schedule.suspect) {
            Ok(false) => {}
            Ok(true) => return Err(refused(format!("{} contains this agent, so it is not frozen", schedule.suspect))),
            Err(error) => return Err(refused(format!("cannot read the cgroups of the agent: {error}"))),
        }
    }
    state.recorder.experiment(id.clone(), fact.clone()).await?;
    match fact {
        ExperimentFact::Schedule(ExperimentSchedule { victim, suspect, seed, consent, .. }) => {
            let consent = consent.name();
            tracing::info!(session = id, victim, suspect, consent, seed, "an experiment will freeze the suspect");
            let config = state.config();
            Ok(Json(ThawSupport::of(&config.path_procfs, &config.runtime_dir, &suspect)).into_response())
        }
        ExperimentFact::Frozen { burst, from, to, .. } => {
            let milliseconds = to.saturating_since(from) / 1_000_000;
            tracing::info!(session = id, burst, milliseconds, "the suspect was frozen, and is thawed");
            Ok(StatusCode::NO_CONTENT.into_response())
        }
    }
}
