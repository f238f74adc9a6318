//! Determines from /proc which processes hold NVIDIA device nodes. A process that uses a GPU has them open: `/dev/nvidiactl`,
//! `/dev/nvidia0` and its siblings, `/dev/nvidia-uvm`.
//!
//! Reads descriptor links and, if none names a node, mappings. Reading mappings waits for the memory lock of the process, so it is done
//! by a dedicated thread, or by `doctor` with a timeout.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, ErrorKind};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Statx, StatxFlags, statx};
use rustix::io::Errno;
use sampler_core::pid_space::PidSighting;

use crate::config::Config;
use crate::observe::kernel::proc;

/// Major number of nvidiactl and nvidia0 to nvidia254, registered with the kernel (LANANA).
const NVIDIA_MAJOR: u32 = 195;
pub const CONTROL: &str = "nvidiactl";
const MEMORY: &str = "nvidia-uvm";
/// Maximum number of descriptors and of mappings read of one process. CUDA opens the nodes early.
const MOST: usize = 65_536;

/// The paths of device nodes and of /proc.
#[derive(Clone)]
pub struct DevicePaths {
    devfs: Vec<PathBuf>,
    procfs: PathBuf,
    module: PathBuf,
}

/// The existing device nodes.
#[derive(Clone, Debug, Default)]
pub struct Nodes {
    /// Device and inode of each readable node.
    inodes: HashSet<(u64, u64)>,
    /// Major numbers of NVIDIA character devices; empty if the nodes are regular files in a simulation.
    majors: HashSet<u32>,
    /// Whether the NVIDIA module is loaded in this kernel and provides the nodes.
    pub module: bool,
}

impl DevicePaths {
    pub fn new(config: &Config) -> Self {
        Self {
            devfs: config.devfs_candidates(),
            procfs: config.path_procfs.clone(),
            module: config.path_sysfs.join("module/nvidia"),
        }
    }

    /// `None` if there are no nodes: a simulated driver without nodes, WSL, no driver.
    pub fn nodes(&self) -> Option<Nodes> {
        let (folder, control) = self.devfs.iter().find_map(|folder| Some((folder, fs::metadata(folder.join(CONTROL)).ok()?)))?;
        let mut nodes = Nodes::default();
        let names = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
        for name in names.filter(|name| is_node_name(name.as_bytes())) {
            nodes.inodes.extend(fs::metadata(folder.join(name)).ok().map(|meta| (meta.dev(), meta.ino())));
        }
        if control.file_type().is_char_device() {
            nodes.majors.extend([NVIDIA_MAJOR, libc::major(control.rdev())]);
            let memory = fs::metadata(folder.join(MEMORY)).ok().filter(|meta| meta.file_type().is_char_device());
            nodes.majors.extend(memory.map(|meta| libc::major(meta.rdev())));
            nodes.majors.extend(fs::read_to_string(self.procfs.join("devices")).ok().as_deref().and_then(memory_major));
            nodes.module = self.module.exists();
        }
        Some(nodes)
    }

    /// What /proc shows of the PID; `None` if it changed during reading.
    pub fn sighting(&self, nodes: &Nodes, pid: u32) -> Option<PidSighting> {
        let folder = self.procfs.join(pid.to_string());
        let living = match proc::living_thread(&folder) {
            Ok(living) => living,
            Err(_) => return Some(PidSighting::Unreadable),
        };
        // A /proc with hidepid hides existing processes, and a zombie shows no descriptors.
        let Some((thread, start)) = living else { return proc::is_free(pid).then_some(PidSighting::Absent) };
        let held = match nodes.open_in(&thread) {
            Ok(false) => nodes.mapped_in(&thread),
            known => known,
        };
        match held {
            Ok(true) => Some(PidSighting::Holder),
            Ok(false) => {
                let after = proc::living_thread(&folder).ok()??.1;
                (after == start).then_some(PidSighting::Bystander { start })
            }
            Err(error) if error.kind() == ErrorKind::PermissionDenied => Some(PidSighting::Unreadable),
            // The process exited during reading, or has more descriptors or mappings than are read.
            Err(_) => None,
        }
    }
}

