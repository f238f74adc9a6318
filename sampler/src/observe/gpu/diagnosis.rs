//! Why the driver cannot be used, and the remedy: from NVML's return code and from what can be seen of the driver without NVML.
//!
//! NVML's codes alone mislead. A missing `/dev/nvidiactl` gives OPERATING_SYSTEM and a missing `/dev/nvidia0` no error but a GPU less (both
//! observed on real hardware); a container that lost its devices gets UNKNOWN (NVIDIA/nvidia-container-toolkit issue 48).

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nvml_wrapper::error::NvmlError;

use super::device_nodes::CONTROL;
use crate::config::Config;

/// Maximum number of GPUs of which the nodes are checked; the largest machines have 16.
const MOST_GPUS: usize = 64;
const LOG: &str = "check dmesg for NVRM and Xid lines, and whether nvidia-smi works";
const ELSE_PASS: &str = "for an agent in a container, pass them to it (privileged, --gpus all, CDI, or the runtime class nvidia)";
/// Minor number of the control node.
const CONTROL_MINOR: u32 = 255;
const PASS_NODES: &str = "pass the host's /dev/nvidia* to the container of the agent (privileged, --gpus all, CDI, or the runtime class \
                          nvidia)";
const LOST_NODES: &str = "restart the container of the agent: it loses its devices at `systemctl daemon-reload`; to prevent it, pass them by \
                          CDI or privileged, or link them with `nvidia-ctk system create-dev-char-symlinks --create-all`";

/// A problem and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnosis {
    pub problem: String,
    pub remedy: String,
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.problem, self.remedy)
    }
}

/// Whether a device node can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NodeState {
    Opens,
    Absent,
    /// EPERM: the device cgroup refuses it.
    Refused,
    /// EACCES: its owner or mode refuses it.
    NotPermitted,
    /// ENXIO or ENODEV: there is a node, and no driver behind it.
    Dead,
    Fails,
}

impl NodeState {
    fn of(path: &Path) -> Self {
        // Without waiting: the first open of a GPU initializes it, which takes seconds.
        let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
        let error: io::Error = match opened {
            Ok(_) => return Self::Opens,
            Err(error) => error,
        };
        match error.raw_os_error() {
            Some(libc::EPERM) => Self::Refused,
            Some(libc::EACCES) => Self::NotPermitted,
            Some(libc::ENXIO | libc::ENODEV) => Self::Dead,
            _ if error.kind() == ErrorKind::NotFound => Self::Absent,
            _ => Self::Fails,
        }
    }
}

/// Where the driver's files are.
#[derive(Clone, Debug)]
pub struct DriverFiles {
    /// The folder of the device nodes that the library opens.
    dev: PathBuf,
    /// That of the host, if it is another one.
    host_dev: Option<PathBuf>,
    /// `/proc/driver/nvidia`.
    driver: PathBuf,
    /// `/sys/module/nvidia`.
    module: PathBuf,
}

/// What can be seen of the driver without NVML.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sightings {
    control: NodeState,
    /// The nodes of the GPUs that the kernel module drives, by minor number; `nvidia0` if these are not known.
    gpus: Vec<(u32, NodeState)>,
    /// The host has a control node.
    host_has_control: bool,
    module_loaded: bool,
    module_version: Option<String>,
}

impl DriverFiles {
    pub fn new(config: &Config) -> Self {
        let has_host_root = config.path_rootfs.parent().is_some();
        Self {
            dev: config.path_devfs.clone().unwrap_or_else(|| "/dev".into()),
            host_dev: has_host_root.then(|| config.path_rootfs.join("dev")),
            driver: config.path_procfs.join("driver/nvidia"),
            module: config.path_sysfs.join("module/nvidia"),
        }
    }

    /// Minor numbers of the GPUs that the kernel module drives; `None` if it does not report them.
    fn minors(&self) -> Option<Vec<u32>> {
        let folders = fs::read_dir(self.driver.join("gpus")).ok()?.flatten().take(MOST_GPUS);
        let mut minors: Vec<u32> = folders
            .enumerate()
            .map(|(n, folder)| {
                let text = fs::read_to_string(folder.path().join("information")).unwrap_or_default();
                let minor = text.lines().find_map(|line| line.strip_prefix("Device Minor:")?.trim().parse().ok());
                // Not readable: GPUs are numbered from 0.
                minor.unwrap_or(n as u32)
            })
            .collect();
        minors.sort_unstable();
        Some(minors)
    }

