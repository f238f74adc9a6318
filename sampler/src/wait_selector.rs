//! Which processes are probed, as text.

use std::fmt;
use std::str::FromStr;

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
    Pid(u32),
}

#[derive(Debug, Error)]
#[error("invalid selection of processes {0:?}: expected all, container=NAME, namespace=NAME or pid=NUMBER")]
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

#[cfg(test)]
mod tests {
    use sampler_core::fact::{HostProcess, User};
    use sampler_core::units::{BootNs, Tgid};

    use super::*;

    #[test]
    fn selections_are_parsed_and_printed() {
        for text in ["all", "container=trainer", "namespace=default", "pid=7"] {
            assert_eq!(text.parse::<WaitSelector>().unwrap().to_string(), text);
        }
        for text in ["", "ALL", "container", "container=", "pid=0", "pid=x", "pid=-1", "image=x"] {
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
    }
}
