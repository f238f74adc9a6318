//! Sessions of a running agent.

use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::{Agent, exchange, wait_for};

impl Agent {
    fn ask(&self, method: &str, path: &str, body: &[u8]) -> Result<Vec<u8>> {
        let stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        exchange(stream, method, path, "application/json", body)
    }

    /// Begins a session now; its id.
    pub fn record(&self, duration: Duration, lookback: Duration) -> Result<String> {
        let body = json!({"duration_seconds": duration.as_secs_f64(), "lookback_seconds": lookback.as_secs_f64()});
        let answer = self.ask("POST", "/api/v1/sessions", body.to_string().as_bytes())?;
        let answer: Value = serde_json::from_slice(&answer)?;
        Ok(answer["id"].as_str().context("the session's id")?.to_owned())
    }

    /// The file of a session, once it is whole.
    pub fn session_file(&self, id: &str, patience: Duration) -> Result<Vec<u8>> {
        let mut last = None;
        let file = wait_for("the session's file can be had", patience, || {
            match self.ask("GET", &format!("/api/v1/sessions/{id}/file"), &[]) {
                Ok(file) => Ok(Some(file)),
                Err(error) => {
                    last = Some(error);
                    Ok(None)
                }
            }
        });
        file.map_err(|error| last.map_or(error, |last| last.context("the session's file")))
    }
}
