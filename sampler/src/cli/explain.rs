//! `explain`: its arguments, and explanations as text. Queries a running agent, which has process history and labels. Without an agent,
//! living processes are read from /proc and every label source is queried.

use std::path::PathBuf;

use anyhow::bail;
use clap::{ArgGroup, Args};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::access::{AccessArgs, AgentAccess};
use super::holders;
use super::request::{self, AgentResponse, document, unreachable};
use super::sample;
use crate::cli::output::{json, print};
use crate::cli::text::wrapped;
use crate::config::{Config, Settings};
use crate::explain::{Explanation, IncompleteContainers, Origin, ProcessJson, Providers, ResidencyJson, from_sources, plain_id};
use crate::labels::FILES;
use crate::query::Subject;

const UNKNOWN: &str = "unknown";

const EXAMPLES: &str = "\
Examples:
  gpu-sampler explain --pid 4711
  gpu-sampler explain --container 73e1a9
  gpu-sampler explain --gpu 0
  gpu-sampler explain --cgroup /kubepods/pod.../73e1... --offline --json
  gpu-sampler explain --sample 12.5s --gpu 0 --file slow-training.gpus";

/// For a server that is not an agent.
const REMEDY: &str = "name an agent with --agent or --listen, or query the label sources directly with --no-agent";

#[derive(Args)]
#[command(after_help = EXAMPLES, group = ArgGroup::new("subject").required(true).multiple(true).args(["pid", "cgroup", "container", "missing", "sample", "gpu"]))]
pub struct Explain {
    /// Process, by its PID on the host; a running agent keeps processes for 40 s after their end
    #[arg(long, value_name = "N", conflicts_with_all = ["offline", "cgroup", "container", "missing", "sample", "gpu"])]
    pid: Option<u32>,
    /// Cgroup, by its path within its hierarchy
    #[arg(long, value_name = "PATH", conflicts_with_all = ["container", "missing", "sample", "gpu"])]
    cgroup: Option<String>,
    /// Container, by its id or a unique prefix of it; with a running agent also by name, or by pod if the pod has one container
    #[arg(long, value_name = "ID", conflicts_with_all = ["offline", "missing", "sample", "gpu"])]
    container: Option<String>,
    /// List all containers with missing labels and the sources that could provide them; requires a running agent
    #[arg(long, conflicts_with_all = ["offline", "no_agent", "sample", "gpu"])]
    missing: bool,
    /// Sample of a session, by time or seconds after the start: the users that it is attributed to, and why
    #[arg(long, value_name = "TIME", requires_all = ["gpu", "file"], conflicts_with_all = ["offline", "agent", "no_agent"])]
    sample: Option<String>,
    /// GPU, by index or UUID: who holds it, used or not, and how that is known; requires a running agent. With --sample: the GPU of the
    /// sample
    #[arg(long, value_name = "GPU", conflicts_with_all = ["offline", "no_agent"])]
    gpu: Option<String>,
    /// With --sample: session file
    #[arg(long, value_name = "FILE", requires = "sample")]
    file: Option<PathBuf>,
    /// Parse the path only, without querying an agent or reading a file
    #[arg(long)]
    offline: bool,
    /// Agent to query [default: the one at --listen if it runs, else /proc and all label sources directly]
    #[arg(long, value_name = "URL", conflicts_with = "offline")]
    agent: Option<String>,
    /// Read /proc and query all label sources directly, even if an agent runs
    #[arg(long, conflicts_with_all = ["agent", "offline"])]
    no_agent: bool,
    /// Configuration file (TOML) of the agent
    #[arg(long, value_name = "FILE", env = "GPU_SAMPLER_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    access: AccessArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Explain {
    pub fn run(self) -> anyhow::Result<()> {
        if let (Some(time), Some(gpu), Some(file)) = (&self.sample, &self.gpu, &self.file) {
            let explained = sample::explain(file, gpu, time)?;
            return print(&if self.json { json(&explained)? } else { explained.text() });
        }
        if let Some(gpu) = &self.gpu {
            return self.print_answer(&format!("gpu={}", percent_encoded(gpu)), holders::text);
        }
        let subject = match (&self.cgroup, self.pid, &self.container) {
            (Some(path), ..) if !path.starts_with('/') => {
                bail!("--cgroup {path:?} is not a path within a hierarchy: such a path begins with /, as in /proc/PID/cgroup")
            }
            (Some(path), ..) if path.starts_with("/sys/fs/cgroup") => {
                bail!("--cgroup {path:?} contains the mount point: omit it, as in /proc/PID/cgroup")
            }
            (Some(path), ..) => Subject::Cgroup(path.clone()),
            (None, Some(pid), _) => Subject::Pid(pid),
            (None, None, Some(id)) if plain_id(id).is_empty() => bail!("--container {id:?} is not a container id"),
            (None, None, Some(id)) => Subject::Container(plain_id(id)),
            (None, None, None) => return self.list_missing(),
        };
        // As JSON the whole document is shown, with fields that only a newer agent has.
        print(&if self.json { json(&self.find::<Value>(&subject)?)? } else { text(&self.find(&subject)?) })
    }

