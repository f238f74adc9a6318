//! State that request handlers share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use sampler_core::snapshot::Snapshot;
use sampler_core::units::WallTime;
use sampler_labels::{Assignment, Label};

use super::assigned::AssignedGpus;
use super::encode::PageSizes;
use super::exposition::Exposition;
use super::gpu_holders::GpuHolders;
use super::ledger::{Ledger, Scrape};
use super::rejections::Rejections;
use super::series_starts::SeriesStarts;
use crate::config::Config;
use crate::health::Health;
use crate::inbox::CoreSender;
use crate::labels::{LabelService, LabelView};
use crate::observe::gpu::ReleaseSender;
use crate::observe::pressure::PressureView;
use crate::security::Security;
use crate::session::Recorder;

pub struct AppState {
    /// Replaced on SIGHUP.
    pub config: ArcSwap<Config>,
    pub security: Arc<Security>,
    pub rejections: Rejections,
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    pub labels: LabelService,
    pub pressure: Arc<ArcSwap<PressureView>>,
    pub health: Arc<Health>,
    pub ledger: Mutex<Ledger>,
    /// Of the last page of `/metrics`.
    pub page_sizes: ArcSwap<PageSizes>,
    pub core: CoreSender,
    pub recorder: Recorder,
    pub gpus: ReleaseSender,
    /// When the agent started: its own counts were 0.
    pub started: WallTime,
    /// Host name of the machine.
    pub node: Option<String>,
}

/// How long a request waits for a snapshot of now; the last one is not older than that and a second. A scan of all processes takes
/// longer, and a scrape does not wait for it.
const SNAPSHOT_PATIENCE: Duration = Duration::from_millis(100);

impl AppState {
    pub fn config(&self) -> Arc<Config> {
        self.config.load_full()
    }

    /// Makes the snapshot current, if that is quick.
    pub async fn refresh(&self) {
        self.core.publish(SNAPSHOT_PATIENCE).await;
    }

    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Snapshots reach the ledger in order: they are loaded with it locked.
    fn with_ledger<T>(&self, act: impl FnOnce(&mut Ledger, &Snapshot, &LabelView, &AssignedGpus) -> T) -> T {
        let mut ledger = self.ledger();
        let (snapshot, labels) = (self.snapshot.load(), self.labels.view());
        let assigned = AssignedGpus::new(&self.labels.assigned(), &snapshot, Arc::clone(&self.config().reservation_namespaces));
        act(&mut ledger, &snapshot, &labels, &assigned)
    }

    /// The present exposition, and the time of its snapshot.
    pub fn view(&self) -> (Exposition, WallTime) {
        self.with_ledger(|ledger, snapshot, labels, assigned| {
            ledger.update(snapshot, labels);
            let mut page = ledger.view(snapshot, labels, assigned);
            ledger.add_contenders(&mut page);
            (page, snapshot.wall)
        })
    }

    /// Who holds this GPU, by UUID or index; `None` if there is no such GPU.
    pub fn gpu_holders(&self, gpu: &str) -> Option<GpuHolders> {
        self.with_ledger(|ledger, snapshot, labels, assigned| {
            ledger.update(snapshot, labels);
            let page = ledger.view(snapshot, labels, assigned);
            let of_pod = |uid: &String| labels.values().find(|labels| labels.pod_uid.as_ref() == Some(uid));
            let is_reservation = |assignment: &Assignment| {
                assignment.namespace.as_deref().is_some_and(|namespace| assigned.reserves(namespace))
                    || assignment
                        .pod_uid
                        .as_ref()
                        .and_then(of_pod)
                        .is_some_and(|pod| assigned.reserves(pod.text(Label::Namespace)))
            };
            GpuHolders::find(gpu, &page, snapshot, &self.labels.assigned().assignments, is_reservation)
        })
    }

    /// As [`AppState::view`], with the labels of the pairs as text.
    pub fn view_with_texts(&self) -> Exposition {
        self.with_ledger(|ledger, snapshot, labels, assigned| {
            ledger.update(snapshot, labels);
            let mut page = ledger.view(snapshot, labels, assigned);
            ledger.add_texts(&mut page, self.config().pod_labels);
            page
        })
    }

    /// The exposition for a scrape. `encode` writes it, with the ledger locked.
    pub fn scrape<T>(&self, scrape: &Scrape<'_>, encode: impl FnOnce(&Exposition, &mut SeriesStarts) -> T) -> T {
        self.with_ledger(|ledger, snapshot, labels, assigned| {
            let page = ledger.scrape(scrape, snapshot, labels, assigned);
            encode(&page, &mut ledger.starts)
        })
    }
}
