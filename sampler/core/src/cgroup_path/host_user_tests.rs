//! Paths of jobs, units and sessions, as schedulers and systemd create them.

use super::{CgroupIdentity, HostUser, parse};

const H: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const U: &str = "8bb25662-de9a-11e9-84e7-f8f21e04010c";
const A: &str = "b30be889-ebb4-8524-cc84-bfd79acd6057";

fn uid_of(uid: Option<u32>) -> String {
    uid.map_or(String::new(), |uid| format!(" uid {uid}"))
}

fn of_user(user: &HostUser) -> String {
    match user {
        HostUser::Job(job) => {
            let parts = [("step", &job.step), ("task", &job.task)];
            let parts = parts.iter().filter_map(|(name, value)| Some(format!(" {name} {}", value.as_ref()?)));
            format!("job {} {}{}{}", job.scheduler.name(), job.id, parts.collect::<String>(), uid_of(job.uid))
        }
        HostUser::Unit(unit) => format!("unit {}{}", unit.name, uid_of(unit.uid)),
        HostUser::Login(login) => {
            let session = login.session.as_ref().map_or(String::new(), |session| format!(" session {session}"));
            format!("login {}{session}", login.uid)
        }
    }
}

/// `kind [user] [in CONTAINER] [in job]`.
fn summary(identity: &CgroupIdentity) -> String {
    let innermost = identity.host_user.as_ref().map_or_else(|| identity.kind.name().to_owned(), of_user);
    let container = identity.outer_container_id.as_ref().map_or(String::new(), |id| format!(" in {id}"));
    let job = identity.outer_job.as_ref().map_or(String::new(), |job| format!(" in {}", of_user(&HostUser::Job(job.clone()))));
    innermost + &container + &job
}

/// `|` marks the end of the user's root; without it the root is the whole path. `<H>`, `<U>` and `<A>` are ids.
fn check(path: &str, expect: &str) {
    let filled = |text: &str| text.replace("<H>", H).replace("<U>", U).replace("<A>", A);
    let (root, path) = (filled(path.split('|').next().unwrap_or_default()), filled(&path.replace('|', "")));
    let identity = parse(&path);
    assert_eq!(summary(&identity), filled(expect), "{path}");
    if let Some(user) = &identity.host_user {
        assert_eq!((&path[..identity.root_len], identity.kind), (root.as_str(), user.kind()), "{path}");
        let of_root = parse(&root);
        assert_eq!(of_root.host_user.map(|user| user.name()), Some(user.name()), "the root of {path}");
    }
}

#[test]
fn slurm() {
    check("/slurm/uid_1000/job_12345|/step_0/task_0", "job slurm 12345 step 0 task 0 uid 1000");
    check("/slurm/uid_0/job_7", "job slurm 7 uid 0");
    check("/slurm_node-1/uid_1000/job_7|/step_extern/task_0", "job slurm 7 step extern task 0 uid 1000");
    check("/slurm/uid_1000|/other/job_7", "not-container");
    check("/system.slice/slurmstepd.scope/job_12345|/step_batch/user/task_0", "job slurm 12345 step batch task 0");
    check("/system.slice/slurmstepd.scope/job_12345|/step_0/slurm", "job slurm 12345 step 0");
    check("/system.slice/slurmstepd.scope/job_12345|/step_extern/user/task_special", "job slurm 12345 step extern task special");
    check("/system.slice/node-1_slurmstepd.scope/job_7|/step_0/user/task_1", "job slurm 7 step 0 task 1");
    check("/system.slice/slurmstepd.scope/s5K1KKYAYG5D00|/step_0/user/task_0", "job slurm s5K1KKYAYG5D00 step 0 task 0");
    check("/system.slice/slurmstepd.scope|/system", "unit slurmstepd.scope");
    check("/system.slice/slurmd.service", "unit slurmd.service");
    // A cgroup that the job makes below its task.
    check("/system.slice/slurmstepd.scope/job_7|/step_0/user/task_0/job_8/step_9", "job slurm 7 step 0 task 0");
    check("/job_7", "not-container");
    check("/system.slice/x.service|/job_7", "unit x.service");
    // Names that a job or a user gives to cgroups of its own.
    check("/system.slice/slurmstepd.scope/job_7|/step_0/user/task_0/slurmstepd.scope/job_8", "job slurm 7 step 0 task 0");
    check("/user.slice/user-9.slice/user@9.service/slurmstepd.scope|/job_8", "unit slurmstepd.scope uid 9");
}

