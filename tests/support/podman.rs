//! A podman of the test's own: storage, state and the service's socket in one temporary folder, cgroups made by itself.

use std::cell::RefCell;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::leftovers::{self, kill, program};
use crate::{Running, exchange, image, wait_for};

pub const IMAGE: &str = "localhost/gpu-sampler-test/sleep:1";
/// Below this podman's own cgroup manager puts every container, as `libpod-<id>`, and their monitors, in `conmon`.
pub const PARENT: &str = "/libpod_parent";
/// What podman keeps of images outside its folders, whatever it is told.
const CACHE: &str = "/var/lib/containers/cache/blob-info-cache-v1.boltdb";
const START: Duration = Duration::from_secs(60);

pub struct Podman {
    service: Option<Running>,
    made: RefCell<Vec<String>>,
    cache: NewFile,
    dir: tempfile::TempDir,
}

/// A file outside, with the folders it needs, that is removed if it was not there before.
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
        podman.answers()?;
        Ok(podman)
    }

    fn answers(&mut self) -> Result<()> {
        let (socket, log) = (self.socket(), self.dir.path().join("log"));
        let service = self.service.as_mut().context("the service was started")?;
        wait_for("podman's service answers", START, || {
            if let Some(status) = service.0.try_wait()? {
                bail!("podman's service ended ({status}): {}", std::fs::read_to_string(&log)?);
            }
            Ok(UnixStream::connect(&socket).ok().and_then(|s| exchange(s, "GET", "/_ping", "text/plain", &[]).ok()))
        })?;
        Ok(())
    }

    /// Of its service, which speaks Docker's API and its own.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("podman.sock")
    }

    /// In place of /var/lib/containers/storage: `overlay-containers/containers.json` names every container.
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

    /// What the command says.
    pub fn podman(&self, args: &[&str]) -> Result<String> {
        let output = self.command(args)?.output()?;
        ensure!(output.status.success(), "podman {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Starts `sleep seconds`; the container's id and the pid of its process.
    pub fn run(&self, name: &str, seconds: u32, labels: &[&str]) -> Result<(String, u32)> {
        self.made.borrow_mut().push(name.into());
        let labels: Vec<&str> = labels.iter().flat_map(|label| ["--label", label]).collect();
        let seconds = seconds.to_string();
        let what = ["run", "--detach", "--network=none", "--name", name];
        let id = self.podman(&[&what[..], &labels, &[IMAGE, "/bin/sleep", &seconds]].concat())?;
        let pid = self.podman(&["inspect", "--format", "{{.State.Pid}}", &id])?;
        Ok((id, pid.parse().ok().filter(|pid| *pid > 0).context("the container has a process")?))
    }

    /// Kills it first.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.podman(&["rm", "--force", "--time=0", name])?;
        self.made.borrow_mut().retain(|made| made != name);
        Ok(())
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // One by one: with a name that is unknown the command removes none.
        for name in self.made.take() {
            if let Err(error) = self.podman(&["rm", "--force", "--time=0", &name]) {
                eprintln!("{error:#}");
            }
        }
        self.service = None;
        // What a monitor starts at its container's end is over with it.
        let over = |program: &str| leftovers::processes(program, self.dir.path()).is_empty().then_some(());
        if let Err(error) = wait_for("podman's monitors end", START, || Ok(over("conmon").and(over("podman")))) {
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
