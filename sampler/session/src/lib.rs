//! The session file format: a header and the facts of a span of time, written to and read from frames.
//!
//! ```text
//!  facts -> State (what belongs in a file) -> Packer -> Frame -> any number of files, each with its own sequence
//!                                                        file -> read -> Session
//! ```
//! No clock and no IO: the recorder (sampler/src/session) decides when a frame is closed and where it is written. The format is
//! described in docs/session-format.md.
//!
//! ```
//! use sampler_core::fact::Fact;
//!
//! let file = include_bytes!("../tests/fixtures/version-1.gpus");
//! let session = sampler_session::read(file)?;
//! assert_eq!(session.header.node, "node-1");
//! assert!(session.damage.is_empty() && session.end.is_some());
//! let containers = session.facts.iter().filter(|fact| matches!(fact, Fact::Container(_)));
//! assert_eq!(containers.count(), 8);
//! # Ok::<(), sampler_session::ReadError>(())
//! ```
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

/// The description of a session, at the beginning of its file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Host name of the machine.
    pub node: String,
    pub agent_version: String,
    /// When the session begins. Earlier facts are in the file as context for the later ones; they are not counted.
    pub start: BootNs,
    pub start_wall: WallTime,
    /// The condition that started the session, as text.
    pub trigger: Option<String>,
    /// The view that was requested for the session; the file has all users of its GPUs nevertheless.
    pub view: View,
    /// The busy share of a window from which a GPU counts as saturated; 0 for the default.
    pub saturation_percent: u8,
}

/// Limits what a report shows. An empty list does not limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// UUIDs, prefixes of UUIDs, or indices.
    pub gpus: Vec<String>,
    /// Container ids, prefixes of ids, names, or pods.
    pub containers: Vec<String>,
    pub namespaces: Vec<String>,
    /// Offsets from the session's start.
    pub from_ns: Option<u64>,
    pub to_ns: Option<u64>,
}

/// The last record of a file; present if the session was stopped in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// When the session ends. Later facts are in the file as context for the earlier ones; they are not counted.
    pub at: BootNs,
    /// Frames that were dropped because the disk did not keep up.
    pub dropped_frames: u64,
}

/// The readable part of a session.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Session {
    pub header: Header,
    pub facts: Vec<Fact>,
    /// The end of a session that was stopped in order; `None` if the file has no End frame.
    pub end: Option<BootNs>,
    /// Descriptions, with positions, of what could not be read, and why. A missing End frame is not damage: everything before it is valid.
    pub damage: Vec<String>,
}
