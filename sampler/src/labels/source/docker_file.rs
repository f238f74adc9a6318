//! Docker's record of a container, in its file and in its answer to an inspect: the same fields. podman's answer has them too.
//!
//! Only what is used is decoded, everything is optional, unknown fields and values are ignored.

use std::collections::HashMap;

use sampler_core::cgroup_path::Runtime;
use sampler_labels::{Facts, Label};
use serde::Deserialize;

use super::answer::Answer;
use super::file;
use crate::labels::discover::HostPaths;
use crate::labels::root::Root;

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct DockerRecord {
    #[serde(rename = "ID", alias = "Id")]
    id: Option<String>,
    name: Option<String>,
    /// podman's own name for it: in its answers `Config.Image` may be an id.
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
    /// What decodes and holds nothing is no record of a container.
    pub fn answer(&self, runtime: Runtime, asked: &str) -> Answer {
        // Engines complete names and beginnings of ids.
        if self.id.as_deref().is_some_and(|id| !id.is_empty() && id != asked) {
            return Answer::not_found();
        }
        match self.facts(runtime) {
            facts if facts.labels.iter().all(Option::is_none) => Answer::error("a record without name, image or labels"),
            facts => Answer::found(facts),
        }
    }

    fn facts(&self, runtime: Runtime) -> Facts {
        let mut facts = Facts { runtime: Some(runtime), knows_pods: true, ..Facts::default() };
        let name = self.name.as_deref().unwrap_or_default().trim_start_matches('/');
        facts.set(Label::Name, Some(name));
        if let Some(config) = &self.config {
            facts.set(Label::Image, config.image.as_deref().filter(|i| !i.is_empty()).or(self.image_name.as_deref()));
            if let Some(labels) = &config.labels {
                let get = |key: &str| labels.get(key).and_then(Option::as_deref);
                facts.from_kubelets_labels(get);
                facts.sandbox = get("io.kubernetes.docker.type") == Some("podsandbox");
            }
        }
        facts.from_dockershim_name(name);
        facts
    }
}

pub fn ask(root: &Root, places: &HostPaths, id: &str) -> Answer {
    Answer::first_of(&places.docker_roots, |folder| {
        let record = file::read::<DockerRecord>(&root.path(&folder.join("containers").join(id).join("config.v2.json")))?;
        Ok(record.map(|record| record.answer(Runtime::Docker, id)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labels::source::tests::{Files, check};

    #[test]
    fn rows() {
        let row = |text: &str, expect: &str| {
            let files = Files::new(&[("var/lib/docker/containers/c1/config.v2.json", text)]);
            check(&ask(&files.root(), &HostPaths::default().with_defaults(), "c1"), expect);
        };
        row(r#"{"Name":"/web","Config":{"Image":"i","Labels":null},"State":{"Status":"new-word"}}"#, "-/-/- web i");
        row(r#"{"Name":"/k8s_c_p_n_uid_0","Config":{"Image":"i"}}"#, "n/p/c k8s_c_p_n_uid_0 i");
        row(r#"{"Name":"/k8s_POD_p_n_uid_0","Config":{"Image":"pause"}}"#, "sandbox n/p/POD k8s_POD_p_n_uid_0 pause");
        row(r#"{"Config":{"Labels":{"io.kubernetes.pod.name":"p","io.kubernetes.container.name":"","x":null}}}"#, "-/p/- - -");
        row(r#"{"ID":"c1","Name":"/x"}"#, "-/-/- x -");
        row(r#"{"ID":"another","Name":"/x"}"#, "not-found");
        row(r#"{"Id":"another","Name":"/x"}"#, "not-found");
        row("[]", "error");
        row("{}", "error");
        row("{", "not-found");
        row("{]", "error");
    }
}
