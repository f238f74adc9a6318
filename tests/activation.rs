//! Engines behind sockets that a service manager holds: the agent never starts one, and queries it as soon as it runs.
//!
//! In two tests a process named `systemd` holds the listening socket, as systemd does. The test holds it, too, so it sees the connections
//! that would have started the engine. In the third one it is a real systemd, as a manager of a user, with units for a real dockerd.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use devkit::http::{Response, Server};
use gpu_sampler_tests::kernel::CgroupTree;
use gpu_sampler_tests::labels::{SOON, summary};
use gpu_sampler_tests::{Agent, Docker, Running, run_cli, wait_for};
use serde_json::Value;

/// Several times every interval at which the agent connects: events 0.5 s, probes 10 s.
const QUIET: Duration = Duration::from_secs(25);
const NOT_RUNNING: &str = "socket activated by systemd, engine not running: not queried";

/// A listening socket that a process named `systemd` holds.
struct SocketUnit {
    dir: tempfile::TempDir,
    listener: UnixListener,
    _manager: Running,
}

/// Lets the command inherit the descriptor, as number 3.
fn pass(command: &mut Command, descriptor: BorrowedFd<'_>) {
    let number = descriptor.as_raw_fd();
    // SAFETY: dup2 and fcntl are async-signal-safe, and the descriptor is open until the spawn that follows.
    unsafe {
        command.pre_exec(move || {
            // dup2 of a descriptor to itself would leave it to be closed on exec.
            if libc::dup2(number, 3) == 3 && libc::fcntl(3, libc::F_SETFD, 0) == 0 {
                return Ok(());
            }
            Err(std::io::Error::last_os_error())
        });
    }
}

impl SocketUnit {
    fn new(socket: &str) -> Result<Self> {
        use std::os::fd::AsFd as _;
        let dir = tempfile::tempdir()?;
        let listener = UnixListener::bind(dir.path().join(socket))?;
        listener.set_nonblocking(true)?;
        let mut manager = sleeper(dir.path(), "systemd")?;
        pass(&mut manager, listener.as_fd());
        let _manager = Running(manager.spawn()?);
        Ok(Self { dir, listener, _manager })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A program with this name that holds the socket.
    fn holder(&self, name: &str) -> Result<Running> {
        use std::os::fd::AsFd as _;
        let mut command = sleeper(self.dir.path(), name)?;
        pass(&mut command, self.listener.as_fd());
        Ok(Running(command.spawn()?))
    }

    /// Fails if there was a connection since the last call that no engine has accepted.
    fn check_untouched(&self, when: &str) -> Result<()> {
        match self.listener.accept() {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error.into()),
            Ok(_) => bail!("{when}: a connection would have started the engine"),
        }
    }
}

fn sleeper(dir: &Path, name: &str) -> Result<Command> {
    let program = dir.join(name);
    if !program.exists() {
        fs::copy("/bin/sleep", &program)?;
    }
    let mut command = Command::new(program);
    command.arg("3600").stdin(Stdio::null());
    Ok(command)
}

/// The detail of doctor's check of this source.
fn doctors_check(args: &[&str], source: &str) -> Result<(String, String)> {
    let (_, out, problem) = run_cli(&[&["doctor", "--json"], args].concat())?;
    let report: Value = serde_json::from_str(&out).map_err(|error| anyhow::anyhow!("{error}: {out} {problem}"))?;
    let check = report["checks"].as_array().into_iter().flatten().find(|check| check["name"] == source);
    let text = |field: &str| check.and_then(|check| check[field].as_str()).unwrap_or_default().to_owned();
    Ok((text("status"), text("detail")))
}

/// dockerd, started as systemd starts it: with the listening socket as descriptor 3.
fn dockerd(unit: &SocketUnit) -> Result<Running> {
    use std::os::fd::AsFd as _;
    let log = fs::File::options().create(true).append(true).open(unit.path("log"))?;
    let search = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("sh");
    let script = "LISTEN_FDS=1 LISTEN_PID=$$; export LISTEN_FDS LISTEN_PID; exec dockerd --host=fd:// \"$@\"";
    command.args(["-c", script, "dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none"]);
    for (option, name) in [("data-root", "data"), ("exec-root", "exec"), ("pidfile", "pid")] {
        command.arg(format!("--{option}={}", unit.path(name).display()));
    }
    command.env("PATH", format!("{search}:/usr/local/sbin:/usr/sbin:/sbin")).stdin(Stdio::null());
    command.stdout(log.try_clone()?).stderr(log);
    pass(&mut command, unit.listener.as_fd());
    Ok(Running(command.spawn()?))
}

