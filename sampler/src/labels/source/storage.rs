//! containers/storage, as CRI-O and podman use it: `<storage>/<driver>-containers/`.
//!
//! CRI-O's copy of the bundle has annotations with every label. podman's bundle has none, but the storage's list of containers
//! (`containers.json`, and since 4.4 `volatile-containers.json` of those that do not outlive a boot) has names and images. Podman's
//! database is not opened: it belongs to podman.

use std::path::{Path, PathBuf};

use sampler_core::cgroup_path::Runtime;
use sampler_labels::{Facts, Label};
use serde::Deserialize;
use serde_json::Value;

use super::answer::{Answer, first_found};
use super::bundle::{Annotations, Bundle};
use super::file;
use crate::labels::discover::HostPaths;
use crate::labels::root::Root;

const LISTS: [&str; 2] = ["containers.json", "volatile-containers.json"];

pub fn crio(root: &Root, places: &HostPaths, id: &str) -> Answer {
    first(root, places, |folder| {
        let bundle = file::read::<Bundle>(&folder.join(id).join("userdata/config.json"))?;
        // podman keeps bundles in the same place, without these annotations.
        let annotations = bundle.and_then(|b| b.annotations).filter(|a| a.contains_key("io.kubernetes.cri-o.ContainerType"));
        Ok(annotations.map(|a| crio_facts(&a)))
    })
}

fn crio_facts(annotations: &Annotations) -> Facts {
    let get = |key: &str| annotations.get(key).map(String::as_str).filter(|v| !v.is_empty());
    let own = |name: &str| get(&format!("io.kubernetes.cri-o.{name}"));
    let mut facts = Facts { runtime: Some(Runtime::CriO), knows_pods: true, ..Facts::default() };
    facts.sandbox = own("ContainerType") == Some("sandbox");
    // A sandbox has a name as a pod, and one as the container that it is.
    let name = own("ContainerName").filter(|_| facts.sandbox).or(own("Name"));
    facts.set(Label::Name, name);
    facts.set(Label::Image, own("ImageName").or(own("UserRequestedImage")).or(own("Image")));
    facts.set(Label::Namespace, own("Namespace"));
    facts.set(Label::Pod, own("KubeName"));
    // Where they are, they win.
    facts.from_kubelets_labels(get);
    if let Some(name) = name {
        facts.from_dockershim_name(name);
    }
    facts
}

#[derive(Deserialize)]
struct Listed {
    #[serde(default)]
    names: Option<Vec<String>>,
    /// JSON in a string.
    #[serde(default)]
    metadata: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Metadata {
    image_name: Option<String>,
    image_id: Option<String>,
    name: Option<String>,
    /// Set by CRI-O, whose containers the list has too.
    pod_name: Option<String>,
}

pub fn podman(root: &Root, places: &HostPaths, id: &str) -> Answer {
    first(root, places, |folder| {
        let listed = first_found(LISTS.iter().map(|name| {
            let list = file::read::<Vec<Value>>(&folder.join(name))?;
            let ours = list.into_iter().flatten().find(|c| c["id"] == *id);
            Ok::<_, String>(ours.and_then(|c| serde_json::from_value::<Listed>(c).ok()))
        }))?;
        Ok(listed.and_then(|listed| podman_facts(&listed)))
    })
}

fn podman_facts(listed: &Listed) -> Option<Facts> {
    let text = listed.metadata.as_deref().unwrap_or("{}");
    // The name stands beside it, should this be something else one day.
    let metadata: Metadata = serde_json::from_str(text).unwrap_or_default();
    if metadata.pod_name.is_some() {
        return None;
    }
    let mut facts = Facts { runtime: Some(Runtime::Podman), knows_pods: true, ..Facts::default() };
    let names = listed.names.as_deref().unwrap_or_default();
    facts.set(Label::Name, names.first().map(String::as_str).or(metadata.name.as_deref()));
    facts.set(Label::Image, metadata.image_name.as_deref().filter(|i| !i.is_empty()).or(metadata.image_id.as_deref()));
    Some(facts)
}

fn first(root: &Root, places: &HostPaths, look: impl Fn(&Path) -> Result<Option<Facts>, String>) -> Answer {
    Answer::first_of(&places.storages, |storage| {
        let found = first_found(folders(&root.path(storage))?.iter().map(|folder| look(folder)))?;
        Ok(found.map(Answer::found))
    })
}

/// One for each storage driver in use, `overlay-containers` most often.
fn folders(storage: &Path) -> Result<Vec<PathBuf>, String> {
    let all = file::list(storage)?.into_iter();
    Ok(all.filter(|(name, _)| name.ends_with("-containers")).map(|(_, path)| path).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labels::source::tests::{Files, check};

    #[test]
    fn crios_bundles() {
        let row = |text: &str, expect: &str| {
            let files = Files::new(&[("run/containers/storage/overlay-containers/c1/userdata/config.json", text)]);
            check(&crio(&files.root(), &HostPaths::default().with_defaults(), "c1"), expect);
        };
        row(
            r#"{"annotations":{"io.kubernetes.cri-o.ContainerType":"container","io.kubernetes.cri-o.Name":"k8s_c_p_n_u_0","io.kubernetes.pod.name":"p",
            "io.kubernetes.pod.namespace":"n","io.kubernetes.container.name":"c","io.kubernetes.cri-o.ImageName":"i"}}"#,
            "n/p/c k8s_c_p_n_u_0 i",
        );
        row(
            r#"{"annotations":{"io.kubernetes.cri-o.ContainerType":"sandbox","io.kubernetes.cri-o.Name":"k8s_POD_p_n_u_0"}}"#,
            "sandbox n/p/POD k8s_POD_p_n_u_0 -",
        );
        row(r#"{"annotations":{"io.container.manager":"libpod"}}"#, "not-found");
        row("{", "not-found");
        row("{]", "error");
    }

    #[test]
    fn podmans_lists() {
        let row = |file: &str, text: &str, expect: &str| {
            let files = Files::new(&[(file, text)]);
            check(&podman(&files.root(), &HostPaths::default().with_defaults(), "c1"), expect);
        };
        let one = r#"[{"id":"c0"},{"id":"c1","names":["web"],"image":"f1","metadata":"{\"image-name\":\"i:1\",\"image-id\":\"f1\",\"name\":\"web\"}"}]"#;
        row("var/lib/containers/storage/overlay-containers/containers.json", one, "-/-/- web i:1");
        row("var/lib/containers/storage/vfs-containers/volatile-containers.json", one, "-/-/- web i:1");
        row(
            "var/lib/containers/storage/overlay-containers/containers.json",
            r#"[{"id":"c1","names":["x"],"metadata":"?"}]"#,
            "-/-/- x -",
        );
        row(
            "var/lib/containers/storage/overlay-containers/containers.json",
            r#"[7,{"id":"c0","names":7},{"id":"c1","names":["x"]}]"#,
            "-/-/- x -",
        );
        let files = Files::new(&[
            ("var/lib/containers/storage/overlay-containers/containers.json", "{"),
            ("var/lib/containers/storage/overlay-containers/volatile-containers.json", one),
        ]);
        check(&podman(&files.root(), &HostPaths::default().with_defaults(), "c1"), "-/-/- web i:1");
        let crio = r#"[{"id":"c1","names":["x"],"metadata":"{\"pod-name\":\"p\"}"}]"#;
        row("var/lib/containers/storage/overlay-containers/containers.json", crio, "not-found");
        row("var/lib/containers/storage/overlay-containers/containers.json", "[]", "not-found");
    }
}
