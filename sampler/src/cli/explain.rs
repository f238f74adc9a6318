//! `explain`: asks the running agent, who knows the past and has the labels; without one looks into /proc, where only the living
//! are, and asks every source of labels itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::{ArgGroup, Args};
use sampler_core::cgroup_path::Kind;
use sampler_core::identity::Identity;
use sampler_core::observation::CgroupFact;
use sampler_core::units::BootNs;
use sampler_labels::ABSENT;
use serde_json::Value;

use super::ask::{self, AgentResponse};
use super::sample;
use crate::cli::output::{print, wrapped};
use crate::config::{Config, Settings};
use crate::explain::{Explanation, no_container, plain_id, record_of, why_unknown};
use crate::labels::{FILES, LabelConfig, once};
use crate::observe::kernel::layout::{Layout, layout};
use crate::observe::kernel::{cgroupfs, scan};
use crate::query::{KnownSubject, Subject, known};

const EXAMPLES: &str = "\
Examples:
  gpu-sampler explain --pid 4711
  gpu-sampler explain --container 73e1a9
  gpu-sampler explain --cgroup /kubepods/pod.../73e1... --offline --json
  gpu-sampler explain --sample 12.5s --gpu 0 --file slow-training.gpus";

/// Where something else than an agent answers.
const REMEDY: &str = "name one with --agent or --listen, or do without: --no-agent asks the sources from here";

#[derive(Args)]
#[command(after_help = EXAMPLES, group = ArgGroup::new("subject").required(true).args(["pid", "cgroup", "container", "missing", "sample"]))]
pub struct Explain {
    /// A process, by its pid on the host; one that has ended is known to a running agent for 40 s
    #[arg(long, value_name = "N", conflicts_with = "offline")]
    pid: Option<u32>,
    /// A cgroup, by its path within its hierarchy
    #[arg(long, value_name = "PATH")]
    cgroup: Option<String>,
    /// A container, by its id or enough of its beginning; a running agent also knows names, and pods of one container
    #[arg(long, value_name = "ID", conflicts_with = "offline")]
    container: Option<String>,
    /// Every container of which a label is missing, and who would tell it; needs a running agent
    #[arg(long, conflicts_with_all = ["offline", "no_agent"])]
    missing: bool,
    /// A sample of a recorded session, by its time or seconds after the start: to whom it went, and why
    #[arg(long, value_name = "TIME", requires_all = ["gpu", "file"], conflicts_with_all = ["offline", "agent", "no_agent"])]
    sample: Option<String>,
    /// With --sample: the GPU, by index or UUID
    #[arg(long, value_name = "GPU", requires = "sample")]
    gpu: Option<String>,
    /// With --sample: the session
    #[arg(long, value_name = "FILE", requires = "sample")]
    file: Option<PathBuf>,
    /// Parse the path only: no agent is asked, no file is read
    #[arg(long)]
    offline: bool,
    /// The agent to ask [default: the one at --listen if it runs; else /proc and every source of labels are asked here]
    #[arg(long, value_name = "URL", conflicts_with = "offline")]
    agent: Option<String>,
    /// Ask no agent: look into /proc and ask every source of labels from here
    #[arg(long, conflicts_with_all = ["agent", "offline"])]
    no_agent: bool,
    /// Configuration file (TOML) of the agent
    #[arg(long, value_name = "FILE", env = "GPU_SAMPLER_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Explain {
    pub fn run(self) -> anyhow::Result<()> {
        if let (Some(time), Some(gpu), Some(file)) = (&self.sample, &self.gpu, &self.file) {
            let told = sample::explain(file, gpu, time)?;
            let json = || anyhow::Ok(format!("{}\n", serde_json::to_string_pretty(&told)?));
            return print(&if self.json { json()? } else { sample::text(&told) });
        }
        let subject = match (&self.cgroup, self.pid, &self.container) {
            (Some(path), ..) if !path.starts_with('/') => {
                bail!("--cgroup {path:?} is not a path within a hierarchy; it begins with /, as in /proc/PID/cgroup")
            }
            (Some(path), ..) if path.starts_with("/sys/fs/cgroup") => {
                bail!("--cgroup {path:?} names a directory; leave the mount point out, as in /proc/PID/cgroup")
            }
            (Some(path), ..) => Subject::Cgroup(path.clone()),
            (None, Some(pid), _) => Subject::Pid(pid),
            (None, None, Some(id)) if plain_id(id).is_empty() => bail!("--container {id:?} is no container's id"),
            (None, None, Some(id)) => Subject::Container(plain_id(id)),
            (None, None, None) => return self.list_missing(),
        };
        let told = self.find(&subject)?;
        let out = if self.json { format!("{}\n", serde_json::to_string_pretty(&told)?) } else { text(&told) };
        print(&out)
    }

