//! A double of CRI-O, for which there may be no package: the files of its containers, and its socket.
//!
//! Both can be used separately: [`Crio::write`] makes only the files, [`Crio::serve`] only the responses. Names of annotations and of
//! JSON fields: cri-o, `pkg/annotations/internal.go`, `internal/factory/container`, `server/sandbox_run_linux.go`, `pkg/types`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use prost::Message;
use serde_json::{Value, json};
use tonic::Status;

use crate::cri::{self, CONTAINER_RUNNING, Map};
use crate::grpc::{GrpcServer, Service};

/// 2023-11-14 22:13:20
const CREATED_NS: i64 = 1_700_000_000_000_000_000;
const CREATED: &str = "2023-11-14T22:13:20.000000000Z";

#[derive(Clone, Debug)]
pub struct Pod {
    pub id: String,
    pub namespace: String,
    pub name: String,
    pub uid: String,
    /// As the kubelet passes it: `/kubepods/..` or `kubepods-...slice`.
    pub cgroup_parent: String,
    pub labels: BTreeMap<String, String>,
}

#[derive(Clone, Debug)]
pub struct CrioContainer {
    pub id: String,
    /// The id of its pod's sandbox.
    pub pod: String,
    pub name: String,
    pub attempt: u32,
    /// As written in the pod's spec; empty for an image without a name, as CRI-O 1.37 reports it.
    pub image: String,
    pub pid: u32,
    pub state: i32,
}

impl Pod {
    pub fn new(id: &str, namespace: &str, name: &str, uid: &str) -> Self {
        let cgroup_parent = format!("/kubepods/burstable/pod{uid}");
        let [id, namespace, name, uid] = [id, namespace, name, uid].map(str::to_owned);
        Self { id, namespace, name, uid, cgroup_parent, labels: BTreeMap::new() }
    }

    fn full_name(&self) -> String {
        format!("k8s_{}_{}_{}_0", self.name, self.namespace, self.uid)
    }

    fn infra_name(&self) -> String {
        format!("k8s_POD_{}_{}_{}_0", self.name, self.namespace, self.uid)
    }

    fn identity(&self, container: &str) -> Map {
        let labels = [
            ("pod.name", &*self.name),
            ("pod.namespace", &self.namespace),
            ("pod.uid", &self.uid),
            ("container.name", container),
        ];
        labels.into_iter().map(|(key, value)| (format!("io.kubernetes.{key}"), value.to_owned())).collect()
    }

    fn labels(&self) -> Map {
        self.labels.clone().into_iter().chain(self.identity("POD")).collect()
    }

    fn metadata(&self) -> cri::PodSandboxMetadata {
        let (name, uid, namespace) = (self.name.clone(), self.uid.clone(), self.namespace.clone());
        cri::PodSandboxMetadata { name, uid, namespace, attempt: 0 }
    }

    fn annotations(&self) -> Map {
        let metadata = json!({"name": self.name, "uid": self.uid, "namespace": self.namespace});
        let own = [
            ("Annotations", "{}".into()),
            ("CgroupParent", self.cgroup_parent.clone()),
            ("ContainerID", self.id.clone()),
            ("ContainerName", self.infra_name()),
            ("ContainerType", "sandbox".into()),
            ("Created", CREATED.into()),
            ("HostName", self.name.clone()),
            ("HostNetwork", "false".into()),
            ("Image", "registry.k8s.io/pause:3.9".into()),
            ("KubeName", self.name.clone()),
            ("Labels", json!(self.labels()).to_string()),
            ("LogPath", format!("/var/log/pods/{}_{}_{}/{}.log", self.namespace, self.name, self.uid, self.id)),
            ("Metadata", metadata.to_string()),
            ("Name", self.full_name()),
            ("Namespace", self.namespace.clone()),
            ("PortMappings", "[]".into()),
            ("SandboxID", self.id.clone()),
        ];
        with_labels(&own, self.labels())
    }
}

/// Labels become annotations under their own names, in addition to CRI-O's.
fn with_labels(own: &[(&str, String)], labels: Map) -> Map {
    let own = own.iter().map(|(key, value)| (format!("io.kubernetes.cri-o.{key}"), value.clone()));
    own.chain(labels).chain([("io.container.manager".to_owned(), "cri-o".to_owned())]).collect()
}

fn spec(annotations: &Map, cgroup: &str, args: &[&str]) -> Value {
    json!({"ociVersion": "1.0.2-dev", "process": {"args": args, "cwd": "/"}, "root": {"path": "/rootfs"},
        "annotations": annotations, "linux": {"cgroupsPath": cgroup}})
}

