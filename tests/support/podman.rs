//! A podman instance of the test's own: storage, state and the service's socket in one temporary folder, with its own cgroup manager.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use devkit::http::{Response, Server};

use crate::leftovers::{self, kill, program};
use crate::{Running, image, wait_for};

pub const IMAGE: &str = "localhost/gpu-sampler-test/sleep:1";
/// Podman's cgroup manager puts every container below this cgroup, as `libpod-<id>`, and their monitors below `conmon`.
pub const PARENT: &str = "/libpod_parent";
/// File that podman keeps about images outside its folders, independent of its options.
const CACHE: &str = "/var/lib/containers/cache/blob-info-cache-v1.boltdb";
const START: Duration = Duration::from_secs(60);

pub struct Podman {
    service: Option<Running>,
    made: RefCell<Vec<String>>,
    cache: NewFile,
    dir: tempfile::TempDir,
}

/// A file outside the temporary folder, with its parent folders; what did not exist before is removed.
struct NewFile(Vec<PathBuf>);

impl NewFile {
    fn watch(path: &str) -> Self {
        Self(Path::new(path).ancestors().take_while(|path| !path.exists()).map(PathBuf::from).collect())
    }

    fn remove(&self) {
        for path in &self.0 {
            let _other_users = std::fs::remove_file(path).or_else(|_| std::fs::remove_dir(path));
        }
    }
}

impl Podman {
    pub fn start() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        // Raising limits takes a capability that root in a virtual machine may lack.
        let config = format!(
            "[containers]\ndefault_ulimits = ['nofile=1024:1024', 'nproc=1024:1024']\n\
            [engine]\ncgroup_manager = 'cgroupfs'\nruntime = 'runc'\nevents_logger = 'file'\nlock_type = 'file'\n\
            [network]\nnetwork_config_dir = '{}'\n",
            dir.path().join("net").display()
        );
        std::fs::write(dir.path().join("containers.conf"), config)?;
        let made = RefCell::default();
        let mut podman = Self { service: None, made, cache: NewFile::watch(CACHE), dir };
        program("conmon")?;
        program("runc")?;
        podman.podman(&["load", "--input", &image::archive(podman.dir.path(), IMAGE)?.to_string_lossy()])?;
        let log = std::fs::File::create(podman.dir.path().join("log"))?;
        let mut command = podman.command(&["system", "service", "--time=0", &format!("unix://{}", podman.socket().display())])?;
        podman.service = Some(Running(command.stdout(log.try_clone()?).stderr(log).spawn()?));
        podman.wait_until_ready()?;
        Ok(podman)
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let (socket, log) = (self.socket(), self.dir.path().join("log"));
        let service = self.service.as_mut().context("the service was started")?;
        wait_for("podman's service responds", START, || {
            if let Some(status) = service.0.try_wait()? {
                bail!("podman's service ended ({status}): {}", std::fs::read_to_string(&log)?);
            }
            Ok(Server::unix(&socket).get("/_ping").and_then(Response::ok).ok())
        })?;
        Ok(())
    }

    /// Socket of the service, which serves Docker's API and its own.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("podman.sock")
    }

    /// In place of /var/lib/containers/storage: `overlay-containers/containers.json` lists every container.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// In place of /run/containers/storage.
    pub fn runroot(&self) -> PathBuf {
        self.dir.path().join("runroot")
    }

    fn command(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(program("podman")?);
        command.arg("--root").arg(self.root()).arg("--runroot").arg(self.runroot());
        command.arg("--tmpdir").arg(self.dir.path().join("tmp")).args(args).stdin(Stdio::null());
        command.env("CONTAINERS_CONF", self.dir.path().join("containers.conf")).env("PATH", leftovers::search_path());
        Ok(command)
    }

    /// Runs a podman command. Returns its standard output.
    pub fn podman(&self, args: &[&str]) -> Result<String> {
        let output = self.command(args)?.output()?;
        ensure!(output.status.success(), "podman {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Starts `sleep seconds`. Returns the container's id and the pid of its process.
    pub fn run(&self, name: &str, seconds: u32, labels: &[&str]) -> Result<(String, u32)> {
        let labels: Vec<&str> = labels.iter().flat_map(|label| ["--label", label]).collect();
        self.run_with(name, seconds, &labels)
    }

    /// As [`Podman::run`], with options of `podman run`.
    pub fn run_with(&self, name: &str, seconds: u32, options: &[&str]) -> Result<(String, u32)> {
        self.made.borrow_mut().push(name.into());
        let seconds = seconds.to_string();
        let what = ["run", "--detach", "--network=none", "--name", name];
        let id = self.podman(&[&what[..], options, &[IMAGE, "/bin/sleep", &seconds]].concat())?;
        let pid = self.podman(&["inspect", "--format", "{{.State.Pid}}", &id])?;
        Ok((id, pid.parse().ok().filter(|pid| *pid > 0).context("the container has a process")?))
    }

    /// Starts `sleep seconds` in this folder as its root, without an image. Returns the container's id.
    pub fn run_rootfs(&self, name: &str, seconds: u32, rootfs: &str) -> Result<String> {
        self.made.borrow_mut().push(name.into());
        let seconds = seconds.to_string();
        self.podman(&["run", "--detach", "--network=none", "--name", name, "--rootfs", rootfs, "/bin/sleep", &seconds])
    }

    /// Kills and removes a container.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.podman(&["rm", "--force", "--time=0", name])?;
        self.made.borrow_mut().retain(|made| made != name);
        Ok(())
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // One by one: with an unknown name the command removes none.
        for name in self.made.take() {
            if let Err(error) = self.podman(&["rm", "--force", "--time=0", &name]) {
                eprintln!("{error:#}");
            }
        }
        self.service = None;
        // A monitor starts processes when its container ends; waits for them, too.
        let ended = |program: &str| leftovers::processes(program, self.dir.path()).is_empty().then_some(());
        if let Err(error) = wait_for("podman's monitors end", START, || Ok(ended("conmon").and(ended("podman")))) {
            eprintln!("{error:#}");
            for left in ["conmon", "podman"].into_iter().flat_map(|name| leftovers::processes(name, self.dir.path())) {
                kill(left, libc::SIGKILL);
            }
        }
        leftovers::remove_cgroup(&format!("{PARENT}/conmon"));
        leftovers::unmount_below(self.dir.path());
        self.cache.remove();
    }
}