    /// The number of GPUs that the kernel module drives.
    fn driven(&self) -> Option<usize> {
        self.minors().map(|minors| minors.len())
    }

    fn see(&self) -> Sightings {
        let version = |path: PathBuf| fs::read_to_string(path).ok().as_deref().and_then(version_in);
        let module_version = version(self.driver.join("version")).or_else(|| version(self.module.join("version")));
        let state = |minor: u32| (minor, NodeState::of(&self.dev.join(format!("nvidia{minor}"))));
        let minors = self.minors().filter(|minors| !minors.is_empty()).unwrap_or_else(|| vec![0]);
        Sightings {
            control: NodeState::of(&self.dev.join(CONTROL)),
            gpus: minors.into_iter().map(state).collect(),
            host_has_control: self.host_dev.as_ref().is_some_and(|dev| dev.join(CONTROL).exists()),
            module_loaded: module_version.is_some() || self.module.exists() || self.driver.exists(),
            module_version,
        }
    }

    /// Why a call that concerns all GPUs failed with this error. `library`: the file that was loaded.
    pub fn explain(&self, error: &NvmlError, library: &Path) -> Diagnosis {
        explain(error, &self.see(), &self.dev, library)
    }

    /// Why NVML lists only `count` GPUs, if the kernel module drives more, or if there is none.
    pub fn unlisted(&self, count: u32) -> Option<Diagnosis> {
        let driven = self.driven();
        if count > 0 && driven.is_none_or(|driven| driven <= count as usize) {
            return None;
        }
        Some(unlisted(count, driven, &self.see(), &self.dev))
    }

    /// Whether the kernel module drives more GPUs than that.
    pub fn drives_more_than(&self, count: u32) -> bool {
        self.driven().is_some_and(|driven| driven > count as usize)
    }
}

/// The first word of the form `535.183.01`.
fn version_in(text: &str) -> Option<String> {
    let is_version = |word: &&str| {
        let mut parts = word.split('.');
        parts.clone().count() >= 2 && parts.all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
    };
    text.split_whitespace().find(is_version).map(str::to_owned)
}

/// The version in the name of the file that the path links to: `libnvidia-ml.so.535.183.01`.
fn library_version(library: &Path) -> Option<String> {
    let file = fs::canonicalize(library).ok()?;
    version_in(file.file_name()?.to_str()?.strip_prefix("libnvidia-ml.so.")?)
}

/// Without `-u`, with which the numbers would be those of nvidia-uvm.
fn remedy_of_absent(seen: &Sightings) -> String {
    if seen.host_has_control {
        return PASS_NODES.to_owned();
    }
    let nodes = [(CONTROL_MINOR, seen.control)].into_iter().chain(seen.gpus.iter().copied());
    let absent = nodes.filter(|(_, state)| *state == NodeState::Absent);
    let options: String = absent.map(|(minor, _)| format!(" -c {minor}")).collect();
    format!("create them with `nvidia-modprobe{options}` as root on the host; {ELSE_PASS}")
}

/// The problem of the nodes, if they have one.
fn nodes_problem(seen: &Sightings, dev: &Path) -> Option<Diagnosis> {
    let control = (CONTROL.to_owned(), seen.control);
    let gpus = seen.gpus.iter().map(|(minor, state)| (format!("nvidia{minor}"), *state));
    let bad: Vec<(String, NodeState)> =
        [control].into_iter().chain(gpus).filter(|(_, state)| *state != NodeState::Opens).collect();
    let (_, first) = bad.first()?;
    let same = bad.iter().filter(|(_, state)| state == first);
    let paths: Vec<String> = same.map(|(name, _)| dev.join(name).display().to_string()).collect();
    let paths = paths.join(", ");
    let (problem, remedy) = match first {
        NodeState::Opens => return None,
        NodeState::Absent => (format!("no device node {paths}"), remedy_of_absent(seen)),
        NodeState::Refused => (format!("the device cgroup refuses {paths}"), LOST_NODES.to_owned()),
        NodeState::NotPermitted => {
            let remedy = "run the agent as root, or permit its user to open them (NVreg_DeviceFileMode of the module nvidia)";
            (format!("no permission to open {paths}"), remedy.to_owned())
        }
        NodeState::Dead => {
            let remedy = "load the kernel module with `modprobe nvidia`; if it does not load, dmesg has the reason";
            (format!("there is no driver behind {paths}"), remedy.to_owned())
        }
        NodeState::Fails => (format!("{paths} cannot be opened"), LOG.to_owned()),
    };
    Some(Diagnosis { problem, remedy })
}

