//! What must hold on every page of one life of the agent: its counters, the sums of GPU time, and who is credited. Pure: pages and times
//! in, problems out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::{Sample, sum};

/// Counted time lags behind the clock by the samples that wait for later ones: 0.4 s for their process samples, and four named samples
/// on each side of one without a process.
pub const LAG_SECONDS: f64 = 3.0;
/// Counted time is never ahead of the clock by more than the uncertainty of the GPU's clock, and what is slewed of a step.
const AHEAD_SECONDS: f64 = 0.5;
/// A container is exposed with the labels that are known when it is this old, to the agent.
const HELD_BACK_SECONDS: f64 = 2.0;
/// Files name it, so its labels are complete soon after that on any machine.
const BLANK_SECONDS: f64 = 15.0;
/// Time of a GPU that is credited to containers that are not exposed yet.
const BEHIND_SECONDS: f64 = 3.0;
/// Sums of the same terms in another order.
const ROUNDING_SECONDS: f64 = 1e-6;

/// A user that may be credited.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AllowedUser {
    /// UUIDs of the GPUs that it may use.
    pub gpus: BTreeSet<String>,
    /// Its label `pod`.
    pub pod: String,
    /// When its cgroup was created, in seconds of the run.
    pub since: f64,
}

/// By container id, or by the name of another user.
pub type Allowed = BTreeMap<String, AllowedUser>;

/// A page with the instants before its request and after its end, in seconds of the run.
#[derive(Clone, Debug)]
pub struct TimedPage {
    pub begun: f64,
    pub ended: f64,
    pub samples: Vec<Sample>,
}

/// A violated invariant; equal keys are one violation, however often it is seen.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    pub key: String,
    pub text: String,
}

impl Problem {
    pub fn new(key: impl Into<String>, text: impl Into<String>) -> Self {
        Self { key: key.into(), text: text.into() }
    }
}

/// The last values of one container on one GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Credit {
    pub seconds: f64,
    pub stderr: f64,
    pub samples: f64,
}

/// (container id, or name of another user; GPU uuid).
pub type CreditKey = (String, String);

/// What the pages of one life have shown so far.
#[derive(Debug, Default)]
pub struct LifeAccount {
    /// When the agent was started, in seconds of the run.
    pub started: f64,
    /// By GPU: when its accounted time was 0, as its first page shows.
    origins: BTreeMap<String, f64>,
    counters: HashMap<String, f64>,
    /// By GPU: how many series of credits the page before had.
    credited_series: HashMap<String, usize>,
    /// Also of containers without series by now.
    pub credits: BTreeMap<CreditKey, Credit>,
    pub pages: u64,
    /// Containers that were exposed before their labels were complete, and since when.
    pub blank: BTreeMap<String, f64>,
    pub last: Option<Arc<TimedPage>>,
    /// The largest difference between busy time and the sum of its users and reasons.
    pub worst_books: f64,
    /// The most by which the series of users were behind the agent's sum of what is credited.
    pub worst_behind: f64,
    /// The largest lag of accounted time while nothing disturbed the agent.
    pub worst_lag: f64,
}

pub fn uuids(page: &[Sample]) -> BTreeSet<String> {
    page.iter().filter(|s| s.name == "gpu_time_seconds_total").filter_map(|s| s.labels.get("uuid").cloned()).collect()
}

/// Seconds of this GPU in this state.
pub fn state_seconds(page: &[Sample], uuid: &str, state: &str) -> f64 {
    sum(page, "gpu_time_seconds_total", &[("uuid", uuid), ("state", state)]).unwrap_or_default()
}

fn accounted(page: &[Sample], uuid: &str) -> f64 {
    sum(page, "gpu_time_seconds_total", &[("uuid", uuid)]).unwrap_or_default()
}

fn is_counter(name: &str) -> bool {
    ["_total", "_count", "_sum", "_bucket"].iter().any(|end| name.ends_with(end))
}

fn series_key(sample: &Sample) -> String {
    let mut key = sample.name.clone();
    for (name, value) in &sample.labels {
        key.extend(["|", name, "=", value]);
    }
    key
}

/// The user of a series with credited time.
fn user(sample: &Sample) -> Option<&str> {
    let labels = &sample.labels;
    match &*sample.name {
        "container_gpu_seconds_total" | "container_gpu_seconds_stderr" | "container_gpu_samples_total" => {
            labels.get("container_id").map(String::as_str)
        }
        "gpu_user_seconds_total" | "gpu_user_seconds_stderr" | "gpu_user_samples_total" => labels.get("user").map(String::as_str),
        _ => None,
    }
}

