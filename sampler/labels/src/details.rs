//! What a job, unit or login session stands for, beyond its path: from the environment and the owner of one of its processes.
//!
//! Users choose the environment of their processes, so it only describes a user and never identifies one; and of a job only that of a
//! process counts which names the job.

use std::collections::HashMap;

use sampler_core::cgroup_path::{HostUser, Job, Scheduler};

use super::values::bounded;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserDetails {
    /// The number of a job with another id in its path.
    pub job_id: Option<String>,
    pub job_name: Option<String>,
    pub uid: Option<u32>,
    pub user_name: Option<String>,
    /// Or queue.
    pub partition: Option<String>,
}

/// Names of the variables that a scheduler sets for its jobs; empty where it sets none.
struct Variables {
    job_id: &'static str,
    job_name: &'static str,
    user_name: &'static str,
    partition: &'static str,
}

/// From the manuals of `sbatch`, `qsub`, `bsub`, `flux-environment`, Nomad's runtime environment, HTCondor's job environment and YARN's
/// `ApplicationConstants`.
fn variables(scheduler: Scheduler) -> Variables {
    let (job_id, job_name, user_name, partition) = match scheduler {
        Scheduler::Slurm => ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_USER", "SLURM_JOB_PARTITION"),
        Scheduler::Pbs => ("PBS_JOBID", "PBS_JOBNAME", "PBS_O_LOGNAME", "PBS_QUEUE"),
        Scheduler::Lsf => ("LSB_JOBID", "LSB_JOBNAME", "LSFUSER", "LSB_QUEUE"),
        Scheduler::Nomad => ("NOMAD_ALLOC_ID", "NOMAD_JOB_NAME", "", ""),
        Scheduler::Flux => ("FLUX_JOB_ID", "", "", ""),
        Scheduler::Yarn => ("CONTAINER_ID", "", "USER", ""),
        Scheduler::HtCondor => ("_CONDOR_SLOT", "", "", ""),
    };
    Variables { job_id, job_name, user_name, partition }
}

/// Whether this is the number of the job: a SLUID says nothing about it, and the path may have the id with its server or its index.
fn is_of_job(job: &Job, id: &str) -> bool {
    let number = |text: &str| text.split(['.', '[']).next().unwrap_or_default().to_owned();
    match job.scheduler {
        Scheduler::Slurm if job.id.starts_with('s') => !id.is_empty(),
        Scheduler::Yarn => job.task.as_deref() == Some(id),
        Scheduler::HtCondor => job.id.split('@').next() == Some(id),
        // `f` where the text is plain ASCII.
        Scheduler::Flux => job.id.trim_start_matches(['f', 'ƒ']) == id.trim_start_matches(['f', 'ƒ']),
        _ => number(&job.id) == number(id),
    }
}

impl UserDetails {
    /// `environ`: the content of `/proc/PID/environ`. `None` for a process that is not of the job.
    pub fn from_environ(user: &HostUser, environ: &[u8]) -> Option<Self> {
        let entries = environ.split(|byte| *byte == 0).filter_map(|entry| std::str::from_utf8(entry).ok()?.split_once('='));
        let values: HashMap<&str, &str> = entries.collect();
        let value = |name: &str| values.get(name).filter(|value| !value.is_empty()).map(|value| bounded(value).to_owned());
        let HostUser::Job(job) = user else { return Some(Self::default()) };
        let names = variables(job.scheduler);
        let job_id = value(names.job_id).filter(|id| is_of_job(job, id))?;
        Some(Self {
            job_id: Some(job_id).filter(|id| job.scheduler == Scheduler::Slurm && *id != job.id),
            job_name: value(names.job_name),
            uid: None,
            user_name: value(names.user_name),
            partition: value(names.partition),
        })
    }
}

