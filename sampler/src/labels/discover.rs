//! Paths and sockets of the runtimes on this machine: from running processes, then the defaults.
//!
//! containerd's shims name its socket and run in their bundle; conmon names its bundle; dockerd and containerd have their folders on the
//! command line or in their configuration, and so have crio and kubelets, which may be part of k3s or kubelite; podman has them on the
//! command line. Any user can name a program `dockerd`, so only root's processes outside containers are trusted. Paths of another user's
//! processes apply only to containers below that user's slice, and their sockets are ignored: files have all labels.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use sampler_core::cgroup_path::parse;
use sampler_labels::Source;
use serde::Deserialize;

use super::inner_kubelet::InnerKubelet;
use super::root::Root;
use super::runtime_config::{self, KUBELET_FLAGS, MAX_TEXT_BYTES, read};
use super::source::file;
use crate::observe::kernel::proc::memberships;

/// Limit per kind of path; a machine has a handful.
const MAX_PATHS: usize = 16;
const MAX_USERS: usize = 64;

const CONTAINERD_STATES: [&str; 4] =
    ["/run/containerd", "/run/k3s/containerd", "/run/k0s/containerd", "/var/snap/microk8s/common/run/containerd"];
const STORAGES: [&str; 2] = ["/run/containers/storage", "/var/lib/containers/storage"];
const CRIO_CONFIG: &str = "/etc/crio/crio.conf";
const CRIO_CONFIG_DIR: &str = "/etc/crio/crio.conf.d";
/// The kubelet's feature gate for container metrics from the runtime.
const CRI_STATS: &str = "PodAndContainerStatsFromCRI=true";
const DOCKER_ROOT: &str = "/var/lib/docker";
pub(super) const KUBELET_ROOTS: [&str; 3] =
    ["/var/lib/kubelet", "/var/lib/k0s/kubelet", "/var/snap/microk8s/common/var/lib/kubelet"];
const POD_LOGS: &str = "/var/log/pods";
const SOCKETS: [(Source, &str); 9] = [
    (Source::Docker, "/run/docker.sock"),
    (Source::Podman, "/run/podman/podman.sock"),
    (Source::Cri, "/run/containerd/containerd.sock"),
    (Source::Cri, "/run/crio/crio.sock"),
    (Source::Cri, "/run/k3s/containerd/containerd.sock"),
    (Source::Cri, "/run/k0s/containerd.sock"),
    (Source::Cri, "/var/snap/microk8s/common/run/containerd.sock"),
    (Source::Cri, "/run/cri-dockerd.sock"),
    (Source::Crio, "/run/crio/crio.sock"),
];

/// Paths of the host, the most likely first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostPaths {
    /// Paths of other users' engines, by uid.
    pub users: BTreeMap<u32, HostPaths>,
    /// containerd's state folders: `<state>/io.containerd.runtime.v2.task/<namespace>/<id>/config.json`.
    pub containerd_states: Vec<PathBuf>,
    /// containers/storage roots of CRI-O and podman: `<storage>/<driver>-containers/<id>/userdata/config.json`.
    pub storages: Vec<PathBuf>,
    /// `<root>/containers/<id>/config.v2.json`.
    pub docker_roots: Vec<PathBuf>,
    pub kubelet_roots: Vec<PathBuf>,
    /// Kubelets of nodes in containers (kind).
    pub inner_kubelets: Vec<InnerKubelet>,
    /// Folders of pods' logs.
    pub pod_logs: Vec<PathBuf>,
    /// A kubelet takes container metrics from the runtime.
    pub cri_stats: bool,
    pub sockets: Vec<(Source, PathBuf)>,
}

/// Adds discovered paths, up to the limit. Defaults are few and are always added.
fn add<T: PartialEq>(to: &mut Vec<T>, items: impl IntoIterator<Item = T>) {
    for item in items {
        if to.len() < MAX_PATHS {
            add_default(to, item);
        }
    }
}

fn add_default<T: PartialEq>(to: &mut Vec<T>, item: T) {
    if !to.contains(&item) {
        to.push(item);
    }
}

impl HostPaths {
    /// Adds the paths of one runtime.
    pub(super) fn merge(&mut self, found: &HostPaths) {
        self.keep_from(found);
        self.cri_stats |= found.cri_stats;
        add(&mut self.inner_kubelets, found.inner_kubelets.iter().cloned());
        add(&mut self.sockets, found.sockets.iter().cloned());
        for (uid, paths) in &found.users {
            if self.users.len() < MAX_USERS || self.users.contains_key(uid) {
                self.users.entry(*uid).or_default().merge(paths);
            }
        }
    }

