//! containers/storage, as CRI-O and podman use it: `<storage>/<driver>-containers/`.
//!
//! CRI-O's copy of the bundle has annotations with every label. podman's bundle has none, but the storage's list of containers
//! (`containers.json`, and since 4.4 `volatile-containers.json` for containers that do not outlive a boot) has names and images. Both
//! bundles have the GPUs that the container is given.
//! podman's database is private to podman and is not opened.

use std::path::Path;

use sampler_core::cgroup_path::Runtime;
use sampler_labels::{Facts, Label};
use serde::Deserialize;
use serde_json::Value;

use super::bundle::{Annotations, Bundle};
use super::file;
use super::host_files::HostFiles;
use super::reply::{SourceReply, first_found};
use crate::labels::discover::HostPaths;

const LISTS: [&str; 2] = ["containers.json", "volatile-containers.json"];

pub fn crio(files: &HostFiles, places: &HostPaths, id: &str) -> SourceReply {
    first(files, places, |folder| {
        let Some(bundle) = read_bundle(folder, id)? else { return Ok(None) };
        let visible = bundle.visible_gpus();
        // podman's bundles are in the same folder, without these annotations.
        let annotations = bundle.annotations.filter(|a| a.contains_key("io.kubernetes.cri-o.ContainerType"));
        Ok(annotations.map(|a| Facts { visible, ..crio_facts(&a) }))
    })
}

/// The copy of the bundle that both engines keep.
fn read_bundle(folder: &Path, id: &str) -> Result<Option<Bundle>, String> {
    file::read(&folder.join(id).join("userdata/config.json"))
}

/// The value of an annotation of the container, in the bundle that CRI-O and podman keep.
pub fn annotation(files: &HostFiles, places: &HostPaths, id: &str, key: &str) -> Result<Option<String>, String> {
    first_found(places.storages.iter().map(|storage| {
        let list = files.list(&files.path(storage))?;
        let folders = list.paths().filter(|(name, _)| name.ends_with("-containers"));
        let annotated = folders.map(|(_, folder)| {
            let bundle = read_bundle(&folder, id)?;
            Ok::<_, String>(bundle.and_then(|bundle| bundle.annotations?.remove(key)))
        });
        first_found(annotated)
    }))
}

fn crio_facts(annotations: &Annotations) -> Facts {
    let get = |key: &str| annotations.get(key).map(String::as_str).filter(|v| !v.is_empty());
    let crio_key = |name: &str| get(&format!("io.kubernetes.cri-o.{name}"));
    let mut facts = Facts { runtime: Some(Runtime::CriO), pod_status_known: true, ..Facts::default() };
    facts.sandbox = crio_key("ContainerType") == Some("sandbox");
    // A sandbox has the pod's name, and its own name as a container.
    let name = crio_key("ContainerName").filter(|_| facts.sandbox).or(crio_key("Name"));
    facts.set(Label::Name, name);
    facts.set(Label::Image, crio_key("ImageName").or(crio_key("UserRequestedImage")).or(crio_key("Image")));
    facts.set(Label::Namespace, crio_key("Namespace"));
    facts.set(Label::Pod, crio_key("KubeName"));
    // The kubelet's labels take precedence if present.
    facts.from_kubelet_labels(get);
    facts.from_dockershim_name(name.unwrap_or_default());
    facts
}

