//! `POST /api/v1/sessions/{id}/experiment`: facts of a freezing experiment, for the session that records it.
//!
//! The agent freezes nothing. It refuses a schedule that would freeze itself, since its session would stop with it.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, Request as HttpRequest, State};
use axum::handler::Handler as _;
use axum::http::StatusCode;
use axum::routing::post;
use sampler_core::experiment::ExperimentFact;

use super::json_request::{BODY_TIMEOUT, ErrorResponse, MAX_BODY_BYTES, bad, body};
use super::state::AppState;
use crate::freeze::contains_process;
use crate::observe::clock::boot_now;

/// An experiment starts within this time: boot times of another machine differ by more.
const MAX_LEAD_NS: u64 = 60_000_000_000;

pub fn router() -> Router<Arc<AppState>> {
    let limited = add.layer(axum::extract::DefaultBodyLimit::max(MAX_BODY_BYTES));
    Router::new().route("/api/v1/sessions/{id}/experiment", post(limited))
}

async fn add(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
    request: HttpRequest,
) -> Result<StatusCode, ErrorResponse> {
    let fact: ExperimentFact = body(request, BODY_TIMEOUT).await?;
    if let ExperimentFact::Schedule(schedule) = &fact {
        if let Some(problem) = schedule.problem() {
            return Err(bad(format!("invalid schedule: {problem}")));
        }
        if schedule.start.0.abs_diff(boot_now().0) > MAX_LEAD_NS {
            return Err(bad("the schedule does not start now: run the experiment on the machine of the agent"));
        }
        let refused = |reason: String| ErrorResponse(StatusCode::CONFLICT, reason);
        match contains_process(&state.config().path_procfs, "self", &schedule.suspect) {
            Ok(false) => tracing::info!(
                session = id,
                victim = schedule.victim,
                suspect = schedule.suspect,
                seed = schedule.seed,
                "an experiment will freeze the suspect"
            ),
            Ok(true) => return Err(refused(format!("{} contains this agent, so it is not frozen", schedule.suspect))),
            Err(error) => return Err(refused(format!("cannot read the cgroups of the agent: {error}"))),
        }
    }
    state.recorder.experiment(id, fact).await?;
    Ok(StatusCode::NO_CONTENT)
}