    /// Whether labels are at the same places: kubelets in containers have none.
    pub fn has_same_places(&self, other: &Self) -> bool {
        let without = |places: &Self| Self { inner_kubelets: Vec::new(), ..places.clone() };
        without(self) == without(other)
    }

    /// Keeps the paths of runtimes that have stopped: their files remain, and their containers may still run.
    pub fn keep_from(&mut self, old: &HostPaths) {
        add(&mut self.containerd_states, old.containerd_states.iter().cloned());
        add(&mut self.storages, old.storages.iter().cloned());
        add(&mut self.docker_roots, old.docker_roots.iter().cloned());
        add(&mut self.kubelet_roots, old.kubelet_roots.iter().cloned());
        add(&mut self.pod_logs, old.pod_logs.iter().cloned());
    }

    /// Paths of the engines of the user that owns the slice of the cgroup.
    pub fn for_user(&self, cgroup: &str) -> Option<&HostPaths> {
        let slice = |segment: &str| segment.strip_prefix("user-")?.strip_suffix(".slice")?.parse().ok();
        self.users.get(&cgroup.split('/').find_map(slice)?)
    }

    /// Adds the default paths.
    pub fn with_defaults(mut self) -> Self {
        CONTAINERD_STATES.iter().for_each(|p| add_default(&mut self.containerd_states, p.into()));
        STORAGES.iter().for_each(|p| add_default(&mut self.storages, p.into()));
        add_default(&mut self.docker_roots, DOCKER_ROOT.into());
        KUBELET_ROOTS.iter().for_each(|p| add_default(&mut self.kubelet_roots, p.into()));
        add_default(&mut self.pod_logs, POD_LOGS.into());
        SOCKETS.iter().for_each(|(source, p)| add_default(&mut self.sockets, (*source, p.into())));
        for kubelet in &self.kubelet_roots {
            add_default(&mut self.sockets, (Source::Kubelet, kubelet.join("pod-resources/kubelet.sock")));
        }
        self
    }

    /// The paths that a process has; `None` if its name is not that of a runtime.
    pub(super) fn of_process(procfs: &Path, pid: u32, root: &Root) -> Option<Self> {
        let folder = procfs.join(pid.to_string());
        // A process that ends meanwhile is skipped.
        let comm = fs::read_to_string(folder.join("comm")).ok()?;
        let names = ["containerd-shim", "conmon", "dockerd", "containerd", "crio", "kubelet", "kubelite", "k3s", "podman"];
        if !names.iter().any(|name| comm.starts_with(name)) {
            return None;
        }
        let mut found = Self::default();
        if in_a_container(&folder) {
            found.inner_kubelets.extend((comm.trim() == "kubelet").then(|| InnerKubelet::of(&folder)).flatten());
            return Some(found);
        }
        match uid(&folder) {
            Some(0) if in_host_namespaces(procfs, &folder) => found.add_from_process(&folder, comm.trim(), None, root),
            Some(uid @ 1..) => {
                let mut user_paths = Self::default();
                user_paths.add_from_process(&folder, comm.trim(), Some(uid), root);
                user_paths.sockets.clear();
                if user_paths != Self::default() {
                    found.users.insert(uid, user_paths);
                }
            }
            _ => {}
        }
        Some(found)
    }

    /// `user`: the owner of the process, other than root.
    pub(super) fn add_from_process(&mut self, folder: &Path, comm: &str, user: Option<u32>, root: &Root) {
        let Ok(line) = file::beginning(&folder.join("cmdline"), MAX_TEXT_BYTES) else { return };
        let args: Vec<String> = line.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
        let args: Vec<&str> = args.iter().map(String::as_str).filter(|w| !w.is_empty()).collect();
        let environment = Environment::of(folder);
        if let Some(uid) = user {
            self.rootless(comm, &args, uid, &environment, root);
        }
        match comm {
            comm if comm.starts_with("containerd-shim") => {
                self.shim(&args, fs::read_link(folder.join("cwd")).ok().as_deref());
            }
            comm if comm.starts_with("conmon") => self.conmon(&args),
            "dockerd" => self.dockerd(&args, root),
            "containerd" => self.containerd(&args, root),
            "crio" => self.crio(&args, &environment, root),
            "podman" => self.podman(&args),
            comm if comm.starts_with("kubelet") => self.kubelet(&args, root),
            // microk8s: the flags of the kubelet are in a file.
            "kubelite" => {
                let file = option(&args, &["--kubelet-args-file"]).unwrap_or_default();
                let flags = runtime_config::arguments(root, file, &|name| environment.get(name));
                self.kubelet(&flags.iter().map(String::as_str).collect::<Vec<_>>(), root);
            }
            comm if comm.starts_with("k3s") => self.k3s(&args, root),
            _ => {}
        }
    }

