//! Compares what the pages show with what happened.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::amount::Selector;
use crate::mapping::{Family, Identity, Key, Mapping};
use crate::node::{Container, GpuTruth};
use crate::page::{Page, Sample};
use crate::world::{BUSY, BUSY_WATTS, IDLE_WATTS, SHORT};

/// A page shows the time before it.
const EDGE_SECONDS: f64 = 3.0;

/// What the exporter used while the loads ran, without the simulated driver.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
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
    /// Samples of users of which a label that identifies the container is blank, missing or wrong. Also `None` if no label does.
    pub labels_wrong: Option<f64>,
    /// Utilization of a busy GPU: values of 0 among those that are shown, and reads in which none is.
    pub false_zeros: Option<f64>,
    pub absent: Option<f64>,
    pub device_energy_error: Option<f64>,
    /// Energy above that of an idle GPU.
    pub user_energy_error: Option<f64>,
    pub processor_ratio: f64,
    pub resident_bytes: f64,
    /// Medians; `None` without a valid page.
    pub page_bytes: Option<f64>,
    pub series: Option<f64>,
    pub scrape_seconds: Option<f64>,
    pub failed_scrapes: u64,
}

/// All scores of an exporter: the output of `gpu-accuracy run --json`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct ExporterScores {
    pub exporter: String,
    /// Of the program that made them.
    pub version: String,
    /// Duration of the loads.
    pub seconds: f64,
    pub interval_seconds: f64,
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

/// A measured value, `None` if there are no series, and the true one.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Pair {
    shown: Option<f64>,
    truth: f64,
}

impl Pair {
    fn shown(&self) -> f64 {
        self.shown.unwrap_or(0.0)
    }
}

/// A container on a GPU, which may not be its own.
struct UserPair<'a> {
    container: &'a Container,
    gpu: usize,
    pair: Pair,
}

impl UserPair<'_> {
    fn is_own(&self) -> bool {
        self.container.gpu == self.gpu
    }
}

