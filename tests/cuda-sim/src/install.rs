//! Puts the library and a schedule for each GPU into the folder of a world.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use cuda_sim::gpu;
use cuda_sim::shared::Shared;
use cuda_sim::waits::MAX_GPUS;
use nvidia_ml_sim::world::World;

const NAME: &str = "libcuda.so.1";

/// The library's path in the world's folder.
pub fn installed(dir: &Path) -> PathBuf {
    dir.join("lib").join(NAME)
}

/// Processes that use the GPUs keep the library and the schedules that they have.
pub fn install(dir: &Path, slice: Option<Duration>) -> anyhow::Result<()> {
    let gpus = World::read(dir).context("run `nvml-sim init` first")?.gpus.len();
    if gpus > MAX_GPUS {
        bail!("{}: the world has {gpus} GPUs; the simulated CUDA driver supports {MAX_GPUS}", dir.display());
    }
    let folder = dir.join(gpu::FOLDER);
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    for index in 0..gpus {
        Shared::create(&gpu::path(dir, index), slice.map(|slice| slice.as_nanos() as u64))?;
    }
    let (library, copy) = (library()?, installed(dir));
    let lib = dir.join("lib");
    fs::create_dir_all(&lib).with_context(|| lib.display().to_string())?;
    // By a rename, so that a library in use stays whole and installs may run at once.
    let part = lib.join(format!("{NAME}.{}", std::process::id()));
    fs::copy(&library, &part).with_context(|| format!("cannot copy {} to {}", library.display(), part.display()))?;
    fs::rename(&part, &copy).with_context(|| copy.display().to_string())?;
    // As the driver's installer has it.
    let link = lib.join("libcuda.so");
    match std::os::unix::fs::symlink(NAME, &link) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error).with_context(|| link.display().to_string()),
        _ => Ok(()),
    }
}

/// The path in CUDA_SIM_LIBRARY, or the library that cargo built next to this program.
fn library() -> anyhow::Result<PathBuf> {
    let path = match std::env::var_os("CUDA_SIM_LIBRARY") {
        Some(path) => PathBuf::from(path),
        None => std::env::current_exe()?.with_file_name("libcuda_sim.so"),
    };
    if !path.exists() {
        bail!("{} does not exist; build it with `cargo build -p cuda-sim`", path.display());
    }
    Ok(path)
}