    fn shim(&mut self, args: &[&str], bundle: Option<&Path>) {
        let docker = option(args, &["-namespace"]) == Some("moby");
        let address = option(args, &["-address"]).filter(|a| a.starts_with('/') && !docker);
        add(&mut self.sockets, address.map(|address| (Source::Cri, canonical_run(address))));
        // <state>/io.containerd.runtime.v2.task/<namespace>/<id>
        let state = bundle.and_then(|b| b.ancestors().nth(3));
        let is_task = bundle
            .and_then(|b| b.ancestors().nth(2)?.file_name())
            .is_some_and(|n| n.as_encoded_bytes().starts_with(b"io.containerd.runtime"));
        add(&mut self.containerd_states, state.filter(|_| is_task).map(Path::to_owned));
    }

    /// `-b <storage>/<driver>-containers/<id>/userdata`, of CRI-O and podman alike; conmon-rs has it as `--runtime-dir`.
    fn conmon(&mut self, args: &[&str]) {
        let bundle = option(args, &["-b", "--bundle", "--runtime-dir"]).map(Path::new);
        let storage = bundle.and_then(|b| b.ancestors().nth(3)).filter(|p| p.components().count() > 1);
        add(&mut self.storages, storage.map(Path::to_owned));
        // The podman command that runs when the container ends has both of its roots.
        let mut exit_args = args.iter().skip_while(|w| **w != "--exit-command");
        while let Some(arg) = exit_args.next() {
            if *arg == "--exit-command-arg" && matches!(exit_args.next(), Some(&"--root" | &"--runroot")) {
                exit_args.next();
                add(&mut self.storages, exit_args.next().filter(|p| p.starts_with('/')).map(PathBuf::from));
            }
        }
    }

    fn podman(&mut self, args: &[&str]) {
        for name in ["--root", "--runroot"] {
            add(&mut self.storages, option(args, &[name]).map(PathBuf::from));
        }
        let path = args.iter().find_map(|w| w.strip_prefix("unix://")).filter(|p| p.starts_with('/'));
        add(&mut self.sockets, path.map(|path| (Source::Podman, canonical_run(path))));
    }

    /// Flags take precedence over the environment, and that over files.
    fn crio(&mut self, args: &[&str], environment: &Environment, root: &Root) {
        let given = |flags: &[&str], variable: &str| {
            option(args, flags).map(str::to_owned).or_else(|| environment.get(variable)).filter(|value| !value.is_empty())
        };
        let file = given(&["--config", "-c"], "CONTAINER_CONFIG").unwrap_or_else(|| CRIO_CONFIG.into());
        let folder = given(&["--config-dir", "-d"], "CONTAINER_CONFIG_DIR").unwrap_or_else(|| CRIO_CONFIG_DIR.into());
        let read = runtime_config::crio(root, &file, &folder);
        // Bundles are in both folders.
        add(&mut self.storages, given(&["--root", "-r"], "CONTAINER_ROOT").or(read.root).map(PathBuf::from));
        add(&mut self.storages, given(&["--runroot"], "CONTAINER_RUNROOT").or(read.runroot).map(PathBuf::from));
        let listen = given(&["--listen"], "CONTAINER_LISTEN").or(read.listen);
        if let Some(path) = listen.as_deref().map(|path| path.trim_start_matches("unix://")) {
            add(&mut self.sockets, [Source::Cri, Source::Crio].map(|source| (source, canonical_run(path))));
        }
    }

    /// What files say about runtimes without a process: CRI-O's containers outlive it, and so may its monitors.
    pub(super) fn from_files(root: &Root) -> Self {
        let mut found = Self::default();
        found.crio(&[], &Environment::default(), root);
        found
    }

