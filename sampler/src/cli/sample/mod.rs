//! `explain --sample`: to whom one sample of the driver went, and what is known about why, from a session file.

use std::collections::HashMap;
use std::path::Path;
use std::time::UNIX_EPOCH;

use anyhow::{Context as _, bail};
use sampler_core::aggregate::{Aggregate, Range, Settings};
use sampler_core::device::{GpuInfo, Reason};
use sampler_core::fact::{
    AttributedProcess, Fact, GpuFact, Holder, HostProcess, LabelFact, UnobservedReason, User, UtilizationSample,
};
use sampler_core::observation::ProcessKind;
use sampler_core::units::{BootNs, ContainerKey, WallTime, rfc3339};
use sampler_session::Session;
use serde_json::{Value, json};

use crate::cli::output::wrapped;
use crate::session;

/// Everything about the sample of this GPU that covers this time.
pub fn explain(file: &Path, gpu: &str, time: &str) -> anyhow::Result<Value> {
    let session = session::read(file)?;
    of(&session, gpu, time).with_context(|| format!("{} does not tell", file.display()))
}

fn of(session: &Session, gpu: &str, time: &str) -> anyhow::Result<Value> {
    let clock = Clock::new(session);
    let at = clock.boot(time)?;
    let (slot, info) = device(session, gpu)?;
    let known = UserNames::new(session);
    let mut held = None;
    let (mut found, mut nearest): (Option<(BootNs, &GpuFact)>, Option<BootNs>) = (None, None);
    for fact in &session.facts {
        let Fact::Gpu { gpu, at: told, fact } = fact else { continue };
        if *gpu != slot {
            continue;
        }
        if let GpuFact::Held(list) = fact
            && *told <= at
        {
            held = Some((*told, list.as_deref()));
        }
        let Some(ns) = fact.span_ns() else { continue };
        if told.minus(ns) < at && at <= *told {
            found = Some((*told, fact));
        }
        if nearest.is_none_or(|nearest| told.0.abs_diff(at.0) < nearest.0.abs_diff(at.0)) {
            nearest = Some(*told);
        }
    }
    let Some((told, fact)) = found else {
        let near = nearest.map(|at| format!("; the nearest is at {}", clock.words(at))).unwrap_or_default();
        bail!("there is nothing of GPU {} at {}{near}", info.uuid, clock.words(at));
    };
    let mut answer = json!({
        "gpu": {"uuid": info.uuid.0, "index": info.index, "model": info.model},
        "asked": clock.words(at),
        "time": clock.words(told),
        "after_start_seconds": clock.after_start(told),
        "covers_seconds": fact.span_ns().unwrap_or_default() as f64 / 1e9,
        "held": held.and_then(|(at, list)| list.map(|list| json!({
            "time": clock.words(at),
            "processes": list.iter().map(|holder| known.holder(holder)).collect::<Vec<_>>(),
        }))),
        "credited": credited(session, slot, told).into_iter().map(|(user, seconds)| {
            json!({ "user": known.user(user), "seconds": seconds })
        }).collect::<Vec<_>>(),
        "damage": session.damage,
    });
    let what = answer.as_object_mut().context("no object")?;
    what.extend(sample(fact, &known, &clock));
    Ok(answer)
}

/// To whom the time of that one fact is credited, by the code that credits it live: seconds, most first.
fn credited(session: &Session, gpu: u32, at: BootNs) -> Vec<(User, f64)> {
    let range = Range { after: at.minus(1), to: at };
    let mut aggregate = Aggregate::new(Settings { keep_history: true, range, ..Settings::default() });
    session.facts.iter().for_each(|fact| aggregate.apply(fact));
    aggregate.finish();
    let device = aggregate.gpus().find(|(slot, _)| u32::try_from(*slot) == Ok(gpu));
    let credits = device.into_iter().flat_map(|(_, device)| device.credits());
    let mut all: Vec<(User, f64)> = credits.map(|(user, credit)| (*user, credit.ns * 1e-9)).filter(|(_, s)| *s > 0.0).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    all
}

