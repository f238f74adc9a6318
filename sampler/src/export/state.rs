//! State that request handlers share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use sampler_core::snapshot::Snapshot;
use sampler_core::units::WallTime;

use super::assigned::AssignedGpus;
use super::ledger::{Exposition, Ledger};
use super::series_starts::SeriesStarts;
use crate::config::Config;
use crate::health::Health;
use crate::inbox::CoreSender;
use crate::labels::LabelService;
use crate::observe::pressure::PressureView;
use crate::session::Recorder;

pub struct AppState {
    pub config: Arc<Config>,
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    pub labels: LabelService,
    pub pressure: Arc<ArcSwap<PressureView>>,
    pub health: Arc<Health>,
    pub ledger: Mutex<Ledger>,
    pub core: CoreSender,
    pub recorder: Recorder,
    /// Host name of the machine.
    pub node: Option<String>,
}

impl AppState {
    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The present exposition, and the time of its snapshot.
    pub fn view(&self) -> (Exposition, WallTime) {
        let (snapshot, labels) = (self.snapshot.load(), self.labels.view());
        let assigned = AssignedGpus::new(&self.labels.assigned(), &snapshot);
        let mut ledger = self.ledger();
        ledger.update(&snapshot, &labels);
        (ledger.view(&snapshot, &labels, &assigned), snapshot.wall)
    }

    /// The exposition for a scrape: its values count as delivered. `encode` writes it, with the ledger locked.
    pub fn scrape<T>(&self, encode: impl FnOnce(&Exposition, &mut SeriesStarts) -> T) -> T {
        let (snapshot, labels) = (self.snapshot.load(), self.labels.view());
        let assigned = AssignedGpus::new(&self.labels.assigned(), &snapshot);
        let mut ledger = self.ledger();
        let page = ledger.scrape(&snapshot, &labels, &assigned);
        encode(&page, &mut ledger.starts)
    }
}
