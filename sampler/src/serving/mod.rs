//! Metrics of serving engines (vLLM, SGLang, Triton, TGI) in containers with GPUs, while a session that asks for them is recorded.
//!
//! ```text
//!  recorder --which sessions want them--> task --each 5 s--> find (processes, sockets) -> read (HTTP) -> parse -> fact -> core -> recorder
//!                                                            each 15 s                    | sockets: made in the container's namespace
//! ```
//! Nothing here is on the sampling path. Values are the engine's own claims: they are recorded, never exported as metrics. A reading that
//! fails is recorded with its reason, and the other engines are read nevertheless.

pub mod find;
mod listeners;
mod page;
mod read;
pub mod sockets;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::future::join_all;
use sampler_core::identity::ContainerRecord;
use sampler_core::observation::{EngineFact, Observation};
use sampler_core::snapshot::Snapshot;
use sampler_core::units::ContainerKey;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use self::find::{EngineFinder, FoundEngine, MAX_ENGINES};
use self::page::EngineValues;
use self::read::ReadPageError;

use self::sockets::NamespaceSockets;
use crate::engine_rules::{self, EngineRules};
use crate::error::display_chain;
use crate::inbox::{Closed, CoreSender};
use crate::observe::clock::boot_now;

pub const DEFAULT_EVERY: Duration = Duration::from_secs(5);
pub const MIN_EVERY: Duration = Duration::from_secs(1);
pub const MAX_EVERY: Duration = Duration::from_secs(60);
/// How often engines are searched for in a container; in a new one, at once.
const FIND_EVERY: Duration = Duration::from_secs(15);
/// For all ports of one engine that are tried in one round, so that the others are read in time.
const ROUND_TIMEOUT: Duration = Duration::from_secs(4);
const MAX_PROBLEM_CHARS: usize = 200;

/// What sessions want to have recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineRequest {
    pub every: Duration,
    /// In addition to the known rules.
    pub rules: Vec<Arc<EngineRules>>,
}

pub type EngineRequests = watch::Receiver<Option<Arc<EngineRequest>>>;

impl EngineRequest {
    /// One request that serves all of these; `None` without any.
    pub fn union<'a>(all: impl Iterator<Item = &'a EngineRequest>) -> Option<EngineRequest> {
        all.cloned().reduce(|mut union, other| {
            union.every = union.every.min(other.every);
            union.rules.extend(other.rules);
            union.rules.dedup();
            union
        })
    }
}

/// The connections of the task.
pub struct ServingInputs {
    pub core: CoreSender,
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    pub finder: EngineFinder,
    pub sockets: NamespaceSockets,
}

/// An engine, and where its page was found.
struct EngineState {
    found: FoundEngine,
    settled: Option<SocketAddr>,
    /// Position of the address that is tried next: each once after a search, over several rounds if some hang, and then only the first.
    next: usize,
}

struct ContainerEngines {
    searched: Instant,
    engines: Vec<EngineState>,
}

/// Reads engines while a session wants them. Ends with the agent.
pub async fn run(inputs: ServingInputs, mut requests: EngineRequests) {
    let (finder, sockets) = (Arc::new(inputs.finder), Arc::new(inputs.sockets));
    loop {
        let request = match requests.wait_for(Option::is_some).await {
            Ok(request) => request.clone(),
            Err(_) => return,
        };
        let Some(request) = request else { continue };
        let mut readers = EngineReaders {
            finder: Arc::clone(&finder),
            sockets: Arc::clone(&sockets),
            rules: engine_rules::merged(request.rules.iter()).into(),
            containers: HashMap::new(),
        };
        loop {
            let next = Instant::now() + request.every;
            let facts = readers.round(&inputs.snapshot.load_full()).await;
            if let Err(Closed) = inputs.core.observe_all(facts.into_iter().map(Observation::Engine)) {
                return;
            }
            tokio::select! {
                () = sleep_until(next) => {}
                changed = requests.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return,
                },
            }
        }
    }
}

/// The engines that are read for the present request.
struct EngineReaders {
    finder: Arc<EngineFinder>,
    sockets: Arc<NamespaceSockets>,
    rules: Arc<[Arc<EngineRules>]>,
    containers: HashMap<ContainerKey, ContainerEngines>,
}

