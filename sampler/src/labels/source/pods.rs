//! Files of the kubelet about its pods, for any runtime: log folders and links, and the mounts of a pod's processes.
//!
//! Names found in paths have the lowest authority. A pod's log folder has the names of its containers but not their ids, so the name of
//! a container comes only from a link with its id or from its own mounts.

use std::fs;
use std::path::{Path, PathBuf};

use sampler_labels::{Facts, Label};

use super::file;
use super::host_files::HostFiles;
use super::reply::{SourceReply, first_found};

const CONTAINER_LOGS: &str = "/var/log/containers";
/// The longest file name: the name of a longer link is truncated at its end, where the id is.
const NAME_MAX: usize = 255;
/// Fewer digits of a truncated id could match another container.
const MIN_ID_DIGITS: usize = 12;
/// Processes of a container to try; any of them shows its mounts.
const MAX_PIDS: usize = 4;
/// Child cgroups to try: a runtime's or systemd's, of which a container has one or two.
const MAX_CHILDREN: usize = 64;
/// A longer list of mounts is truncated.
const MAX_MOUNTINFO_BYTES: u64 = 4 << 20;

/// `<pod logs>/<namespace>_<pod>_<uid>/`, and `/var/log/containers/<pod>_<namespace>_<container>-<id>.log`.
pub fn logs(files: &HostFiles, pod_logs: &[PathBuf], id: &str, pod_uid: Option<&str>) -> SourceReply {
    let mut facts = Facts::default();
    let pods =
        pod_uid.map_or(Ok(None), |uid| first_found(pod_logs.iter().map(|folder| pod_folder(files, folder, uid, &mut facts))));
    let folder = pods.as_ref().ok().copied().flatten().or(pod_logs.first().map(PathBuf::as_path));
    let folder = folder.unwrap_or(Path::new(CONTAINER_LOGS));
    let links = container_link(files, id, &mut facts);
    match (facts == Facts::default(), pods.and(links)) {
        (true, Err(detail)) => SourceReply::error(detail).at(folder),
        (true, Ok(())) => SourceReply::not_in(&[pod_logs, &[PathBuf::from(CONTAINER_LOGS)]].concat()),
        // A result of one of the two is used even if the other failed.
        (false, _) if facts.labels[Label::Container as usize].is_some() => {
            SourceReply::found(facts).at(Path::new(CONTAINER_LOGS))
        }
        (false, _) => SourceReply::found(facts).at(folder),
    }
}

/// The folder, if it has the pod.
fn pod_folder<'a>(files: &HostFiles, folder: &'a Path, uid: &str, facts: &mut Facts) -> Result<Option<&'a Path>, String> {
    let list = files.list(&files.path(folder))?;
    let matching = list.names().find_map(|name| name.strip_suffix(uid)?.strip_suffix('_')?.split_once('_'));
    if let Some((namespace, pod)) = matching {
        facts.set(Label::Namespace, Some(namespace));
        facts.set(Label::Pod, Some(pod));
        facts.pod_uid = Some(uid.to_owned());
    }
    Ok(matching.map(|_| folder))
}

fn container_link(files: &HostFiles, id: &str, facts: &mut Facts) -> Result<(), String> {
    // A pod itself has no link.
    if id.is_empty() {
        return Ok(());
    }
    let list = files.list(&files.path(Path::new(CONTAINER_LOGS)))?;
    for name in list.names() {
        let Some(stem) = name.strip_suffix(".log") else { continue };
        let Some((names, digits)) = stem.rsplit_once('-') else { continue };
        let cut = name.len() == NAME_MAX && digits.len() >= MIN_ID_DIGITS && id.starts_with(digits);
        if digits != id && !cut {
            continue;
        }
        let [pod, namespace, container] = names.split('_').collect::<Vec<_>>()[..] else { continue };
        // In a truncated name, apparent digits of the id may be the end of the container's name; the link's target is complete.
        let path = list.path(name);
        let target =
            if cut { fs::read_link(&path).map_err(|error| format!("{}: {error}", path.display()))? } else { PathBuf::new() };
        if cut && target.parent().and_then(Path::file_name).is_none_or(|folder| folder != container) {
            continue;
        }
        facts.set(Label::Pod, Some(pod));
        facts.set(Label::Namespace, Some(namespace));
        facts.set(Label::Container, Some(container));
        return Ok(());
    }
    Ok(())
}

