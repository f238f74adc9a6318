//! Makes the table from the pages: a row for each question, a column for each client. No cell is written by hand.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use gpu_sampler_benches::total;
use gpu_sampler_tests::{Sample, sum};

use crate::clients::{Client, Naming, families, labels};
use crate::read::{Page, Seen};
use crate::world::{
    AHEAD, BEHIND, BRIEF, BRIEF_LASTS, BRIEF_POD, FAILING, GARBAGE, IDLE, RESIDENT, ROLES, Role, SHARED, Scene, Truth,
};

/// A usual scrape interval, in pages.
const SELDOM: usize = 15;
/// A page shows the time before it.
const EDGE_S: f64 = 2.5;

pub struct Run<'a> {
    pub clients: &'a [Client],
    pub seen: &'a Seen,
    pub scene: &'a Scene,
    pub truth: &'a Truth,
    /// When the loads began, in the reader's time, and their duration.
    pub from: f64,
    pub played: f64,
    pub used: &'a [f64],
}

/// One client's pages from the begin of the loads on.
struct View<'a> {
    run: &'a Run<'a>,
    client: &'a Client,
    pages: Vec<&'a Page>,
    /// The last page before the loads began.
    before: &'a Page,
}

const NOT_SHOWN: &str = "not shown";

pub fn lines(run: &Run<'_>) -> Result<Vec<String>> {
    let views =
        run.clients.iter().zip(run.seen).map(|(client, pages)| View::new(run, client, pages)).collect::<Result<Vec<_>>>()?;
    let names: Vec<&str> = run.clients.iter().map(|client| client.name).collect();
    let mut lines = vec![format!("| in {:.0} s | truth | {} |", run.played, names.join(" | "))];
    lines.push(format!("|---{}|", "|---".repeat(names.len() + 1)));
    let mut row = |question: &str, truth: &str, cell: &dyn Fn(&View<'_>) -> Result<String>| -> Result<()> {
        let cells = views.iter().map(cell).collect::<Result<Vec<_>>>()?;
        lines.push(format!("| {question} | {truth} | {} |", cells.join(" | ")));
        Ok(())
    };
    let seconds = |truth: f64| format!("{truth:.1} s");
    let devices = [
        (SHARED, "two containers"),
        (AHEAD, "clock 12 s ahead"),
        (BEHIND, "clock 12 s behind"),
        (GARBAGE, "with garbage samples"),
        (BRIEF, "brief processes"),
        (FAILING, "its calls fail for 15 s"),
    ];
    for (gpu, what) in devices {
        let truth = run.truth.busy(gpu);
        row(&format!("GPU {gpu} ({what}): busy"), &seconds(truth), &|v| Ok(judged(v.device(gpu, 1), truth)))?;
    }
    let truth = run.truth.busy(SHARED);
    row(&format!("GPU {SHARED}, read once in {SELDOM} s: busy"), &seconds(truth), &|v| {
        Ok(judged(v.device(SHARED, SELDOM), truth))
    })?;
    for role in ROLES.iter().filter(|role| role.gpu != RESIDENT) {
        let (truth, what) = (run.truth.processes(role.gpu, &run.scene.pids_of(role.pod)), described(role));
        row(&what, &seconds(truth), &|v| Ok(judged(v.user(role, 1), truth)))?;
    }
    let trainer = &ROLES[0];
    let truth = run.truth.processes(SHARED, &run.scene.pids_of(trainer.pod));
    row(&format!("`{}`, read once in {SELDOM} s", trainer.pod), &seconds(truth), &|v| {
        Ok(judged(v.user(trainer, SELDOM), truth))
    })?;
    let truth = run.truth.processes(BRIEF, &[]);
    let brief = format!("three processes of {BRIEF_LASTS} s in `{BRIEF_POD}`");
    row(&format!("{brief}: sum"), &seconds(truth), &|v| Ok(judged(v.brief(1), truth)))?;
    row(&format!("{brief}, read once in {SELDOM} s"), &seconds(truth), &|v| Ok(judged(v.brief(SELDOM), truth)))?;
    row("series after their end", "", &|v| Ok(v.after_the_end()))?;
    row("a process that only holds memory", "0 s", &|v| Ok(v.resident()))?;
    row(&format!("GPU {IDLE}, idle"), "0 %", &|v| Ok(v.idle()))?;
    row(&format!("GPU {FAILING} while its calls failed"), "busy half of the time", &|v| Ok(v.while_failing()))?;
    row("invalid values", "none", &|v| Ok(v.garbage()))?;
    row("labels that identify a user of a GPU", "", &|v| Ok(v.user_labels()))?;
    row("counters of GPU time", "", &|v| Ok(v.counters()))?;
    row("unattributed GPU time", "", &|v| Ok(v.unattributed()))?;
    row("series about processes or containers", &format!("{} processes", run.scene.living()), &|v| Ok(v.user_series()))?;
    row("labels that Prometheus sets itself", "none", &|v| Ok(v.clashes()))?;
    row("default listen address", "", &|v| {
        Ok(if v.client.listens_everywhere()? { "every address" } else { "loopback" }.to_owned())
    })?;
    let agents = *run.used.first().context("the agent")?;
    row("processor time relative to the agent's", "", &|v| {
        let used = v.client_of(run.used)?;
        Ok(format!("{:.1} ({:.2} % of a processor)", used / agents, used / run.played * 100.0))
    })?;
    row("resident memory", "", &|v| Ok(format!("{:.0} MiB", v.client.resident_bytes()? / 1024.0 / 1024.0)))?;
    Ok(lines)
}