/// The major number that the kernel assigned to nvidia-uvm, from the text of /proc/devices.
fn memory_major(devices: &str) -> Option<u32> {
    devices.lines().find_map(|line| line.trim().strip_suffix(MEMORY)?.trim().parse().ok())
}

/// Accepts nvidiactl, nvidia-uvm, and nvidia followed by a number.
fn is_node_name(name: &[u8]) -> bool {
    let number = name.strip_prefix(b"nvidia").filter(|rest| !rest.is_empty());
    name == CONTROL.as_bytes() || name == MEMORY.as_bytes() || number.is_some_and(|n| n.iter().all(u8::is_ascii_digit))
}

/// Checks the last component of a link: the target may be in another mount namespace, and " (deleted)" may follow.
pub fn names_node(link: &OsStr) -> bool {
    let link = link.as_bytes();
    let link = link.strip_suffix(b" (deleted)").unwrap_or(link);
    link.rsplit(|byte| *byte == b'/').next().is_some_and(is_node_name)
}

impl Nodes {
    fn is_node(&self, file: &Statx) -> bool {
        let is_device = FileType::from_raw_mode(file.stx_mode.into()) == FileType::CharacterDevice;
        let number = libc::makedev(file.stx_dev_major, file.stx_dev_minor);
        is_device && self.majors.contains(&file.stx_rdev_major) || self.inodes.contains(&(number, file.stx_ino))
    }

