//! Jobs, units and login sessions as `explain` shows them.

use std::borrow::Cow;

use sampler_core::cgroup_path::{CgroupIdentity, HostUser, Job};
use sampler_labels::UserDetails;
use serde::{Deserialize, Serialize};

use super::document::Name;

#[derive(Clone, Serialize, Deserialize)]
pub struct JobJson {
    pub scheduler: Name,
    pub id: String,
    pub step: Option<String>,
    pub task: Option<String>,
    pub uid: Option<u32>,
    /// The node of one of several slurmd, the process and time of a job of LSF.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
}

#[derive(Serialize, Deserialize)]
pub struct UnitJson {
    pub name: String,
    pub uid: Option<u32>,
}

#[derive(Serialize, Deserialize)]
pub struct LoginJson {
    pub uid: u32,
    pub session: Option<String>,
}

/// The container around a job, or the job around a container.
#[derive(Serialize, Deserialize)]
pub struct OuterJson {
    pub kind: Name,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job: Option<JobJson>,
}

/// What the processes of a job, unit or session say about it.
#[derive(Serialize, Deserialize)]
pub struct DetailsJson {
    /// Where the id in the path is not the number of the job.
    pub job_id: Option<String>,
    pub job_name: Option<String>,
    pub uid: Option<u32>,
    pub user_name: Option<String>,
    pub partition: Option<String>,
}

/// What a path has besides its container.
#[derive(Default, Serialize, Deserialize)]
pub struct HostUsersJson {
    /// As in metrics.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job: Option<JobJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<UnitJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub login: Option<LoginJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub details: Option<DetailsJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outer: Option<OuterJson>,
}

impl From<&UserDetails> for DetailsJson {
    fn from(details: &UserDetails) -> Self {
        let UserDetails { job_id, job_name, uid, user_name, partition } = details.clone();
        Self { job_id, job_name, uid, user_name, partition }
    }
}

impl From<&Job> for JobJson {
    fn from(job: &Job) -> Self {
        let Job { scheduler, id, step, task, uid, instance } = job.clone();
        Self { scheduler: scheduler.name().into(), id, step, task, uid, instance }
    }
}

impl HostUsersJson {
    /// `identity` is that of the path.
    pub fn new(identity: &CgroupIdentity) -> Self {
        let mut json = Self::default();
        match &identity.host_user {
            Some(HostUser::Job(job)) => json.job = Some(job.into()),
            Some(HostUser::Unit(unit)) => json.unit = Some(UnitJson { name: unit.name.clone(), uid: unit.uid }),
            Some(HostUser::Login(login)) => json.login = Some(LoginJson { uid: login.uid, session: login.session.clone() }),
            None => {}
        }
        let (container_id, pod_uid) = (identity.outer_container_id.clone(), identity.pod_uid.clone());
        json.outer = match (&identity.outer_job, &identity.host_user) {
            (Some(job), _) => {
                Some(OuterJson { kind: Cow::Borrowed("job"), container_id: None, pod_uid: None, job: Some(job.into()) })
            }
            (None, Some(_)) if container_id.is_some() || pod_uid.is_some() => {
                let kind = if container_id.is_some() { "container" } else { "pod" };
                Some(OuterJson { kind: Cow::Borrowed(kind), container_id, pod_uid, job: None })
            }
            (None, _) => None,
        };
        json
    }

    /// (name, value) of each line for a person.
    pub fn lines(&self) -> Vec<(&'static str, String)> {
        let with_uid = |text: String, uid: Option<u32>| uid.map_or(text.clone(), |uid| format!("{text}, uid {uid}"));
        let job_text = |job: &JobJson| {
            let parts = [("step", &job.step), ("task", &job.task)];
            let parts: String = parts.iter().filter_map(|(name, value)| Some(format!(", {name} {}", value.as_ref()?))).collect();
            with_uid(format!("{} {}{parts}", job.scheduler, job.id), job.uid)
        };
        let login_text = |login: &LoginJson| {
            let session = login.session.as_ref().map_or(String::new(), |session| format!(", session {session}"));
            format!("uid {}{session}", login.uid)
        };
        let outer_text = |outer: &OuterJson| {
            let id = outer.job.as_ref().map(job_text).or_else(|| outer.container_id.clone()).or_else(|| outer.pod_uid.clone());
            format!("{} {}", outer.kind, id.unwrap_or_default())
        };
        let details_text = |details: &DetailsJson| {
            let uid = details.uid.map(|uid| uid.to_string());
            let parts = [
                ("number", &details.job_id),
                ("name", &details.job_name),
                ("owner", &details.user_name),
                ("uid", &uid),
                ("partition", &details.partition),
            ];
            let known = parts.iter().filter_map(|(name, value)| Some(format!("{name} {}", value.as_ref()?)));
            known.collect::<Vec<_>>().join(", ")
        };
        let lines = [
            ("user", self.user.clone()),
            ("job", self.job.as_ref().map(job_text)),
            ("unit", self.unit.as_ref().map(|unit| with_uid(unit.name.clone(), unit.uid))),
            ("login", self.login.as_ref().map(login_text)),
            ("details", self.details.as_ref().map(details_text)),
            ("outer", self.outer.as_ref().map(outer_text)),
        ];
        lines.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }
}
