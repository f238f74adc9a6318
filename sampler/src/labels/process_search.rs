//! The search of processes for runtimes, repeated for as long as containers lack labels.
//!
//! With thousands of processes an inspection of all takes a tenth of a second, so a search inspects those that are new since the last
//! one, and all of them every [`COMPLETE_EVERY`]. A process that is not a runtime is inspected in two searches: it may have been seen
//! between its fork and its exec.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use super::discover::HostPaths;
use super::root::Root;
use crate::observe::kernel::proc::pids;

/// Limits the effect of what a search does not inspect again: changed configuration files, an exec later than the second search, and a
/// PID that was reused.
const COMPLETE_EVERY: Duration = Duration::from_secs(30);
/// Inspections of a process that is not a runtime.
const INSPECTIONS: u8 = 2;

enum InspectedProcess {
    Runtime(HostPaths),
    /// Not a runtime, with the number of inspections.
    Other(u8),
}

/// One entry per living process.
#[derive(Default)]
pub struct ProcessSearch {
    inspected: HashMap<u32, InspectedProcess>,
    complete_at: Option<Instant>,
}

impl ProcessSearch {
    /// The paths of all runtimes, and the default ones. Blocking.
    pub fn find(&mut self, procfs: &Path, root: &Root) -> HostPaths {
        if self.complete_at.is_none_or(|at| at.elapsed() >= COMPLETE_EVERY) {
            (self.inspected, self.complete_at) = (HashMap::new(), Some(Instant::now()));
        }
        let mut earlier = std::mem::take(&mut self.inspected);
        let mut found = HostPaths::default();
        // If processes cannot be listed, the defaults remain.
        for pid in pids(procfs).unwrap_or_default() {
            let inspections = match earlier.remove(&pid) {
                Some(InspectedProcess::Other(inspections)) => inspections,
                Some(InspectedProcess::Runtime(paths)) => {
                    found.merge(&paths);
                    self.inspected.insert(pid, InspectedProcess::Runtime(paths));
                    continue;
                }
                None => 0,
            };
            let is_new = inspections < INSPECTIONS;
            let state = match is_new.then(|| HostPaths::of_process(procfs, pid, root)).flatten() {
                Some(paths) => {
                    found.merge(&paths);
                    InspectedProcess::Runtime(paths)
                }
                None => InspectedProcess::Other(inspections + u8::from(is_new)),
            };
            self.inspected.insert(pid, state);
        }
        found.merge(&HostPaths::from_files(root));
        found.with_defaults()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    /// A procfs with processes of root outside of containers.
    struct Procfs(tempfile::TempDir);

    impl Procfs {
        fn set(&self, pid: u32, comm: &str, args: &str) {
            let folder = self.0.path().join(pid.to_string());
            fs::create_dir_all(&folder).unwrap();
            let args = args.replace(' ', "\0");
            for (file, text) in
                [("comm", comm), ("cmdline", &args), ("cgroup", "0::/system.slice/x\n"), ("status", "Uid:\t0\t0\t0\t0\n")]
            {
                fs::write(folder.join(file), text).unwrap();
            }
        }

        fn roots(&self, search: &mut ProcessSearch) -> Vec<PathBuf> {
            let found = search.find(self.0.path(), &Root::new(Path::new("/no/such/root")));
            let mut roots: Vec<PathBuf> = found.docker_roots.into_iter().filter(|root| root.starts_with("/data")).collect();
            roots.sort();
            roots
        }
    }

    #[test]
    fn a_search_finds_new_runtimes_and_forgets_ended_ones() {
        let procfs = Procfs(tempfile::tempdir().unwrap());
        let mut search = ProcessSearch::default();
        procfs.set(1, "init\n", "init");
        procfs.set(2, "dockerd\n", "dockerd --data-root=/data/2");
        assert_eq!(procfs.roots(&mut search), [Path::new("/data/2")]);
        procfs.set(3, "sh\n", "sh");
        assert_eq!(procfs.roots(&mut search), [Path::new("/data/2")]);
        // The process was seen before its exec.
        procfs.set(3, "dockerd\n", "dockerd --data-root=/data/3");
        assert_eq!(procfs.roots(&mut search), [Path::new("/data/2"), Path::new("/data/3")]);
        fs::remove_dir_all(procfs.0.path().join("2")).unwrap();
        assert_eq!(procfs.roots(&mut search), [Path::new("/data/3")]);
        assert_eq!(search.inspected.len(), 2);
        // The third search after its start does not inspect this one; a complete one does.
        procfs.set(1, "dockerd\n", "dockerd --data-root=/data/1");
        assert_eq!(procfs.roots(&mut search), [Path::new("/data/3")]);
        search.complete_at = search.complete_at.and_then(|at| at.checked_sub(COMPLETE_EVERY));
        assert_eq!(procfs.roots(&mut search).len(), 2);
    }
}