#[derive(Deserialize)]
struct Listed {
    names: Option<Vec<String>>,
    /// JSON in a string.
    metadata: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Metadata {
    image_name: Option<String>,
    image_id: Option<String>,
    name: Option<String>,
    /// Set by CRI-O; its containers are in the same list.
    pod_name: Option<String>,
}

pub fn podman(files: &HostFiles, places: &HostPaths, id: &str) -> SourceReply {
    first(files, places, |folder| {
        let listed = first_found(LISTS.iter().map(|name| {
            let list = file::read::<Vec<Value>>(&folder.join(name))?;
            Ok::<_, String>(list.and_then(|list| listed(list, id)))
        }))?;
        let Some(facts) = listed.and_then(|listed| podman_facts(&listed)) else { return Ok(None) };
        // Names and image do not depend on the bundle.
        let visible = read_bundle(folder, id).ok().flatten().and_then(|bundle| bundle.visible_gpus());
        Ok(Some(Facts { visible, ..facts }))
    })
}

fn listed(list: Vec<Value>, id: &str) -> Option<Listed> {
    let ours = list.into_iter().find(|container| container["id"] == *id)?;
    serde_json::from_value(ours).ok()
}

fn podman_facts(listed: &Listed) -> Option<Facts> {
    let text = listed.metadata.as_deref().unwrap_or("{}");
    // The name is also outside of the metadata, in case the metadata's form changes.
    let metadata: Metadata = serde_json::from_str(text).unwrap_or_default();
    if metadata.pod_name.is_some() {
        return None;
    }
    let mut facts = Facts { runtime: Some(Runtime::Podman), pod_status_known: true, ..Facts::default() };
    let names = listed.names.as_deref().unwrap_or_default();
    facts.set(Label::Name, names.first().map(String::as_str).or(metadata.name.as_deref()));
    facts.set(Label::Image, metadata.image_name.as_deref().filter(|i| !i.is_empty()).or(metadata.image_id.as_deref()));
    Some(facts)
}

fn first(files: &HostFiles, places: &HostPaths, read: impl Fn(&Path) -> Result<Option<Facts>, String>) -> SourceReply {
    SourceReply::first_of(&places.storages, |storage| {
        let list = files.list(&files.path(storage))?;
        // The container folders, one for each storage driver in use; usually `overlay-containers`.
        let folders = list.paths().filter(|(name, _)| name.ends_with("-containers"));
        let found = first_found(folders.map(|(_, folder)| read(&folder)))?;
        Ok(found.map(SourceReply::found))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labels::source::tests::{Files, check, check_bounds};

    #[test]
    fn bundles_of_crio_have_all_labels() {
        let case = |text: &str, expect: &str| {
            let files = Files::new(&[("run/containers/storage/overlay-containers/c1/userdata/config.json", text)]);
            check(&crio(&files.host(), &HostPaths::default().with_defaults(), "c1"), expect);
        };
        case(
            r#"{"annotations":{"io.kubernetes.cri-o.ContainerType":"container","io.kubernetes.cri-o.Name":"k8s_c_p_n_u_0","io.kubernetes.pod.name":"p",
            "io.kubernetes.pod.namespace":"n","io.kubernetes.container.name":"c","io.kubernetes.cri-o.ImageName":"i"}}"#,
            "n/p/c k8s_c_p_n_u_0 i",
        );
        case(
            r#"{"annotations":{"io.kubernetes.cri-o.ContainerType":"sandbox","io.kubernetes.cri-o.Name":"k8s_POD_p_n_u_0"}}"#,
            "sandbox n/p/POD k8s_POD_p_n_u_0 -",
        );
        case(r#"{"annotations":{"io.container.manager":"libpod"}}"#, "not-found");
        case("{", "not-found");
        case("{]", "error");
    }

    #[test]
    fn lists_of_podman_have_name_and_image() {
        let case = |file: &str, text: &str, expect: &str| {
            let files = Files::new(&[(file, text)]);
            check(&podman(&files.host(), &HostPaths::default().with_defaults(), "c1"), expect);
        };
        let one = r#"[{"id":"c0"},{"id":"c1","names":["web"],"image":"f1","metadata":"{\"image-name\":\"i:1\",\"image-id\":\"f1\",\"name\":\"web\"}"}]"#;
        case("var/lib/containers/storage/overlay-containers/containers.json", one, "-/-/- web i:1");
        case("var/lib/containers/storage/vfs-containers/volatile-containers.json", one, "-/-/- web i:1");
        case(
            "var/lib/containers/storage/overlay-containers/containers.json",
            r#"[{"id":"c1","names":["x"],"metadata":"?"}]"#,
            "-/-/- x -",
        );
        case(
            "var/lib/containers/storage/overlay-containers/containers.json",
            r#"[7,{"id":"c0","names":7},{"id":"c1","names":["x"]}]"#,
            "-/-/- x -",
        );
        let files = Files::new(&[
            ("var/lib/containers/storage/overlay-containers/containers.json", "{"),
            ("var/lib/containers/storage/overlay-containers/volatile-containers.json", one),
        ]);
        check(&podman(&files.host(), &HostPaths::default().with_defaults(), "c1"), "-/-/- web i:1");
        let crio = r#"[{"id":"c1","names":["x"],"metadata":"{\"pod-name\":\"p\"}"}]"#;
        case("var/lib/containers/storage/overlay-containers/containers.json", crio, "not-found");
        case("var/lib/containers/storage/overlay-containers/containers.json", "[]", "not-found");
    }

    /// The list of containers/storage, and the annotations of CRI-O's bundles.
    #[test]
    fn fuzz_storage() {
        devkit::fuzz(file!(), "storage", move |bytes| {
            if let Ok(list) = serde_json::from_slice::<Vec<Value>>(bytes) {
                let has_it = list.iter().any(|container| container["id"] == "c1");
                let found = listed(list, "c1");
                assert!(has_it || found.is_none());
                found
                    .and_then(|listed| podman_facts(&listed))
                    .into_iter()
                    .for_each(|facts| check_bounds(&SourceReply::found(facts)));
            }
            let annotations = serde_json::from_slice::<Bundle>(bytes).ok().and_then(|bundle| bundle.annotations);
            annotations.into_iter().for_each(|annotations| check_bounds(&SourceReply::found(crio_facts(&annotations))));
        });
    }
}
