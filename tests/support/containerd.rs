//! A containerd instance of the test's own, with everything in one temporary folder; it gets the requests that a kubelet would send.
//!
//! Pods use the host's network, so no CNI is needed, and the cgroups that a kubelet with the cgroupfs driver would assign.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use prost::Message;
use serde_json::Value;

use crate::cri::{self, Client, Map};
use crate::kernel::Layout;
use crate::leftovers::{self, kill, program};
use crate::{Running, image, wait_for};

/// The image of every container that does not name another.
pub const IMAGE: &str = "localhost/gpu-sampler-test/sleep:1";
const SANDBOX_IMAGE: &str = "localhost/gpu-sampler-test/pause:1";
/// Wraps runc: containerd gives every sandbox a CPU share, which cannot be set where the cpu controller is on a v1 hierarchy.
const RUNC: &str = r#"#!/bin/sh
for word; do
    if [ "$before" = --bundle ]; then
        sed -i 's/"cpu":{"shares":[0-9]*}/"cpu":{}/' "$word/config.json"
    fi
    before=$word
done
exec runc "$@"
"#;
const START: Duration = Duration::from_secs(60);

/// The facts about a pod that a kubelet gets from the API server.
#[derive(Clone, Debug)]
pub struct PodSpec {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// `/kubepods/burstable/pod<uid>` by default.
    pub cgroup_parent: String,
    /// In place of /var/log: `pods/` and `containers/` are filled as a kubelet does.
    pub log_root: Option<PathBuf>,
    /// In place of /var/lib/kubelet: the files that every container has mounted from there.
    pub kubelet_root: Option<PathBuf>,
}

impl PodSpec {
    pub fn new(namespace: &str, name: &str, uid: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
            uid: uid.into(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            cgroup_parent: format!("/kubepods/burstable/pod{uid}"),
            log_root: None,
            kubelet_root: None,
        }
    }

    /// The labels by which a kubelet identifies its own pods.
    fn identity(&self) -> [(String, String); 3] {
        [("name", &self.name), ("namespace", &self.namespace), ("uid", &self.uid)]
            .map(|(key, value)| (format!("io.kubernetes.pod.{key}"), value.clone()))
    }

    fn log_directory(&self) -> Option<PathBuf> {
        self.log_root.as_ref().map(|root| root.join(format!("pods/{}_{}_{}", self.namespace, self.name, self.uid)))
    }