#[test]
fn nomad() {
    check("/nomad.slice/share.slice/<A>.promtail.scope", "job nomad <A> task promtail");
    check("/nomad.slice/reserve.slice/<A>.my.task.scope", "job nomad <A> task my.task");
    check("/nomad.slice/<A>.redis.scope|/sub", "job nomad <A> task redis");
    check("/nomad/<A>.redis", "job nomad <A> task redis");
    check("/nomad/share/<A>.redis", "job nomad <A> task redis");
    check(
        "/nomad/reserve/c30be889-ebb4-8524-cc84-bfd79acd6057.redis",
        "job nomad c30be889-ebb4-8524-cc84-bfd79acd6057 task redis",
    );
    check("/custom.slice/share.slice/<A>.web.scope", "job nomad <A> task web");
    check("/nomad.slice/share.slice/<A>.scope", "unit <A>.scope");
}

#[test]
fn other_schedulers() {
    check("/htcondor/condor_var_lib_condor_execute_slot1_1@node.example.org", "job htcondor slot1_1@node.example.org");
    check("/system.slice/condor.service/condor_scratch_slot2@n1|/sub", "job htcondor slot2@n1");
    check("/system.slice/condor.service", "unit condor.service");
    check("/condor_notes@x", "not-container");
    check(
        "/hadoop-yarn/container_e42_1659000000000_0001_01_000002",
        "job yarn application_1659000000000_0001 task container_e42_1659000000000_0001_01_000002",
    );
    check(
        "/hadoop-yarn/container_1659000000000_0012_02_000003|/x",
        "job yarn application_1659000000000_0012 task container_1659000000000_0012_02_000003",
    );
    check("/hadoop-yarn/container_x_1_1_1", "not-container");
    check("/pbspro/123.pbs-server", "job pbs 123.pbs-server");
    check("/pbs_jobs.service/jobid/123[4].server|/sub", "job pbs 123[4].server");
    check("/pbspro.slice/pbspro-99.head.slice", "job pbs 99.head");
    check("/torque/17.head.example.org", "job pbs 17.head.example.org");
    check("/lsf/cluster1/job.2251.4872.1477932841", "job lsf 2251");
    check("/user.slice/user-500.slice/user@500.service/app.slice/imp-shell-0-fABcd12.service", "job flux fABcd12 uid 500");
    check("/user.slice/user-500.slice/user@500.service/app.slice/shell-3-f2Xy.service", "job flux f2Xy uid 500");
}

#[test]
fn units_and_sessions() {
    check("/system.slice/vllm.service", "unit vllm.service");
    check("/system.slice/vllm.service|/worker", "unit vllm.service");
    check("/system.slice/system-vllm.slice/vllm@gpu0.service", "unit vllm@gpu0.service");
    check("/ml.slice/ml-train.slice/run-r1234.scope", "unit run-r1234.scope");
    check(r"/machine.slice/machine-qemu\x2d1\x2dvm.scope|/libvirt/emulator", r"unit machine-qemu\x2d1\x2dvm.scope");
    check("/user.slice/user-1000.slice|/session-3.scope", "login 1000 session 3");
    check("/user.slice/user-1000.slice|/user@1000.service/init.scope", "login 1000");
    check("/user.slice/user-1000.slice", "login 1000");
    check("/user.slice/user-1000.slice/user@1000.service/app.slice/jupyter.service", "unit jupyter.service uid 1000");
    check("/user.slice/user-1000.slice/user@1000.service/tmux-spawn-<U>.scope", "unit tmux-spawn-<U>.scope uid 1000");
    check("/user.slice/user-0.slice|/session-c1.scope", "login 0 session c1");
    for path in ["/", "", "/init.scope", "/system.slice", "/user.slice", "/user.slice/user-x.slice", "/foo/bar", "/../.."] {
        check(path, "not-container");
    }
    check("/system.slice/crio-conmon-<H>.scope", "monitor");
}

