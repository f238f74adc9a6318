//! What a search for runtimes found.

use std::path::PathBuf;

use sampler_labels::Source;

use super::config::LabelConfig;
use super::discover::HostPaths;
use super::root::Root;
use super::stamp::{Stamp, stamp};

/// What a search found, as it stood then.
pub struct Discovery {
    pub places: HostPaths,
    pub sockets: Vec<FoundSocket>,
}

pub struct FoundSocket {
    pub source: Source,
    /// Here, not on the host.
    pub path: PathBuf,
    pub seen: Option<Stamp>,
}

impl Discovery {
    /// Without a look at who runs.
    pub fn usual(config: &LabelConfig) -> Self {
        Self::at(config, HostPaths::default().with_defaults())
    }

    /// Looks at processes and files: not for a thread that serves others.
    pub fn look(config: &LabelConfig) -> Self {
        Self::at(config, HostPaths::find(&config.procfs, &Root::new(&config.rootfs)))
    }

    fn at(config: &LabelConfig, places: HostPaths) -> Self {
        let root = Root::new(&config.rootfs);
        let sockets = config.sockets(&places, &root).into_iter();
        let sockets = sockets.map(|(source, path)| FoundSocket { source, seen: stamp(&path), path }).collect();
        Self { places, sockets }
    }
}

impl FoundSocket {
    pub fn endpoint(&self) -> String {
        format!("unix://{}", self.path.display())
    }
}