impl LifeAccount {
    pub fn new(started: f64) -> Self {
        Self { started, ..Self::default() }
    }

    /// Takes the next page. `calm`: GPUs that no fault has disturbed for long enough that their time must be settled.
    pub fn take(&mut self, page: &Arc<TimedPage>, allowed: &Allowed, calm: &dyn Fn(&str) -> bool) -> Vec<Problem> {
        let mut problems = self.counters(&page.samples);
        self.pages += 1;
        self.last = Some(page.clone());
        problems.extend(self.owners(page.begun, &page.samples, allowed));
        for uuid in uuids(&page.samples) {
            // A new series of credits is 0 in the first scrape that has it.
            if !self.has_new_credits(&page.samples, &uuid) {
                problems.extend(self.books(&page.samples, &uuid));
                problems.extend(self.series(&page.samples, &uuid));
            }
            problems.extend(self.wall_time(page, &uuid, calm(&uuid)));
        }
        problems.iter_mut().for_each(|problem| problem.text = format!("at {:.1} s: {}", page.begun, problem.text));
        problems
    }

    fn counters(&mut self, page: &[Sample]) -> Vec<Problem> {
        let mut problems = Vec::new();
        let before = std::mem::take(&mut self.counters);
        for sample in page.iter().filter(|s| is_counter(&s.name)) {
            let key = series_key(sample);
            if !(sample.value.is_finite() && sample.value >= 0.0) {
                problems.push(Problem::new(format!("value {}", sample.name), format!("{key} is {}", sample.value)));
            }
            let fallen = before.get(&key).filter(|before| sample.value < **before - ROUNDING_SECONDS);
            if let Some(before) = fallen {
                let text = format!("{key} fell from {before} to {}", sample.value);
                problems.push(Problem::new(format!("decrease {}", sample.name), text));
            }
            self.counters.insert(key, sample.value);
        }
        // What the agent counts about its own work may begin again with a device that was removed; GPU time may not.
        let is_lasting = |key: &str| !key.starts_with("gpu_sampler_");
        for (key, value) in before.into_iter().filter(|(key, _)| is_lasting(key)) {
            self.counters.entry(key).or_insert(value);
        }
        problems
    }

    fn has_new_credits(&mut self, page: &[Sample], uuid: &str) -> bool {
        let of_gpu = |sample: &&Sample| sample.labels.get("uuid").is_some_and(|of| of == uuid);
        let series = page.iter().filter(|s| s.name == "gpu_credited_seconds_total").filter(of_gpu).count();
        let before = self.credited_series.insert(uuid.to_owned(), series);
        before.is_some_and(|before| series > before)
    }

    /// Busy time is credited to users or has a reason.
    fn books(&mut self, page: &[Sample], uuid: &str) -> Option<Problem> {
        let total = |name| sum(page, name, &[("uuid", uuid)]).unwrap_or_default();
        let busy = state_seconds(page, uuid, "busy");
        let off = total("gpu_credited_seconds_total") + total("gpu_unattributed_seconds_total") - busy;
        self.worst_books = self.worst_books.max(off.abs());
        let text = || format!("{uuid}: credited and unattributed seconds differ from {busy} s of busy time by {off}");
        (off.abs() > ROUNDING_SECONDS * (1.0 + busy)).then(|| Problem::new("books", text()))
    }

    /// The series of users, also those that have ended, sum to what is credited, but for users that are not exposed yet.
    fn series(&mut self, page: &[Sample], uuid: &str) -> Option<Problem> {
        let of_agent = sum(page, "gpu_credited_seconds_total", &[("uuid", uuid)]).unwrap_or_default();
        let of_users = self.credited(uuid);
        self.worst_behind = self.worst_behind.max(of_agent - of_users);
        let text = || format!("{uuid}: the series of users sum to {of_users} s, {of_agent} s are credited");
        let is_within = (-ROUNDING_SECONDS * (1.0 + of_agent)..=BEHIND_SECONDS).contains(&(of_agent - of_users));
        (!is_within).then(|| Problem::new("series of users", text()))
    }

