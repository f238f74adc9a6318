//! What runtimes leave in files: OCI bundles of containerd and CRI-O, Docker's own record of a container.
//!
//! Only what is used is decoded, everything is optional, unknown fields are ignored. A missing file is "not found".

use std::collections::HashMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use sampler_core::labels::{Facts, Label, Runtime};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Answer;

/// State folders of containerd as distributions place it.
const CONTAINERD_STATES: [&str; 4] =
    ["run/containerd", "run/k3s/containerd", "run/k0s/containerd", "var/snap/microk8s/common/run/containerd"];
/// CRI-O's copies of its bundles.
const CRIO_STORAGES: [&str; 2] = ["run/containers/storage/overlay-containers", "var/lib/containers/storage/overlay-containers"];
const DOCKER_CONTAINERS: &str = "var/lib/docker/containers";
/// Bundles are tens of KiB; anything far beyond is not one.
const MAX_FILE_BYTES: u64 = 4 << 20;

type Map = HashMap<String, String>;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Bundle {
    annotations: Map,
}

/// Docker's `config.v2.json`, and its answer to an inspect: the same fields.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct DockerRecord {
    name: Option<String>,
    config: Option<DockerConfig>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct DockerConfig {
    image: Option<String>,
    labels: Option<Map>,
}

impl DockerRecord {
    pub fn facts(&self) -> Facts {
        let mut facts = Facts { runtime: Some(Runtime::Docker), knows_pods: true, ..Facts::default() };
        let name = self.name.as_deref().unwrap_or_default().trim_start_matches('/');
        facts.set(Label::Name, Some(name));
        if let Some(config) = &self.config {
            facts.set(Label::Image, config.image.as_deref());
            if let Some(labels) = &config.labels {
                let get = |key: &str| labels.get(key).map(String::as_str);
                facts.set(Label::Namespace, get("io.kubernetes.pod.namespace"));
                facts.set(Label::Pod, get("io.kubernetes.pod.name"));
                facts.set(Label::Container, get("io.kubernetes.container.name"));
                facts.pod_uid = get("io.kubernetes.pod.uid").filter(|v| !v.is_empty()).map(str::to_owned);
                facts.sandbox = get("io.kubernetes.docker.type") == Some("podsandbox");
            }
        }
        facts.from_dockershim_name(name);
        facts
    }
}

/// Reads and decodes; `Ok(None)` when there is no such file.
fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, String> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(format!("{}: {error}", path.display())),
    };
    let mut text = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut text).map_err(|error| format!("{}: {error}", path.display()))?;
    serde_json::from_slice(&text).map(Some).map_err(|error| format!("{}: {error}", path.display()))
}

pub fn docker(rootfs: &Path, id: &str) -> Answer {
    match read::<DockerRecord>(&rootfs.join(DOCKER_CONTAINERS).join(id).join("config.v2.json")) {
        Ok(Some(record)) => Answer::found(record.facts()),
        Ok(None) => Answer::not_found(),
        Err(detail) => Answer::failed("error", detail),
    }
}

pub fn bundle(rootfs: &Path, id: &str) -> Answer {
    // A container id is one path segment; anything else could lead out of the folder.
    if id.is_empty() || id.contains('/') || id == ".." {
        return Answer::not_found();
    }
    for (path, namespace) in candidates(rootfs, id) {
        match read::<Bundle>(&path) {
            Ok(Some(bundle)) => return Answer::found(facts(&bundle.annotations, id, namespace.as_deref())),
            Ok(None) => {}
            Err(detail) => return Answer::failed("error", detail),
        }
    }
    Answer::not_found()
}

/// Where the bundle may be, with containerd's namespace where it is containerd's.
fn candidates(rootfs: &Path, id: &str) -> Vec<(PathBuf, Option<String>)> {
    let mut found = Vec::new();
    for state in CONTAINERD_STATES {
        let Ok(namespaces) = fs::read_dir(rootfs.join(state).join("io.containerd.runtime.v2.task")) else { continue };
        for namespace in namespaces.flatten() {
            let name = namespace.file_name().to_string_lossy().into_owned();
            found.push((namespace.path().join(id).join("config.json"), Some(name)));
        }
    }
    found.extend(CRIO_STORAGES.iter().map(|s| (rootfs.join(s).join(id).join("userdata/config.json"), None)));
    found
}

