//! Messages to the task that owns the resolver.

use std::sync::Arc;

use sampler_core::identity::ContainerRecord;
use sampler_core::units::{BootNs, ContainerKey};
use sampler_labels::{Query, TargetId};
use tokio::sync::oneshot;

use super::activation::Presence;
use super::discovered::{Discovery, FoundSocket};
use super::source::reply::SourceReply;
use super::view::AttemptView;

#[derive(Clone)]
pub enum ContainerEvent {
    Appeared(Arc<ContainerRecord>),
    Gone(ContainerKey, BootNs),
    Evicted(ContainerKey),
}

/// Messages other than container events.
pub enum LabelMessage {
    QueryFinished(Query, SourceReply),
    FilesRead(Vec<(Query, SourceReply)>),
    /// A runtime reported an event of the container with this id.
    Hint(String),
    /// The endpoint appeared or was replaced, its engine started or stopped, or it is gone.
    EndpointChanged {
        target: TargetId,
        presence: Presence,
    },
    Discovery(Discovery),
    DefaultSockets(Vec<FoundSocket>),
    /// Whether a socket responded to a probe.
    Probed(TargetId, Result<(), String>),
    Attempts(ContainerKey, oneshot::Sender<Vec<AttemptView>>),
}