/// The name of a user in the text of `/etc/passwd`.
pub fn user_name(passwd: &str, uid: u32) -> Option<&str> {
    let name = |line: &'_ str| {
        let (name, rest) = line.split_once(':')?;
        let (_, rest) = rest.split_once(':')?;
        (rest.split(':').next()?.parse() == Ok(uid)).then_some(name.len())
    };
    passwd.lines().find_map(|line| line.get(..name(line)?)).map(bounded).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sampler_core::cgroup_path::parse;

    fn check(path: &str, environ: &str, expect: Option<[Option<&str>; 4]>) {
        let user = parse(path).host_user.unwrap();
        let details = UserDetails::from_environ(&user, environ.replace(' ', "\0").as_bytes());
        let parts = details.map(|details| [details.job_id, details.job_name, details.user_name, details.partition]);
        assert_eq!(parts, expect.map(|parts| parts.map(|part| part.map(str::to_owned))), "{path}: {environ}");
    }

    #[test]
    fn the_environment_of_a_job_describes_it() {
        let slurm = "/system.slice/slurmstepd.scope/job_7/step_0/user/task_0";
        let all = "PATH=/bin SLURM_JOB_ID=7 SLURM_JOB_NAME=train SLURM_JOB_USER=ann SLURM_JOB_PARTITION=gpu";
        check(slurm, all, Some([None, Some("train"), Some("ann"), Some("gpu")]));
        check(slurm, "SLURM_JOB_ID=8 SLURM_JOB_USER=eve", None);
        check(slurm, "PATH=/bin", None);
        check(slurm, "SLURM_JOB_ID=7 SLURM_JOB_NAME= X", Some([None; 4]));
        check(
            "/system.slice/slurmstepd.scope/s5K1KKYAYG5D00/step_0",
            all,
            Some([Some("7"), Some("train"), Some("ann"), Some("gpu")]),
        );
        let pbs = "PBS_JOBID=123.head PBS_O_LOGNAME=bob PBS_QUEUE=workq PBS_JOBNAME=fold";
        check("/pbspro/123.head", pbs, Some([None, Some("fold"), Some("bob"), Some("workq")]));
        check("/pbspro/124.head", pbs, None);
        check(
            "/lsf/c/job.22.1.2",
            "LSB_JOBID=22 LSFUSER=kim LSB_QUEUE=gpu LSB_JOBNAME=x",
            Some([None, Some("x"), Some("kim"), Some("gpu")]),
        );
        let alloc = "b30be889-ebb4-8524-cc84-bfd79acd6057";
        let environ = format!("NOMAD_ALLOC_ID={alloc} NOMAD_JOB_NAME=web");
        check(&format!("/nomad.slice/share.slice/{alloc}.web.scope"), &environ, Some([None, Some("web"), None, None]));
        check("/htcondor/condor_x_slot1_2@n", "_CONDOR_SLOT=slot1_2", Some([None; 4]));
        let flux = "/user.slice/user-500.slice/user@500.service/app.slice/shell-0-fD7j8aT.service";
        check(flux, "FLUX_JOB_ID=ƒD7j8aT", Some([None; 4]));
        check(flux, "FLUX_JOB_ID=ƒD7j8aU", None);
        check("/system.slice/x.service", "SLURM_JOB_ID=7 SLURM_JOB_USER=ann", Some([None; 4]));
    }

    #[test]
    fn names_are_found_by_uid() {
        let passwd = "root:x:0:0::/root:/bin/sh\nbroken\nann:x:1000:100::/h/ann:\n:x:7::";
        assert_eq!([0, 1000, 100, 7].map(|uid| user_name(passwd, uid)), [Some("root"), Some("ann"), None, None]);
    }

    /// The environment of a process of a job, and `/etc/passwd`: every text is a part of it, and not longer than a label.
    #[test]
    fn fuzz_environ() {
        let paths = [
            "/system.slice/slurmstepd.scope/job_7/step_0/user/task_0",
            "/system.slice/slurmstepd.scope/s5K1KKYAYG5D00/step_0",
            "/pbspro/123.head",
            "/lsf/c/job.22.1.2",
            "/nomad.slice/share.slice/b30be889-ebb4-8524-cc84-bfd79acd6057.web.scope",
            "/htcondor/condor_x_slot1_2@n",
            "/user.slice/user-500.slice/user@500.service/app.slice/shell-0-fD7j8aT.service",
            "/system.slice/x.service",
        ];
        let users = paths.map(|path| parse(path).host_user.unwrap());
        devkit::fuzz(file!(), "environ", move |bytes| {
            let text = String::from_utf8_lossy(bytes);
            for user in &users {
                let Some(details) = UserDetails::from_environ(user, bytes) else { continue };
                let texts = [details.job_id, details.job_name, details.user_name, details.partition];
                for part in texts.iter().flatten() {
                    assert!(!part.is_empty() && part.len() <= 1024 && text.contains(part.as_str()), "{part:?}");
                }
            }
            for uid in [0, 1000, u32::MAX] {
                let name = user_name(&text, uid);
                assert!(
                    name.is_none_or(|name| !name.contains([':', '\n']) && name.len() <= 1024 && text.contains(name)),
                    "{name:?}"
                );
            }
        });
    }
}