fn sample(fact: &GpuFact, known: &UserNames<'_>, clock: &Clock<'_>) -> serde_json::Map<String, Value> {
    let value = match fact {
        GpuFact::Utilization(sample) => json!({
            "state": "sample",
            "busy_percent": sample.busy_percent,
            "driver_stamp_ns": sample.stamp.0,
            "rows": sample.processes.iter().map(|process| known.process(process, clock)).collect::<Vec<_>>(),
            "went_to": went_to(sample),
        }),
        GpuFact::Unqueried(_, sample) => json!({
            "state": "sample",
            "busy_percent": sample.busy_percent,
            "driver_stamp_ns": sample.stamp.0,
            "rows": [],
            "went_to": "its neighbours: its process was not queried, so its busy time is divided over the queried samples around it",
        }),
        GpuFact::Unobserved { why, .. } => json!({ "state": "unobserved", "went_to": unseen(*why) }),
        GpuFact::Measured { busy_ratio, .. } => json!({
            "state": "measured",
            "busy_percent": busy_ratio * 100.0,
            "went_to": "nobody: GPM measures how busy the device is, and names nobody",
        }),
        GpuFact::Unsupported { .. } => json!({ "state": "unsupported", "went_to": "nobody: this device has no samples" }),
        _ => json!({ "state": "idle", "went_to": "nobody: the device was idle" }),
    };
    match value {
        Value::Object(map) => map,
        _ => serde_json::Map::new(),
    }
}

fn went_to(sample: &UtilizationSample) -> &'static str {
    match (&sample.processes[..], sample.busy_percent) {
        (_, 0) => "nobody: the device was idle",
        ([], _) => "its neighbours: the driver names nobody for it, so its busy time is divided over the samples around it",
        ([_], _) => "the process of its row",
        _ => "the processes of its rows",
    }
}

fn unseen(why: UnobservedReason) -> &'static str {
    match why {
        UnobservedReason::Missing => "nobody: samples are missing, the driver's ring went round before it was read",
        UnobservedReason::NotAsked => "nobody: its process was not queried, by an agent that did not attribute such samples",
        UnobservedReason::NoSamples => "nobody: the driver had no samples, and did not say that the device was idle",
        UnobservedReason::NoAnswer => "nobody: the driver did not answer for longer than its ring holds",
        UnobservedReason::Unread => "nobody: the file is damaged there",
        UnobservedReason::Start => "nobody: the agent had just started, or the device was opened again",
    }
}

fn reason(reason: Reason) -> &'static str {
    match reason {
        Reason::NoPid => "the driver names nobody",
        Reason::InvalidPid => "the pid is none",
        Reason::PidUnknown => "no process with this pid was known at that time",
        Reason::Host => "a process outside containers",
        Reason::Mps => "a client of the multi-process service: no sample tells them apart",
        Reason::Ambiguous => "within what the clocks leave open the pid had two users",
        Reason::Lost => "kernel events were lost then",
    }
}

fn device<'a>(session: &'a Session, wanted: &str) -> anyhow::Result<(u32, &'a GpuInfo)> {
    let all: HashMap<u32, &GpuInfo> = session
        .facts
        .iter()
        .filter_map(|fact| match fact {
            Fact::Gpu { gpu, fact: GpuFact::Opened(info), .. } => Some((*gpu, &**info)),
            _ => None,
        })
        .collect();
    let is_meant = |info: &GpuInfo| match wanted.parse::<u32>() {
        Ok(index) => info.index == index && info.parent.is_none(),
        Err(_) => info.uuid.0.starts_with(wanted),
    };
    let mut meant = all.iter().filter(|(_, info)| is_meant(info));
    match (meant.next(), meant.next()) {
        (Some((slot, info)), None) => Ok((*slot, info)),
        (Some(_), Some(_)) => bail!("--gpu {wanted} means several; give more of the UUID"),
        (None, _) => {
            let mut names: Vec<String> = all.values().map(|info| format!("{} ({})", info.index, info.uuid)).collect();
            names.sort();
            bail!("there is no GPU {wanted:?} in it; it has {}", names.join(", "));
        }
    }
}

