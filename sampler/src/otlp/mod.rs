//! Metrics by OTLP, for receivers that do not scrape. Only if an endpoint is set in the environment: else no task, thread or connection
//! exists.
//!
//! Each request has all metrics, and sums are cumulative: after a failed one the next has the same information.

mod metrics;
mod settings;
mod transport;

use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

pub use self::settings::{InvalidVariable, OtlpSettings};
use self::transport::{OtlpError, Transport};
use crate::error::display_chain;
use crate::export::state::AppState;
use crate::health::outcomes::OtlpOutcome;

/// The settings in the environment of this process.
pub fn settings() -> Result<Option<OtlpSettings>, InvalidVariable> {
    OtlpSettings::read(|name| std::env::var(name).ok())
}

pub struct OtlpExporter {
    settings: OtlpSettings,
    transport: Transport,
    state: Arc<AppState>,
    /// The message of the last failure.
    failure: Option<String>,
}

impl OtlpExporter {
    pub fn new(settings: OtlpSettings, state: Arc<AppState>) -> Result<Self, OtlpError> {
        let transport = Transport::new(&settings)?;
        state.health.otlp.turn_on();
        Ok(Self { settings, transport, state, failure: None })
    }

    /// Exports at every interval, and once more when `stopped` changes or is dropped.
    pub async fn run(mut self, mut stopped: watch::Receiver<()>) {
        tracing::info!(endpoint = self.settings.endpoint, interval = ?self.settings.interval, "exporting metrics by OTLP");
        let mut interval = tokio::time::interval(self.settings.interval);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first tick is at once, when nothing is known yet.
        interval.tick().await;
        loop {
            let is_last = tokio::select! {
                _ = interval.tick() => false,
                _ = stopped.changed() => true,
            };
            self.export().await;
            if is_last {
                return;
            }
        }
    }

    async fn export(&mut self) {
        self.state.refresh().await;
        let (page, _) = self.state.view();
        let request = metrics::request(&page, self.state.started, self.state.node.as_deref(), &self.settings.resource);
        let sent = self.transport.send(request).await;
        self.state.health.otlp.record(if sent.is_ok() { OtlpOutcome::Ok } else { OtlpOutcome::Error });
        match sent {
            Ok(()) => {
                if self.failure.take().is_some() {
                    tracing::info!("metrics are exported by OTLP again");
                }
            }
            Err(error) => {
                let message = display_chain(&error);
                // Once for each cause.
                if self.failure.as_ref() != Some(&message) {
                    tracing::warn!(endpoint = self.settings.endpoint, "cannot export metrics by OTLP: {message}");
                    self.failure = Some(message);
                }
            }
        }
    }
}
