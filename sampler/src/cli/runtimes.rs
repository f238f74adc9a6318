//! `doctor`'s checks of container runtimes: which respond, their versions, and whether the cAdvisor of a kubelet could use them. The agent
//! itself does not depend on any version; but where cAdvisor fails, its other metrics are missing, and this check shows the reason.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sampler_labels::Source;
use serde::Deserialize;

use super::doctor::{Check, CheckStatus};
use crate::config::Config;
use crate::error::display_chain;
use crate::labels::source::checkpoint;
use crate::labels::source::claims::PreparedClaims;
use crate::labels::source::cri::Cri;
use crate::labels::source::grpc::GrpcError;
use crate::labels::source::http::{HttpClient, HttpClientError};
use crate::labels::source::kubelet::Kubelet;
use crate::labels::source::reply::SourceReply;
use crate::labels::{ActivationGuard, Discovery, LabelConfig, Presence, Root};
use crate::observe::kernel::layout::Layout;

/// A runtime that takes longer counts as hanging.
const TIMEOUT: Duration = Duration::from_secs(2);
/// The newest version of Docker's API that a kubelet's Docker client supports (cAdvisor issue 3749).
const CADVISOR_DOCKER_API: (u32, u32) = (1, 41);
/// The only socket paths that cAdvisor tries.
const CADVISOR_DOCKER: [&str; 2] = ["/var/run/docker.sock", "/run/docker.sock"];
const CADVISOR_CONTAINERD: &str = "/run/containerd/containerd.sock";
const CADVISOR_CRIO: [&str; 2] = ["/var/run/crio/crio.sock", "/run/crio/crio.sock"];

/// Docker's and podman's response to `/version`; any field may be missing.
#[derive(Default, Deserialize)]
#[serde(default)]
struct EngineVersion {
    #[serde(rename = "Version")]
    version: String,
    #[serde(rename = "ApiVersion")]
    api: String,
    #[serde(rename = "MinAPIVersion")]
    least_api: String,
}

/// CRI-O's response to `/info`.
#[derive(Default, Deserialize)]
#[serde(default)]
struct CrioInfo {
    storage_driver: String,
    storage_root: String,
}

/// The unit of the runtime at a socket, for `journalctl`.
fn unit_of(source: Source, path: &Path) -> &'static str {
    let is_in = |part: &str| path.to_string_lossy().contains(part);
    match source {
        Source::Docker => "docker",
        Source::Podman => "podman",
        Source::Kubelet => "kubelet",
        Source::Cri if is_in("cri-dockerd") => "cri-docker",
        Source::Cri if is_in("/k3s/") => "k3s, rke2-server or rke2-agent",
        Source::Cri if is_in("/k0s/") => "k0scontroller or k0sworker",
        Source::Cri if is_in("/microk8s/") => "snap.microk8s.daemon-containerd",
        Source::Cri if !is_in("crio") => "containerd",
        _ => "crio",
    }
}

fn hangs(source: Source, path: &Path) -> String {
    format!("the runtime hangs: check its log (`journalctl -u` {}) and restart it", unit_of(source, path))
}

/// The setting that leads to a socket.
fn another_runtime(source: Source, path: &Path) -> &'static str {
    match (source, unit_of(source, path)) {
        (_, "crio") => {
            "if this is not the socket of CRI-O, correct --cri-endpoint, or `listen` in CRI-O's configuration (/etc/crio/crio.conf, \
             crio.conf.d)"
        }
        (Source::Kubelet, _) => "if this is not the kubelet's socket, check its --root-dir",
        _ => "if this is the socket of another runtime, correct --docker-endpoint, --podman-endpoint or --cri-endpoint",
    }
}

/// Why a runtime cannot be queried. Until its remedy is applied, labels come from files and other sources, and the agent retries.
enum Failure {
    Http(HttpClientError),
    /// Names the endpoint.
    Grpc(GrpcError),
}

impl From<HttpClientError> for Failure {
    fn from(error: HttpClientError) -> Self {
        Self::Http(error)
    }
}

impl From<GrpcError> for Failure {
    fn from(error: GrpcError) -> Self {
        Self::Grpc(error)
    }
}

