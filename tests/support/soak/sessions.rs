//! Sessions during the run: one after the other, across faults. Each has to end, and the time in its report has to be whole.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::accounts::Problem;
use super::board::Board;
use super::facts::{SessionSample, samples};
use crate::{Agent, run_cli};

const LASTS: Duration = Duration::from_secs(10);
const LOOKBACK: Duration = Duration::from_secs(5);
/// A session waits for late facts after its end; one that is older must have ended.
const ENDED_SECONDS: f64 = 40.0;
/// Difference between the states of a GPU in a report and the duration of the session.
const WHOLE_WITHIN: f64 = 0.5;
/// The same for a GPU with a clock that was set: the agent may place its samples a second too early or too late, and corrects that slowly.
const SET_WITHIN: f64 = 1.2;

#[derive(Debug, Default)]
pub struct SessionChecks {
    /// Id, the number of lives when it was started, and when.
    pub pending: Option<(String, usize, f64)>,
    /// GPUs that were removed for a while, and when: that time is in no state.
    pub absent: Vec<(String, f64)>,
    /// The GPU with a clock that is set.
    pub stepped: String,
    /// Each once: a session has the minute before it, too.
    pub samples: BTreeSet<SessionSample>,
    pub finished: u32,
    /// Of agents that were killed meanwhile.
    pub interrupted: u32,
}

impl SessionChecks {
    /// Checks the session that was started before, if it has ended, and starts the next one.
    pub fn next(&mut self, agent: &Agent, lives: usize, board: &Board) -> Result<()> {
        if let Some((id, life, begun)) = self.pending.take() {
            if life != lives {
                self.interrupted += 1;
            } else {
                let session = agent.session(&id)?;
                match session["state"].as_str() {
                    Some("finished") => self.check(agent, &id, begun, board)?,
                    Some("recording") if board.now() - begun < ENDED_SECONDS => {
                        self.pending = Some((id, life, begun));
                        return Ok(());
                    }
                    // Its disk was full.
                    Some("failed") if session["error"].as_str().is_some_and(|error| error.contains("No space left")) => {}
                    _ => board.report(Problem::new("session", format!("begun at {begun:.1} s: {session}"))),
                }
            }
        }
        let id = agent.record(LASTS, LOOKBACK)?;
        self.pending = Some((id, lives, board.now()));
        Ok(())
    }

    fn check(&mut self, agent: &Agent, id: &str, begun: f64, board: &Board) -> Result<()> {
        self.finished += 1;
        let file = tempfile::NamedTempFile::new()?;
        let bytes = agent.session_file(id, LASTS)?;
        let session = sampler_session::read(&bytes).with_context(|| format!("session {id}"))?;
        let (found, before) = (samples(&session), self.samples.len());
        let different: BTreeSet<&SessionSample> = found.iter().collect();
        if different.len() < found.len() {
            let text = format!("{} samples, {} different ones (session begun at {begun:.1} s)", found.len(), different.len());
            board.report(Problem::new("sample twice in a session", text));
        }
        self.samples.extend(found);
        if self.samples.len() == before {
            board.report(Problem::new("session samples", format!("there is none that is new (session begun at {begun:.1} s)")));
        }
        std::fs::write(file.path(), bytes)?;
        let path = file.path().to_string_lossy().into_owned();
        let (code, out, err) = run_cli(&["report", &path, "--format", "json"])?;
        ensure!(code == Some(0), "gpu-sampler report of session {id}: {code:?}: {err}");
        let report: Value = serde_json::from_str(&out).context("the report is JSON")?;
        let was_absent = |uuid: &str| self.absent.iter().any(|(absent, at)| absent == uuid && at + ENDED_SECONDS > begun);
        for problem in problems(&report, &self.stepped, &was_absent) {
            board.report(Problem::new(problem.key, format!("{} (session begun at {begun:.1} s)", problem.text)));
        }
        Ok(())
    }
}

/// What is wrong with the times in a report.
fn problems(report: &Value, stepped: &str, was_absent: &dyn Fn(&str) -> bool) -> Vec<Problem> {
    let duration = report["duration_seconds"].as_f64().unwrap_or(f64::NAN);
    let gpus = report["gpus"].as_array().map_or(&[][..], Vec::as_slice);
    let mut problems = Vec::new();
    for gpu in gpus {
        let states = ["busy_seconds", "idle_seconds", "unobserved_seconds", "unsupported_seconds"];
        let whole: f64 = states.iter().filter_map(|state| gpu[*state].as_f64()).sum();
        let uuid = gpu["uuid"].as_str().unwrap_or_default();
        let within = if uuid == stepped { SET_WITHIN } else { WHOLE_WITHIN };
        let is_whole = (whole - duration).abs() < within;
        if !is_whole && !was_absent(uuid) {
            let text = format!("{uuid}: the states sum to {whole:.2} s of {duration:.2} s; gaps {}", report["gaps"]);
            problems.push(Problem::new("session time", text));
        }
    }
    if gpus.is_empty() {
        problems.push(Problem::new("session time", "a report has no GPU"));
    }
    problems
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_report_with_missing_time_is_found() {
        let report = |idle: f64| {
            json!({"duration_seconds": 10.0,
                "gpus": [{"uuid": "G", "busy_seconds": 4.0, "idle_seconds": idle, "unobserved_seconds": 1.0}]})
        };
        let found = |report: Value| problems(&report, "", &|_| false).len();
        assert_eq!((found(report(5.0)), found(report(4.0))), (0, 1));
        assert_eq!((found(json!({"duration_seconds": 10.0})), found(json!({"gpus": [{}]}))), (1, 1));
        assert_eq!(problems(&report(4.0), "", &|uuid| uuid == "G"), []);
        assert_eq!(problems(&report(4.0), "G", &|_| false), []);
        assert_eq!(problems(&report(3.0), "G", &|_| false).len(), 1);
    }
}