    /// Follows those links in one folder of /proc that name a node.
    fn any(&self, folder: &Path, names: impl Iterator<Item = io::Result<std::ffi::OsString>>) -> io::Result<bool> {
        for (n, name) in names.enumerate() {
            if n >= MOST {
                return Err(io::Error::other("too many"));
            }
            let path = folder.join(name?);
            let link = match fs::read_link(&path) {
                Ok(link) => link,
                // Closed in the meantime.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            // Other links are not followed: a file on an unreachable network server may block.
            if !names_node(link.as_os_str()) {
                continue;
            }
            match statx(CWD, &path, AtFlags::STATX_DONT_SYNC, StatxFlags::BASIC_STATS) {
                Ok(file) if self.is_node(&file) => return Ok(true),
                Err(Errno::ACCESS | Errno::PERM) => return Err(ErrorKind::PermissionDenied.into()),
                // Another file of that name, or closed in the meantime.
                Ok(_) | Err(_) => {}
            }
        }
        Ok(false)
    }

    fn open_in(&self, thread: &Path) -> io::Result<bool> {
        let folder = thread.join("fd");
        let names = fs::read_dir(&folder)?.map(|entry| entry.map(|entry| entry.file_name()));
        self.any(&folder, names)
    }

    /// A mapping outlives its descriptor.
    fn mapped_in(&self, thread: &Path) -> io::Result<bool> {
        let folder = thread.join("map_files");
        let mut ranges = Vec::new();
        for (n, line) in BufReader::new(File::open(thread.join("maps"))?).split(b'\n').enumerate() {
            if n >= MOST {
                return Err(io::Error::other("too many"));
            }
            ranges.extend(node_range(&line?));
        }
        self.any(&folder, ranges.into_iter().map(Ok))
    }
}

/// The name in map_files for a line of maps that names a node.
fn node_range(line: &[u8]) -> Option<std::ffi::OsString> {
    let path = line.iter().position(|byte| *byte == b'/')?;
    let range = line.split(|byte| *byte == b' ').next()?;
    names_node(OsStr::from_bytes(line.get(path..)?)).then(|| {
        // maps pads addresses with zeros, map_files does not.
        let unpadded = |part: &str| u64::from_str_radix(part, 16).map(|at| format!("{at:x}"));
        let range = std::str::from_utf8(range).ok()?;
        let (from, to) = range.split_once('-')?;
        Some(format!("{}-{}", unpadded(from).ok()?, unpadded(to).ok()?).into())
    })?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(devfs: &Path) -> DevicePaths {
        DevicePaths { devfs: vec![devfs.to_owned()], procfs: "/proc".into(), module: "/no/such/module".into() }
    }

    #[test]
    fn only_nvidia_device_nodes_are_recognized_by_name() {
        let check = |link: &str, expect| assert_eq!(names_node(OsStr::new(link)), expect, "{link}");
        check("/dev/nvidia0", true);
        check("/dev/nvidia17", true);
        check("/dev/nvidiactl", true);
        check("/dev/nvidia-uvm", true);
        check("/run/nvidia/driver/dev/nvidia0", true);
        check("/dev/nvidia0 (deleted)", true);
        check("nvidiactl", true);
        check("/dev/nvidia", false);
        check("/dev/nvidia-caps/nvidia-cap1", false);
        check("/dev/nvidia-modeset", false);
        check("/dev/nvidia-uvm-tools", false);
        check("/dev/nvidia0x", false);
        check("/dev/nvidia0/file", false);
        check("socket:[4]", false);
    }

    #[test]
    fn the_uvm_major_is_read_from_proc_devices() {
        let devices =
            "Character devices:\n  1 mem\n195 nvidia-frontend\n508 nvidia-uvm\n509 nvidia-caps\n\nBlock devices:\n  7 loop\n";
        assert_eq!(memory_major(devices), Some(508));
        assert_eq!(memory_major("Character devices:\n  1 mem\n"), None);
    }

    #[test]
    fn mappings_of_nodes_yield_their_map_files_names() {
        let line = b"7f10c8000000-7f10c8200000 rw-s 00000000 00:06 523                        /dev/nvidia0";
        assert_eq!(node_range(line), Some("7f10c8000000-7f10c8200000".into()));
        assert_eq!(node_range(b"00400000-00401000 r--p 00000000 08:01 5  /dev/nvidiactl"), Some("400000-401000".into()));
        assert_eq!(node_range(b"00400000-00401000 r--p 00000000 08:01 5  /usr/bin/cat"), None);
        assert_eq!(node_range(b"7ffc-7ffd rw-p 00000000 00:00 0 [stack]"), None);
        assert_eq!(node_range(b""), None);
    }

    #[test]
    fn a_folder_without_nodes_yields_none() {
        let dir = tempfile::tempdir().unwrap();
        assert!(places(dir.path()).nodes().is_none());
    }

    #[test]
    fn a_process_that_holds_a_node_is_detected_and_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let node = dir.path().join("nvidia0");
        for name in [CONTROL, "nvidia0", MEMORY, "other"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let places = places(dir.path());
        let nodes = places.nodes().unwrap();
        assert_eq!((nodes.inodes.len(), nodes.majors.len(), nodes.module), (3, 0, false));
        let mut child = std::process::Command::new("sleep").arg("30").stdin(File::open(&node).unwrap()).spawn().unwrap();
        let mut other = std::process::Command::new("sleep").arg("30").stdin(File::open("/dev/null").unwrap()).spawn().unwrap();
        assert_eq!(places.sighting(&nodes, child.id()), Some(PidSighting::Holder));
        // A file of the same name in another folder is not a node.
        let elsewhere = tempfile::tempdir().unwrap();
        fs::write(elsewhere.path().join("nvidia0"), "").unwrap();
        let stranger = File::open(elsewhere.path().join("nvidia0")).unwrap();
        let mut same_name = std::process::Command::new("sleep").arg("30").stdin(stranger).spawn().unwrap();
        for process in [other.id(), same_name.id()] {
            let sighting = places.sighting(&nodes, process);
            assert!(matches!(sighting, Some(PidSighting::Bystander { start }) if start.0 > 0), "{sighting:?}");
        }
        // A removed node stays open.
        fs::remove_file(&node).unwrap();
        assert_eq!(places.sighting(&nodes, child.id()), Some(PidSighting::Holder));
        for process in [&mut child, &mut other, &mut same_name] {
            process.kill().unwrap();
        }
        for process in [&mut child, &mut other, &mut same_name] {
            process.wait().unwrap();
        }
        assert_eq!(places.sighting(&nodes, child.id()), Some(PidSighting::Absent));
        assert_eq!(places.sighting(&nodes, u32::MAX), Some(PidSighting::Absent));
    }
}
