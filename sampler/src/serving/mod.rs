//! Metrics of serving engines (vLLM, SGLang, Triton, TGI) in containers with GPUs, while a session that asks for them is recorded.
//!
//! ```text
//!  recorder --which sessions want them--> task of each container --each 5 s--> find (processes, sockets) -> read (HTTP) -> page
//!                                                                              each 15 s                  | sockets: made in its namespace
//!                                                       recorder <- core <- fact <-----------------------------------------------+
//! ```
//! A container has a task of its own, so that one that hangs delays no other. Nothing here is on the sampling path. Values are the engine's own claims: they are recorded, never exported as metrics. A reading that
//! fails is recorded with its reason, and the other engines are read nevertheless.

mod container;
pub mod find;
mod listeners;
mod page;
mod read;
pub mod sockets;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use sampler_core::identity::ContainerRecord;
use sampler_core::snapshot::Snapshot;
use sampler_core::units::ContainerKey;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::sleep;

use self::container::{ContainerReader, SharedReaders};
use self::find::EngineFinder;
use self::sockets::NamespaceSockets;
use crate::engine_rules::{self, EngineRules};
use crate::inbox::CoreSender;

pub const DEFAULT_EVERY: Duration = Duration::from_secs(5);
pub const MIN_EVERY: Duration = Duration::from_secs(1);
pub const MAX_EVERY: Duration = Duration::from_secs(60);
/// How often containers with GPUs are compared with those that have a task.
const FOLLOW_EVERY: Duration = Duration::from_secs(1);

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
            for rule in other.rules {
                if !union.rules.contains(&rule) {
                    union.rules.push(rule);
                }
            }
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

/// Reads engines while a session wants them. Ends with the agent.
pub async fn run(inputs: ServingInputs, mut requests: EngineRequests) {
    let shared = Arc::new(SharedReaders::new(inputs.finder, inputs.sockets));
    loop {
        let request = match requests.wait_for(Option::is_some).await {
            Ok(request) => request.clone(),
            Err(_) => return,
        };
        let Some(request) = request else { continue };
        let mut readers = ContainerTasks {
            core: inputs.core.clone(),
            shared: Arc::clone(&shared),
            every: request.every,
            rules: engine_rules::merged(request.rules.iter()).into(),
            tasks: JoinSet::new(),
            containers: HashMap::new(),
        };
        loop {
            readers.follow(&inputs.snapshot.load_full());
            tokio::select! {
                () = sleep(FOLLOW_EVERY) => {}
                changed = requests.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return,
                },
            }
        }
        // What they hold counts towards the limits of the next ones.
        readers.tasks.shutdown().await;
    }
}

/// The tasks for the present request, which end when it is dropped.
struct ContainerTasks {
    core: CoreSender,
    shared: Arc<SharedReaders>,
    every: Duration,
    rules: Arc<[Arc<EngineRules>]>,
    tasks: JoinSet<()>,
    containers: HashMap<ContainerKey, AbortHandle>,
}

impl ContainerTasks {
    /// One task for each container with a GPU.
    fn follow(&mut self, snapshot: &Snapshot) {
        let with_gpu = snapshot.containers.iter().filter(|container| container.gone.is_none() && !container.gpus.is_empty());
        let records: HashMap<ContainerKey, &Arc<ContainerRecord>> =
            with_gpu.map(|container| (container.record.key, &container.record)).collect();
        self.containers.retain(|key, task| {
            let is_present = records.contains_key(key);
            if !is_present {
                task.abort();
            }
            is_present
        });
        for (key, record) in records {
            if !self.containers.contains_key(&key) {
                let reader = ContainerReader::new(Arc::clone(&self.shared), Arc::clone(record), Arc::clone(&self.rules));
                self.containers.insert(key, self.tasks.spawn(reader.run(self.every, self.core.clone())));
            }
        }
        // Their ends are not kept.
        while self.tasks.try_join_next().is_some() {}
    }
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
        let all = [request(5, &rules[..1]), request(2, &rules[1..]), request(9, &[]), request(9, &rules[..1])];
        assert_eq!(EngineRequest::union(all.iter()), Some(request(2, &rules)));
        assert_eq!(EngineRequest::union(std::iter::empty()), None);
    }
}