/// The kubelet mounts `<kubelet root>/pods/<uid>/containers/<name>/<hash>` as the termination log of each container.
///
/// A tenant can create such mounts. So they are used only if the cgroup of the container names the pod, and only for that pod.
pub fn mountinfo(procfs: &Path, pids: &[String], pod_uid: Option<&str>) -> SourceReply {
    let Some(uid) = pod_uid else { return SourceReply::not_queried("the cgroup path has no pod UID") };
    let namespace = |pid: &str| fs::read_link(procfs.join(pid).join("ns/mnt")).ok();
    // The host's mounts are those of all pods, and there may be thousands.
    let mut seen = vec![namespace("1")];
    let mut problem = None;
    for pid in pids.iter().take(MAX_PIDS) {
        let namespace = namespace(pid);
        // Processes of one namespace have the same mounts. If it cannot be read, the mounts may still be readable.
        if namespace.is_some() && seen.contains(&namespace) {
            continue;
        }
        seen.push(namespace);
        let path = procfs.join(pid).join("mountinfo");
        let text = file::beginning(&path, MAX_MOUNTINFO_BYTES);
        match text.map(|text| mount_facts(&String::from_utf8_lossy(&text), uid)) {
            Ok(Some(facts)) => return SourceReply::found(facts).at(&path),
            Ok(None) => {}
            // The process ended; another one may still run.
            Err(error) if file::is_absent(&error) || error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(error) => problem = Some(SourceReply::error(format!("{}: {error}", path.display())).at(&path)),
        }
    }
    problem.unwrap_or_else(|| {
        SourceReply::not_found_because(if pids.is_empty() { "it has no running process" } else { "it has no mount of its pod" })
    })
}

/// The processes of the cgroup, or, if it has none, of its direct children, where crun and systemd place them.
pub fn pids_of(mount_points: &[PathBuf], cgroup: &str) -> Vec<String> {
    let pids_below = |mount: &PathBuf| {
        let folder = mount.join(cgroup.trim_start_matches('/'));
        // A cgroup that was removed has neither.
        let pids = pids_in(&folder).ok()?;
        Some(if pids.is_empty() {
            child_folders(&folder).iter().flat_map(|child| pids_in(child).unwrap_or_default()).collect()
        } else {
            pids
        })
    };
    mount_points.iter().filter_map(pids_below).find(|pids| !pids.is_empty()).unwrap_or_default()
}

pub fn pids_in(folder: &Path) -> std::io::Result<Vec<String>> {
    let text = fs::read_to_string(folder.join("cgroup.procs"))?;
    Ok(text.lines().filter(|pid| *pid != "0").map(str::to_owned).collect())
}

/// Of the dozens of entries of a cgroup, those that are cgroups.
pub fn child_folders(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .take(MAX_CHILDREN)
        .map(|entry| entry.path())
        .collect()
}

