//! The demo's workloads: real processes in real Docker containers or, without an engine, in cgroups laid out as by a kubelet and
//! containerd, with the OCI bundles that containerd would write.

use crate::{
    dockerd,
    janitor::{Cleanup, Leftover, Mount, mounts},
    tools::{self, Running, on_path, output, progress, run},
};
use anyhow::{Context, Result, bail};
use devkit::{http::Server, process::start_time};
use serde_json::{Value, json};
use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

#[derive(Debug, Clone, Copy)]
pub struct Spec {
    pub namespace: &'static str,
    pub pod: &'static str,
    pub container: &'static str,
    /// Demand for one GPU, as an argument of `nvml-sim load`.
    pub demand: &'static str,
}

pub const SPECS: [Spec; 3] = [
    Spec { namespace: "default", pod: "trainer-0", container: "train", demand: "0.6" },
    Spec { namespace: "default", pod: "notebook-7", container: "jupyter", demand: "0.3" },
    Spec { namespace: "prod", pod: "inference-2", container: "server", demand: "0.1" },
];

/// Folder of the bundles that containerd's CRI plugin writes.
const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task/k8s.io";
/// Longer than any demo.
const SLEEP_SECONDS: &str = "1000000";

/// One process in one container.
pub struct Workload {
    pub name: String,
    pub pid: u32,
    /// `None` if an engine is its parent.
    process: Option<Running>,
}

impl Workload {
    /// The exit status, if it is a child of this process and has ended.
    pub fn ended(&mut self) -> Result<Option<std::process::ExitStatus>> {
        self.process.as_mut().map_or(Ok(None), Running::ended)
    }

    pub fn is_alive(&mut self) -> Result<bool> {
        Ok(match &mut self.process {
            Some(process) => process.ended()?.is_none(),
            None => start_time(self.pid).is_some(),
        })
    }
}

pub enum ContainerHost {
    Docker { socket: PathBuf, image: String },
    Cgroups { root: PathBuf },
}

impl ContainerHost {
    pub fn choose(cleanup: &mut Cleanup, tmp: &Path) -> Result<Self> {
        let socket = PathBuf::from(dockerd::SYSTEM_SOCKET);
        if dockerd::responds(&socket) {
            let image = import_image(&socket, cleanup, tmp)?;
            progress(format_args!("demo: containers of the Docker Engine behind {}", socket.display()));
            return Ok(Self::Docker { socket, image });
        }
        let root = cgroup_root(&mounts())?;
        progress(format_args!("demo: no Docker Engine responds; using cgroups as containers, below {}/kubepods", root.display()));
        Ok(Self::Cgroups { root })
    }

    pub fn start(&self, spec: &Spec, cleanup: &mut Cleanup) -> Result<Workload> {
        let name = format!("{}/{}/{}", spec.namespace, spec.pod, spec.container);
        let started = match self {
            Self::Docker { socket, image } => start_container(spec, socket, image, cleanup),
            Self::Cgroups { root } => start_in_cgroup(spec, root, sleep()?, cleanup),
        };
        let (pid, process) = started.with_context(|| format!("starting {name}"))?;
        Ok(Workload { name, pid, process })
    }
}

/// Starts the command as a container's process, without an engine.
pub fn start_command(spec: &Spec, command: Command, cleanup: &mut Cleanup) -> Result<Workload> {
    let (pid, process) = start_in_cgroup(spec, &cgroup_root(&mounts())?, command, cleanup)?;
    Ok(Workload { name: format!("{}/{}/{}", spec.namespace, spec.pod, spec.container), pid, process })
}

/// Sleeps longer than any demo runs.
pub fn sleep() -> Result<Command> {
    let mut command = Command::new(on_path("sleep").context("`sleep` is not installed")?);
    command.arg(SLEEP_SECONDS).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(command)
}

fn start_in_cgroup(spec: &Spec, root: &Path, mut command: Command, cleanup: &mut Cleanup) -> Result<(u32, Option<Running>)> {
    let (id, uid) = (random_hex(64)?, uuid()?);
    let bundle = Path::new(BUNDLES).join(&id);
    cleanup.folders(Path::new(BUNDLES))?;
    cleanup.will_remove(&Leftover::Tree(bundle.clone()))?;
    fs::create_dir(&bundle).with_context(|| bundle.display().to_string())?;
    let config = bundle_config(spec, &id, &uid, &random_hex(64)?);
    fs::write(bundle.join("config.json"), config.to_string())?;

    let pod = root.join(format!("kubepods/burstable/pod{uid}"));
    cleanup.folders(&pod)?;
    let cgroup = pod.join(&id);
    cleanup.will_remove(&Leftover::Cgroup(cgroup.clone()))?;
    fs::create_dir(&cgroup).with_context(|| cgroup.display().to_string())?;

    let process = Running::start(spec.pod, crate::sys::own_session(&mut command))?;
    fs::write(cgroup.join("cgroup.procs"), process.pid().to_string())
        .with_context(|| cgroup.join("cgroup.procs").display().to_string())?;
    Ok((process.pid(), Some(process)))
}

fn bundle_config(spec: &Spec, id: &str, uid: &str, sandbox: &str) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "annotations": {
            "io.kubernetes.cri.container-name": spec.container,
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.image-name": "docker.io/library/gpu-sampler-demo:latest",
            "io.kubernetes.cri.sandbox-id": sandbox,
            "io.kubernetes.cri.sandbox-name": spec.pod,
            "io.kubernetes.cri.sandbox-namespace": spec.namespace,
            "io.kubernetes.cri.sandbox-uid": uid,
        },
        "linux": { "cgroupsPath": format!("/kubepods/burstable/pod{uid}/{id}") },
    })
}