fn described(role: &Role) -> String {
    let situation = match role.gpu {
        SHARED => "shared with another container".to_owned(),
        AHEAD => "two processes, clock 12 s ahead".to_owned(),
        BEHIND => "clock 12 s behind".to_owned(),
        _ => "alone".to_owned(),
    };
    format!("`{}` on GPU {} ({situation})", role.pod, role.gpu)
}

/// Seconds as a range, both ends equal if there is only one way of reading them; and the standard error, if the client exports one.
#[derive(Clone, Copy, Default)]
struct Reading {
    least: f64,
    most: f64,
    stderr: Option<f64>,
}

impl Reading {
    fn exactly(seconds: f64) -> Self {
        Self { least: seconds, most: seconds, stderr: None }
    }
}

/// Seconds, and their deviation from the truth in percent of it.
fn judged(reading: Option<Reading>, truth: f64) -> String {
    let Some(Reading { least, most, stderr }) = reading else { return NOT_SHOWN.to_owned() };
    let percent = |seconds: f64| format!("{:+.0} %", (seconds / truth - 1.0) * 100.0).replace("-0 %", "+0 %");
    let stderr = stderr.filter(|stderr| *stderr >= 0.05).map_or(String::new(), |stderr| format!(" ± {stderr:.1}"));
    // Compared as printed, so that no range has equal ends.
    if format!("{least:.1}") == format!("{most:.1}") {
        format!("{most:.1} s{stderr} ({})", percent(most))
    } else {
        format!("{least:.1} to {most:.1} s ({} to {})", percent(least), percent(most))
    }
}

fn quoted(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(" ")
}

fn is_of_gpu(sample: &Sample, naming: &Naming, gpu: usize) -> bool {
    sample.labels.get(naming.index) == Some(&gpu.to_string())
}

impl<'a> View<'a> {
    fn new(run: &'a Run<'a>, client: &'a Client, pages: &'a [Page]) -> Result<Self> {
        let before = pages.iter().rfind(|page| page.at_s <= run.from).context("a page before the loads")?;
        Ok(Self { run, client, pages: pages.iter().filter(|page| page.at_s > run.from).collect(), before })
    }

