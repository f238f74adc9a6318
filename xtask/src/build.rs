//! `build`: builds the kernel program, then the agent that embeds it, the simulator, and the program that scores exporters.

use crate::{arch::Arch, ebpf, tools};
use anyhow::{Context as _, Result, bail};
use std::{path::PathBuf, process::Stdio};

/// Packages and their programs.
const PROGRAMS: [(&str, &str); 4] =
    [("gpu-sampler", "gpu-sampler"), ("nvml-sim", "nvml-sim"), ("cuda-sim", "cuda-work"), ("gpu-accuracy", "gpu-accuracy")];
/// The package of the helper programs of tests, benches and recordings.
const HELPERS: &str = "gpu-sampler-tests";

/// Absolute paths of the build results.
pub struct Built {
    pub sampler: PathBuf,
    pub sim: PathBuf,
    pub sim_library: PathBuf,
    pub accuracy: PathBuf,
    pub cuda_work: PathBuf,
    pub cuda_library: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    Debug,
    Release,
}

pub fn verb(args: &[String]) -> Result<()> {
    let (profile, rest) = match args.split_first() {
        Some((word, rest)) if word == "--debug" => (Profile::Debug, rest),
        _ => (Profile::Release, args),
    };
    let arch = Arch::of_arguments(rest)?;
    let built = build(arch, profile, &[])?;
    if !arch.is_host() {
        // What was linked for another processor is at least known to start.
        tools::run(arch.command(&built.sampler).arg("--version"))?;
    }
    let programs = [built.sampler, built.sim, built.sim_library, built.accuracy, built.cuda_work, built.cuda_library];
    for file in [arch.ebpf_object()].into_iter().chain(programs) {
        println!("{}", file.display());
    }
    Ok(())
}

pub fn everything(profile: Profile) -> Result<Built> {
    with_helpers(profile, &[])
}

/// As [`everything`], as a release.
pub fn release(arch: Arch) -> Result<Built> {
    build(arch, Profile::Release, &[])
}

/// The simulators and the scorer alone, as a release.
pub fn simulator(arch: Arch) -> Result<Built> {
    let packages = ["nvml-sim", "cuda-sim", "gpu-accuracy"].iter().flat_map(|package| ["--package", package]);
    let mut cargo = tools::cargo(&["build", "--locked", "--release"])?;
    cargo.args(packages);
    arch.select(&mut cargo);
    tools::run(&mut cargo)?;
    built(arch, Profile::Release)
}

/// Also builds these programs of the tests' package, into the agent's folder. A single call of cargo does it: a second call for other
/// packages would enable other features of common dependencies and compile them again.
pub fn with_helpers(profile: Profile, helpers: &[&str]) -> Result<Built> {
    build(Arch::host()?, profile, helpers)
}

fn build(arch: Arch, profile: Profile, helpers: &[&str]) -> Result<Built> {
    ebpf::build(arch)?;
    let mut cargo = tools::cargo(&["build", "--locked"])?;
    cargo.args(PROGRAMS.iter().flat_map(|(package, _)| ["--package", package]));
    if !helpers.is_empty() {
        cargo.args(["--package", HELPERS, "--lib"]);
        cargo.args(PROGRAMS.iter().map(|(_, program)| program).chain(helpers).flat_map(|name| ["--bin", name]));
    }
    // Named explicitly, so that a missing kernel program is an error here, not a warning.
    cargo.env("GPU_SAMPLER_EBPF_OBJECT", arch.ebpf_object());
    arch.select(&mut cargo);
    if profile == Profile::Release {
        cargo.arg("--release");
    }
    tools::run(&mut cargo)?;
    built(arch, profile)
}

fn built(arch: Arch, profile: Profile) -> Result<Built> {
    let folder = arch.target_dir()?.join(if profile == Profile::Release { "release" } else { "debug" });
    Ok(Built {
        sampler: folder.join("gpu-sampler"),
        sim: folder.join("nvml-sim"),
        sim_library: folder.join("libnvidia_ml_sim.so"),
        accuracy: folder.join("gpu-accuracy"),
        cuda_work: folder.join("cuda-work"),
        cuda_library: folder.join("libcuda_sim.so"),
    })
}

/// Builds a program of the tests' package in the debug profile, with the features that the tests are built with: after them nothing is left
/// to compile. Returns its path.
pub fn debug_helper(name: &str) -> Result<PathBuf> {
    tools::run(&mut tools::cargo(&["build", "--locked", "--package", HELPERS, "--bin", name])?)?;
    Ok(Arch::host()?.target_dir()?.join("debug").join(name))
}

/// Builds the library that a loader of programs is started with to inspect what the verifier prints. Returns its path.
pub fn verifier_log() -> Result<PathBuf> {
    tools::run(&mut tools::cargo(&["build", "--locked", "--package", "verifier-log"])?)?;
    Ok(Arch::host()?.target_dir()?.join("debug/libverifier_log.so"))
}

/// Builds the tests of this package, which have one program. Returns its path.
pub fn tests(package: &str) -> Result<PathBuf> {
    let args =
        ["test", "--package", package, "--test", "all", "--locked", "--no-run", "--message-format", "json-render-diagnostics"];
    let mut cargo = tools::cargo(&args)?;
    cargo.env("GPU_SAMPLER_EBPF_OBJECT", Arch::host()?.ebpf_object()).stderr(Stdio::inherit());
    tools::progress(tools::shown(&cargo));
    let output = cargo.output()?;
    if !output.status.success() {
        bail!("`{}` failed ({})", tools::shown(&cargo), output.status);
    }
    let messages = String::from_utf8(output.stdout)?;
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let program =
        messages.filter(|message| message["target"]["name"] == "all").find_map(|m| m["executable"].as_str().map(PathBuf::from));
    program.context("cargo named no program of the tests")
}
