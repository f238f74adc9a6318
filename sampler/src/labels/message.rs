//! Messages to the task that drives the ladder.

use std::sync::Arc;

use sampler_core::identity::ContainerRecord;
use sampler_core::units::{BootNs, ContainerKey};
use sampler_labels::{Query, TargetId};
use tokio::sync::oneshot;

use super::discovered::{Discovery, FoundSocket};
use super::source::answer::Answer;
use super::view::TriedView;

#[derive(Clone)]
pub enum ContainerEvent {
    Appeared(Arc<ContainerRecord>),
    Gone(ContainerKey, BootNs),
    Evicted(ContainerKey),
}

/// What reaches the driver beside containers.
pub enum LabelMessage {
    Answered(Query, Answer),
    /// A runtime spoke of this container.
    Hint(String),
    /// Something appeared at this endpoint, or was replaced.
    Back(TargetId),
    Absent(TargetId),
    Discovery(Discovery),
    Usual(Vec<FoundSocket>),
    /// What is wrong with a socket that nobody was asked about.
    Probed(TargetId, Result<(), String>),
    Attempts(ContainerKey, oneshot::Sender<Vec<TriedView>>),
}
