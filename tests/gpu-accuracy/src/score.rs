//! Compares what the pages show with what happened.

use serde::{Deserialize, Serialize};

use crate::amount::Selector;
use crate::mapping::{Family, Identity, Mapping};
use crate::node::{Container, GpuTruth};
use crate::page::{Page, Sample};
use crate::world::{BUSY, BUSY_WATTS, IDLE_WATTS, SHORT};

/// A page shows the time before it.
const EDGE_SECONDS: f64 = 3.0;

/// What the exporter used while the loads ran, without the simulated driver.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Of one processor.
    pub processor_ratio: f64,
    pub resident_bytes: f64,
}

/// `None`: the exporter does not show it. Errors are relative to the truth.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Score {
    pub world: String,
    /// Busy time of GPUs: sum of the differences.
    pub device_error: Option<f64>,
    /// Time of containers on GPUs: sum of the differences.
    pub user_error: Option<f64>,
    /// Largest difference between a container's share of a shared GPU's time and its true share.
    pub share_error: Option<f64>,
    /// Time of processes of 0.1 to 2 s that is not shown, and time that is shown in excess.
    pub short_lost: Option<f64>,
    pub short_excess: Option<f64>,
    /// Series of users of which a label that identifies the container is blank, missing or wrong. Also `None` if no label does.
    pub labels_wrong: Option<f64>,
    /// Reads of the utilization of a busy GPU that show 0, and that show nothing.
    pub false_zeros: Option<f64>,
    pub absent: Option<f64>,
    pub device_energy_error: Option<f64>,
    /// Energy above that of an idle GPU.
    pub user_energy_error: Option<f64>,
    pub processor_ratio: f64,
    pub resident_bytes: f64,
    pub page_bytes: f64,
    pub series: f64,
    /// Median.
    pub scrape_seconds: f64,
    pub failed_scrapes: u64,
}

/// All scores of an exporter: the output of `gpu-accuracy run --json`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ExporterScores {
    pub exporter: String,
    pub worlds: Vec<Score>,
}

pub struct Observed<'a> {
    pub mapping: &'a Mapping,
    pub pages: &'a [Page],
    /// The last one is that of short-lived processes.
    pub containers: &'a [Container],
    /// By GPU.
    pub truth: &'a [GpuTruth],
    /// When the loads began and ended, in the reader's time.
    pub played: (f64, f64),
}

/// A measured value and the true one.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Pair {
    shown: f64,
    truth: f64,
}

/// Sum of the differences, relative to the sum of the true values.
fn relative(pairs: &[Pair]) -> Option<f64> {
    let truth: f64 = pairs.iter().map(|pair| pair.truth).sum();
    let off: f64 = pairs.iter().map(|pair| (pair.shown - pair.truth).abs()).sum();
    (!pairs.is_empty() && truth > 0.0).then(|| off / truth)
}

