//! Release of GPUs on request: MIG changes, resets, unloading of the driver and VFIO need that no process has their device nodes open.
//!
//! NVML closes a device node only with its last shutdown, so gpu-watch ends all GPU threads and closes the library. With one GPU of several
//! to release, it opens the library again at once and opens the other GPUs by their PCI addresses.
//!
//! ```text
//!  sampled --request--> threads end, library closed, reply --others by PCI address--> released --time over--> sampled
//! ```

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::oneshot;

use super::device_nodes::names_node;

/// A forgotten release must not leave a GPU unobserved for days; a request may be repeated.
pub const MOST_SECONDS: u64 = 3600;
pub const DEFAULT_SECONDS: u64 = 60;
/// Requests that wait for gpu-watch, which handles them one after the other.
const MOST_WAITING: usize = 4;
/// Limit for a reply: threads in calls that hang are given up before that.
const PATIENCE: Duration = Duration::from_secs(15);

/// A GPU by its index or UUID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum GpuSelector {
    Index(u32),
    Name(String),
}

impl std::fmt::Display for GpuSelector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            GpuSelector::Index(index) => index.fmt(f),
            GpuSelector::Name(name) => write!(f, "{name:?}"),
        }
    }
}

impl GpuSelector {
    pub fn matches(&self, index: u32, uuid: &str) -> bool {
        match self {
            GpuSelector::Index(wanted) => *wanted == index,
            GpuSelector::Name(name) => name == uuid || name.parse() == Ok(index),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleasedGpu {
    pub index: u32,
    pub uuid: String,
}

/// The reply to a request that was carried out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Released {
    pub released: Vec<ReleasedGpu>,
    /// The device nodes that were open in the agent until they were closed. Those of other GPUs are opened again at once.
    pub closed: Vec<PathBuf>,
    pub seconds: u64,
    /// When the agent opens the GPUs again, RFC 3339.
    pub resumes: String,
}

#[derive(Debug, Error)]
pub enum ReleaseError {
    #[error("there is no GPU {wanted}; the agent knows {known}")]
    Unknown { wanted: GpuSelector, known: String },
    #[error("released, but {} stays open because a driver call does not return; check dmesg for Xid lines", nodes.join(", "))]
    Hangs { nodes: Vec<String> },
    #[error("the agent is busy with other releases, or is stopping; try again")]
    Busy,
}

pub struct ReleaseRequest {
    pub gpu: Option<GpuSelector>,
    pub lasting: Duration,
    reply: oneshot::Sender<Result<Released, ReleaseError>>,
}

impl ReleaseRequest {
    /// Whether the client still waits: a request that it has given up must not be carried out later.
    pub fn is_awaited(&self) -> bool {
        !self.reply.is_closed()
    }

    pub fn reply(self, result: Result<Released, ReleaseError>) {
        // The client may have disconnected.
        let _received = self.reply.send(result);
    }
}

/// Passes requests to gpu-watch.
#[derive(Clone, Debug)]
pub struct ReleaseSender(SyncSender<ReleaseRequest>);

pub fn channel() -> (ReleaseSender, Receiver<ReleaseRequest>) {
    let (to, from) = sync_channel(MOST_WAITING);
    (ReleaseSender(to), from)
}

impl ReleaseSender {
    /// Releases one GPU, or all.
    pub async fn release(&self, gpu: Option<GpuSelector>, lasting: Duration) -> Result<Released, ReleaseError> {
        let (reply, replied) = oneshot::channel();
        self.0.try_send(ReleaseRequest { gpu, lasting, reply }).map_err(|_| ReleaseError::Busy)?;
        match tokio::time::timeout(PATIENCE, replied).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) | Err(_) => Err(ReleaseError::Busy),
        }
    }
}

/// The NVIDIA device nodes that this process has open.
pub fn open_nodes() -> Vec<PathBuf> {
    let links = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let mut nodes: Vec<PathBuf> = links.filter_map(|link| std::fs::read_link(link.path()).ok()).collect();
    nodes.retain(|node| names_node(node.as_os_str()));
    nodes.sort_unstable();
    nodes.dedup();
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_selected_by_index_or_uuid() {
        let matches = |json: &str| serde_json::from_str::<GpuSelector>(json).unwrap().matches(3, "GPU-x");
        assert!(matches("3") && matches("\"3\"") && matches("\"GPU-x\""));
        assert!(!matches("0") && !matches("\"GPU-y\"") && !matches("\"\""));
        assert!(serde_json::from_str::<GpuSelector>("-1").is_err());
    }

    #[test]
    fn open_device_nodes_of_this_process_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let node = dir.path().join("nvidia7");
        std::fs::write(&node, "").unwrap();
        let is_open = || open_nodes().contains(&node);
        assert!(!is_open());
        let file = std::fs::File::open(&node).unwrap();
        assert!(is_open());
        drop(file);
        assert!(!is_open());
    }
}
