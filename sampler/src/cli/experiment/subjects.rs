//! Victim and suspect of an experiment: their cgroups, and which suspects are refused.
//!
//! Only containers and, with `--whole-pod`, pods are frozen. A unit, a login session or a slice may contain what this command or the
//! machine needs to thaw it; a container with other containers inside would freeze users that were not named.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use sampler_core::cgroup_path::{CgroupIdentity, Kind, parse};
use sampler_core::experiment::{FreezeConsent, is_at_or_below};
use sampler_labels::Label;

use super::super::access::AgentAccess;
use super::super::explain::percent_encoded;
use super::super::request::{AgentResponse, document, get_within, unreachable};
use crate::config::Config;
use crate::explain::{Explanation, plain_id};
use crate::freeze::{Freezer, contains_process};
use crate::labels::{Consent, LabelConfig, MAY_FREEZE, consent};
use crate::observe::kernel::layout::{Layout, namespace_problem};
use crate::observe::kernel::proc::directory;

const REMEDY: &str = "name an agent with --agent or --listen";
/// Cgroups below the suspect that are read.
const MAX_BELOW: usize = 4096;

pub struct Subjects<'a> {
    pub access: &'a AgentAccess,
    pub config: &'a Config,
    pub layout: &'a Layout,
}

/// What is frozen.
pub struct FrozenSubject {
    /// As it was named.
    pub name: String,
    /// Namespace and pod, each empty if it is not known.
    namespace: String,
    pod: String,
    /// Path of its cgroup in the followed hierarchies.
    pub path: String,
    pub freezer: Freezer,
    /// Ids of its containers.
    containers: Vec<String>,
}

/// The path of the container, pod, job, unit or session that the path belongs to.
fn root_of<'a>(path: &'a str, identity: &CgroupIdentity) -> &'a str {
    path.get(..identity.root_len).filter(|root| !root.is_empty()).unwrap_or(path)
}

/// The pod that a cgroup belongs to.
fn pod_of(path: &str) -> Option<&str> {
    let ends = path.char_indices().filter(|(_, c)| *c == '/').map(|(at, _)| at).chain([path.len()]);
    ends.filter_map(|end| path.get(..end)).find(|above| parse(above).kind == Kind::Pod)
}

/// Why a cgroup of this kind is not frozen.
fn kind_problem(path: &str, identity: &CgroupIdentity, whole_pod: bool) -> Option<String> {
    let user = identity.short_name();
    match identity.kind {
        Kind::Pod if !whole_pod => Some("it is a pod: --whole-pod freezes all of its containers".into()),
        Kind::Container | Kind::Pod => None,
        Kind::Unit => Some(format!("it is the systemd unit {user}; only containers and pods are frozen")),
        Kind::Login => Some(format!("it is the login session {user}; only containers and pods are frozen")),
        Kind::NotContainer if path == "/" => Some("it is the root of the hierarchy, which contains every process".into()),
        Kind::NotContainer => {
            Some("it is a slice, a scope or another cgroup that is not a container; only containers and pods are frozen".into())
        }
        Kind::Sandbox => Some("it is the sandbox of a pod, which uses no GPU; name a container, or use --whole-pod".into()),
        Kind::Job | Kind::Monitor | Kind::Build => {
            Some(format!("it is a {}; only containers and pods are frozen", identity.kind.name()))
        }
    }
}

/// Cgroups of other users below this one, and the ids of all containers at or below it.
fn below(layout: &Layout, path: &str) -> anyhow::Result<(Vec<String>, Vec<String>)> {
    let (mut others, mut containers) = (Vec::new(), Vec::new());
    for (_, mount) in layout.mounts() {
        let mut folders: Vec<PathBuf> = directory(mount, path.as_bytes()).into_iter().filter(|folder| folder.is_dir()).collect();
        let mut read = 0;
        while let Some(folder) = folders.pop() {
            read += 1;
            if read > MAX_BELOW {
                bail!("{path} has more than {MAX_BELOW} cgroups below it");
            }
            let at = format!("/{}", folder.strip_prefix(mount).unwrap_or(&folder).display());
            let identity = parse(&at);
            containers.extend(identity.container_id.clone().filter(|_| identity.kind == Kind::Container));
            if identity.kind != Kind::NotContainer && root_of(&at, &identity) != path {
                others.push(root_of(&at, &identity).to_owned());
            }
            folders.extend(folders_in(&folder)?);
        }
    }
    for all in [&mut others, &mut containers] {
        all.sort();
        all.dedup();
    }
    Ok((others, containers))
}