fn explain(error: &NvmlError, seen: &Sightings, dev: &Path, library: &Path) -> Diagnosis {
    let with = |problem: &str, remedy: String| Diagnosis { problem: format!("{problem} (NVML: {error})"), remedy };
    match error {
        NvmlError::LibRmVersionMismatch => {
            let module = seen.module_version.as_deref().unwrap_or("another version");
            let own = library_version(library).map_or_else(String::new, |version| format!(" has version {version}"));
            let problem = format!("the kernel module has version {module}, the library {}{own}", library.display());
            let remedy = "restart the machine, or stop all users of the GPUs and reload the kernel module; if the library is an old copy, \
                          such as that of a container image, set --nvml-lib to that of the installed driver";
            with(&problem, remedy.into())
        }
        NvmlError::DriverNotLoaded if !seen.module_loaded => {
            let remedy = "load it with `modprobe nvidia`; if it is not installed or does not load, install the NVIDIA driver of this kernel \
                          (dmesg has the reason)";
            with("the NVIDIA kernel module is not loaded", remedy.into())
        }
        NvmlError::DriverNotLoaded
        | NvmlError::OperatingSystem
        | NvmlError::NoPermission
        | NvmlError::Unknown
        | NvmlError::NotFound
        | NvmlError::UnexpectedVariant(_) => match nodes_problem(seen, dev) {
            Some(Diagnosis { problem, remedy }) => with(&problem, remedy),
            None if matches!(error, NvmlError::NoPermission) => {
                with("the driver refuses this user", "run the agent as root, or check seccomp and AppArmor profiles".into())
            }
            None if !seen.module_loaded => {
                with("the NVIDIA kernel module is not visible", "load it with `modprobe nvidia`, or set --path-procfs".into())
            }
            None => with("the driver fails", LOG.into()),
        },
        _ => with("the driver fails", LOG.into()),
    }
}