    /// The configuration, and the address of the agent that has it.
    fn agent(&self) -> anyhow::Result<(Config, String)> {
        let mut settings = self.settings.clone();
        // Whom the agent lets in is its own business.
        settings.open_metrics.get_or_insert(true);
        let config = settings.validate(self.config.as_deref())?;
        let mut listen = config.listen;
        if listen.ip().is_unspecified() {
            listen.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
        }
        let agent = self.agent.clone().unwrap_or_else(|| format!("http://{listen}"));
        Ok((config, agent))
    }

    fn list_missing(&self) -> anyhow::Result<()> {
        let (config, agent) = self.agent()?;
        let told: Value = match ask::get(&agent, "/api/v1/explain?missing=true", config.token.as_deref(), REMEDY)? {
            AgentResponse::Found(body) => {
                serde_json::from_slice(&body).with_context(|| format!("what answers at {agent} is no gpu-sampler agent"))?
            }
            AgentResponse::NotFound(words) => bail!("{words}"),
            AgentResponse::NoAgent(error) => {
                return Err(
                    error.context(format!("no agent answers at {agent}; start `gpu-sampler run`, or name one with --agent"))
                );
            }
        };
        print(&if self.json { format!("{}\n", serde_json::to_string_pretty(&told)?) } else { missing_text(&told) })
    }

    fn find(&self, subject: &Subject) -> anyhow::Result<Value> {
        if let (true, Subject::Cgroup(path)) = (self.offline, subject) {
            return Ok(serde_json::to_value(Explanation::of_path(path))?);
        }
        let (config, agent) = self.agent()?;
        if self.no_agent {
            return look(&config, subject);
        }
        let query = match subject {
            Subject::Pid(pid) => format!("/api/v1/explain?pid={pid}"),
            Subject::Cgroup(path) => format!("/api/v1/explain?cgroup={}", encoded(path)),
            Subject::Container(id) => format!("/api/v1/explain?container={}", encoded(id)),
        };
        match (ask::get(&agent, &query, config.token.as_deref(), REMEDY)?, subject) {
            (AgentResponse::Found(body), _) => {
                serde_json::from_slice(&body).with_context(|| format!("what answers at {agent} is no gpu-sampler agent"))
            }
            (AgentResponse::NotFound(words), Subject::Pid(_) | Subject::Container(_)) => bail!("{words}"),
            // A path is what it says, whether it is there or not.
            (AgentResponse::NotFound(_), Subject::Cgroup(path)) => {
                let mut told = Explanation::of_path(path);
                told.exists = Some(false);
                Ok(serde_json::to_value(told)?)
            }
            (AgentResponse::NoAgent(error), _) if self.agent.is_some() => {
                Err(error.context(format!("no agent answers at {agent}; start `gpu-sampler run`, or leave --agent out")))
            }
            (AgentResponse::NoAgent(_), _) => look(&config, subject),
        }
    }
}