fn folders_in(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        // The cgroup was removed meanwhile.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("cannot read {}", folder.display()))?,
    };
    Ok(entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect())
}

impl Subjects<'_> {
    /// The cgroup as the agent knows it, and the path of its user.
    async fn explained(&self, role: &str, name: &str) -> anyhow::Result<(String, Explanation)> {
        let query = if name.starts_with('/') {
            format!("cgroup={}", percent_encoded(name))
        } else if plain_id(name).is_empty() {
            bail!("--{role} {name:?} is not the name or id of a container");
        } else {
            format!("container={}", percent_encoded(&plain_id(name)))
        };
        let explained = match get_within(self.access, &format!("/api/v1/explain?{query}"), REMEDY).await? {
            AgentResponse::Found(body) => document::<Explanation>(&self.access.url, &body)?,
            AgentResponse::NotFound(message) => bail!("--{role} {name}: {message}"),
            AgentResponse::NoAgent(error) => return Err(error.context(unreachable(&self.access.url))),
        };
        if let Some(ended) = explained.ended {
            bail!("--{role} {name}: it has ended at {ended}");
        }
        let identity = parse(&explained.cgroup);
        Ok((root_of(&explained.cgroup, &identity).to_owned(), explained))
    }

    /// The path of the victim's cgroup.
    pub async fn victim(&self, name: &str) -> anyhow::Result<String> {
        let (path, _) = self.explained("victim", name).await?;
        match parse(&path).kind {
            Kind::Container | Kind::Pod | Kind::Job | Kind::Unit | Kind::Login => Ok(path),
            _ => bail!("--victim {name}: {path} is not a user of GPUs; name a container, pod, job, unit or login session"),
        }
    }

    pub async fn suspect(&self, name: &str, whole_pod: bool, victim: &str) -> anyhow::Result<FrozenSubject> {
        if let Some(problem) = namespace_problem() {
            bail!(
                "an experiment cannot check here what a freeze would stop: this command is {problem}; run it on the host, or in a \
                 container with --cgroupns=host"
            );
        }
        let (mut path, explained) = self.explained("suspect", name).await?;
        if whole_pod {
            path =
                pod_of(&path).with_context(|| format!("--suspect {name}: {path} is not in a pod; omit --whole-pod"))?.to_owned();
        }
        let refuse = |reason: String| anyhow::anyhow!("--suspect {name}: {path} is not frozen: {reason}");
        if let Some(problem) = kind_problem(&path, &parse(&path), whole_pod) {
            return Err(refuse(problem));
        }
        if is_at_or_below(victim, &path) || is_at_or_below(&path, victim) {
            return Err(refuse("it is the victim, or one of them contains the other".into()));
        }
        if contains_process(&self.config.path_procfs, "self", &path).context("cannot read the cgroups of this process")? {
            return Err(refuse("it contains this command, which could not thaw it; run it outside".into()));
        }
        let (others, containers) = below(self.layout, &path)?;
        if let Some(other) = others.first().filter(|_| !whole_pod) {
            return Err(refuse(format!("it contains another user, {other}, which would be frozen too")));
        }
        let freezer = Freezer::find(self.layout, &self.config.path_procfs, &path)?;
        if contains_process(&self.config.path_procfs, "self", &freezer.path).context("cannot read the cgroups of this process")? {
            return Err(refuse(format!("its freezer {} contains this command", freezer.path)));
        }
        let label = |name| explained.labels.get(name).map(|label| label.value.clone()).unwrap_or_default();
        let (namespace, pod) = (label(Label::Namespace.name()), label(Label::Pod.name()));
        Ok(FrozenSubject { name: name.to_owned(), namespace, pod, path, freezer, containers })
    }

    /// Why the suspect may be frozen. Fails unless all of its containers may be.
    pub async fn check_consent(&self, suspect: &FrozenSubject, i_may_freeze: bool) -> anyhow::Result<FreezeConsent> {
        if i_may_freeze {
            return Ok(FreezeConsent::Operator);
        }
        let (config, containers) = (LabelConfig::new(self.config, self.layout), suspect.containers.clone());
        let read = move || containers.iter().map(|id| (id.clone(), consent(&config, id))).collect::<Vec<_>>();
        let all = tokio::task::spawn_blocking(read).await.context("the files of the runtimes were not read")?;
        if all.is_empty() {
            bail!("--suspect {}: it has no container that could consent; --i-may-freeze freezes it nevertheless", suspect.name);
        }
        for (id, consent) in all {
            let reason = match consent {
                Consent::Given => continue,
                Consent::NotGiven => format!("the container {id} has no annotation or label {MAY_FREEZE}=true"),
                Consent::Unknown(problem) => format!("the annotations of the container {id} cannot be read: {problem}"),
            };
            bail!("--suspect {}: {reason}; add it, or repeat the command with --i-may-freeze", suspect.name);
        }
        Ok(FreezeConsent::Annotation)
    }
}

