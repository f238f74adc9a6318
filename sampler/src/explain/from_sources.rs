//! Explanations without an agent: from the present content of /proc and cgroupfs, and from one query to every label source. There is no
//! history.

use std::io;
use std::path::Path;
use std::sync::Arc;

use sampler_core::identity::Identity;
use sampler_core::observation::CgroupFact;
use sampler_core::units::BootNs;
use sampler_report::short_id;
use thiserror::Error;

use super::build::{is_user, record_of};
use super::document::{Explanation, Origin};
use super::unknown::{no_container, why_unknown};
use crate::config::Config;
use crate::labels::{LabelConfig, resolve_once};
use crate::observe::kernel::layout::{Layout, layout};
use crate::observe::kernel::{cgroupfs, scan};
use crate::query::{KnownSubject, Subject, known};

#[derive(Debug, Error)]
pub enum ExplainError {
    /// The subject does not exist, or is ambiguous.
    #[error("{0}")]
    Unknown(String),
    /// The process cannot be read.
    #[error("{0}")]
    Process(String),
    #[error("cannot start the IO runtime")]
    Runtime(#[source] io::Error),
}

pub fn from_sources(config: &Config, subject: &Subject) -> Result<Explanation, ExplainError> {
    let layout = layout(&config.path_procfs);
    let known = match subject {
        Subject::Pid(pid) => process_in_proc(config, *pid)?,
        Subject::Cgroup(path) => KnownSubject { path: path.clone(), container: None, gone: None, histories: Vec::new() },
        Subject::Container(id) => {
            let mut found = containers(&layout, id);
            if found.iter().any(|(known, _)| known == id) {
                found.retain(|(known, _)| known == id);
            }
            let mut ids: Vec<&str> = found.iter().map(|(id, _)| id.as_str()).collect();
            ids.sort_unstable();
            ids.dedup();
            let (&[_], Some((_, path))) = (&ids[..], found.first()) else {
                let short_ids: Vec<String> = ids.iter().map(|id| short_id(id).to_owned()).collect();
                return Err(ExplainError::Unknown(no_container(id, &short_ids)));
            };
            KnownSubject { path: path.clone(), container: None, gone: None, histories: Vec::new() }
        }
    };
    let record = Arc::new(record_of(&known.path));
    let is_user = is_user(&record.identity);
    let is_under = |(_, mount): (u32, &Path)| mount.join(known.path.trim_start_matches('/')).is_dir();
    let exists = layout.mounts().any(is_under);
    // A container without a cgroup is queried, too: its files and its runtime's record may still exist.
    let resolved = if is_user {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ExplainError::Runtime)?;
        let resolved = runtime.block_on(resolve_once(&LabelConfig::new(config, &layout), record));
        // A file read that hangs in the kernel must not delay the output.
        runtime.shutdown_background();
        Some(resolved)
    } else {
        None
    };
    let (labels, tried) = resolved.map(|resolved| (resolved.labels, resolved.attempts)).unzip();
    let mut explanation = Explanation::new(subject, &known, labels.as_ref(), tried.unwrap_or_default(), &config.path_procfs);
    explanation.answered_by = if is_user { Origin::Sources } else { Origin::Path };
    explanation.exists = Some(exists);
    Ok(explanation)
}

fn process_in_proc(config: &Config, pid: u32) -> Result<KnownSubject, ExplainError> {
    let procfs = &config.path_procfs;
    let scanned = scan::of_processes(procfs, &layout(procfs), std::iter::once(pid));
    if let Some(problem) = scanned.problems.first() {
        return Err(ExplainError::Process(problem.clone()));
    }
    let mut identity = Identity::default();
    for fact in scanned.facts {
        identity.observe(fact);
    }
    known(&identity, &Subject::Pid(pid)).ok_or_else(|| ExplainError::Unknown(why_unknown(procfs, pid, None)))
}

/// Containers with this prefix of an id: their ids, with the paths of their cgroups.
fn containers(layout: &Layout, wanted: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (hierarchy, mount) in layout.mounts() {
        let mut collect = |folder: &Path, _: CgroupFact| {
            let path = format!("/{}", folder.strip_prefix(mount).unwrap_or(folder).display());
            let record = record_of(&path);
            let id = record.identity.container_id.filter(|id| record.cgroup_path == path && id.starts_with(wanted));
            found.extend(id.map(|id| (id, path)));
        };
        // A cgroup that cannot be read is missing from the result; the caller then reports that no container was found.
        let _complete = cgroupfs::walk(hierarchy, mount, BootNs(0), &mut |_, _| {}, &mut collect);
    }
    found
}
