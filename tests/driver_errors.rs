//! A driver that cannot be used, or only in part: where its library is, what the error means, and the remedy. The simulated driver needs
//! device nodes and /proc/driver/nvidia as the real one does; the tests take them away.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::{Agent, Sim, kernel::Layout, sum, var, wait_for};
use serde_json::Value;

const WORLD: &str = "kernel_files = true\n[[gpus]]\n[[gpus]]";
/// No label sources and no kernel events: these tests are about the driver.
const ARGS: [&str; 4] = ["--kernel-mode", "procfs", "--docker-endpoint", "unix:///run/gpu-sampler-tests-none.sock"];

struct Machine {
    sim: Sim,
}

impl Machine {
    fn new() -> Result<Self> {
        Ok(Self { sim: Sim::new(WORLD)? })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.sim.dir.path().join(name)
    }

    fn with_paths<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("NVML_SIM_DIR", self.sim.dir.path());
        command.arg("--path-procfs").arg(self.path("proc")).arg("--path-devfs").arg(self.path("dev"))
    }

    /// Status, detail and remedy of the driver in `doctor`.
    fn doctor(&self) -> Result<(String, String, String)> {
        let mut command = Command::new(var("GPU_SAMPLER_BIN")?);
        command.args(["doctor", "--json", "--nvml-lib"]).arg(self.sim.library());
        self.with_paths(&mut command);
        driver_check(command)
    }

    /// An agent that waits for a driver which cannot be used.
    fn agent(&self) -> Result<Agent> {
        let mut command = Agent::command(None)?;
        self.with_paths(&mut command).env("LD_LIBRARY_PATH", self.path("lib"));
        Agent::start_as(Layout::Machine, command, &ARGS)
    }
}

fn driver_check(mut command: Command) -> Result<(String, String, String)> {
    let output = command.output()?;
    let report: Value =
        serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let checks = report["checks"].as_array().context("checks")?;
    let check = checks.iter().find(|check| check["name"] == "NVIDIA driver").with_context(|| format!("{report:#}"))?;
    let text = |key: &str| check[key].as_str().unwrap_or_default().to_owned();
    Ok((text("status"), text("detail"), text("remedy")))
}

/// A file that opens with EPERM also for root, as under a device cgroup; writable again when dropped.
struct Immutable(PathBuf);

impl Immutable {
    fn new(path: PathBuf) -> Result<Self> {
        let status = Command::new("chattr").arg("+i").arg(&path).status().context("chattr")?;
        ensure!(status.success(), "the file system of {} has no immutable files", path.display());
        Ok(Self(path))
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        // Otherwise the folder cannot be removed.
        let _restored = Command::new("chattr").arg("-i").arg(&self.0).status();
    }
}

fn assert_advice(machine: &Machine, case: &str, expect: [&str; 3]) -> Result<()> {
    let (status, detail, remedy) = machine.doctor()?;
    println!("{case}: {status}: {detail} -> {remedy}");
    let [expected_status, problem, advice] = expect;
    ensure!(status == expected_status, "{case}: {status}: {detail}");
    ensure!(detail.contains(problem), "{case}: {detail:?} lacks {problem:?}");
    ensure!(remedy.contains(advice), "{case}: {remedy:?} lacks {advice:?}");
    Ok(())
}

