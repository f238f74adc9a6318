//! The agent and other exporters, each on simulated GPUs of its own with the same users, scored against the truth by `gpu-accuracy`. They
//! run at the same time, because five worlds of minutes for each would take hours.
//!
//! Only `cargo xtask bench peers` runs it, because it may have to download the others first. `peers-WORLD` limits it to that world. The
//! tables are Markdown; `docs/peers.md` has them.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use gpu_sampler_tests::{clients, var};

/// Environment variable with a folder for the scores as JSON.
const SCORES: &str = "PEERS_SCORES";

/// Of each world: shares of two users then have a standard error of 1.5 points where each sample is used.
const LASTS: &str = "3m";

/// An exporter, with the name of its file in `tests/gpu-accuracy/mappings`.
struct Peer {
    mapping: &'static str,
    command: Vec<String>,
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// The agent first. `folder`: for files that they need.
fn all(folder: &Path) -> Result<Vec<Peer>> {
    let agent = var("GPU_SAMPLER_BIN")?;
    let agent = [&*agent, "run", "--listen", "127.0.0.1:{port}", "--nvml-lib", "{library}", "--path-rootfs", "{root}"];
    let nvitop = clients::venv(&["nvitop-exporter==1.7.2", "nvitop==1.7.2", "nvidia-ml-py==13.580.82"])?.join("python");
    let nvitop = [&*nvitop.to_string_lossy(), "-m", "nvitop_exporter", "--interval", "1", "--port", "{port}"];
    // all-smi searches for GPUs only where `nvidia-smi -L` lists one.
    let listing = folder.join("nvidia-smi");
    std::fs::write(&listing, "#!/bin/sh\necho 'GPU 0: Tesla V100'\n")?;
    std::fs::set_permissions(&listing, std::fs::Permissions::from_mode(0o755))?;
    let (path, all_smi) =
        (format!("PATH={}:{}", folder.display(), std::env::var("PATH")?), clients::program("all-smi", "0.22.0")?);
    let all_smi = ["env", &*path, &all_smi.to_string_lossy(), "api", "--interval", "1", "--processes", "--port", "{port}"];
    let rezolus = rezolus(folder)?;
    let (python, script) =
        (clients::venv(&["nvidia-ml-py==13.580.82"])?.join("python"), accuracy().join("stand-ins/dcgm_rule.py"));
    let (python, script) = (python.to_string_lossy(), script.to_string_lossy());
    let rule = [&*python, &*script, "--port", "{port}", "--assigned", "{containers}"];
    Ok(vec![
        Peer { mapping: "gpu-sampler", command: words(&agent) },
        Peer { mapping: "nvitop-exporter", command: words(&nvitop) },
        Peer { mapping: "all-smi", command: words(&all_smi) },
        Peer { mapping: "rezolus", command: rezolus },
        Peer { mapping: "dcgm-rule", command: words(&rule) },
    ])
}

/// A shell that starts its two programs: the agent has no Prometheus page, its exporter has. Samplers of other things than GPUs are off,
/// which would add to its cost.
fn rezolus(folder: &Path) -> Result<Vec<String>> {
    let program = clients::program("rezolus", "5.4.0")?;
    let agent = "[general]\nlisten = '127.0.0.1:4241'\n[defaults]\nenabled = false\n[samplers.gpu_nvidia]\nenabled = true\n";
    let exporter = "[general]\nlisten = '127.0.0.1:PORT'\nsource = '127.0.0.1:4241'\n";
    std::fs::write(folder.join("agent.toml"), agent)?;
    std::fs::write(folder.join("exporter.in"), exporter)?;
    let (program, folder) = (program.display(), folder.display());
    let script = format!(
        "cd {folder} && sed s/PORT/{{port}}/ exporter.in > exporter.toml && {{ {program} agent.toml & }} && \
         exec {program} exporter exporter.toml"
    );
    Ok(words(&["sh", "-c", &script]))
}

fn accuracy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/gpu-accuracy")
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word.starts_with("peers")).collect();
    if words.is_empty() {
        println!("peers: skipped; it runs only when it is named: `cargo xtask bench peers`");
        return Ok(());
    }
    let worlds: Vec<&str> = words.iter().filter_map(|word| word.strip_prefix("peers-")).collect();
    let folder = tempfile::tempdir()?;
    let kept = std::env::var_os(SCORES).map_or_else(|| folder.path().to_owned(), PathBuf::from);
    let (program, sim) = (var("GPU_ACCURACY_BIN")?, var("NVML_SIM_BIN")?);
    let scored = |peer: &Peer| -> Result<PathBuf> {
        let mapping = accuracy().join("mappings").join(peer.mapping).with_extension("toml");
        let mut run = Command::new(&program);
        run.args(["run", "--json", "--for", LASTS, "--nvml-sim", &sim, "--mapping"]).arg(mapping);
        run.args(worlds.iter().flat_map(|world| ["--world", world])).arg("--").args(&peer.command);
        let output = run.stderr(std::process::Stdio::inherit()).output().context("gpu-accuracy")?;
        ensure!(output.status.success(), "gpu-accuracy failed with {}", peer.mapping);
        let file = kept.join(peer.mapping).with_extension("json");
        std::fs::write(&file, output.stdout).with_context(|| file.display().to_string())?;
        Ok(file)
    };
    let peers = all(folder.path())?;
    println!("\npeers");
    let scores: Vec<PathBuf> = std::thread::scope(|scope| {
        let threads: Vec<_> = peers.iter().map(|peer| scope.spawn(|| scored(peer))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| bail!("a thread panicked"))).collect::<Result<_>>()
    })?;
    println!();
    let status = Command::new(&program).arg("compare").args(&scores).status()?;
    ensure!(status.success(), "gpu-accuracy compare failed");
    Ok(())
}
