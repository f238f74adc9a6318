//! The sources of labels: each may fail alone, each has a hard limit in time and size, none is on the sampling path.

pub mod answer;
mod bundle;
pub mod cri;
mod crio;
pub mod docker;
mod docker_file;
pub mod file;
pub mod grpc;
#[cfg(test)]
mod grpc_server;
pub mod http;
pub mod kubelet;
mod manifest;
mod nested;
mod pods;
mod storage;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use arc_swap::ArcSwap;
use sampler_core::cgroup_path::Runtime;
use sampler_labels::{FILES_IN_FLIGHT, Outcome, Query, Source, TargetId};

use tokio::sync::Semaphore;

use self::answer::{Answer, TIMEOUT};
use self::cri::Cri;
use self::kubelet::Kubelet;
use super::discover::{HostPaths, is_one_name};
use super::root::Root;
use crate::error::display_chain;

/// Whom a target stands for.
#[derive(Clone)]
enum Endpoint {
    Files(Source),
    Docker(PathBuf, Runtime),
    Cri(Arc<Cri>),
    Crio(PathBuf),
    Kubelet(Arc<Kubelet>),
}

/// Everything that can be asked, and where.
pub struct LabelSources {
    pub root: Root,
    pub procfs: PathBuf,
    /// Where the cgroup hierarchies are mounted.
    pub cgroups: Vec<PathBuf>,
    pub places: ArcSwap<HostPaths>,
    /// By target.
    endpoints: RwLock<Vec<Endpoint>>,
    /// A read that hangs keeps its thread, whatever becomes of the question: so there are only so many of each source.
    reads: HashMap<Source, Arc<Semaphore>>,
}

impl LabelSources {
    pub fn new(root: Root, procfs: PathBuf, cgroups: Vec<PathBuf>) -> Self {
        let places = ArcSwap::from_pointee(HostPaths::default().with_defaults());
        let files = Source::ASKED.into_iter().filter(|s| !s.is_socket());
        let reads = files.map(|source| (source, Arc::new(Semaphore::new(FILES_IN_FLIGHT)))).collect();
        Self { root, procfs, cgroups, places, endpoints: RwLock::default(), reads }
    }

    /// `socket`: its path here. Targets are numbered as the ladder numbers them: one after the other.
    pub fn add(&self, source: Source, socket: &Path) {
        let endpoint = match source {
            Source::Docker => Endpoint::Docker(socket.to_owned(), Runtime::Docker),
            Source::Podman => Endpoint::Docker(socket.to_owned(), Runtime::Podman),
            Source::Cri => Endpoint::Cri(Arc::new(Cri::new(socket))),
            Source::Crio => Endpoint::Crio(socket.to_owned()),
            Source::Kubelet => Endpoint::Kubelet(Arc::new(Kubelet::at(socket))),
            files => Endpoint::Files(files),
        };
        self.endpoints.write().unwrap_or_else(PoisonError::into_inner).push(endpoint);
    }

    fn endpoint(&self, id: TargetId) -> Option<Endpoint> {
        self.endpoints.read().unwrap_or_else(PoisonError::into_inner).get(usize::from(id.0)).cloned()
    }
}

/// Whether a socket answers at all: no question about a container.
pub async fn probe(sources: Arc<LabelSources>, target: TargetId) -> Result<(), String> {
    let probe = async {
        match sources.endpoint(target) {
            Some(Endpoint::Docker(socket, _)) => http::answers(&socket, "/_ping").await,
            Some(Endpoint::Crio(socket)) => http::answers(&socket, "/info").await,
            Some(Endpoint::Cri(cri)) => match cri.version().await {
                Err(error) if !error.is_unimplemented() => Err(display_chain(&error)),
                _ => Ok(()),
            },
            Some(Endpoint::Kubelet(kubelet)) => kubelet.pod_resources().await.map(drop).map_err(|e| display_chain(&e)),
            Some(Endpoint::Files(_)) | None => Ok(()),
        }
    };
    let late = || Err(format!("no answer within {} s", TIMEOUT.as_secs()));
    tokio::time::timeout(TIMEOUT, probe).await.unwrap_or_else(|_| late())
}

