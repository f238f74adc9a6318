//! The label sources. Each fails independently, each has a hard limit of time and size, and none is on the sampling path.

mod bundle;
pub mod checkpoint;
pub mod claims;
mod conmon;
pub mod cri;
mod crio;
pub mod docker;
mod docker_file;
mod environ;
pub mod file;
pub mod grpc;
#[cfg(test)]
mod grpc_server;
pub mod host_files;
pub mod http;
pub mod kubelet;
mod manifest;
mod nested;
mod pods;
pub mod reply;
mod storage;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use sampler_core::cgroup_path::{Kind, Runtime};
use sampler_core::units::ContainerKey;
use sampler_labels::{Facts, Outcome, Query, Source, TargetId};

use self::claims::PreparedClaims;
use self::cri::Cri;
use self::host_files::HostFiles;
use self::http::HttpClient;
use self::kubelet::Kubelet;
use self::nested::RuntimePlace;
use self::reply::{SourceReply, TIMEOUT, first_found};
use super::activation::ActivationGuard;
use super::discover::{HostPaths, is_single_name};
use super::root::Root;
use crate::error::display_chain;
use crate::observe::clock::boot_now;

/// The endpoint of a target.
#[derive(Clone)]
enum Endpoint {
    Files,
    Docker(Arc<HttpClient>, Runtime),
    Cri(Arc<Cri>),
    Crio(Arc<HttpClient>),
    Kubelet(Arc<Kubelet>),
}

/// All sources and their endpoints.
pub struct LabelSources {
    pub host: HostFiles,
    pub procfs: PathBuf,
    pub guard: Arc<ActivationGuard>,
    /// Where the cgroup hierarchies are mounted.
    pub cgroups: Vec<PathBuf>,
    pub places: ArcSwap<HostPaths>,
    /// By target.
    endpoints: RwLock<Vec<Endpoint>>,
}

impl LabelSources {
    pub fn new(root: Root, procfs: PathBuf, cgroups: Vec<PathBuf>) -> Self {
        let places = ArcSwap::from_pointee(HostPaths::default().with_defaults());
        let guard = Arc::new(ActivationGuard::new(&procfs, root.clone()));
        Self { host: HostFiles::new(root), procfs, guard, cgroups, places, endpoints: RwLock::default() }
    }

    /// `socket`: its path in this mount namespace. Targets have the same consecutive numbers as in the resolver.
    pub fn add(&self, source: Source, socket: &Path) {
        let endpoint = match source {
            Source::Docker => Endpoint::Docker(Arc::new(HttpClient::keeping(&self.guard, socket)), Runtime::Docker),
            // Its service ends when it has no connection.
            Source::Podman => Endpoint::Docker(Arc::new(HttpClient::new(&self.guard, socket)), Runtime::Podman),
            Source::Cri => Endpoint::Cri(Arc::new(Cri::new(socket, Arc::clone(&self.guard)))),
            Source::Crio => Endpoint::Crio(Arc::new(HttpClient::keeping(&self.guard, socket))),
            Source::Kubelet => Endpoint::Kubelet(Arc::new(Kubelet::at(socket, Arc::clone(&self.guard)))),
            _ => Endpoint::Files,
        };
        self.endpoints.write().unwrap_or_else(PoisonError::into_inner).push(endpoint);
    }

    fn endpoint(&self, id: TargetId) -> Option<Endpoint> {
        self.endpoints.read().unwrap_or_else(PoisonError::into_inner).get(usize::from(id.0)).cloned()
    }
}

/// Checks whether a socket responds, without a query about a container.
pub async fn probe(sources: Arc<LabelSources>, target: TargetId) -> Result<(), String> {
    let probe = async {
        match sources.endpoint(target) {
            Some(Endpoint::Docker(client, _)) => client.check_responds("/_ping").await,
            Some(Endpoint::Crio(client)) => client.check_responds("/info").await,
            Some(Endpoint::Cri(cri)) => match cri.version().await {
                Err(error) if !error.is_unimplemented() => Err(display_chain(&error)),
                _ => Ok(()),
            },
            Some(Endpoint::Kubelet(kubelet)) => {
                kubelet.pod_resources(&PreparedClaims::default()).await.map(drop).map_err(|e| display_chain(&e))
            }
            Some(Endpoint::Files) | None => Ok(()),
        }
    };
    let timed_out = || Err(format!("no response within {} s", TIMEOUT.as_secs()));
    tokio::time::timeout(TIMEOUT, probe).await.unwrap_or_else(|_| timed_out())
}

