//! A Docker Engine and the containers that a test creates in it, labelled as a kubelet labels them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use devkit::http::{Response, Server};
use serde_json::{Value, json};

use crate::kernel::Layout;
use crate::{Running, var};

/// The engine behind DOCKER_HOST, and the containers that a test created in it.
pub struct Docker {
    socket: PathBuf,
    image: String,
    made: std::cell::RefCell<Vec<String>>,
}

impl Docker {
    /// Imports an image with nothing but `sleep`, since there may be no registry to pull one from.
    pub fn new() -> Result<Self> {
        let host = var("DOCKER_HOST")?;
        Self::at(PathBuf::from(host.strip_prefix("unix://").context("DOCKER_HOST must be a Unix socket")?))
    }

    /// The engine at this socket.
    pub fn at(socket: PathBuf) -> Result<Self> {
        let root = tempfile::tempdir()?;
        crate::image::root(root.path())?;
        let tar = Command::new("tar").arg("-C").arg(root.path()).args(["-cf", "-", "."]).output()?;
        let image = "gpu-sampler-test:1".to_owned();
        let docker = Self { socket, image, made: Vec::new().into() };
        docker.request("POST", "/images/create?fromSrc=-&repo=gpu-sampler-test&tag=1", "application/x-tar", &tar.stdout)?;
        Ok(docker)
    }

