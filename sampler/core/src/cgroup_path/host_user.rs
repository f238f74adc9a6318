//! Users of a machine that are not containers: jobs of batch schedulers, systemd units, login sessions.
//!
//! The segments are read from the root, and only the first [`MAX_SEGMENTS`]: none of these users is deeper, and a user may nest its own
//! cgroups as deep as it likes.

use std::ops::Range;

use super::segment::is_uuid;
use super::{CgroupIdentity, Kind, parse};

/// systemd nests some eight segments, and a scheduler five.
const MAX_SEGMENTS: usize = 32;
/// Characters of Slurm's SLUID.
const SLUID: usize = 14;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, strum::IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum Scheduler {
    Slurm,
    Nomad,
    HtCondor,
    Yarn,
    Pbs,
    Lsf,
    Flux,
}

impl Scheduler {
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// A job of a batch scheduler. Step and task are those of the path; the job has others.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Job {
    pub scheduler: Scheduler,
    /// Nomad: the UUID of the allocation. YARN: the application. HTCondor: the slot and its host.
    pub id: String,
    pub step: Option<String>,
    pub task: Option<String>,
    pub uid: Option<u32>,
    /// What distinguishes cgroups of one id: the node of one of several slurmd, the process and time of LSF.
    pub instance: Option<String>,
}

impl Job {
    fn new(scheduler: Scheduler, id: impl Into<String>) -> Self {
        Self { scheduler, id: id.into(), step: None, task: None, uid: None, instance: None }
    }
}

/// A service or scope of systemd.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Unit {
    /// As systemd shows it, with escapes.
    pub name: String,
    /// The unit around it: units are not inside units, but a unit to which its cgroup is delegated may name cgroups so.
    pub outer: Option<String>,
    /// The user of the manager that has the unit.
    pub uid: Option<u32>,
}

/// The sessions of a user, and what the user's manager runs outside of units.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Login {
    pub uid: u32,
    pub session: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostUser {
    Job(Job),
    Unit(Unit),
    Login(Login),
}

impl HostUser {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Job(_) => Kind::Job,
            Self::Unit(_) => Kind::Unit,
            Self::Login(_) => Kind::Login,
        }
    }

    /// Short, and unique on a machine where no containers have jobs: `slurm/12345`, `nomad/<allocation>/<task>`, `vllm.service`,
    /// `uid/1000/jupyter.service`, `uid/1000`.
    pub fn name(&self) -> String {
        match self {
            Self::Job(Job { scheduler, id, task, uid, instance, .. }) => match (scheduler, task) {
                (Scheduler::Slurm, _) => {
                    let node = instance.as_ref().map_or(String::new(), |node| format!("{node}/"));
                    format!("{}/{node}{id}", scheduler.name())
                }
                (Scheduler::Lsf, _) => {
                    let process = instance.as_ref().map_or(String::new(), |process| format!(".{process}"));
                    format!("{}/{id}{process}", scheduler.name())
                }
                // An allocation has several tasks, and an application several containers; each has a cgroup of its own.
                (Scheduler::Nomad | Scheduler::Yarn, Some(task)) => format!("{}/{id}/{task}", scheduler.name()),
                // A unit of a user's manager, which that user may name.
                (Scheduler::Flux, _) => {
                    format!("{}{}/{id}", uid.map_or(String::new(), |uid| format!("uid/{uid}/")), scheduler.name())
                }
                _ => format!("{}/{id}", scheduler.name()),
            },
            Self::Unit(Unit { name, outer, uid }) => {
                let owner = uid.map_or(String::new(), |uid| format!("uid/{uid}/"));
                let outer = outer.as_ref().map_or(String::new(), |outer| format!("{outer}/"));
                format!("{owner}{outer}{name}")
            }
            Self::Login(login) => format!("uid/{}", login.uid),
        }
    }

    pub fn uid(&self) -> Option<u32> {
        match self {
            Self::Job(job) => job.uid,
            Self::Unit(unit) => unit.uid,
            Self::Login(login) => Some(login.uid),
        }
    }
}

