//! Reads the engines of one container, in a task of its own: nothing that its processes do delays another container.
//!
//! ```text
//!  each interval:  search, if due --at most 1 s--> read all engines together --at most 4 s--> facts
//!                     | has not ended: the engines known before are read, and its result is taken later
//! ```
//! A search can hang in the kernel, because a command line is read from the memory of a process, which a tenant can put on a file system of
//! its own. Then no other search of that container begins, so each container has at most one thread.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use sampler_core::identity::ContainerRecord;
use sampler_core::observation::{EngineFact, Observation};
use sampler_core::units::ContainerKey;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use super::find::{EngineFinder, FoundEngine};
use super::page::EngineValues;
use super::read::{self, ReadPageError};
use super::sockets::NamespaceSockets;
use crate::engine_rules::EngineRules;
use crate::error::display_chain;
use crate::inbox::{Closed, CoreSender};
use crate::observe::clock::boot_now;

/// Engines that are read on one node.
const MAX_ENGINES: usize = 64;
/// How often engines are searched for; at first, at once.
const FIND_EVERY: Duration = Duration::from_secs(15);
/// How long a search delays the readings of its container; it takes some milliseconds.
const SEARCH_PATIENCE: Duration = Duration::from_secs(1);
/// Searches that run at the same time: those that hang keep a thread each, of the 512 that tokio has for blocking work.
const MAX_SEARCHES: usize = 32;
/// For all ports of one engine that are tried in one round, so that the others of the container are read in time.
const ROUND_TIMEOUT: Duration = Duration::from_secs(4);
const MAX_PROBLEM_CHARS: usize = 200;

/// What the readers of all containers share, over all requests.
pub struct SharedReaders {
    finder: EngineFinder,
    sockets: Arc<NamespaceSockets>,
    /// One permit for each engine that is read.
    engines: Arc<Semaphore>,
    searched: Mutex<HashSet<ContainerKey>>,
}

/// The right to search a container, until the search has ended.
struct SearchSlot {
    shared: Arc<SharedReaders>,
    key: ContainerKey,
}

