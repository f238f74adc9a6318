//! What a job or a user's unit or session stands for: from the environment and the owner of its processes, and `/etc/passwd`.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use sampler_core::cgroup_path::HostUser;
use sampler_core::identity::ContainerRecord;
use sampler_labels::{Facts, UserDetails, user_name};

use super::file;
use super::host_files::HostFiles;
use super::pods::{child_folders, pids_in};
use super::reply::SourceReply;

/// Cgroups of a job to visit: its steps and their tasks.
const MAX_FOLDERS: usize = 64;
/// Processes to try: the first ones of a step may be the scheduler's own.
const MAX_PIDS: usize = 32;
/// The kernel limits one variable to 128 KiB.
const MAX_ENVIRON_BYTES: u64 = 1 << 20;
const MAX_PASSWD_BYTES: u64 = 4 << 20;
const PASSWD: &str = "/etc/passwd";

pub fn query(files: &HostFiles, procfs: &Path, mount_points: &[PathBuf], record: &ContainerRecord) -> SourceReply {
    let Some(user) = &record.identity.host_user else { return SourceReply::not_queried("it is not a job, unit or session") };
    let is_job = matches!(user, HostUser::Job(_));
    let found = is_job.then(|| details_of_job(user, procfs, mount_points, &record.cgroup_path)).flatten();
    let (details, at) = match found {
        Some((details, at)) => (details, at),
        // Its processes may have the environment later.
        None if is_job => return SourceReply::not_found_because("none of its processes has the environment of the job"),
        // The path names the owner, and nothing else about it is known.
        None => (UserDetails::default(), PathBuf::from(PASSWD)),
    };
    // Flux runs the jobs of all users in units of its own.
    let uid = details.uid.or(user.uid());
    // A job that runs in a container has the users of that container.
    let on_host = record.identity.outer_container_id.is_none();
    // A user chooses the environment of its processes, so it counts only for users that the machine does not know.
    let known = uid.filter(|_| on_host).and_then(|uid| name_of(files, uid));
    let details = UserDetails { uid, user_name: known.or(details.user_name.clone()), ..details };
    SourceReply::found(Facts { details: Some(Box::new(details)), ..Facts::default() }).at(&at)
}

/// From the first process with the environment of the job, and the path of that environment.
fn details_of_job(user: &HostUser, procfs: &Path, mount_points: &[PathBuf], cgroup: &str) -> Option<(UserDetails, PathBuf)> {
    let pids = pids_below(mount_points, cgroup);
    pids.iter().find_map(|pid| {
        let path = procfs.join(pid).join("environ");
        let environ = file::beginning(&path, MAX_ENVIRON_BYTES).ok()?;
        let details = UserDetails::from_environ(user, &environ)?;
        let uid = fs::metadata(procfs.join(pid)).ok().map(|folder| folder.uid());
        Some((UserDetails { uid, ..details }, path))
    })
}

fn pids_below(mount_points: &[PathBuf], cgroup: &str) -> Vec<String> {
    let roots = mount_points.iter().map(|mount| mount.join(cgroup.trim_start_matches('/')));
    let mut folders: VecDeque<PathBuf> = roots.collect();
    let mut pids = Vec::new();
    for _ in 0..MAX_FOLDERS {
        let Some(folder) = folders.pop_front().filter(|_| pids.len() < MAX_PIDS) else { break };
        pids.extend(pids_in(&folder).unwrap_or_default());
        folders.extend(child_folders(&folder));
    }
    pids.truncate(MAX_PIDS);
    pids
}

fn name_of(files: &HostFiles, uid: u32) -> Option<String> {
    let text = file::beginning(&files.path(Path::new(PASSWD)), MAX_PASSWD_BYTES).ok()?;
    user_name(&String::from_utf8_lossy(&text), uid).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use sampler_core::cgroup_path::parse;
    use sampler_core::units::{BootNs, ContainerKey};
    use sampler_labels::Outcome;

    use super::*;
    use crate::labels::source::tests::Files;

    const JOB: &str = "/system.slice/slurmstepd.scope/job_7";

    fn details(files: &Files, path: &str) -> Option<UserDetails> {
        let (root, identity) = (files.host().path(Path::new("/")), parse(path));
        let (key, created) = (ContainerKey(1), BootNs(0));
        let record = ContainerRecord { key, cgroup_path: path.into(), identity, created, creation_seen: true };
        match query(&files.host(), &root.join("proc"), &[root.join("absent"), root.join("cgroup")], &record).outcome {
            Outcome::Found(facts) => facts.details.map(|details| *details),
            _ => None,
        }
    }

    #[test]
    fn a_process_of_the_job_describes_it() {
        let files = Files::new(&[
            (&format!("cgroup{JOB}/step_0/slurm/cgroup.procs"), "10\n"),
            (&format!("cgroup{JOB}/step_0/user/task_0/cgroup.procs"), "11\n12\n"),
            ("proc/10/environ", "PATH=/bin\0"),
            ("proc/12/environ", "SLURM_JOB_ID=7\0SLURM_JOB_PARTITION=gpu\0"),
        ]);
        let uid = fs::metadata(files.host().path(Path::new("/proc/12"))).unwrap().uid();
        let expect = UserDetails { uid: Some(uid), partition: Some("gpu".into()), ..UserDetails::default() };
        assert_eq!(details(&files, JOB), Some(expect.clone()));
        files.add("etc/passwd", &format!("ann:x:{uid}:0::/:\n"));
        let with_name = UserDetails { user_name: Some("ann".into()), ..expect };
        assert_eq!(details(&files, JOB), Some(with_name.clone()));
        files.add("proc/12/environ", "SLURM_JOB_ID=7\0SLURM_JOB_PARTITION=gpu\0SLURM_JOB_USER=eve\0");
        assert_eq!(details(&files, JOB), Some(with_name), "the owner of the process is known");
        assert_eq!(details(&files, &JOB.replace('7', "8")), None, "no process of it");
    }

    #[test]
    fn the_path_of_a_session_names_its_owner() {
        let files = Files::new(&[("etc/passwd", "kim:x:1000:0::/:\n")]);
        let expect = UserDetails { uid: Some(1000), user_name: Some("kim".into()), ..UserDetails::default() };
        assert_eq!(details(&files, "/user.slice/user-1000.slice"), Some(expect));
        let unknown = UserDetails { uid: Some(7), ..UserDetails::default() };
        assert_eq!(details(&files, "/user.slice/user-7.slice"), Some(unknown));
    }
}
