//! The kubelet's device assignments, from its pod-resources service and from the checkpoint of its device manager.
//!
//! The service has the names of pods, the checkpoint has their UIDs; `sampler_labels::join` merges both lists. Each may be missing: a
//! kubelet without device plugins writes no checkpoint, and pod-resources exists since 1.13. Neither has container ids, so neither
//! identifies the container of a cgroup.
//!
//! Claims of dynamic resource allocation are those of NVIDIA's driver (`claims`).

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sampler_labels::{Assignment, AssignmentSource, facts_for, join};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::checkpoint::{self, CHECKPOINT, CheckpointError, DeviceCheckpoint};
use super::claims::{self, DynamicResource, PreparedClaims};
use super::grpc::{GrpcError, GrpcSocket, ListResponse};
use super::reply::SourceReply;
use crate::error::display_chain;
use crate::labels::activation::ActivationGuard;
use crate::labels::stamp::{Stamp, stamp};

const POD_RESOURCES: &str = "pod-resources/kubelet.sock";
/// Some hundred bytes for each pod, and 80 for each MiB of a GPU that is shared in MiB.
const MAX_LIST_BYTES: usize = 64 << 20;
/// Of a node in a container: its tenant can write anything there.
const MAX_INNER_CHECKPOINT_BYTES: u64 = 8 << 20;
const TIMEOUT: Duration = Duration::from_secs(2);
/// Both lists are about all pods, so queries within this time share them. No longer than the delay of a container's first query: its
/// devices are assigned before it starts.
const SHARED_FOR: Duration = Duration::from_millis(250);
const METHODS: [&str; 2] = ["/v1.PodResourcesLister/List", "/v1alpha1.PodResourcesLister/List"];

/// With the stamp of the file; `None` before the first read.
type ParsedCheckpoint = Option<(Stamp, DeviceCheckpoint)>;

/// The kubelet of this node.
#[derive(Debug)]
pub struct Kubelet {
    pub root: PathBuf,
    pub socket: GrpcSocket,
    /// In a container. A tenant controls what is there: only its checkpoint is read, and it is small.
    inside: Option<InnerNode>,
    /// Index in [`METHODS`] of the method that the service implements, as far as known.
    method: AtomicUsize,
    /// The last report without problems, with the time at which its read began.
    last: Mutex<Option<(Instant, Arc<AssignmentReport>)>>,
    /// The content of the checkpoint that has this stamp: it may be large, and changes only when devices are assigned.
    parsed: Arc<Mutex<ParsedCheckpoint>>,
}

#[derive(Debug)]
struct InnerNode {
    container_id: String,
    reads: Arc<Semaphore>,
}

/// The assignments that could be read, and the problems.
#[derive(Debug, Default)]
pub struct AssignmentReport {
    pub assignments: Vec<Assignment>,
    /// A device plugin for GPUs is registered, or something is assigned.
    pub assigns_gpus: bool,
    /// Each names its endpoint or file. Also empty if there is no kubelet.
    pub problems: Vec<String>,
}

// Field numbers from podresources/v1's `api.proto`; v1alpha1 has the same ones. Topology, CPUs and memory are not read.

#[derive(Clone, PartialEq, prost::Message)]
struct PodResources {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(message, repeated, tag = "3")]
    containers: Vec<ContainerResources>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerResources {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, repeated, tag = "2")]
    devices: Vec<ContainerDevices>,
    #[prost(message, repeated, tag = "5")]
    dynamic_resources: Vec<DynamicResource>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerDevices {
    #[prost(string, tag = "1")]
    resource: String,
    #[prost(string, repeated, tag = "2")]
    ids: Vec<String>,
}

impl Kubelet {
    /// `root` is the kubelet's own folder, usually `/var/lib/kubelet`.
    pub fn new(root: impl Into<PathBuf>, guard: Arc<ActivationGuard>) -> Self {
        let root = root.into();
        let socket = GrpcSocket::new(root.join(POD_RESOURCES), guard).with_responses_of(MAX_LIST_BYTES);
        Self { socket, root, inside: None, method: AtomicUsize::new(0), last: Mutex::default(), parsed: Arc::default() }
    }

    /// The kubelet of a node in this container. All of them share `reads`: each read that hangs keeps a permit and its thread.
    pub fn in_container(
        root: impl Into<PathBuf>,
        container_id: String,
        reads: Arc<Semaphore>,
        guard: Arc<ActivationGuard>,
    ) -> Self {
        Self { inside: Some(InnerNode { container_id, reads }), ..Self::new(root, guard) }
    }

    pub fn is_in_container(&self) -> bool {
        self.inside.is_some()
    }

    /// The kubelet with this pod-resources socket.
    pub fn at(socket: &Path, guard: Arc<ActivationGuard>) -> Self {
        Self::new(socket.ancestors().nth(2).unwrap_or(socket), guard)
    }

