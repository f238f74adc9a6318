//! Label resolution without an agent: every source is queried once for one container.

use std::path::Path;
use std::sync::Arc;

use sampler_core::identity::ContainerRecord;
use sampler_labels::{ABSENT, ContainerLabels, Outcome, Query, Source, TargetId, can_resolve};

use super::activation::Presence;
use super::config::LabelConfig;
use super::discovered::Discovery;
use super::root::Root;
use super::source::reply::SourceReply;
use super::source::{self, LabelSources};
use super::view::{AttemptView, FILES};

pub struct OneShotLabels {
    pub labels: ContainerLabels,
    pub attempts: Vec<AttemptView>,
}

/// Queries every source that may know the container, also if other sources provide all labels: the output lists the result of each.
pub async fn resolve_once(config: &LabelConfig, record: Arc<ContainerRecord>) -> OneShotLabels {
    let root = Root::new(&config.rootfs);
    let sources = LabelSources::new(root, config.procfs.clone(), config.cgroups.clone());
    let Discovery { places, sockets } = Discovery::search(config, &sources.guard);
    sources.places.store(Arc::new(places));
    // The reason for not querying, if any.
    let mut targets: Vec<(Source, String, Option<String>)> = Vec::new();
    for source in config.sources.iter().filter(|s| !s.is_socket()) {
        sources.add(*source, Path::new(""));
        targets.push((*source, FILES.into(), None));
    }
    for socket in sockets {
        sources.add(socket.source, &socket.path);
        let reason = match socket.presence {
            Presence::Present(_) => None,
            Presence::Absent => Some(ABSENT.to_owned()),
            Presence::Dormant(dormant) => Some(dormant.to_string()),
        };
        targets.push((socket.source, socket.endpoint(), reason));
    }
    let sources = Arc::new(sources);
    let mut labels = ContainerLabels::from_path(&record);
    let mut attempts;
    // Repeated for sources that need the pod's UID, if another source provided it.
    loop {
        let before = labels.pod_uid.clone();
        let mut queries = Vec::new();
        for (n, (source, endpoint, reason)) in targets.iter().enumerate().filter(|(_, t)| can_resolve(t.0, &labels)) {
            let query = Query::unscheduled(Arc::clone(&record), TargetId(n as u16), *source, before.clone());
            let sources = Arc::clone(&sources);
            let task = match reason {
                None => Ok(tokio::spawn(async move { source::execute(sources, &query).await })),
                Some(reason) => Err(reason),
            };
            queries.push((*source, endpoint, task));
        }
        attempts = Vec::new();
        for (source, endpoint, task) in queries {
            let reply = match task {
                Ok(task) => task.await.unwrap_or_else(SourceReply::error),
                Err(reason) => SourceReply::not_queried(reason),
            };
            if let Outcome::Found(facts) = &reply.outcome {
                labels.merge(source, facts);
            }
            attempts.push(AttemptView::new(source, endpoint, &reply.to_attempt()));
        }
        if labels.pod_uid == before {
            break;
        }
    }
    attempts.extend(config.excluded_sources(&labels));
    OneShotLabels { labels, attempts }
}
