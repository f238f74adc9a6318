//! containerd's OCI bundles. They are written before the cgroup is created, so all labels of a pod's container are available at once, and
//! the GPUs that the container is given, those of Docker's containers too.
//!
//! `<state>/io.containerd.runtime.v2.task/<namespace>/<id>/config.json`; names of annotations as containerd's CRI plugin writes them
//! (`sandbox-uid` since 1.6.11, `container-name` since 1.4, `sandbox-name` since 1.5).

use std::collections::HashMap;
use std::path::Path;

use sampler_core::cgroup_path::Runtime;
use sampler_labels::{Facts, Label, SpecParts, VisibleGpus};
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
    process: Option<ContainerProcess>,
    mounts: Option<Vec<BundleMount>>,
    hooks: Option<HashMap<String, Option<Vec<Hook>>>>,
    linux: Option<LinuxPart>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ContainerProcess {
    env: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct BundleMount {
    destination: String,
}

#[derive(Deserialize)]
struct Hook {
    path: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct LinuxPart {
    devices: Option<Vec<DeviceNode>>,
    resources: Option<Resources>,
}

#[derive(Deserialize)]
struct DeviceNode {
    path: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Resources {
    devices: Option<Vec<DeviceRule>>,
}

/// A rule of the devices cgroup. Absent parts stand for all.
#[derive(Default, Deserialize)]
#[serde(default)]
struct DeviceRule {
    allow: bool,
    #[serde(rename = "type")]
    kind: Option<String>,
    major: Option<i64>,
    access: Option<String>,
}

impl DeviceRule {
    fn allows_everything(&self) -> bool {
        let is_all_kinds = self.kind.as_deref().is_none_or(|kind| matches!(kind, "a" | ""));
        // One that only lets nodes be made is there by default.
        self.allow
            && is_all_kinds
            && self.major.is_none_or(|major| major < 0)
            && self.access.as_deref().is_some_and(|a| a.contains('r'))
    }
}

impl Bundle {
    /// The GPUs that the container is given.
    pub fn visible_gpus(&self) -> Option<VisibleGpus> {
        let env = self.process.iter().flat_map(|process| process.env.iter().flatten());
        let linux = self.linux.as_ref();
        let nodes = linux.and_then(|linux| linux.devices.as_ref()).into_iter().flatten();
        let rules = linux.and_then(|linux| linux.resources.as_ref()?.devices.as_ref()).into_iter().flatten();
        let mut hooks = self.hooks.iter().flat_map(|hooks| hooks.values()).flatten().flatten();
        let cdi = self.annotations.iter().flatten().filter(|(key, _)| key.starts_with("cdi.k8s.io/"));
        VisibleGpus::of(&SpecParts {
            // Of several, as NVIDIA's runtime reads them.
            variable: env.filter_map(|variable| variable.strip_prefix("NVIDIA_VISIBLE_DEVICES=")).next_back(),
            nodes: nodes.map(|node| node.path.as_str()).collect(),
            mounts: self.mounts.iter().flatten().map(|mount| mount.destination.as_str()).collect(),
            cdi: cdi.map(|(_, names)| names.as_str()).collect(),
            has_hook: hooks.any(|hook| is_nvidias(&hook.path)),
            is_privileged: rules.into_iter().any(DeviceRule::allows_everything),
        })
    }
}

fn is_nvidias(hook: &str) -> bool {
    let name = hook.rsplit('/').next().unwrap_or_default();
    ["nvidia-container-runtime-hook", "nvidia-container-toolkit", "nvidia-cdi-hook", "nvidia-ctk"].contains(&name)
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
        Ok(bundle.map(|bundle| {
            let visible = bundle.visible_gpus();
            Facts { visible, ..facts(&bundle.annotations.unwrap_or_default(), id, namespace) }
        }))
    }))
}

/// The value of an annotation of the container.
pub fn annotation(files: &HostFiles, places: &HostPaths, id: &str, key: &str) -> Result<Option<String>, String> {
    let in_tasks = |tasks: &Path| {
        first_found(files.list(tasks)?.paths().map(|(_, path)| {
            let bundle = file::read::<Bundle>(&path.join(id).join("config.json"))?;
            Ok::<_, String>(bundle.and_then(|bundle| bundle.annotations?.remove(key)))
        }))
    };
    let folders = places.containerd_states.iter().flat_map(|state| TASK_FOLDERS.map(|tasks| files.path(state).join(tasks)));
    first_found(folders.map(|tasks| in_tasks(&tasks)))
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
    use crate::labels::source::tests::{Files, check, check_bounds};

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
    fn a_bundle_shows_the_gpus_of_its_container() {
        let path = "run/containerd/io.containerd.runtime.v2.task/moby/c1/config.json";
        let visible = |text: &str| {
            let files = Files::new(&[(path, text)]);
            match query(&files.host(), &HostPaths::default().with_defaults(), "c1").outcome {
                sampler_labels::Outcome::Found(facts) => facts.visible,
                other => panic!("{other:?}"),
            }
        };
        // docker --gpus all
        let hook = r#""hooks":{"prestart":[{"path":"/usr/bin/nvidia-container-runtime-hook","args":["x"]}],"poststop":null}"#;
        let env = r#""process":{"args":["x"],"env":["PATH=/bin","NVIDIA_VISIBLE_DEVICES=void","NVIDIA_VISIBLE_DEVICES=all"]}"#;
        assert_eq!(visible(&format!("{{{hook},{env}}}")), Some(VisibleGpus::All));
        assert_eq!(visible(&format!("{{{env}}}")), None, "without NVIDIA's runtime");
        // docker --device /dev/nvidia1
        let device = r#"{"path":"/dev/nvidia1","type":"c","major":195,"minor":1}"#;
        let rule = |rule: &str| format!(r#"{{"linux":{{"devices":[{device}],"resources":{{"devices":[{rule}]}}}}}}"#);
        let first = Some(VisibleGpus::These(vec![sampler_labels::Device::Minor(1)]));
        for denied in [
            r#"{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":195,"minor":1,"access":"rwm"}"#,
            r#"{"allow":true,"type":"c","access":"m"},{"allow":true,"access":"m"}"#,
        ] {
            assert_eq!(visible(&rule(denied)), first, "{denied}");
        }
        for everything in
            [r#"{"allow":true,"access":"rwm"}"#, r#"{"allow":true,"type":"a","major":-1,"minor":-1,"access":"rwm"}"#]
        {
            assert_eq!(visible(&rule(everything)), None, "{everything}");
        }
        // CDI
        let cdi = r#""annotations":{"cdi.k8s.io/x_y":"nvidia.com/gpu=1","other":"nvidia.com/gpu=2"}"#;
        assert_eq!(
            visible(&format!(r#"{{{cdi},"linux":{{"devices":[{{"path":"/dev/nvidia5"}}]}}}}"#)),
            Some(VisibleGpus::These(vec![sampler_labels::Device::Index(1)]))
        );
        assert_eq!(visible(r#"{"process":null,"mounts":null,"hooks":null,"linux":null}"#), None);
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

    /// A `config.json` of OCI.
    #[test]
    fn fuzz_bundle() {
        devkit::fuzz(file!(), "bundle", move |bytes| {
            let Ok(bundle) = serde_json::from_slice::<Bundle>(bytes) else { return };
            let (visible, annotations) = (bundle.visible_gpus(), bundle.annotations.unwrap_or_default());
            for namespace in ["k8s.io", "moby"] {
                let facts = Facts { visible: visible.clone(), ..facts(&annotations, "c1", namespace) };
                check_bounds(&SourceReply::found(facts));
            }
        });
    }
}
