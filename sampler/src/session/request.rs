//! A request to record a session.

use sampler_session::View;
use sampler_session::trigger::Trigger;

use crate::serving::EngineRequest;
use crate::wait_selector::WaitSelector;

pub const MAX_DURATION_S: f64 = 86_400.0;
pub const MAX_LOOKBACK_S: f64 = 3600.0;

#[derive(Clone, Debug, Default)]
pub struct Request {
    pub duration_ns: u64,
    pub lookback_ns: u64,
    /// Recording starts when this condition holds.
    pub trigger: Option<Trigger>,
    pub view: View,
    /// Processes that have wait probes while the session records.
    pub wait_probes: Option<WaitSelector>,
    /// The metrics of serving engines are recorded.
    pub engines: Option<EngineRequest>,
}
