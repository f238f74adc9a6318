//! Finds and removes what an engine that did not end orderly leaves on the machine: processes, mounts, cgroups.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::wait_for;

/// The path of an installed program; daemons' folders may be missing on PATH.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = search_path();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file());
    found.with_context(|| format!("{name} is not installed; `cargo xtask setup` installs what the tests need"))
}

pub fn search_path() -> String {
    format!("{}:/usr/local/sbin:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

/// Pids of programs with a name that begins like this and with the folder on their command line.
pub fn processes(program: &str, dir: &Path) -> Vec<u32> {
    let dir = dir.to_string_lossy();
    let ours = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        let name = line.split('\0').next().and_then(|word| Path::new(word).file_name()?.to_str()).unwrap_or_default();
        name.starts_with(program) && line.contains(&*dir)
    };
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(ours).collect()
}

pub fn kill(pid: u32, signal: i32) {
    // Pid 0 would be the own process group.
    if pid != 0 {
        // SAFETY: plain integers.
        unsafe { libc::kill(pid as i32, signal) };
    }
}

/// Mount points and their kinds of file system, in the order of mounting.
fn mounts() -> Vec<(PathBuf, String)> {
    let text = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mount = |line: &str| {
        let mut words = line.split(' ').skip(1);
        Some((words.next()?.into(), words.next()?.to_owned()))
    };
    text.lines().filter_map(mount).collect()
}

pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    mounts().into_iter().map(|(point, _)| point).filter(|point| point.starts_with(dir)).collect()
}

pub fn unmount_below(dir: &Path) {
    for point in mounts_below(dir).into_iter().rev() {
        let Ok(path) = std::ffi::CString::new(point.to_string_lossy().as_bytes()) else { continue };
        // SAFETY: a NUL-terminated string that lives through the call.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    }
}

/// The directories of this cgroup, in every hierarchy that has it.
pub fn cgroups(path: &str) -> Vec<PathBuf> {
    let points = mounts().into_iter().filter(|(_, kind)| kind == "cgroup" || kind == "cgroup2");
    points.map(|(point, _)| point.join(path.trim_start_matches('/'))).filter(|dir| dir.is_dir()).collect()
}

fn end(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)?.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        end(&entry.path())?;
    }
    for pid in std::fs::read_to_string(dir.join("cgroup.procs"))?.lines().filter_map(|pid| pid.parse().ok()) {
        kill(pid, libc::SIGKILL);
    }
    std::fs::remove_dir(dir)
}

/// Kills the processes of the cgroup and removes it in every hierarchy, with empty cgroups above it.
pub fn remove_cgroup(path: &str) {
    let gone = wait_for(path, Duration::from_secs(10), || {
        Ok(cgroups(path).iter().all(|dir| end(dir).is_ok() || !dir.exists()).then_some(()))
    });
    if let Err(error) = gone {
        eprintln!("the cgroup {error:#}");
    }
    for above in Path::new(path).ancestors().skip(1).filter(|above| above.parent().is_some()) {
        for dir in cgroups(&above.to_string_lossy()) {
            let _others_are_in_it = std::fs::remove_dir(dir);
        }
    }
}