/// No agent runs: what /proc and cgroupfs show now, and what every source says when asked.
fn look(config: &Config, subject: &Subject) -> anyhow::Result<Value> {
    let layout = layout(&config.path_procfs);
    let known = match subject {
        Subject::Pid(pid) => look_for_pid(config, *pid)?,
        Subject::Cgroup(path) => KnownSubject { path: path.clone(), container: None, gone: None, lives: Vec::new() },
        Subject::Container(id) => {
            let mut found = containers(&layout, id);
            if found.iter().any(|(known, _)| known == id) {
                found.retain(|(known, _)| known == id);
            }
            let mut ids: Vec<&str> = found.iter().map(|(id, _)| id.as_str()).collect();
            ids.sort_unstable();
            ids.dedup();
            let (&[_], Some((_, path))) = (&ids[..], found.first()) else {
                let several: Vec<String> = ids.iter().map(|id| id.chars().take(12).collect()).collect();
                bail!("{}", no_container(id, &several));
            };
            KnownSubject { path: path.clone(), container: None, gone: None, lives: Vec::new() }
        }
    };
    let record = Arc::new(record_of(&known.path));
    let is_container = matches!(record.identity.kind, Kind::Container | Kind::Sandbox);
    let there = |(_, mount): (u32, &Path)| mount.join(known.path.trim_start_matches('/')).is_dir();
    let exists = layout.mounts().any(there);
    // One that is not there may have left files and be known to its runtime.
    let asked = if is_container {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the IO runtime")?;
        let asked = runtime.block_on(once(&LabelConfig::new(config, &layout), record));
        // A file read may hang in the kernel; it must not keep the answer.
        runtime.shutdown_background();
        Some(asked)
    } else {
        None
    };
    let (labels, tried) = asked.map(|a| (a.labels, a.tried)).unzip();
    let mut told = Explanation::new(subject, &known, labels.as_ref(), tried.unwrap_or_default(), &config.path_procfs);
    told.answered_by = if is_container { "sources" } else { "path" };
    told.exists = Some(exists);
    Ok(serde_json::to_value(told)?)
}

fn look_for_pid(config: &Config, pid: u32) -> anyhow::Result<KnownSubject> {
    let procfs = &config.path_procfs;
    let seen = scan::sight(procfs, &layout(procfs), std::iter::once(pid));
    if let Some(problem) = seen.problems.first() {
        bail!("{problem}");
    }
    let mut identity = Identity::default();
    for fact in seen.facts {
        identity.observe(fact);
    }
    match known(&identity, &Subject::Pid(pid)) {
        Some(known) => Ok(known),
        None => bail!("{}", why_unknown(procfs, pid, None)),
    }
}

/// Containers whose ids begin so: their ids, with the paths of their cgroups.
fn containers(layout: &Layout, wanted: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (hierarchy, mount) in layout.mounts() {
        let mut look = |folder: &Path, _: CgroupFact| {
            let path = format!("/{}", folder.strip_prefix(mount).unwrap_or(folder).display());
            let record = record_of(&path);
            let id = record.identity.container_id.filter(|id| record.cgroup_path == path && id.starts_with(wanted));
            found.extend(id.map(|id| (id, path)));
        };
        // What cannot be seen cannot be found; the answer says so.
        let _all = cgroupfs::walk(hierarchy, mount, BootNs(0), &mut |_, _| {}, &mut look);
    }
    found
}

/// Each source with all the labels that it would tell.
fn fillers(would_fill: &Value) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = Vec::new();
    for (label, who) in would_fill.as_object().into_iter().flatten() {
        for who in who.as_array().into_iter().flatten().filter_map(Value::as_str) {
            match all.iter_mut().find(|(known, _)| known == who) {
                Some((_, labels)) => *labels += &format!(", {label}"),
                None => all.push((who.to_owned(), label.clone())),
            }
        }
    }
    all
}