    /// Queries the namespace and name of a pod by its UID.
    pub async fn query(&self, pod_uid: Option<&str>) -> SourceReply {
        let Some(uid) = pod_uid else { return SourceReply::not_queried("the pod UID is not known") };
        let report = self.recent().await;
        match (facts_for(uid, &report.assignments), report.problems.first()) {
            (Some(facts), _) => SourceReply::found(facts),
            (None, Some(problem)) => SourceReply::error(problem),
            (None, None) => SourceReply::not_found_because("no device is assigned to this pod"),
        }
    }

    /// As [`Kubelet::assigned`], or such a report that another query has just read.
    async fn recent(&self) -> Arc<AssignmentReport> {
        let last = || self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, report)) = last().as_ref().filter(|(at, _)| at.elapsed() < SHARED_FOR) {
            return Arc::clone(report);
        }
        let (at, report) = (Instant::now(), Arc::new(self.assigned().await));
        if report.problems.is_empty() {
            *last() = Some((at, Arc::clone(&report)));
        }
        report
    }

    /// Reads and joins both lists. A missing list is not a problem, an unreadable one is.
    pub async fn assigned(&self) -> AssignmentReport {
        let (root, parsed, is_own) = (self.root.clone(), Arc::clone(&self.parsed), self.inside.is_none());
        let permit = self.inside.as_ref().map(|inner| Arc::clone(&inner.reads).try_acquire_owned()).transpose();
        let Ok(permit) = permit else {
            let problem = format!("{}: reads in other containers do not return", root.join(CHECKPOINT).display());
            return AssignmentReport { problems: vec![problem], ..AssignmentReport::default() };
        };
        let read = tokio::task::spawn_blocking(move || {
            let _held = permit;
            let bound = if is_own { checkpoint::MAX_BYTES } else { MAX_INNER_CHECKPOINT_BYTES };
            let checkpoint = read_changed(&root, bound, &parsed).map_err(|error| display_chain(&error));
            if !is_own {
                return (checkpoint, Ok(PreparedClaims::default()));
            }
            (checkpoint, claims::read(&root).map_err(|error| display_chain(&error)))
        });
        let (checkpoint, claims) = read.await.unwrap_or_else(|error| {
            let problem = format!("the checkpoints of devices: {error}");
            (Err(problem.clone()), Err(problem))
        });
        let (claims, unread_claims) = match claims {
            Ok(claims) => (claims, None),
            Err(problem) => (PreparedClaims::default(), Some(problem)),
        };
        let pod_resources = if self.inside.is_some() {
            Ok(Vec::new())
        } else {
            match self.pod_resources(&claims).await {
                Err(GrpcError::NoSocket { .. } | GrpcError::Dormant { .. }) => Ok(Vec::new()),
                listed => listed.map_err(|error| display_chain(&error)),
            }
        };
        let mut problems: Vec<String> = unread_claims.into_iter().collect();
        let mut list_of = |read: Result<Vec<Assignment>, String>| {
            read.unwrap_or_else(|problem| {
                problems.push(problem);
                Vec::new()
            })
        };
        let has_plugin = checkpoint.as_ref().is_ok_and(|checkpoint| checkpoint.has_gpu_plugin);
        let joined = join(list_of(checkpoint.map(|checkpoint| checkpoint.assignments)), list_of(pod_resources));
        let inside =
            |assignment| Assignment { inside: self.inside.as_ref().map(|inner| inner.container_id.clone()), ..assignment };
        let assignments: Vec<Assignment> = joined.into_iter().map(inside).collect();
        AssignmentReport { assigns_gpus: has_plugin || !assignments.is_empty(), assignments, problems }
    }

    /// Lists every device of every container, by the names of its pod. Returns within two seconds.
    pub async fn pod_resources(&self, claims: &PreparedClaims) -> Result<Vec<Assignment>, GrpcError> {
        let until = Instant::now() + TIMEOUT;
        let first = self.method.load(Ordering::Relaxed);
        let mut reply = self.list(first, until).await;
        if reply.as_ref().is_err_and(GrpcError::is_unimplemented) {
            reply = self.list(1 - first, until).await;
            if reply.as_ref().map_or_else(GrpcError::shows_method, |_| true) {
                self.method.store(1 - first, Ordering::Relaxed);
            }
        }
        Ok(reply?.items.into_iter().flat_map(|pod| pod_assignments(pod, claims)).collect())
    }

    async fn list(&self, method: usize, until: Instant) -> Result<ListResponse<PodResources>, GrpcError> {
        let method = METHODS[method];
        let timeout = |_| GrpcError::Timeout { path: self.socket.path.clone(), method: method.to_owned(), after: TIMEOUT };
        tokio::time::timeout_at(until, self.socket.call(method, (), None)).await.map_err(timeout)?
    }
}