    /// The states of a GPU sum to the time since it was first seen.
    fn wall_time(&mut self, page: &TimedPage, uuid: &str, calm: bool) -> Option<Problem> {
        let accounted = accounted(&page.samples, uuid);
        let origin = *self.origins.entry(uuid.to_owned()).or_insert(page.begun - accounted);
        let ahead = accounted - (page.ended - self.started);
        if ahead > AHEAD_SECONDS {
            let text = format!("{uuid}: the states sum to {accounted:.2} s, {ahead:.2} s more than the agent has run");
            return Some(Problem::new("wall time ahead", text));
        }
        if !calm {
            return None;
        }
        let lag = page.begun - origin - accounted;
        self.worst_lag = self.worst_lag.max(lag);
        let text = || format!("{uuid}: {lag:.2} s of wall time are in none of the states, {accounted:.2} s are");
        (lag > LAG_SECONDS).then(|| Problem::new("wall time lost", text()))
    }

    /// Seconds by which the accounted time of a GPU lags behind the clock. 0 for a GPU that was not seen yet.
    pub fn lag(&self, page: &TimedPage, uuid: &str) -> f64 {
        self.origins.get(uuid).map_or(0.0, |origin| page.begun - origin - accounted(&page.samples, uuid))
    }

    /// The time of a GPU that was not present is in no state.
    pub fn forget_origin(&mut self, uuid: &str) {
        self.origins.remove(uuid);
    }

    fn owners(&mut self, begun: f64, page: &[Sample], allowed: &Allowed) -> Vec<Problem> {
        let mut problems = Vec::new();
        for sample in page.iter().filter(|s| s.value > 0.0) {
            let (Some(user), Some(uuid)) = (user(sample), sample.labels.get("uuid")) else { continue };
            let credit = self.credits.entry((user.to_owned(), uuid.clone())).or_default();
            match sample.name.rsplit_once('_') {
                Some((_, "stderr")) => credit.stderr = sample.value,
                Some((name, _)) if name.ends_with("samples") => credit.samples = sample.value,
                _ => credit.seconds = sample.value,
            }
            let known = allowed.get(user);
            if !known.is_some_and(|known| known.gpus.contains(uuid)) {
                let text = format!("{user} has {} = {} on {uuid}, where it never ran", sample.name, sample.value);
                problems.push(Problem::new(format!("owner {user} {uuid}"), text));
            }
            if let Some((pod, known)) = sample.labels.get("pod").zip(known).filter(|(pod, known)| **pod != known.pod) {
                problems.extend(self.label(begun, user, pod, known));
            }
        }
        problems
    }

    /// A label that is not the container's. A blank one is valid for a while if its source was late.
    fn label(&mut self, begun: f64, user: &str, pod: &str, known: &AllowedUser) -> Option<Problem> {
        if !pod.is_empty() {
            return Some(Problem::new(format!("label {user}"), format!("{user} has the pod {pod:?} instead of {:?}", known.pod)));
        }
        let age = begun - known.since.max(self.started);
        let blank = begun - *self.blank.entry(user.to_owned()).or_insert(begun);
        let text = || format!("{user} of {:?} has a blank pod, {age:.1} s old and blank for {blank:.1} s", known.pod);
        (age < HELD_BACK_SECONDS || blank > BLANK_SECONDS).then(|| Problem::new("blank label", text()))
    }