    fn last(&self) -> &'a [Sample] {
        self.pages.iter().rev().find(|page| !page.samples.is_empty()).map_or(&[], |page| &page.samples)
    }

    fn client_of(&self, used: &[f64]) -> Result<f64> {
        let at = self.run.clients.iter().position(|client| client.port == self.client.port);
        at.and_then(|at| used.get(at)).copied().context("a client")
    }

    /// GPU-seconds as the sum of a gauge in percent over time, each page counting until the next one. Least and most over the possible
    /// first pages, before which it counts as 0. An absent value counts as 0, as in a sum over time.
    fn gauge(&self, every: usize, percent: impl Fn(&Page) -> Option<f64>) -> Option<Reading> {
        let values: Vec<(f64, Option<f64>)> = self.pages.iter().map(|page| (page.at_s, percent(page))).collect();
        let any = values.iter().any(|(_, value)| value.is_some());
        let end = values.last().map_or(0.0, |(at_s, _)| *at_s);
        let from = |first: usize| -> f64 {
            let chosen: Vec<&(f64, Option<f64>)> = values.iter().skip(first).step_by(every).collect();
            let until = chosen.iter().skip(1).map(|(at_s, _)| *at_s).chain([end]);
            let seconds = chosen.iter().zip(until).map(|((at_s, value), until)| {
                value.filter(|value| value.is_finite()).unwrap_or_default() / 100.0 * (until - at_s)
            });
            seconds.sum()
        };
        let mut sums: Vec<f64> = (0..every).map(from).collect();
        sums.sort_by(f64::total_cmp);
        let (least, most) = (sums.first().copied().unwrap_or_default(), sums.last().copied().unwrap_or_default());
        any.then_some(Reading { least, most, stderr: None })
    }

    /// Increase of a counter up to the last page that has it.
    fn counter(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let last = self.pages.iter().rev().find_map(|page| sum(&page.samples, name, labels))?;
        Some(last - sum(&self.before.samples, name, labels).unwrap_or_default())
    }

    fn uuid(&self, gpu: usize) -> String {
        let info = self.last().iter().find(|s| s.name == "gpu_info" && s.labels.get("index") == Some(&gpu.to_string()));
        info.and_then(|s| s.labels.get("uuid").cloned()).unwrap_or_default()
    }

    fn device(&self, gpu: usize, every: usize) -> Option<Reading> {
        match &self.client.naming {
            // Independent of the scrape interval.
            None => self.counter("gpu_time_seconds_total", &[("uuid", &self.uuid(gpu)), ("state", "busy")]).map(Reading::exactly),
            Some(naming) => self.gauge(every, |page| device_percent(page, naming, gpu)),
        }
    }

    /// The agent's counter of a pod's GPU-seconds, with the standard error that it exports.
    fn credited(&self, pod: &str, gpu: usize) -> Option<Reading> {
        let uuid = self.uuid(gpu);
        let labels = [("pod", pod), ("uuid", &*uuid)];
        let stderr = self.pages.iter().rev().find_map(|page| sum(&page.samples, "container_gpu_seconds_stderr", &labels));
        Some(Reading { stderr, ..Reading::exactly(self.counter("container_gpu_seconds_total", &labels)?) })
    }

    fn user(&self, role: &Role, every: usize) -> Option<Reading> {
        match &self.client.naming {
            None => self.credited(role.pod, role.gpu),
            Some(naming) => {
                let pids: Vec<String> = self.run.scene.pids_of(role.pod).iter().map(u32::to_string).collect();
                let mine = |s: &Sample| s.labels.get("pid").is_some_and(|pid| pids.contains(pid));
                self.gauge(every, |page| self.process_percent(page, naming, role.gpu, &mine))
            }
        }
    }

    fn process_percent(&self, page: &Page, naming: &Naming, gpu: usize, mine: &dyn Fn(&Sample) -> bool) -> Option<f64> {
        let family = naming.process?;
        let of_it =
            page.samples.iter().filter(|s| s.name == family && is_of_gpu(s, naming, gpu) && mine(s) && s.value.is_finite());
        of_it.map(|s| s.value).reduce(|a, b| a + b)
    }

    fn brief(&self, every: usize) -> Option<Reading> {
        match &self.client.naming {
            None => self.credited(BRIEF_POD, BRIEF),
            // A client that has the family and shows no process counts as 0.
            Some(naming) => naming
                .process
                .map(|_| self.gauge(every, |page| self.process_percent(page, naming, BRIEF, &|_| true)).unwrap_or_default()),
        }
    }

    fn after_the_end(&self) -> String {
        let (Some(naming), brief) = (&self.client.naming, self.brief(1)) else {
            let credited = self.counter("container_gpu_seconds_total", &[("pod", BRIEF_POD)]).unwrap_or_default();
            return format!("{credited:.1} s of its container");
        };
        let still = self.last().iter().any(|s| Some(s.name.as_str()) == naming.process && is_of_gpu(s, naming, BRIEF));
        match (brief, still) {
            (None, _) => NOT_SHOWN.to_owned(),
            (_, true) => "still shown".to_owned(),
            (_, false) => "no".to_owned(),
        }
    }

    fn resident(&self) -> String {
        let role = &ROLES[2];
        let pid = self.run.scene.pids_of(role.pod).first().map(u32::to_string).unwrap_or_default();
        let (family, label) = match &self.client.naming {
            None => ("container_gpu_memory_used_bytes", ("pod", role.pod)),
            Some(naming) => (naming.process_memory, ("pid", &*pid)),
        };
        let mib = if family.ends_with("bytes") { 1024.0 * 1024.0 } else { 1.0 };
        // At the end the process has released its memory.
        let most = self.pages.iter().filter_map(|page| sum(&page.samples, family, &[label])).reduce(f64::max);
        let memory = most.map_or("no memory".to_owned(), |most| format!("{:.0} MiB", most / mib));
        format!("{}, {memory}", self.user(role, 1).map_or(NOT_SHOWN.to_owned(), |reading| format!("{:.1} s", reading.most)))
    }

    fn idle(&self) -> String {
        match &self.client.naming {
            None => {
                let percent =
                    |p: &&Page| sum(&p.samples, "gpu_utilization_ratio", &[("uuid", &self.uuid(IDLE))]).map(|r| r * 100.0);
                shown(self.pages.iter().map(percent))
            }
            Some(naming) => shown(self.pages.iter().map(|page| device_percent(page, naming, IDLE))),
        }
    }

    /// The device's utilization, in pages that show only the time of the fault.
    fn while_failing(&self) -> String {
        let (from, to) = self.run.scene.failed;
        let pages = self.pages.iter().filter(|page| page.at_s > from + EDGE_S && page.at_s < to);
        match &self.client.naming {
            None => {
                let uuid = self.uuid(FAILING);
                let percent = |p: &&Page| sum(&p.samples, "gpu_utilization_ratio", &[("uuid", &uuid)]).map(|r| r * 100.0);
                let gained = |state: &str| {
                    self.counter("gpu_time_seconds_total", &[("uuid", &uuid), ("state", state)]).unwrap_or_default()
                };
                format!("{}; {:.1} s counted as `unobserved`", shown(pages.map(percent)), gained("unobserved"))
            }
            Some(naming) => shown(pages.map(|page| device_percent(page, naming, FAILING))),
        }
    }

    /// Values above 100 %, or with a pid that no process has.
    fn garbage(&self) -> String {
        let Some(naming) = &self.client.naming else {
            let above = |s: &&Sample| s.name == "container_accelerator_duty_cycle" && s.value > 100.5;
            let shown = self.pages.iter().flat_map(|page| page.samples.iter().filter(above)).count();
            let rejected = self.counter("gpu_sampler_rejected_samples_total", &[("uuid", &self.uuid(GARBAGE))]);
            return format!("{shown} shown; {:.0} counted as rejected", rejected.unwrap_or_default());
        };
        let family = |s: &&Sample| Some(s.name.as_str()) == naming.process;
        let on_it =
            |page: &&'a Page| page.samples.iter().filter(family).filter(|s| is_of_gpu(s, naming, GARBAGE)).collect::<Vec<_>>();
        let own: Vec<String> = self.run.scene.pids.iter().map(|(.., pid)| pid.to_string()).collect();
        let (mut above, mut nan, mut foreign) = (0.0f64, 0, BTreeSet::new());
        for sample in self.pages.iter().flat_map(on_it) {
            above = if sample.value > above { sample.value } else { above };
            nan += usize::from(sample.value.is_nan());
            let pid = sample.labels.get("pid").cloned().unwrap_or_default();
            if !own.contains(&pid) {
                foreign.insert(pid);
            }
        }
        if naming.process.is_none() {
            return "no utilization of processes".to_owned();
        }
        let above = if above > 100.0 { format!("up to {above:.0} %") } else { "none above 100 %".to_owned() };
        format!("{above}, {} pids of no process, {nan} times NaN", foreign.len())
    }

    fn user_labels(&self) -> String {
        let family = match &self.client.naming {
            None => "container_gpu_seconds_total",
            Some(naming) => naming.process.unwrap_or(naming.process_memory),
        };
        let page = self.pages.iter().find(|page| page.samples.iter().any(|s| s.name == family));
        quoted(&page.map(|page| labels(&page.samples, family)).unwrap_or_default())
    }

    fn text(&self) -> &'a str {
        self.pages.iter().rev().find(|page| !page.text.is_empty()).map_or("", |page| &page.text)
    }

    fn counters(&self) -> String {
        let time = |name: &String| name.contains("gpu") && name.contains("seconds") && !name.contains("_nvml_");
        let counters: Vec<String> = families(self.text(), "counter").into_iter().filter(time).collect();
        if counters.is_empty() {
            "none".to_owned()
        } else {
            format!("{}, such as {}", counters.len(), quoted(&counters[..counters.len().min(2)]))
        }
    }

    fn unattributed(&self) -> String {
        if !self.text().contains("unattributed") {
            return "not shown".to_owned();
        }
        let mut reasons: Vec<(String, f64)> = Vec::new();
        for s in self.last().iter().filter(|s| s.name == "gpu_unattributed_seconds_total" && s.value > 0.0) {
            let reason = s.labels.get("reason").cloned().unwrap_or_default();
            match reasons.iter_mut().find(|(known, _)| *known == reason) {
                Some((_, seconds)) => *seconds += s.value,
                None => reasons.push((reason, s.value)),
            }
        }
        let parts: Vec<String> = reasons.iter().map(|(reason, seconds)| format!("{seconds:.1} s `{reason}`")).collect();
        if parts.is_empty() { "by reason; none".to_owned() } else { parts.join(", ") }
    }

    fn user_series(&self) -> String {
        let middle = self.pages.get(self.pages.len() / 3).map_or(&[][..], |page| &page.samples);
        let is_about_user = |s: &&Sample| s.labels.contains_key("pid") || s.name.starts_with("container_");
        let pids: BTreeSet<&String> = middle.iter().filter_map(|s| s.labels.get("pid")).collect();
        let series = middle.iter().filter(is_about_user).count();
        match &self.client.naming {
            None => format!("{series}, about {} containers", total(middle, "container_gpu_info")),
            Some(_) => format!("{series}, about {} processes", pids.len()),
        }
    }

    fn clashes(&self) -> String {
        let own = ["instance", "job"];
        let keys: BTreeSet<String> = self.last().iter().flat_map(|s| s.labels.keys().cloned()).collect();
        let clashing: Vec<String> = keys.into_iter().filter(|key| own.contains(&key.as_str())).collect();
        if clashing.is_empty() { "none".to_owned() } else { quoted(&clashing) }
    }
}

fn device_percent(page: &Page, naming: &Naming, gpu: usize) -> Option<f64> {
    sum(&page.samples, naming.device, &[(naming.index, &gpu.to_string())])
}

/// In how many reads the value was absent, NaN, 0, or something else.
fn shown(values: impl Iterator<Item = Option<f64>>) -> String {
    let (mut absent, mut nan, mut zero, mut some) = (0, 0, 0, Vec::new());
    for value in values {
        match value {
            None => absent += 1,
            Some(value) if value.is_nan() => nan += 1,
            Some(0.0) => zero += 1,
            Some(value) => some.push(value),
        }
    }
    some.sort_by(f64::total_cmp);
    let reads = absent + nan + zero + some.len();
    let mut parts = Vec::new();
    for (n, what) in [(absent, "absent"), (nan, "NaN"), (zero, "0 %")] {
        if n > 0 {
            parts.push(format!("{what} in {n} of {reads} reads"));
        }
    }
    if let (Some(least), Some(most)) = (some.first(), some.last()) {
        let range = if least == most { format!("always {least:.0} %") } else { format!("{least:.0} to {most:.0} %") };
        parts.push(format!("{range} in {} of {reads} reads", some.len()));
    }
    parts.join(", ")
}