#[test]
fn doctor_gives_the_remedy_of_each_init_error() -> Result<()> {
    let machine = Machine::new()?;
    assert_advice(&machine, "intact", ["ok", "2 GPUs, library ", ""])?;
    ensure!(machine.doctor()?.1.contains("lib/libnvidia-ml.so.1"), "the file is not named");
    {
        let _refused = Immutable::new(machine.path("dev/nvidiactl"))?;
        assert_advice(&machine, "lost after daemon-reload", ["failed", "the device cgroup refuses", "restart the container"])?;
    }
    machine.sim.inject("fault", &["--kind", "error", "--call", "nvmlInit_v2", "--error", "UNKNOWN"])?;
    assert_advice(&machine, "unknown", ["failed", "the driver fails", "dmesg"])?;
    machine.sim.inject("fault", &["--clear"])?;
    fs::remove_file(machine.path("dev/nvidia1"))?;
    assert_advice(&machine, "one GPU without a node", ["degraded", "lists 1 of the 2 GPUs", "`nvidia-modprobe -c 1`"])?;
    ensure!(machine.doctor()?.1.contains("dev/nvidia1"), "the node is not named");
    fs::remove_file(machine.path("dev/nvidia0"))?;
    assert_advice(&machine, "no GPU with a node", ["degraded", "lists 0 of the 2 GPUs", "`nvidia-modprobe -c 0 -c 1`"])?;
    fs::remove_file(machine.path("dev/nvidiactl"))?;
    assert_advice(&machine, "no control node", ["failed", "no device node", "`nvidia-modprobe -c 255 -c 0 -c 1`"])?;
    ensure!(machine.doctor()?.1.contains("dev/nvidiactl"), "the node is not named");
    fs::write(
        machine.path("proc/driver/nvidia/version"),
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  999.1.2  Sun May 12\n",
    )?;
    for node in ["nvidiactl", "nvidia0", "nvidia1"] {
        fs::write(machine.path("dev").join(node), "")?;
    }
    assert_advice(&machine, "mismatch", ["failed", "the kernel module has version 999.1.2", "reload the kernel module"])?;
    fs::remove_dir_all(machine.path("proc/driver"))?;
    assert_advice(&machine, "not loaded", ["failed", "kernel module is not loaded", "modprobe nvidia"])
}

#[test]
fn doctor_names_missing_permissions() -> Result<()> {
    let machine = Machine::new()?;
    fs::set_permissions(machine.sim.dir.path(), fs::Permissions::from_mode(0o755))?;
    fs::set_permissions(machine.path("dev/nvidiactl"), fs::Permissions::from_mode(0o600))?;
    let binary = machine.path("gpu-sampler");
    fs::copy(var("GPU_SAMPLER_BIN")?, &binary)?;
    let mut command = Command::new(&binary);
    command.args(["doctor", "--json", "--nvml-lib"]).arg(machine.sim.library()).uid(65_534).gid(65_534);
    machine.with_paths(&mut command);
    let (status, detail, remedy) = driver_check(command)?;
    ensure!(status == "failed" && detail.contains("no permission to open"), "{status}: {detail}");
    ensure!(remedy.contains("run the agent as root"), "{remedy}");
    Ok(())
}

#[test]
fn the_agent_reports_missing_nodes_and_samples_once_they_exist() -> Result<()> {
    let machine = Machine::new()?;
    for node in ["nvidiactl", "nvidia1"] {
        fs::remove_file(machine.path("dev").join(node))?;
    }
    let agent = machine.agent()?;
    let degraded = |condition: &str| Ok(sum(&agent.scrape()?, "gpu_sampler_degraded", &[("condition", condition)]).map(|_| ()));
    wait_for("the driver cannot be used", Duration::from_secs(10), || degraded("nvml"))?;
    let log = agent.log()?;
    ensure!(log.contains("no device node") && log.contains("nvidia-modprobe"), "{log}");
    fs::write(machine.path("dev/nvidiactl"), "")?;
    wait_for("one of two GPUs is missing", Duration::from_secs(20), || degraded("gpus-unlisted"))?;
    // The condition may be set before the GPU is in a snapshot.
    wait_for("the driver can be used, and one GPU is sampled", Duration::from_secs(20), || {
        let page = agent.scrape()?;
        let is_unusable = sum(&page, "gpu_sampler_degraded", &[("condition", "nvml")]).is_some();
        Ok((page.iter().filter(|s| s.name == "gpu_info").count() == 1 && !is_unusable).then_some(()))
    })?;
    fs::write(machine.path("dev/nvidia1"), "")?;
    wait_for("both GPUs are sampled", Duration::from_secs(20), || {
        let page = agent.scrape()?;
        let is_degraded = sum(&page, "gpu_sampler_degraded", &[("condition", "gpus-unlisted")]).is_some();
        Ok((page.iter().filter(|s| s.name == "gpu_info").count() == 2 && !is_degraded).then_some(()))
    })
}