impl Drop for SearchSlot {
    fn drop(&mut self) {
        self.shared.searched.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

impl SharedReaders {
    pub fn new(finder: EngineFinder, sockets: NamespaceSockets) -> Self {
        let engines = Arc::new(Semaphore::new(MAX_ENGINES));
        Self { finder, sockets: Arc::new(sockets), engines, searched: Mutex::default() }
    }

    /// `None` while a search of this container runs, perhaps of an earlier request, and while too many run.
    fn slot(self: &Arc<Self>, key: ContainerKey) -> Option<SearchSlot> {
        let mut searched = self.searched.lock().unwrap_or_else(PoisonError::into_inner);
        let is_free = searched.len() < MAX_SEARCHES && searched.insert(key);
        is_free.then(|| SearchSlot { shared: Arc::clone(self), key })
    }
}

/// The engines of one container for the present request.
pub struct ContainerReader {
    shared: Arc<SharedReaders>,
    record: Arc<ContainerRecord>,
    rules: Arc<[Arc<EngineRules>]>,
    /// When the last search ended; `None` before the first.
    searched: Option<Instant>,
    search: Option<RunningSearch>,
    engines: Vec<EngineState>,
}

struct RunningSearch {
    task: JoinHandle<Vec<FoundEngine>>,
    is_late: bool,
}

/// An engine, and where its page was found.
struct EngineState {
    found: FoundEngine,
    settled: Option<SocketAddr>,
    /// Position of the address that is tried next: each once after a search, over several rounds if some hang, and then only the first.
    next: usize,
    _permit: OwnedSemaphorePermit,
}

impl ContainerReader {
    pub fn new(shared: Arc<SharedReaders>, record: Arc<ContainerRecord>, rules: Arc<[Arc<EngineRules>]>) -> Self {
        Self { shared, record, rules, searched: None, search: None, engines: Vec::new() }
    }

    /// Reads the engines each `every`, until the agent ends.
    pub async fn run(mut self, every: Duration, core: CoreSender) {
        loop {
            let next = Instant::now() + every;
            self.search().await;
            let sockets = &self.shared.sockets;
            // Together: one that hangs delays no other.
            let facts = join_all(self.engines.iter_mut().map(|engine| engine.read(sockets))).await;
            if let Err(Closed) = core.observe_all(facts.into_iter().map(Observation::Engine)) {
                return;
            }
            sleep_until(next).await;
        }
    }

    /// Searches for engines where that is due, and takes the result of a search that has ended.
    async fn search(&mut self) {
        if self.search.is_none() && self.searched.is_none_or(|searched| searched.elapsed() >= FIND_EVERY) {
            self.search = self.start_search();
        }
        let Some(search) = &mut self.search else { return };
        match timeout(SEARCH_PATIENCE, &mut search.task).await {
            Ok(found) => {
                (self.search, self.searched) = (None, Some(Instant::now()));
                // It fails only while the agent stops.
                if let Ok(found) = found {
                    self.replace(found);
                }
            }
            Err(_) if search.is_late => {}
            Err(_) => {
                search.is_late = true;
                let (container, seconds) = (&*self.record.cgroup_path, SEARCH_PATIENCE.as_secs());
                tracing::warn!(
                    container,
                    "the search for serving engines did not end within {seconds} s: a read of /proc hangs or is slow; new engines are \
                     read when it ends"
                );
            }
        }
    }

    fn start_search(&self) -> Option<RunningSearch> {
        let slot = self.shared.slot(self.record.key)?;
        let (record, rules) = (Arc::clone(&self.record), Arc::clone(&self.rules));
        // Reads /proc and cgroupfs.
        let task = tokio::task::spawn_blocking(move || slot.shared.finder.find(&record, &rules));
        Some(RunningSearch { task, is_late: false })
    }

    /// An engine that was known before keeps its address. Those above the limit of the node are not read.
    fn replace(&mut self, found: Vec<FoundEngine>) {
        let mut before = std::mem::take(&mut self.engines);
        for found in found {
            let same =
                |old: &EngineState| (old.found.pid, old.found.start, &old.found.rules) == (found.pid, found.start, &found.rules);
            if let Some(known) = before.iter().position(same) {
                let known = before.swap_remove(known);
                let settled = known.settled.filter(|address| found.addresses.contains(address));
                self.engines.push(EngineState { found, settled, next: 0, ..known });
            } else if let Ok(permit) = Arc::clone(&self.shared.engines).try_acquire_owned() {
                self.engines.push(EngineState { found, settled: None, next: 0, _permit: permit });
            }
        }
    }
}

impl EngineState {
    async fn read(&mut self, sockets: &Arc<NamespaceSockets>) -> EngineFact {
        let values = match timeout(ROUND_TIMEOUT, self.values(sockets)).await {
            Ok(values) => values,
            Err(_) => Err(format!("no page within {} s", ROUND_TIMEOUT.as_secs())),
        };
        let (values, problem) = match values {
            Ok(values) => (values, None),
            Err(problem) => (EngineValues::default(), Some(problem.chars().take(MAX_PROBLEM_CHARS).collect())),
        };
        let address = self.settled.or(self.found.addresses.first().copied());
        EngineFact {
            key: self.found.key,
            at: boot_now(),
            engine: self.found.rules.name.clone(),
            pid: self.found.pid,
            port: address.map_or(0, |address| address.port()),
            waiting: values.waiting,
            running: values.running,
            time_to_first_token: values.time_to_first_token,
            time_per_output_token: values.time_per_output_token,
            queue_time: values.queue_time,
            problem,
        }
    }

    /// The values at the address where they were found before, or else at the first that has any. An error is that of the most likely one.
    async fn values(&mut self, sockets: &Arc<NamespaceSockets>) -> Result<EngineValues, String> {
        if let Some(problem) = &self.found.problem {
            return Err(problem.clone());
        }
        if let Some(settled) = self.settled {
            return self.read_at(sockets, settled).await.map_err(|error| failure(settled, &error));
        }
        let untried = self.next.min(self.found.addresses.len());
        let addresses = match &self.found.addresses[untried..] {
            [] => self.found.addresses.get(..1).unwrap_or_default().to_vec(),
            untried => untried.to_vec(),
        };
        let mut first = None;
        for address in addresses {
            // Before the attempt, which may be given up.
            self.next += 1;
            match self.read_at(sockets, address).await {
                Ok(values) => {
                    self.settled = Some(address);
                    return Ok(values);
                }
                Err(error) => first = first.or_else(|| Some(failure(address, &error))),
            }
        }
        Err(first.unwrap_or_else(|| "it has no address".into()))
    }

    async fn read_at(&self, sockets: &Arc<NamespaceSockets>, address: SocketAddr) -> Result<EngineValues, ReadPageError> {
        read::read(sockets, (self.found.pid, self.found.start), address, &self.found.rules).await
    }
}

fn failure(address: SocketAddr, error: &ReadPageError) -> String {
    format!("port {}: {}", address.port(), display_chain(error))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use sampler_core::units::BootNs;

    use super::*;
    use crate::engine_rules::known;

    /// A reader of the container `/docker/x` with the process 7, below this folder.
    fn reader(root: &Path) -> ContainerReader {
        let (procfs, mount) = (root.join("proc"), root.join("cgroup"));
        std::fs::create_dir_all(procfs.join("7")).unwrap();
        std::fs::create_dir_all(mount.join("docker/x")).unwrap();
        std::fs::write(mount.join("docker/x/cgroup.procs"), "7\n").unwrap();
        let finder = EngineFinder { procfs: procfs.clone(), mounts: vec![mount] };
        let shared = Arc::new(SharedReaders::new(finder, NamespaceSockets { procfs, helper: None }));
        let record = ContainerRecord {
            key: ContainerKey(1),
            cgroup_path: "/docker/x".into(),
            identity: sampler_core::cgroup_path::parse("/docker/x"),
            created: BootNs(1),
            creation_seen: true,
        };
        ContainerReader::new(shared, Arc::new(record), known().into())
    }

    fn found(pid: u32, address: &str) -> FoundEngine {
        let addresses = vec![address.parse().unwrap()];
        let rules = Arc::clone(&known()[0]);
        FoundEngine { key: ContainerKey(1), rules, pid, start: BootNs(1), addresses, problem: None }
    }

    #[test]
    fn a_search_that_hangs_keeps_the_known_engines_and_is_not_repeated() {
        let root = tempfile::tempdir().unwrap();
        let mut reader = reader(root.path());
        let pipe = root.path().join("proc/7/cmdline");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        reader.replace(vec![found(7, "127.0.0.1:8000")]);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let begun = Instant::now();
            reader.search().await;
            reader.search().await;
            assert!(begun.elapsed() < 3 * SEARCH_PATIENCE, "{:?}", begun.elapsed());
            assert!(reader.search.as_ref().is_some_and(|search| search.is_late) && reader.engines.len() == 1);
            assert!(reader.shared.slot(ContainerKey(1)).is_none() && reader.shared.slot(ContainerKey(2)).is_some());
        });
        // The pipe ends, and with it the search, which finds no engine.
        drop(std::fs::OpenOptions::new().write(true).open(&pipe).unwrap());
        runtime.block_on(reader.search());
        assert!(reader.search.is_none() && reader.searched.is_some() && reader.engines.is_empty());
        assert!(reader.shared.slot(ContainerKey(1)).is_some());
        assert_eq!(reader.shared.engines.available_permits(), MAX_ENGINES);
    }

