//! Explains to which container a process belongs and belonged, and where labels come from: for `explain` and `/api/v1/explain`.
//!
//! A running agent answers from the tables of its core thread and its label service, without a query to a label source (`from_agent`).
//! Without an agent, /proc, cgroupfs and every label source are read once (`from_sources`). Both build the same document.

mod build;
mod document;
mod from_agent;
mod from_sources;
mod host_users;
mod unknown;

pub use self::document::{Explanation, IncompleteContainers, Origin, ProcessJson, Providers, ResidencyJson};
pub use self::from_agent::AgentTables;
pub use self::from_sources::from_sources;
pub use self::unknown::plain_id;