    /// What is credited on a GPU, over all containers and users that this life had.
    pub fn credited(&self, uuid: &str) -> f64 {
        self.credits.iter().filter(|((_, on), _)| on == uuid).map(|(_, credit)| credit.seconds).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse;

    const GPU: &str = "uuid=\"G\"";

    /// A page 10 s after the start: 4 s busy, of which 3 s are credited to the container `a`.
    fn page(busy: f64, idle: f64, credited: f64) -> TimedPage {
        let text = format!(
            "gpu_time_seconds_total{{{GPU},state=\"busy\"}} {busy}\n\
             gpu_time_seconds_total{{{GPU},state=\"idle\"}} {idle}\n\
             gpu_credited_seconds_total{{{GPU},namespace=\"\",kind=\"container\"}} {credited}\n\
             gpu_unattributed_seconds_total{{{GPU},reason=\"host\"}} 1\n\
             container_gpu_seconds_total{{{GPU},container_id=\"a\"}} {credited}\n"
        );
        TimedPage { begun: 10.0, ended: 10.1, samples: parse(&text) }
    }

    fn allowed() -> Allowed {
        [("a".to_owned(), AllowedUser { gpus: BTreeSet::from(["G".to_owned()]), pod: "p".into(), since: 0.0 })].into()
    }

    fn keys(problems: Vec<Problem>) -> Vec<String> {
        problems.into_iter().map(|problem| problem.key).collect()
    }

    fn take(life: &mut LifeAccount, page: TimedPage, calm: bool) -> Vec<String> {
        keys(life.take(&Arc::new(page), &allowed(), &|_| calm))
    }

    fn first(page: TimedPage) -> Vec<String> {
        take(&mut LifeAccount::new(0.0), page, true)
    }

    #[test]
    fn a_valid_page_has_no_problem() {
        assert_eq!(first(page(4.0, 6.0, 3.0)), [""; 0]);
    }

    #[test]
    fn each_broken_invariant_is_found() {
        assert_eq!(first(page(4.0, 6.0, 2.9)), ["books"]);
        assert_eq!(first(page(4.0, 7.0, 3.0)), ["wall time ahead"]);
        let mut other = page(4.0, 6.0, 3.0);
        other.samples.extend(parse("container_gpu_samples_total{uuid=\"G\",container_id=\"b\"} 1\n"));
        assert_eq!(first(other), ["owner b G"]);
        let mut named = page(4.0, 6.0, 3.0);
        named.samples.extend(parse("container_gpu_samples_total{uuid=\"G\",container_id=\"a\",pod=\"q\"} 1\n"));
        assert_eq!(first(named), ["label a"]);
        for seconds in [3.1, 3.0 - BEHIND_SECONDS - 0.1] {
            let mut other = page(10.0, 0.0, 9.0);
            other
                .samples
                .extend(parse(&format!("container_gpu_seconds_total{{uuid=\"G\",container_id=\"a\"}} {}\n", 6.0 + seconds)));
            assert_eq!(first(other), ["series of users"]);
        }
        let mut strange = page(4.0, 6.0, 3.0);
        strange.samples.extend(parse("x_total NaN\n"));
        assert_eq!(first(strange), ["value x_total"]);
    }

    #[test]
    fn a_counter_that_falls_is_found() {
        let mut life = LifeAccount::new(0.0);
        assert_eq!(take(&mut life, page(4.0, 6.0, 3.0), true), [""; 0]);
        let fallen = take(&mut life, page(4.0, 5.9, 3.0), true);
        assert_eq!(fallen, ["decrease gpu_time_seconds_total"]);
    }

    #[test]
    fn a_counter_of_gpu_time_does_not_begin_again_and_one_of_the_agents_work_may() {
        let mut life = LifeAccount::new(0.0);
        let with = |line: &str| TimedPage { samples: parse(line), ..page(0.0, 0.0, 0.0) };
        for line in ["x_total 5\ngpu_sampler_x_total 5\n", "y 1\n"] {
            assert_eq!(take(&mut life, with(line), false), [""; 0]);
        }
        assert_eq!(take(&mut life, with("x_total 4\ngpu_sampler_x_total 4\n"), false), ["decrease x_total"]);
    }

    #[test]
    fn a_blank_label_is_valid_for_a_while_only_after_it_was_held_back() {
        let with = |begun: f64, pod: &str| {
            let line = format!("container_gpu_samples_total{{uuid=\"G\",container_id=\"a\",pod=\"{pod}\"}} 1\n");
            TimedPage { begun, ended: begun, samples: parse(&line) }
        };
        let mut life = LifeAccount::new(10.0);
        assert_eq!(take(&mut life, with(11.0, ""), false), ["blank label"], "a second after the start");
        assert_eq!(take(&mut life, with(13.0, ""), false), [""; 0]);
        assert_eq!(take(&mut life, with(14.0, "p"), false), [""; 0]);
        assert_eq!(take(&mut life, with(30.0, ""), false), ["blank label"], "19 s later");
    }

    #[test]
    fn time_in_no_state_is_found_where_it_is_calm() {
        let mut life = LifeAccount::new(0.0);
        let later = TimedPage { begun: 20.0, ended: 20.1, ..page(4.0, 6.0, 3.0) };
        take(&mut life, page(4.0, 6.0, 3.0), true);
        assert_eq!(take(&mut life, later.clone(), false), [""; 0]);
        assert_eq!(take(&mut life, later.clone(), true), ["wall time lost"]);
        assert!((life.lag(&later, "G") - 10.0).abs() < 1e-9);
    }

    #[test]
    fn credits_stay_after_their_series() {
        let mut life = LifeAccount::new(0.0);
        take(&mut life, page(4.0, 6.0, 3.0), true);
        take(&mut life, TimedPage { samples: Vec::new(), ..page(0.0, 0.0, 0.0) }, true);
        assert_eq!((life.credited("G"), life.pages), (3.0, 2));
    }
}
