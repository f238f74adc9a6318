//! The result of a search for runtimes.

use std::path::PathBuf;

use sampler_labels::Source;

use super::activation::{ActivationGuard, Presence};
use super::config::LabelConfig;
use super::discover::HostPaths;
use super::process_search::ProcessSearch;
use super::root::Root;

/// Paths and sockets at the time of the search.
pub struct Discovery {
    pub places: HostPaths,
    pub sockets: Vec<FoundSocket>,
}

pub struct FoundSocket {
    pub source: Source,
    /// In this mount namespace, not the host's.
    pub path: PathBuf,
    pub presence: Presence,
}

impl Discovery {
    /// The default and configured paths, without a search of processes.
    pub fn defaults(config: &LabelConfig, guard: &ActivationGuard) -> Self {
        Self::at(config, guard, HostPaths::default().with_defaults())
    }

    /// Searches processes and files. Blocking.
    pub fn search(config: &LabelConfig, guard: &ActivationGuard) -> Self {
        Self::search_with(config, guard, &mut ProcessSearch::default())
    }

    /// As [`Discovery::search`], with what earlier searches have found.
    pub fn search_with(config: &LabelConfig, guard: &ActivationGuard, search: &mut ProcessSearch) -> Self {
        Self::at(config, guard, search.find(&config.procfs, &Root::new(&config.rootfs)))
    }

    fn at(config: &LabelConfig, guard: &ActivationGuard, places: HostPaths) -> Self {
        let root = Root::new(&config.rootfs);
        let sockets = config.sockets(&places, &root).into_iter();
        let sockets = sockets.map(|(source, path)| FoundSocket { source, presence: guard.presence(&path), path }).collect();
        Self { places, sockets }
    }
}

impl FoundSocket {
    pub fn endpoint(&self) -> String {
        format!("unix://{}", self.path.display())
    }
}
