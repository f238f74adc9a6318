//! `explain`: asks the running agent, who knows the past; without one looks into /proc, where only the living are.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;
use sampler_core::identity::Identity;
use serde_json::Value;

use super::ask::{self, Answer};
use crate::config::{DEFAULT_LISTEN, Settings};
use crate::explain::{Explanation, Subject, known, why_unknown};
use crate::labels::LabelView;
use crate::observe::kernel::layout::layout;
use crate::observe::kernel::scan;

const EXAMPLES: &str = "\
Examples:
  gpu-sampler explain --pid 4711
  gpu-sampler explain --cgroup /kubepods/pod.../73e1... --offline --json";

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Explain {
    /// A process, by its pid on the host; one that has ended is known to a running agent for 40 s
    #[arg(long, value_name = "N", required_unless_present = "cgroup", conflicts_with_all = ["cgroup", "offline"])]
    pid: Option<u32>,
    /// A cgroup, by its path within its hierarchy
    #[arg(long, value_name = "PATH")]
    cgroup: Option<String>,
    /// Parse the path only: no agent is asked, no file is read
    #[arg(long)]
    offline: bool,
    /// The agent to ask [default: http://127.0.0.1:9836 if one runs there, else /proc]
    #[arg(long, value_name = "URL", conflicts_with = "offline")]
    agent: Option<String>,
    /// File with the bearer token for an agent beyond loopback
    #[arg(long, value_name = "PATH")]
    token_file: Option<PathBuf>,
    /// Where the host's /proc is [default: /proc]
    #[arg(long, value_name = "DIR", env = "GPU_SAMPLER_PATH_PROCFS")]
    path_procfs: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Explain {
    pub fn run(self) -> anyhow::Result<()> {
        let subject = match (&self.cgroup, self.pid) {
            (Some(path), _) if !path.starts_with('/') => {
                bail!("--cgroup {path:?} is not a path within a hierarchy; it begins with /, as in /proc/PID/cgroup")
            }
            (Some(path), _) if path.starts_with("/sys/fs/cgroup") => {
                bail!("--cgroup {path:?} names a directory; leave the mount point out, as in /proc/PID/cgroup")
            }
            (Some(path), _) => Subject::Cgroup(path.clone()),
            (None, Some(pid)) => Subject::Pid(pid),
            (None, None) => bail!("give --pid or --cgroup"),
        };
        let told = self.find(&subject)?;
        let out = if self.json { format!("{}\n", serde_json::to_string_pretty(&told)?) } else { text(&told) };
        super::print(&out)
    }

    fn find(&self, subject: &Subject) -> anyhow::Result<Value> {
        if let (true, Subject::Cgroup(path)) = (self.offline, subject) {
            return Ok(serde_json::to_value(Explanation::of_path(path))?);
        }
        let token = self.token_file.as_ref().map(|path| {
            std::fs::read_to_string(path).map(|t| t.trim().to_owned()).with_context(|| format!("--token-file {}", path.display()))
        });
        let default = format!("http://{DEFAULT_LISTEN}");
        let agent = self.agent.as_ref().unwrap_or(&default);
        let query = match subject {
            Subject::Pid(pid) => format!("/api/v1/explain?pid={pid}"),
            Subject::Cgroup(path) => format!("/api/v1/explain?cgroup={}", encoded(path)),
        };
        match (ask::get(agent, &query, token.transpose()?.as_deref())?, subject) {
            (Answer::Found(body), _) => {
                serde_json::from_slice(&body).with_context(|| format!("what answers at {agent} is no gpu-sampler agent"))
            }
            (Answer::NotFound(words), Subject::Pid(_)) => bail!("{words}"),
            // A path is what it says, whether it is there or not.
            (Answer::NotFound(_), Subject::Cgroup(path)) => {
                let mut told = serde_json::to_value(Explanation::of_path(path))?;
                told["exists"] = false.into();
                Ok(told)
            }
            (Answer::NoAgent(error), _) if self.agent.is_some() => {
                Err(error.context(format!("no agent answers at {agent}; start `gpu-sampler run`, or leave --agent out")))
            }
            (Answer::NoAgent(_), Subject::Pid(pid)) => self.look(*pid),
            (Answer::NoAgent(_), Subject::Cgroup(path)) => Ok(serde_json::to_value(Explanation::of_path(path))?),
        }
    }

    /// No agent runs: what /proc shows of a living process.
    fn look(&self, pid: u32) -> anyhow::Result<Value> {
        let settings = Settings { path_procfs: self.path_procfs.clone(), ..Settings::default() };
        let procfs = settings.validate(None)?.path_procfs;
        let seen = scan::sight(&procfs, &layout(&procfs), std::iter::once(pid));
        if let Some(problem) = seen.problems.first() {
            bail!("{problem}");
        }
        let mut identity = Identity::default();
        for fact in seen.facts {
            identity.observe(fact);
        }
        let subject = Subject::Pid(pid);
        let Some(known) = known(&identity, &subject) else {
            bail!("{}", why_unknown(&procfs, pid, None));
        };
        let mut told = Explanation::new(&subject, &known, &LabelView::new());
        told.answered_by = "procfs";
        Ok(serde_json::to_value(told)?)
    }
}

/// Percent-encodes what a query may not hold.
fn encoded(path: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/-._~:".contains(&b);
    path.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

fn text(told: &Value) -> String {
    use std::fmt::Write as _;
    let word = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    let list = |value: &Value| value.as_array().into_iter().flatten().map(word).collect::<Vec<_>>().join(", ");
    let mut out = String::new();
    let mut line = |name: &str, value: &str| {
        if !value.is_empty() {
            // A String takes everything.
            let _written = writeln!(out, "{name:<14}{value}");
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
    line("missing", &list(&told["missing"]));
    for life in told["process"]["lives"].as_array().into_iter().flatten() {
        line("process", &format!("{} to {}", word(&life["start"]), life["end"].as_str().unwrap_or("now")));
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
        Some("procfs") => "/proc, now; no agent runs, so nothing is known of the past",
        _ if told["exists"] == false => "the path alone: the running agent knows of no such cgroup now",
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
