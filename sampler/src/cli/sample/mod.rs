//! `explain --sample`: the attribution of one driver sample, and the reasons for it, from a session file.

mod document;

use std::collections::HashMap;
use std::path::Path;
use std::time::UNIX_EPOCH;

use anyhow::{Context as _, bail};
use sampler_core::aggregate::{Aggregate, Range, Settings};
use sampler_core::cgroup_path::{Kind, parse};
use sampler_core::device::{GpuInfo, Reason};
use sampler_core::fact::{
    AttributedProcess, Fact, GpuFact, Holder, HostProcess, LabelFact, UnobservedReason, User, UtilizationSample,
};
use sampler_core::observation::ProcessKind;
use sampler_core::units::{BootNs, ContainerKey, WallTime, rfc3339};
use sampler_session::Session;

use self::document::{
    CreditedUser, ExplainedSample, HolderProcess, Holders, NamedCgroup, SampleState, SampledGpu, SampledProcess, SampledUser,
};
use crate::session;

/// Times of samples are estimates of the driver's clock, which improve: between two of them there may be this much.
const BETWEEN_NS: u64 = 1_000_000;

/// Everything about the sample of this GPU that covers this time, or that begins within [`BETWEEN_NS`] after it.
pub fn explain(file: &Path, gpu: &str, time: &str) -> anyhow::Result<ExplainedSample> {
    let session = session::read(file)?;
    explain_in(&session, gpu, time).with_context(|| format!("cannot explain a sample of {}", file.display()))
}

fn explain_in(session: &Session, gpu: &str, time: &str) -> anyhow::Result<ExplainedSample> {
    let clock = Clock::new(session);
    let at = clock.boot(time)?;
    let (slot, info) = device(session, gpu)?;
    let names = UserNames::new(session);
    let mut held = None;
    let mut found: Option<(BootNs, &GpuFact)> = None;
    let (mut adjacent, mut nearest) = (None, None::<BootNs>);
    for fact in &session.facts {
        let Fact::Gpu { gpu, at: end, fact } = fact else { continue };
        if *gpu != slot {
            continue;
        }
        if let GpuFact::Held(list) = fact
            && *end <= at
        {
            held = Some((*end, list.as_deref()));
        }
        let Some(ns) = fact.span_ns() else { continue };
        if end.minus(ns) < at && at <= *end {
            found = Some((*end, fact));
        }
        if at <= end.minus(ns) && end.minus(ns).0 - at.0 <= BETWEEN_NS {
            adjacent = adjacent.or(Some((*end, fact)));
        }
        if nearest.is_none_or(|nearest| end.0.abs_diff(at.0) < nearest.0.abs_diff(at.0)) {
            nearest = Some(*end);
        }
    }
    let Some((end, fact)) = found.or(adjacent) else {
        let nearest = nearest.map(|at| format!("; the nearest is at {}", clock.rfc3339(at))).unwrap_or_default();
        bail!("no sample of GPU {} covers {}{nearest}", info.uuid, clock.rfc3339(at));
    };
    let held = held.and_then(|(at, list)| list.map(|list| (at, list)));
    Ok(ExplainedSample {
        gpu: SampledGpu { uuid: info.uuid.to_string(), index: info.index, model: info.model.clone() },
        asked: clock.rfc3339(at),
        time: clock.rfc3339(end),
        after_start_seconds: clock.after_start(end),
        covers_seconds: fact.span_ns().unwrap_or_default() as f64 / 1e9,
        sample: sample_state(fact, &names, &clock),
        credited: credited(session, slot, end)
            .into_iter()
            .map(|(user, seconds)| CreditedUser { user: names.user(user), seconds })
            .collect(),
        held: held.map(|(at, list)| Holders {
            time: clock.rfc3339(at),
            processes: list.iter().map(|holder| names.holder(holder)).collect(),
        }),
        damage: session.damage.clone(),
    })
}

/// The users that the time of this fact is credited to, by the code that attributes live samples: seconds, most first.
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

fn sample_state(fact: &GpuFact, names: &UserNames<'_>, clock: &Clock<'_>) -> SampleState {
    match fact {
        GpuFact::Utilization(sample) => SampleState {
            state: "sample",
            busy_percent: Some(sample.busy_percent.into()),
            driver_stamp_ns: Some(sample.stamp.0),
            processes: Some(sample.processes.iter().map(|process| names.process(process, clock)).collect()),
            went_to: went_to(sample),
        },
        GpuFact::Unqueried(_, sample) => SampleState {
            state: "sample",
            busy_percent: Some(sample.busy_percent.into()),
            driver_stamp_ns: Some(sample.stamp.0),
            processes: Some(Vec::new()),
            went_to: "the users of neighbouring samples: its process was not queried, so its busy time is divided among the queried \
                      samples around it",
        },
        GpuFact::Unobserved { why, .. } => {
            SampleState { state: "unobserved", went_to: unobserved(*why), ..SampleState::default() }
        }
        GpuFact::Measured { busy_ratio, .. } => SampleState {
            state: "measured",
            busy_percent: Some(busy_ratio * 100.0),
            went_to: "no user: GPM measures the utilization of the device, not of processes",
            ..SampleState::default()
        },
        GpuFact::Unsupported { .. } => {
            SampleState { state: "unsupported", went_to: "no user: this device has no samples", ..SampleState::default() }
        }
        _ => SampleState { state: "idle", went_to: IDLE, ..SampleState::default() },
    }
}