    fn sandbox(&self) -> Result<cri::PodSandboxConfig> {
        let log_directory = self.log_directory().unwrap_or_default();
        if !log_directory.as_os_str().is_empty() {
            std::fs::create_dir_all(&log_directory)?;
        }
        let namespaces = cri::NamespaceOption { network: cri::NODE, pid: cri::CONTAINER, ipc: 0 };
        let mut annotations: Map = self.annotations.clone().into_iter().collect();
        annotations.insert("kubernetes.io/config.source".into(), "api".into());
        Ok(cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: self.name.clone(),
                uid: self.uid.clone(),
                namespace: self.namespace.clone(),
                attempt: 0,
            }),
            log_directory: log_directory.to_string_lossy().into_owned(),
            labels: self.labels.clone().into_iter().chain(self.identity()).collect(),
            annotations,
            linux: Some(cri::LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup_parent.clone(),
                security_context: Some(cri::LinuxSandboxSecurityContext { namespace_options: Some(namespaces) }),
            }),
            ..Default::default()
        })
    }

    fn mounts(&self, container: &str, attempt: u32) -> Result<Vec<cri::Mount>> {
        let Some(root) = &self.kubelet_root else { return Ok(Vec::new()) };
        let pod = root.join("pods").join(&self.uid);
        let files = [
            ("/etc/hosts", pod.join("etc-hosts")),
            ("/dev/termination-log", pod.join(format!("containers/{container}/{attempt:08x}"))),
        ];
        let mount = |(inside, file): (&str, PathBuf)| {
            std::fs::create_dir_all(file.parent().unwrap_or(root))?;
            std::fs::write(&file, "")?;
            Ok(cri::Mount { container_path: inside.into(), host_path: file.to_string_lossy().into_owned() })
        };
        files.into_iter().map(mount).collect()
    }

    fn container(&self, name: &str, image: &str, attempt: u32, command: &[&str]) -> Result<cri::ContainerConfig> {
        let log_path = format!("{name}/{attempt}.log");
        if let Some(pod) = self.log_directory() {
            std::fs::create_dir_all(pod.join(name))?;
        }
        let namespaces = cri::NamespaceOption { network: cri::NODE, pid: cri::CONTAINER, ipc: 0 };
        let security = cri::LinuxContainerSecurityContext { namespace_options: Some(namespaces) };
        let label = ("io.kubernetes.container.name".to_owned(), name.to_owned());
        let restarts = ("io.kubernetes.container.restartCount".to_owned(), attempt.to_string());
        Ok(cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: name.into(), attempt }),
            image: Some(cri::ImageSpec { image: image.into() }),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            mounts: self.mounts(name, attempt)?,
            labels: self.identity().into_iter().chain([label]).collect(),
            annotations: [restarts].into(),
            log_path,
            linux: Some(cri::LinuxContainerConfig { security_context: Some(security) }),
        })
    }

    /// Makes the link that a kubelet makes after the start, its name truncated as a kubelet truncates it.
    fn link_log(&self, name: &str, attempt: u32, id: &str) -> Result<()> {
        let (Some(root), Some(pod)) = (&self.log_root, self.log_directory()) else { return Ok(()) };
        std::fs::create_dir_all(root.join("containers"))?;
        let mut link = format!("{}_{}_{name}-{id}", self.name, self.namespace);
        link.truncate(255 - ".log".len());
        Ok(std::os::unix::fs::symlink(pod.join(format!("{name}/{attempt}.log")), root.join(format!("containers/{link}.log")))?)
    }
}

pub struct Containerd {
    process: Option<Running>,
    client: Client,
    layout: Layout,
    /// By sandbox.
    pods: RefCell<BTreeMap<String, PodSpec>>,
    dir: tempfile::TempDir,
}

impl Containerd {
    pub fn start() -> Result<Self> {
        Self::start_in(Layout::Machine)
    }

