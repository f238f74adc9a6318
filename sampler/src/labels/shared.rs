//! What the tasks of the label service share.

use arc_swap::ArcSwap;
use tokio::sync::mpsc::Sender;

use super::assigned::AssignedView;
use super::message::Word;
use super::stats::Stats;
use super::view::LabelView;

pub struct Shared {
    pub view: ArcSwap<LabelView>,
    pub stats: Stats,
    pub words: Sender<Word>,
    pub assigned: ArcSwap<AssignedView>,
}