impl CrioContainer {
    /// A running container, in its first attempt.
    pub fn new(id: &str, pod: &str, name: &str, image: &str, pid: u32) -> Self {
        let [id, pod, name, image] = [id, pod, name, image].map(str::to_owned);
        Self { id, pod, name, attempt: 0, image, pid, state: CONTAINER_RUNNING }
    }

    fn full_name(&self, pod: &Pod) -> String {
        format!("k8s_{}_{}_{}_{}_{}", self.name, pod.name, pod.namespace, pod.uid, self.attempt)
    }

    fn log_path(&self, pod: &Pod) -> String {
        format!("/var/log/pods/{}_{}_{}/{}/{}.log", pod.namespace, pod.name, pod.uid, self.name, self.attempt)
    }

    pub fn image_id(&self) -> String {
        format!("{:064x}", self.image.len() + 1)
    }

    fn image_ref(&self) -> String {
        if self.image.is_empty() {
            return self.image_id();
        }
        format!("{}@sha256:{:064x}", self.image.split(':').next().unwrap_or_default(), self.image.len())
    }

    fn metadata(&self) -> cri::ContainerMetadata {
        cri::ContainerMetadata { name: self.name.clone(), attempt: self.attempt }
    }

    fn kube_annotations(&self) -> Map {
        [("io.kubernetes.container.restartCount".to_owned(), self.attempt.to_string())].into()
    }

    fn annotations(&self, pod: &Pod) -> Map {
        let labels = pod.identity(&self.name);
        let metadata = match self.attempt {
            0 => json!({"name": self.name}),
            attempt => json!({"name": self.name, "attempt": attempt}),
        };
        let own = [
            ("Annotations", json!(self.kube_annotations()).to_string()),
            ("ContainerID", self.id.clone()),
            ("ContainerType", "container".into()),
            ("Created", CREATED.into()),
            ("Image", self.image_id()),
            ("ImageName", self.image.clone()),
            ("ImageRef", self.image_ref()),
            ("Labels", json!(labels).to_string()),
            ("LogPath", self.log_path(pod)),
            ("Metadata", metadata.to_string()),
            ("Name", self.full_name(pod)),
            ("SandboxID", pod.id.clone()),
            ("SandboxName", pod.full_name()),
            ("Stdin", "false".into()),
            ("StdinOnce", "false".into()),
            ("TTY", "false".into()),
            ("Volumes", "[]".into()),
        ];
        with_labels(&own, labels.into_iter().chain(self.kube_annotations()).collect())
    }

    fn listed(&self, pod: &Pod) -> cri::CriContainer {
        cri::CriContainer {
            id: self.id.clone(),
            pod_sandbox_id: pod.id.clone(),
            metadata: Some(self.metadata()),
            image: Some(cri::ImageSpec { image: self.image.clone() }),
            image_ref: self.image_ref(),
            state: self.state,
            created_at: CREATED_NS,
            labels: pod.identity(&self.name),
            annotations: self.kube_annotations(),
        }
    }

    fn status(&self, pod: &Pod, verbose: bool) -> cri::ContainerStatusResponse {
        let listed = self.listed(pod);
        let spec = spec(&self.annotations(pod), &cgroup(pod, &self.id), &[]);
        let info = json!({"sandboxID": pod.id, "pid": self.pid, "runtimeSpec": spec, "privileged": false});
        let status = cri::ContainerStatus {
            id: listed.id,
            metadata: listed.metadata,
            state: listed.state,
            created_at: listed.created_at,
            started_at: CREATED_NS,
            image: listed.image,
            image_ref: listed.image_ref,
            labels: listed.labels,
            annotations: listed.annotations,
            log_path: self.log_path(pod),
            ..Default::default()
        };
        let info = verbose.then(|| ("info".to_owned(), info.to_string()));
        cri::ContainerStatusResponse { status: Some(status), info: info.into_iter().collect() }
    }
}

/// The container's cgroup, by either of CRI-O's cgroup managers.
fn cgroup(pod: &Pod, id: &str) -> String {
    match pod.cgroup_parent.ends_with(".slice") {
        true => format!("{}:crio:{id}", pod.cgroup_parent),
        false => format!("{}/crio-{id}", pod.cgroup_parent),
    }
}

/// Versions of the runtime service that it supports: old releases only the older one, new ones only the newer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speaks {
    #[default]
    Both,
    V1,
    V1Alpha2,
}

