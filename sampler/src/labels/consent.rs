//! Whether a container may be frozen by an experiment: an annotation of its OCI bundle, or a label of Docker's record, says so.
//!
//! It is read when an experiment starts, from the files of the runtimes, and is not kept. Who starts a container sets its annotations and
//! labels, and thereby consents for that container only. Docker's record has the labels of the image, too, and does not distinguish them.

use super::config::LabelConfig;
use super::discovered::Discovery;
use super::root::Root;
use super::source::LabelSources;

/// The annotation or label, which must have the value [`MAY_FREEZE_VALUE`].
pub const MAY_FREEZE: &str = "gpu-sampler.io/may-freeze";
pub const MAY_FREEZE_VALUE: &str = "true";

/// What the runtimes' files state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Consent {
    Given,
    /// No file of a runtime has the annotation or label with this value.
    NotGiven,
    /// Files could not be read.
    Unknown(String),
}

/// Reads the files of all runtimes. Blocking.
pub fn consent(config: &LabelConfig, container_id: &str) -> Consent {
    let sources = LabelSources::new(Root::new(&config.rootfs), config.procfs.clone(), config.cgroups.clone());
    let Discovery { places, .. } = Discovery::search(config, &sources.guard);
    match super::source::marked(&sources.host, &places, container_id, MAY_FREEZE) {
        Ok(Some(value)) if value == MAY_FREEZE_VALUE => Consent::Given,
        Ok(_) => Consent::NotGiven,
        Err(problem) => Consent::Unknown(problem),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consent_is_an_annotation_of_a_bundle_or_a_label_of_docker() {
        let check = |path: &str, text: &str, expect: &Consent| {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join(path);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, text).unwrap();
            let config = LabelConfig {
                rootfs: dir.path().to_owned(),
                // No process of this machine is searched for runtimes.
                procfs: dir.path().join("no-proc"),
                cgroups: Vec::new(),
                sources: Vec::new(),
                endpoints: Vec::new(),
            };
            assert_eq!(&consent(&config, "c1"), expect, "{path}: {text}");
        };
        let containerd = "run/containerd/io.containerd.runtime.v2.task/k8s.io/c1/config.json";
        let annotated = |value: &str| format!("{{\"annotations\":{{\"gpu-sampler.io/may-freeze\":\"{value}\"}}}}");
        check(containerd, &annotated("true"), &Consent::Given);
        check(containerd, &annotated("yes"), &Consent::NotGiven);
        check(containerd, "{}", &Consent::NotGiven);
        check(&containerd.replace("c1", "c2"), &annotated("true"), &Consent::NotGiven);
        let podman = "var/lib/containers/storage/overlay-containers/c1/userdata/config.json";
        check(podman, &annotated("true"), &Consent::Given);
        let docker = "var/lib/docker/containers/c1/config.v2.json";
        check(docker, r#"{"Name":"/a","Config":{"Labels":{"gpu-sampler.io/may-freeze":"true"}}}"#, &Consent::Given);
        check(docker, r#"{"Name":"/a","Config":{"Labels":{"gpu-sampler.io/may-freeze":null}}}"#, &Consent::NotGiven);
    }
}