/// The library below a root, and `doctor` with that root.
struct HostRoot(tempfile::TempDir);

impl HostRoot {
    fn put(&self, folder: &str, library: &Path) -> Result<PathBuf> {
        let folder = self.0.path().join(folder);
        fs::create_dir_all(&folder)?;
        let file = folder.join("libnvidia-ml.so.1");
        fs::copy(library, &file)?;
        Ok(file)
    }

    fn doctor(&self, machine: &Machine) -> Result<(String, String, String)> {
        let mut command = Command::new(var("GPU_SAMPLER_BIN")?);
        command.args(["doctor", "--json", "--path-rootfs"]).arg(self.0.path());
        machine.with_paths(&mut command);
        driver_check(command)
    }
}

#[test]
fn the_library_is_found_where_platforms_keep_it() -> Result<()> {
    let machine = Machine::new()?;
    let root = HostRoot(tempfile::tempdir()?);
    let (status, detail, _) = root.doctor(&machine)?;
    ensure!(status == "degraded" && detail.contains("is in none of 41 places; tried: libnvidia-ml.so.1, "), "{detail}");
    for place in
        ["/run/nvidia/driver/usr/lib64", "/usr/lib/wsl/lib", "/usr/lib/nvidia/tesla", "/home/kubernetes/bin/nvidia/lib64"]
    {
        let below = format!("{}{place}/libnvidia-ml.so.1", root.0.path().display());
        ensure!(detail.contains(&below), "{below} is not in {detail}");
    }
    // A file that cannot be loaded is named, and does not end the search.
    let broken = root.0.path().join("run/nvidia/driver/usr/lib64");
    fs::create_dir_all(&broken)?;
    fs::write(broken.join("libnvidia-ml.so.1"), "not a library")?;
    let (_, detail, _) = root.doctor(&machine)?;
    ensure!(detail.contains(&format!("{}/libnvidia-ml.so.1 has one, which is not a library", broken.display())), "{detail}");
    // NixOS: the folder is an absolute link, which has to be followed below the root.
    let real = root.put("nix/store/x-nvidia/lib", &machine.sim.library())?;
    symlink("/nix/store/x-nvidia", root.0.path().join("run/opengl-driver"))?;
    let (status, detail, _) = root.doctor(&machine)?;
    ensure!(status == "ok" && detail.contains(&format!("library {}", real.display())), "{status}: {detail}");
    // Talos comes first.
    let talos = root.put("usr/local/glibc/usr/lib", &machine.sim.library())?;
    let (_, detail, _) = root.doctor(&machine)?;
    ensure!(detail.contains(&format!("library {}", talos.display())), "{detail}");
    // The agent uses it, too, and finds it when it is installed later.
    fs::remove_file(&talos)?;
    fs::rename(&real, machine.path("away"))?;
    let mut command = Agent::command(None)?;
    machine.with_paths(&mut command).arg("--path-rootfs").arg(root.0.path());
    let agent = Agent::start_as(Layout::Machine, command, &ARGS)?;
    let up = || Ok::<_, anyhow::Error>(sum(&agent.scrape()?, "gpu_sampler_source_up", &[("source", "nvml")]));
    ensure!(up()? == Some(0.0), "the driver is reported as up");
    ensure!(agent.log()?.contains("no NVIDIA driver library can be loaded: of 41 places"), "{}", agent.log()?);
    fs::rename(machine.path("away"), &real)?;
    wait_for("the library is found", Duration::from_secs(20), || Ok((up()? == Some(1.0)).then_some(())))
}