    fn kubelet(&mut self, args: &[&str], root: &Root) {
        add(&mut self.kubelet_roots, option(args, &["--root-dir"]).map(PathBuf::from));
        let (file, folder) = (option(args, &["--config"]), option(args, &["--config-dir"]));
        let configured = || runtime_config::pod_logs_dir(root, file, folder);
        let logs = option(args, &["--pod-logs-dir"]).map(str::to_owned).or_else(configured);
        add(&mut self.pod_logs, logs.map(PathBuf::from));
        let gate = options(args, &["--feature-gates"]).any(|gates| gates.split(',').any(|gate| gate == CRI_STATS));
        self.cri_stats = gate || runtime_config::has_gate(root, file, folder, CRI_STATS);
    }

    /// The kubelet inside k3s: its flags are values of `--kubelet-arg`, or list items of the configuration.
    fn k3s(&mut self, args: &[&str], root: &Root) {
        let file = option(args, &["--config", "-c"]).unwrap_or("/etc/rancher/k3s/config.yaml");
        let mut flags = runtime_config::k3s_kubelet_flags(root, file);
        let given = options(args, &["--kubelet-arg"]).map(|flag| flag.trim_start_matches('-'));
        let is_path = |flag: &&str| flag.split_once('=').is_some_and(|(name, _)| KUBELET_FLAGS.contains(&name));
        // The command line takes precedence.
        flags.splice(0..0, given.filter(is_path).map(|flag| format!("--{flag}")));
        self.kubelet(&flags.iter().map(String::as_str).collect::<Vec<_>>(), root);
    }

    /// The default paths of an engine that a user runs. Its mount namespace has them elsewhere, so they are those of the host.
    fn rootless(&mut self, comm: &str, args: &[&str], uid: u32, environment: &Environment, root: &Root) {
        let home = || environment.get("HOME").or_else(|| home_of(root, uid));
        let data = |name: &str| {
            let data = environment.get("XDG_DATA_HOME").map(PathBuf::from);
            Some(data.or_else(|| home().map(|home| PathBuf::from(home).join(".local/share")))?.join(name))
        };
        match comm {
            "dockerd" => {
                let config = environment.get("XDG_CONFIG_HOME").map(PathBuf::from);
                let config = config.or_else(|| home().map(|home| PathBuf::from(home).join(".config")));
                if let Some(config) = config.filter(|_| option(args, &["--config-file"]).is_none()) {
                    let file = config.join("docker/daemon.json");
                    self.dockerd(&["--config-file", &file.to_string_lossy()], root);
                }
                add(&mut self.docker_roots, data("docker"));
            }
            // containerd-rootless.sh mounts this folder on /run/containerd.
            comm if comm.starts_with("containerd") => {
                let run = environment.get("XDG_RUNTIME_DIR").unwrap_or_else(|| format!("/run/user/{uid}"));
                add(&mut self.containerd_states, [Path::new(&run).join("containerd")]);
            }
            comm if comm.starts_with("conmon") || comm == "podman" => add(&mut self.storages, data("containers/storage")),
            _ => {}
        }
    }

    fn dockerd(&mut self, args: &[&str], root: &Root) {
        let file = option(args, &["--config-file"]).unwrap_or("/etc/docker/daemon.json");
        let daemon: DaemonJson = read(root, file).and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        let data_root = option(args, &["--data-root", "-g", "--graph"]).map(str::to_owned);
        let roots = data_root.into_iter().chain(daemon.data_root).chain(daemon.graph);
        add(&mut self.docker_roots, roots.map(PathBuf::from));
        let hosts = options(args, &["--host", "-H"]).map(str::to_owned).chain(daemon.hosts.into_iter().flatten());
        let hosts: BTreeSet<String> = hosts.collect();
        let paths = hosts.iter().filter_map(|host| host.strip_prefix("unix://"));
        add(&mut self.sockets, paths.map(|path| (Source::Docker, canonical_run(path))));
    }

    fn containerd(&mut self, args: &[&str], root: &Root) {
        let file = option(args, &["--config", "-c"]).unwrap_or("/etc/containerd/config.toml");
        let text = read(root, file).unwrap_or_default();
        let file: ContainerdToml = toml::from_str(&String::from_utf8_lossy(&text)).unwrap_or_default();
        let state = option(args, &["--state"]).map(str::to_owned).or(file.state);
        let address = option(args, &["--address", "-a"]).map(str::to_owned).or(file.grpc.and_then(|g| g.address));
        add(&mut self.containerd_states, state.map(PathBuf::from));
        // dockerd's own containerd serves no CRI.
        let is_dockerds = args.iter().any(|w| w.contains("/docker/containerd/"));
        let address = address.filter(|a| a.starts_with('/') && !is_dockerds);
        add(&mut self.sockets, address.map(|address| (Source::Cri, canonical_run(&address))));
    }
}

