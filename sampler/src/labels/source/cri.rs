//! The Container Runtime Interface: containerd, CRI-O and cri-dockerd, in both versions of the protocol.
//!
//! `runtime.v1` and `runtime.v1alpha2` are the same bytes under two names, so a version is nothing but which name the server
//! knows: that is tried and remembered, and no version string is read to decide anything. A remembered name or runtime holds
//! for one socket; a socket that was replaced is asked anew.
//!
//! It promises an answer within [`LIMIT`], whatever the server does. It does not list, watch, or change anything.

mod messages;
mod native;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sampler_core::cgroup_path::Runtime;
use sampler_labels::{Facts, Label, Outcome};
use tokio::time::Instant;

use self::messages::*;
use super::answer::Answer;
use super::grpc::{GrpcError, GrpcSocket};
use crate::labels::stamp::Stamp;

const LIMIT: Duration = super::answer::TIMEOUT;
/// The runtime's name only shapes the `name` label: it must not use up the time of the labels.
const VERSION_LIMIT: Duration = Duration::from_millis(500);
/// After so many of them the labels do without.
const LATE_VERSIONS: u32 = 5;
const PACKAGES: [&str; 2] = ["runtime.v1", "runtime.v1alpha2"];
/// What docker and CRI-O call a pod's sandbox. Kubernetes' own container names are lower case.
const SANDBOX_NAME: &str = "POD";

/// One endpoint.
#[derive(Debug)]
pub struct Cri {
    socket: GrpcSocket,
    limit: Duration,
    known: Mutex<ServerState>,
}

/// What was learnt of the server behind one socket.
#[derive(Clone, Copy, Debug, Default)]
struct ServerState {
    generation: Option<Stamp>,
    /// The package that answered last, of [`PACKAGES`].
    package: usize,
    /// `Some(None)`: it has a name that is no runtime known here.
    runtime: Option<Option<Runtime>>,
    /// How often it did not say in time which runtime it is.
    late_versions: u32,
    /// It has none of containerd's own API.
    no_native: bool,
}

/// Which runtime a server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RuntimeLookup {
    ServerState(Option<Runtime>),
    Pending,
}

/// What a server says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CriVersion {
    pub runtime_name: String,
    pub runtime_version: String,
    pub api_version: String,
    /// `runtime.v1` or `runtime.v1alpha2`.
    pub package: &'static str,
}

#[derive(Debug, Default)]
struct Pod {
    namespace: String,
    name: String,
    uid: String,
}

