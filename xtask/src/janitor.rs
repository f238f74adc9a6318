//! Removes what a verb created, however the verb ends: with success, an error, a panic, Ctrl-C, even SIGKILL.
//!
//! Another process of this binary, in a session of its own, gets the name of each thing **before** it is created. When the pipe to that
//! process closes, for any reason, it removes everything in reverse order. So there is one way of cleaning up, also after success. It
//! removes only what was named, and a shared folder only if it is empty.
//!
//! ```text
//!   verb --- "cgroup /sys/fs/cgroup/.." ---> janitor
//!        --- "tree /tmp/.." --------------->
//!        --- (end of file) ---------------->  tree, cgroup --> exit 0, or 1 with the remaining things on stderr
//! ```

use crate::{
    sys,
    tools::{progress, wait_until},
};
use anyhow::{Context, Result, bail};
use devkit::{http::Server, process::start_time};
use std::{
    env, fs,
    io::{self, BufRead as _, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    time::Duration,
};

pub const VERB: &str = "janitor";

/// A cgroup can be removed a moment after its last process has ended.
const CGROUP_PATIENCE: Duration = Duration::from_secs(5);
/// dockerd gives its containers 15 s at its own end.
const ENGINE_PATIENCE: Duration = Duration::from_secs(30);

/// One thing to remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leftover {
    /// A cgroup that the verb created, with the processes in it.
    Cgroup(PathBuf),
    /// Cgroups of tests of any run that has ended.
    TestCgroups,
    /// A folder that other processes may use by then: removed only if it is empty.
    Folder(PathBuf),
    /// A folder that the verb created, with its contents and all mounts below it.
    Tree(PathBuf),
    Container {
        socket: PathBuf,
        name: String,
    },
    Image {
        socket: PathBuf,
        name: String,
    },
    /// A process group, with the start time of its leader.
    Group {
        pid: u32,
        start: u64,
    },
    /// A dockerd with data and state in `dir`.
    Engine {
        pid: u32,
        start: u64,
        dir: PathBuf,
    },
}

impl Leftover {
    fn encode(&self) -> Result<String> {
        let path = |path: &Path| path.to_str().map(str::to_owned).context("a path that is not UTF-8");
        let words = match self {
            Self::Cgroup(dir) => vec!["cgroup".into(), path(dir)?],
            Self::TestCgroups => vec!["test-cgroups".into()],
            Self::Folder(dir) => vec!["folder".into(), path(dir)?],
            Self::Tree(dir) => vec!["tree".into(), path(dir)?],
            Self::Container { socket, name } => vec!["container".into(), path(socket)?, name.clone()],
            Self::Image { socket, name } => vec!["image".into(), path(socket)?, name.clone()],
            Self::Group { pid, start } => vec!["group".into(), pid.to_string(), start.to_string()],
            Self::Engine { pid, start, dir } => vec!["engine".into(), pid.to_string(), start.to_string(), path(dir)?],
        };
        if words.iter().any(|word| word.contains(['\t', '\n'])) {
            bail!("a name with a tab or line break in it: {self:?}");
        }
        Ok(words.join("\t"))
    }

    fn decode(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split('\t').collect();
        Some(match *words.as_slice() {
            ["cgroup", dir] => Self::Cgroup(dir.into()),
            ["test-cgroups"] => Self::TestCgroups,
            ["folder", dir] => Self::Folder(dir.into()),
            ["tree", dir] => Self::Tree(dir.into()),
            ["container", socket, name] => Self::Container { socket: socket.into(), name: name.into() },
            ["image", socket, name] => Self::Image { socket: socket.into(), name: name.into() },
            ["group", pid, start] => Self::Group { pid: pid.parse().ok()?, start: start.parse().ok()? },
            ["engine", pid, start, dir] => Self::Engine { pid: pid.parse().ok()?, start: start.parse().ok()?, dir: dir.into() },
            _ => return None,
        })
    }

    fn remove(&self) -> Result<()> {
        match self {
            Self::Cgroup(dir) => remove_cgroup(dir),
            Self::TestCgroups => remove_test_cgroups(),
            Self::Folder(dir) => {
                // Not empty or busy: in use by another process.
                let _in_use = fs::remove_dir(dir);
                Ok(())
            }
            Self::Tree(dir) => remove_tree(dir),
            Self::Container { socket, name } => delete(socket, &format!("/containers/{name}?force=1&v=1")),
            Self::Image { socket, name } => delete(socket, &format!("/images/{name}?force=1")),
            Self::Group { pid, start } => {
                if start_time(*pid).is_none_or(|now| now == *start) {
                    sys::kill(-(*pid as i32), libc::SIGKILL);
                }
                Ok(())
            }
            Self::Engine { pid, start, dir } => remove_engine(*pid, *start, dir),
        }
    }
}

