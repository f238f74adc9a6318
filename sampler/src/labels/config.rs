//! The configuration of the label service.

use std::path::PathBuf;

use sampler_labels::{ContainerLabels, QueryAttempt, QueryOutcome, Source, is_likely};

use super::discover::HostPaths;
use super::root::Root;
use super::view::AttemptView;
use crate::config::Config;
use crate::observe::kernel::layout::Layout;

#[derive(Clone, Debug)]
pub struct LabelConfig {
    /// The host's file system.
    pub rootfs: PathBuf,
    pub procfs: PathBuf,
    /// Mounts of the cgroup hierarchies.
    pub cgroups: Vec<PathBuf>,
    pub sources: Vec<Source>,
    /// Configured sockets. A source with a configured socket is not queried at discovered ones.
    pub endpoints: Vec<(Source, PathBuf)>,
}

impl LabelConfig {
    pub fn new(config: &Config, layout: &Layout) -> Self {
        Self {
            rootfs: config.path_rootfs.clone(),
            procfs: config.path_procfs.clone(),
            cgroups: layout.mounts().map(|(_, mount)| mount.to_owned()).collect(),
            sources: config.label_sources.clone(),
            endpoints: config.label_endpoints.clone(),
        }
    }

    /// Sources that are likely to know the container but are not enabled.
    pub fn excluded_sources(&self, labels: &ContainerLabels) -> Vec<AttemptView> {
        let excluded = Source::QUERIED.into_iter().filter(|s| !self.sources.contains(s) && is_likely(*s, labels));
        let attempt = QueryAttempt { status: QueryOutcome::NotTried, at: None, detail: "excluded by label_sources".into() };
        excluded.map(|source| AttemptView::new(source, "", &attempt)).collect()
    }

    /// The sockets to query, with their paths in this mount namespace: the configured ones, and the discovered ones of other sources.
    pub fn sockets(&self, places: &HostPaths, root: &Root) -> Vec<(Source, PathBuf)> {
        let configured = self.endpoints.iter().cloned();
        let is_configured = |source: Source| self.endpoints.iter().any(|(s, _)| *s == source);
        let discovered = places.sockets.iter().filter(|(s, _)| !is_configured(*s)).map(|(s, path)| (*s, root.path(path)));
        let mut sockets: Vec<(Source, PathBuf)> = Vec::new();
        for socket in configured.chain(discovered).filter(|(source, _)| self.sources.contains(source)) {
            if !sockets.contains(&socket) {
                sockets.push(socket);
            }
        }
        sockets
    }
}