/// Replaces `/var/run` by `/run`, which is the same on every machine with systemd, so that one socket is not two endpoints.
fn canonical_run(path: &str) -> PathBuf {
    match path.strip_prefix("/var/run/") {
        Some(rest) => Path::new("/run").join(rest),
        None => PathBuf::from(path),
    }
}

#[derive(Default, Deserialize)]
struct DaemonJson {
    #[serde(rename = "data-root")]
    data_root: Option<String>,
    graph: Option<String>,
    hosts: Option<Vec<String>>,
}

#[derive(Default, Deserialize)]
struct ContainerdToml {
    state: Option<String>,
    grpc: Option<ContainerdGrpc>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ContainerdGrpc {
    address: Option<String>,
}

/// The environment of a process.
#[derive(Default)]
struct Environment(Vec<u8>);

impl Environment {
    /// Empty if it cannot be read: then the defaults apply.
    fn of(folder: &Path) -> Self {
        Self(file::beginning(&folder.join("environ"), MAX_TEXT_BYTES).unwrap_or_default())
    }

    /// A value that is set and not empty.
    fn get(&self, name: &str) -> Option<String> {
        let mut values = self.0.split(|byte| *byte == 0);
        let value = values.find_map(|value| value.strip_prefix(name.as_bytes())?.strip_prefix(b"="))?;
        Some(String::from_utf8_lossy(value).into_owned()).filter(|value| !value.is_empty())
    }
}

/// The home of a user, from the host's list.
fn home_of(root: &Root, uid: u32) -> Option<String> {
    let users = read(root, "/etc/passwd")?;
    let users = String::from_utf8_lossy(&users);
    let home = |line: &str| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.get(2)?.parse() == Ok(uid)).then(|| fields.get(5).map(|home| (*home).to_owned())).flatten()
    };
    users.lines().find_map(home).filter(|home| home.starts_with('/'))
}