/// Sum of the differences, relative to the sum of the true values; `None` if nothing is shown at all.
fn relative(pairs: impl Iterator<Item = Pair>) -> Option<f64> {
    let (mut off, mut truth, mut is_shown) = (0.0, 0.0, false);
    for pair in pairs {
        off += (pair.shown() - pair.truth).abs();
        truth += pair.truth;
        is_shown |= pair.shown.is_some();
    }
    (is_shown && truth > 0.0).then(|| off / truth)
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn ratio(part: usize, of: usize) -> Option<f64> {
    (of > 0).then(|| part as f64 / of as f64)
}

impl Observed<'_> {
    /// Fails if the mapping does not select what it describes.
    pub fn score(&self, world: &str, cost: Cost) -> Result<Score> {
        for family in [&self.mapping.device, &self.mapping.device_now, &self.mapping.device_energy].into_iter().flatten() {
            self.check_single(family)?;
        }
        let users = self.users(self.mapping.user.as_ref(), 1.0);
        let energy = self.users(self.mapping.user_energy.as_ref(), BUSY_WATTS - IDLE_WATTS);
        let is_shown = users.iter().any(|user| user.pair.shown.is_some());
        let short = users.iter().find(|user| user.is_own() && user.gpu == SHORT).map(|user| user.pair);
        let short = short.filter(|pair| is_shown && pair.truth > 0.0);
        let excess = |pair: Pair| Some((pair.shown? - pair.truth).max(0.0) / pair.truth);
        let now = self.readings();
        let shown = now.iter().flatten().count();
        let read = || self.pages.iter().filter(|page| page.bytes > 0);
        Ok(Score {
            world: world.to_owned(),
            device_error: relative(self.devices().into_iter()),
            // Time of the short-lived ones has rows of its own, but not time that another container has in their place.
            user_error: relative(users.iter().filter(|user| !(user.is_own() && user.gpu == SHORT)).map(|user| user.pair)),
            share_error: share_error(&users),
            short_lost: short.map(|pair| (pair.truth - pair.shown()).max(0.0) / pair.truth),
            short_excess: short.and_then(excess),
            labels_wrong: self.labels_wrong(),
            false_zeros: ratio(now.iter().filter(|value| **value == Some(0.0)).count(), shown),
            absent: ratio(now.len() - shown, now.len()),
            device_energy_error: relative(self.device_energy().into_iter()),
            user_energy_error: relative(energy.iter().map(|user| user.pair)),
            processor_ratio: cost.processor_ratio,
            resident_bytes: cost.resident_bytes,
            page_bytes: median(read().map(|page| page.bytes as f64)),
            series: median(read().map(|page| page.samples.len() as f64)),
            scrape_seconds: median(read().map(|page| page.took)),
            failed_scrapes: self.pages.iter().filter(|page| page.bytes == 0).count() as u64,
        })
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

    /// A family of GPUs has one series of each: several would be counted several times.
    fn check_single(&self, family: &Family) -> Result<()> {
        for gpu in 0..self.truth.len() {
            let of_gpu = self.gpu(family, gpu);
            let selector = Selector { family, gpu: &of_gpu, user: None };
            let most = self.pages.iter().map(|page| page.samples.iter().filter(|sample| selector.has(sample)).count()).max();
            ensure!(
                most.unwrap_or(0) <= 1,
                "{} has {} series of GPU {gpu}; select one of them with the key `with` in the mapping",
                family.metric,
                most.unwrap_or(0)
            );
        }
        Ok(())
    }

    fn amount(&self, family: &Family, gpu: usize, user: Option<&[String]>) -> Option<f64> {
        let of_gpu = self.gpu(family, gpu);
        Selector { family, gpu: &of_gpu, user }.amount(self.played())
    }

    fn devices(&self) -> Vec<Pair> {
        let Some(family) = &self.mapping.device else { return Vec::new() };
        let pair = |(gpu, truth): (usize, &GpuTruth)| Pair { shown: self.amount(family, gpu, None), truth: truth.busy };
        self.truth.iter().enumerate().map(pair).collect()
    }

    /// Every container on its GPU, and on others where the page shows time there. `scale`: of the true GPU-seconds.
    fn users(&self, family: Option<&Family>, scale: f64) -> Vec<UserPair<'_>> {
        let Some((family, key)) = family.and_then(|family| Some((family, family.user.as_ref()?))) else { return Vec::new() };
        let mut users = Vec::new();
        for container in self.containers {
            for gpu in 0..self.truth.len() {
                let is_own = container.gpu == gpu;
                let values = self.values(family, key, container, gpu);
                let shown = self.amount(family, gpu, Some(&values));
                let truth = if is_own { self.truth[gpu].seconds(container) * scale } else { 0.0 };
                if is_own || shown.is_some() {
                    users.push(UserPair { container, gpu, pair: Pair { shown, truth } });
                }
            }
        }
        users
    }

    /// Values of the label that names a user with which the container appears on a GPU.
    fn values(&self, family: &Family, key: &Key, container: &Container, gpu: usize) -> Vec<String> {
        let values = container.values(key.is);
        if !values.is_empty() || gpu != container.gpu {
            return values;
        }
        // Processes that came and went: all on the GPU that are not another container's.
        let of_gpu = self.gpu(family, gpu);
        let selector = Selector { family, gpu: &of_gpu, user: None };
        let samples = self.played().iter().flat_map(|page| &page.samples).filter(|sample| selector.has(sample));
        let mut values: Vec<String> = samples.filter_map(|sample| sample.labels.get(&key.label).cloned()).collect();
        values.sort_unstable();
        values.dedup();
        values.retain(|value| !self.containers.iter().any(|other| other.values(key.is).contains(value)));
        values
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

    /// A sample of a user is right if it has all labels of a container on its GPU, of the one that its key names if that is known.
    fn labels_wrong(&self) -> Option<f64> {
        let (family, labels) = (self.mapping.user.as_ref()?, &self.mapping.labels);
        let key = family.user.as_ref()?;
        let (mut wrong, mut all) = (0, 0);
        for gpu in 0..self.truth.len() {
            let of_gpu = self.gpu(family, gpu);
            let selector = Selector { family, gpu: &of_gpu, user: None };
            let has_all = |sample: &Sample, container: &Container| {
                let is_its = |(name, is): (&String, &Identity)| {
                    sample.labels.get(name).is_some_and(|value| container.values(*is).contains(value))
                };
                labels.iter().all(is_its)
            };
            for sample in self.played().iter().flat_map(|page| &page.samples).filter(|sample| selector.has(sample)) {
                let user = sample.labels.get(&key.label);
                let named =
                    self.containers.iter().find(|container| user.is_some_and(|user| container.values(key.is).contains(user)));
                let is_right = match named {
                    Some(container) => has_all(sample, container),
                    None => self.containers.iter().any(|container| container.gpu == gpu && has_all(sample, container)),
                };
                all += 1;
                wrong += usize::from(!is_right);
            }
        }
        if labels.is_empty() { None } else { ratio(wrong, all) }
    }

    fn device_energy(&self) -> Vec<Pair> {
        let (Some(family), [first, .., last]) = (&self.mapping.device_energy, self.played()) else { return Vec::new() };
        let seconds = last.at - first.at;
        let pair = |(gpu, truth): (usize, &GpuTruth)| Pair {
            shown: self.amount(family, gpu, None),
            truth: IDLE_WATTS * seconds + (BUSY_WATTS - IDLE_WATTS) * truth.busy,
        };
        self.truth.iter().enumerate().map(pair).collect()
    }
}

fn share_error(users: &[UserPair<'_>]) -> Option<f64> {
    let mut worst: Option<f64> = None;
    for user in users.iter().filter(|user| user.is_own()) {
        let on_gpu = || users.iter().filter(|other| other.is_own() && other.gpu == user.gpu).map(|other| other.pair);
        let (shown, truth) = on_gpu().fold((0.0, 0.0), |(shown, truth), pair| (shown + pair.shown(), truth + pair.truth));
        if on_gpu().count() > 1 && truth > 0.0 && shown > 0.0 {
            let error = (user.pair.shown() / shown - user.pair.truth / truth).abs();
            worst = Some(worst.unwrap_or(0.0).max(error));
        }
    }
    worst
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
        observed.score("w", Cost::default()).unwrap()
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
        assert_eq!(score.absent, Some(0.0));
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
        assert_eq!(score.short_excess, None);
        near(score.absent, 0.5);
        for blank in ["namespace=\"accuracy\"", "pod=\"trainer\"", "pod=\"notebook\""] {
            let name = blank.split_once('=').unwrap().0;
            let blank = |at: usize| exact(at).replace(blank, &format!("{name}=\"\""));
            assert!(self::score(blank).labels_wrong.is_some_and(|wrong| wrong > 0.3));
        }
        let everywhere = |at: usize| format!("{}{}", exact(at), user("trainer", 1, 0.6 * at as f64));
        near(self::score(everywhere).user_error, 6.0 / 9.0);
    }

    #[test]
    fn what_is_not_shown_has_no_score() {
        let empty = score(|_| String::new());
        assert_eq!((empty.failed_scrapes, empty.page_bytes, empty.device_error), (11, None, None));
        let others = score(|_| "up 1\n".to_owned());
        assert_eq!((others.user_error, others.share_error, others.short_lost, others.short_excess), (None, None, None, None));
        assert_eq!((others.false_zeros, others.absent, others.labels_wrong), (None, Some(1.0), None));
    }
}
