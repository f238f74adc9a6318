//! What the label service shows.

use std::collections::HashMap;
use std::sync::Arc;

use sampler_core::units::ContainerKey;
use sampler_labels::{ABSENT, ContainerLabels, QueryAttempt, Source};
use serde::Serialize;

/// The endpoint of sources that have none.
pub const FILES: &str = "files";

pub type LabelView = HashMap<ContainerKey, Arc<ContainerLabels>>;

/// What came of one source, as `explain` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct TriedView {
    pub source: &'static str,
    pub endpoint: String,
    pub outcome: &'static str,
    pub detail: String,
}

impl TriedView {
    pub fn is_absent(&self) -> bool {
        self.detail == ABSENT
    }

    pub fn new(source: Source, endpoint: &str, tried: &QueryAttempt) -> Self {
        Self {
            source: source.name(),
            endpoint: tried.at.as_deref().unwrap_or(endpoint).to_owned(),
            outcome: tried.told.name(),
            detail: tried.detail.to_string(),
        }
    }
}