    fn request(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> Result<Vec<u8>> {
        Server::unix(&self.socket).patience(Duration::from_secs(60)).request(method, path, kind, body)?.ok()
    }

    /// Starts `sleep seconds` as a pod's container. Returns its id and the pid of its process.
    pub fn pod(&self, namespace: &str, pod: &str, seconds: u32) -> Result<(String, u32)> {
        let labels = json!({
            "io.kubernetes.pod.namespace": namespace, "io.kubernetes.pod.name": pod, "io.kubernetes.container.name": "main",
            "io.kubernetes.pod.uid": "8bb25662-de9a-11e9-84e7-f8f21e04010c", "io.kubernetes.docker.type": "container",
        });
        self.run(pod, &labels, &seconds.to_string())
    }

    /// Starts `sleep duration` with these labels. Returns its id and the pid of its process. Its name ends with `name`.
    pub fn run(&self, name: &str, labels: &Value, duration: &str) -> Result<(String, u32)> {
        let body = json!({"Image": self.image, "Cmd": ["/bin/sleep", duration], "Labels": labels,
            "HostConfig": {"NetworkMode": "none"}});
        self.start(name, &body)
    }

    /// Starts `sleep 300` with this device node of the host at `/dev/<as_node>`. Returns its id.
    pub fn with_device(&self, name: &str, node: &str, as_node: &str) -> Result<String> {
        let device = json!({"PathOnHost": node, "PathInContainer": format!("/dev/{as_node}"), "CgroupPermissions": "rwm"});
        let body = json!({"Image": self.image, "Cmd": ["/bin/sleep", "300"],
            "HostConfig": {"NetworkMode": "none", "Devices": [device]}});
        Ok(self.start(name, &body)?.0)
    }

    fn start(&self, name: &str, body: &Value) -> Result<(String, u32)> {
        let name = format!("gpu-sampler-test-{}-{name}", std::process::id());
        self.made.borrow_mut().push(name.clone());
        let json = "application/json";
        self.request("POST", &format!("/containers/create?name={name}"), json, body.to_string().as_bytes())?;
        self.request("POST", &format!("/containers/{name}/start"), json, &[])?;
        let inspected: Value = serde_json::from_slice(&self.request("GET", &format!("/containers/{name}/json"), json, &[])?)?;
        let pid = inspected["State"]["Pid"].as_u64().filter(|pid| *pid > 0).context("the container has a process")?;
        Ok((inspected["Id"].as_str().unwrap_or_default().to_owned(), pid as u32))
    }

    /// Runs a program of the host as an agent in a container would run: with the capabilities that it needs, the host's pids, network and
    /// cgroups, and the host's file system at /host. Not with all capabilities, since some machines cannot grant all.
    pub fn agent(&self, name: &str, program: &Path, args: &[&str]) -> Result<(String, u32)> {
        let program = format!("/host{}", program.display());
        // The program's libraries are the host's.
        let binds = ["/:/host", "/lib:/lib:ro", "/lib64:/lib64:ro", "/usr/lib:/usr/lib:ro", "/sys/fs/cgroup:/sys/fs/cgroup:ro"];
        let binds: Vec<&str> =
            binds.into_iter().filter(|b| Path::new(b.split(':').next().unwrap_or_default()).exists()).collect();
        let command: Vec<&str> = [program.as_str()].into_iter().chain(args.iter().copied()).collect();
        let body = json!({"Image": self.image, "Cmd": command,
            "HostConfig": {"NetworkMode": "host", "PidMode": "host", "CgroupnsMode": "host", "Binds": binds,
                "CapAdd": ["SYS_ADMIN", "SYS_PTRACE", "DAC_READ_SEARCH"], "SecurityOpt": ["seccomp=unconfined", "apparmor=unconfined"]}});
        self.start(name, &body)
    }

    /// Renames a container; its new name ends with `name`.
    pub fn rename(&self, container: &str, name: &str) -> Result<()> {
        let name = format!("gpu-sampler-test-{}-{name}", std::process::id());
        self.made.borrow_mut().push(name.clone());
        self.request("POST", &format!("/containers/{container}/rename?name={name}"), "text/plain", &[]).map(drop)
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn image(&self) -> &str {
        &self.image
    }

    /// `docker exec` of `sleep seconds`. Returns the pid of its process.
    pub fn exec(&self, container: &str, seconds: u32) -> Result<u32> {
        let json = "application/json";
        let body = json!({"Cmd": ["/bin/sleep", seconds.to_string()]}).to_string();
        let made: Value =
            serde_json::from_slice(&self.request("POST", &format!("/containers/{container}/exec"), json, body.as_bytes())?)?;
        let id = made["Id"].as_str().context("the exec's id")?;
        self.request("POST", &format!("/exec/{id}/start"), json, br#"{"Detach": true}"#)?;
        let exec: Value = serde_json::from_slice(&self.request("GET", &format!("/exec/{id}/json"), json, &[])?)?;
        Ok(exec["Pid"].as_u64().filter(|pid| *pid > 0).context("the exec has a process")? as u32)
    }
}

/// An engine that sees this layout of cgroups: the shared one, or a second one in a mount namespace.
pub struct Engine {
    pub docker: Docker,
    // Dropped in this order: the containers, the engine, its folder and cgroup.
    own: Option<Own>,
}

struct Own {
    process: Option<Running>,
    layout: Layout,
    dir: tempfile::TempDir,
    _common: CommonCgroup,
}

/// The engine leaves the common parent cgroup of its containers.
struct CommonCgroup(PathBuf);

impl Drop for CommonCgroup {
    fn drop(&mut self) {
        // Fails if another cgroup is in it.
        let _left = std::fs::remove_dir(&self.0);
    }
}

impl Engine {
    pub fn start(layout: Layout) -> Result<Self> {
        if layout == Layout::Machine {
            return Ok(Self { docker: Docker::new()?, own: None });
        }
        let common = CommonCgroup(crate::kernel::cgroup2()?.join("docker"));
        let mut own = Own { process: None, layout, dir: tempfile::tempdir()?, _common: common };
        let socket = own.dir.path().join("socket");
        own.relaunch(&socket)?;
        Ok(Self { docker: Docker::at(socket)?, own: Some(own) })
    }

    fn own(&mut self) -> Result<&mut Own> {
        self.own.as_mut().context("only an engine that the test started can be stopped")
    }

    /// Ends the engine; its containers keep running.
    pub fn stop(&mut self) -> Result<()> {
        self.own()?.process = None;
        Ok(())
    }

    /// Starts it again on its existing data.
    pub fn relaunch(&mut self) -> Result<()> {
        let socket = self.docker.socket.clone();
        self.own()?.relaunch(&socket)
    }

    /// Stops it, and starts it again with its socket at another path.
    pub fn move_socket(&mut self) -> Result<()> {
        self.stop()?;
        self.docker.socket.set_extension("moved");
        self.relaunch()
    }
}

impl Own {
    fn relaunch(&mut self, socket: &Path) -> Result<()> {
        let path = |name: &str| self.dir.path().join(name);
        let log = std::fs::File::options().create(true).append(true).open(path("log"))?;
        let mut command = Command::new("dockerd");
        command.args(["--iptables=false", "--ip6tables=false", "--bridge=none", "--live-restore"]);
        command.arg(format!("--host=unix://{}", socket.display()));
        for (option, name) in [("data-root=", "data"), ("exec-root=", "exec"), ("pidfile=", "pid")] {
            command.arg(format!("--{option}{}", path(name).display()));
        }
        let search = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{search}:/usr/local/sbin:/usr/sbin:/sbin"));
        self.layout.enter(&mut command);
        let process = self.process.insert(Running(command.stdout(log.try_clone()?).stderr(log).spawn()?));
        let log = self.dir.path().join("log");
        crate::wait_for("the second Docker Engine responds", Duration::from_secs(60), || {
            if let Some(status) = process.0.try_wait()? {
                bail!("dockerd ended ({status}): {}", std::fs::read_to_string(&log)?);
            }
            Ok(Server::unix(socket).get("/_ping").and_then(Response::ok).ok())
        })?;
        Ok(())
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        for name in self.made.take() {
            if let Err(error) = self.request("DELETE", &format!("/containers/{name}?force=1"), "text/plain", &[]) {
                eprintln!("{error:#}");
            }
        }
        if let Err(error) = self.request("DELETE", &format!("/images/{}?force=1", self.image), "text/plain", &[]) {
            eprintln!("{error:#}");
        }
    }
}