fn mount_facts(text: &str, uid: &str) -> Option<Facts> {
    // 36 35 98:0 /root/within/its/file/system /mount/point ...
    for root in text.lines().filter_map(|line| line.split(' ').nth(3)) {
        let Some((_, rest)) = root.split_once("/pods/") else { continue };
        // The kubelet's mounts precede those that the container requests.
        if let [pod, "containers", name, _hash] = rest.split('/').collect::<Vec<_>>()[..]
            && pod == uid
        {
            let mut facts = Facts::default();
            facts.set(Label::Container, Some(name));
            return Some(facts);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labels::source::tests::{Files, check};

    fn pod_logs(files: &Files, id: &str, uid: Option<&str>) -> SourceReply {
        logs(&files.host(), &["/data/logs".into(), "/var/log/pods".into()], id, uid)
    }

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn log_folders_and_links_name_the_pod() {
        let files = Files::new(&[("var/log/pods/prod_trainer-0_uid-1/train/0.log", "")]);
        check(&pod_logs(&files, ID, Some("uid-1")), "prod/trainer-0/- - -");
        check(&pod_logs(&files, ID, Some("uid-2")), "not-found");
        check(&pod_logs(&files, ID, None), "not-found");
        files.add(&format!("var/log/containers/trainer-0_prod_train-{ID}.log"), "");
        check(&pod_logs(&files, ID, Some("uid-1")), "prod/trainer-0/train - -");
        check(&pod_logs(&files, ID, None), "prod/trainer-0/train - -");
        check(&pod_logs(&files, &ID.replace('0', "1"), None), "not-found");
        // A folder that the kubelet's configuration names.
        files.add("data/logs/lab_other_uid-3/x/0.log", "");
        let reply = pod_logs(&files, ID, Some("uid-3"));
        assert_eq!(reply.at, Some("/var/log/containers".into()));
        let reply = pod_logs(&files, &ID.replace('0', "1"), Some("uid-3"));
        check(&reply, "lab/other/- - -");
        assert_eq!(reply.at, Some("/data/logs".into()));
    }

    #[test]
    fn a_truncated_link_name_is_matched_by_its_target() {
        let (pod, namespace) = ("p".repeat(150), "n".repeat(63));
        let name: String = format!("{pod}_{namespace}_c-{ID}").chars().take(NAME_MAX - 4).collect();
        let files = Files::new(&[]);
        files.link(&format!("var/log/containers/{name}.log"), &format!("/var/log/pods/{namespace}_{pod}_u/c/0.log"));
        check(&pod_logs(&files, ID, None), &format!("{namespace}/{pod}/c - -"));
        // The name of this container ends with the first digits of another container's id.
        let name: String = format!("{pod}_{namespace}_{}-{ID}", "x".repeat(24)).chars().take(NAME_MAX - 4).collect();
        let files = Files::new(&[]);
        files.link(
            &format!("var/log/containers/{name}.log"),
            &format!("/var/log/pods/{namespace}_{pod}_u/{}-{}/0.log", "x".repeat(24), &ID[..12]),
        );
        check(&pod_logs(&files, ID, None), "not-found");
    }

    /// Processes 7 and 8 in the container's cgroup, in this mount namespace.
    #[test]
    fn mounts_are_read_once_per_namespace_and_not_of_the_host() {
        let uid = "8bb25662-de9a-11e9-84e7-f8f21e04010c";
        let text = format!("3 4 8:1 /var/lib/kubelet/pods/{uid}/containers/train/1f2e /dev/termination-log rw\n");
        let case = |namespaces: [&str; 3], with_mounts: &str, expect: &str| {
            let files = Files::new(&[("cgroup/c/cgroup.procs", "7\n8\n"), (&format!("{with_mounts}/mountinfo"), &text)]);
            for (pid, namespace) in ["1", "7", "8"].iter().zip(namespaces) {
                files.link(&format!("{pid}/ns/mnt"), &format!("mnt:[{namespace}]"));
            }
            let root = files.host().path(Path::new("/"));
            check(&mountinfo(&root, &pids_of(&[root.join("cgroup")], "/c"), Some(uid)), expect);
        };
        case(["1", "2", "2"], "7", "-/-/train - -");
        case(["1", "2", "3"], "8", "-/-/train - -");
        case(["1", "2", "2"], "8", "not-found");
        case(["1", "1", "2"], "8", "-/-/train - -");
        case(["1", "1", "1"], "7", "not-found");
    }

    #[test]
    fn processes_of_child_cgroups_count_if_the_cgroup_has_none() {
        let files = Files::new(&[
            ("c/cgroup.procs", ""),
            ("c/cpu.max", "max"),
            ("c/init/cgroup.procs", "0\n9\n"),
            ("d/cgroup.procs", ""),
        ]);
        let mount = files.host().path(Path::new("/"));
        let pids = |cgroup: &str| pids_of(&[mount.join("absent"), mount.clone()], cgroup);
        assert_eq!((pids("/c"), pids("/d"), pids("/e")), (vec!["9".to_owned()], vec![], vec![]));
    }

    #[test]
    fn only_the_first_matching_mount_of_the_pod_counts() {
        let text = "1 2 0:1 / / rw\n3 4 8:1 /var/lib/kubelet/pods/8bb25662-de9a-11e9-84e7-f8f21e04010c/containers/train/1f2e /dev/termination-log rw\n";
        let uid = "8bb25662-de9a-11e9-84e7-f8f21e04010c";
        let facts = mount_facts(text, uid).unwrap();
        assert_eq!(facts.labels[Label::Container as usize].as_deref(), Some("train"));
        assert_eq!(facts.pod_uid, None);
        assert_eq!(mount_facts(text, "another"), None);
        let forged = format!("{text}5 6 0:1 /x/pods/{uid}/containers/other/1 /y rw\n");
        assert_eq!(mount_facts(&forged, uid).unwrap(), facts);
        assert_eq!(mount_facts("1 2 0:1 /srv/pods/x /y rw\n1 2\n", uid), None);
    }
}
