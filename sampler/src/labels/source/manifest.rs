//! Pod manifests on disk: rkt's (`/var/lib/rkt/pods/<state>/<uuid>/pod`, the App Container schema).
//!
//! systemd-nspawn has no manifests: its machines are named by their cgroup alone.

use std::path::{Path, PathBuf};

use sampler_core::cgroup_path::Runtime;
use sampler_labels::{Facts, Label};
use serde::Deserialize;

use super::file;
use super::host_files::HostFiles;
use super::reply::SourceReply;

const RKT_PODS: &str = "/var/lib/rkt/pods";
/// Folders of pods by state; the most current first.
const STATES: [&str; 4] = ["run", "exited-garbage", "prepared", "garbage"];

#[derive(Default, Deserialize)]
#[serde(default)]
struct Manifest {
    apps: Vec<App>,
    annotations: Vec<Annotation>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct App {
    name: String,
    image: Image,
    annotations: Vec<Annotation>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Image {
    name: Option<String>,
    id: Option<String>,
    labels: Vec<Annotation>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Annotation {
    name: String,
    value: String,
}

fn get<'a>(list: &'a [Annotation], names: &[&str]) -> Option<&'a str> {
    names.iter().find_map(|name| list.iter().find(|a| a.name == *name)).map(|a| a.value.as_str()).filter(|v| !v.is_empty())
}

/// `app`: the app of the pod that the cgroup names, if any.
pub fn query(files: &HostFiles, uuid: &str, app: Option<&str>) -> SourceReply {
    let folders: Vec<PathBuf> = STATES.iter().map(|state| Path::new(RKT_PODS).join(state)).collect();
    SourceReply::first_of(&folders, |folder| {
        let manifest = file::read::<Manifest>(&files.path(folder).join(uuid).join("pod"))?;
        Ok(manifest.map(|manifest| SourceReply::found(facts(&manifest, uuid, app))))
    })
}

fn facts(manifest: &Manifest, uuid: &str, app: Option<&str>) -> Facts {
    let mut facts = Facts { runtime: Some(Runtime::Rkt), pod_status_known: true, ..Facts::default() };
    // The kubelet's annotations, in both of their forms.
    let pod = &manifest.annotations;
    facts.set(Label::Namespace, get(pod, &["io.kubernetes.pod.namespace", "rkt.kubernetes.io/namespace"]));
    facts.set(Label::Pod, get(pod, &["io.kubernetes.pod.name", "rkt.kubernetes.io/name"]));
    facts.pod_uid = get(pod, &["io.kubernetes.pod.uid", "rkt.kubernetes.io/uid"]).map(str::to_owned);
    let named = manifest.apps.iter().find(|a| Some(a.name.as_str()) == app);
    let only = (manifest.apps.len() == 1).then(|| manifest.apps.first()).flatten();
    // The name of an app comes from the path.
    facts.set(Label::Name, Some(uuid).filter(|_| app.is_none()));
    if let Some(app) = named.or(only) {
        let managed = facts.pod_uid.is_some() || facts.labels[Label::Pod as usize].is_some();
        let name = get(&app.annotations, &["io.kubernetes.container.name"]).or(Some(app.name.as_str()).filter(|_| managed));
        facts.set(Label::Container, name);
        let version = get(&app.image.labels, &["version"]);
        let image = app.image.name.as_deref().map(|name| version.map_or(name.to_owned(), |v| format!("{name}:{v}")));
        facts.set(Label::Image, image.as_deref().or(app.image.id.as_deref()));
    }
    facts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labels::source::tests::{Files, check, check_bounds};

    #[test]
    fn manifests_of_rkt_name_pod_and_image() {
        let case = |text: &str, app: Option<&str>, expect: &str| {
            let files = Files::new(&[("var/lib/rkt/pods/run/u1/pod", text)]);
            check(&query(&files.host(), "u1", app), expect);
        };
        let one = r#"{"acKind":"PodManifest","apps":[{"name":"train","image":{"name":"e.org/i","id":"sha512-1","labels":[{"name":"version","value":"2"}]}}],
            "annotations":[{"name":"rkt.kubernetes.io/name","value":"p"},{"name":"rkt.kubernetes.io/namespace","value":"n"}]}"#;
        case(one, None, "n/p/train u1 e.org/i:2");
        let two = r#"{"apps":[{"name":"a","image":{"id":"sha512-1"}},{"name":"b","image":{"id":"sha512-2"}}]}"#;
        case(two, Some("b"), "-/-/- - sha512-2");
        case(two, None, "-/-/- u1 -");
        case("x", None, "error");
        let files = Files::new(&[("var/lib/rkt/pods/run/u1/pod", "x"), ("var/lib/rkt/pods/prepared/u1/pod", one)]);
        check(&query(&files.host(), "u1", None), "n/p/train u1 e.org/i:2");
    }

    #[test]
    fn fuzz_rkt() {
        devkit::fuzz(file!(), "rkt", move |bytes| {
            let Ok(manifest) = serde_json::from_slice::<Manifest>(bytes) else { return };
            for app in [None, Some("a")] {
                check_bounds(&SourceReply::found(facts(&manifest, "u1", app)));
            }
        });
    }
}