impl EngineReaders {
    async fn round(&mut self, snapshot: &Snapshot) -> Vec<EngineFact> {
        self.search(snapshot).await;
        let mut readings = Vec::new();
        for container in self.containers.values_mut() {
            let left = MAX_ENGINES.saturating_sub(readings.len());
            for engine in container.engines.iter_mut().take(left) {
                readings.push(engine.read(&self.sockets));
            }
        }
        // Together: one that hangs delays no other.
        join_all(readings).await
    }

    /// Searches for engines where that is due.
    async fn search(&mut self, snapshot: &Snapshot) {
        let with_gpu = snapshot.containers.iter().filter(|container| container.gone.is_none() && !container.gpus.is_empty());
        let records: HashMap<ContainerKey, Arc<ContainerRecord>> =
            with_gpu.map(|container| (container.record.key, Arc::clone(&container.record))).collect();
        self.containers.retain(|key, _| records.contains_key(key));
        let is_due = |key: &ContainerKey| self.containers.get(key).is_none_or(|known| known.searched.elapsed() >= FIND_EVERY);
        let due: Vec<Arc<ContainerRecord>> = records.into_values().filter(|record| is_due(&record.key)).collect();
        if due.is_empty() {
            return;
        }
        let (finder, rules) = (Arc::clone(&self.finder), Arc::clone(&self.rules));
        // Reads /proc and cgroupfs.
        let search = move || due.iter().map(|record| (record.key, finder.find(record, &rules))).collect::<Vec<_>>();
        // Fails only while the agent stops.
        let Ok(found) = tokio::task::spawn_blocking(search).await else { return };
        for (key, found) in found {
            let before = self.containers.remove(&key).map_or_else(Vec::new, |container| container.engines);
            let engines = found.into_iter().map(|found| EngineState::new(found, &before)).collect();
            self.containers.insert(key, ContainerEngines { searched: Instant::now(), engines });
        }
    }
}

impl EngineState {
    /// `before`: the engines that the container had at the last search.
    fn new(found: FoundEngine, before: &[EngineState]) -> Self {
        let same =
            |old: &&EngineState| (old.found.pid, old.found.start, &old.found.rules) == (found.pid, found.start, &found.rules);
        let settled = before.iter().find(same).and_then(|old| old.settled).filter(|address| found.addresses.contains(address));
        Self { found, settled, next: 0 }
    }

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
            return read_values(sockets, &self.found, settled).await.map_err(|error| failure(settled, &error));
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
            match read_values(sockets, &self.found, address).await {
                Ok(values) => {
                    self.settled = Some(address);
                    return Ok(values);
                }
                Err(error) => first = first.or_else(|| Some(failure(address, &error))),
            }
        }
        Err(first.unwrap_or_else(|| "it has no address".into()))
    }
}

fn failure(address: SocketAddr, error: &ReadPageError) -> String {
    format!("port {}: {}", address.port(), display_chain(error))
}

async fn read_values(
    sockets: &Arc<NamespaceSockets>,
    engine: &FoundEngine,
    address: SocketAddr,
) -> Result<EngineValues, ReadPageError> {
    let page = read::read(sockets, (engine.pid, engine.start), address, &engine.rules.path).await?;
    let rules = Arc::clone(&engine.rules);
    // A large page takes milliseconds, which would delay requests.
    let parsed = tokio::task::spawn_blocking(move || page::parse(&page, &rules));
    let values = parsed.await.map_err(|_| ReadPageError::Stopping)?;
    if values.is_empty() { Err(ReadPageError::NoMetrics(engine.rules.name.clone())) } else { Ok(values) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_union_of_requests_has_the_shortest_interval_and_all_rules() {
        let rules: Vec<Arc<EngineRules>> =
            ["a=/metrics,x=waiting", "b=/metrics,x=waiting"].map(|text| Arc::new(text.parse().unwrap())).into();
        let request =
            |seconds, rules: &[Arc<EngineRules>]| EngineRequest { every: Duration::from_secs(seconds), rules: rules.to_vec() };
        let all = [request(5, &rules[..1]), request(2, &rules[1..]), request(9, &[])];
        assert_eq!(EngineRequest::union(all.iter()), Some(request(2, &rules)));
        assert_eq!(EngineRequest::union(std::iter::empty()), None);
    }
}
