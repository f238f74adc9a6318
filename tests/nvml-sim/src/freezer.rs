//! Whether a process is frozen by its cgroup: `cgroup.events` of version 2, `freezer.state` of version 1.

use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;

/// The files that show whether the process is frozen.
pub struct ProcessFreezer {
    v2: Option<PathBuf>,
    v1: Option<PathBuf>,
}

/// Mount point of the hierarchy of this type that has this option.
fn mount(kind: &str, option: &str) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        let [_, point, of_kind, options, ..] = words[..] else { return None };
        (of_kind == kind && options.split(',').any(|o| o == option)).then(|| PathBuf::from(point))
    })
}

impl ProcessFreezer {
    /// The process must be in its cgroup already.
    pub fn new(pid: u32) -> anyhow::Result<Self> {
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).with_context(|| format!("--pid {pid}: its cgroups"))?;
        let path = |is_wanted: &dyn Fn(&str) -> bool| {
            let mut lines = cgroups.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
            lines.find(|(controllers, _)| is_wanted(controllers)).map(|(_, path)| path.trim_start_matches('/').to_owned())
        };
        let file = |mount: Option<PathBuf>, path: Option<String>, name| Some(mount?.join(path?).join(name));
        Ok(Self {
            v2: file(mount("cgroup2", "rw"), path(&str::is_empty), "cgroup.events"),
            v1: file(mount("cgroup", "freezer"), path(&|names| names.split(',').any(|name| name == "freezer")), "freezer.state"),
        })
    }

    pub fn is_frozen(&self) -> bool {
        let has_line = |file: &Option<PathBuf>, wanted: &str| {
            let text = file.as_ref().and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
            text.lines().any(|line| line == wanted)
        };
        has_line(&self.v2, "frozen 1") || has_line(&self.v1, "FROZEN")
    }
}
