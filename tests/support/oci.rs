//! Containers of a low-level runtime alone: bundles made by hand, run by runc or crun, with a load on a simulated GPU from their start.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::kernel::Layout;
use crate::leftovers::{program, remove_cgroup};
use crate::record::RecordedLife;
use crate::{Sim, var, wait_for};

const PATIENCE: Duration = Duration::from_secs(60);

/// One runtime on one layout of cgroups. Its containers share a parent cgroup and use the host's pid namespace.
pub struct Oci<'a> {
    sim: &'a Sim,
    layout: Layout,
    program: PathBuf,
    dir: tempfile::TempDir,
    parent: String,
}

impl<'a> Oci<'a> {
    pub fn new(runtime: &str, layout: Layout, sim: &'a Sim) -> Result<Self> {
        let parent = format!("/gpu-sampler-test-{}-{runtime}", std::process::id());
        Ok(Self { sim, layout, program: program(runtime)?, dir: tempfile::tempdir()?, parent })
    }

    /// A container's id, which is also the name of its cgroup.
    pub fn id(&self, n: usize) -> String {
        format!("{:08x}{n:056x}", std::process::id())
    }

    /// A script that loads this GPU from the first instant of the program that it execs, and ends after this time.
    pub fn work(&self, gpu: usize, lasts: &str) -> Result<String> {
        let (sim, dir) = (var("NVML_SIM_BIN")?, self.sim.dir.path().display());
        Ok(format!("exec {sim} load --pid $$ --dir {dir} --gpu {gpu} --demand 0.9 --for {lasts}"))
    }

    /// Uses the runtime's `run`, which returns when the container ends.
    pub fn run(&self, n: usize, gpu: usize, script: &str) -> Result<RecordedLife> {
        let (id, bundle) = (self.id(n), self.bundle(n, script)?);
        self.life(&id, gpu, |pid_file| self.runtime(&["run", "--pid-file", pid_file, "--bundle", &bundle, &id]))
    }

    /// Uses `create` and `start`, as containerd and CRI-O do.
    pub fn create_and_start(&self, n: usize, gpu: usize, script: &str) -> Result<RecordedLife> {
        let (id, bundle) = (self.id(n), self.bundle(n, script)?);
        let life = self.life(&id, gpu, |pid_file| {
            self.runtime(&["create", "--pid-file", pid_file, "--bundle", &bundle, &id])?;
            self.runtime(&["start", &id])?;
            let process = PathBuf::from(format!("/proc/{}/exe", read_pid(pid_file)?));
            wait_for("the container's process ends", PATIENCE, || Ok((!process.exists()).then_some(())))
        })?;
        self.runtime(&["delete", "--force", &id])?;
        Ok(life)
    }

    /// Starts a container that only waits, for [`Oci::exec`].
    pub fn wait(&self, n: usize) -> Result<String> {
        let (id, bundle) = (self.id(n), self.bundle(n, "exec sleep 300")?);
        self.runtime(&["run", "--detach", "--bundle", &bundle, &id])?;
        Ok(id)
    }

    pub fn exec(&self, id: &str, gpu: usize, script: &str) -> Result<RecordedLife> {
        self.life(id, gpu, |pid_file| self.runtime(&["exec", "--pid-file", pid_file, id, "sh", "-c", script]))
    }

    pub fn delete(&self, id: &str) -> Result<()> {
        self.runtime(&["delete", "--force", id])
    }

    fn life(&self, id: &str, gpu: usize, run: impl FnOnce(&str) -> Result<()>) -> Result<RecordedLife> {
        let file = self.dir.path().join(format!("{id}-{gpu}.pid"));
        let file = file.to_string_lossy();
        let begin_us = now_us();
        run(&file)?;
        let end_us = now_us();
        Ok(RecordedLife { pid: read_pid(&file)?, cgroup: id.to_owned(), gpu, begin_us, end_us, gone_us: end_us })
    }

    fn runtime(&self, args: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(self.dir.path().join("state")).args(args);
        self.layout.enter(&mut command);
        let log = tempfile::NamedTempFile::new()?;
        let status = command.stdin(Stdio::null()).stdout(log.reopen()?).stderr(log.reopen()?).status()?;
        let output = std::fs::read_to_string(log.path())?;
        ensure!(status.success(), "{} {args:?}: {status}: {output}", self.program.display());
        Ok(())
    }

    /// Makes a bundle with the machine's own programs as its file system, and with the simulator's folders.
    fn bundle(&self, n: usize, script: &str) -> Result<String> {
        let bundle = self.dir.path().join(format!("bundle-{n}"));
        let root = bundle.join("rootfs");
        // crun does not create this folder.
        std::fs::create_dir_all(root.join("dev"))?;
        let sim = PathBuf::from(var("NVML_SIM_BIN")?);
        let mut mounts = vec![json!({"destination": "/proc", "type": "proc", "source": "proc"})];
        let bind =
            |path: &Path, how: &str| json!({"destination": path, "type": "bind", "source": path, "options": ["rbind", how]});
        for dir in ["/usr", "/bin", "/lib", "/lib64"].map(Path::new) {
            match std::fs::read_link(dir) {
                Ok(to) => std::os::unix::fs::symlink(to, root.join(dir.strip_prefix("/")?))?,
                Err(_) if dir.is_dir() => mounts.push(bind(dir, "ro")),
                Err(_) => {}
            }
        }
        mounts.push(bind(sim.parent().context("a folder")?, "ro"));
        mounts.push(bind(self.sim.dir.path(), "rw"));
        std::fs::write(bundle.join("config.json"), self.config(n, script, &mounts).to_string())?;
        Ok(bundle.to_string_lossy().into_owned())
    }

    fn config(&self, n: usize, script: &str, mounts: &[Value]) -> Value {
        let path = std::env::var("PATH").unwrap_or_default();
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["sh", "-c", script], "env": [format!("PATH={path}")]
            },
            "root": {"path": "rootfs", "readonly": true},
            "mounts": mounts,
            "linux": {
                "cgroupsPath": format!("{}/{}", self.parent, self.id(n)),
                "namespaces": [{"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]
            }
        })
    }
}

impl Drop for Oci<'_> {
    fn drop(&mut self) {
        remove_cgroup(&self.parent);
    }
}

fn read_pid(file: &str) -> Result<u32> {
    std::fs::read_to_string(file)?.trim().parse().with_context(|| format!("{file}: a pid"))
}

fn now_us() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64)
}