fn unlisted(count: u32, driven: Option<usize>, seen: &Sightings, dev: &Path) -> Diagnosis {
    let listed = match driven {
        Some(driven) if driven > 0 => format!("NVML lists {count} of the {driven} GPUs that the kernel module drives"),
        _ => "NVML lists no GPU".to_owned(),
    };
    match nodes_problem(seen, dev) {
        Some(Diagnosis { problem, remedy }) if driven != Some(0) => Diagnosis { problem: format!("{listed}: {problem}"), remedy },
        _ if driven.is_none_or(|driven| driven == 0) => {
            let remedy =
                "check whether the machine has one with `lspci -d 10de:`, and whether another driver, such as vfio-pci, has it";
            Diagnosis { problem: format!("{listed}, and the kernel module drives none"), remedy: remedy.into() }
        }
        _ => Diagnosis { problem: listed, remedy: LOG.into() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const GOOD: NodeState = NodeState::Opens;

    fn seen(control: NodeState, gpu: NodeState) -> Sightings {
        let module_version = Some("535.183.01".to_owned());
        Sightings { control, gpus: vec![(0, gpu)], host_has_control: false, module_loaded: true, module_version }
    }

    #[test]
    fn each_error_has_the_remedy_of_its_cause() {
        use NodeState::{Absent, Dead, NotPermitted, Refused};
        let unloaded = || Sightings { module_loaded: false, module_version: None, ..seen(Absent, Absent) };
        let in_container = || Sightings { host_has_control: true, ..seen(Absent, Absent) };
        for (error, seen, problem, remedy) in [
            (NvmlError::OperatingSystem, seen(Absent, GOOD), "no device node /dev/nvidiactl (NVML", "`nvidia-modprobe -c 255`"),
            (
                NvmlError::DriverNotLoaded,
                seen(Absent, Absent),
                "no device node /dev/nvidiactl, /dev/nvidia0",
                "`nvidia-modprobe -c 255 -c 0`",
            ),
            (NvmlError::OperatingSystem, in_container(), "no device node /dev/nvidiactl", "pass the host's /dev/nvidia*"),
            (NvmlError::Unknown, seen(Refused, Refused), "cgroup refuses /dev/nvidiactl, /dev/nvidia0", "restart the container"),
            (NvmlError::Unknown, seen(GOOD, Refused), "cgroup refuses /dev/nvidia0", "daemon-reload"),
            (NvmlError::Unknown, seen(GOOD, GOOD), "the driver fails", "dmesg"),
            (NvmlError::NoPermission, seen(NotPermitted, NotPermitted), "no permission to open /dev/nvidiactl", "as root"),
            (NvmlError::NoPermission, seen(GOOD, GOOD), "refuses this user", "seccomp"),
            (NvmlError::DriverNotLoaded, unloaded(), "kernel module is not loaded", "modprobe nvidia"),
            (NvmlError::DriverNotLoaded, seen(Dead, Dead), "no driver behind /dev/nvidiactl", "modprobe nvidia"),
            (
                NvmlError::LibRmVersionMismatch,
                seen(GOOD, GOOD),
                "module has version 535.183.01, the library",
                "restart the machine",
            ),
            (NvmlError::Timeout, seen(GOOD, GOOD), "the driver fails", "dmesg"),
        ] {
            let found = explain(&error, &seen, Path::new("/dev"), Path::new("/x/libnvidia-ml.so.1"));
            assert!(found.problem.contains(problem) && found.problem.contains("NVML: "), "{error:?} {seen:?}: {found}");
            assert!(found.remedy.contains(remedy), "{error:?} {seen:?}: {found}");
        }
    }

    #[test]
    fn gpus_that_nvml_does_not_list_are_explained() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let files = DriverFiles { dev: path("dev"), host_dev: None, driver: path("driver"), module: path("module") };
        fs::create_dir_all(path("dev")).unwrap();
        let text = |count| files.unlisted(count).map(|found| found.to_string()).unwrap_or_default();
        assert!(text(0).contains("NVML lists no GPU: no device node"), "{}", text(0));
        assert_eq!(text(2), "");
        for (n, minor) in [(0, 0), (1, 3)] {
            fs::create_dir_all(path(&format!("driver/gpus/0000:0{n}:00.0"))).unwrap();
            fs::write(path(&format!("driver/gpus/0000:0{n}:00.0/information")), format!("Model: x\nDevice Minor: \t {minor}\n"))
                .unwrap();
        }
        for node in [CONTROL, "nvidia0"] {
            fs::write(path(&format!("dev/{node}")), "").unwrap();
        }
        assert_eq!(text(2), "");
        assert!(files.drives_more_than(1) && !files.drives_more_than(2));
        let expect = format!(
            "NVML lists 1 of the 2 GPUs that the kernel module drives: no device node {}/nvidia3; ",
            path("dev").display()
        );
        assert!(text(1).starts_with(&expect) && text(1).contains("`nvidia-modprobe -c 3`"), "{}", text(1));
        fs::write(path("dev/nvidia3"), "").unwrap();
        assert!(text(1).ends_with(LOG), "{}", text(1));
        fs::remove_dir_all(path("driver/gpus")).unwrap();
        fs::create_dir_all(path("driver/gpus")).unwrap();
        assert!(text(0).contains("drives none"), "{}", text(0));
        assert_eq!(text(1), "");
    }

    #[test]
    fn versions_are_read_from_the_module_and_from_the_name_of_the_library() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("libnvidia-ml.so.550.54.14"), "").unwrap();
        symlink("libnvidia-ml.so.550.54.14", dir.path().join("libnvidia-ml.so.1")).unwrap();
        assert_eq!(library_version(&dir.path().join("libnvidia-ml.so.1")).as_deref(), Some("550.54.14"));
        assert_eq!(library_version(Path::new("/no/such/file")), None);
        let version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\nGCC version:  gcc 12.3.0";
        assert_eq!(version_in(version).as_deref(), Some("535.183.01"));
        assert_eq!(version_in("no version"), None);
    }

    #[test]
    fn nodes_are_opened_to_see_whether_they_can_be() {
        let dir = tempfile::tempdir().unwrap();
        let node = dir.path().join("nvidia0");
        assert_eq!(NodeState::of(&node), NodeState::Absent);
        fs::write(&node, "").unwrap();
        assert_eq!(NodeState::of(&node), NodeState::Opens);
    }
}