/// The effective uid, from `status`: `/proc/<pid>` itself belongs to root if the process is not dumpable.
fn uid(folder: &Path) -> Option<u32> {
    let status = fs::read_to_string(folder.join("status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().nth(1)?.parse().ok()
}

/// Whether a process is in the host's namespaces: any user can be root of a user namespace. True if the host's namespaces cannot be read.
fn in_host_namespaces(procfs: &Path, folder: &Path) -> bool {
    ["ns/user", "ns/pid"].iter().all(|ns| {
        let host = fs::read_link(procfs.join("1").join(ns)).ok();
        host.is_none() || fs::read_link(folder.join(ns)).ok() == host
    })
}

/// The values of options in the forms `NAME VALUE` and `NAME=VALUE`.
fn options<'a>(args: &'a [&'a str], names: &'a [&'a str]) -> impl Iterator<Item = &'a str> {
    args.iter().enumerate().filter_map(move |(n, arg)| {
        let inline = arg.split_once('=').filter(|(name, _)| names.contains(name)).map(|(_, value)| value);
        inline.or_else(|| if names.contains(arg) { args.get(n + 1).copied() } else { None })
    })
}

pub(super) fn option<'a>(args: &'a [&'a str], names: &'a [&'a str]) -> Option<&'a str> {
    options(args, names).next()
}

/// Whether the process is in a container by any cgroup hierarchy; true if its memberships cannot be read, since it is then not trusted.
pub(super) fn in_a_container(folder: &Path) -> bool {
    let Ok(lines) = memberships(folder) else { return true };
    lines.iter().map(|(_, path)| parse(&String::from_utf8_lossy(path))).any(|identity| identity.is_in_container())
}

/// Whether an id is a single path component, which cannot lead out of the folder that it is joined to.
pub fn is_single_name(id: &str) -> bool {
    let mut parts = Path::new(id).components();
    matches!(parts.next(), Some(Component::Normal(_))) && parts.next().is_none() && !id.contains('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths_from(inspect: impl Fn(&mut HostPaths)) -> HostPaths {
        let mut places = HostPaths::default();
        inspect(&mut places);
        places
    }

    #[test]
    fn command_lines_of_runtimes_name_their_paths() {
        let shim = [
            "/usr/bin/containerd-shim-runc-v2",
            "-namespace",
            "k8s.io",
            "-id",
            "a",
            "-address",
            "/run/k3s/containerd/containerd.sock",
        ];
        let bundle = Path::new("/run/k3s/containerd/io.containerd.runtime.v2.task/k8s.io/a");
        let places = paths_from(|p| p.shim(&shim, Some(bundle)));
        assert_eq!(places.containerd_states, [Path::new("/run/k3s/containerd")]);
        assert_eq!(places.sockets, [(Source::Cri, "/run/k3s/containerd/containerd.sock".into())]);
        let moby = ["shim", "-namespace", "moby", "-address", "/var/run/docker/containerd/containerd.sock"];
        assert_eq!(paths_from(|p| p.shim(&moby, Some(Path::new("/")))), HostPaths::default());
        let conmon = [
            "conmon",
            "-c",
            "x",
            "-b",
            "/data/storage/overlay-containers/x/userdata",
            "--exit-command",
            "/usr/bin/podman",
            "--exit-command-arg",
            "--root",
            "--exit-command-arg",
            "/data/storage",
            "--exit-command-arg",
            "--runroot",
            "--exit-command-arg",
            "/data/run",
        ];
        assert_eq!(paths_from(|p| p.conmon(&conmon)).storages, [Path::new("/data/storage"), Path::new("/data/run")]);
        let dockerd = ["dockerd", "--data-root=/data/docker", "-H", "unix:///var/run/other.sock", "-H", "tcp://0.0.0.0:1"];
        let places = paths_from(|p| p.dockerd(&dockerd, &Root::new(Path::new("/no/such/root"))));
        assert_eq!(
            (places.docker_roots, places.sockets),
            (vec!["/data/docker".into()], vec![(Source::Docker, "/run/other.sock".into())])
        );
        let podman = ["podman", "--root", "/r", "system", "service", "unix:///run/p.sock"];
        assert_eq!(paths_from(|p| p.podman(&podman)).sockets, [(Source::Podman, "/run/p.sock".into())]);
    }

    #[test]
    fn configuration_files_name_paths() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("etc/containerd")).unwrap();
        fs::create_dir_all(dir.path().join("etc/docker")).unwrap();
        let toml = "version = 2\nstate = '/s'\n[grpc]\n  address = '/a.sock'\n[plugins.x]\n  y = 1\n";
        fs::write(dir.path().join("etc/containerd/config.toml"), toml).unwrap();
        fs::write(dir.path().join("etc/docker/daemon.json"), r#"{"data-root": "/d", "hosts": ["unix:///h.sock"], "x": {}}"#)
            .unwrap();
        let root = Root::new(dir.path());
        let places = paths_from(|p| p.containerd(&["containerd"], &root));
        assert_eq!((places.containerd_states, places.sockets), (vec!["/s".into()], vec![(Source::Cri, "/a.sock".into())]));
        let places = paths_from(|p| p.dockerd(&["dockerd"], &root));
        assert_eq!((places.docker_roots, places.sockets), (vec!["/d".into()], vec![(Source::Docker, "/h.sock".into())]));
    }

    #[test]
    fn crio_is_found_by_flags_before_its_environment_before_its_files() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("etc/crio/crio.conf.d")).unwrap();
        let text = "[crio]\nroot = '/file/root'\nrunroot = '/file/run'\n[crio.api]\nlisten = '/var/run/file.sock'\n";
        fs::write(dir.path().join("etc/crio/crio.conf.d/00-default.conf"), text).unwrap();
        let root = Root::new(dir.path());
        let environment = Environment(b"A=1\0CONTAINER_RUNROOT=/env/run\0CONTAINER_LISTEN=/env.sock\0CONTAINER_ROOT=\0".to_vec());
        let both = |path: &str| [Source::Cri, Source::Crio].map(|source| (source, PathBuf::from(path)));
        let places = paths_from(|p| p.crio(&["crio", "--listen=unix:///flag.sock"], &environment, &root));
        assert_eq!(places.storages, [Path::new("/file/root"), Path::new("/env/run")]);
        assert_eq!(places.sockets, both("/flag.sock"));
        let places = HostPaths::from_files(&root);
        assert_eq!(places.storages, [Path::new("/file/root"), Path::new("/file/run")]);
        assert_eq!(places.sockets, both("/run/file.sock"));
        let places = paths_from(|p| p.crio(&["crio", "-d", "/none"], &environment, &root));
        assert_eq!((places.storages, places.sockets), (vec!["/env/run".into()], both("/env.sock").to_vec()));
        let conmonrs = ["conmonrs", "--runtime", "crun", "--runtime-dir", "/c/root/overlay-containers/x/userdata"];
        assert_eq!(paths_from(|p| p.conmon(&conmonrs)).storages, [Path::new("/c/root")]);
    }

    #[test]
    fn kubelets_are_found_inside_other_programs() {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in [
            ("k3s.yaml", "kubelet-arg:\n- root-dir=/from/file\n- config=/kubelet.yaml\n"),
            ("kubelet.yaml", "podLogsDir: /logs\n"),
            ("args", "--root-dir=/snap/kubelet\n--pod-logs-dir=/snap/logs\n"),
        ] {
            fs::write(dir.path().join(path), text).unwrap();
        }
        let root = Root::new(dir.path());
        let check = |found: HostPaths, kubelet: &str, logs: Option<&str>| {
            assert_eq!(found.kubelet_roots, [Path::new(kubelet)]);
            assert_eq!(found.pod_logs, logs.map(PathBuf::from).into_iter().collect::<Vec<_>>());
        };
        let k3s = |args: &[&str]| paths_from(|p| p.k3s(args, &root));
        check(k3s(&["k3s", "server", "--config=/k3s.yaml"]), "/from/file", Some("/logs"));
        let given = ["k3s", "agent", "-c", "/k3s.yaml", "--kubelet-arg=root-dir=/given", "--kubelet-arg", "max-pods=9"];
        check(k3s(&given), "/given", Some("/logs"));
        check(paths_from(|p| p.kubelet(&["kubelet", "--root-dir", "/k"], &root)), "/k", None);
        let procfs = tempfile::tempdir().unwrap();
        let folder = procfs.path().join("7");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("cmdline"), "kubelite\0--kubelet-args-file=/args\0").unwrap();
        check(paths_from(|p| p.add_from_process(&folder, "kubelite", None, &root)), "/snap/kubelet", Some("/snap/logs"));
    }

    #[test]
    fn engines_of_users_are_in_their_homes() {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in [
            ("etc/passwd", "root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/users/ann:/bin/sh\nx\n"),
            ("users/ann/.config/docker/daemon.json", r#"{"data-root": "/data/ann"}"#),
        ] {
            fs::create_dir_all(dir.path().join(path).parent().unwrap()).unwrap();
            fs::write(dir.path().join(path), text).unwrap();
        }
        let root = Root::new(dir.path());
        let found = |comm: &str, environment: &str| {
            let environment = Environment(environment.replace(' ', "\0").into_bytes());
            paths_from(|p| p.rootless(comm, &[], 1000, &environment, &root))
        };
        assert_eq!(found("dockerd", "").docker_roots, [Path::new("/data/ann"), Path::new("/users/ann/.local/share/docker")]);
        assert_eq!(found("dockerd", "HOME=/h").docker_roots, [Path::new("/h/.local/share/docker")]);
        assert_eq!(found("dockerd", "XDG_DATA_HOME=/d XDG_CONFIG_HOME=/c").docker_roots, [Path::new("/d/docker")]);
        assert_eq!(found("containerd", "").containerd_states, [Path::new("/run/user/1000/containerd")]);
        assert_eq!(found("containerd-shim-runc-v2", "XDG_RUNTIME_DIR=/r").containerd_states, [Path::new("/r/containerd")]);
        assert_eq!(found("conmon", "").storages, [Path::new("/users/ann/.local/share/containers/storage")]);
    }

    #[test]
    fn paths_of_a_user_apply_to_that_users_slice() {
        let mut places = HostPaths::default();
        places.users.insert(1000, HostPaths { storages: vec!["/u".into()], ..HostPaths::default() });
        let storages_for = |path| places.for_user(path).map(|p| p.storages.len());
        assert_eq!(storages_for("/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-a.scope"), Some(1));
        assert_eq!((storages_for("/user.slice/user-1001.slice/x"), storages_for("/docker/a")), (None, None));
    }

    #[test]
    fn an_id_is_a_single_path_component() {
        for (id, expect) in [("a", true), ("", false), ("..", false), ("a/b", false), ("/a", false), ("a/", false), (".", false)]
        {
            assert_eq!(is_single_name(id), expect, "{id:?}");
        }
    }
}
