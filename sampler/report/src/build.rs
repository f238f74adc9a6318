//! Builds the report of a session from its facts, with the aggregation code of the live agent.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::causes::causes;
use super::engines::{EngineContext, GatheredEngines};
use super::experiments;
use super::findings::findings;
use super::gather::{Gathered, GatheredGpu};
use super::model::{Contender, Evidence, Gap, GpuReport, Lane, Named, Report, Timeline, Usage, UserKind, UserReport};
use super::onoff::{Experiment, LEVEL};
use super::selection::{narrow, selects_gpu};
use super::waiting::{self, Waiting};
use sampler_core::aggregate::{
    Aggregate, COACTIVITY_WINDOW_NS, DeviceAccount, Range, SATURATION_RATIO, Settings, Window, is_user,
};
use sampler_core::cgroup_path::parse;
use sampler_core::device::{Reason, THROTTLE_REASONS};
use sampler_core::fact::{LabelFact, UnobservedReason, User};
use sampler_core::units::{BootNs, WallTime};
use sampler_session::{Session, View};
use strum::VariantArray as _;

/// Shorter gaps are counted, but not listed.
const GAP_NS: u64 = 500_000_000;
/// Spans that are closer than this are one gap.
const TOUCHING_NS: u64 = 20_000_000;
/// Upper bound of the duration of a report: a file must not determine how much memory is allocated.
const LONGEST_NS: u64 = 2 * 86_400 * 1_000_000_000;
const S: f64 = 1e-9;

type Windows = BTreeMap<u64, Window>;

struct Builder<'a> {
    session: &'a Session,
    gathered: Gathered,
    aggregate: Aggregate,
    range: (BootNs, BootNs),
    saturation_ratio: f64,
    waiting: BTreeMap<User, Waiting>,
}

pub fn build(session: &Session, view: &View) -> Report {
    let start = session.header.start;
    let from = start.plus(view.from_ns.unwrap_or_default());
    let to = view.to_ns.map(|ns| start.plus(ns));
    let bound = to.into_iter().chain(session.end).min().unwrap_or(BootNs(u64::MAX)).min(from.plus(LONGEST_NS));
    let range = Range { after: from, to: bound };
    let saturation_ratio = match session.header.saturation_percent {
        0 => SATURATION_RATIO,
        percent => f64::from(percent) / 100.0,
    };
    let mut aggregate = Aggregate::new(Settings { saturation_ratio, keep_history: true, range });
    let mut gathered = Gathered::default();
    for fact in &session.facts {
        // An undamaged file has no unread spans: there, only drift of the device clock separates consecutive spans.
        let unread = gathered.unread_span(fact).filter(|_| !session.damage.is_empty());
        for fact in unread.into_iter().chain([fact.clone()]) {
            aggregate.apply(&gathered.take(&fact, range));
        }
    }
    aggregate.finish();
    let to = bound.min(gathered.last.max(from));
    let waiting = waiting::of_users(&gathered, &aggregate, (from, to));
    Builder { session, gathered, aggregate, range: (from, to), saturation_ratio, waiting }.report(view)
}

fn id(user: User, gathered: &Gathered) -> String {
    match user {
        User::Container(key) => {
            gathered.containers.get(&key).map_or_else(|| format!("container {}", key.0), |c| c.cgroup_path.clone())
        }
        User::Host(process) => format!("pid:{}@{}", process.pid, process.start.0),
        User::Unattributed(reason) => reason.name().into(),
    }
}

fn describe(user: User, gathered: &Gathered) -> UserReport {
    let default = UserReport { id: id(user, gathered), ..UserReport::default() };
    let described = match user {
        User::Container(key) => {
            let labels = gathered.labels.get(&key).cloned().unwrap_or_default();
            let LabelFact { key: _, namespace, pod, container, name, image } = labels;
            let container_id = gathered.containers.get(&key).and_then(|container| container.container_id.clone());
            // Of a container that was dropped from the file only the key is known.
            let identity = gathered.containers.get(&key).map(|container| parse(&container.cgroup_path));
            let kind = identity.as_ref().map_or(UserKind::Container, |identity| identity.kind.into());
            let user = identity.map(|identity| identity.short_name()).unwrap_or_default();
            UserReport { kind, user, container_id, namespace, pod, container, name, image, ..default }
        }
        User::Host(process) => {
            let comm = gathered.comms.get(&process).cloned();
            UserReport { kind: UserKind::Host, pid: Some(process.pid), comm, ..default }
        }
        User::Unattributed(_) => UserReport { kind: UserKind::Unknown, ..default },
    };
    UserReport { user: described.display_name(), ..described }
}

