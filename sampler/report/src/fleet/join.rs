//! What makes users of different nodes one user: an identity that does not depend on the node. Without one, a user stays with its node.

use sampler_core::cgroup_path::{HostUser, Job, Scheduler, parse};
use serde::Serialize;

use super::super::model::{UserKind, UserReport};

/// A field of containers and pods in session files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::EnumString, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum JoinField {
    Namespace,
    Pod,
    Container,
    Name,
    Image,
}

/// Session files do not record the owner of a pod. The workload is the nearest that they have.
const WORKLOAD: [JoinField; 3] = [JoinField::Namespace, JoinField::Container, JoinField::Image];

impl JoinField {
    pub fn name(self) -> &'static str {
        self.into()
    }

    fn value(self, user: &UserReport) -> &str {
        match self {
            JoinField::Namespace => &user.namespace,
            JoinField::Pod => &user.pod,
            JoinField::Container => &user.container,
            JoinField::Name => &user.name,
            JoinField::Image => &user.image,
        }
    }
}

/// Why the users of different nodes are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, strum::IntoStaticStr)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum JoinedBy {
    /// Scheduler and job id. Session files do not name the cluster.
    Job,
    /// Namespace, container and image.
    Workload,
    /// The fields that were requested.
    Requested,
    /// The name of a systemd unit.
    Unit,
    /// The id of a login's user.
    Login,
    /// The reason why the user is unknown.
    Reason,
    /// Not joined: the user is of one node.
    Node,
}

impl JoinedBy {
    pub fn description(self) -> &'static str {
        match self {
            JoinedBy::Job => "scheduler and job id; session files do not name the cluster, so give files of one cluster",
            JoinedBy::Workload => "namespace, container and image; session files do not name the owner of a pod: see --join-by",
            JoinedBy::Requested => "the fields of --join-by",
            JoinedBy::Unit => "name of the unit",
            JoinedBy::Login => "id of the user",
            JoinedBy::Reason => "reason why the user is not known",
            JoinedBy::Node => "not joined: nothing identifies it on other nodes",
        }
    }
}

pub struct Identity {
    pub key: Vec<String>,
    /// For people.
    pub name: String,
    pub joined_by: JoinedBy,
}

/// The job without what differs between nodes: step, task, daemon. An HTCondor slot and a Nomad allocation are on one node anyway.
fn job_name(job: &Job) -> String {
    let owner = match (job.scheduler, job.uid) {
        // Instances of different users count their own jobs.
        (Scheduler::Flux, Some(uid)) => format!("uid/{uid}/"),
        _ => String::new(),
    };
    format!("{owner}{}/{}", job.scheduler.name(), job.id)
}

impl Identity {
    pub fn new(node: &str, user: &UserReport, join_by: &[JoinField]) -> Self {
        let of = |joined_by, name: String| Identity { key: vec![name.clone()], name, joined_by };
        match user.kind {
            UserKind::Host => Self::of_node(node, user),
            UserKind::Unknown => of(JoinedBy::Reason, user.display_name()),
            UserKind::Unit => of(JoinedBy::Unit, user.display_name()),
            UserKind::Login => of(JoinedBy::Login, user.display_name()),
            UserKind::Job => match parse(&user.id).host_user {
                // Schedulers inside of containers may count from one each.
                Some(HostUser::Job(job)) if parse(&user.id).outer_container_id.is_none() => of(JoinedBy::Job, job_name(&job)),
                _ => Self::of_node(node, user),
            },
            UserKind::Container | UserKind::Pod => match parse(&user.id).outer_job {
                Some(job) if join_by.is_empty() => of(JoinedBy::Job, job_name(&job)),
                _ => Self::of_fields(user, join_by).unwrap_or_else(|| Self::of_node(node, user)),
            },
        }
    }

    fn of_node(node: &str, user: &UserReport) -> Self {
        Identity { key: vec![node.to_owned(), user.id.clone()], name: user.display_name(), joined_by: JoinedBy::Node }
    }

    /// `None` if one of the fields is not known.
    fn of_fields(user: &UserReport, join_by: &[JoinField]) -> Option<Self> {
        let (fields, joined_by) = match join_by {
            [] => (&WORKLOAD[..], JoinedBy::Workload),
            fields => (fields, JoinedBy::Requested),
        };
        let key: Vec<String> = fields.iter().map(|field| field.value(user).to_owned()).collect();
        if key.iter().any(String::is_empty) {
            return None;
        }
        let name = match joined_by {
            JoinedBy::Workload => format!("{}/{} ({})", user.namespace, user.container, user.image),
            _ => key.join("/"),
        };
        Some(Identity { key, name, joined_by })
    }
}
