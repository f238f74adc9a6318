//! Without an agent: everybody is asked about one container, once, now.

use std::path::Path;
use std::sync::Arc;

use sampler_core::identity::ContainerRecord;
use sampler_labels::{ABSENT, ContainerLabels, Outcome, Query, Source, TargetId, can_know};

use super::config::LabelConfig;
use super::discovered::Discovery;
use super::root::Root;
use super::source::answer::Answer;
use super::source::{self, LabelSources};
use super::view::{FILES, TriedView};

pub struct Once {
    pub labels: ContainerLabels,
    pub tried: Vec<TriedView>,
}

/// Asks every source that may know it, also when others have told everything: the question is who can tell what.
pub async fn once(config: &LabelConfig, record: Arc<ContainerRecord>) -> Once {
    let root = Root::new(&config.rootfs);
    let sources = LabelSources::new(root, config.procfs.clone(), config.cgroups.clone());
    let Discovery { places, sockets } = Discovery::look(config);
    sources.places.store(Arc::new(places));
    let mut targets: Vec<(Source, String, bool)> = Vec::new();
    for source in config.sources.iter().filter(|s| !s.is_socket()) {
        sources.add(*source, Path::new(""));
        targets.push((*source, FILES.into(), true));
    }
    for socket in sockets {
        sources.add(socket.source, &socket.path);
        targets.push((socket.source, socket.endpoint(), socket.seen.is_some()));
    }
    let sources = Arc::new(sources);
    let mut labels = ContainerLabels::from_path(&record);
    let mut tried;
    // Again for those who need a pod's UID that another one told.
    loop {
        let before = labels.pod_uid.clone();
        let mut questions = Vec::new();
        for (n, (source, endpoint, present)) in targets.iter().enumerate().filter(|(_, t)| can_know(t.0, &labels)) {
            let ask = Query::once(Arc::clone(&record), TargetId(n as u16), *source, before.clone());
            let sources = Arc::clone(&sources);
            let question = present.then(|| tokio::spawn(async move { source::put(sources, &ask).await }));
            questions.push((*source, endpoint, question));
        }
        tried = Vec::new();
        for (source, endpoint, question) in questions {
            let answer = match question {
                Some(question) => question.await.unwrap_or_else(Answer::error),
                None => Answer::not_asked(ABSENT),
            };
            if let Outcome::Found(facts) = &answer.outcome {
                labels.merge(source, facts);
            }
            tried.push(TriedView::new(source, endpoint, &answer.tried()));
        }
        if labels.pod_uid == before {
            break;
        }
    }
    tried.extend(config.left_out(&labels));
    Once { labels, tried }
}