impl CgroupIdentity {
    /// Replaces the identity by that of a job inside of it, or of a unit or login session outside of containers; else adds the job around
    /// it. Units and sessions count only outside of containers, monitors and builds: a container may run an init of its own, and an engine
    /// is a unit.
    pub(super) fn add_host_user(&mut self, path: &str) {
        let as_job = |(job, root_len)| (HostUser::Job(job), root_len);
        // A monitor or a build step may have the name of a unit.
        let is_root = |(_, root_len): &(HostUser, usize)| {
            *root_len == path.len() || path.get(..*root_len).is_some_and(|root| parse(root).host_user.is_some())
        };
        let innermost = match self.kind {
            // A user, a unit or a job may name a cgroup after the pod of another tenant.
            Kind::Pod if self.outer_container_id.is_none() => {
                // Of units around each other the outermost one: the others are its names, too.
                let end = segments(path, 0..self.root_len).find(NamedSegment::is_unit).map_or(self.root_len, |unit| unit.end);
                let above = path.get(..end).unwrap_or_default();
                job(path, 0..path.len()).map(as_job).or_else(|| unit_or_login(above).filter(is_root))
            }
            Kind::Container | Kind::Sandbox | Kind::Pod => job(path, self.root_len..path.len()).map(as_job),
            Kind::Monitor | Kind::Build => job(path, 0..path.len()).map(as_job).filter(|_| self.outer_container_id.is_none()),
            _ => job(path, 0..path.len()).map(as_job).or_else(|| unit_or_login(path).filter(is_root)),
        };
        match innermost {
            Some((user, root_len)) => self.become_host_user(user, root_len),
            None => self.outer_job = job(path, 0..self.root_len).map(|(job, _)| job),
        }
    }

    fn become_host_user(&mut self, user: HostUser, root_len: usize) {
        if self.kind == Kind::Pod && !matches!(user, HostUser::Job(_)) {
            self.pod_uid = None;
        }
        (self.kind, self.root_len, self.host_user) = (user.kind(), root_len, Some(user));
        (self.runtime, self.name) = (None, None);
        // The innermost container is around the user.
        if let Some(around) = self.container_id.take() {
            self.outer_container_id = Some(around);
        }
    }
}

impl Job {
    /// Whether this unit may have the cgroups of such jobs: another one may name its own so.
    fn is_managed_by(&self, unit: &str) -> bool {
        let words: &[&str] = match self.scheduler {
            Scheduler::Slurm => &["slurm"],
            Scheduler::Nomad => &["nomad"],
            Scheduler::HtCondor => &["condor"],
            Scheduler::Yarn => &["yarn", "hadoop"],
            Scheduler::Pbs => &["pbs", "torque"],
            Scheduler::Lsf => &["lsf"],
            Scheduler::Flux => &["flux"],
        };
        words.iter().any(|word| unit.contains(word))
    }
}

/// A segment of a path with the two above it.
#[derive(Clone, Copy)]
struct NamedSegment<'a> {
    name: &'a str,
    parent: &'a str,
    grandparent: &'a str,
    end: usize,
}

/// The segments of this part of a path, from the root on.
fn segments(path: &str, part: Range<usize>) -> impl Iterator<Item = NamedSegment<'_>> {
    let (mut parent, mut grandparent, mut at) = ("", "", part.start);
    let text = path.get(part).unwrap_or_default();
    text.split('/').take(MAX_SEGMENTS).map(move |name| {
        let segment = NamedSegment { name, parent, grandparent, end: at + name.len() };
        at = segment.end + 1;
        if !name.is_empty() {
            (grandparent, parent) = (parent, name);
        }
        segment
    })
}

/// The job in this part of a path, and where its cgroup ends. What is below a job belongs to the job, and may have any name. So may what is
/// below the manager of a user: only Flux has its jobs there.
fn job(path: &str, part: Range<usize>) -> Option<(Job, usize)> {
    let mut found: Option<(Job, usize)> = None;
    let mut manager_uid = None;
    let mut unit: Option<&str> = None;
    for segment in segments(path, part) {
        if let Some((job, _)) = &mut found {
            segment.add_to(job);
            continue;
        }
        manager_uid = manager_uid.or_else(|| segment.user_slice().filter(|_| unit.is_none()));
        let is_flux = |job: &Job| job.scheduler == Scheduler::Flux;
        let job =
            segment.job().filter(|job| manager_uid.is_some() == is_flux(job) && unit.is_none_or(|unit| job.is_managed_by(unit)));
        found = job.map(|job| (Job { uid: job.uid.or(manager_uid), ..job }, segment.end));
        unit = unit.or(Some(segment.name).filter(|_| segment.is_unit()));
    }
    found
}

