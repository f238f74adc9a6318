//! What a driver library needs of the kernel, in a world with `kernel_files`: device nodes, which it holds open, and /proc/driver/nvidia.
//!
//! A test makes an error by removing or changing a file below the world's folder, as real machines lose theirs.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::world::{DEVICES, World};

const NO_PERMISSION: u32 = 4;
const DRIVER_NOT_LOADED: u32 = 9;
const OPERATING_SYSTEM: u32 = 17;
const LIB_RM_VERSION_MISMATCH: u32 = 18;
const UNKNOWN: u32 = 999;

/// A file for each GPU, with a byte for each handle that was requested by any process.
pub const OPENS: &str = "opens";
const CONTROL: &str = "nvidiactl";

fn driver_folder(dir: &Path) -> PathBuf {
    dir.join("proc/driver/nvidia")
}

fn node_name(world: &World, gpu: usize) -> String {
    format!("nvidia{}", world.gpus.get(gpu).and_then(|gpu| gpu.minor).unwrap_or(gpu as u32))
}

/// Writes /proc/driver/nvidia, below a folder that has the files of /proc by which a procfs is recognised.
pub fn create(world: &World, dir: &Path) -> anyhow::Result<()> {
    if !world.kernel_files {
        return Ok(());
    }
    let folder = driver_folder(dir);
    let write = |path: PathBuf, text: String| fs::write(&path, text).with_context(|| path.display().to_string());
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    for name in ["stat", "self", "sys", "mounts", "cgroups", "devices"] {
        std::os::unix::fs::symlink(Path::new("/proc").join(name), dir.join("proc").join(name))?;
    }
    let version = &world.driver_version;
    write(folder.join("version"), format!("NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Sun May 12\n"))?;
    let opens = dir.join(OPENS);
    fs::create_dir_all(&opens).with_context(|| opens.display().to_string())?;
    for (index, gpu) in world.gpus.iter().enumerate() {
        write(opens.join(node_name(world, index)), String::new())?;
        let one = folder.join("gpus").join(gpu.pci_bus_id.to_ascii_lowercase().strip_prefix("0000").unwrap_or(&gpu.pci_bus_id));
        fs::create_dir_all(&one).with_context(|| one.display().to_string())?;
        let minor = gpu.minor.unwrap_or(index as u32);
        write(one.join("information"), format!("Model: \t\t {}\nDevice Minor: \t {minor}\n", gpu.name))?;
    }
    Ok(())
}

/// The nodes that this process holds open, as the real library does until its last shutdown.
#[derive(Default)]
pub struct OpenNodes(BTreeMap<String, File>);

impl OpenNodes {
    fn open(&mut self, dir: &Path, name: &str) -> io::Result<()> {
        if !self.0.contains_key(name) {
            let node = OpenOptions::new().read(true).write(true).open(dir.join(DEVICES).join(name))?;
            self.0.insert(name.to_owned(), node);
        }
        Ok(())
    }

    /// Opens the control node. The error of init without it: OPERATING_SYSTEM where it is absent [M], UNKNOWN where the device cgroup
    /// refuses it [R], NO_PERMISSION where its mode does.
    pub fn control(&mut self, world: &World, dir: &Path) -> Result<(), u32> {
        if !world.kernel_files {
            return Ok(());
        }
        let version = fs::read_to_string(driver_folder(dir).join("version")).map_err(|_| DRIVER_NOT_LOADED)?;
        self.open(dir, CONTROL).map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM) => UNKNOWN,
            Some(libc::EACCES) => NO_PERMISSION,
            _ => OPERATING_SYSTEM,
        })?;
        if version.contains(&world.driver_version) { Ok(()) } else { Err(LIB_RM_VERSION_MISMATCH) }
    }

    /// Opens the node of a GPU, as the first handle does, and counts the handle.
    pub fn gpu(&mut self, world: &World, dir: &Path, gpu: usize) -> Result<(), u32> {
        if !world.kernel_files {
            return Ok(());
        }
        let count = OpenOptions::new().append(true).open(dir.join(OPENS).join(node_name(world, gpu)));
        count.and_then(|mut count| count.write_all(b".")).map_err(|_| UNKNOWN)?;
        self.open(dir, &node_name(world, gpu)).map_err(|_| UNKNOWN)
    }
}

/// Whether the GPU is in NVML's list: one without a node that opens is missing, without an error [M].
pub fn is_listed(world: &World, dir: &Path, gpu: usize) -> bool {
    let opens = || OpenOptions::new().read(true).write(true).open(dir.join(DEVICES).join(node_name(world, gpu))).is_ok();
    !world.kernel_files || opens()
}
