//! A recorded session: a header and the facts of a span of time, as read back from a file or from memory.
//!
//! ```text
//!  facts -> State (what belongs in a file) -> Packer -> Frame -> any number of files, each with its own sequence
//!                                                        file -> read -> Session
//! ```
//! No clock and no IO: when a frame is closed and where it goes is the recorder's business (sampler/src/session). The format is
//! described in docs/session-format.md.
#![forbid(unsafe_code)]

mod frame;
mod read;
mod state;
#[cfg(test)]
mod tests;
pub mod trigger;
mod write;

use serde::{Deserialize, Serialize};

use sampler_core::fact::Fact;
use sampler_core::units::{BootNs, WallTime};

pub use self::frame::{Frame, Kind, MAJOR, MARKER, MINOR};
pub use self::read::{MAX_FACTS, ReadError, end, header, read};
pub use self::state::State;
pub use self::write::{FileBytes, PackError, Packer};

/// What a session file says of itself, first of all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The machine, as it calls itself.
    pub node: String,
    pub agent_version: String,
    /// When the session begins; facts from before it are there so that what follows can be told: they are not counted.
    pub start: BootNs,
    pub start_wall: WallTime,
    /// In words: the condition that began it.
    pub trigger: Option<String>,
    /// The view that was asked for when it was recorded; the file keeps every user of its GPUs.
    pub view: View,
    /// A GPU that is busy for so much of a window is saturated; 0 for the default.
    pub saturation_percent: u8,
}

/// Narrows what a report shows. Empty lists: everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// UUIDs, or their beginnings, or indices.
    pub gpus: Vec<String>,
    /// Ids or their beginnings, names, pods.
    pub containers: Vec<String>,
    pub namespaces: Vec<String>,
    /// Offsets from the session's start.
    pub from_ns: Option<u64>,
    pub to_ns: Option<u64>,
}

/// The last thing in a file, when it was stopped in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// When the session ends; facts from after it are there so that what was before can be told: they are not counted.
    pub at: BootNs,
    /// Frames that were left out because the disk did not keep up.
    pub dropped_frames: u64,
}

/// A session as far as it could be read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Session {
    pub header: Header,
    pub facts: Vec<Fact>,
    /// When it was stopped in order; `None` where the file ends before.
    pub end: Option<BootNs>,
    /// In words, with positions: what could not be read, and why. That there is no end is none: all that is there is good.
    pub damage: Vec<String>,
}