impl FrozenSubject {
    /// Everything that is frozen: who confirms or interrupts an experiment has to recognise it.
    pub fn describe(&self) -> String {
        let named = |what: &str, value: &str| if value.is_empty() { String::new() } else { format!("{what} {value}, ") };
        let containers = match &self.containers[..] {
            [] => String::new(),
            [one] => format!("container {one}, "),
            all => format!("{} containers ({}), ", all.len(), all.join(", ")),
        };
        format!("{}{}{containers}cgroup {}", named("namespace", &self.namespace), named("pod", &self.pod), self.path)
    }

    /// Fails if it cannot be frozen, or is frozen already: an experiment would thaw what something else has frozen.
    pub fn check_thawed(&self) -> anyhow::Result<()> {
        self.freezer.check_writable()?;
        if !self.freezer.is_thawed()? {
            bail!(
                "--suspect {}: {} is frozen already, by `docker pause` or another program; thaw it first",
                self.name,
                self.path
            );
        }
        Ok(())
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A pod with two containers.
    pub fn subject() -> FrozenSubject {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("b")).unwrap();
        for (file, text) in [("b/cgroup.procs", "1"), ("b/cgroup.freeze", "0")] {
            fs::write(dir.path().join(file), text).unwrap();
        }
        let layout = Layout { v2: Some(dir.path().to_owned()), ..Layout::default() };
        let freezer = Freezer::find(&layout, Path::new("/proc"), "/b").unwrap();
        let containers = vec!["73e1a9".into(), "c0ffee".into()];
        FrozenSubject {
            name: "b".into(),
            namespace: "ml".into(),
            pod: "trainer-0".into(),
            path: "/b".into(),
            freezer,
            containers,
        }
    }

    const POD: &str =
        "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod8bb25662_de9a_11e9_84e7_f8f21e04010c.slice";

    fn id(n: u8) -> String {
        format!("{n:064x}")
    }

    #[test]
    fn only_containers_and_whole_pods_are_frozen() {
        let container = format!("/docker/{}", id(1));
        let check = |path: &str, whole_pod: bool, expect: Option<&str>| {
            let problem = kind_problem(path, &parse(path), whole_pod);
            match (&problem, expect) {
                (None, None) => {}
                (Some(problem), Some(expect)) => assert!(problem.contains(expect), "{path}: {problem}"),
                _ => panic!("{path}: {problem:?}"),
            }
        };
        check(&container, false, None);
        check(POD, true, None);
        check(POD, false, Some("--whole-pod"));
        check("/system.slice/sshd.service", false, Some("the systemd unit sshd.service"));
        check("/user.slice/user-1000.slice/session-3.scope", false, Some("login session"));
        check("/init.scope", false, Some("not a container"));
        check("/system.slice", false, Some("not a container"));
        check("/", false, Some("the root of the hierarchy"));
    }

    #[test]
    fn the_pod_of_a_container_is_above_it() {
        let container = format!("{POD}/cri-containerd-{}.scope", id(2));
        assert_eq!((pod_of(&container), pod_of(POD)), (Some(POD), Some(POD)));
        assert_eq!(pod_of(&format!("/docker/{}", id(1))), None);
    }

    #[test]
    fn other_users_below_a_container_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout { v2: Some(dir.path().to_owned()), ..Layout::default() };
        let outer = format!("/docker/{}", id(1));
        let make = |path: &str| fs::create_dir_all(dir.path().join(path.trim_start_matches('/'))).unwrap();
        make(&format!("{outer}/init.scope"));
        assert_eq!(below(&layout, &outer).unwrap(), (vec![], vec![id(1)]));
        let inner = format!("{outer}/docker/{}", id(2));
        make(&inner);
        assert_eq!(below(&layout, &outer).unwrap(), (vec![inner], vec![id(1), id(2)]));
        let in_pod = format!("{POD}/cri-containerd-{}.scope", id(3));
        make(&in_pod);
        assert_eq!(below(&layout, POD).unwrap(), (vec![in_pod], vec![id(3)]));
    }
}