impl Cri {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { socket: GrpcSocket::new(path), limit: LIMIT, known: Mutex::default() }
    }

    pub fn path(&self) -> &Path {
        self.socket.path()
    }

    pub async fn version(&self) -> Result<CriVersion, GrpcError> {
        self.refresh();
        self.version_by(Instant::now() + self.limit).await
    }

    /// Labels of a container or a sandbox, by its whole id. `hint`: its runtime, where its path names it.
    pub async fn ask(&self, id: &str, hint: Option<Runtime>) -> Answer {
        // An empty filter would list everything, and an id is never empty.
        if id.is_empty() {
            return Answer::not_found();
        }
        self.refresh();
        let until = Instant::now() + self.limit;
        let answer = self.by_cri(id, hint, until).await;
        if answer.outcome != Outcome::NotFound {
            return answer;
        }
        self.by_native(id, until).await.unwrap_or(answer)
    }

    /// Where the CRI does not know it, containerd itself may.
    async fn by_native(&self, id: &str, until: Instant) -> Option<Answer> {
        if self.known().no_native {
            return None;
        }
        match tokio::time::timeout_at(until, native::find(&self.socket, id)).await {
            Ok(Ok(facts)) => facts.map(Answer::found),
            Ok(Err(error)) if error.is_unimplemented() => {
                self.known().no_native = true;
                None
            }
            // The CRI has answered: that this has not is told, and is no failure of the endpoint.
            Ok(Err(error)) => Some(Answer::not_found_because(format!("{:#}", anyhow::Error::from(error)))),
            Err(_) => Some(Answer::not_found_because("its own API did not answer in time")),
        }
    }

    async fn by_cri(&self, id: &str, hint: Option<Runtime>, until: Instant) -> Answer {
        match self.find(id, hint, until).await {
            Ok(answer) => answer,
            Err(error @ GrpcError::NoSocket { .. }) => Answer::not_asked(error),
            // containerd as Docker ships it runs without the CRI: a server, but none of ours.
            Err(error) if error.is_unimplemented() => Answer::not_found_because("it serves no CRI"),
            Err(error @ GrpcError::Timeout { .. }) => Answer::timeout(error),
            Err(error) => Answer::error(format!("{:#}", anyhow::Error::from(error))),
        }
    }

    async fn find(&self, id: &str, hint: Option<Runtime>, until: Instant) -> Result<Answer, GrpcError> {
        let request = ContainerStatusRequest { container_id: id.to_owned() };
        let answer = self.call::<_, ContainerStatusResponse>("ContainerStatus", request, until).await;
        // Servers complete the beginning of an id: an answer about another container is none about this.
        let status = not_found_is_none(answer)?.and_then(|a| a.status).filter(|s| is(&s.id, id));
        if let Some(status) = status {
            return Ok(self.container(id, hint, &status, until).await);
        }
        let Some(status) = self.sandbox(id, until).await? else { return Ok(Answer::not_found()) };
        let metadata = status.metadata.unwrap_or_default();
        let attempt = metadata.attempt;
        let pod = Pod { namespace: metadata.namespace, name: metadata.name, uid: metadata.uid };
        let runtime = self.runtime(hint, until).await;
        Ok(Answer::found(facts(id, None, attempt, &pod, runtime)))
    }

    async fn container(&self, id: &str, hint: Option<Runtime>, status: &ContainerStatus, until: Instant) -> Answer {
        let label = |key: &str| status.labels.get(key).cloned().unwrap_or_default();
        let metadata = status.metadata.clone().unwrap_or_default();
        let name = Some(label("io.kubernetes.container.name")).filter(|n| !n.is_empty()).unwrap_or(metadata.name);
        let mut pod = Pod {
            namespace: label("io.kubernetes.pod.namespace"),
            name: label("io.kubernetes.pod.name"),
            uid: label("io.kubernetes.pod.uid"),
        };
        let mut detail = String::new();
        if !pod.is_whole() {
            // The labels are the kubelet's; other clients set none, but every container is in a sandbox.
            match self.pod_of(id, until).await {
                Ok(found) => pod.fill(found.unwrap_or_default()),
                Err(error) => detail = format!("the pod is not known: {:#}", anyhow::Error::from(error)),
            }
        }
        let runtime = self.runtime(hint, until).await;
        let mut facts = facts(id, Some(&name), metadata.attempt, &pod, runtime);
        facts.set(Label::Image, image(status));
        Answer { detail, ..Answer::found(facts) }
    }

    async fn pod_of(&self, id: &str, until: Instant) -> Result<Option<Pod>, GrpcError> {
        let request = ListContainersRequest { filter: Some(ContainerFilter { id: id.to_owned() }) };
        let list = self.call::<_, ListContainersResponse>("ListContainers", request, until).await?;
        let Some(container) = list.containers.into_iter().find(|c| is(&c.id, id)) else { return Ok(None) };
        if container.pod_sandbox_id.is_empty() {
            return Ok(None);
        }
        let metadata = self.sandbox(&container.pod_sandbox_id, until).await?.and_then(|s| s.metadata);
        Ok(metadata.map(|m| Pod { namespace: m.namespace, name: m.name, uid: m.uid }))
    }

    async fn sandbox(&self, id: &str, until: Instant) -> Result<Option<PodSandboxStatus>, GrpcError> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned() };
        let answer = self.call::<_, PodSandboxStatusResponse>("PodSandboxStatus", request, until).await;
        Ok(not_found_is_none(answer)?.and_then(|a| a.status).filter(|s| is(&s.id, id)))
    }

    /// Asked once per socket. `Pending` while it may yet tell: a name made without knowing it would be another name later.
    async fn runtime(&self, hint: Option<Runtime>, until: Instant) -> RuntimeLookup {
        if let Some(runtime) = self.known().runtime {
            return RuntimeLookup::ServerState(runtime);
        }
        let until = until.min(Instant::now() + VERSION_LIMIT);
        let runtime = match self.version_by(until).await {
            Ok(version) => match version.runtime_name.to_ascii_lowercase().as_str() {
                "containerd" => Some(Runtime::Containerd),
                "cri-o" => Some(Runtime::CriO),
                // cri-dockerd says what it stands for.
                "docker" => Some(Runtime::Docker),
                _ => None,
            },
            Err(_) if hint.is_some() => return RuntimeLookup::ServerState(hint),
            Err(GrpcError::Timeout { .. }) => {
                let mut known = self.known();
                known.late_versions += 1;
                return if known.late_versions < LATE_VERSIONS {
                    RuntimeLookup::Pending
                } else {
                    RuntimeLookup::ServerState(None)
                };
            }
            // It will not tell.
            Err(_) => None,
        };
        self.known().runtime = Some(runtime);
        RuntimeLookup::ServerState(runtime)
    }

    async fn version_by(&self, until: Instant) -> Result<CriVersion, GrpcError> {
        // The number is the kubelet's; it never changed, and no server compares it.
        let request = VersionRequest { version: "0.1.0".to_owned() };
        let answer = self.call::<_, VersionResponse>("Version", request, until).await?;
        Ok(CriVersion {
            runtime_name: answer.runtime_name,
            runtime_version: answer.runtime_version,
            api_version: answer.runtime_api_version,
            package: PACKAGES[self.known().package],
        })
    }

    /// Calls by the name that answered last, then by the other.
    async fn call<Q, A>(&self, method: &str, request: Q, until: Instant) -> Result<A, GrpcError>
    where
        Q: prost::Message + Clone + 'static,
        A: prost::Message + Default + 'static,
    {
        let first = self.known().package;
        match self.call_as(first, method, request.clone(), until).await {
            Err(error) if error.is_unimplemented() => {}
            answer => return answer,
        }
        let other = 1 - first;
        let answer = self.call_as(other, method, request, until).await;
        // Whatever it says, it is the server's word about the request and not about the name.
        if answer.as_ref().map_or_else(|e| e.code().is_some() && !e.is_unimplemented(), |_| true) {
            self.known().package = other;
        }
        answer
    }

    async fn call_as<Q, A>(&self, package: usize, method: &str, request: Q, until: Instant) -> Result<A, GrpcError>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let method = format!("/{}.RuntimeService/{method}", PACKAGES[package]);
        match tokio::time::timeout_at(until, self.socket.call(&method, request)).await {
            Ok(answer) => answer,
            Err(_) => Err(GrpcError::Timeout { path: self.path().to_owned(), method, after: self.limit }),
        }
    }

    fn known(&self) -> MutexGuard<'_, ServerState> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets the server of a socket that was replaced.
    fn refresh(&self) {
        let generation = self.socket.generation();
        let mut known = self.known();
        if known.generation != generation {
            *known = ServerState { generation, ..ServerState::default() };
        }
    }
}