/// Executes one query; ends within [`TIMEOUT`] in any case. A file read that hangs keeps its thread.
pub async fn execute(sources: Arc<LabelSources>, query: &Query) -> SourceReply {
    let Some(endpoint) = sources.endpoint(query.target) else { return SourceReply::error("no such target") };
    let id = query.container_id().to_owned();
    if !has_valid_id(query) {
        return SourceReply::not_queried("the container has no valid id");
    }
    let reply = async {
        match endpoint {
            Endpoint::Docker(client, runtime) => docker::query(&client, runtime, &id).await,
            Endpoint::Cri(cri) => cri.query(&id, query.record.identity.runtime).await,
            Endpoint::Crio(client) => crio::query(&client, &id).await,
            Endpoint::Kubelet(kubelet) => kubelet.query(query.pod_uid.as_deref()).await,
            Endpoint::Files => {
                let (sources, query) = (Arc::clone(&sources), query.clone());
                let read = tokio::task::spawn_blocking(move || read_files(&sources, &query, &KnownProcesses::default()));
                read.await.unwrap_or_else(SourceReply::error)
            }
        }
    };
    let timed_out = || SourceReply::timeout(format!("no response within {} s", TIMEOUT.as_secs()));
    tokio::time::timeout(TIMEOUT, reply).await.unwrap_or_else(|_| timed_out())
}

/// The value of an annotation or label in the files of any runtime; `None` if none has it.
pub fn marked(files: &HostFiles, places: &HostPaths, id: &str, key: &str) -> Result<Option<String>, String> {
    // The id becomes a part of paths.
    if !is_single_name(id) {
        return Err(format!("{id:?} is not the id of a container"));
    }
    let found = [
        bundle::annotation(files, places, id, key),
        docker_file::label(files, places, id, key),
        storage::annotation(files, places, id, key),
    ];
    first_found(found.into_iter())
}

/// Pods, jobs, units and sessions are not found by the id of a container.
fn has_valid_id(query: &Query) -> bool {
    is_single_name(query.container_id()) || matches!(query.record.identity.kind, Kind::Pod | Kind::Job | Kind::Unit | Kind::Login)
}

/// How long something is reused for queries about one container in succession: less than the shortest time between two queries to one
/// source.
const VALID_FOR: Duration = Duration::from_millis(5);
/// The same for the place of a runtime on the host: the parent of a container's process does not change while the runtime lives.
const HOST_VALID_FOR: Duration = Duration::from_secs(10);
/// Several times the queries that can be in progress.
const MAX_KNOWN: usize = 1_024;

/// What several sources need to know of a container, for those that are queried in succession.
#[derive(Default)]
pub struct KnownProcesses {
    pids: KnownByContainer<Arc<[String]>>,
    /// Where the runtimes are.
    places: KnownByContainer<RuntimePlace>,
}

/// With the time at which each was found.
type KnownByContainer<T> = Mutex<HashMap<ContainerKey, (Instant, T)>>;

fn known_or_find<T: Clone>(
    known: &KnownByContainer<T>,
    key: ContainerKey,
    is_valid: impl Fn(&Instant, &T) -> bool,
    find: impl FnOnce() -> T,
) -> T {
    // Not held during a read: one that hangs must not stop the other readers.
    let all = || known.lock().unwrap_or_else(PoisonError::into_inner);
    let valid = all().get(&key).filter(|(at, value)| is_valid(at, value)).map(|(_, value)| value.clone());
    valid.unwrap_or_else(|| {
        let found = find();
        let mut all = all();
        if all.len() >= MAX_KNOWN {
            all.clear();
        }
        all.insert(key, (Instant::now(), found.clone()));
        found
    })
}

/// A runtime makes the cgroup of a container some time before it has a process in it.
const EMPTY_UNTIL_NS: u64 = 50_000_000;

impl KnownProcesses {
    fn pids(&self, sources: &LabelSources, query: &Query) -> Arc<[String]> {
        let age = boot_now().0.checked_sub(query.record.created.0);
        let is_new = query.record.creation_seen && age.is_some_and(|age| age < EMPTY_UNTIL_NS);
        if is_new || query.is_gone {
            return Arc::default();
        }
        let find = || pods::pids_of(&sources.cgroups, &query.record.cgroup_path).into();
        known_or_find(&self.pids, query.key, |at, _| at.elapsed() < VALID_FOR, find)
    }

    /// The root of a runtime inside a container.
    fn inner_root(&self, sources: &LabelSources, query: &Query) -> Option<Root> {
        let valid_for = |place: &RuntimePlace| if matches!(place, RuntimePlace::Host) { HOST_VALID_FOR } else { VALID_FOR };
        let find = || nested::place(&sources.procfs, &self.pids(sources, query), &query.record);
        match known_or_find(&self.places, query.key, |at, place| at.elapsed() < valid_for(place), find) {
            RuntimePlace::Inside(root) => Some(root),
            RuntimePlace::Host | RuntimePlace::Unknown => None,
        }
    }
}

