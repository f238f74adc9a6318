//! The part of the model about serving engines: what their own metrics say, and how these differ while other users of the GPU are active.

use serde::Serialize;
use strum::VariantArray as _;

use super::model::UserKind;

/// A latency that a serving engine reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, strum::IntoStaticStr, strum::VariantArray)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum LatencyKind {
    TimeToFirstToken,
    TimePerOutputToken,
    QueueTime,
}

/// One serving engine of a container.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct EngineReport {
    /// Name of the rules by which it was found, such as `vllm`.
    pub engine: String,
    /// TCP port of its metrics; 0 if it does not listen.
    pub port: u16,
    /// Readings of its metrics, and those that failed.
    pub readings: u64,
    pub failed_readings: u64,
    /// Why readings failed; each reason once, most frequent first.
    pub problems: Vec<EngineProblem>,
    /// Requests at the readings; `None` if the engine does not report them.
    pub waiting: Option<GaugeSummary>,
    pub running: Option<GaugeSummary>,
    pub latencies: Vec<LatencyReport>,
    /// By reading, for timelines.
    #[serde(skip)]
    pub points: Vec<EnginePoint>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EngineProblem {
    pub text: String,
    pub readings: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct GaugeSummary {
    pub mean: f64,
    pub max: f64,
}

/// One latency of a serving engine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LatencyReport {
    pub latency: LatencyKind,
    /// Mean over all requests, or tokens, of the intervals.
    pub mean_seconds: f64,
    /// Requests or tokens.
    pub count: f64,
    /// Intervals between two readings in which there was at least one.
    pub intervals: u64,
    /// One for each other user that was active on the GPUs of the container; those with the largest difference first.
    pub contrasts: Vec<LatencyContrast>,
}

/// A latency in the intervals in which another user was active, and in those in which it was not. Each interval counts once.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LatencyContrast {
    pub kind: UserKind,
    /// `id` of the other user.
    pub id: String,
    /// The GPU on which the other user was active most.
    pub uuid: String,
    pub without: LatencySide,
    pub with: LatencySide,
    /// How often the other user started or stopped being active from one interval to the next.
    pub changes: u64,
    /// Confidence interval of `with` minus `without`, by Welch; `None` if a side has too few intervals.
    pub interval: Option<[f64; 2]>,
    pub interval_level: Option<f64>,
    /// The latency is longer while the other user is active, beyond what the scatter of the intervals explains.
    pub is_longer: bool,
    /// Why it is not; empty if it is.
    pub why_not: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct LatencySide {
    pub intervals: u64,
    /// `None` without an interval.
    pub mean_seconds: Option<f64>,
    /// One standard error, including the similarity of neighbouring intervals; `None` with fewer than two intervals.
    pub stderr_seconds: Option<f64>,
}

/// One reading. Latencies are means since the reading before.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EnginePoint {
    /// Since the start of the report.
    pub second: f64,
    pub waiting: Option<f64>,
    pub running: Option<f64>,
    pub time_to_first_token: Option<f64>,
    pub time_per_output_token: Option<f64>,
    pub queue_time: Option<f64>,
}

impl LatencyKind {
    pub fn all() -> impl Iterator<Item = LatencyKind> {
        Self::VARIANTS.iter().copied()
    }
}

impl EngineReport {
    /// Every comparison, with the engine and the latency that it belongs to.
    pub fn contrasts(&self) -> impl Iterator<Item = (&EngineReport, LatencyKind, &LatencyContrast)> {
        self.latencies
            .iter()
            .flat_map(move |report| report.contrasts.iter().map(move |contrast| (self, report.latency, contrast)))
    }
}

impl LatencyContrast {
    pub fn difference(&self) -> Option<f64> {
        Some(self.with.mean_seconds? - self.without.mean_seconds?)
    }

    /// The difference as a fraction of the latency without the other user; 0 if it is not known.
    pub fn increase_ratio(&self) -> f64 {
        let without = self.without.mean_seconds.filter(|mean| *mean > 0.0);
        self.difference().zip(without).map_or(0.0, |(difference, without)| difference / without)
    }
}