fn pairs(users: &[(&Container, Pair)]) -> Vec<Pair> {
    users.iter().map(|(_, pair)| *pair).collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn ratio(part: usize, of: usize) -> Option<f64> {
    (of > 0).then(|| part as f64 / of as f64)
}

impl Observed<'_> {
    pub fn score(&self, world: &str, cost: Cost) -> Score {
        let users = self.users(self.mapping.user.as_ref(), 1.0);
        let energy = self.users(self.mapping.user_energy.as_ref(), BUSY_WATTS - IDLE_WATTS);
        let (of_short, of_others): (Vec<_>, Vec<_>) = users.into_iter().partition(|(container, _)| container.gpu == SHORT);
        let short = of_short.first().map(|(_, pair)| *pair).filter(|pair| pair.truth > 0.0);
        let now: Vec<Option<f64>> = self.readings();
        let read = self.pages.iter().filter(|page| page.bytes > 0);
        Score {
            world: world.to_owned(),
            device_error: relative(&self.devices()),
            user_error: relative(&pairs(&of_others)),
            share_error: Self::share_error(&of_others),
            short_lost: short.map(|pair| (pair.truth - pair.shown).max(0.0) / pair.truth),
            short_excess: short.map(|pair| (pair.shown - pair.truth).max(0.0) / pair.truth),
            labels_wrong: self.labels_wrong(),
            false_zeros: ratio(now.iter().filter(|value| **value == Some(0.0)).count(), now.len()),
            absent: ratio(now.iter().filter(|value| value.is_none()).count(), now.len()),
            device_energy_error: relative(&self.device_energy()),
            user_energy_error: relative(&pairs(&energy)),
            processor_ratio: cost.processor_ratio,
            resident_bytes: cost.resident_bytes,
            page_bytes: median(read.clone().map(|page| page.bytes as f64).collect()),
            series: median(read.clone().map(|page| page.samples.len() as f64).collect()),
            scrape_seconds: median(read.map(|page| page.took).collect()),
            failed_scrapes: self.pages.iter().filter(|page| page.bytes == 0).count() as u64,
        }
    }

    /// From the last page before the loads on.
    fn played(&self) -> &[Page] {
        let first = self.pages.iter().rposition(|page| page.at <= self.played.0).unwrap_or(0);
        &self.pages[first..]
    }

    fn gpu(&self, family: &Family, gpu: usize) -> String {
        match family.gpu.is {
            Identity::Index => gpu.to_string(),
            _ => self.truth.get(gpu).map(|truth| truth.uuid.clone()).unwrap_or_default(),
        }
    }

    fn devices(&self) -> Vec<Pair> {
        let Some(family) = &self.mapping.device else { return Vec::new() };
        let pair = |(gpu, truth): (usize, &GpuTruth)| {
            let of_gpu = self.gpu(family, gpu);
            let shown = Selector { family, gpu: &of_gpu, user: None }.amount(self.played());
            Pair { shown: shown.unwrap_or(0.0), truth: truth.busy }
        };
        self.truth.iter().enumerate().map(pair).collect()
    }

    /// Every container on its GPU. `scale`: of the true GPU-seconds.
    fn users(&self, family: Option<&Family>, scale: f64) -> Vec<(&Container, Pair)> {
        let Some((family, key)) = family.and_then(|family| Some((family, family.user.as_ref()?))) else { return Vec::new() };
        let mut users = Vec::new();
        for container in self.containers {
            let truth = self.truth.get(container.gpu).map_or(0.0, |truth| truth.seconds(container));
            let (of_gpu, mut values) = (self.gpu(family, container.gpu), container.values(key.is));
            if values.is_empty() {
                // Processes that came and went: all on the GPU, which is theirs alone.
                values = self.values_on(family, &key.label, &of_gpu);
            }
            let shown = Selector { family, gpu: &of_gpu, user: Some(&values) }.amount(self.played());
            users.push((container, Pair { shown: shown.unwrap_or(0.0), truth: truth * scale }));
        }
        users
    }

    /// All values of this label on a GPU.
    fn values_on(&self, family: &Family, label: &str, gpu: &str) -> Vec<String> {
        let selector = Selector { family, gpu, user: None };
        let samples = self.played().iter().flat_map(|page| &page.samples).filter(|sample| selector.has(sample));
        let mut values: Vec<String> = samples.filter_map(|sample| sample.labels.get(label).cloned()).collect();
        values.sort_unstable();
        values.dedup();
        values
    }

    fn share_error(users: &[(&Container, Pair)]) -> Option<f64> {
        let mut worst: Option<f64> = None;
        for (container, pair) in users {
            let on_gpu = || users.iter().filter(|(other, _)| other.gpu == container.gpu).map(|(_, pair)| *pair);
            let (shown, truth) = on_gpu().fold((0.0, 0.0), |(shown, truth), pair| (shown + pair.shown, truth + pair.truth));
            if on_gpu().count() > 1 && truth > 0.0 {
                let share = if shown > 0.0 { pair.shown / shown } else { 0.0 };
                worst = Some(worst.unwrap_or(0.0).max((share - pair.truth / truth).abs()));
            }
        }
        worst
    }

    /// The current utilization of busy GPUs on each page of the time in which they were loaded.
    fn readings(&self) -> Vec<Option<f64>> {
        let Some(family) = self.mapping.gauge() else { return Vec::new() };
        let loaded = self.played.0 + EDGE_SECONDS..self.played.1;
        let pages = self.pages.iter().filter(|page| loaded.contains(&page.at) && page.bytes > 0);
        let of_page = |page: &Page| {
            BUSY.map(|gpu| {
                let of_gpu = self.gpu(family, gpu);
                let selector = Selector { family, gpu: &of_gpu, user: None };
                page.samples
                    .iter()
                    .find(|sample| selector.has(sample))
                    .map(|sample| sample.value)
                    .filter(|value| value.is_finite())
            })
        };
        pages.flat_map(of_page).collect()
    }

    fn labels_wrong(&self) -> Option<f64> {
        let (family, labels) = (self.mapping.user.as_ref()?, &self.mapping.labels);
        let key = family.user.as_ref()?;
        let (mut wrong, mut all) = (0, 0);
        for container in self.containers {
            let of_gpu = self.gpu(family, container.gpu);
            let values = container.values(key.is);
            let selector = Selector { family, gpu: &of_gpu, user: (!values.is_empty()).then_some(&values) };
            let is_right = |sample: &Sample| {
                let matches = |(name, is): (&String, &Identity)| {
                    sample.labels.get(name).is_some_and(|value| container.values(*is).contains(value))
                };
                labels.iter().all(matches)
            };
            for sample in self.played().iter().flat_map(|page| &page.samples).filter(|sample| selector.has(sample)) {
                all += 1;
                wrong += usize::from(!is_right(sample));
            }
        }
        if labels.is_empty() { None } else { ratio(wrong, all) }
    }

    fn device_energy(&self) -> Vec<Pair> {
        let (Some(family), [first, .., last]) = (&self.mapping.device_energy, self.played()) else { return Vec::new() };
        let seconds = last.at - first.at;
        let pair = |(gpu, truth): (usize, &GpuTruth)| {
            let of_gpu = self.gpu(family, gpu);
            let shown = Selector { family, gpu: &of_gpu, user: None }.amount(self.played());
            Pair { shown: shown.unwrap_or(0.0), truth: IDLE_WATTS * seconds + (BUSY_WATTS - IDLE_WATTS) * truth.busy }
        };
        self.truth.iter().enumerate().map(pair).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::parse;
    use crate::world::{ROLES, SHORT_POD};

    const MAPPING: &str = "
        name = 'x'
        device = { metric = 'busy', kind = 'percent', gpu = { label = 'gpu', is = 'index' } }
        user = { metric = 'used', kind = 'seconds', gpu = { label = 'gpu', is = 'index' }, user = { label = 'pod', is = 'pod' } }
        device_energy = { metric = 'watts', kind = 'watts', gpu = { label = 'gpu', is = 'index' } }
        labels = { pod = 'pod', namespace = 'namespace' }
    ";

    fn container(pod: &'static str, gpu: usize, pids: &[u32]) -> Container {
        Container { pod, gpu, id: pod.to_owned(), cgroup: std::path::PathBuf::new(), pids: pids.to_vec() }
    }

    /// 10 s in which `trainer` has two thirds and `notebook` a third of GPU 0, which is busy for 90 % of the time.
    fn score(lines: impl Fn(usize) -> String) -> Score {
        let mapping = Mapping::parse(MAPPING).unwrap();
        let pages: Vec<Page> = (0..=10)
            .map(|at| {
                let text = lines(at);
                Page { at: at as f64, bytes: text.len(), samples: parse(&text).unwrap(), ..Page::default() }
            })
            .collect();
        let containers = [container(ROLES[0].pod, 0, &[1]), container(ROLES[1].pod, 0, &[2]), container(SHORT_POD, SHORT, &[])];
        let gpu = |busy, processes: &[(u32, f64)]| GpuTruth { uuid: String::new(), busy, processes: processes.to_vec() };
        let truth = [gpu(9.0, &[(1, 6.0), (2, 3.0)]), gpu(0.0, &[]), gpu(4.0, &[(7, 1.0), (8, 3.0)])];
        let observed = Observed { mapping: &mapping, pages: &pages, containers: &containers, truth: &truth, played: (0.0, 10.0) };
        observed.score("w", Cost { processor_ratio: 0.0, resident_bytes: 0.0 })
    }

    fn user(pod: &str, gpu: usize, seconds: f64) -> String {
        format!("used{{gpu=\"{gpu}\",pod=\"{pod}\",namespace=\"accuracy\"}} {seconds}\n")
    }

    fn exact(at: usize) -> String {
        let at = at as f64;
        let watts = "watts{gpu=\"0\"} 238\nwatts{gpu=\"1\"} 40\nwatts{gpu=\"2\"} 128\n";
        let busy = "busy{gpu=\"0\"} 90\nbusy{gpu=\"1\"} 0\nbusy{gpu=\"2\"} 40\n";
        format!("{busy}{watts}{}{}{}", user("trainer", 0, 0.6 * at), user("notebook", 0, 0.3 * at), user(SHORT_POD, 2, 0.4 * at))
    }

    fn near(value: Option<f64>, expect: f64) {
        assert!(value.is_some_and(|value| (value - expect).abs() < 1e-9), "{value:?} instead of {expect}");
    }

    #[test]
    fn an_exact_exporter_has_no_error() {
        let score = score(exact);
        for error in [score.device_error, score.user_error, score.share_error, score.device_energy_error] {
            near(error, 0.0);
        }
        near(score.short_lost, 0.0);
        near(score.short_excess, 0.0);
        near(score.labels_wrong, 0.0);
        // GPU 1 shows 0, half of the reads of the two that are busy.
        near(score.false_zeros, 0.5);
        assert_eq!((score.user_energy_error, score.failed_scrapes), (None, 0));
    }

    #[test]
    fn each_error_is_found() {
        let swapped = |at: usize| {
            let at = at as f64;
            format!("{}{}busy{{gpu=\"0\"}} 45\n", user("trainer", 0, 0.3 * at), user("notebook", 0, 0.6 * at))
        };
        let score = score(swapped);
        near(score.device_error, (4.5 + 4.0) / 13.0);
        near(score.user_error, 6.0 / 9.0);
        near(score.share_error, 1.0 / 3.0);
        near(score.short_lost, 1.0);
        near(score.absent, 0.5);
        let blank = |at: usize| exact(at).replace("namespace=\"accuracy\"", "namespace=\"\"");
        near(self::score(blank).labels_wrong, 1.0);
        assert_eq!(self::score(|_| String::new()).failed_scrapes, 11);
    }
}