    /// The configuration, and the address of the agent that it configures.
    fn agent(&self) -> anyhow::Result<(Config, AgentAccess)> {
        let config = self.settings.clone().validate(self.config.as_deref())?;
        let access = self.access.resolve(self.agent.as_deref(), &config)?;
        Ok((config, access))
    }

    fn list_missing(&self) -> anyhow::Result<()> {
        self.print_answer("missing=true", missing_text)
    }

    /// Prints what the agent answers to this query, which only an agent can answer.
    fn print_answer<T: DeserializeOwned>(&self, query: &str, text: impl Fn(&T) -> String) -> anyhow::Result<()> {
        let (_, access) = self.agent()?;
        let agent = &access.url;
        let body = match request::get(&access, &format!("/api/v1/explain?{query}"), REMEDY)? {
            AgentResponse::Found(body) => body,
            AgentResponse::NotFound(message) => bail!("{message}"),
            AgentResponse::NoAgent(error) => return Err(error.context(unreachable(agent))),
        };
        print(&if self.json { json(&document::<Value>(agent, &body)?)? } else { text(&document(agent, &body)?) })
    }

    fn find<T: DeserializeOwned>(&self, subject: &Subject) -> anyhow::Result<T> {
        let decoded = |explanation: Explanation| anyhow::Ok(serde_json::from_value(serde_json::to_value(explanation)?)?);
        if let (true, Subject::Cgroup(path)) = (self.offline, subject) {
            return decoded(Explanation::of_path(path));
        }
        let (config, access) = self.agent()?;
        let agent = &access.url;
        if self.no_agent {
            return decoded(from_sources(&config, subject)?);
        }
        let query = match subject {
            Subject::Pid(pid) => format!("/api/v1/explain?pid={pid}"),
            Subject::Cgroup(path) => format!("/api/v1/explain?cgroup={}", percent_encoded(path)),
            Subject::Container(id) => format!("/api/v1/explain?container={}", percent_encoded(id)),
        };
        match (request::get(&access, &query, REMEDY)?, subject) {
            (AgentResponse::Found(body), _) => document(agent, &body),
            (AgentResponse::NotFound(message), Subject::Pid(_) | Subject::Container(_)) => bail!("{message}"),
            // A path can be explained even if the cgroup does not exist.
            (AgentResponse::NotFound(_), Subject::Cgroup(path)) => {
                let mut explanation = Explanation::of_path(path);
                explanation.exists = Some(false);
                decoded(explanation)
            }
            (AgentResponse::NoAgent(error), _) if self.agent.is_some() => {
                Err(error.context(format!("no agent is reachable at {agent}; start `gpu-sampler run`, or omit --agent")))
            }
            (AgentResponse::NoAgent(_), _) => decoded(from_sources(&config, subject)?),
        }
    }
}

/// Each source with all the labels that it could provide.
fn by_source(would_fill: &Providers) -> Vec<(&str, String)> {
    let mut all: Vec<(&str, String)> = Vec::new();
    for (label, sources) in would_fill {
        for source in sources {
            match all.iter_mut().find(|(known, _)| known == source) {
                Some((_, labels)) => *labels += &format!(", {label}"),
                None => all.push((source, label.to_string())),
            }
        }
    }
    all
}

/// One block for each container.
fn missing_text(list: &IncompleteContainers) -> String {
    if list.containers.is_empty() {
        return "No container has a missing label.\n".into();
    }
    let mut out = String::new();
    for container in &list.containers {
        let runtime = container.runtime.as_deref().unwrap_or(UNKNOWN);
        let labels = container.missing.join(", ");
        out += &wrapped("", 0, &format!("{}  {runtime}  missing {labels}", container.container_id));
        out += &wrapped("  in  ", 6, &container.cgroup);
        for (source, labels) in by_source(&container.would_fill) {
            out += &wrapped("      ", 6, &format!("{labels} could be provided by {source}"));
        }
    }
    match list.more {
        0 => out,
        more => out + &format!("and {more} more\n"),
    }
}

