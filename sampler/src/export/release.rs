//! `POST /api/v1/gpus/release`: the agent lets go of GPUs for a while.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::HttpBody as _;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::handler::Handler as _;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json};
use axum::routing::post;
use serde::{Deserialize, Serialize};

use super::json_request::{BODY_TIMEOUT, ErrorResponse, MAX_BODY_BYTES, bad, body};
use super::state::AppState;
use crate::observe::gpu::{DEFAULT_SECONDS, GpuSelector, MOST_SECONDS, ReleaseError};

/// Body of `POST gpus/release`; it may be missing.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseBody {
    /// Index or UUID; without it, all GPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuSelector>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u64>,
}

impl From<ReleaseError> for ErrorResponse {
    fn from(error: ReleaseError) -> Self {
        let status = match &error {
            ReleaseError::Unknown { .. } => StatusCode::NOT_FOUND,
            ReleaseError::Hangs { .. } => StatusCode::CONFLICT,
            ReleaseError::Busy => StatusCode::SERVICE_UNAVAILABLE,
        };
        ErrorResponse(status, error.to_string())
    }
}

pub fn router() -> Router<Arc<AppState>> {
    Router::new().route("/api/v1/gpus/release", post(release.layer(DefaultBodyLimit::max(MAX_BODY_BYTES))))
}

async fn release(State(state): State<Arc<AppState>>, request: Request) -> Result<impl IntoResponse, ErrorResponse> {
    let is_empty = request.body().size_hint().exact() == Some(0);
    let body: ReleaseBody = if is_empty { ReleaseBody::default() } else { body(request, BODY_TIMEOUT).await? };
    let seconds = body.seconds.unwrap_or(DEFAULT_SECONDS);
    if !(1..=MOST_SECONDS).contains(&seconds) {
        return Err(bad(format!("invalid seconds = {seconds}: give whole seconds from 1 to {MOST_SECONDS}")));
    }
    Ok(Json(state.gpus.release(body.gpu, Duration::from_secs(seconds)).await?))
}