/// The verb's end of the pipe. Dropping it removes everything.
pub struct Cleanup {
    janitor: Child,
    pipe: Option<ChildStdin>,
}

impl Cleanup {
    pub fn start() -> Result<Self> {
        // Not by its path, where a newer build may be by now.
        let mut command = Command::new("/proc/self/exe");
        command.arg(VERB).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut janitor = sys::own_session(&mut command).spawn().context("starting the janitor")?;
        let pipe = janitor.stdin.take();
        Ok(Self { janitor, pipe })
    }

    /// Must be called before the thing is created.
    pub fn will_remove(&mut self, what: &Leftover) -> Result<()> {
        let mut pipe = self.pipe.as_ref().context("the janitor's pipe is open until the end")?;
        // One write, so that no line is ever incomplete.
        pipe.write_all(format!("{}\n", what.encode()?).as_bytes()).context("the janitor has ended")
    }

    /// A new empty folder below the system's temporary one.
    pub fn temporary(&mut self, name: &str) -> Result<PathBuf> {
        let dir = env::temp_dir().join(format!("{name}-{}", std::process::id()));
        if dir.exists() {
            bail!("{} already exists: remove it", dir.display());
        }
        self.will_remove(&Leftover::Tree(dir.clone()))?;
        fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
        Ok(dir)
    }

    /// Creates `dir` and its missing parents, each to be removed if it is empty.
    pub fn folders(&mut self, dir: &Path) -> Result<()> {
        let missing: Vec<&Path> = dir.ancestors().take_while(|dir| !dir.exists()).collect();
        for dir in missing.into_iter().rev() {
            self.will_remove(&Leftover::Folder(dir.to_path_buf()))?;
            match fs::create_dir(dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(error).with_context(|| dir.display().to_string());
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        self.pipe = None;
        match self.janitor.wait() {
            Ok(status) if status.success() => {}
            Ok(status) => progress(format_args!("not everything could be removed ({status})")),
            Err(error) => progress(format_args!("the janitor: {error}")),
        }
    }
}

pub fn verb() -> Result<()> {
    sys::ignore_signals();
    let lines: Vec<String> = io::stdin().lock().lines().map_while(Result::ok).collect();
    let mut left = 0;
    for line in lines.iter().rev() {
        let removed = Leftover::decode(line).context("invalid line").and_then(|leftover| leftover.remove());
        if let Err(problem) = removed {
            eprintln!("xtask: left behind: {}: {problem:#}", line.replace('\t', " "));
            left += 1;
        }
    }
    if left > 0 {
        bail!("{left} left behind");
    }
    Ok(())
}

fn not_found_is_ok(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn remove_cgroup(dir: &Path) -> Result<()> {
    let mut last = Ok(());
    wait_until(CGROUP_PATIENCE, || {
        for pid in fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines() {
            // 0 is a process of another pid namespace; kill(0) would hit the own group.
            if let Ok(pid @ 1..) = pid.parse() {
                sys::kill(pid, libc::SIGKILL);
            }
        }
        last = not_found_is_ok(fs::remove_dir(dir));
        last.is_ok()
    });
    last.with_context(|| dir.display().to_string())
}

/// Prefix of the cgroups of the tests' `CgroupTree`; the pid of the test process follows.
const TEST_CGROUP: &str = "gpu-sampler-test-";

/// A killed test run leaves containers without a source of names, which would disturb the next run.
pub fn remove_test_cgroups() -> Result<()> {
    for mount in mounts().into_iter().filter(Mount::is_cgroup) {
        for dir in cgroups_named(&mount.point, TEST_CGROUP, 0) {
            let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let pid = name.strip_prefix(TEST_CGROUP).and_then(|rest| rest.split('-').next()?.parse().ok());
            if pid.is_some_and(|pid| start_time(pid).is_none()) {
                remove_cgroups(&dir)?;
            }
        }
    }
    Ok(())
}

/// Removes a cgroup with those below it.
fn remove_cgroups(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path())?;
        }
    }
    remove_cgroup(dir)
}