fn facts(annotations: &Map, id: &str, namespace: Option<&str>) -> Facts {
    let get = |key: &str| annotations.get(key).map(String::as_str);
    let mut facts = Facts::default();
    match namespace {
        // Docker's containers: the bundle says nothing about them, Docker does.
        Some("moby") => facts.runtime = Some(Runtime::Docker),
        Some(_) => {
            facts.runtime = Some(Runtime::Containerd);
            facts.knows_pods = true;
            facts.set(Label::Name, Some(id));
            facts.set(Label::Image, get("io.kubernetes.cri.image-name"));
            facts.set(Label::Namespace, get("io.kubernetes.cri.sandbox-namespace"));
            facts.set(Label::Pod, get("io.kubernetes.cri.sandbox-name"));
            facts.set(Label::Container, get("io.kubernetes.cri.container-name"));
            facts.pod_uid = get("io.kubernetes.cri.sandbox-uid").map(str::to_owned);
            facts.sandbox = get("io.kubernetes.cri.container-type") == Some("sandbox");
        }
        // podman keeps bundles in the same place, without these annotations.
        None if get("io.kubernetes.cri-o.ContainerType").is_some() => {
            facts.runtime = Some(Runtime::CriO);
            facts.knows_pods = true;
            facts.set(Label::Name, get("io.kubernetes.cri-o.Name"));
            facts.set(Label::Image, get("io.kubernetes.cri-o.ImageName").or(get("io.kubernetes.cri-o.Image")));
            facts.set(Label::Namespace, get("io.kubernetes.pod.namespace"));
            facts.set(Label::Pod, get("io.kubernetes.pod.name"));
            facts.set(Label::Container, get("io.kubernetes.container.name"));
            facts.pod_uid = get("io.kubernetes.pod.uid").map(str::to_owned);
            facts.sandbox = get("io.kubernetes.cri-o.ContainerType") == Some("sandbox");
        }
        None => {}
    }
    facts
}

#[cfg(test)]
mod tests {
    use super::*;
    use sampler_core::labels::Outcome;

    /// (file below the root, its text) -> `namespace/pod/container name image`, or the outcome's name.
    fn check(file: &str, text: &str, expect: &str) {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        let answer = if file.contains("docker") { docker(root.path(), "c1") } else { bundle(root.path(), "c1") };
        let told = match &answer.outcome {
            Outcome::Found(facts) => {
                let label = |l: Label| facts.labels[l as usize].clone().unwrap_or("-".into());
                let pod = [Label::Namespace, Label::Pod, Label::Container].map(label).join("/");
                format!("{pod} {} {}", label(Label::Name), label(Label::Image))
            }
            _ => answer.name.to_owned(),
        };
        assert_eq!(told, expect, "{file} {text} {}", answer.detail);
    }

    #[test]
    fn rows() {
        let containerd = "run/containerd/io.containerd.runtime.v2.task/k8s.io/c1/config.json";
        let cri = r#"{"ociVersion":"1","annotations":{"io.kubernetes.cri.sandbox-namespace":"prod","io.kubernetes.cri.sandbox-name":"p-0",
            "io.kubernetes.cri.container-name":"c","io.kubernetes.cri.image-name":"i:1"}}"#;
        check(containerd, cri, "prod/p-0/c c1 i:1");
        check(&containerd.replace("containerd/io", "k3s/containerd/io"), cri, "prod/p-0/c c1 i:1");
        check(&containerd.replace("k8s.io", "moby"), "{}", "-/-/- - -");
        check(&containerd.replace("c1/", "c2/"), cri, "not-found");
        check(containerd, "{\"annotations\":", "error");
        let crio = r#"{"annotations":{"io.kubernetes.cri-o.ContainerType":"container","io.kubernetes.cri-o.Name":"k8s_c_p","io.kubernetes.pod.name":"p",
            "io.kubernetes.pod.namespace":"n","io.kubernetes.container.name":"c","io.kubernetes.cri-o.ImageName":"i"}}"#;
        check("run/containers/storage/overlay-containers/c1/userdata/config.json", crio, "n/p/c k8s_c_p i");
        let docker = "var/lib/docker/containers/c1/config.v2.json";
        check(docker, r#"{"Name":"/web","Config":{"Image":"i","Labels":null},"State":{"Status":"new-word"}}"#, "-/-/- web i");
        check(docker, r#"{"Name":"/k8s_c_p_n_uid_0","Config":{"Image":"i"}}"#, "n/p/c k8s_c_p_n_uid_0 i");
        check(docker, r#"{"Config":{"Labels":{"io.kubernetes.pod.name":"p","io.kubernetes.container.name":""}}}"#, "-/p/- - -");
    }

    #[test]
    fn an_id_cannot_lead_out() {
        for id in ["", "..", "../../etc"] {
            assert_eq!(bundle(Path::new("/"), id).name, "not-found");
        }
    }
}
