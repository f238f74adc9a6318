//! What request handlers share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use sampler_core::snapshot::Snapshot;
use sampler_core::units::WallTime;

use super::assigned::AssignedGpus;
use super::ledger::{Exposition, Ledger};
use super::pressure::Waits;
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
    ledger: Mutex<Ledger>,
    waits: Mutex<Waits>,
    pub core: CoreSender,
    pub recorder: Recorder,
    /// Host name of the machine.
    pub node: Option<String>,
}

impl AppState {
    pub fn new(
        config: Arc<Config>,
        snapshot: Arc<ArcSwap<Snapshot>>,
        labels: LabelService,
        pressure: Arc<ArcSwap<PressureView>>,
        health: Arc<Health>,
        core: CoreSender,
        recorder: Recorder,
    ) -> Self {
        let node = config.node();
        let (ledger, waits) = (Mutex::default(), Mutex::default());
        Self { config, snapshot, labels, pressure, health, ledger, waits, core, recorder, node }
    }

    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn waits(&self) -> MutexGuard<'_, Waits> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All series, and the time of the snapshot that they are of.
    pub fn view(&self) -> (Exposition, WallTime) {
        let (snapshot, labels) = (self.snapshot.load(), self.labels.view());
        let assigned = AssignedGpus::new(&self.labels.assigned(), &snapshot);
        let mut ledger = self.ledger();
        ledger.update(&snapshot, &labels);
        (ledger.view(&snapshot, &labels, &assigned), snapshot.wall)
    }

    /// All series for a scrape, which counts: new counters start at 0, and final values count as delivered.
    pub fn scrape(&self) -> Exposition {
        let (snapshot, labels) = (self.snapshot.load(), self.labels.view());
        let assigned = AssignedGpus::new(&self.labels.assigned(), &snapshot);
        self.ledger().scrape(&snapshot, &labels, &assigned)
    }
}
