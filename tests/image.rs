//! The agent's image, built by the Docker Engine of the tests from bases that are imported by hand, and the agent in it.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::{Docker, Sample, Sim, free_port, get, image, parse, var, wait_for};
use serde_json::{Value, json};

const IMAGE: &str = "gpu-sampler:test";
/// The client of Debian's docker.io, which has BuildKit; others need a plugin.
const DEBIAN_CLIENT: &str = "/usr/bin/docker";
/// Much of what a privileged container has. Not all of it, because a machine that is a container itself cannot give it.
const MOST: [&str; 8] = [
    "--cap-add=SYS_ADMIN",
    "--cap-add=SYS_PTRACE",
    "--cap-add=DAC_READ_SEARCH",
    "--cap-add=NET_ADMIN",
    "--cap-add=IPC_LOCK",
    "--cap-add=SYS_NICE",
    "--security-opt=seccomp=unconfined",
    "--security-opt=apparmor=unconfined",
];
const LABELS: [&str; 5] = ["image", "name", "namespace", "pod", "container"];

fn docker(args: &[&str]) -> Result<Command> {
    let client = if Path::new(DEBIAN_CLIENT).exists() { DEBIAN_CLIENT } else { "docker" };
    let mut command = Command::new(client);
    command.arg("--host").arg(var("DOCKER_HOST")?).args(args).env("DOCKER_BUILDKIT", "1");
    Ok(command)
}

fn output(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8(image::output(command)?)?)
}

/// Whether mounts below this mount point reach its copies, which systemd sees to.
fn is_shared(mount: &str) -> Result<bool> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let of_mount = mounts.lines().find(|line| line.split(' ').nth(4) == Some(mount)).context("no such mount")?;
    Ok(of_mount.contains(" shared:"))
}

fn import(root: &Path, name: &str) -> Result<()> {
    let mut tar = Command::new("tar").arg("-C").arg(root).args(["-cf", "-", "."]).stdout(Stdio::piped()).spawn()?;
    let archive = tar.stdout.take().context("stdout is a pipe")?;
    output(docker(&["import", "-", name])?.stdin(archive))?;
    ensure!(tar.wait()?.success(), "tar failed");
    Ok(())
}

/// Builds the image: the runtime base has the libraries of the program and nothing else.
fn build() -> Result<()> {
    let (bases, program) = (tempfile::tempdir()?, var("GPU_SAMPLER_BIN")?);
    let (binary, runtime) = (bases.path().join("binary"), bases.path().join("runtime"));
    std::fs::create_dir_all(binary.join("out"))?;
    // Debug information makes it ten times as large.
    output(Command::new("strip").arg("-o").arg(binary.join("out/gpu-sampler")).arg(&program))?;
    image::libraries(Path::new(&program), &runtime)?;
    import(&binary, "gpu-sampler-binary:test")?;
    import(&runtime, "gpu-sampler-runtime:test")?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the tests are below the root")?;
    let dockerfile = root.join("deploy/image/Dockerfile").display().to_string();
    let arguments = ["--build-arg", "BINARY=gpu-sampler-binary:test", "--build-arg", "RUNTIME=gpu-sampler-runtime:test"];
    // The stages that are used take nothing from the context.
    let context = tempfile::tempdir()?;
    let context = context.path().display().to_string();
    let args = [&["build", "--file", &dockerfile, "--tag", IMAGE, "--build-arg", "REVISION=abc123"][..], &arguments, &[&context]];
    output(&mut docker(&args.concat())?)?;
    Ok(())
}

/// The capabilities of docs/security.md alone, under the engine's seccomp and AppArmor profiles. Without CAP_SYS_RESOURCE, which only
/// kernels before 5.11 need: a machine that is a container itself may not have it.
fn minimal() -> Result<Vec<&'static str>> {
    let others = ["--cap-add=SYS_PTRACE", "--cap-add=DAC_READ_SEARCH", "--cap-drop=ALL", "--security-opt=no-new-privileges"];
    let by_name = [&others[..], &["--cap-add=BPF", "--cap-add=PERFMON"]].concat();
    // Engines before 20.10.25 do not know these names.
    let probe = docker(&[&["run", "--rm", "--network=none"][..], &by_name, &[IMAGE, "--version"]].concat())?.output()?;
    if probe.status.success() {
        return Ok(by_name);
    }
    let error = String::from_utf8_lossy(&probe.stderr).into_owned();
    ensure!(error.contains("CAP_BPF") || error.contains("CAP_PERFMON"), "{error}");
    println!("the engine does not know CAP_BPF: with CAP_SYS_ADMIN instead");
    Ok([&others[..], &["--cap-add=SYS_ADMIN"]].concat())
}

/// A running container of the image; removed on drop.
struct AgentContainer {
    name: String,
    port: u16,
}