fn remove_tree(dir: &Path) -> Result<()> {
    for mount in mounts().iter().rev().filter(|mount| mount.point.starts_with(dir)) {
        sys::unmount(&mount.point).with_context(|| mount.point.display().to_string())?;
    }
    let mut last = Ok(());
    // A process that was killed a moment ago may still write a file.
    wait_until(CGROUP_PATIENCE, || {
        last = not_found_is_ok(fs::remove_dir_all(dir));
        last.is_ok()
    });
    last.with_context(|| dir.display().to_string())
}

fn delete(socket: &Path, path: &str) -> Result<()> {
    let response = Server::unix(socket).request("DELETE", path, "", &[])?;
    if response.status != 404 {
        response.ok()?;
    }
    Ok(())
}

fn remove_engine(pid: u32, start: u64, dir: &Path) -> Result<()> {
    let is_alive = || start_time(pid) == Some(start);
    if is_alive() {
        sys::kill(pid as i32, libc::SIGTERM);
        if !wait_until(ENGINE_PATIENCE, || !is_alive()) {
            sys::kill(pid as i32, libc::SIGKILL);
        }
    }
    // The rest finds something only if dockerd could not stop its containers.
    for stray in processes_naming(dir) {
        sys::kill(stray, libc::SIGKILL);
    }
    let ids = fs::read_dir(dir.join("data/containers")).into_iter().flatten().flatten();
    for id in ids.filter_map(|entry| entry.file_name().into_string().ok()) {
        for root in mounts().into_iter().filter(Mount::is_cgroup) {
            for cgroup in cgroups_named(&root.point, &id, CGROUP_DEPTH) {
                remove_cgroup(&cgroup)?;
            }
        }
    }
    Ok(())
}

/// Deep enough for `/docker/<id>` and for `/system.slice/docker-<id>.scope`.
const CGROUP_DEPTH: usize = 4;

fn cgroups_named(dir: &Path, part: &str, depth: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if depth > 0 {
            found.extend(cgroups_named(&entry.path(), part, depth - 1));
        }
        if entry.file_name().to_string_lossy().contains(part) {
            found.push(entry.path());
        }
    }
    found
}

/// Processes with the folder on their command line, as containerd and its shims have it.
fn processes_naming(dir: &Path) -> Vec<i32> {
    let Some(dir) = dir.to_str() else { return Vec::new() };
    let own = std::process::id() as i32;
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| *pid != own)
        .filter(|pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains(dir)))
        .collect()
}

pub struct Mount {
    pub point: PathBuf,
    pub kind: String,
    /// The superblock's options; on cgroup v1 the controllers.
    pub options: String,
}

impl Mount {
    pub fn is_cgroup(&self) -> bool {
        matches!(self.kind.as_str(), "cgroup" | "cgroup2")
    }
}

/// In the order of mounting.
pub fn mounts() -> Vec<Mount> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines().filter_map(mount).collect()
}

fn mount(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut right = right.split(' ');
    Some(Mount {
        point: left.split(' ').nth(4)?.replace("\\040", " ").into(),
        kind: right.next()?.into(),
        options: right.nth(1)?.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoded_lines_decode_to_the_same() {
        for leftover in [
            Leftover::Cgroup("/sys/fs/cgroup/a".into()),
            Leftover::Folder("/run/x y".into()),
            Leftover::Tree("/tmp/t".into()),
            Leftover::Container { socket: "/s".into(), name: "n".into() },
            Leftover::Image { socket: "/s".into(), name: "n:1".into() },
            Leftover::Group { pid: 4, start: 9 },
            Leftover::Engine { pid: 4, start: 9, dir: "/tmp/e".into() },
        ] {
            assert_eq!(Leftover::decode(&leftover.encode().unwrap()), Some(leftover));
        }
        assert!(Leftover::Tree("/tmp/\n".into()).encode().is_err());
        assert_eq!(Leftover::decode("tree"), None);
    }

    #[test]
    fn mount_lines_are_parsed() {
        let mount = mount("36 25 0:31 / /sys/fs/cgroup/pids rw,nosuid shared:9 - cgroup cgroup rw,pids").unwrap();
        assert_eq!(mount.point, Path::new("/sys/fs/cgroup/pids"));
        assert_eq!((mount.kind.as_str(), mount.options.as_str()), ("cgroup", "rw,pids"));
        assert!(super::mount("").is_none());
    }
}