/// Percent-encodes the characters that a query must not contain.
pub(super) fn percent_encoded(path: &str) -> String {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"/-._~:".contains(&b);
    path.bytes().map(|b| if is_plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// A named line; nothing for an empty value.
fn line(name: &str, value: &str) -> String {
    if value.is_empty() { String::new() } else { wrapped(&format!("{name:<14}"), 14, value) }
}

fn text(explanation: &Explanation) -> String {
    let or_empty = |value: &Option<String>| value.clone().unwrap_or_default();
    let mut out = line("kind", &explanation.kind);
    out += &line("runtime", explanation.runtime.as_deref().unwrap_or_default());
    out += &line("container id", &or_empty(&explanation.container_id));
    out += &line("pod uid", &or_empty(&explanation.pod_uid));
    out += &line("outer", &or_empty(&explanation.outer_container_id));
    for (name, value) in explanation.users.lines() {
        out += &line(name, &value);
    }
    out += &line("cgroup", &explanation.cgroup);
    for (label, known) in &explanation.labels {
        out += &line(label, &format!("{}   (from {})", known.value, known.source));
    }
    out += &line("ended", &or_empty(&explanation.ended));
    out += &line("missing", &explanation.missing.join(", "));
    for (source, labels) in by_source(&explanation.would_fill) {
        out += &line("", &format!("{labels} could be provided by {source}"));
    }
    out += &line("inapplicable", &explanation.not_applicable.join(", "));
    let (absent, present): (Vec<_>, Vec<_>) = explanation.tried.iter().partition(|attempt| attempt.is_absent());
    for (n, attempt) in present.into_iter().enumerate() {
        let endpoint = if attempt.endpoint == FILES { "" } else { &attempt.endpoint };
        let detail: Vec<&str> = [endpoint, &attempt.detail].into_iter().filter(|part| !part.is_empty()).collect();
        let head = format!("{:<14}{:<12}{:<10}", if n == 0 { "queried" } else { "" }, attempt.source, attempt.outcome);
        let indent = head.chars().count();
        out += wrapped(&head, indent, &detail.join(": ")).trim_end();
        out.push('\n');
    }
    if !absent.is_empty() {
        out += &line("absent", &format!("{} sockets at default or configured paths (--json lists them)", absent.len()));
    }
    if let Some(process) = &explanation.process {
        out += &history_text(process);
    }
    out + &line("known from", origin_text(explanation))
}

fn history_text(process: &ProcessJson) -> String {
    let mut out = String::new();
    for lifetime in &process.lives {
        let comm = process.comm.as_ref().map_or(String::new(), |comm| format!("{comm}, "));
        let end = lifetime.end.as_deref().unwrap_or("now");
        out += &line("process", &format!("{comm}{} to {end}", lifetime.start));
        for residency in &lifetime.stays {
            let ResidencyJson { from, certain_from, .. } = residency;
            let certain = if from == certain_from { String::new() } else { format!(" (certain from {certain_from})") };
            let cgroup = residency.cgroup.as_deref().unwrap_or(UNKNOWN);
            let to = residency.to.as_deref().unwrap_or("now");
            out += &line("  in", &format!("{cgroup}   {from}{certain} to {to}"));
        }
    }
    out
}

fn origin_text(explanation: &Explanation) -> &'static str {
    match (explanation.answered_by, explanation.exists) {
        (Origin::Agent, _) => "the running agent",
        (Origin::Path, Some(false)) => "the path only; there is no such cgroup now, as far as this command can see",
        (Origin::Path, _) => "the path only",
        (Origin::Sources, Some(false)) => "the label sources, queried now; there is no such cgroup now, and no agent runs",
        (Origin::Sources, _) => "/proc and the label sources, queried now; there is no history, because no agent runs",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_in_a_query_is_percent_encoded() {
        assert_eq!(percent_encoded("/a b/ü&x"), "/a%20b/%C3%BC%26x");
    }

    #[test]
    fn a_path_alone_is_explained_as_text() {
        let text = text(&Explanation::of_path(&format!("/docker/{}", "b".repeat(64))));
        for part in
            ["kind          container\n", "runtime       docker\n", "(from cgroup)", "missing       name, image", "the path only"]
        {
            assert!(text.contains(part), "{part:?} in {text}");
        }
    }
}
