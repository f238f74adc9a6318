//! Requests with a JSON body, and errors as JSON.

use std::time::Duration;

use axum::body::HttpBody as _;
use axum::extract::rejection::JsonRejection;
use axum::extract::{FromRequest as _, Request};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use serde::de::DeserializeOwned;
use serde_json::json;

/// Limits of the body of a request, in bytes and until its last byte.
pub const MAX_BODY_BYTES: usize = 1 << 20;
pub const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// A response with an error message.
pub struct ErrorResponse(pub StatusCode, pub String);

impl IntoResponse for ErrorResponse {
    fn into_response(self) -> Response {
        let ErrorResponse(status, error) = self;
        (status, Json(json!({ "error": error }))).into_response()
    }
}

pub fn bad(error: impl Into<String>) -> ErrorResponse {
    ErrorResponse(StatusCode::BAD_REQUEST, error.into())
}

fn too_large() -> ErrorResponse {
    ErrorResponse(StatusCode::PAYLOAD_TOO_LARGE, format!("the body of a request has at most {MAX_BODY_BYTES} bytes"))
}

/// Reads the body.
pub async fn body<T: DeserializeOwned>(request: Request, limit: Duration) -> Result<T, ErrorResponse> {
    // The length that its head states.
    if request.body().size_hint().lower() > MAX_BODY_BYTES as u64 {
        return Err(too_large());
    }
    let read = tokio::time::timeout(limit, Json::from_request(request, &())).await.map_err(|_| {
        ErrorResponse(StatusCode::REQUEST_TIMEOUT, format!("the body of the request did not arrive within {} s", limit.as_secs()))
    })?;
    let Json(body) = read.map_err(|rejection: JsonRejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => too_large(),
        // The text of the rejection names the field.
        _ => bad(rejection.body_text()),
    })?;
    Ok(body)
}