impl Failure {
    fn detail_and_remedy(self, source: Source, path: &Path) -> (String, String) {
        let endpoint = path.display();
        let another = another_runtime(source, path);
        let remedy = match &self {
            Failure::Http(HttpClientError::Connect(error)) | Failure::Grpc(GrpcError::Connect { source: error, .. }) => {
                match error.kind() {
                    io::ErrorKind::PermissionDenied => "run as root, or with access to the socket".into(),
                    io::ErrorKind::ConnectionRefused => "no process listens on this socket: start the runtime".into(),
                    _ => another.to_owned(),
                }
            }
            Failure::Grpc(GrpcError::Timeout { .. }) => hangs(source, path),
            Failure::Http(HttpClientError::Status { status: 500..=599, .. }) => {
                format!("the runtime fails: check its log (`journalctl -u` {})", unit_of(source, path))
            }
            _ => another.to_owned(),
        };
        let detail = match self {
            Failure::Http(error) => format!("{endpoint}: {}", SourceReply::from(error).detail),
            Failure::Grpc(error) => display_chain(&error),
        };
        (detail, remedy)
    }
}

pub fn checks(config: &Config, layout: &Layout) -> Vec<Check> {
    let root = &Root::new(&config.path_rootfs);
    let guard = &Arc::new(ActivationGuard::new(&config.path_procfs, root.clone()));
    let Discovery { places, sockets } = Discovery::search(&LabelConfig::new(config, layout), guard);
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        let remedy = "raise the limits on file descriptors and threads";
        return vec![Check::bad("runtimes", CheckStatus::Degraded, "cannot start the IO runtime", remedy)];
    };
    let cri_stats = places.cri_stats;
    let mut all = checkpoints(root, &places.kubelet_roots);
    if sockets.iter().all(|socket| socket.presence == Presence::Absent) {
        let detail = match config.label_sources.iter().any(|source| source.is_socket()) {
            true => "no runtime socket exists: labels come from files and cgroup paths",
            false => "label_sources has no source with a socket: labels come from files and cgroup paths",
        };
        all.push(Check::ok("runtimes", detail));
    }
    let checks = sockets.into_iter().map(|socket| async move {
        let (source, path) = (socket.source, socket.path);
        match socket.presence {
            Presence::Present(_) => return socket_checks(guard, source, &path, root, cri_stats).await,
            Presence::Dormant(dormant) => return vec![Check::ok(source.name(), format!("{}: {dormant}", path.display()))],
            Presence::Absent => {}
        }
        if !config.label_endpoints.contains(&(source, path.clone())) {
            return Vec::new();
        }
        let detail = format!("the configured endpoint {} does not exist", path.display());
        vec![Check::bad(source.name(), CheckStatus::Degraded, detail, "start the runtime, or correct the path")]
    });
    // Concurrently, so that several hanging runtimes cost one timeout.
    all.extend(runtime.block_on(futures_util::future::join_all(checks)).into_iter().flatten());
    all
}

/// The kubelet's device checkpoints, where they exist.
fn checkpoints(root: &Root, folders: &[PathBuf]) -> Vec<Check> {
    let check = |folder: &PathBuf| match checkpoint::read(&root.path(folder), checkpoint::MAX_BYTES) {
        Ok(None) => None,
        Ok(Some(found)) => Some(Check::ok(
            "kubelet",
            format!("device checkpoint with {} entries, in {}", found.assignments.len(), folder.display()),
        )),
        Err(error) => {
            let remedy = "restart the kubelet, which rewrites the file; until it can be read, assigned GPUs are not shown";
            Some(Check::bad("kubelet", CheckStatus::Degraded, display_chain(&error), remedy))
        }
    };
    folders.iter().filter_map(check).collect()
}

/// Whether the path is one of `known`, which are paths on the host.
fn is_at(root: &Root, path: &Path, known: &[&str]) -> bool {
    known.iter().any(|known| Path::new(known) == path || root.path(Path::new(known)) == path)
}

async fn socket_checks(guard: &Arc<ActivationGuard>, source: Source, path: &Path, root: &Root, cri_stats: bool) -> Vec<Check> {
    let checked = tokio::time::timeout(TIMEOUT, async {
        match source {
            Source::Docker | Source::Podman => docker(guard, source, path, root).await,
            Source::Cri => cri(guard, path, root, cri_stats).await,
            Source::Crio => crio(guard, path).await,
            _ => kubelet(guard, path).await,
        }
    });
    let (detail, remedy) = match checked.await {
        Ok(Ok(checks)) => return checks,
        Ok(Err(error)) => error.detail_and_remedy(source, path),
        Err(_) => (format!("{}: no response within {} s", path.display(), TIMEOUT.as_secs()), hangs(source, path)),
    };
    vec![Check::bad(source.name(), CheckStatus::Degraded, detail, remedy)]
}

