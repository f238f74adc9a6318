//! The name of a podman container, from the command line of its monitor: a container of `podman run --rootfs` has no entry in the
//! storage's lists, and no image.
//!
//! The monitor is the parent of the container's first process. A tenant can start a program with that name, but not outside of its
//! container, so only a monitor outside of containers counts, and only for the container that it names.

use std::fs;
use std::path::Path;

use sampler_core::cgroup_path::Runtime;
use sampler_core::identity::ContainerRecord;
use sampler_labels::{Facts, Label};

use super::file;
use super::nested::parent;
use super::reply::SourceReply;
use crate::labels::discover::{in_a_container, option};
use crate::labels::runtime_config::MAX_TEXT_BYTES;

/// Processes of the container to try.
const MAX_PIDS: usize = 4;

/// `None` if the container has no such monitor. `pids`: the processes of the container.
pub fn query(procfs: &Path, pids: &[String], record: &ContainerRecord) -> Option<SourceReply> {
    let id = record.identity.container_id.as_deref()?;
    pids.iter().take(MAX_PIDS).find_map(|pid| {
        let folder = procfs.join(parent(&procfs.join(pid))?);
        let name = monitored(&folder, id).filter(|_| !in_a_container(&folder))?;
        let mut facts = Facts { runtime: Some(Runtime::Podman), pod_status_known: true, ..Facts::default() };
        facts.set(Label::Name, Some(&name));
        // Without a path: it would be an endpoint of its own for each container.
        Some(SourceReply::found(facts))
    })
}

/// `conmon -c <id> .. -n <name>`.
fn monitored(folder: &Path, id: &str) -> Option<String> {
    let is_conmon = fs::read_to_string(folder.join("comm")).is_ok_and(|comm| comm.starts_with("conmon"));
    let line = is_conmon.then(|| file::beginning(&folder.join("cmdline"), MAX_TEXT_BYTES).ok()).flatten()?;
    let args: Vec<String> = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    // What follows is the command that runs at the container's end.
    let args: Vec<&str> = args.iter().map(String::as_str).take_while(|word| *word != "--exit-command").collect();
    let name = option(&args, &["-n", "--name"]).filter(|name| !name.is_empty())?;
    // CRI-O's monitors have these names, and its sources have its labels.
    (option(&args, &["-c", "--cid"]) == Some(id) && !name.starts_with("k8s_")).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use sampler_core::cgroup_path::parse;
    use sampler_core::units::{BootNs, ContainerKey};

    use super::*;
    use crate::labels::source::pods::pids_of;
    use crate::labels::source::tests::{Files, check};

    #[test]
    fn a_container_without_storage_is_named_by_its_monitor() {
        let id = "a".repeat(64);
        let cgroup_path = format!("/machine.slice/libpod-{id}.scope");
        let identity = parse(&cgroup_path);
        let record = ContainerRecord { key: ContainerKey(1), cgroup_path, identity, created: BootNs(0), creation_seen: true };
        let found = |comm: &str, cgroup: &str, line: &str| {
            let files = Files::new(&[
                (&format!("cgroup/machine.slice/libpod-{id}.scope/cgroup.procs"), "7\n"),
                ("7/stat", "7 (a) b) S 6 7 7 0\n"),
                ("6/comm", comm),
                ("6/cgroup", &format!("0::{cgroup}\n")),
                ("6/cmdline", &line.replace("ID", &id).replace(' ', "\0")),
            ]);
            let root = files.host().path(Path::new("/"));
            query(&root, &pids_of(&[root.join("cgroup")], &record.cgroup_path), &record).unwrap_or_else(SourceReply::not_found)
        };
        let (own, line) = (format!("/machine.slice/libpod-conmon-{id}.scope"), "conmon --api-version 1 -c ID -u ID -n web -b /x");
        check(&found("conmon\n", &own, line), "-/-/- web -");
        check(&found("conmon\n", "/user.slice/user-0.slice/session-1.scope", line), "-/-/- web -");
        check(&found("conmon\n", &format!("/docker/{}", "b".repeat(64)), line), "not-found");
        check(&found("sh\n", &own, line), "not-found");
        check(&found("conmon\n", &own, "conmon -c other -n web"), "not-found");
        check(&found("conmon\n", &own, "conmon -c ID -n k8s_c_p_n_u_0"), "not-found");
        check(&found("conmon\n", &own, "conmon -c ID --exit-command podman -n web"), "not-found");
    }
}