/// Executes a query to a source that reads files. Blocking.
pub fn read_files(sources: &LabelSources, query: &Query, known: &KnownProcesses) -> SourceReply {
    let (host, places, id, source) = (&sources.host, sources.places.load(), query.container_id(), query.source);
    if !has_valid_id(query) {
        return SourceReply::not_queried("the container has no valid id");
    }
    let reply = match source {
        Source::Environ => return environ::query(host, &sources.procfs, &sources.cgroups, &query.record),
        Source::Logs => {
            let reply = pods::logs(host, &places.pod_logs, id, query.pod_uid.as_deref());
            if reply.outcome != Outcome::NotFound {
                return reply;
            }
            // A node in a container (kind) has the logs of its pods.
            let Some(inner_root) = known.inner_root(sources, query) else { return reply };
            let inner = pods::logs(
                &HostFiles::new(inner_root),
                &HostPaths::default().with_defaults().pod_logs,
                id,
                query.pod_uid.as_deref(),
            );
            return if matches!(inner.outcome, Outcome::Found(_)) { inner } else { reply };
        }
        Source::Mountinfo => {
            let uid = query.record.identity.pod_uid.as_deref();
            return pods::mountinfo(&sources.procfs, &known.pids(sources, query), uid);
        }
        Source::Manifest => return manifest::query(host, id, query.record.identity.name.as_deref()),
        source => runtime_files(source, host, &places, id),
    };
    if reply.outcome != Outcome::NotFound {
        return reply;
    }
    if let Some(user_paths) = places.for_user(&query.record.cgroup_path) {
        let reply = runtime_files(source, host, user_paths, id);
        if reply.outcome != Outcome::NotFound {
            return reply;
        }
    }
    if source == Source::PodmanFile
        && let Some(reply) = conmon::query(&sources.procfs, &known.pids(sources, query), &query.record)
    {
        return reply;
    }
    let Some(inner_root) = known.inner_root(sources, query) else { return reply };
    match runtime_files(source, &HostFiles::new(inner_root.clone()), &HostPaths::default().with_defaults(), id) {
        // Which GPU a number there stands for depends on those that the outer container has.
        SourceReply { outcome: Outcome::Found(facts), status, detail, at } => {
            SourceReply { outcome: Outcome::Found(Facts { visible: None, ..facts }), status, detail, at }
        }
        inner if inner.outcome == Outcome::NotFound => reply,
        // An error inside the container is not an error of the host's files.
        inner => SourceReply::not_found_because(inner.detail),
    }
}

fn runtime_files(source: Source, files: &HostFiles, places: &HostPaths, id: &str) -> SourceReply {
    match source {
        Source::Bundle => bundle::query(files, places, id),
        Source::DockerFile => docker_file::query(files, places, id),
        Source::CrioFile => storage::crio(files, places, id),
        Source::PodmanFile => storage::podman(files, places, id),
        other => SourceReply::error(format!("{} does not read files", other.name())),
    }
}

#[cfg(test)]
pub mod tests {
    use std::fs;

    use sampler_core::identity::ContainerRecord;
    use sampler_labels::{ContainerLabels, Label, VisibleGpus};
    use strum::VariantArray as _;

    use super::*;

    /// A temporary root file system.
    pub struct Files(tempfile::TempDir);

    impl Files {
        pub fn new(files: &[(&str, &str)]) -> Self {
            let made = Self(tempfile::tempdir().unwrap());
            files.iter().for_each(|(path, text)| made.add(path, text));
            made
        }

        fn place(&self, path: &str) -> PathBuf {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            path
        }

        pub fn add(&self, path: &str, text: &str) {
            fs::write(self.place(path), text).unwrap();
        }

        pub fn link(&self, path: &str, target: &str) {
            std::os::unix::fs::symlink(target, self.place(path)).unwrap();
        }

        pub fn host(&self) -> HostFiles {
            HostFiles::new(Root::new(self.0.path()))
        }
    }

    /// `[sandbox ]namespace/pod/container name image`, or the outcome's name.
    pub fn check(reply: &SourceReply, expect: &str) {
        let text = match &reply.outcome {
            Outcome::Found(facts) => {
                let label = |l: Label| facts.labels[l as usize].clone().unwrap_or("-".into());
                let pod = [Label::Namespace, Label::Pod, Label::Container].map(label).join("/");
                let sandbox = if facts.sandbox { "sandbox " } else { "" };
                format!("{sandbox}{pod} {} {}", label(Label::Name), label(Label::Image))
            }
            _ => reply.status.name().to_owned(),
        };
        assert_eq!(text, expect, "{}", reply.detail);
    }

    /// Checks what any content of a source must keep: what is exported and stored of a reply is bounded.
    pub fn check_bounds(reply: &SourceReply) {
        assert!(reply.to_attempt().detail.len() <= 300);
        let Outcome::Found(facts) = &reply.outcome else { return };
        let identity = sampler_core::cgroup_path::parse("/docker/x");
        let (key, created) = (sampler_core::units::ContainerKey(1), sampler_core::units::BootNs(0));
        let record = ContainerRecord { key, cgroup_path: "/docker/x".into(), identity, created, creation_seen: true };
        let mut labels = ContainerLabels::from_path(&record);
        labels.merge(sampler_labels::Source::Bundle, facts);
        assert!(Label::VARIANTS.iter().all(|label| labels.text(*label).len() <= 1024));
        assert!(labels.pod_uid.as_ref().is_none_or(|uid| uid.len() <= 64));
        if let Some(VisibleGpus::These(devices)) = &facts.visible {
            assert!(!devices.is_empty() && devices.len() <= 256);
            assert!(devices.iter().all(|device| format!("{device:?}").len() <= 512), "{devices:?}");
        }
    }
}
