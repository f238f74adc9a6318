//! State that the tasks of the label service share.

use arc_swap::ArcSwap;
use tokio::sync::mpsc::Sender;

use super::assigned::AssignedView;
use super::message::LabelMessage;
use super::stats::Stats;
use super::view::LabelView;

pub struct SharedLabels {
    pub view: ArcSwap<LabelView>,
    pub stats: Stats,
    pub messages: Sender<LabelMessage>,
    pub assigned: ArcSwap<AssignedView>,
}