#[test]
fn containers_and_jobs_inside_each_other() {
    check("/system.slice/docker-<H>.scope", "container");
    check("/system.slice/docker-<H>.scope/system.slice/x.service", "container");
    check(
        "/kubepods/burstable/pod<U>/<H>/system.slice/slurmstepd.scope/job_7|/step_0/user/task_0",
        "job slurm 7 step 0 task 0 in <H>",
    );
    check("/slurm/uid_1/job_9|/step_0/libpod-conmon-<H>.scope", "job slurm 9 step 0 uid 1");
    check("/system.slice/slurmstepd.scope/job_7/step_0/user/task_0/<H>", "container in job slurm 7 step 0 task 0");
    check("/slurm/uid_1000/job_9/step_0/task_0/docker/<H>", "container in job slurm 9 step 0 task 0 uid 1000");
    check("/kubepods/burstable/pod<U>", "pod");
    check("/user.slice/user-7.slice|/user@7.service/pod<U>", "login 7");
    check("/system.slice/tenant.service|/pod<U>", "unit tenant.service");
    check("/slurm/uid_1/job_9|/step_0/pod<U>", "job slurm 9 step 0 uid 1");
    check("/system.slice/tenant.service/slurmstepd.scope|/job_7", "unit slurmstepd.scope");
}

#[test]
fn a_path_of_any_depth_costs_as_much_as_a_short_one() {
    let deep = format!("/system.slice/slurmstepd.scope/job_7{}", "/job_8".repeat(600));
    check(&deep.replacen("/job_8", "|/job_8", 1), "job slurm 7");
    let hidden = format!("{}/slurmstepd.scope/job_7", "/a".repeat(1_000));
    check(&hidden, "not-container");
}

#[test]
fn names() {
    let check = |path: &str, expect: &str| {
        let user = parse(&path.replace("<A>", A)).host_user.unwrap();
        assert_eq!(user.name(), expect.replace("<A>", A), "{path}");
    };
    check("/slurm/uid_1000/job_12345/step_0/task_0", "slurm/12345");
    check("/nomad.slice/share.slice/<A>.promtail.scope", "nomad/<A>/promtail");
    check("/hadoop-yarn/container_1659_0012_02_000003", "yarn/application_1659_0012/container_1659_0012_02_000003");
    check("/user.slice/user-500.slice/user@500.service/app.slice/shell-3-f2Xy.service", "uid/500/flux/f2Xy");
    check("/system.slice/vllm.service", "vllm.service");
    check("/user.slice/user-1000.slice/user@1000.service/app.slice/jupyter.service", "uid/1000/jupyter.service");
    check("/user.slice/user-1000.slice/session-3.scope", "uid/1000");
    check("/slurm_node-1/uid_1000/job_7/step_0", "slurm/node-1/7");
    check("/system.slice/node-2_slurmstepd.scope/job_7", "slurm/node-2/7");
    check("/lsf/cluster1/job.2251.4872.1477932841", "lsf/2251.4872.1477932841");
    // What a user or a unit names after another one.
    check("/user.slice/user-7.slice/user@7.service/user.slice/user-1000.slice/jupyter.service", "uid/7/jupyter.service");
    check("/user.slice/user-7.slice/user@7.service/user.slice/user-1000.slice", "uid/7");
    check("/user.slice/user-7.slice/session-1.scope/session-2.scope", "uid/7");
    check("/system.slice/a.service/vllm.service", "a.service/vllm.service");
    check("/system.slice/a.service/user.slice/user-1000.slice/session-3.scope", "a.service");
    check("/system.slice/a.service/slurm/uid_1/job_7", "a.service");
}
