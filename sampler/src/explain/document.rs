//! The documents of `explain --json` and `/api/v1/explain`. The agent writes them, the command reads and prints them.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::host_users::HostUsersJson;
use crate::labels::AttemptView;

/// A name that is borrowed where a document is built and owned where it is read.
pub type Name = Cow<'static, str>;

#[derive(Serialize, Deserialize)]
pub struct LabelValue {
    pub value: String,
    pub source: Name,
}

/// The origin of an explanation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// Kernel events, and the sources that the agent queried.
    Agent,
    /// /proc, and every source, queried now.
    Sources,
    /// Only the path.
    Path,
}

/// The output of `explain --json`. Ids are not shortened, unknown values are null, times are RFC 3339.
#[derive(Serialize, Deserialize)]
pub struct Explanation {
    pub kind: Name,
    pub runtime: Option<Name>,
    pub container_id: Option<String>,
    pub pod_uid: Option<String>,
    pub outer_container_id: Option<String>,
    #[serde(flatten)]
    pub users: HostUsersJson,
    pub cgroup: String,
    /// When the last cgroup of the container was removed; null while it exists.
    pub ended: Option<String>,
    /// False if there is no such cgroup now; absent if this was not checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exists: Option<bool>,
    pub labels: BTreeMap<Name, LabelValue>,
    /// Labels that this kind of container should have and that no source has returned yet.
    pub missing: Vec<Name>,
    pub not_applicable: Vec<Name>,
    /// Every source with its outcome; empty if only the path was used.
    pub tried: Vec<AttemptView>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub would_fill: Providers,
    pub answered_by: Origin,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<ProcessJson>,
}

/// For each missing label, the sources that could provide it, and why they have not.
pub type Providers = BTreeMap<Name, Vec<String>>;

#[derive(Serialize, Deserialize)]
pub struct ProcessJson {
    pub pid: u32,
    /// Its present name; null after its end.
    pub comm: Option<String>,
    /// The processes that had this PID, newest first, because a PID is reused.
    pub lives: Vec<LifetimeJson>,
}

#[derive(Serialize, Deserialize)]
pub struct LifetimeJson {
    pub start: String,
    /// Null until it ends.
    pub end: Option<String>,
    pub stays: Vec<ResidencyJson>,
}

#[derive(Serialize, Deserialize)]
pub struct ResidencyJson {
    pub cgroup: Option<String>,
    pub container_id: Option<String>,
    pub from: String,
    /// Later than `from` if the move itself was not observed.
    pub certain_from: String,
    pub to: Option<String>,
}

/// A container that lacks a label.
#[derive(Serialize, Deserialize)]
pub struct IncompleteContainer {
    pub container_id: String,
    pub cgroup: String,
    pub kind: Name,
    pub runtime: Option<Name>,
    pub missing: Vec<Name>,
    pub would_fill: Providers,
}

/// The output of `explain --missing --json`.
#[derive(Serialize, Deserialize)]
pub struct IncompleteContainers {
    pub containers: Vec<IncompleteContainer>,
    /// Number of further such containers.
    pub more: usize,
}
