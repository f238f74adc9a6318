//! Reads processes from /proc, where the task iterator is not available: start times to 10 ms, cgroups by path.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use procfs::ProcError;
use procfs::process::{Process, Stat};
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use sampler_core::observation::{CgroupMembership, ProcessSeen};
use sampler_core::units::{BootNs, CgroupKey, Tgid};

use super::cgroup_id;
use super::layout::Layout;
use crate::observe::clock::boot_now;

/// The unit of start times in /proc.
const CLOCK_TICK_NS: u64 = 10_000_000;
/// `PF_EXITING` in the flags of /proc/<pid>/stat.
const EXITING: u32 = 0x4;

/// The cgroup id of each directory that a walk has found.
pub type Directories = HashMap<PathBuf, CgroupKey>;

pub fn pids(procfs_root: &Path) -> io::Result<Vec<u32>> {
    let mut pids = Vec::new();
    for entry in fs::read_dir(procfs_root)? {
        pids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    Ok(pids)
}

/// Whether the process exited between listing and reading.
fn gone(error: &ProcError) -> bool {
    match error {
        ProcError::NotFound(_) => true,
        ProcError::Io(error, _) => error.raw_os_error() == Some(libc::ESRCH),
        _ => false,
    }
}

fn exiting(stat: &Stat) -> bool {
    stat.flags & EXITING != 0 || ended(stat)
}

fn ended(stat: &Stat) -> bool {
    matches!(stat.state, 'Z' | 'X')
}

fn stat(folder: &Path) -> Result<Option<Stat>, String> {
    match Process::new_with_root(folder.to_path_buf()).and_then(|process| process.stat()) {
        Ok(stat) => Ok(Some(stat)),
        Err(error) if gone(&error) => Ok(None),
        Err(error) => Err(format!("{}: {error}", folder.display())),
    }
}

/// The folder of a living thread, with the start time of the thread group: the leader, or another thread if the leader has exited.
pub fn living_thread(folder: &Path) -> Result<Option<(PathBuf, BootNs)>, String> {
    thread_that_is_not(exiting, folder)
}

/// The start time of the process in /proc, if any of its threads has not ended. Unlike in [`read_process`], an exiting process counts as
/// alive, because its exit event may still be delivered.
fn start_time(procfs_root: &Path, pid: u32) -> Result<Option<BootNs>, String> {
    Ok(thread_that_is_not(ended, &procfs_root.join(pid.to_string()))?.map(|(_, start)| start))
}

fn thread_that_is_not(over: fn(&Stat) -> bool, folder: &Path) -> Result<Option<(PathBuf, BootNs)>, String> {
    let Some(leader) = stat(folder)? else { return Ok(None) };
    let start = BootNs(leader.starttime.saturating_mul(CLOCK_TICK_NS));
    if !over(&leader) {
        return Ok(Some((folder.to_path_buf(), start)));
    }
    // The group is alive while any other thread runs.
    let tasks = folder.join("task");
    for thread in pids(&tasks).unwrap_or_default() {
        let folder = tasks.join(thread.to_string());
        if stat(&folder)?.is_some_and(|stat| !over(&stat)) {
            return Ok(Some((folder, start)));
        }
    }
    Ok(None)
}

/// Whether this process has not ended. A process that /proc does not show (hidepid, or a read error) has ended only if its PID is
/// free.
pub fn is_alive(procfs_root: &Path, tgid: Tgid, start: BootNs) -> bool {
    match start_time(procfs_root, tgid.0) {
        Ok(Some(now)) => now.0 / CLOCK_TICK_NS == start.0 / CLOCK_TICK_NS,
        Ok(None) | Err(_) => !is_free(tgid.0) && !is_zombie(procfs_root, tgid.0),
    }
}

/// Whether no process has the PID; a zombie counts as a process.
pub fn is_free(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_none_or(|pid| test_kill_process(pid) == Err(Errno::SRCH))
}

/// A field of `/proc/<pid>/status`, by its name with the colon. Read as bytes, because a process can set any name for itself.
fn status(procfs_root: &Path, pid: u32, field: &str) -> Option<String> {
    let status = fs::read(procfs_root.join(pid.to_string()).join("status")).ok()?;
    let value = status.split(|b| *b == b'\n').find_map(|line| line.strip_prefix(field.as_bytes()))?;
    Some(String::from_utf8_lossy(value).trim().to_owned())
}

/// The process that a thread belongs to. /proc does not list threads but serves their folders.
pub fn thread_group(procfs_root: &Path, pid: u32) -> Option<u32> {
    status(procfs_root, pid, "Tgid:")?.parse().ok()
}

/// Whether the process has ended and is not yet reaped.
pub fn is_zombie(procfs_root: &Path, pid: u32) -> bool {
    status(procfs_root, pid, "State:").is_some_and(|state| state.starts_with(['Z', 'X']))
}

/// `None` if the process does not exist or has ended. A process without readable cgroups has no membership; other read failures are
/// errors.
pub fn read_process(procfs_root: &Path, pid: u32, layout: &Layout, known: &Directories) -> Result<Option<ProcessSeen>, String> {
    let began = boot_now();
    let Some((folder, start)) = living_thread(&procfs_root.join(pid.to_string()))? else { return Ok(None) };
    let membership = memberships(&folder).ok().and_then(|lines| membership(&lines, layout, known));
    Ok(Some(ProcessSeen { tgid: Tgid(pid), start, coarse_start: true, began, membership }))
}

/// Hierarchy and path of each line. Paths are bytes, because the name of a cgroup need not be UTF-8.
pub fn memberships(folder: &Path) -> io::Result<Vec<(u32, Vec<u8>)>> {
    let text = fs::read(folder.join("cgroup"))?;
    let line = |line: &[u8]| {
        let mut fields = line.splitn(3, |b| *b == b':');
        let hierarchy = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        Some((hierarchy, fields.nth(1)?.to_vec()))
    };
    Ok(text.split(|b| *b == b'\n').filter_map(line).collect())
}

/// The directory of a path in `/proc/<pid>/cgroup`; `None` for a path outside this cgroup namespace.
pub fn directory(mount: &Path, path: &[u8]) -> Option<PathBuf> {
    let path = Path::new(OsStr::from_bytes(path.strip_prefix(b"/")?));
    let inside = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    inside.then(|| if path.as_os_str().is_empty() { mount.to_path_buf() } else { mount.join(path) })
}

fn membership(lines: &[(u32, Vec<u8>)], layout: &Layout, known: &Directories) -> Option<CgroupMembership> {
    let find = |hierarchy: u32, mount: &Path| {
        let (_, path) = lines.iter().find(|(id, _)| *id == hierarchy)?;
        let directory = directory(mount, path)?;
        // Created after the walk.
        known.get(&directory).map(|key| key.id).or_else(|| cgroup_id::of(&directory).ok())
    };
    let v2_id = match &layout.v2 {
        Some(mount) => find(0, mount)?,
        // Where v2 is not mounted, every process is in its root.
        None => cgroup_id::of_root(),
    };
    let (v1_hierarchy, v1_id) = match &layout.v1 {
        Some((_, id, mount)) => (*id, find(*id, mount)?),
        None => (0, 0),
    };
    Some(CgroupMembership { v2_id, v1_id, v1_hierarchy })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_stay_below_the_mount() {
        let check = |path: &[u8], expect: Option<&str>| {
            assert_eq!(directory(Path::new("/m"), path), expect.map(PathBuf::from), "{}", path.escape_ascii());
        };
        check(b"/", Some("/m"));
        check(b"/docker/x", Some("/m/docker/x"));
        check(b"/../x", None);
        check(b"docker", None);
        let odd = directory(Path::new("/m"), b"/a\xff").expect("bytes");
        assert_eq!(odd.as_os_str().as_bytes(), b"/m/a\xff");
    }

    #[test]
    fn the_own_process_is_found_and_an_unused_pid_is_not() {
        let layout = super::super::layout::layout(Path::new("/proc"));
        let us = read_process(Path::new("/proc"), std::process::id(), &layout, &Directories::new()).unwrap().unwrap();
        assert_eq!(us.tgid.0, std::process::id());
        assert!(us.coarse_start && us.start.0 > 0 && us.start.0 <= us.began.0);
        assert_eq!(read_process(Path::new("/proc"), u32::MAX, &layout, &Directories::new()), Ok(None));
    }

    #[test]
    fn a_reused_pid_is_not_alive() {
        let proc = Path::new("/proc");
        let us = Tgid(std::process::id());
        let start = start_time(proc, us.0).unwrap().expect("this process runs");
        assert!(is_alive(proc, us, start));
        assert!(
            is_alive(proc, us, BootNs(start.0 + CLOCK_TICK_NS - 1)),
            "start times of the kernel are finer than those of /proc"
        );
        assert!(!is_alive(proc, us, BootNs(start.0 - CLOCK_TICK_NS)), "an earlier process with the same PID");
        let hides_all = tempfile::tempdir().unwrap();
        assert!(is_alive(hides_all.path(), us, start), "a process that /proc does not show may be alive");
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        let mut zombie = false;
        for _ in 0..500 {
            zombie = is_zombie(proc, pid);
            if zombie {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(zombie, "`true` ends within 5 s");
        assert_eq!(start_time(proc, pid), Ok(None), "a zombie has ended");
        assert!(!is_alive(proc, Tgid(pid), start), "a zombie is not alive");
        child.wait().unwrap();
        assert!(!is_alive(proc, Tgid(pid), start));
        assert!(!is_alive(hides_all.path(), Tgid(pid), start));
    }

    /// Bytes of the name of a process.
    const MAX_NAME: usize = 15;
    const FIELDS_AFTER_STATE: usize = 49;

    /// Files of a process, which sets some of their content itself: of `stat`, its name. The rest is the kernel's.
    #[test]
    fn fuzz_proc_files() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("7");
        fs::create_dir(&folder).unwrap();
        devkit::fuzz(file!(), "proc_files", move |bytes| {
            for name in ["cgroup", "status"] {
                fs::write(folder.join(name), bytes).unwrap();
            }
            let name = &bytes[..bytes.len().min(MAX_NAME)];
            let fields = "0 ".repeat(FIELDS_AFTER_STATE);
            fs::write(folder.join("stat"), [b"7 (", name, b") S ", fields.as_bytes()].concat()).unwrap();
            assert!(living_thread(&folder).unwrap().is_some_and(|(thread, start)| thread == folder && start == BootNs(0)));
            let lines = memberships(&folder).unwrap();
            assert!(lines.iter().map(|(_, path)| path.len()).sum::<usize>() <= bytes.len());
            for (_, path) in &lines {
                let directory = directory(Path::new("/m"), path);
                assert!(
                    directory
                        .is_none_or(|directory| directory.starts_with("/m") && !directory.to_string_lossy().contains("/../"))
                );
            }
            let _any = (thread_group(root.path(), 7), is_zombie(root.path(), 7));
        });
    }
}