/// Between boot time and what people say.
struct Clock<'a>(&'a Session);

impl Clock<'_> {
    fn new(session: &Session) -> Clock<'_> {
        Clock(session)
    }

    /// Both clocks, where the difference to what is asked is least: the wall clock may have been set.
    fn pair(&self, difference: impl Fn(BootNs, WallTime) -> u64) -> (BootNs, WallTime) {
        let told = self.0.facts.iter().filter_map(|fact| match fact {
            Fact::Time { at, wall } => Some((*at, *wall)),
            _ => None,
        });
        let header = (self.0.header.start, self.0.header.start_wall);
        told.chain([header]).min_by_key(|(at, wall)| difference(*at, *wall)).unwrap_or(header)
    }

    fn wall(&self, at: BootNs) -> WallTime {
        let (boot, wall) = self.pair(|boot, _| boot.0.abs_diff(at.0));
        WallTime((wall.0.saturating_add(at.0)).saturating_sub(boot.0))
    }

    fn words(&self, at: BootNs) -> String {
        rfc3339(self.wall(at))
    }

    fn after_start(&self, at: BootNs) -> f64 {
        (at.0 as f64 - self.0.header.start.0 as f64) / 1e9
    }

    /// RFC 3339, or an offset from the start.
    fn boot(&self, text: &str) -> anyhow::Result<BootNs> {
        if let Ok(time) = humantime::parse_rfc3339_weak(text) {
            let since = time.duration_since(UNIX_EPOCH).context("a time before 1970")?;
            let asked = u64::try_from(since.as_nanos()).context("a time too far away")?;
            let (boot, wall) = self.pair(|_, wall| wall.0.abs_diff(asked));
            return Ok(BootNs(boot.0.saturating_add(asked).saturating_sub(wall.0)));
        }
        let seconds = text.parse::<f64>().ok().filter(|seconds| *seconds >= 0.0 && *seconds < 1e9);
        let offset = seconds.map(|seconds| (seconds * 1e9) as u64).or_else(|| {
            let duration = humantime::parse_duration(text).ok()?;
            u64::try_from(duration.as_nanos()).ok()
        });
        let offset = offset.with_context(|| {
            format!(
                "--sample {text:?} is no time; give one such as 2026-05-04T10:20:30.5Z, or an offset from the start such as 12.5s"
            )
        })?;
        Ok(self.0.header.start.plus(offset))
    }
}

/// Names of users.
struct UserNames<'a> {
    labels: HashMap<ContainerKey, &'a LabelFact>,
    paths: HashMap<ContainerKey, (&'a str, Option<&'a str>)>,
    comms: HashMap<HostProcess, &'a str>,
}

impl<'a> UserNames<'a> {
    fn new(session: &'a Session) -> Self {
        let (mut labels, mut paths, mut comms) = (HashMap::new(), HashMap::new(), HashMap::new());
        for fact in &session.facts {
            match fact {
                Fact::Labels(fact) => drop(labels.insert(fact.key, fact)),
                Fact::Container(fact) => {
                    paths.insert(fact.key, (fact.cgroup_path.as_str(), fact.container_id.as_deref()));
                }
                Fact::Comm { process, comm } => drop(comms.insert(*process, comm.as_str())),
                _ => {}
            }
        }
        Self { labels, paths, comms }
    }

    fn user(&self, user: User) -> Value {
        match user {
            User::Container(key) => {
                let labels = self.labels.get(&key);
                let text = |get: fn(&LabelFact) -> &str| labels.map(|labels| get(labels)).filter(|text| !text.is_empty());
                let (path, id) = self.paths.get(&key).copied().unzip();
                json!({
                    "kind": "container",
                    "id": path,
                    "container_id": id.flatten(),
                    "namespace": text(|l| &l.namespace),
                    "pod": text(|l| &l.pod),
                    "container": text(|l| &l.container),
                    "name": text(|l| &l.name),
                })
            }
            User::Host(process) => json!({ "kind": "host", "comm": self.comms.get(&process) }),
            User::Nobody(why) => json!({ "kind": "unknown", "reason": why.name(), "because": reason(why) }),
        }
    }

