//! `build`: the kernel program, then the agent that carries it and the simulator.

use crate::{ebpf, tools};
use anyhow::Result;
use std::path::PathBuf;

/// Absolute paths of what was built.
pub struct Built {
    pub sampler: PathBuf,
    pub sim: PathBuf,
    pub sim_library: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    Debug,
    Release,
}

pub fn verb(args: &[String]) -> Result<()> {
    let profile = match args {
        [] => Profile::Release,
        [one] if one == "--debug" => Profile::Debug,
        [word, ..] => return Err(tools::unknown(word)),
    };
    let built = everything(profile)?;
    for file in [tools::ebpf_object(), built.sampler, built.sim, built.sim_library] {
        println!("{}", file.display());
    }
    Ok(())
}

pub fn everything(profile: Profile) -> Result<Built> {
    ebpf::build()?;
    let mut cargo = tools::cargo(&["build", "--locked", "--package", "sampler", "--package", "nvml-sim"])?;
    // Named explicitly, so that an agent without its kernel program is an error here and no warning.
    cargo.env("GPU_SAMPLER_EBPF_OBJECT", tools::ebpf_object());
    if profile == Profile::Release {
        cargo.arg("--release");
    }
    tools::run(&mut cargo)?;
    let folder = tools::target_dir()?.join(if profile == Profile::Release { "release" } else { "debug" });
    Ok(Built {
        sampler: folder.join("gpu-sampler"),
        sim: folder.join("nvml-sim"),
        sim_library: folder.join("libnvidia_ml_sim.so"),
    })
}