/// One block for each container.
fn missing_text(told: &Value) -> String {
    let all = told["containers"].as_array().map(Vec::as_slice).unwrap_or_default();
    if all.is_empty() {
        return "No container lacks a label.\n".into();
    }
    let mut out = String::new();
    for one in all {
        let word = |key: &str| one[key].as_str().unwrap_or("unknown").to_owned();
        let labels: Vec<&str> = one["missing"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        out += &wrapped("", 0, &format!("{}  {}  missing {}", word("container_id"), word("runtime"), labels.join(", ")));
        out += &wrapped("  in  ", 6, &word("cgroup"));
        for (who, labels) in fillers(&one["would_fill"]) {
            out += &wrapped("      ", 6, &format!("{labels} would come from {who}"));
        }
    }
    match told["more"].as_u64() {
        None | Some(0) => out,
        Some(more) => out + &format!("and {more} more\n"),
    }
}

/// Percent-encodes what a query may not hold.
fn encoded(path: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/-._~:".contains(&b);
    path.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

fn text(told: &Value) -> String {
    let word = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    let list = |value: &Value| value.as_array().into_iter().flatten().map(word).collect::<Vec<_>>().join(", ");
    let mut out = String::new();
    let mut line = |name: &str, value: &str| {
        if !value.is_empty() {
            out += &wrapped(&format!("{name:<14}"), 14, value);
        }
    };
    line("kind", &word(&told["kind"]));
    for (name, key) in [
        ("runtime", "runtime"),
        ("container id", "container_id"),
        ("pod uid", "pod_uid"),
        ("outer", "outer_container_id"),
        ("cgroup", "cgroup"),
    ] {
        line(name, told[key].as_str().unwrap_or_default());
    }
    for (label, value) in told["labels"].as_object().into_iter().flatten() {
        line(label, &format!("{}   (from {})", word(&value["value"]), word(&value["source"])));
    }
    line("ended", told["ended"].as_str().unwrap_or_default());
    line("missing", &list(&told["missing"]));
    for (who, labels) in fillers(&told["would_fill"]) {
        line("", &format!("{labels} would come from {who}"));
    }
    line("not for it", &list(&told["not_applicable"]));
    let all = || told["tried"].as_array().into_iter().flatten();
    let absent = |tried: &&Value| tried["detail"] == ABSENT;
    for (n, tried) in all().filter(|t| !absent(t)).enumerate() {
        let endpoint = tried["endpoint"].as_str().filter(|e| *e != FILES).unwrap_or_default();
        let said = [endpoint, tried["detail"].as_str().unwrap_or_default()];
        let said: Vec<&str> = said.into_iter().filter(|part| !part.is_empty()).collect();
        let head =
            format!("{:<14}{:<12}{:<10}", if n == 0 { "tried" } else { "" }, word(&tried["source"]), word(&tried["outcome"]));
        let indent = head.chars().count();
        out += wrapped(&head, indent, &said.join(": ")).trim_end();
        out.push('\n');
    }
    let mut line = |name: &str, value: &str| {
        if !value.is_empty() {
            out += &wrapped(&format!("{name:<14}"), 14, value);
        }
    };
    let usual = all().filter(absent).count();
    if usual > 0 {
        line("not there", &format!("{usual} sockets at usual or given places (--json lists them)"));
    }
    for life in told["process"]["lives"].as_array().into_iter().flatten() {
        let comm = told["process"]["comm"].as_str().map_or(String::new(), |comm| format!("{comm}, "));
        line("process", &format!("{comm}{} to {}", word(&life["start"]), life["end"].as_str().unwrap_or("now")));
        for stay in life["stays"].as_array().into_iter().flatten() {
            let until = stay["to"].as_str().unwrap_or("now");
            let since = match (&stay["from"], &stay["certain_from"]) {
                (from, certain) if from == certain => word(from),
                (from, certain) => format!("{} (certain from {})", word(from), word(certain)),
            };
            line("  in", &format!("{}   {since} to {until}", word(&stay["cgroup"])));
        }
    }
    let by = match told["answered_by"].as_str() {
        Some("agent") => "the running agent",
        _ if told["exists"] == false && told["answered_by"] != "sources" => {
            "the path alone: there is no such cgroup now, as far as can be seen"
        }
        Some("sources") if told["exists"] == false => "the sources, asked now; there is no such cgroup now, and no agent runs",
        Some("sources") => "/proc and the sources, asked now; no agent runs, so nothing is known of the past",
        _ => "the path alone",
    };
    line("known from", by);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries() {
        assert_eq!(encoded("/a b/ü&x"), "/a%20b/%C3%BC%26x");
    }

    #[test]
    fn a_path_in_words() {
        let told = serde_json::to_value(Explanation::of_path(&format!("/docker/{}", "b".repeat(64)))).unwrap();
        let text = text(&told);
        for part in [
            "kind          container\n",
            "runtime       docker\n",
            "(from cgroup)",
            "missing       name, image",
            "the path alone",
        ] {
            assert!(text.contains(part), "{part:?} in {text}");
        }
    }
}