async fn docker(guard: &Arc<ActivationGuard>, source: Source, path: &Path, root: &Root) -> Result<Vec<Check>, Failure> {
    let version: EngineVersion = HttpClient::new(guard, path).record("/version").await?;
    let or_none = |text: &str| if text.is_empty() { "(none)".to_owned() } else { text.to_owned() };
    let detail = format!(
        "version {}, API {} to {}, at {}",
        or_none(&version.version),
        or_none(&version.least_api),
        or_none(&version.api),
        path.display()
    );
    let mut checks = vec![Check::ok(source.name(), detail)];
    if source == Source::Docker {
        let problems = cadvisor_on_docker(&version, path, root).into_iter();
        checks.extend(problems.map(|(problem, remedy)| cadvisor_warning(&problem, remedy)));
    }
    Ok(checks)
}

fn cadvisor_warning(problem: &str, remedy: &str) -> Check {
    Check::bad("cAdvisor", CheckStatus::Warning, format!("the cAdvisor of a kubelet cannot use this runtime: {problem}"), remedy)
}

fn cadvisor_on_docker(version: &EngineVersion, path: &Path, root: &Root) -> Vec<(String, &'static str)> {
    let mut problems = Vec::new();
    let matches = versions_in(&version.version);
    if matches != 1 {
        let problem = format!("it expects one X.Y.Z in Docker's version, and finds {matches} in {:?}", version.version);
        problems.push((problem, "install a Docker with a version of the form X.Y.Z, or use the container labels of this agent"));
    }
    let least = version.least_api.split_once('.').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    if let Some(least) = least.filter(|least: &(u32, u32)| *least > CADVISOR_DOCKER_API) {
        let (major, minor) = CADVISOR_DOCKER_API;
        let problem =
            format!("its client supports API {major}.{minor} at most, and this engine requires {}.{}", least.0, least.1);
        problems.push((problem, "set \"min-api-version\": \"1.24\" in daemon.json, or use a newer kubelet"));
    }
    if !is_at(root, path, &CADVISOR_DOCKER) {
        let problem = format!("it connects to {}, and the engine is at {}", CADVISOR_DOCKER[0], path.display());
        problems.push((problem, "create a symlink there, or set --docker of the kubelet's cAdvisor"));
    }
    problems
}

/// The number of matches of `\d+\.\d+\.\d+` without overlap.
fn versions_in(text: &str) -> usize {
    let (mut count, mut rest) = (0, text);
    while let Some(at) = rest.find(|c: char| c.is_ascii_digit()) {
        rest = &rest[at..];
        match after_version(rest) {
            Some(after) => (count, rest) = (count + 1, after),
            // No match begins here, but one may begin after these digits.
            None => rest = rest.trim_start_matches(|c: char| c.is_ascii_digit()),
        }
    }
    count
}

fn after_version(text: &str) -> Option<&str> {
    let number = |text: &str| -> Option<usize> {
        Some(text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len()).filter(|n| *n > 0)
    };
    let mut rest = &text[number(text)?..];
    for _ in 0..2 {
        rest = rest.strip_prefix('.')?;
        rest = &rest[number(rest)?..];
    }
    Some(rest)
}

async fn cri(guard: &Arc<ActivationGuard>, path: &Path, root: &Root, cri_stats: bool) -> Result<Vec<Check>, Failure> {
    let version = match Cri::new(path, Arc::clone(guard)).version().await {
        Ok(version) => version,
        // As in containerd as Docker ships it.
        Err(error) if error.is_unimplemented() => {
            return Ok(vec![Check::ok("cri", format!("{} responds, but its CRI is disabled", path.display()))]);
        }
        Err(error) => return Err(error.into()),
    };
    let (name, number, package) = (&version.runtime_name, &version.runtime_version, version.package);
    let mut checks =
        vec![Check::ok("cri", format!("{name} {number}, API {} ({package}), at {}", version.api_version, path.display()))];
    let expected: &[&str] = match name.as_str() {
        "containerd" => &[CADVISOR_CONTAINERD],
        "cri-o" => &CADVISOR_CRIO,
        _ => &[],
    };
    if let Some(first) = expected.first().filter(|_| !is_at(root, path, expected)) {
        let (problem, remedy) = misplaced(name, first, path);
        checks.push(cadvisor_warning(&problem, remedy));
    }
    if name == "cri-o" && cri_stats {
        let detail = "the kubelet takes container metrics from CRI stats (PodAndContainerStatsFromCRI), and those of CRI-O lack \
                      namespace, pod and container (kubernetes issue 140778)";
        let remedy = "turn the feature gate off, or use the container labels of this agent";
        checks.push(Check::bad("cAdvisor", CheckStatus::Warning, detail, remedy));
    }
    Ok(checks)
}