fn gap_reason(reason: UnobservedReason) -> &'static str {
    match reason {
        UnobservedReason::Missing => "samples are missing",
        UnobservedReason::NotAsked => {
            "the processes of the samples were not queried, and the agent version that recorded them did not attribute them"
        }
        UnobservedReason::NoSamples => "the driver returned no samples and did not report the GPU as idle",
        UnobservedReason::NoAnswer => "the driver did not respond",
        UnobservedReason::Unread => "the session file is damaged in this span",
        UnobservedReason::Released => "the agent had released the GPU on request",
        UnobservedReason::Start => "the agent had just started, or the GPU was reopened",
    }
}

/// GPU time of each user of a window, and whether a sample names it; without time that is attributed to no user.
fn window_users(window: &Window) -> impl Iterator<Item = (User, f64, bool)> {
    window.users.iter().filter(|(user, _)| is_user(**user)).map(|(user, part)| (*user, part.ns, part.samples > 0))
}

/// Sums over the windows in which a user was active.
#[derive(Default)]
struct UserSums {
    active: f64,
    coactive: f64,
    contended: f64,
    contenders: BTreeMap<User, ContenderSums>,
}

#[derive(Default)]
struct ContenderSums {
    ns: f64,
    saturated_ns: f64,
    coactive: f64,
}

fn sums(windows: &Windows, saturation_ratio: f64) -> BTreeMap<User, UserSums> {
    let mut all: BTreeMap<User, UserSums> = BTreeMap::new();
    for window in windows.values() {
        let (saturated, seconds) = (window.saturated(saturation_ratio), window.seconds());
        for (user, _, active) in window_users(window) {
            let sums = all.entry(user).or_default();
            if !active {
                continue;
            }
            sums.active += seconds;
            let mut coactive = false;
            for (other, ns, other_active) in window_users(window).filter(|(other, ..)| *other != user) {
                let contender_sums = sums.contenders.entry(other).or_default();
                contender_sums.ns += ns;
                contender_sums.saturated_ns += if saturated { ns } else { 0.0 };
                contender_sums.coactive += if other_active { seconds } else { 0.0 };
                coactive |= other_active;
            }
            if coactive {
                sums.coactive += seconds;
                sums.contended += if saturated { seconds } else { 0.0 };
            }
        }
    }
    all
}