/// Puts one question; ends within [`TIMEOUT`], whatever becomes of it.
pub async fn put(sources: Arc<LabelSources>, ask: &Query) -> Answer {
    let Some(endpoint) = sources.endpoint(ask.target) else { return Answer::error("there is no such target") };
    let id = ask.container_id().to_owned();
    if !is_one_name(&id) {
        return Answer::not_asked("it has no id that a runtime would know");
    }
    let answer = async {
        match endpoint {
            Endpoint::Docker(socket, runtime) => docker::ask(&socket, runtime, &id).await,
            Endpoint::Cri(cri) => cri.ask(&id, ask.record.identity.runtime).await,
            Endpoint::Crio(socket) => crio::ask(&socket, &id).await,
            Endpoint::Kubelet(kubelet) => kubelet.ask(ask.pod_uid.as_deref()).await,
            Endpoint::Files(source) => {
                let (sources, ask) = (Arc::clone(&sources), ask.clone());
                let permit = sources.reads.get(&source).map(|reads| Arc::clone(reads).try_acquire_owned());
                let Some(Ok(permit)) = permit else { return Answer::error("earlier reads of its files still hang") };
                let read = tokio::task::spawn_blocking(move || {
                    let _held = permit;
                    files(&sources, source, &ask, &id)
                });
                read.await.unwrap_or_else(Answer::error)
            }
        }
    };
    let late = || Answer::timeout(format!("no answer within {} s", TIMEOUT.as_secs()));
    tokio::time::timeout(TIMEOUT, answer).await.unwrap_or_else(|_| late())
}

fn files(sources: &LabelSources, source: Source, ask: &Query, id: &str) -> Answer {
    let (root, places) = (&sources.root, sources.places.load());
    let answer = match source {
        Source::Logs => return pods::logs(root, id, ask.pod_uid.as_deref()),
        Source::Mountinfo => return mountinfo(sources, ask),
        Source::Manifest => return manifest::ask(root, id, ask.record.identity.name.as_deref()),
        source => runtimes_files(source, root, &places, id),
    };
    if answer.outcome != Outcome::NotFound {
        return answer;
    }
    if let Some(theirs) = places.of_user(&ask.record.cgroup_path) {
        let answer = runtimes_files(source, root, theirs, id);
        if answer.outcome != Outcome::NotFound {
            return answer;
        }
    }
    let Some(inner) = nested::root(&sources.procfs, &sources.cgroups, &ask.record) else { return answer };
    match runtimes_files(source, &inner, &HostPaths::default().with_defaults(), id) {
        nested if matches!(nested.outcome, Outcome::Found(_)) => nested,
        nested if nested.outcome == Outcome::NotFound => answer,
        // What is wrong in there is not wrong with the host's.
        nested => Answer::not_found_because(nested.detail),
    }
}

fn mountinfo(sources: &LabelSources, ask: &Query) -> Answer {
    let (path, uid) = (&ask.record.cgroup_path, ask.record.identity.pod_uid.as_deref());
    pods::mountinfo(&sources.procfs, &sources.cgroups, path, uid)
}

fn runtimes_files(source: Source, root: &Root, places: &HostPaths, id: &str) -> Answer {
    match source {
        Source::Bundle => bundle::ask(root, places, id),
        Source::DockerFile => docker_file::ask(root, places, id),
        Source::CrioFile => storage::crio(root, places, id),
        Source::PodmanFile => storage::podman(root, places, id),
        other => Answer::error(format!("{} is no file", other.name())),
    }
}

#[cfg(test)]
pub mod tests {
    use std::fs;

    use sampler_labels::Label;

    use super::*;

    /// A host's file system.
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

        pub fn root(&self) -> Root {
            Root::new(self.0.path())
        }
    }

    /// `[sandbox ]namespace/pod/container name image`, or the outcome's name.
    pub fn check(answer: &Answer, expect: &str) {
        let told = match &answer.outcome {
            Outcome::Found(facts) => {
                let label = |l: Label| facts.labels[l as usize].clone().unwrap_or("-".into());
                let pod = [Label::Namespace, Label::Pod, Label::Container].map(label).join("/");
                let sandbox = if facts.sandbox { "sandbox " } else { "" };
                format!("{sandbox}{pod} {} {}", label(Label::Name), label(Label::Image))
            }
            _ => answer.told.name().to_owned(),
        };
        assert_eq!(told, expect, "{}", answer.detail);
    }
}