    fn process(&self, process: &AttributedProcess, clock: &Clock<'_>) -> Value {
        let since = (process.since.0 > 0).then(|| clock.words(process.since));
        json!({ "pid": process.pid, "percent": process.percent, "user": self.user(process.user), "there_since": since })
    }

    fn holder(&self, holder: &Holder) -> Value {
        let kind = match holder.kind {
            ProcessKind::Compute => "compute",
            ProcessKind::Graphics => "graphics",
            ProcessKind::Mps => "mps",
            ProcessKind::MpsServer => "mps-server",
        };
        json!({ "pid": holder.pid, "list": kind, "memory_bytes": holder.memory_bytes, "user": self.user(holder.user) })
    }
}

fn called(user: &Value) -> String {
    let word = |key: &str| user[key].as_str().unwrap_or_default();
    match word("kind") {
        "container" => {
            let pod = [word("namespace"), word("pod"), word("container")]
                .map(|part| if part.is_empty() { "-" } else { part })
                .join("/");
            let name = if word("pod").is_empty() { word("name").to_owned() } else { pod };
            let name = if name.is_empty() { word("container_id").chars().take(12).collect() } else { name };
            format!("container {name}   {}", word("id"))
        }
        "host" => format!("outside containers   {}", word("comm")),
        _ => format!("nobody: {} ({})", word("because"), word("reason")),
    }
}