#[derive(Default)]
struct Known {
    speaks: Speaks,
    pods: BTreeMap<String, Pod>,
    containers: BTreeMap<String, CrioContainer>,
}

struct Daemon {
    root: PathBuf,
    known: Mutex<Known>,
}

pub struct Crio {
    dir: PathBuf,
    daemon: Arc<Daemon>,
    server: GrpcServer,
}

impl Crio {
    /// Everything is below `dir`.
    pub fn start(dir: &Path) -> Result<Self> {
        let daemon = Arc::new(Daemon { root: dir.join("lib"), known: Mutex::default() });
        Ok(Self { dir: dir.into(), server: GrpcServer::start(&dir.join("crio.sock"), daemon.clone())?, daemon })
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("crio.sock")
    }

    /// In place of /var/lib/containers/storage.
    pub fn root(&self) -> PathBuf {
        self.daemon.root.clone()
    }

    /// In place of /run/containers/storage.
    pub fn runroot(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// The requested paths, of gRPC and HTTP.
    pub fn calls(&self) -> Vec<String> {
        self.server.calls()
    }

    pub fn set(&self, speaks: Speaks) {
        self.daemon.known().speaks = speaks;
    }

    fn write_config(&self, id: &str, config: &Value) -> Result<()> {
        for root in [self.root(), self.runroot()] {
            let dir = root.join("overlay-containers").join(id).join("userdata");
            std::fs::create_dir_all(&dir)?;
            std::fs::write(dir.join("config.json"), config.to_string())?;
        }
        Ok(())
    }

    /// Adds a pod, with files and responses.
    pub fn add_pod(&self, pod: &Pod) -> Result<()> {
        self.daemon.known().pods.insert(pod.id.clone(), pod.clone());
        self.write_config(&pod.id, &spec(&pod.annotations(), &cgroup(pod, &pod.id), &["/pause"]))
    }

    /// Adds a container of a pod that was added, with files and responses.
    pub fn add(&self, container: &CrioContainer) -> Result<()> {
        self.serve(container);
        self.write(container)
    }

    /// Writes its files only.
    pub fn write(&self, container: &CrioContainer) -> Result<()> {
        let pod = self.daemon.known().pod(&container.pod)?.clone();
        self.write_config(
            &container.id,
            &spec(&container.annotations(&pod), &cgroup(&pod, &container.id), &["/bin/sleep", "300"]),
        )
    }

    /// Adds its responses only.
    pub fn serve(&self, container: &CrioContainer) {
        self.daemon.known().containers.insert(container.id.clone(), container.clone());
    }

    /// Removes a container or sandbox.
    pub fn remove(&self, id: &str) -> Result<()> {
        let mut known = self.daemon.known();
        known.pods.remove(id);
        known.containers.remove(id);
        for dir in [self.root(), self.runroot()].map(|root| root.join("overlay-containers").join(id)) {
            if dir.exists() {
                std::fs::remove_dir_all(dir)?;
            }
        }
        Ok(())
    }
}

fn selected(selector: &Map, labels: &Map) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

impl Known {
    fn pod(&self, id: &str) -> Result<&Pod, Status> {
        self.pods.get(id).ok_or_else(|| Status::not_found(format!("could not find pod {id:?}: ID does not exist")))
    }

    fn list(&self, filter: &cri::ContainerFilter) -> Result<cri::ListContainersResponse, Status> {
        let mut containers = Vec::new();
        for container in self.containers.values() {
            let listed = container.listed(self.pod(&container.pod)?);
            let wanted = listed.id.starts_with(&filter.id)
                && (filter.pod_sandbox_id.is_empty() || filter.pod_sandbox_id == listed.pod_sandbox_id)
                && filter.state.as_ref().is_none_or(|state| state.state == listed.state)
                && selected(&filter.label_selector, &listed.labels);
            containers.extend(wanted.then_some(listed));
        }
        Ok(cri::ListContainersResponse { containers })
    }

    fn list_pods(&self, filter: &cri::PodSandboxFilter) -> cri::ListPodSandboxResponse {
        let listed = |pod: &Pod| cri::PodSandbox {
            id: pod.id.clone(),
            metadata: Some(pod.metadata()),
            state: 0,
            created_at: CREATED_NS,
            labels: pod.labels(),
            ..Default::default()
        };
        let wanted = |pod: &cri::PodSandbox| {
            pod.id.starts_with(&filter.id)
                && filter.state.as_ref().is_none_or(|state| state.state == pod.state)
                && selected(&filter.label_selector, &pod.labels)
        };
        cri::ListPodSandboxResponse { items: self.pods.values().map(listed).filter(wanted).collect() }
    }

