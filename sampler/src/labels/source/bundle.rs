//! containerd's OCI bundles. They are written before the cgroup is created, so all labels of a pod's container are available at once.
//!
//! `<state>/io.containerd.runtime.v2.task/<namespace>/<id>/config.json`; names of annotations as containerd's CRI plugin writes them
//! (`sandbox-uid` since 1.6.11, `container-name` since 1.4, `sandbox-name` since 1.5).

use std::collections::HashMap;
use std::path::Path;

use sampler_core::cgroup_path::Runtime;
use sampler_labels::{Facts, Label};
use serde::Deserialize;

use super::file;
use super::host_files::HostFiles;
use super::reply::{SourceReply, first_found};
use crate::labels::discover::HostPaths;

const TASK_FOLDERS: [&str; 2] = ["io.containerd.runtime.v2.task", "io.containerd.runtime.v1.linux"];

pub type Annotations = HashMap<String, String>;

#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Bundle {
    pub annotations: Option<Annotations>,
}

pub fn query(files: &HostFiles, places: &HostPaths, id: &str) -> SourceReply {
    SourceReply::first_of(&places.containerd_states, |state| {
        let state = files.path(state);
        // An unreadable folder does not hide a readable one.
        let found = first_found(TASK_FOLDERS.iter().map(|tasks| read_bundle(files, &state.join(tasks), id)))?;
        Ok(found.map(SourceReply::found))
    })
}

/// Reads the bundle in the folder of containerd's namespaces.
fn read_bundle(files: &HostFiles, tasks: &Path, id: &str) -> Result<Option<Facts>, String> {
    first_found(files.list(tasks)?.paths().map(|(namespace, path)| {
        let bundle = file::read::<Bundle>(&path.join(id).join("config.json"))?;
        Ok(bundle.map(|bundle| facts(&bundle.annotations.unwrap_or_default(), id, namespace)))
    }))
}

fn facts(annotations: &Annotations, id: &str, namespace: &str) -> Facts {
    let get = |key: &str| annotations.get(key).map(String::as_str);
    // The bundles of Docker's containers have no labels; the Docker sources have them.
    if namespace == "moby" {
        return Facts { runtime: Some(Runtime::Docker), ..Facts::default() };
    }
    let cri = |name: &str| get(&format!("io.kubernetes.cri.{name}"));
    let mut facts = Facts { runtime: Some(Runtime::Containerd), pod_status_known: true, ..Facts::default() };
    facts.set(Label::Name, get("nerdctl/name").or(Some(id)));
    facts.set(Label::Image, cri("image-name"));
    facts.set(Label::Namespace, cri("sandbox-namespace"));
    facts.set(Label::Pod, cri("sandbox-name"));
    facts.set(Label::Container, cri("container-name"));
    facts.pod_uid = cri("sandbox-uid").map(str::to_owned);
    facts.sandbox = cri("container-type") == Some("sandbox");
    facts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labels::source::tests::{Files, check};

    const CRI: &str = r#"{"ociVersion":"1","annotations":{"io.kubernetes.cri.sandbox-namespace":"prod","io.kubernetes.cri.sandbox-name":"p-0",
        "io.kubernetes.cri.container-name":"c","io.kubernetes.cri.image-name":"i:1"}}"#;

    #[test]
    fn bundles_of_containerd_have_all_labels_of_a_pod() {
        let path = "run/containerd/io.containerd.runtime.v2.task/k8s.io/c1/config.json";
        let case = |path: &str, text: &str, expect: &str| {
            let files = Files::new(&[(path, text)]);
            check(&query(&files.host(), &HostPaths::default().with_defaults(), "c1"), expect);
        };
        case(path, CRI, "prod/p-0/c c1 i:1");
        case(&path.replace("containerd/io", "k3s/containerd/io"), CRI, "prod/p-0/c c1 i:1");
        case(&path.replace("run/containerd", "var/snap/microk8s/common/run/containerd"), CRI, "prod/p-0/c c1 i:1");
        case(&path.replace("run/containerd", "run/k0s/containerd"), CRI, "prod/p-0/c c1 i:1");
        case(&path.replace("k8s.io", "moby"), "{}", "-/-/- - -");
        case(&path.replace("k8s.io", "default"), r#"{"annotations":{"nerdctl/name":"web"}}"#, "-/-/- web -");
        case(&path.replace("c1/", "c2/"), CRI, "not-found");
        case(path, r#"{"annotations":null}"#, "-/-/- c1 -");
        case(
            path,
            r#"{"annotations":{"io.kubernetes.cri.container-type":"sandbox","io.kubernetes.cri.sandbox-name":"p"}}"#,
            "sandbox -/p/- c1 -",
        );
        case(path, "{\"annotations\":", "not-found");
        case(path, "{\"annotations\":]", "error");
    }

    #[test]
    fn an_unreadable_folder_does_not_hide_a_readable_one() {
        let tasks = "run/containerd/io.containerd.runtime.v2.task";
        let files = Files::new(&[(&format!("{tasks}/k8s.io/c1/config.json"), CRI), (&format!("{tasks}/a/c1/config.json"), "{]")]);
        let lists = || query(&files.host(), &HostPaths::default().with_defaults(), "c1");
        check(&lists(), "prod/p-0/c c1 i:1");
        // Another namespace, before or after the one that has the container, and the other folder of tasks.
        files.add(&format!("{tasks}/z/c1/config.json"), "{]");
        check(&lists(), "prod/p-0/c c1 i:1");
        let older = tasks.replace("v2.task", "v1.linux");
        files.link(&older, "io.containerd.runtime.v1.linux");
        check(&lists(), "prod/p-0/c c1 i:1");
        check(&query(&files.host(), &HostPaths::default().with_defaults(), "c2"), "error");
    }
}
