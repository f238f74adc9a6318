//! The output types of the label service.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use sampler_core::units::ContainerKey;
use sampler_labels::{ABSENT, ContainerLabels, QueryAttempt, Source};
use serde::{Deserialize, Serialize};

/// The endpoint name of sources that read files.
pub const FILES: &str = "files";

pub type LabelView = HashMap<ContainerKey, Arc<ContainerLabels>>;

/// The result of one source, as `explain` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AttemptView {
    pub source: Cow<'static, str>,
    pub endpoint: String,
    pub outcome: Cow<'static, str>,
    pub detail: String,
}

impl AttemptView {
    pub fn is_absent(&self) -> bool {
        self.detail == ABSENT
    }

    pub fn new(source: Source, endpoint: &str, attempt: &QueryAttempt) -> Self {
        Self {
            source: source.name().into(),
            endpoint: attempt.at.as_deref().unwrap_or(endpoint).to_owned(),
            outcome: attempt.status.name().into(),
            detail: attempt.detail.to_string(),
        }
    }
}