    fn status(&self, request: &cri::StatusRequest) -> Result<cri::ContainerStatusResponse, Status> {
        let id = &request.id;
        let missing = || Status::not_found(format!("could not find container {id:?}: ID does not exist"));
        let container = self.containers.get(id).ok_or_else(missing)?;
        Ok(container.status(self.pod(&container.pod)?, request.verbose))
    }

    fn pod_status(&self, request: &cri::StatusRequest) -> Result<cri::PodSandboxStatusResponse, Status> {
        let pod = self.pod(&request.id)?;
        let status = cri::PodSandboxStatus {
            id: pod.id.clone(),
            metadata: Some(pod.metadata()),
            created_at: CREATED_NS,
            labels: pod.labels(),
            ..Default::default()
        };
        Ok(cri::PodSandboxStatusResponse { status: Some(status), info: Map::new() })
    }

    /// The inspect document of a container, or of a sandbox.
    fn inspected(&self, id: &str) -> Option<Value> {
        let document = |name, pid, image: &str, image_ref, labels: Map, annotations: Map, own: Map, log, pod: &Pod| {
            json!({"name": name, "pid": pid, "image": image, "image_ref": image_ref, "created_time": CREATED_NS,
                "labels": labels, "annotations": annotations, "crio_annotations": own, "log_path": log,
                "root": "/var/lib/containers/storage/overlay/x/merged", "sandbox": pod.id, "ip_addresses": ["10.85.0.7"]})
        };
        if let Some(c) = self.containers.get(id) {
            let pod = self.pods.get(&c.pod)?;
            let (labels, own) = (pod.identity(&c.name), c.annotations(pod));
            let kube = c.kube_annotations();
            return Some(document(c.full_name(pod), c.pid, &c.image, c.image_ref(), labels, kube, own, c.log_path(pod), pod));
        }
        let pod = self.pods.get(id)?;
        let (labels, own) = (pod.labels(), pod.annotations());
        Some(document(pod.infra_name(), 0, "", String::new(), labels, Map::new(), own, String::new(), pod))
    }
}

fn decoded<M: Message + Default>(bytes: &[u8]) -> Result<M, Status> {
    M::decode(bytes).map_err(|error| Status::internal(format!("failed to unmarshal the request: {error}")))
}

impl Daemon {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Service for Daemon {
    fn grpc(&self, service: &str, method: &str, request: &[u8]) -> Result<Vec<u8>, Status> {
        let known = self.known();
        let api = match (service, known.speaks) {
            (cri::V1, Speaks::Both | Speaks::V1) => "v1",
            (cri::V1ALPHA2, Speaks::Both | Speaks::V1Alpha2) => "v1alpha2",
            _ => return Err(Status::unimplemented(format!("unknown service {service}"))),
        };
        Ok(match method {
            "Version" => {
                let [version, runtime_name, runtime_version, runtime_api_version] =
                    ["0.1.0", "cri-o", "1.26.4", api].map(str::to_owned);
                cri::VersionResponse { version, runtime_name, runtime_version, runtime_api_version }.encode_to_vec()
            }
            "ListContainers" => {
                known.list(&decoded::<cri::ListContainersRequest>(request)?.filter.unwrap_or_default())?.encode_to_vec()
            }
            "ContainerStatus" => known.status(&decoded(request)?)?.encode_to_vec(),
            "ListPodSandbox" => {
                known.list_pods(&decoded::<cri::ListPodSandboxRequest>(request)?.filter.unwrap_or_default()).encode_to_vec()
            }
            "PodSandboxStatus" => known.pod_status(&decoded(request)?)?.encode_to_vec(),
            _ => return Err(Status::unimplemented(format!("unknown method {method} for service {service}"))),
        })
    }

    fn http(&self, path: &str) -> (u16, &'static str, String) {
        let text = "text/plain; charset=utf-8";
        if path == "/info" {
            let all = json!([{"container_id": 0, "host_id": 0, "size": 4_294_967_295_u32}]);
            let info = json!({"storage_driver": "overlay", "storage_root": self.root, "cgroup_driver": "cgroupfs",
                "default_id_mappings": {"uids": all, "gids": all}});
            return (200, "application/json", info.to_string());
        }
        let Some(id) = path.strip_prefix("/containers/") else { return (404, text, "404 page not found\n".into()) };
        match self.known().inspected(id) {
            Some(document) => (200, "application/json", document.to_string()),
            None => (404, text, format!("can't find the container with id {id}\n")),
        }
    }
}