impl Builder<'_> {
    fn start(&self) -> (BootNs, WallTime) {
        (self.session.header.start, self.session.header.start_wall)
    }

    fn wall(&self, at: BootNs) -> WallTime {
        self.gathered.wall(at, self.start())
    }

    fn report(&self, view: &View) -> Report {
        let header = &self.session.header;
        let mut report = Report {
            format: super::model::FORMAT,
            start: self.wall(self.range.0),
            duration_seconds: self.range.1.saturating_since(self.range.0) as f64 * S,
            truncated: self.session.end.is_none() || !self.session.damage.is_empty(),
            damage: self.session.damage.clone(),
            node: header.node.clone(),
            agent_version: header.agent_version.clone(),
            window_seconds: COACTIVITY_WINDOW_NS as f64 * S,
            saturation_ratio: self.saturation_ratio,
            ..Report::default()
        };
        let mut users: BTreeMap<User, UserReport> = BTreeMap::new();
        let mut timelines: Vec<(Timeline, BTreeMap<User, Lane>)> = Vec::new();
        let mut histories: Vec<(&str, &Windows)> = Vec::new();
        let mut observed: Vec<(&str, &GatheredGpu)> = Vec::new();
        let empty = GatheredGpu::default();
        for (slot, device) in self.aggregate.gpus().filter(|(_, device)| device.info.is_leaf()) {
            let gpu_facts = u32::try_from(slot).ok().and_then(|slot| self.gathered.gpus.get(&slot)).unwrap_or(&empty);
            if !selects_gpu(view, &device.info.uuid.0, device.info.index) {
                continue;
            }
            let none = Windows::new();
            let windows = device.coactivity.history.as_ref().unwrap_or(&none);
            histories.extend(device.coactivity.history.as_ref().map(|history| (&*device.info.uuid.0, history)));
            report.gpus.push(self.gpu(device, gpu_facts, windows));
            report.gaps.extend(self.gaps(device, gpu_facts));
            for (user, usage) in self.usages(device, gpu_facts, windows) {
                users.entry(user).or_insert_with(|| describe(user, &self.gathered)).gpus.push(usage);
            }
            timelines.push(self.timeline(device, gpu_facts, windows));
            observed.push((&device.info.uuid.0, gpu_facts));
        }
        for (user, report) in &mut users {
            report.waits = self.waiting.get(user).map(|waiting| waiting.report.clone());
        }
        waiting::add_demand(&mut users, &self.waiting, &histories);
        self.add_engines(&mut users, &histories);
        let mut order: Vec<(User, UserReport)> = users.into_iter().collect();
        narrow(view, &mut order);
        let seconds = |user: &UserReport| user.gpus.iter().map(|usage| usage.gpu_seconds).sum::<f64>();
        order.sort_by(|a, b| seconds(&b.1).total_cmp(&seconds(&a.1)).then_with(|| a.1.id.cmp(&b.1.id)));
        let positions: HashMap<User, usize> = order.iter().enumerate().map(|(n, (user, _))| (*user, n)).collect();
        report.users = order.into_iter().map(|(_, user)| user).collect();
        for (mut timeline, lanes) in timelines {
            let listed = lanes.into_iter().filter_map(|(user, lane)| Some(Lane { user: *positions.get(&user)?, ..lane }));
            timeline.lanes = listed.collect();
            timeline.lanes.sort_by_key(|lane| lane.user);
            report.timelines.push(timeline);
        }
        report.gpus.sort_by(|a, b| (a.index, &a.uuid).cmp(&(b.index, &b.uuid)));
        let index = |uuid: &str| report.gpus.iter().position(|gpu| gpu.uuid == uuid);
        report.timelines.sort_by_key(|timeline| index(&timeline.uuid));
        report.gaps.sort_by_key(|gap| gap.from);
        report.experiments = experiments::evaluate(&self.gathered, &observed, self.range, &|at| self.wall(at));
        experiments::attach(&mut report);
        report.findings = findings(&report);
        report
    }

    fn add_engines(&self, users: &mut BTreeMap<User, UserReport>, histories: &[(&str, &Windows)]) {
        let describe = |other: User| {
            let other = describe(other, &self.gathered);
            (other.kind, other.id)
        };
        let mut all: Vec<(User, GatheredEngines<'_>)> = Vec::new();
        for (key, facts) in &self.gathered.engines {
            let user = User::Container(*key);
            let Some(report) = users.get(&user) else { continue };
            let uses = |uuid: &str| report.gpus.iter().any(|usage| usage.uuid == uuid);
            let gpus = histories.iter().filter(|(uuid, _)| uses(uuid)).copied().collect();
            let context = EngineContext { user, gpus, start: self.range.0, describe: &describe };
            all.push((user, GatheredEngines::new(facts, context)));
        }
        // The rate of false findings is one for the session.
        let comparisons = all.iter().map(|(_, engines)| engines.comparisons()).sum();
        for (user, engines) in &all {
            if let Some(report) = users.get_mut(user) {
                report.engines = engines.reports(comparisons);
            }
        }
    }

    fn gpu(&self, device: &DeviceAccount, gpu_facts: &GatheredGpu, windows: &Windows) -> GpuReport {
        let (time, by_reason) = (device.time(), device.unattributed());
        // The other reasons count as users, and are listed as such.
        let is_unattributed = |reason: &Reason| !is_user(User::Unattributed(*reason));
        let unattributed = Reason::VARIANTS.iter().copied().zip(by_reason).filter(|(reason, _)| is_unattributed(reason));
        let unattributed: Vec<Named> = unattributed.map(|(reason, value)| Named { name: reason.name().into(), value }).collect();
        let saturated = windows.values().filter(|window| window.saturated(self.saturation_ratio));
        let readings = gpu_facts.readings.iter().filter(|(at, _)| *at >= self.range.0 && *at <= self.range.1);
        let mut xids: BTreeMap<u64, u64> = BTreeMap::new();
        for (_, xid, n) in &gpu_facts.xids {
            let sum = xids.entry(*xid).or_default();
            *sum = sum.saturating_add(*n);
        }
        GpuReport {
            uuid: device.info.uuid.to_string(),
            index: device.info.index,
            model: device.info.model.clone(),
            gpu_uuid: device.info.parent.as_ref().map(ToString::to_string),
            busy_seconds: time.busy,
            idle_seconds: time.idle,
            unobserved_seconds: time.unobserved,
            unsupported_seconds: time.unsupported,
            unattributed_seconds: unattributed.iter().map(|named| named.value).sum(),
            unattributed,
            // Without a saturated window, 0 instead of the -0 of a sum.
            saturated_seconds: saturated.map(Window::seconds).fold(0.0, |sum, seconds| sum + seconds),
            memory_total_bytes: readings.clone().filter_map(|(_, r)| r.memory_total_bytes).max(),
            memory_used_max_bytes: readings.filter_map(|(_, r)| r.memory_used_bytes).max(),
            throttle_seconds: throttle_seconds(gpu_facts, self.range),
            xids: xids.into_iter().map(|(xid, n)| Named { name: xid.to_string(), value: n as f64 }).collect(),
        }
    }

    fn gaps(&self, device: &DeviceAccount, gpu_facts: &GatheredGpu) -> Vec<Gap> {
        let mut spans: Vec<(BootNs, BootNs, UnobservedReason)> = Vec::new();
        for (from, to, reason) in &gpu_facts.unobserved {
            match spans.last_mut() {
                Some((_, until, before)) if before == reason && from.saturating_since(*until) < TOUCHING_NS => *until = *to,
                _ => spans.push((*from, *to, *reason)),
            }
        }
        let long = spans.into_iter().filter(|(from, to, _)| to.saturating_since(*from) >= GAP_NS);
        let gap = |(from, to, reason): (BootNs, BootNs, UnobservedReason)| Gap {
            uuid: device.info.uuid.to_string(),
            from: self.wall(from),
            to: self.wall(to),
            reason: gap_reason(reason).into(),
        };
        long.map(gap).collect()
    }

    fn display_name(&self, user: User) -> String {
        describe(user, &self.gathered).display_name()
    }

    fn usages(&self, device: &DeviceAccount, gpu_facts: &GatheredGpu, windows: &Windows) -> Vec<(User, Usage)> {
        let time = device.time();
        let sums = sums(windows, self.saturation_ratio);
        let held = gpu_facts.held.iter().filter(|(at, _)| *at <= self.range.1);
        let mut memory: BTreeMap<User, Option<u64>> = BTreeMap::new();
        for (user, bytes) in held.flat_map(|(_, held)| held) {
            let most = memory.entry(*user).or_insert(*bytes);
            *most = (*most).max(*bytes);
        }
        let credited = device.credits().keys().copied().filter(|user| is_user(*user));
        let all: BTreeSet<User> =
            credited.chain(sums.keys().copied()).chain(memory.keys().copied()).filter(|u| is_user(*u)).collect();
        let pairs = sums.values().map(|sums| sums.contenders.len()).sum();
        let experiment = Experiment::new(gpu_facts, windows, self.range, self.saturation_ratio, pairs);
        let none = UserSums::default();
        let usage = |user: User| {
            let sums = sums.get(&user).unwrap_or(&none);
            let credit = device.credits().get(&user).copied().unwrap_or_default();
            let (seconds, stderr) = (credit.ns * S, credit.variance().sqrt() * S);
            let mut contenders: Vec<Contender> = sums
                .contenders
                .iter()
                .filter(|(_, contender_sums)| contender_sums.ns > 0.0)
                .map(|(other, contender_sums)| self.contender(device, &experiment, user, *other, contender_sums))
                .collect();
            contenders.sort_by(|a, b| b.gpu_seconds.total_cmp(&a.gpu_seconds).then_with(|| a.id.cmp(&b.id)));
            let needs_causes = !contenders.is_empty() || user.container().is_some();
            let causes = needs_causes
                .then(|| causes(&self.gathered, gpu_facts, user.container(), self.range, &|user| self.display_name(user)));
            let of_busy = |value: f64| (time.busy > 0.0).then(|| value / time.busy);
            let usage = Usage {
                uuid: device.info.uuid.to_string(),
                gpu_seconds: seconds,
                gpu_seconds_stderr: stderr,
                share_of_busy: of_busy(seconds),
                share_stderr: of_busy(stderr),
                samples: credit.samples,
                active_seconds: sums.active,
                coactive_seconds: sums.coactive,
                contended_seconds: sums.contended,
                memory_max_bytes: memory.get(&user).copied().flatten(),
                contenders,
                causes: causes.unwrap_or_default(),
            };
            (user, usage)
        };
        all.into_iter().map(usage).collect()
    }

    fn contender(
        &self,
        device: &DeviceAccount,
        experiment: &Experiment<'_>,
        user: User,
        other: User,
        contender_sums: &ContenderSums,
    ) -> Contender {
        let credit = device.credits().get(&other).copied().unwrap_or_default();
        // The variance is scaled by the same fraction as the seconds.
        let part = if credit.ns > 0.0 { (contender_sums.ns / credit.ns).min(1.0) } else { 0.0 };
        let result = experiment.evaluate(user, other);
        let user_report = describe(other, &self.gathered);
        Contender {
            kind: user_report.kind,
            id: user_report.id,
            gpu_seconds: contender_sums.ns * S,
            gpu_seconds_stderr: (credit.variance() * part).sqrt() * S,
            saturated_gpu_seconds: contender_sums.saturated_ns * S,
            coactive_seconds: contender_sums.coactive,
            evidence: if result.confirmed { Evidence::OnOffConfirmed } else { Evidence::Coactive },
            on_off_confirmed: result.confirmed,
            rate_before: result.rate_before,
            rate_after: result.rate_after,
            transitions: result.transitions,
            interval: result.interval,
            interval_level: result.interval.map(|_| LEVEL),
            why_not_confirmed: result.why_not,
            demand: None,
            experiment: Vec::new(),
        }
    }

    fn timeline(&self, device: &DeviceAccount, gpu_facts: &GatheredGpu, windows: &Windows) -> (Timeline, BTreeMap<User, Lane>) {
        let (first, last) = (self.range.0.0 / COACTIVITY_WINDOW_NS, self.range.1.0.saturating_sub(1) / COACTIVITY_WINDOW_NS);
        let ends = |n: u64| BootNs((n + 1).saturating_mul(COACTIVITY_WINDOW_NS));
        let seconds = |at: BootNs| (at.0 as f64 - self.range.0.0 as f64) * S;
        let busy = |n: u64| {
            // The first and the last window may be partial.
            let (from, to) = (BootNs(n.saturating_mul(COACTIVITY_WINDOW_NS)).max(self.range.0), ends(n).min(self.range.1));
            let window = windows.get(&n).filter(|window| window.observed_ns >= to.saturating_since(from) / 2)?;
            Some((window.busy_ns / window.observed_ns as f64) as f32)
        };
        let numbers = || first..=last.max(first);
        let mut timeline = Timeline {
            uuid: device.info.uuid.to_string(),
            first_second: seconds(BootNs(first.saturating_mul(COACTIVITY_WINDOW_NS))),
            window_seconds: COACTIVITY_WINDOW_NS as f64 * S,
            busy: numbers().map(busy).collect(),
            memory: numbers().map(|n| gpu_facts.readings_at(ends(n)).and_then(|r| r.memory_used_bytes)).collect(),
            lanes: Vec::new(),
            marks: gpu_facts.xids.iter().map(|(at, xid, n)| (seconds(*at), format!("XID {xid}, {n} times"))).collect(),
        };
        for (key, at) in &self.gathered.ended {
            if *at > self.range.0 && *at <= self.range.1 && device.credits_any(User::Container(*key)) {
                timeline.marks.push((seconds(*at), format!("{} ended", self.display_name(User::Container(*key)))));
            }
        }
        timeline.marks.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut lanes: BTreeMap<User, Lane> = BTreeMap::new();
        let n_windows = timeline.busy.len();
        let new = || Lane { user: 0, shares: vec![0.0; n_windows], memory: vec![None; n_windows], waits: Vec::new() };
        for (position, n) in numbers().enumerate() {
            for (user, part) in windows.get(&n).into_iter().flat_map(|window| &window.users).filter(|(user, _)| is_user(**user)) {
                if let Some(share) = lanes.entry(*user).or_insert_with(new).shares.get_mut(position) {
                    *share = (part.ns / COACTIVITY_WINDOW_NS as f64) as f32;
                }
            }
            for (user, bytes) in gpu_facts.held_at(ends(n)).into_iter().flatten().filter(|(user, _)| is_user(**user)) {
                if let Some(memory) = lanes.entry(*user).or_insert_with(new).memory.get_mut(position) {
                    *memory = *bytes;
                }
            }
        }
        for (user, lane) in &mut lanes {
            if let Some(waiting) = self.waiting.get(user) {
                lane.waits = numbers().map(|n| waiting.waited(n)).collect();
            }
        }
        (timeline, lanes)
    }
}

/// Seconds by reason within the range; `None` if the driver never reported the reasons.
fn throttle_seconds(gpu_facts: &GatheredGpu, range: (BootNs, BootNs)) -> Option<Vec<Named>> {
    let has_reasons = gpu_facts.readings.iter().any(|(_, readings)| readings.throttle_reasons.is_some());
    if !has_reasons && gpu_facts.throttle_times.is_empty() {
        return None;
    }
    let named = |(bit, name): (u64, &str)| {
        let value = super::causes::throttled(gpu_facts, bit, range).0;
        (value > 0.0).then(|| Named { name: name.into(), value })
    };
    Some(THROTTLE_REASONS.into_iter().filter_map(named).collect())
}