/// As people read it.
pub fn text(told: &Value) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: &str| out += &wrapped(&format!("{name:<14}"), 14, value);
    let word = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    let gpu = &told["gpu"];
    line("gpu", &format!("{}   {}   {}", gpu["index"], word(&gpu["uuid"]), word(&gpu["model"])));
    let seconds = |key: &str| told[key].as_f64().unwrap_or_default();
    let milliseconds = seconds("covers_seconds") * 1e3;
    line(
        "time",
        &format!(
            "{} ({:.3} s after the start), the end of {milliseconds:.1} ms",
            word(&told["time"]),
            seconds("after_start_seconds")
        ),
    );
    let busy = told["busy_percent"].as_f64().map_or(String::new(), |busy| format!(", {busy:.0} % busy"));
    let stamp = told["driver_stamp_ns"].as_u64().map_or(String::new(), |stamp| format!(", stamped {stamp} ns by the driver"));
    line("state", &format!("{}{busy}{stamp}", word(&told["state"])));
    line("went to", &word(&told["went_to"]));
    for process in told["rows"].as_array().into_iter().flatten() {
        let since =
            process["there_since"].as_str().map_or("since when is not known".to_owned(), |since| format!("there since {since}"));
        line("row", &format!("pid {}, {} %: {}   {since}", process["pid"], process["percent"], called(&process["user"])));
    }
    for credit in told["credited"].as_array().into_iter().flatten() {
        let milliseconds = credit["seconds"].as_f64().unwrap_or_default() * 1e3;
        line("credited", &format!("{milliseconds:.1} ms: {}", called(&credit["user"])));
    }
    match told["held"]["processes"].as_array() {
        None => line("held by", "not known then"),
        Some(all) if all.is_empty() => line("held by", &format!("nobody, as of {}", word(&told["held"]["time"]))),
        Some(all) => {
            line("held by", &format!("as of {}", word(&told["held"]["time"])));
            for holder in all {
                let memory = holder["memory_bytes"].as_u64().map_or("memory not told".to_owned(), |b| format!("{} MiB", b >> 20));
                line("", &format!("pid {}, {}, {memory}: {}", holder["pid"], word(&holder["list"]), called(&holder["user"])));
            }
        }
    }
    for damage in told["damage"].as_array().into_iter().flatten() {
        line("damage", &word(damage));
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sampler_core::fact::ContainerFact;
    use sampler_core::units::{GpuNs, GpuUuid};
    use sampler_session::Header;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn session() -> Session {
        let info = GpuInfo { uuid: GpuUuid("GPU-abc".into()), index: 3, model: "Tesla V100".into(), ..GpuInfo::default() };
        let key = ContainerKey(1);
        let process = HostProcess { pid: 8, start: BootNs(1) };
        let user = |pid, user| AttributedProcess { pid, percent: 40, user, since: BootNs(95 * SECOND) };
        let processes = vec![
            user(7, User::Container(key)),
            user(8, User::Host(process)),
            AttributedProcess { since: BootNs(0), ..user(9, User::Nobody(Reason::PidUnknown)) },
        ];
        let sample =
            |processes| GpuFact::Utilization(UtilizationSample { stamp: GpuNs(5), ns: SECOND, busy_percent: 80, processes });
        let holder = Holder { pid: 7, user: User::Container(key), kind: ProcessKind::Compute, memory_bytes: Some(3 << 20) };
        let gpu = |second: u64, fact| Fact::Gpu { gpu: 0, at: BootNs(second * SECOND), fact };
        let container = ContainerFact {
            key,
            cgroup_path: "/docker/1".into(),
            container_id: Some("1".repeat(64)),
            runtime: None,
            pod_uid: None,
            created: BootNs(1),
            creation_seen: true,
        };
        let labels = LabelFact { key, namespace: "ns".into(), pod: "p".into(), container: "c".into(), ..LabelFact::default() };
        Session {
            header: Header { start: BootNs(100 * SECOND), start_wall: WallTime(1_700_000_000 * SECOND), ..Header::default() },
            facts: vec![
                // The wall clock is set in between.
                Fact::Time { at: BootNs(105 * SECOND), wall: WallTime(1_700_003_605 * SECOND) },
                gpu(90, GpuFact::Opened(Arc::new(info))),
                Fact::Container(container),
                Fact::Labels(labels),
                Fact::Comm { process, comm: "python3".into() },
                gpu(100, GpuFact::Held(Some(Arc::new([holder])))),
                gpu(101, sample(processes)),
                gpu(102, sample(Vec::new())),
                gpu(104, GpuFact::Unobserved { ns: SECOND, why: UnobservedReason::NotAsked }),
                gpu(105, GpuFact::Idle { ns: SECOND }),
            ],
            end: None,
            damage: vec!["cut".into()],
        }
    }

    fn check(gpu: &str, time: &str, expect: &[&str]) {
        let told = of(&session(), gpu, time).map_or_else(|error| error.to_string(), |told| text(&told));
        for part in expect {
            assert!(told.contains(part), "{gpu} {time}: {part:?} in {told}");
        }
    }

    #[test]
    fn samples() {
        check(
            "3",
            "0.5",
            &[
                "3   GPU-abc   Tesla V100",
                "2023-11-14T22:13:21.000Z (1.000 s after the start), the end of 1000.0 ms",
                "sample, 80 % busy, stamped 5 ns",
                "the processes of its rows",
                "pid 7, 40 %: container ns/p/c   /docker/1   there since 2023-11-14T22:13:15.000Z",
                "pid 8, 40 %: outside containers   python3   there since",
                "pid 9, 40 %: nobody: no process with this pid was known at that time (pid_unknown)   since when is not known",
                "pid 7, compute, 3 MiB: container ns/p/c",
                "damage        cut",
            ],
        );
        check("GPU-a", "2s", &["its neighbours", "80 % busy"]);
        check("3", "2023-11-14T22:13:21.5Z", &["2023-11-14T22:13:22.000Z"]);
        check("3", "3.5", &["unobserved", "its process was not queried"]);
        check("3", "2023-11-14T23:13:25Z", &["idle", "5.000 s after the start"]);
        check("3", "2.5", &["there is nothing of GPU GPU-abc", "the nearest is at 2023-11-14T22:13:22.000Z"]);
        check("0", "1", &["there is no GPU \"0\" in it; it has 3 (GPU-abc)"]);
        check("3", "soon", &["--sample \"soon\" is no time"]);
        check("3", "-1", &["is no time"]);
    }
}