const IDLE: &str = "no user: the device was idle";

fn went_to(sample: &UtilizationSample) -> &'static str {
    match (&sample.processes[..], sample.busy_percent) {
        (_, 0) => IDLE,
        ([], _) => {
            "the users of neighbouring samples, or with wait probes the processes that ended meanwhile: the driver reports no process \
             for it, so its busy time is divided"
        }
        ([_], _) => "the process of the sample",
        _ => "the processes of the sample",
    }
}

fn unobserved(reason: UnobservedReason) -> &'static str {
    match reason {
        UnobservedReason::Missing => {
            "no user: samples are missing, because the driver's sample buffer wrapped before it was read"
        }
        UnobservedReason::NotAsked => {
            "no user: its process was not queried, and the agent of this version did not attribute such samples"
        }
        UnobservedReason::NoSamples => "no user: the driver had no samples, and did not report that the device was idle",
        UnobservedReason::NoAnswer => "no user: the driver did not respond for longer than its sample buffer holds",
        UnobservedReason::Unread => "no user: the file is damaged at this time",
        UnobservedReason::Released => "no user: the agent had released the device on request",
        UnobservedReason::Start => "no user: the agent had just started, or the device was opened again",
    }
}

fn unattributed(reason: Reason) -> &'static str {
    match reason {
        Reason::NoPid => "the driver reports no process",
        Reason::InvalidPid => "the driver reports an invalid PID",
        Reason::PidUnknown => "no process with this PID was known at that time",
        Reason::Host => "a process outside of containers, jobs and units",
        Reason::Mps => "a client of the multi-process service, which samples do not distinguish",
        Reason::Ambiguous => "two users had this PID within the uncertainty of the clocks",
        Reason::Lost => "kernel events were lost at that time",
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
    let matches = |info: &GpuInfo| match wanted.parse::<u32>() {
        Ok(index) => info.index == index && info.parent.is_none(),
        Err(_) => info.uuid.0.starts_with(wanted),
    };
    let mut matching = all.iter().filter(|(_, info)| matches(info));
    match (matching.next(), matching.next()) {
        (Some((slot, info)), None) => Ok((*slot, info)),
        (Some(_), Some(_)) => bail!("--gpu {wanted} matches several GPUs; give more of the UUID"),
        (None, _) => {
            let mut names: Vec<String> = all.values().map(|info| format!("{} ({})", info.index, info.uuid)).collect();
            names.sort();
            bail!("the session has no GPU {wanted:?}; it has {}", names.join(", "));
        }
    }
}

/// Converts between boot time and wall time.
struct Clock<'a>(&'a Session);

impl Clock<'_> {
    fn new(session: &Session) -> Clock<'_> {
        Clock(session)
    }

    /// The pair of clock readings with the least difference to the requested time: the wall clock may have been set in between.
    fn nearest_pair(&self, difference: impl Fn(BootNs, WallTime) -> u64) -> (BootNs, WallTime) {
        let recorded = self.0.facts.iter().filter_map(|fact| match fact {
            Fact::Time { at, wall } => Some((*at, *wall)),
            _ => None,
        });
        let header = (self.0.header.start, self.0.header.start_wall);
        recorded.chain([header]).min_by_key(|(at, wall)| difference(*at, *wall)).unwrap_or(header)
    }

    fn wall(&self, at: BootNs) -> WallTime {
        let (boot, wall) = self.nearest_pair(|boot, _| boot.0.abs_diff(at.0));
        WallTime((wall.0.saturating_add(at.0)).saturating_sub(boot.0))
    }

    fn rfc3339(&self, at: BootNs) -> String {
        rfc3339(self.wall(at))
    }

    fn after_start(&self, at: BootNs) -> f64 {
        (at.0 as f64 - self.0.header.start.0 as f64) / 1e9
    }

    /// The boot time of a time in RFC 3339 or of an offset from the start.
    fn boot(&self, text: &str) -> anyhow::Result<BootNs> {
        if let Ok(time) = humantime::parse_rfc3339_weak(text) {
            let since = time.duration_since(UNIX_EPOCH).context("the time is before 1970")?;
            let requested = u64::try_from(since.as_nanos()).context("the time is out of range")?;
            let (boot, wall) = self.nearest_pair(|_, wall| wall.0.abs_diff(requested));
            return Ok(BootNs(boot.0.saturating_add(requested).saturating_sub(wall.0)));
        }
        let seconds = text.parse::<f64>().ok().filter(|seconds| *seconds >= 0.0 && *seconds < 1e9);
        let offset = seconds.map(|seconds| (seconds * 1e9) as u64).or_else(|| {
            let duration = humantime::parse_duration(text).ok()?;
            u64::try_from(duration.as_nanos()).ok()
        });
        let offset = offset.with_context(|| {
            format!(
                "--sample {text:?} is not a time; give one such as 2026-05-04T10:20:30.5Z, or an offset from the start such as 12.5s"
            )
        })?;
        Ok(self.0.header.start.plus(offset))
    }
}

