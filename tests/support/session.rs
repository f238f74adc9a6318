//! Sessions of a running agent.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::{Agent, local, wait_for};

impl Agent {
    fn request(&self, method: &str, path: &str, body: &[u8]) -> Result<Vec<u8>> {
        local(self.port).request(method, path, "application/json", body)?.ok()
    }

    /// Starts a session with this request. Returns its id.
    pub fn record_as(&self, request: &Value) -> Result<String> {
        let response = self.request("POST", "/api/v1/sessions", request.to_string().as_bytes())?;
        let session: Value = serde_json::from_slice(&response)?;
        Ok(session["id"].as_str().context("the session's id")?.to_owned())
    }

    /// Starts a session now. Returns its id.
    pub fn record(&self, duration: Duration, lookback: Duration) -> Result<String> {
        self.record_as(&json!({"duration_seconds": duration.as_secs_f64(), "lookback_seconds": lookback.as_secs_f64()}))
    }

    pub fn stop(&self, id: &str) -> Result<()> {
        self.request("POST", &format!("/api/v1/sessions/{id}/stop"), &[]).map(|_| ())
    }

    pub fn sessions(&self) -> Result<Vec<Value>> {
        Ok(serde_json::from_slice(&self.request("GET", "/api/v1/sessions", &[])?)?)
    }

    pub fn session(&self, id: &str) -> Result<Value> {
        Ok(serde_json::from_slice(&self.request("GET", &format!("/api/v1/sessions/{id}"), &[])?)?)
    }

    /// Waits until the session has this state. Returns its status.
    pub fn session_is(&self, id: &str, state: &str, patience: Duration) -> Result<Value> {
        wait_for(&format!("the session is {state}"), patience, || Ok(Some(self.session(id)?).filter(|s| s["state"] == state)))
    }

    /// The file of a session, once it is complete.
    pub fn session_file(&self, id: &str, patience: Duration) -> Result<Vec<u8>> {
        wait_for("the session's file is complete", patience, || {
            let state = self.session(id)?["state"].clone();
            Ok((state != "armed" && state != "recording").then_some(()))
        })?;
        self.request("GET", &format!("/api/v1/sessions/{id}/file"), &[]).context("the session's file")
    }
}