impl Pod {
    fn is_whole(&self) -> bool {
        [&self.namespace, &self.name, &self.uid].iter().all(|part| !part.is_empty())
    }

    fn fill(&mut self, from: Pod) {
        for (part, other) in [(&mut self.namespace, from.namespace), (&mut self.name, from.name), (&mut self.uid, from.uid)] {
            if part.is_empty() {
                *part = other;
            }
        }
    }
}

fn not_found_is_none<A>(answer: Result<A, GrpcError>) -> Result<Option<A>, GrpcError> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// A server that repeats no id is believed.
fn is(answered: &str, asked: &str) -> bool {
    answered.is_empty() || answered == asked
}

/// The facts of a container, or of a sandbox where there is no name of one.
fn facts(id: &str, container: Option<&str>, attempt: u32, pod: &Pod, told: RuntimeLookup) -> Facts {
    let runtime = if let RuntimeLookup::ServerState(runtime) = told { runtime } else { None };
    // cri-dockerd answers for a sandbox as for any container.
    let sandbox = container.is_none_or(|name| name == SANDBOX_NAME);
    let long_names = matches!(runtime, Some(Runtime::Docker | Runtime::CriO));
    let container = container.unwrap_or(if long_names { SANDBOX_NAME } else { "" });
    let mut facts = Facts { runtime, sandbox, ..Facts::default() };
    facts.set(Label::Namespace, Some(&pod.namespace));
    facts.set(Label::Pod, Some(&pod.name));
    facts.set(Label::Container, Some(container));
    facts.pod_uid = Some(pod.uid.clone()).filter(|uid| !uid.is_empty());
    // Every container of the CRI is in a pod: that one was not found does not mean that there is none.
    facts.knows_pods = pod.is_whole();
    if told == RuntimeLookup::Pending {
        return facts;
    }
    if !long_names {
        facts.set(Label::Name, Some(id));
    } else if pod.is_whole() && !container.is_empty() {
        // As both runtimes call it, and as cAdvisor shows it.
        let Pod { namespace, name, uid } = pod;
        facts.set(Label::Name, Some(&format!("k8s_{container}_{name}_{namespace}_{uid}_{attempt}")));
    }
    facts
}

/// The image's name; a digest that names nothing only where there is no better.
fn image(status: &ContainerStatus) -> Option<&str> {
    let spec = status.image.as_ref();
    let all = [spec.map(|s| s.image.as_str()), spec.map(|s| s.user_specified_image.as_str()), Some(status.image_ref.as_str())];
    let mut all = all.into_iter().flatten().filter(|image| !image.is_empty());
    all.clone().find(|image| !is_digest(image)).or_else(|| all.next())
}

fn is_digest(image: &str) -> bool {
    image.starts_with("sha256:") || image.len() == 64 && image.bytes().all(|b| b.is_ascii_hexdigit())
}