    /// Starts containerd, with its state below a folder of its own.
    pub fn start_in(layout: Layout) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let at = |name: &str| dir.path().join(name).display().to_string();
        // Lowering a process's OOM score requires a capability that root in a virtual machine may lack.
        let mut config = format!(
            "version = 2\nroot = '{}'\nstate = '{}'\n[grpc]\naddress = '{}'\n\
            [plugins.'io.containerd.internal.v1.opt']\npath = '{}'\n\
            [plugins.'io.containerd.grpc.v1.cri']\nrestrict_oom_score_adj = true\nsandbox_image = '{SANDBOX_IMAGE}'\n\
            [plugins.'io.containerd.grpc.v1.cri'.cni]\nconf_dir = '{}'\nbin_dir = '{}'\n",
            at("root"),
            at("state"),
            at("containerd.sock"),
            at("opt"),
            at("cni/conf"),
            at("cni/bin")
        );
        if layout == Layout::PureV2 {
            std::fs::write(at("runc"), RUNC)?;
            std::fs::set_permissions(at("runc"), std::fs::Permissions::from_mode(0o755))?;
            let runtime = "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc";
            config.push_str(&format!("{runtime}]\nruntime_type = 'io.containerd.runc.v2'\n"));
            config.push_str(&format!("{runtime}.options]\nBinaryName = '{}'\n", at("runc")));
        }
        std::fs::write(at("config.toml"), config)?;
        let client = Client::new(&dir.path().join("containerd.sock"))?;
        let mut containerd = Self { process: None, client, layout, pods: RefCell::default(), dir };
        containerd.relaunch()?;
        for name in [IMAGE, SANDBOX_IMAGE] {
            let archive = image::archive(containerd.dir.path(), name)?;
            containerd.ctr(&["image", "import", &archive.to_string_lossy()])?;
        }
        wait_for("containerd's CRI lists the images", START, || Ok(containerd.has_image()?.then_some(())))?;
        Ok(containerd)
    }

    /// Path of its socket.
    pub fn address(&self) -> PathBuf {
        self.dir.path().join("containerd.sock")
    }

    /// In place of /run/containerd.
    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub fn pid(&self) -> Result<u32> {
        Ok(self.process.as_ref().context("containerd is stopped")?.0.id())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Runs ctr in the namespace of kubelets.
    pub fn ctr(&self, args: &[&str]) -> Result<String> {
        self.ctr_in("k8s.io", args)
    }

    pub fn ctr_in(&self, namespace: &str, args: &[&str]) -> Result<String> {
        let mut command = Command::new(program("ctr")?);
        let output = command.args(["-n", namespace, "-a"]).arg(self.address()).args(args).output()?;
        ensure!(output.status.success(), "ctr {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn has_image(&self) -> Result<bool> {
        #[derive(Clone, PartialEq, Message)]
        struct ImageStatusRequest {
            #[prost(message, optional, tag = "1")]
            image: Option<cri::ImageSpec>,
        }
        #[derive(Clone, PartialEq, Message)]
        struct Image {
            #[prost(string, tag = "1")]
            id: String,
        }
        #[derive(Clone, PartialEq, Message)]
        struct ImageStatusResponse {
            #[prost(message, optional, tag = "1")]
            image: Option<Image>,
        }
        for name in [IMAGE, SANDBOX_IMAGE] {
            let request = ImageStatusRequest { image: Some(cri::ImageSpec { image: name.into() }) };
            let known: ImageStatusResponse = self.client.call("runtime.v1.ImageService", "ImageStatus", request)?;
            if known.image.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Makes a call of the runtime service.
    pub fn call<Q: Message + 'static, A: Message + Default + 'static>(&self, method: &str, request: Q) -> Result<A> {
        self.client.call(cri::V1, method, request).with_context(|| format!("{method}; containerd's log:\n{}", self.log()))
    }

    /// Starts a pod. Returns the sandbox's id.
    pub fn run_pod(&self, spec: &PodSpec) -> Result<String> {
        // Recorded before anything is created, so that the remains of a failure are found.
        self.pods.borrow_mut().insert(format!("failed-{}", spec.uid), spec.clone());
        let request = cri::RunPodSandboxRequest { config: Some(spec.sandbox()?) };
        let made: cri::PodSandboxId = self.call("RunPodSandbox", request)?;
        self.pods.borrow_mut().insert(made.pod_sandbox_id.clone(), spec.clone());
        Ok(made.pod_sandbox_id)
    }

    fn spec(&self, sandbox: &str) -> Result<PodSpec> {
        self.pods.borrow().get(sandbox).cloned().with_context(|| format!("there is no pod {sandbox}"))
    }

    /// Creates a container that has a name and an id, but neither a process nor a cgroup yet.
    pub fn create(&self, sandbox: &str, name: &str, image: &str, attempt: u32, command: &[&str]) -> Result<String> {
        let spec = self.spec(sandbox)?;
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: sandbox.into(),
            config: Some(spec.container(name, image, attempt, command)?),
            sandbox_config: Some(spec.sandbox()?),
        };
        let made: cri::ContainerId = self.call("CreateContainer", request)?;
        Ok(made.container_id)
    }

    /// Starts a created container. Returns the pid of its first process.
    pub fn start_container(&self, sandbox: &str, name: &str, attempt: u32, id: &str) -> Result<u32> {
        let _: cri::Done = self.call("StartContainer", cri::ContainerId { container_id: id.into() })?;
        self.spec(sandbox)?.link_log(name, attempt, id)?;
        let status = self.status(id)?;
        let info: Value = serde_json::from_str(status.info.get("info").context("verbose information")?)?;
        Ok(info["pid"].as_u64().filter(|pid| *pid > 0).context("the container has a process")? as u32)
    }

    /// Creates and starts a container of [`IMAGE`]. Returns its id and pid.
    pub fn run(&self, sandbox: &str, name: &str, attempt: u32, command: &[&str]) -> Result<(String, u32)> {
        let id = self.create(sandbox, name, IMAGE, attempt, command)?;
        let pid = self.start_container(sandbox, name, attempt, &id)?;
        Ok((id, pid))
    }

    pub fn status(&self, id: &str) -> Result<cri::ContainerStatusResponse> {
        self.call("ContainerStatus", cri::StatusRequest { id: id.into(), verbose: true })
    }

    /// Kills a container; its record stays.
    pub fn stop_container(&self, id: &str) -> Result<()> {
        self.call("StopContainer", cri::ContainerId { container_id: id.into() }).map(|_: cri::Done| ())
    }

    pub fn remove_container(&self, id: &str) -> Result<()> {
        self.call("RemoveContainer", cri::ContainerId { container_id: id.into() }).map(|_: cri::Done| ())
    }

    pub fn stop_pod(&self, sandbox: &str) -> Result<()> {
        self.call("StopPodSandbox", cri::PodSandboxId { pod_sandbox_id: sandbox.into() }).map(|_: cri::Done| ())
    }

    /// Removes a pod with its containers.
    pub fn remove_pod(&self, sandbox: &str) -> Result<()> {
        self.call("RemovePodSandbox", cri::PodSandboxId { pod_sandbox_id: sandbox.into() }).map(|_: cri::Done| ())
    }

    /// Ends the daemon; containers keep running.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Starts the daemon again on its existing data.
    pub fn relaunch(&mut self) -> Result<()> {
        let log = std::fs::File::options().create(true).append(true).open(self.dir.path().join("log"))?;
        let mut command = Command::new(program("containerd")?);
        // For the shim and the OCI runtime.
        program("containerd-shim-runc-v2")?;
        program("runc")?;
        command.arg("--config").arg(self.dir.path().join("config.toml")).env("PATH", leftovers::search_path());
        self.layout.enter(&mut command);
        let process = self.process.insert(Running(command.stdout(log.try_clone()?).stderr(log).spawn()?));
        let (client, log) = (&self.client, self.dir.path().join("log"));
        wait_for("containerd responds", START, || {
            if let Some(status) = process.0.try_wait()? {
                bail!("containerd ended ({status}): {}", std::fs::read_to_string(&log)?);
            }
            Ok(client.call::<_, cri::VersionResponse>(cri::V1, "Version", cri::VersionRequest::default()).ok())
        })?;
        Ok(())
    }

    pub fn restart(&mut self) -> Result<()> {
        self.stop();
        self.relaunch()
    }

    /// Stops the daemon's process: from now on its socket accepts connections but nothing responds.
    pub fn pause(&self) -> Result<()> {
        kill(self.pid()?, libc::SIGSTOP);
        Ok(())
    }

    pub fn resume(&self) -> Result<()> {
        kill(self.pid()?, libc::SIGCONT);
        Ok(())
    }

    fn remove_pods(&mut self) -> Result<()> {
        if self.process.is_none() {
            self.relaunch()?;
        }
        self.resume()?;
        let pods: cri::ListPodSandboxResponse = self.call("ListPodSandbox", cri::ListPodSandboxRequest::default())?;
        for pod in pods.items {
            self.stop_pod(&pod.id)?;
            self.remove_pod(&pod.id)?;
        }
        Ok(())
    }

    fn remove_the_rest(&self, dir: &Path) {
        for shim in leftovers::processes("containerd-shim", dir) {
            kill(shim, libc::SIGKILL);
        }
        for spec in self.pods.borrow().values() {
            leftovers::remove_cgroup(&spec.cgroup_parent);
        }
        leftovers::unmount_below(dir);
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if !self.pods.borrow().is_empty()
            && let Err(error) = self.remove_pods()
        {
            eprintln!("{error:#}");
        }
        self.stop();
        self.remove_the_rest(self.dir.path());
    }
}