/// The pids hierarchy of cgroup v1, or else v2: any process may be moved there, without an effect on the process.
fn cgroup_root(mounts: &[Mount]) -> Result<PathBuf> {
    let pids = |mount: &&Mount| mount.kind == "cgroup" && mount.options.split(',').any(|option| option == "pids");
    let v2 = |mount: &&Mount| mount.kind == "cgroup2";
    let found = mounts.iter().find(pids).or_else(|| mounts.iter().find(v2));
    Ok(found.context("no cgroup hierarchy is mounted (neither v1's pids nor v2)")?.point.clone())
}

/// Imports `sleep` and its libraries as an image, since there may be no registry to pull one from.
fn import_image(socket: &Path, cleanup: &mut Cleanup, tmp: &Path) -> Result<String> {
    let rootfs = tmp.join("rootfs");
    let sleep = on_path("sleep").context("`sleep` is not installed")?;
    let libraries = output("ldd", &[sleep.to_str().context("a path that is not UTF-8")?]).unwrap_or_default();
    let mut files = vec![(sleep, rootfs.join("bin/sleep"))];
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        files.push((library.into(), rootfs.join(library.trim_start_matches('/'))));
    }
    for (from, to) in files {
        fs::create_dir_all(to.parent().unwrap_or(&rootfs))?;
        fs::copy(&from, &to).with_context(|| from.display().to_string())?;
    }
    let archive = tmp.join("image.tar");
    run(Command::new("tar").arg("-C").arg(&rootfs).arg("-cf").arg(&archive).arg("."))?;
    let (repository, tag) = ("gpu-sampler-demo", std::process::id());
    let image = format!("{repository}:{tag}");
    cleanup.will_remove(&Leftover::Image { socket: socket.into(), name: image.clone() })?;
    let path = format!("/images/create?fromSrc=-&repo={repository}&tag={tag}");
    let output = Server::unix(socket).request("POST", &path, "application/x-tar", &fs::read(&archive)?)?.ok()?;
    // The status is sent before the import is done.
    let output = String::from_utf8_lossy(&output);
    if output.contains("\"error\"") {
        bail!("Docker did not import the image: {}", output.trim());
    }
    Ok(image)
}

fn start_container(spec: &Spec, socket: &Path, image: &str, cleanup: &mut Cleanup) -> Result<(u32, Option<Running>)> {
    let name = format!("gpu-sampler-demo-{}-{}", std::process::id(), spec.pod);
    let body = json!({
        "Image": image,
        "Cmd": ["/bin/sleep", SLEEP_SECONDS],
        "Labels": {
            "io.kubernetes.pod.name": spec.pod,
            "io.kubernetes.pod.namespace": spec.namespace,
            "io.kubernetes.pod.uid": uuid()?,
            "io.kubernetes.container.name": spec.container,
            "io.kubernetes.docker.type": "container",
        },
        "HostConfig": { "NetworkMode": "none" },
    });
    let request = |method: &str, path: String, body: &str| -> Result<Vec<u8>> {
        Server::unix(socket).request(method, &path, "application/json", body.as_bytes())?.ok()
    };
    cleanup.will_remove(&Leftover::Container { socket: socket.into(), name: name.clone() })?;
    request("POST", format!("/containers/create?name={name}"), &body.to_string())?;
    request("POST", format!("/containers/{name}/start"), "")?;
    let inspected: Value = serde_json::from_slice(&request("GET", format!("/containers/{name}/json"), "")?)?;
    let pid = inspected["State"]["Pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    match pid {
        Some(pid @ 1..) => Ok((pid, None)),
        _ => bail!("the container ended at once: {}", inspected["State"]),
    }
}

fn random_hex(digits: usize) -> Result<String> {
    let mut bytes = vec![0; digits.div_ceil(2)];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let mut text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    text.truncate(digits);
    Ok(text)
}

fn uuid() -> Result<String> {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").context("a random UUID from the kernel")?;
    Ok(uuid.trim().to_owned())
}

/// Declares the workload's demand for GPU 0 to the simulator.
pub fn load(workload: &Workload, spec: &Spec, sim: &Path, dir: &Path) -> Result<Running> {
    let mut command = Command::new(sim);
    command.args(["load", "--gpu", "0", "--mem", "2GiB", "--demand", spec.demand, "--pid", &workload.pid.to_string(), "--dir"]);
    command.arg(dir).stdin(Stdio::null()).stdout(Stdio::null());
    Running::start(format!("nvml-sim load for {}", workload.name), tools::forget_cargo(&mut command))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, point: &str, options: &str) -> Mount {
        Mount { point: point.into(), kind: kind.into(), options: options.into() }
    }

    #[test]
    fn the_pids_hierarchy_is_preferred_to_v2() {
        let v2 = || mount("cgroup2", "/u", "rw");
        let root = |mounts: &[Mount]| cgroup_root(mounts).ok();
        assert_eq!(root(&[v2(), mount("cgroup", "/p", "rw,pids")]), Some("/p".into()));
        assert_eq!(root(&[mount("cgroup", "/c", "rw,cpu"), v2()]), Some("/u".into()));
        assert_eq!(root(&[mount("tmpfs", "/t", "rw")]), None);
    }

    #[test]
    fn random_ids_have_the_requested_length() {
        assert_eq!(random_hex(64).unwrap().len(), 64);
        assert_eq!(uuid().unwrap().len(), 36);
    }
}