/// The content of the checkpoint, parsed if it has changed. One reader at a time: others wait for its result.
fn read_changed(root: &Path, bound: u64, parsed: &Mutex<ParsedCheckpoint>) -> Result<DeviceCheckpoint, CheckpointError> {
    let mut parsed = parsed.lock().unwrap_or_else(PoisonError::into_inner);
    // Before the file is read: a change during the read is seen the next time.
    let now = stamp(&root.join(CHECKPOINT));
    if let Some((_, known)) = parsed.as_ref().filter(|(of, _)| Some(*of) == now) {
        return Ok(known.clone());
    }
    let all = checkpoint::read(root, bound)?.unwrap_or_default();
    *parsed = now.map(|now| (now, all.clone()));
    Ok(all)
}

fn pod_assignments(pod: PodResources, claims: &PreparedClaims) -> Vec<Assignment> {
    let non_empty = |part: String| Some(part).filter(|p| !p.is_empty());
    let (namespace, name) = (non_empty(pod.namespace), non_empty(pod.name));
    let mut all = Vec::new();
    for container in pod.containers {
        let source = AssignmentSource::PodResources;
        let (namespace, pod, container_name) = (namespace.clone(), name.clone(), container.name);
        let names = Assignment { namespace, pod, container: container_name, source, ..Assignment::default() };
        all.extend(claims.assignments(&names, &container.dynamic_resources));
        let device =
            |devices: ContainerDevices| Assignment { resource: devices.resource, device_ids: devices.ids, ..names.clone() };
        all.extend(container.devices.into_iter().map(device));
    }
    all
}

#[cfg(test)]
mod tests {
    use std::fs;

    use prost::Message as _;
    use sampler_labels::QueryOutcome;

    use super::*;
    use crate::labels::source::checkpoint::tests::{folder, show};
    use crate::labels::source::grpc_server::{Server, ServerReply, field, number};

    fn pods() -> Vec<u8> {
        let devices = |id: &str| field(2, [field(1, "nvidia.com/gpu"), field(2, id), field(3, field(1, number(1, 0)))].concat());
        let more = [number(3, 5), field(4, field(1, "memory")), field(5, field(2, "claim")), field(40, "new")].concat();
        let container = field(3, [field(1, "c"), devices("GPU-1"), devices("GPU-2"), more].concat());
        let plain = field(3, field(1, "sidecar"));
        field(1, [field(1, "p"), field(2, "n"), container, plain].concat())
    }