/// A runtime that is not where cAdvisor connects to.
fn misplaced(name: &str, expected: &str, path: &Path) -> (String, &'static str) {
    let mut problem = format!("it connects to {name} at {expected} only, and this one is at {}", path.display());
    if path.to_string_lossy().contains("/k3s/") {
        problem += ": with RKE2 and k3s, all container labels of its metrics are blank (rancher/rke2 issue 11274)";
        return (problem, "ln -s /run/k3s/containerd/containerd.sock /run/containerd/containerd.sock, and restart the kubelet");
    }
    let remedy = match name {
        "cri-o" => "set `listen` of [crio.api] to that path, or create a symlink there",
        _ => "create a symlink there, or set --containerd of the kubelet, if it has that flag",
    };
    (problem, remedy)
}

async fn crio(guard: &Arc<ActivationGuard>, path: &Path) -> Result<Vec<Check>, Failure> {
    let info: CrioInfo = HttpClient::new(guard, path).record("/info").await?;
    let CrioInfo { storage_driver, storage_root } = info;
    Ok(vec![Check::ok("crio", format!("storage {storage_driver} in {storage_root}, at {}", path.display()))])
}

async fn kubelet(guard: &Arc<ActivationGuard>, path: &Path) -> Result<Vec<Check>, Failure> {
    let list = Kubelet::at(path, Arc::clone(guard)).pod_resources(&PreparedClaims::default()).await?;
    Ok(vec![Check::ok("kubelet", format!("{} containers with devices, at {}", list.len(), path.display()))])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_counted_as_cadvisor_does() {
        for (text, expect) in [
            ("20.10.24", 1),
            ("dev", 0),
            ("", 0),
            ("20.10.10sp+fluent1.7.0", 2),
            ("29.0.0-rc.1", 1),
            ("1.2", 0),
            ("20.10.24+dfsg1", 1),
            ("1..2.3.4", 1),
            ("1.2.3.4.5.6", 2),
        ] {
            assert_eq!(versions_in(text), expect, "{text:?}");
        }
    }

    #[test]
    fn the_remedy_names_the_runtime_at_the_socket() {
        for (source, path, unit) in [
            (Source::Docker, "/run/docker.sock", "docker"),
            (Source::Crio, "/moved.sock", "crio"),
            (Source::Cri, "/run/crio/crio.sock", "crio"),
            (Source::Cri, "/run/k3s/containerd/containerd.sock", "k3s, rke2-server or rke2-agent"),
            (Source::Cri, "/run/containerd/containerd.sock", "containerd"),
            (Source::Kubelet, "/var/lib/kubelet/pod-resources/kubelet.sock", "kubelet"),
        ] {
            assert!(hangs(source, Path::new(path)).contains(&format!("`journalctl -u` {unit})")), "{path}");
        }
        let refused = HttpClientError::NotFound;
        let (_, remedy) = Failure::Http(refused).detail_and_remedy(Source::Crio, Path::new("/run/crio/crio.sock"));
        assert!(remedy.contains("/etc/crio/crio.conf") && !remedy.contains("docker"), "{remedy}");
        let (problem, remedy) = misplaced("containerd", CADVISOR_CONTAINERD, Path::new("/run/k3s/containerd/containerd.sock"));
        assert!(problem.contains("rke2 issue 11274") && remedy.starts_with("ln -s /run/k3s/"), "{problem} {remedy}");
        let (problem, remedy) = misplaced("cri-o", CADVISOR_CRIO[0], Path::new("/moved.sock"));
        assert!(!problem.contains("rke2") && remedy.contains("listen"), "{problem} {remedy}");
    }

    #[test]
    fn versions_and_paths_that_cadvisor_does_not_support_are_problems() {
        let problems = |version: &str, least: &str, path: &str| {
            let version = EngineVersion { version: version.into(), api: "1.52".into(), least_api: least.into() };
            cadvisor_on_docker(&version, Path::new(path), &Root::new(Path::new("/"))).len()
        };
        assert_eq!(problems("20.10.24", "1.12", "/run/docker.sock"), 0);
        assert_eq!(problems("dev", "", "/var/run/docker.sock"), 1);
        assert_eq!(problems("29.0.0", "1.44", "/run/docker.sock"), 1);
        assert_eq!(problems("", "1.44", "/elsewhere.sock"), 3);
    }
}
