//! The Container Runtime Interface: containerd, CRI-O and cri-dockerd, in both versions of the protocol.
//!
//! `runtime.v1` and `runtime.v1alpha2` have the same encoding under two package names. The client tries both names and caches the one
//! that the server implements; it does not evaluate version strings. The cached name and runtime are valid for one socket and are
//! discarded when the socket is replaced.
//!
//! Every query ends within [`TIMEOUT`], whatever the server does. The client does not watch or change anything.

mod messages;
mod native;
#[cfg(test)]
mod tests;

use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sampler_core::cgroup_path::Runtime;
use sampler_labels::{Facts, Label, Outcome};
use tokio::time::Instant;

use self::messages::*;
use super::grpc::{GrpcConnection, GrpcError, GrpcSocket, ListResponse, ObjectResponse};
use super::reply::{SourceReply, TIMEOUT};
use crate::labels::activation::ActivationGuard;
use crate::labels::stamp::{Stamp, stamp};

/// The runtime's name affects only the `name` label, so it must not use up the time of the query.
const VERSION_TIMEOUT: Duration = Duration::from_millis(500);
/// After this many timeouts of the version call, labels are built without the runtime's name.
const MAX_LATE_VERSIONS: u32 = 5;
const PACKAGES: [&str; 2] = ["runtime.v1", "runtime.v1alpha2"];
/// The name of a pod's sandbox in docker and CRI-O. Kubernetes' own container names are lower case.
const SANDBOX_NAME: &str = "POD";

/// One endpoint.
#[derive(Debug)]
pub struct Cri {
    socket: GrpcSocket,
    limit: Duration,
    state: Mutex<ServerState>,
}

/// Cached properties of the server behind one socket.
#[derive(Clone, Copy, Debug, Default)]
struct ServerState {
    generation: Option<Stamp>,
    /// Index in [`PACKAGES`] of the package that the server implements, as far as known.
    package: usize,
    /// `Some(None)`: the runtime's name is unknown to this program.
    runtime: Option<Option<Runtime>>,
    /// Number of version calls that timed out.
    late_versions: u32,
    /// The server does not implement containerd's own API.
    no_native: bool,
}

/// What the calls of one query share.
struct CallScope<'a> {
    until: Instant,
    connection: GrpcConnection<'a>,
}

/// The runtime of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RuntimeLookup {
    Resolved(Option<Runtime>),
    Pending,
}

/// The version information of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CriVersion {
    pub runtime_name: String,
    pub runtime_version: String,
    pub api_version: String,
    /// `runtime.v1` or `runtime.v1alpha2`.
    pub package: &'static str,
}

impl Cri {
    pub fn new(path: impl Into<PathBuf>, guard: Arc<ActivationGuard>) -> Self {
        Self { socket: GrpcSocket::new(path, guard), limit: TIMEOUT, state: Mutex::default() }
    }