fn wait_for_docker(unit: &SocketUnit, engine: &mut Running) -> Result<()> {
    wait_for("dockerd responds on its inherited socket", Duration::from_secs(60), || {
        if let Some(status) = engine.0.try_wait()? {
            bail!("dockerd ended ({status}): {}", fs::read_to_string(unit.path("log"))?);
        }
        Ok(Server::unix(&unit.path("docker.sock")).get("/_ping").and_then(Response::ok).ok())
    })?;
    Ok(())
}

#[test]
fn an_engine_behind_an_activated_socket_stays_stopped_and_is_queried_when_it_runs() -> Result<()> {
    let unit = SocketUnit::new("docker.sock")?;
    let endpoint = format!("unix://{}", unit.path("docker.sock").display());
    let args = ["--docker-endpoint", &*endpoint, "--label-sources", "docker"];
    let agent = Agent::start(None, &args)?;
    // A container that only the engine could name, so that the agent has a reason to query it.
    let tree = CgroupTree::new("activation")?;
    let unlabelled = "d".repeat(64);
    tree.make(&format!("docker/{unlabelled}"))?;
    std::thread::sleep(QUIET);
    unit.check_untouched("at the agent's start")?;
    let explained = wait_for("the container is known", SOON, || agent.container(&unlabelled))?;
    ensure!(explained.to_string().contains(NOT_RUNNING), "{explained:#}");
    let (status, detail) = doctors_check(&args, "docker")?;
    ensure!((&*status, detail.ends_with(NOT_RUNNING)) == ("ok", true), "{status}: {detail}");
    let (_, out, _) = run_cli(&[&["explain", "--container", &unlabelled, "--no-agent"], &args[..]].concat())?;
    unit.check_untouched(&format!("by a command: {out}"))?;

    for round in 0..2 {
        let mut engine = dockerd(&unit)?;
        wait_for_docker(&unit, &mut engine)?;
        let docker = Docker::at(unit.path("docker.sock"))?;
        let name = format!("activated-{round}");
        let (id, _) = docker.run(&name, &serde_json::json!({}), "300")?;
        let (explained, took) = agent.complete(&id, SOON)?;
        ensure!(summary(&explained).contains(&name), "{explained:#}");
        println!("labels from the engine in round {round} after {took:?}");
        let (status, detail) = doctors_check(&args, "docker")?;
        ensure!((&*status, detail.starts_with("version ")) == ("ok", true), "{status}: {detail}");
        // dockerd ends long after it has closed the socket, since `sleep` as pid 1 ignores SIGTERM. What it leaves is in its own folder,
        // and its removal would be a connection.
        std::mem::forget(docker);
        let status = engine.ends_with(libc::SIGTERM)?;
        ensure!(status.success(), "dockerd ended with {status}");
        std::thread::sleep(QUIET);
        unit.check_untouched(&format!("after the engine's end in round {round}"))?;
        let (_, detail) = doctors_check(&args, "docker")?;
        ensure!(detail.ends_with(NOT_RUNNING), "{detail}");
    }
    Ok(())
}

#[test]
fn an_activated_podman_is_not_queried_even_while_it_runs() -> Result<()> {
    let unit = SocketUnit::new("podman.sock")?;
    let endpoint = format!("unix://{}", unit.path("podman.sock").display());
    let args = ["--podman-endpoint", &*endpoint, "--label-sources", "podman"];
    let _agent = Agent::start(None, &args)?;
    std::thread::sleep(QUIET);
    unit.check_untouched("while podman does not run")?;
    let _service = unit.holder("podman")?;
    std::thread::sleep(QUIET);
    unit.check_untouched("while podman's service runs")?;
    let (status, detail) = doctors_check(&args, "podman")?;
    ensure!((&*status, detail.contains("engine ends when idle: not queried")) == ("ok", true), "{status}: {detail}");
    unit.check_untouched("by doctor")
}

/// A systemd that runs as the manager of a user, in cgroups and a mount namespace of its own.
struct UserManager {
    dir: tempfile::TempDir,
    process: Running,
    _cgroups: Vec<CgroupTree>,
}

/// systemd starts only where it finds that the machine was booted with it.
const START_MANAGER: &str = "
set -e
run=$1; shift
for cgroup; do echo $$ > $cgroup/cgroup.procs; done
mkdir -p /run/systemd && mount -t tmpfs none /run/systemd && mkdir /run/systemd/system
exec env -i PATH=$PATH HOME=$run XDG_RUNTIME_DIR=$run XDG_CONFIG_HOME=$run/config SYSTEMD_UNIT_PATH=$run/units \
    /lib/systemd/systemd --user --log-target=console
";

