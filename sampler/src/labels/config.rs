//! What the label service needs of the configuration.

use std::path::PathBuf;

use sampler_labels::{ContainerLabels, QueryAttempt, QueryOutcome, Source, is_likely};

use super::discover::HostPaths;
use super::root::Root;
use super::view::TriedView;
use crate::config::Config;
use crate::observe::kernel::layout::Layout;

#[derive(Clone, Debug)]
pub struct LabelConfig {
    /// The host's file system.
    pub rootfs: PathBuf,
    pub procfs: PathBuf,
    /// Where the cgroup hierarchies are mounted.
    pub cgroups: Vec<PathBuf>,
    pub sources: Vec<Source>,
    /// Sockets given by the operator. A source that is among them is asked nowhere else.
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

    fn gives(&self, source: Source) -> bool {
        self.endpoints.iter().any(|(s, _)| *s == source)
    }

    /// Sources that could know such a container, and are not to be asked.
    pub fn left_out(&self, labels: &ContainerLabels) -> Vec<TriedView> {
        let out = Source::ASKED.into_iter().filter(|s| !self.sources.contains(s) && is_likely(*s, labels));
        let tried = QueryAttempt { told: QueryOutcome::NotTried, at: None, detail: "left out by label_sources".into() };
        out.map(|source| TriedView::new(source, "", &tried)).collect()
    }

    /// The sockets to ask, with their paths here: what was given, else what was found.
    pub fn sockets(&self, places: &HostPaths, root: &Root) -> Vec<(Source, PathBuf)> {
        let given = self.endpoints.iter().cloned();
        let found = places.sockets.iter().filter(|(source, _)| !self.gives(*source)).map(|(s, path)| (*s, root.path(path)));
        let mut all: Vec<(Source, PathBuf)> = Vec::new();
        for one in given.chain(found).filter(|(source, _)| self.sources.contains(source)) {
            if !all.contains(&one) {
                all.push(one);
            }
        }
        all
    }
}