impl AgentContainer {
    /// As docs/install-docker.md describes it, with the simulated driver.
    fn start(sim: &Sim, rights: &[&str]) -> Result<Self> {
        let port = free_port()?;
        let this = Self { name: format!("gpu-sampler-test-image-{port}"), port };
        let driver = sim.dir.path().display().to_string();
        let (library, devices) = (sim.library().display().to_string(), sim.devices().display().to_string());
        let (mount, listen) = (format!("{driver}:{driver}"), format!("127.0.0.1:{port}"));
        let (directory, devices) = (format!("NVML_SIM_DIR={driver}"), format!("GPU_SAMPLER_PATH_DEVFS={devices}"));
        let endpoint = format!("GPU_SAMPLER_DOCKER_ENDPOINT={}", var("DOCKER_HOST")?);
        let root = if is_shared("/")? { "/:/host:ro,rslave" } else { "/:/host:ro" };
        let documented = [
            &["run", "--detach", "--name", &this.name, "--pid=host", "--network=host", "--cgroupns=host", "--read-only"][..],
            &["--volume", root, "--volume", "/sys/fs/cgroup:/sys/fs/cgroup:ro", "--tmpfs", "/var/lib/gpu-sampler"],
        ];
        let simulated = [
            "--volume",
            &mount,
            "--env",
            &directory,
            "--env",
            &devices,
            "--env",
            &endpoint,
            "--env",
            "GPU_SAMPLER_GPU_BUDGET_PERCENT=50",
        ];
        let command = [IMAGE, "run", "--listen", &listen, "--nvml-lib", &library];
        output(&mut docker(&[&documented.concat()[..], rights, &simulated, &command].concat())?)?;
        let ready = wait_for("the agent in the container is ready", Duration::from_secs(30), || Ok(get(port, "/readyz").ok()));
        ready.with_context(|| this.log())?;
        Ok(this)
    }

    fn log(&self) -> String {
        let logs = docker(&["logs", &self.name]).and_then(|mut logs| Ok(logs.output()?));
        logs.map_or_else(|error| error.to_string(), |logs| String::from_utf8_lossy(&logs.stderr).into_owned())
    }

    fn inspect(&self) -> Result<Value> {
        let inspected: Value = serde_json::from_str(&output(&mut docker(&["inspect", &self.name])?)?)?;
        Ok(inspected[0].clone())
    }
}

impl Drop for AgentContainer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the agent's log:\n{}", self.log());
        }
        let removed = docker(&["rm", "--force", &self.name]).and_then(|mut remove| output(&mut remove));
        if let Err(error) = removed {
            eprintln!("{}: {error:#}", self.name);
        }
    }
}

/// The neighbours are attributed, with all of their labels.
fn attributes_neighbours(agent: &AgentContainer, sim: &Sim, neighbours: &Docker, name: &str) -> Result<()> {
    let pods = [format!("{name}-0"), format!("{name}-1")];
    let mut loads = Vec::new();
    for (pod, demand) in pods.iter().zip([0.3, 0.2]) {
        let (_, pid) = neighbours.pod("prod", pod, 120)?;
        loads.push(sim.load(pid, 0, demand, &[])?);
    }
    for pod in &pods {
        let of_pod = |family: &'static str| move |s: &Sample| s.name == family && s.labels.get("pod") == Some(pod);
        let page = wait_for(&format!("{pod} has GPU time and labels"), Duration::from_secs(30), || {
            let page = parse(&get(agent.port, "/metrics")?);
            let seconds = page.iter().find(|s| of_pod("container_gpu_seconds_total")(s)).map_or(0.0, |s| s.value);
            Ok((seconds > 0.5).then_some(page))
        });
        let page = page.with_context(|| agent.log())?;
        let duty = page.iter().find(|s| of_pod("container_accelerator_duty_cycle")(s)).context("no duty cycle")?;
        for label in LABELS {
            ensure!(!duty.labels[label].is_empty(), "{pod} lacks {label}: {duty:?}");
        }
    }
    let page = parse(&get(agent.port, "/metrics?collect%5B%5D=all")?);
    let sum = |name: &str, labels: &[(&str, &str)]| gpu_sampler_tests::sum(&page, name, labels);
    ensure!(sum("gpu_sampler_kernel_mode", &[("mode", "raw_tracepoint")]) == Some(1.0), "{}", agent.log());
    ensure!(sum("gpu_unattributed_seconds_total", &[("reason", "pid_unknown")]) == Some(0.0));
    Ok(())
}

#[test]
fn the_image_has_no_shell_and_attributes_its_neighbours_with_the_needed_capabilities_alone() -> Result<()> {
    build()?;
    let built: Value = serde_json::from_str(&output(&mut docker(&["inspect", IMAGE])?)?)?;
    let config = &built[0]["Config"];
    ensure!(config["Labels"]["org.opencontainers.image.revision"] == "abc123", "{config:#}");
    ensure!(config["Healthcheck"]["Test"] == json!(["CMD", "/usr/local/bin/gpu-sampler", "health"]), "{config:#}");
    let shell = docker(&["run", "--rm", "--entrypoint", "/bin/sh", IMAGE, "-c", "true"])?.output()?;
    ensure!(!shell.status.success(), "the image has a shell");
    let version = output(&mut docker(&["run", "--rm", "--network=none", IMAGE, "--version"])?)?;
    ensure!(version.starts_with("gpu-sampler "), "{version}");

    let (sim, neighbours) = (Sim::new("[[gpus]]")?, Docker::new()?);
    let agent = AgentContainer::start(&sim, &minimal()?)?;
    attributes_neighbours(&agent, &sim, &neighbours, "minimal")?;
    ensure!(agent.inspect()?["HostConfig"]["ReadonlyRootfs"] == true);
    let healthy = docker(&[
        "exec",
        &agent.name,
        "/usr/local/bin/gpu-sampler",
        "health",
        "--ready",
        "--listen",
        &format!("127.0.0.1:{}", agent.port),
    ])?
    .output()?;
    ensure!(healthy.status.success() && healthy.stdout == b"ready\n", "{healthy:?}");
    let dead = docker(&["exec", &agent.name, "/usr/local/bin/gpu-sampler", "health", "--listen", "127.0.0.1:1"])?.output()?;
    ensure!(dead.status.code() == Some(1), "{dead:?}");
    drop(agent);
    let agent = AgentContainer::start(&sim, &MOST)?;
    attributes_neighbours(&agent, &sim, &neighbours, "privileged")
}