impl UserManager {
    fn start(units: &[(&str, String)], dir: tempfile::TempDir) -> Result<Self> {
        fs::create_dir(dir.path().join("units"))?;
        for (name, text) in units {
            fs::write(dir.path().join("units").join(name), text)?;
        }
        let mut trees = vec![CgroupTree::new("manager")?];
        // Where v1 is mounted, too.
        trees.extend(CgroupTree::with_controller("name=systemd", "manager").ok());
        let cgroups = trees.iter().map(|tree| tree.make("user")).collect::<Result<Vec<_>>>()?;
        let log = fs::File::create(dir.path().join("manager.log"))?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", START_MANAGER, "sh"]).arg(dir.path()).args(&cgroups);
        let search = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{search}:/usr/local/sbin:/usr/sbin:/sbin")).stdin(Stdio::null());
        let process = Running(command.stdout(log.try_clone()?).stderr(log).spawn()?);
        let mut manager = Self { dir, process, _cgroups: trees };
        wait_for("systemd has started", SOON, || {
            if let Some(status) = manager.process.0.try_wait()? {
                bail!("systemd ended ({status}): {}", fs::read_to_string(manager.dir.path().join("manager.log"))?);
            }
            Ok(manager.systemctl(&["is-active", "docker.socket"]).ok())
        })?;
        Ok(manager)
    }

    fn systemctl(&self, args: &[&str]) -> Result<String> {
        let output = Command::new("systemctl").arg("--user").args(args).env("XDG_RUNTIME_DIR", self.dir.path()).output()?;
        let (out, problem) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "systemctl {args:?}: {out} {problem}");
        Ok(out.trim().to_owned())
    }

    /// Fails if the engine was started since it was stopped: each start has an id of its own.
    fn check_stopped(&self, invocation: &str, when: &str) -> Result<()> {
        let state = self.systemctl(&["show", "--property=ActiveState,InvocationID", "docker.service"])?;
        for expected in ["ActiveState=inactive", &format!("InvocationID={invocation}")] {
            ensure!(state.lines().any(|line| line == expected), "{when}: {state}, not {expected}");
        }
        Ok(())
    }

    fn invocation(&self) -> Result<String> {
        self.systemctl(&["show", "--property=InvocationID", "--value", "docker.service"])
    }
}

impl Drop for UserManager {
    fn drop(&mut self) {
        if let Err(error) = self.systemctl(&["stop", "docker.socket", "docker.service"]) {
            eprintln!("{error:#}");
        }
        // Without further units it does not end by itself.
        if let Err(error) = self.process.ends_with(libc::SIGKILL) {
            eprintln!("{error}");
        }
    }
}

#[test]
fn an_engine_that_is_stopped_with_its_socket_unit_active_stays_stopped() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name).display().to_string();
    let socket = path("docker.sock");
    let folders = [("data-root", "data"), ("exec-root", "exec"), ("pidfile", "pid")];
    let folders: String = folders.iter().map(|(option, name)| format!(" --{option}={}", path(name))).collect();
    let units = [
        ("docker.socket", format!("[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream={socket}\n")),
        (
            "docker.service",
            format!(
                "[Unit]\nDefaultDependencies=no\nRequires=docker.socket\n[Service]\nType=notify\nKillMode=process\nDelegate=yes\n\
                 ExecStart=dockerd -H fd:// --iptables=false --ip6tables=false --bridge=none{folders}\n"
            ),
        ),
        ("default.target", "[Unit]\nDefaultDependencies=no\nRequires=docker.socket\n".to_owned()),
    ];
    let manager = UserManager::start(&units, dir)?;
    let endpoint = format!("unix://{socket}");
    let args = ["--docker-endpoint", &*endpoint, "--label-sources", "docker"];
    let agent = Agent::start(None, &args)?;
    let tree = CgroupTree::new("real")?;
    tree.make(&format!("docker/{}", "e".repeat(64)))?;
    std::thread::sleep(QUIET);
    manager.check_stopped("", "before its first start")?;
    for round in 0..2 {
        manager.systemctl(&["start", "docker.service"])?;
        let docker = Docker::at(PathBuf::from(&socket))?;
        let name = format!("managed-{round}");
        let (id, _) = docker.run(&name, &serde_json::json!({}), "300")?;
        let (explained, took) = agent.complete(&id, SOON)?;
        ensure!(summary(&explained).contains(&name), "{explained:#}");
        println!("labels from the engine in round {round} after {took:?}");
        // Its container and image end with its folders, since their removal would be a connection.
        std::mem::forget(docker);
        let invocation = manager.invocation()?;
        manager.systemctl(&["stop", "docker.service"])?;
        std::thread::sleep(QUIET);
        manager.check_stopped(&invocation, &format!("after its end in round {round}"))?;
        // systemd gives its sockets other descriptors.
        manager.systemctl(&["daemon-reload"])?;
        manager.systemctl(&["daemon-reexec"])?;
        std::thread::sleep(QUIET);
        manager.check_stopped(&invocation, "after a reload of systemd")?;
        let (_, detail) = doctors_check(&args, "docker")?;
        ensure!(detail.ends_with(NOT_RUNNING), "{detail}");
        manager.check_stopped(&invocation, "after doctor")?;
    }
    Ok(())
}