/// The innermost unit or login session of a path, and where its cgroup ends. Only the outermost slice of a user is one: what is below a
/// user's manager or a unit may have any name.
fn unit_or_login(path: &str) -> Option<(HostUser, usize)> {
    let mut found: Option<(HostUser, usize)> = None;
    // The user of the manager or the sessions above.
    let mut uid = None;
    let mut first_unit: Option<&str> = None;
    for segment in segments(path, 0..path.len()) {
        if let Some(of_slice) = segment.user_slice().filter(|_| found.is_none()) {
            uid = Some(of_slice);
            found = Some((HostUser::Login(Login { uid: of_slice, session: None }), segment.end));
        } else if let Some((HostUser::Login(login), _)) = &mut found
            && let Some(session) = segment.session()
        {
            login.session.get_or_insert_with(|| session.to_owned());
        } else if segment.is_unit() {
            let outer = first_unit.map(str::to_owned);
            first_unit = first_unit.or(Some(segment.name));
            found = Some((HostUser::Unit(Unit { name: segment.name.to_owned(), outer, uid }), segment.end));
        }
    }
    found
}

impl NamedSegment<'_> {
    fn job(&self) -> Option<Job> {
        // By the first byte: most names of a user's own cgroups need no further look.
        match self.name.as_bytes().first()? {
            b'j' => self.slurm().or_else(|| self.lsf()),
            b's' => self.slurm().or_else(|| self.flux().map(|id| Job::new(Scheduler::Flux, id))),
            b'i' => self.flux().map(|id| Job::new(Scheduler::Flux, id)),
            b'c' => self.yarn().or_else(|| self.nomad()).or_else(|| self.htcondor().map(|id| Job::new(Scheduler::HtCondor, id))),
            b'p' => self.pbs().map(|id| Job::new(Scheduler::Pbs, id)),
            byte if byte.is_ascii_hexdigit() => self.nomad().or_else(|| self.pbs().map(|id| Job::new(Scheduler::Pbs, id))),
            _ => None,
        }
    }

    /// `slurmstepd.scope/job_<id>`, with the name of a node before it where several slurmd share a host, or the SLUID of the job; v1:
    /// `slurm[_<node>]/uid_<uid>/job_<id>`.
    fn slurm(&self) -> Option<Job> {
        let number = self.name.strip_prefix("job_").filter(|id| is_number(id));
        let job = |id: &str, uid, node: Option<&str>| {
            let instance = node.filter(|node| !node.is_empty()).map(str::to_owned);
            Job { uid, instance, ..Job::new(Scheduler::Slurm, id) }
        };
        if let Some(node) = self.parent.strip_suffix("slurmstepd.scope") {
            let node = node.strip_suffix('_').or(Some(node).filter(|node| node.is_empty()))?;
            return Some(job(number.or_else(|| is_sluid(self.name).then_some(self.name))?, None, Some(node)));
        }
        let uid = self.parent.strip_prefix("uid_")?.parse().ok()?;
        let node = self.grandparent.strip_prefix("slurm")?;
        let node = node.strip_prefix('_').or(Some(node).filter(|node| node.is_empty()))?;
        number.map(|id| job(id, Some(uid), Some(node)))
    }

    /// `<allocation>.<task>.scope` in a slice; v1: without the suffix, in `nomad`, or in a partition of it.
    fn nomad(&self) -> Option<Job> {
        let (allocation, task) = self.name.split_at_checked(36)?;
        let task = task.strip_prefix('.')?;
        let in_scope = task.strip_suffix(".scope").filter(|_| self.parent.ends_with(".slice"));
        let in_v1 = || Some(task).filter(|_| self.parent == "nomad" || self.grandparent == "nomad");
        let task = in_scope.or_else(in_v1).filter(|task| !task.is_empty() && is_uuid(allocation.as_bytes(), b'-'))?;
        Some(Job { task: Some(task.to_owned()), ..Job::new(Scheduler::Nomad, allocation) })
    }

    /// `hadoop-yarn/container_[e<epoch>_]<cluster>_<application>_<attempt>_<container>`.
    fn yarn(&self) -> Option<Job> {
        let numbers = self.name.strip_prefix("container_").filter(|_| self.parent.contains("yarn"))?;
        let numbers = match numbers.strip_prefix('e') {
            Some(rest) => rest.split_once('_').filter(|(epoch, _)| is_number(epoch))?.1,
            None => numbers,
        };
        let parts: Vec<&str> = numbers.split('_').collect();
        let [cluster, application, _, _] = parts[..] else { return None };
        let id = format!("application_{cluster}_{application}");
        let is_yarn = parts.iter().all(|part| is_number(part));
        is_yarn.then(|| Job { task: Some(self.name.to_owned()), ..Job::new(Scheduler::Yarn, id) })
    }

    /// `condor_<folder>_slot<number>[_<number>]@<host>`: the folder of the jobs, with `_` for `/`.
    fn htcondor(&self) -> Option<&str> {
        let (before, _) = self.name.split_once('@').filter(|_| self.name.starts_with("condor_"))?;
        let slot = before.rfind("slot")?;
        let is_slot = before.get(slot + 4..)?.split('_').all(is_number);
        self.name.get(slot..).filter(|_| is_slot)
    }

    /// `pbs_jobs.service/jobid/<id>`; v1: `pbspro/<id>`, `pbs_jobs/<id>`, `torque/<id>`; systemd of v1: `pbspro-<id>.slice`.
    fn pbs(&self) -> Option<&str> {
        let is_id = |id: &&str| id.split_once('.').is_some_and(|(number, server)| is_array_job(number) && !server.is_empty());
        let in_slice = self.name.strip_prefix("pbspro-").and_then(|name| name.strip_suffix(".slice"));
        let is_folder = matches!(self.parent, "pbspro" | "pbs_jobs" | "torque")
            || self.parent == "jobid" && matches!(self.grandparent, "pbs_jobs.service" | "pbs_jobs" | "pbspro");
        in_slice.or(is_folder.then_some(self.name)).filter(is_id)
    }

    /// `lsf/<cluster>/job.<id>.<process>.<time>`.
    fn lsf(&self) -> Option<Job> {
        let text = self.name.strip_prefix("job.").filter(|_| self.grandparent == "lsf")?;
        let (id, instance) = text.split_once('.').map_or((text, None), |(id, rest)| (id, Some(rest.to_owned())));
        is_array_job(id).then(|| Job { instance, ..Job::new(Scheduler::Lsf, id) })
    }

    /// `[imp-]shell-<rank>-<id>.service` of the manager of Flux's own user.
    fn flux(&self) -> Option<&str> {
        let unit = self.name.strip_suffix(".service")?;
        let (rank, id) = unit.strip_prefix("imp-").unwrap_or(unit).strip_prefix("shell-")?.split_once('-')?;
        let is_id = (id.starts_with('f') || id.starts_with('ƒ')) && id.chars().skip(1).all(|c| c.is_ascii_alphanumeric());
        Some(id).filter(|_| is_number(rank) && is_id)
    }

    /// Steps and tasks of Slurm.
    fn add_to(&self, job: &mut Job) {
        if job.scheduler != Scheduler::Slurm {
            return;
        }
        if let (None, Some(step)) = (&job.step, self.name.strip_prefix("step_")) {
            job.step = Some(step.to_owned());
        } else if let (None, Some(task)) = (&job.task, self.name.strip_prefix("task_")) {
            job.task = Some(task.to_owned());
        }
    }

    fn user_slice(&self) -> Option<u32> {
        let uid = self.name.strip_prefix("user-")?.strip_suffix(".slice")?;
        uid.parse().ok().filter(|_| self.parent == "user.slice")
    }

    fn session(&self) -> Option<&str> {
        self.name.strip_prefix("session-")?.strip_suffix(".scope")
    }

    /// Neither a session nor what runs the machine or the user's units.
    fn is_unit(&self) -> bool {
        let is_manager = self.name.starts_with("user@") || self.name == "init.scope";
        let is_unit = self.name.ends_with(".service") || self.name.ends_with(".scope");
        is_unit && !is_manager && self.session().is_none()
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// A number, with the index of an array job in brackets.
fn is_array_job(text: &str) -> bool {
    let number = text.strip_suffix(']').and_then(|text| text.split_once('[')).map_or(text, |(number, _)| number);
    is_number(number)
}

/// `s` and 13 digits or upper-case letters.
fn is_sluid(text: &str) -> bool {
    let rest = text.strip_prefix('s').unwrap_or_default();
    text.len() == SLUID && rest.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_uppercase())
}