/// Names of users, from the facts of a session.
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

    fn user(&self, user: User) -> SampledUser {
        match user {
            User::Container(key) => {
                let labels = self.labels.get(&key);
                let text =
                    |get: fn(&LabelFact) -> &str| labels.map(|labels| get(labels).to_owned()).filter(|text| !text.is_empty());
                let (path, id) = self.paths.get(&key).copied().unzip();
                let identity = parse(path.unwrap_or_default());
                let (namespace, pod) = (text(|labels| &labels.namespace), text(|labels| &labels.pod));
                let named = || NamedCgroup { user: identity.short_name(), id: path.unwrap_or_default().to_owned() };
                match identity.kind {
                    Kind::Pod => return SampledUser::Pod { id: named().id, namespace, pod },
                    Kind::Job => return SampledUser::Job(named()),
                    Kind::Unit => return SampledUser::Unit(named()),
                    Kind::Login => return SampledUser::Login(named()),
                    Kind::Container | Kind::Sandbox | Kind::Monitor | Kind::Build | Kind::NotContainer => {}
                }
                SampledUser::Container {
                    id: path.map(str::to_owned),
                    container_id: id.flatten().map(str::to_owned),
                    namespace,
                    pod,
                    container: text(|labels| &labels.container),
                    name: text(|labels| &labels.name),
                }
            }
            User::Host(process) => SampledUser::Host { comm: self.comms.get(&process).map(|comm| (*comm).to_owned()) },
            User::Unattributed(reason) => SampledUser::Unknown { reason: reason.name(), because: unattributed(reason) },
        }
    }

    fn process(&self, process: &AttributedProcess, clock: &Clock<'_>) -> SampledProcess {
        SampledProcess {
            pid: process.pid,
            percent: process.percent,
            user: self.user(process.user),
            there_since: (process.since.0 > 0).then(|| clock.rfc3339(process.since)),
        }
    }

    fn holder(&self, holder: &Holder) -> HolderProcess {
        let list = match holder.kind {
            ProcessKind::Compute => "compute",
            ProcessKind::Graphics => "graphics",
            ProcessKind::Mps => "mps",
            ProcessKind::MpsServer => "mps-server",
        };
        HolderProcess { pid: holder.pid, list, memory_bytes: holder.memory_bytes, user: self.user(holder.user) }
    }
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
            AttributedProcess { since: BootNs(0), ..user(9, User::Unattributed(Reason::PidUnknown)) },
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
                // The wall clock was set in between.
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
        let shown = explain_in(&session(), gpu, time).map_or_else(|error| error.to_string(), |explained| explained.text());
        for part in expect {
            assert!(shown.contains(part), "{gpu} {time}: {part:?} in {shown}");
        }
    }

    #[test]
    fn a_sample_is_found_by_offset_or_time_and_explained() {
        check(
            "3",
            "0.5",
            &[
                "3   GPU-abc   Tesla V100",
                "2023-11-14T22:13:21.000Z (1.000 s after the start), end of a span of 1000.0 ms",
                "sample, 80 % busy, stamped 5 ns",
                "the processes of the sample",
                "pid 7, 40 %: container ns/p/c   /docker/1   member since 2023-11-14T22:13:15.000Z",
                "pid 8, 40 %: host process   python3   member since",
                "pid 9, 40 %: unattributed: no process with this PID was known at that time (pid_unknown)   start unknown",
                "pid 7, compute, 3.0 MiB: container ns/p/c",
                "damage        cut",
            ],
        );
        check("GPU-a", "2s", &["the users of neighbouring samples", "80 % busy"]);
        check("3", "2023-11-14T22:13:21.5Z", &["2023-11-14T22:13:22.000Z"]);
        check("3", "3.5", &["unobserved", "its process was not queried"]);
        check("3", "2.9995", &["unobserved"]);
        check("3", "2.998", &["no sample of GPU GPU-abc covers"]);
        check("3", "2023-11-14T23:13:25Z", &["idle", "5.000 s after the start"]);
        check("3", "2.5", &["no sample of GPU GPU-abc covers", "the nearest is at 2023-11-14T22:13:22.000Z"]);
        check("0", "1", &["the session has no GPU \"0\"; it has 3 (GPU-abc)"]);
        check("3", "soon", &["--sample \"soon\" is not a time"]);
        check("3", "-1", &["is not a time"]);
    }
}
