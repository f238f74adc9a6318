//! Docker's record of a container. Its file and its inspect response have the same fields, and so has podman's response.
//!
//! Only the fields in use are decoded; all are optional, and unknown fields and values are ignored.

use std::collections::HashMap;

use sampler_core::cgroup_path::Runtime;
use sampler_labels::{Facts, Label};
use serde::Deserialize;

use super::file;
use super::host_files::HostFiles;
use super::reply::{SourceReply, first_found};
use crate::labels::discover::HostPaths;

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct DockerRecord {
    #[serde(rename = "ID", alias = "Id")]
    id: Option<String>,
    name: Option<String>,
    /// podman's name of the image: its `Config.Image` may be an id.
    image_name: Option<String>,
    config: Option<DockerConfig>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct DockerConfig {
    image: Option<String>,
    labels: Option<HashMap<String, Option<String>>>,
}

impl DockerRecord {
    /// Converts the record; one without any label is an error.
    pub fn reply(&self, runtime: Runtime, requested_id: &str) -> SourceReply {
        // Engines also match names and prefixes of ids.
        if self.id.as_deref().is_some_and(|id| !id.is_empty() && id != requested_id) {
            return SourceReply::not_found();
        }
        match self.facts(runtime) {
            facts if facts.labels.iter().all(Option::is_none) => SourceReply::error("the record has no name, image or labels"),
            facts => SourceReply::found(facts),
        }
    }

    fn facts(&self, runtime: Runtime) -> Facts {
        let mut facts = Facts { runtime: Some(runtime), pod_status_known: true, ..Facts::default() };
        let name = self.name.as_deref().unwrap_or_default().trim_start_matches('/');
        facts.set(Label::Name, Some(name));
        if let Some(config) = &self.config {
            facts.set(Label::Image, config.image.as_deref().filter(|i| !i.is_empty()).or(self.image_name.as_deref()));
            if let Some(labels) = &config.labels {
                let get = |key: &str| labels.get(key).and_then(Option::as_deref);
                facts.from_kubelet_labels(get);
                facts.sandbox = get("io.kubernetes.docker.type") == Some("podsandbox");
            }
        }
        facts.from_dockershim_name(name);
        facts
    }
}

/// The value of a label of the container.
pub fn label(files: &HostFiles, places: &HostPaths, id: &str, key: &str) -> Result<Option<String>, String> {
    first_found(places.docker_roots.iter().map(|folder| {
        let path = files.path(&folder.join("containers")).join(id).join("config.v2.json");
        let record = file::read::<DockerRecord>(&path)?;
        Ok::<_, String>(record.and_then(|record| record.config?.labels?.remove(key)?))
    }))
}

pub fn query(files: &HostFiles, places: &HostPaths, id: &str) -> SourceReply {
    SourceReply::first_of(&places.docker_roots, |folder| {
        let path = files.path(&folder.join("containers")).join(id).join("config.v2.json");
        let record = file::read::<DockerRecord>(&path)?;
        Ok(record.map(|record| record.reply(Runtime::Docker, id)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labels::source::tests::{Files, check, check_bounds};

    #[test]
    fn records_of_docker_have_name_image_and_labels() {
        let case = |text: &str, expect: &str| {
            let files = Files::new(&[("var/lib/docker/containers/c1/config.v2.json", text)]);
            check(&query(&files.host(), &HostPaths::default().with_defaults(), "c1"), expect);
        };
        case(r#"{"Name":"/web","Config":{"Image":"i","Labels":null},"State":{"Status":"new-word"}}"#, "-/-/- web i");
        case(r#"{"Name":"/k8s_c_p_n_uid_0","Config":{"Image":"i"}}"#, "n/p/c k8s_c_p_n_uid_0 i");
        case(r#"{"Name":"/k8s_POD_p_n_uid_0","Config":{"Image":"pause"}}"#, "sandbox n/p/POD k8s_POD_p_n_uid_0 pause");
        case(r#"{"Config":{"Labels":{"io.kubernetes.pod.name":"p","io.kubernetes.container.name":"","x":null}}}"#, "-/p/- - -");
        case(r#"{"ID":"c1","Name":"/x"}"#, "-/-/- x -");
        case(r#"{"ID":"another","Name":"/x"}"#, "not-found");
        case(r#"{"Id":"another","Name":"/x"}"#, "not-found");
        case("[]", "error");
        case("{}", "error");
        case("{", "not-found");
        case("{]", "error");
    }

    /// The record of Docker and podman: that of another container is never used.
    #[test]
    fn fuzz_docker() {
        devkit::fuzz(file!(), "docker", move |bytes| {
            let Ok(record) = serde_json::from_slice::<DockerRecord>(bytes) else { return };
            for runtime in [Runtime::Docker, Runtime::Podman] {
                let reply = record.reply(runtime, "c1");
                check_bounds(&reply);
                let is_another = record.id.as_ref().is_some_and(|id| !id.is_empty() && id != "c1");
                assert_eq!(is_another, reply.outcome == sampler_labels::Outcome::NotFound);
            }
        });
    }
}