    #[test]
    fn searches_and_engines_of_a_node_are_bounded() {
        let root = tempfile::tempdir().unwrap();
        let mut reader = reader(root.path());
        let slots: Vec<SearchSlot> = (0..100).filter_map(|key| reader.shared.slot(ContainerKey(key))).collect();
        assert_eq!(slots.len(), MAX_SEARCHES);
        drop(slots);
        assert!(reader.shared.slot(ContainerKey(99)).is_some());
        reader.replace((0..100).map(|pid| found(pid, "127.0.0.1:8000")).collect());
        assert_eq!(reader.engines.len(), MAX_ENGINES);
    }

    #[test]
    fn an_engine_that_is_found_again_keeps_its_address_while_it_has_it() {
        let root = tempfile::tempdir().unwrap();
        let mut reader = reader(root.path());
        reader.replace(vec![found(7, "127.0.0.1:8000")]);
        reader.engines[0].settled = Some("127.0.0.1:8000".parse().unwrap());
        reader.replace(vec![found(7, "127.0.0.1:8000"), found(8, "127.0.0.1:8000")]);
        assert_eq!(reader.engines.iter().map(|engine| engine.settled.is_some()).collect::<Vec<_>>(), [true, false]);
        reader.replace(vec![found(7, "127.0.0.1:9000")]);
        assert_eq!(reader.engines[0].settled, None);
    }
}