    /// Starts a server with one version of the service at the socket below `root`.
    fn serve(root: &Path, package: &'static str, reply: ServerReply) -> Server {
        let server =
            Server::start(move |path, _| match path.strip_prefix('/') == Some(&format!("{package}.PodResourcesLister/List")) {
                true => reply.clone(),
                false => ServerReply::Status(12, "unknown service".into()),
            });
        let socket = root.join(POD_RESOURCES);
        fs::create_dir_all(socket.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(&server.path, socket).unwrap();
        server
    }

    #[tokio::test]
    async fn pod_resources_in_both_versions() {
        for package in ["v1", "v1alpha1"] {
            let root = tempfile::tempdir().unwrap();
            let _server = serve(root.path(), package, ServerReply::Message(pods()));
            let kubelet = Kubelet::new(root.path(), Arc::default());
            for _ in 0..2 {
                let list = kubelet.pod_resources(&PreparedClaims::default()).await.unwrap();
                assert_eq!(show(&list), ["- n/p/c nvidia.com/gpu GPU-1", "- n/p/c nvidia.com/gpu GPU-2"], "{package}");
            }
        }
    }

    #[tokio::test]
    async fn queries_of_many_containers_share_a_report_for_a_moment() {
        let root = tempfile::tempdir().unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&calls);
        let server = Server::start(move |path, _| {
            if path.starts_with("/v1.") && counted.fetch_add(1, Ordering::Relaxed) == 0 {
                return ServerReply::Status(14, "starting".into());
            }
            ServerReply::Message(pods())
        });
        let socket = root.path().join(POD_RESOURCES);
        fs::create_dir_all(socket.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(&server.path, socket).unwrap();
        let kubelet = Kubelet::new(root.path(), Arc::default());
        // A failure is not shared.
        assert_eq!(kubelet.query(Some("u")).await.status, QueryOutcome::Error);
        for _ in 0..20 {
            assert_eq!(kubelet.query(Some("u")).await.status, QueryOutcome::NotFound);
        }
        assert_eq!(calls.load(Ordering::Relaxed), 2);
        tokio::time::sleep(SHARED_FOR).await;
        assert_eq!(kubelet.query(Some("u")).await.status, QueryOutcome::NotFound);
        assert_eq!(calls.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn the_older_service_is_remembered_if_its_first_reply_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        for (status, method) in [(8, 1), (13, 0)] {
            let _server = serve(root.path(), "v1alpha1", ServerReply::Status(status, "no".into()));
            let kubelet = Kubelet::new(root.path(), Arc::default());
            assert!(kubelet.pod_resources(&PreparedClaims::default()).await.is_err());
            assert_eq!(kubelet.method.load(Ordering::Relaxed), method, "status {status}");
            fs::remove_file(root.path().join(POD_RESOURCES)).unwrap();
        }
    }

    #[tokio::test]
    async fn both_lists_are_joined() {
        let checkpoint = br#"{"Data":{"PodDeviceEntries":[{"PodUID":"u1","ContainerName":"c","ResourceName":"nvidia.com/gpu",
            "DeviceIDs":{"0":["GPU-1"],"1":["GPU-2"]}}]},"Checksum":1}"#;
        let root = folder(checkpoint);
        // Without a server: only the checkpoint, and no problem.
        let kubelet = Kubelet::new(root.path(), Arc::default());
        let alone = kubelet.assigned().await;
        assert_eq!((show(&alone.assignments), alone.problems), (vec!["u1 -/-/c nvidia.com/gpu GPU-1,GPU-2".to_owned()], vec![]));
        let server = serve(root.path(), "v1", ServerReply::Message(pods()));
        let both = kubelet.assigned().await;
        assert_eq!((show(&both.assignments), both.problems), (vec!["u1 n/p/c nvidia.com/gpu GPU-1,GPU-2".to_owned()], vec![]));
        // If one fails, the other is used and the problem is reported.
        let _folder = server.stop();
        let refused = kubelet.assigned().await;
        assert_eq!((refused.assignments.len(), refused.problems.len()), (1, 1), "{:?}", refused.problems);
        assert!(refused.problems[0].contains("kubelet.sock: cannot connect: "), "{:?}", refused.problems);
        let root = folder(b"{");
        let _server = serve(root.path(), "v1", ServerReply::Message(pods()));
        let broken = Kubelet::new(root.path(), Arc::default()).assigned().await;
        assert_eq!(show(&broken.assignments), ["- n/p/c nvidia.com/gpu GPU-1,GPU-2"]);
        assert!(broken.problems[0].contains(CHECKPOINT), "{:?}", broken.problems);
    }

    #[tokio::test]
    async fn failures_of_pod_resources_name_the_call() {
        let root = tempfile::tempdir().unwrap();
        let none = Kubelet::new(root.path(), Arc::default());
        assert!(matches!(none.pod_resources(&PreparedClaims::default()).await, Err(GrpcError::NoSocket { .. })));
        for (package, reply, expect) in [
            ("v1", ServerReply::Message(vec![0xff; 9]), "/v1.PodResourcesLister/List: Internal"),
            ("v1", ServerReply::Message(vec![b'x'; 65 << 20]), "/v1.PodResourcesLister/List: OutOfRange"),
            ("v1", ServerReply::Status(8, "too many".into()), "/v1.PodResourcesLister/List: ResourceExhausted: too many"),
            ("none", ServerReply::Hang, "/v1alpha1.PodResourcesLister/List: Unimplemented"),
        ] {
            let root = tempfile::tempdir().unwrap();
            let _server = serve(root.path(), package, reply);
            let error = Kubelet::new(root.path(), Arc::default())
                .pod_resources(&PreparedClaims::default())
                .await
                .unwrap_err()
                .to_string();
            assert!(error.contains(expect), "{error}");
        }
    }

    /// The list of pod-resources: no assignment has text that is not in the message, and names of a pod come with all of them.
    #[test]
    fn fuzz_pod_resources() {
        devkit::fuzz(file!(), "pod_resources", move |bytes| {
            let Ok(list) = ListResponse::<PodResources>::decode(bytes) else { return };
            let claims = PreparedClaims::default();
            let all: Vec<Assignment> =
                list.items.iter().flat_map(|pod| pod_assignments(pod.clone(), &claims)).filter(Assignment::is_gpu).collect();
            let named = |a: &Assignment| {
                let names =
                    |pod: &PodResources| (a.namespace.as_deref(), a.pod.as_deref()) == (some(&pod.namespace), some(&pod.name));
                list.items.iter().any(|pod| names(pod) && pod.containers.iter().any(|container| container.name == a.container))
            };
            assert!(all.iter().all(named), "{all:?}");
            let ids = |list: &[Assignment]| -> std::collections::BTreeSet<String> {
                list.iter().flat_map(|assignment| assignment.device_ids.clone()).collect()
            };
            assert_eq!(ids(&join(Vec::new(), all.clone())), ids(&all));
            assert_eq!(ListResponse::decode(&*list.encode_to_vec()), Ok(list));
        });
    }

    fn some(text: &str) -> Option<&str> {
        Some(text).filter(|text| !text.is_empty())
    }
}