    /// The limits of a query that begins now.
    fn scope(&self) -> CallScope<'_> {
        CallScope { until: Instant::now() + self.limit, connection: self.socket.connection() }
    }

    pub async fn version(&self) -> Result<CriVersion, GrpcError> {
        self.refresh();
        self.version_by(&self.scope()).await
    }

    /// Queries the labels of a container or sandbox by its full id. `hint`: the runtime that its path names, if any.
    pub async fn query(&self, id: &str, hint: Option<Runtime>) -> SourceReply {
        // An empty filter would match every container.
        if id.is_empty() {
            return SourceReply::not_found();
        }
        self.refresh();
        let scope = self.scope();
        let reply = self.by_cri(id, hint, &scope).await;
        if reply.outcome != Outcome::NotFound {
            return reply;
        }
        self.by_native(id, &scope).await.unwrap_or(reply)
    }

    /// Queries containerd's own API for a container that its CRI does not have.
    async fn by_native(&self, id: &str, scope: &CallScope<'_>) -> Option<SourceReply> {
        if self.state().no_native {
            return None;
        }
        match tokio::time::timeout_at(scope.until, native::find(&scope.connection, id)).await {
            Ok(Ok(facts)) => facts.map(SourceReply::found),
            Ok(Err(error)) if error.is_unimplemented() => {
                self.state().no_native = true;
                None
            }
            // The CRI call succeeded, so this error is reported as a detail, not as a failure of the endpoint.
            Ok(Err(error)) => Some(SourceReply::not_found_because(format!("{:#}", anyhow::Error::from(error)))),
            Err(_) => Some(SourceReply::not_found_because("containerd's own API timed out")),
        }
    }

    async fn by_cri(&self, id: &str, hint: Option<Runtime>, scope: &CallScope<'_>) -> SourceReply {
        match self.find(id, hint, scope).await {
            Ok(reply) => reply,
            Err(error @ (GrpcError::NoSocket { .. } | GrpcError::Dormant { .. })) => SourceReply::not_queried(error),
            // Docker's containerd runs without the CRI plugin.
            Err(error) if error.is_unimplemented() => SourceReply::not_found_because("the server does not implement the CRI"),
            Err(error @ GrpcError::Timeout { .. }) => SourceReply::timeout(error),
            Err(error) => SourceReply::error(format!("{:#}", anyhow::Error::from(error))),
        }
    }

    async fn find(&self, id: &str, hint: Option<Runtime>, scope: &CallScope<'_>) -> Result<SourceReply, GrpcError> {
        let status: Option<ContainerStatus> = self.status("ContainerStatus", id, scope).await?;
        // Servers match prefixes of ids: a response about another container counts as not found.
        if let Some(status) = status.filter(|s| ids_match(&s.id, id)) {
            return Ok(self.container(id, hint, status, scope).await);
        }
        let Some(pod) = self.sandbox(id, scope).await? else { return Ok(SourceReply::not_found()) };
        let runtime = self.runtime(hint, scope).await;
        Ok(SourceReply::found(facts(id, None, pod.attempt, &pod, runtime)))
    }

    async fn container(
        &self,
        id: &str,
        hint: Option<Runtime>,
        mut status: ContainerStatus,
        scope: &CallScope<'_>,
    ) -> SourceReply {
        let attempt = status.metadata.as_ref().map_or(0, |metadata| metadata.attempt);
        let (name, mut pod) = names(&mut status);
        let mut detail = String::new();
        if !pod.is_complete() {
            // The kubelet sets these labels; other clients may not, but every container belongs to a sandbox.
            match self.pod_of(id, scope).await {
                Ok(found) => pod.fill(found),
                Err(error) => detail = format!("cannot query the pod: {:#}", anyhow::Error::from(error)),
            }
        }
        let runtime = self.runtime(hint, scope).await;
        let mut facts = facts(id, Some(&name), attempt, &pod, runtime);
        facts.set(Label::Image, image(&status));
        SourceReply { detail, ..SourceReply::found(facts) }
    }

    /// The pod of a container; empty if the server does not have it.
    async fn pod_of(&self, id: &str, scope: &CallScope<'_>) -> Result<PodSandboxMetadata, GrpcError> {
        let request = ListContainersRequest { filter: Some(id.to_owned()) };
        let list: ListResponse<Container> = self.call("ListContainers", request, scope).await?;
        let pod = match list.items.into_iter().find(|c| ids_match(&c.id, id)) {
            Some(container) if !container.pod_sandbox_id.is_empty() => self.sandbox(&container.pod_sandbox_id, scope).await?,
            _ => None,
        };
        Ok(pod.unwrap_or_default())
    }

    async fn sandbox(&self, id: &str, scope: &CallScope<'_>) -> Result<Option<PodSandboxMetadata>, GrpcError> {
        let status: Option<PodSandboxStatus> = self.status("PodSandboxStatus", id, scope).await?;
        Ok(status.filter(|s| ids_match(&s.id, id)).map(|s| s.metadata.unwrap_or_default()))
    }

    /// Queries the status of one object; `None` if the server does not have it.
    async fn status<A>(&self, method: &str, id: &str, scope: &CallScope<'_>) -> Result<Option<A>, GrpcError>
    where
        A: prost::Message + Debug + Default + 'static,
    {
        match self.call::<_, ObjectResponse<A>>(method, id.to_owned(), scope).await {
            Ok(reply) => Ok(reply.object),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Queries the runtime once per socket. `Pending` while a later call may still return it: the `name` label depends on it and would
    /// change.
    async fn runtime(&self, hint: Option<Runtime>, scope: &CallScope<'_>) -> RuntimeLookup {
        if let Some(runtime) = self.state().runtime {
            return RuntimeLookup::Resolved(runtime);
        }
        let until = scope.until.min(Instant::now() + VERSION_TIMEOUT);
        let scope = CallScope { until, connection: self.socket.connection() };
        let runtime = match self.version_by(&scope).await {
            Ok(version) => match version.runtime_name.to_ascii_lowercase().as_str() {
                "containerd" => Some(Runtime::Containerd),
                "cri-o" => Some(Runtime::CriO),
                // cri-dockerd returns the name of its engine.
                "docker" => Some(Runtime::Docker),
                _ => None,
            },
            Err(_) if hint.is_some() => return RuntimeLookup::Resolved(hint),
            Err(GrpcError::Timeout { .. }) => {
                let mut state = self.state();
                state.late_versions += 1;
                let is_final = state.late_versions >= MAX_LATE_VERSIONS;
                return if is_final { RuntimeLookup::Resolved(None) } else { RuntimeLookup::Pending };
            }
            // The server does not return its name.
            Err(_) => None,
        };
        self.state().runtime = Some(runtime);
        RuntimeLookup::Resolved(runtime)
    }

    async fn version_by(&self, scope: &CallScope<'_>) -> Result<CriVersion, GrpcError> {
        // The kubelet sends the same constant; servers ignore it.
        let reply: VersionResponse = self.call("Version", "0.1.0".to_owned(), scope).await?;
        Ok(CriVersion {
            runtime_name: reply.runtime_name,
            runtime_version: reply.runtime_version,
            api_version: reply.runtime_api_version,
            package: PACKAGES[self.state().package],
        })
    }

    /// Calls the package that the server implements as far as known, then the other one.
    async fn call<Q, A>(&self, method: &str, request: Q, scope: &CallScope<'_>) -> Result<A, GrpcError>
    where
        Q: prost::Message + Clone + 'static,
        A: prost::Message + Default + 'static,
    {
        let first = self.state().package;
        match self.call_as(first, method, request.clone(), scope).await {
            Err(error) if error.is_unimplemented() => {}
            reply => return reply,
        }
        let other = 1 - first;
        let reply = self.call_as(other, method, request, scope).await;
        if reply.as_ref().map_or_else(GrpcError::shows_method, |_| true) {
            self.state().package = other;
        }
        reply
    }

    async fn call_as<Q, A>(&self, package: usize, method: &str, request: Q, scope: &CallScope<'_>) -> Result<A, GrpcError>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let method = format!("/{}.RuntimeService/{method}", PACKAGES[package]);
        match tokio::time::timeout_at(scope.until, scope.connection.call(&method, request, None)).await {
            Ok(reply) => reply,
            Err(_) => Err(GrpcError::Timeout { path: self.socket.path.clone(), method, after: self.limit }),
        }
    }

    fn state(&self) -> MutexGuard<'_, ServerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Discards the cached properties if the socket was replaced.
    fn refresh(&self) {
        let generation = stamp(&self.socket.path);
        let mut state = self.state();
        if state.generation != generation {
            *state = ServerState { generation, ..ServerState::default() };
        }
    }
}

impl PodSandboxMetadata {
    fn is_complete(&self) -> bool {
        [&self.namespace, &self.name, &self.uid].iter().all(|part| !part.is_empty())
    }

    fn fill(&mut self, from: PodSandboxMetadata) {
        for (part, other) in [(&mut self.namespace, from.namespace), (&mut self.name, from.name), (&mut self.uid, from.uid)] {
            if part.is_empty() {
                *part = other;
            }
        }
    }
}

/// The names of the container and of its pod, as far as its status has them.
fn names(status: &mut ContainerStatus) -> (String, PodSandboxMetadata) {
    let mut label = |key: &str| status.labels.remove(key).unwrap_or_default();
    let pod = PodSandboxMetadata {
        namespace: label("io.kubernetes.pod.namespace"),
        name: label("io.kubernetes.pod.name"),
        uid: label("io.kubernetes.pod.uid"),
        ..PodSandboxMetadata::default()
    };
    let name = Some(label("io.kubernetes.container.name")).filter(|name| !name.is_empty());
    (name.unwrap_or_else(|| status.metadata.take().unwrap_or_default().name), pod)
}

/// Whether the returned id is the requested one; a response without an id is accepted.
fn ids_match(returned: &str, requested: &str) -> bool {
    returned.is_empty() || returned == requested
}

/// The facts of a container, or of a sandbox if `container` is `None`.
fn facts(id: &str, container: Option<&str>, attempt: u32, pod: &PodSandboxMetadata, lookup: RuntimeLookup) -> Facts {
    let runtime = if let RuntimeLookup::Resolved(runtime) = lookup { runtime } else { None };
    // cri-dockerd returns a sandbox like any container.
    let sandbox = container.is_none_or(|name| name == SANDBOX_NAME);
    let long_names = matches!(runtime, Some(Runtime::Docker | Runtime::CriO));
    let container = container.unwrap_or(if long_names { SANDBOX_NAME } else { "" });
    let mut facts = Facts { runtime, sandbox, ..Facts::default() };
    facts.set(Label::Namespace, Some(&pod.namespace));
    facts.set(Label::Pod, Some(&pod.name));
    facts.set(Label::Container, Some(container));
    facts.pod_uid = Some(pod.uid.clone()).filter(|uid| !uid.is_empty());
    // Every container of the CRI is in a pod, so a missing pod does not mean that there is none.
    facts.pod_status_known = pod.is_complete();
    if lookup == RuntimeLookup::Pending {
        return facts;
    }
    if !long_names {
        facts.set(Label::Name, Some(id));
    } else if pod.is_complete() && !container.is_empty() {
        // The name in both runtimes and in cAdvisor.
        let PodSandboxMetadata { namespace, name, uid, .. } = pod;
        facts.set(Label::Name, Some(&format!("k8s_{container}_{name}_{namespace}_{uid}_{attempt}")));
    }
    facts
}

/// The image's name; a bare digest only if there is no name.
fn image(status: &ContainerStatus) -> Option<&str> {
    let spec = status.image.as_ref();
    let all = [spec.map(|s| s.image.as_str()), spec.map(|s| s.user_specified_image.as_str()), Some(status.image_ref.as_str())];
    let mut all = all.into_iter().flatten().filter(|image| !image.is_empty());
    all.clone().find(|image| !is_digest(image)).or_else(|| all.next())
}

fn is_digest(image: &str) -> bool {
    image.starts_with("sha256:") || image.len() == 64 && image.bytes().all(|b| b.is_ascii_hexdigit())
}
