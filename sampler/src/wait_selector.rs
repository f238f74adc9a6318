//! Which processes are probed, as text.

use std::fmt;
use std::str::FromStr;

use sampler_core::cgroup_path::HostUser;
use sampler_core::pipeline::GpuProcess;
use sampler_labels::{ContainerLabels, Label};
use thiserror::Error;

/// Shorter prefixes of container ids match too many containers.
const LEAST_ID: usize = 4;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WaitSelector {
    All,
    /// Id (or its first characters), name, pod or container of a container; also a job or unit, by its short name.
    Container(String),
    Namespace(String),
    /// Id of a job at its scheduler, alone or as its short name has it: `4711`, `slurm/4711`.
    Job(String),
    Pid(u32),
}

/// What a selection may be, for messages.
pub const SELECTIONS: &str = "all, container=NAME, namespace=NAME, job=ID or pid=NUMBER";

#[derive(Debug, Error)]
#[error("invalid selection of processes {0:?}: expected {SELECTIONS}")]
pub struct SelectorError(String);

impl FromStr for WaitSelector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        let invalid = || SelectorError(text.to_owned());
        if text == "all" {
            return Ok(Self::All);
        }
        match text.split_once('=') {
            Some((_, "")) | None => Err(invalid()),
            Some(("container", name)) => Ok(Self::Container(name.to_owned())),
            Some(("namespace", name)) => Ok(Self::Namespace(name.to_owned())),
            Some(("job", id)) => Ok(Self::Job(id.to_owned())),
            Some(("pid", pid)) => pid.parse().ok().filter(|pid| *pid > 0).map(Self::Pid).ok_or_else(invalid),
            Some(_) => Err(invalid()),
        }
    }
}

impl fmt::Display for WaitSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Container(name) => write!(f, "container={name}"),
            Self::Namespace(name) => write!(f, "namespace={name}"),
            Self::Job(id) => write!(f, "job={id}"),
            Self::Pid(pid) => write!(f, "pid={pid}"),
        }
    }
}

impl WaitSelector {
    /// `labels`: those of the user of the process; `None` for a process outside containers.
    pub fn selects(&self, process: &GpuProcess, labels: Option<&ContainerLabels>) -> bool {
        let text = |label| labels.map_or("", |labels| labels.text(label));
        match self {
            Self::All => true,
            Self::Pid(pid) => process.tgid.0 == *pid,
            Self::Namespace(name) => text(Label::Namespace) == name,
            Self::Job(id) => labels.is_some_and(|labels| is_job(labels, id)),
            Self::Container(name) => {
                let by_label = [Label::Pod, Label::Container, Label::Name].into_iter().any(|label| text(label) == name);
                let by_id = |labels: &ContainerLabels| {
                    let id = &*labels.container_id;
                    &*labels.id == name || id == name || (name.len() >= LEAST_ID && id.starts_with(name.as_str()))
                };
                by_label || labels.is_some_and(by_id)
            }
        }
    }
}

fn is_job(labels: &ContainerLabels, id: &str) -> bool {
    let Some(HostUser::Job(job)) = &labels.host_user else { return false };
    // The id that the scheduler shows where its cgroups have another one.
    let shown = labels.details.as_ref().and_then(|details| details.job_id.as_deref());
    job.id == id || &*labels.container_id == id || shown == Some(id)
}

#[cfg(test)]
mod tests {
    use sampler_core::cgroup_path::parse;
    use sampler_core::fact::{HostProcess, User};
    use sampler_core::identity::ContainerRecord;
    use sampler_core::units::{BootNs, ContainerKey, Tgid};

    use super::*;

    #[test]
    fn selections_are_parsed_and_printed() {
        for text in ["all", "container=trainer", "namespace=default", "job=slurm/4711", "pid=7"] {
            assert_eq!(text.parse::<WaitSelector>().unwrap().to_string(), text);
        }
        for text in ["", "ALL", "container", "container=", "pid=0", "pid=x", "pid=-1", "job=", "image=x"] {
            let error = text.parse::<WaitSelector>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")) && error.contains("pid=NUMBER"), "{error}");
        }
    }

    #[test]
    fn a_process_outside_containers_is_selected_by_pid_or_with_all() {
        let (tgid, start) = (Tgid(7), BootNs(1));
        let process = GpuProcess { tgid, start, user: User::Host(HostProcess { pid: 7, start }) };
        let selected = |text: &str| text.parse::<WaitSelector>().unwrap().selects(&process, None);
        assert_eq!(["all", "pid=7", "pid=8", "container=x", "namespace=x"].map(selected), [true, true, false, false, false]);
        assert!(!selected("job=x"));
    }

    #[test]
    fn a_job_is_selected_by_its_id_or_short_name() {
        let cgroup_path = "/system.slice/slurmstepd.scope/job_4711/step_0".to_owned();
        let identity = parse(&cgroup_path);
        let record = ContainerRecord { key: ContainerKey(1), cgroup_path, identity, created: BootNs(1), creation_seen: true };
        let labels = ContainerLabels::from_path(&record);
        let process = GpuProcess { tgid: Tgid(7), start: BootNs(1), user: User::Container(record.key) };
        let selected = |text: &str| text.parse::<WaitSelector>().unwrap().selects(&process, Some(&labels));
        let selections = ["job=4711", "job=slurm/4711", "container=slurm/4711", "job=471", "job=pbs/4711", "container=4711"];
        assert_eq!(selections.map(selected), [true, true, true, false, false, false]);
    }
}
