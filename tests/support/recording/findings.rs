//! Derives statements about the driver from raw responses, each next to the agent's assumption.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::{Fold, Raw, RecordedGpu, RecordedProcess, RecordedSample, quantile as at, truth};

/// One line of the table: the subject, the agent's assumption, the observation, and whether both agree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    pub about: String,
    pub assumed: String,
    pub seen: String,
    /// `None` where too little was observed.
    pub agrees: Option<bool>,
}

/// A sample and its process sample on the compute engine, if there is one.
struct PairedSample {
    sample: RecordedSample,
    process: Option<RecordedProcess>,
}

/// Fewer samples than this give no finding.
const ENOUGH: f64 = 10.0;
/// A sample buffer without a new sample for this long is dry.
pub const DRY_US: u64 = 1_500_000;

pub fn of(gpu: &RecordedGpu, all: &Raw) -> Vec<Finding> {
    let mut samples: Vec<RecordedSample> = all.samples().collect();
    samples.sort_by_key(|s| s.0);
    samples.dedup_by_key(|s| s.0);
    if samples.is_empty() {
        return [idle(all, &samples), process_list(gpu)].into_iter().chain(layouts(gpu)).collect();
    }
    let gaps = sorted(samples.windows(2).map(|pair| pair[1].0 - pair[0].0).collect());
    let paired = pair(&samples, all, at(&gaps, 0.5));
    let mut all_of_them = vec![
        grid(&gaps),
        pid_rule(&paired, all),
        measured_rule(gpu),
        utilization(&paired),
        stamps(&samples, all),
        folding(&samples, all),
        order(all),
        idle(all, &samples),
        clock(gpu, all),
        age(gpu, all),
        garbage(&samples, all),
        ended(gpu),
        again(gpu),
        process_list(gpu),
        costs(gpu),
    ];
    all_of_them.extend(layouts(gpu));
    all_of_them
}

/// The samples in the form in which they are compared with the loads' own time slices.
pub fn true_samples(all: &Raw) -> Vec<truth::TrueSample> {
    let mut samples: Vec<RecordedSample> = all.samples().collect();
    samples.sort_by_key(|s| s.0);
    samples.dedup_by_key(|s| s.0);
    let gaps = sorted(samples.windows(2).map(|pair| pair[1].0 - pair[0].0).collect());
    let true_sample = |(before, paired): (&RecordedSample, &PairedSample)| truth::TrueSample {
        stamp_ns: paired.sample.0 as i64 * 1_000,
        gap_ns: (paired.sample.0 - before.0) as i64 * 1_000,
        busy: f64::from(paired.sample.1) / 100.0,
        pid: paired.process.map(|process| process.1),
    };
    let paired = pair(&samples, all, at(&gaps, 0.5));
    let before =
        |paired: &PairedSample| samples.partition_point(|s| s.0 < paired.sample.0).checked_sub(1).and_then(|n| samples.get(n));
    paired.iter().filter_map(|paired| Some(true_sample((before(paired)?, paired)))).collect()
}

fn finding(about: &str, assumed: &str, seen: String, agrees: Option<bool>) -> Finding {
    Finding { about: about.into(), assumed: assumed.into(), seen, agrees }
}

fn sorted<T: Ord>(mut all: Vec<T>) -> Vec<T> {
    all.sort_unstable();
    all
}

fn ms(us: u64) -> f64 {
    us as f64 / 1e3
}

/// Pairs samples with process samples, except the last few: their process samples may not have been served yet.
fn pair(samples: &[RecordedSample], all: &Raw, period: u64) -> Vec<PairedSample> {
    let processes: Vec<RecordedProcess> = all.process_samples().filter(|p| p.2[0] > 0 && p.2[0] <= 100).collect();
    let settled = &samples[..samples.len().saturating_sub(3)];
    let near = |sample: &RecordedSample| processes.iter().find(|p| p.0.abs_diff(sample.0) * 2 < period.max(1)).copied();
    settled.iter().filter(|s| s.1 <= 100).map(|sample| PairedSample { sample: *sample, process: near(sample) }).collect()
}

fn grid(gaps: &[u64]) -> Finding {
    let (median, low, high) = (at(gaps, 0.5), at(gaps, 0.05), at(gaps, 0.95));
    let seen = format!("median {:.1} ms, 5 % to 95 % {:.1} to {:.1} ms, {} gaps", ms(median), ms(low), ms(high), gaps.len());
    // The agent learns the period; only a value outside the range of the poll interval disagrees.
    finding("grid", "learned; about 167 ms", seen, (gaps.len() as f64 > ENOUGH).then_some((20_000..=2_000_000).contains(&median)))
}

/// Under the instant's rule a sample of 40 % names no process in 60 % of the cases; under the period's rule never. Samples of the first
/// read, from before the recording, may be of processes that had ended, which a driver need not name.
fn pid_rule(samples: &[PairedSample], all: &Raw) -> Finding {
    let before = all.polls.first().and_then(|poll| poll.2.iter().map(|s| s.0).max());
    // Where a late poll got several samples, the driver made one process sample of each process over all of them.
    let alone: HashSet<u64> = all.polls.iter().filter(|poll| poll.2.len() == 1).map(|poll| poll.2[0].0).collect();
    let is_judged = |t: &&PairedSample| {
        (1..100).contains(&t.sample.1) && alone.contains(&t.sample.0) && before.is_none_or(|before| t.sample.0 > before)
    };
    let partly: Vec<&PairedSample> = samples.iter().filter(is_judged).collect();
    let idle = |t: &&PairedSample| 1.0 - f64::from(t.sample.1) / 100.0;
    let expected: f64 = partly.iter().map(idle).sum();
    let sigma = partly.iter().map(idle).map(|p| p * (1.0 - p)).sum::<f64>().sqrt();
    let nameless = partly.iter().filter(|t| t.process.is_none()).count() as f64;
    let rule = if expected < ENOUGH {
        "too few partly busy samples"
    } else if nameless < 0.05 * expected {
        "the last process of the period"
    } else if (nameless - expected).abs() <= 3.0 * sigma + 0.1 * expected {
        "the process at the instant"
    } else {
        "neither"
    };
    let seen = format!(
        "{rule}: of {} partly busy samples {nameless} name no process; expected by the instant's rule {:.0}, by the period's 0",
        partly.len(),
        expected.abs()
    );
    finding("pid rule", "either rule", seen, (expected >= ENOUGH).then_some(rule != "neither"))
}

/// The loads' kernels record, by the GPU's timer, when they ran. The agent is right under the first two rules.
fn measured_rule(gpu: &RecordedGpu) -> Finding {
    let (about, assumed) = ("pid rule, by the loads' own clock", "at the instant, or the last of the period");
    let Some(rules) = gpu.rules else {
        return finding(about, assumed, gpu.no_rules.clone().unwrap_or_else(|| truth::Unknown::NoLoads.to_string()), None);
    };
    let part = |n: usize| n as f64 / rules.samples.max(1) as f64 * 100.0;
    let seen = format!(
        "{:.0} % at the instant, {:.0} % last of the period, {:.0} % last ever, of {} samples; stamps {:+.0} ms from the GPU's timer, \
         utilization {:.1} points off",
        part(rules.instant),
        part(rules.period),
        part(rules.resident),
        rules.samples,
        -rules.shift_ns as f64 / 1e6,
        rules.mean_error * 100.0
    );
    let best = rules.instant.max(rules.period);
    let enough = rules.samples >= 30;
    finding(about, assumed, seen, enough.then_some(best * 10 >= rules.samples * 9))
}

fn ended(gpu: &RecordedGpu) -> Finding {
    let (samples, dead) = gpu.ended;
    let seen = format!("{dead} of {samples} process samples were returned after their process had ended");
    finding("samples of ended processes", "returned; exits are kept for 40 s", seen, None)
}

fn again(gpu: &RecordedGpu) -> Finding {
    let [(samples, again), (processes, processes_again)] = gpu.again;
    let seen = format!(
        "{again} of {samples} responses with samples and {processes_again} of {processes} with process samples contained that stamp again"
    );
    let agrees = (samples + processes > 0).then_some(again + processes_again == 0);
    finding("lastSeen", "returns newer samples, excluding that stamp itself", seen, agrees)
}

/// The calls that a poll makes; the table below has all calls.
fn costs(gpu: &RecordedGpu) -> Finding {
    let p50 = |call: &str| gpu.costs.get(call).map_or((0.0, 0.0), |cost| (cost.idle.p50_us, cost.loaded.p50_us));
    let ((idle, loaded), (process_idle, process_loaded)) = (p50("GetSamples"), p50("GetProcessUtilization"));
    let seen = format!("idle {idle:.0} + {process_idle:.0} us, loaded {loaded:.0} + {process_loaded:.0} us, 50 %");
    finding("a poll: samples and process samples", "any; the budget decides", seen, None)
}

fn layouts(gpu: &RecordedGpu) -> Vec<Finding> {
    let layout = |(call, stride): (&String, &super::stride::Stride)| {
        let length = stride.length.map_or_else(|| "no known length".to_owned(), |length| format!("{length} bytes"));
        let (live, entries) = (stride.pids_live, stride.entries);
        let seen = format!("{length}; {live} of {entries} entries have the pid of a living process");
        let about = format!("an entry of {}", call.trim_start_matches("nvmlDevice"));
        finding(&about, &format!("{} bytes", stride.assumed), seen, stride.agrees())
    };
    gpu.strides.iter().map(layout).collect()
}

fn utilization(samples: &[PairedSample]) -> Finding {
    let named: Vec<(u32, u32)> = samples.iter().filter_map(|t| Some((t.sample.1, t.process?.2[0]))).collect();
    let same = named.iter().filter(|(device, process)| device.abs_diff(*process) <= 1).count();
    let seen = format!("{same} of {} process samples have the device's percentage", named.len());
    let enough = named.len() as f64 >= ENOUGH;
    let agrees = enough.then_some(same * 10 >= named.len() * 9);
    finding("utilization of a process sample", "the whole period's, of all processes", seen, agrees)
}

fn stamps(samples: &[RecordedSample], all: &Raw) -> Finding {
    let processes: Vec<RecordedProcess> = all.process_samples().filter(|p| p.2[0] <= 100).collect();
    let distance = |process: &RecordedProcess| {
        let next = samples.partition_point(|s| s.0 < process.0);
        let near = |n: usize| samples.get(n).map(|s| s.0.abs_diff(process.0));
        near(next).into_iter().chain(next.checked_sub(1).and_then(near)).min()
    };
    let distances = sorted(processes.iter().filter_map(distance).collect::<Vec<u64>>());
    let equal = distances.iter().filter(|d| **d == 0).count();
    let seen = format!(
        "{equal} of {} process samples have a sample's stamp; distance 50 %, 95 %: {:.1}, {:.1} ms",
        distances.len(),
        ms(at(&distances, 0.5)),
        ms(at(&distances, 0.95))
    );
    let enough = distances.len() as f64 >= ENOUGH;
    let agrees = enough.then_some(at(&distances, 0.95) < 83_000);
    finding("stamp of a process sample", "within half a period of its sample's", seen, agrees)
}

/// The driver's way of folding several samples into one number.
fn folding(samples: &[RecordedSample], all: &Raw) -> Finding {
    let (mut folded, mut average, mut newest, mut whole): (u64, u64, u64, u64) = (0, 0, 0, 0);
    let single: Vec<RecordedProcess> = all.process_samples().filter(|p| p.2[0] <= 100).collect();
    for Fold(after, until, response) in &all.folds {
        let periods = samples.iter().filter(|s| s.0 > *after && s.0 <= *until).count() as f64;
        for RecordedProcess(stamp, pid, percent) in response.iter().filter(|p| p.2[0] <= 100) {
            let mine: Vec<f64> =
                single.iter().filter(|r| r.1 == *pid && r.0 > *after && r.0 <= *stamp).map(|r| f64::from(r.2[0])).collect();
            // With one sample, all ways are the same.
            if mine.len() < 2 || mine.iter().all(|one| *one == mine[0]) {
                continue;
            }
            let sum: f64 = mine.iter().sum();
            let equals = |value: f64| (value - f64::from(percent[0])).abs() <= 1.0;
            folded += 1;
            average += u64::from(equals(sum / mine.len() as f64));
            newest += u64::from(equals(mine[mine.len() - 1]));
            whole += u64::from(equals(sum / periods));
        }
    }
    let seen = format!(
        "of {folded} process samples over several samples {average} are their average, {newest} the newest, {whole} the average over all \
         samples"
    );
    let agrees = (folded >= 5).then_some(average.max(whole) * 10 >= folded * 9);
    finding("folding", "the average of the samples that name the pid, or over all", seen, agrees)
}

fn order(all: &Raw) -> Finding {
    let several: Vec<&Vec<RecordedProcess>> = all.folds.iter().map(|fold| &fold.2).filter(|all| all.len() > 1).collect();
    let ordered = several.iter().filter(|all| all.is_sorted_by_key(|p| p.0)).count();
    let seen = format!("{ordered} of {} responses with several process samples are in the order of time", several.len());
    finding("order of process samples", "none", seen, None)
}

fn idle(all: &Raw, samples: &[RecordedSample]) -> Finding {
    let zeros = samples.iter().filter(|s| s.1 == 0).count();
    let fed: Vec<u64> = all.polls.iter().filter(|poll| !poll.2.is_empty()).map(|poll| poll.0).collect();
    let end = all.polls.last().map_or(0, |poll| poll.0);
    let begin = all.polls.first().map_or(0, |poll| poll.0);
    let times: Vec<u64> = [begin].into_iter().chain(fed).chain([end]).collect();
    let silence = times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default();
    let seen = match (silence > DRY_US, zeros) {
        (true, _) => format!("dry for up to {:.1} s, {zeros} samples of 0 %", silence as f64 / 1e6),
        (false, 0) => "no idle time was observed".to_owned(),
        (false, _) => format!("continues: {zeros} samples of 0 %, never silent for more than {:.0} ms", ms(silence)),
    };
    finding("sample buffer of an idle GPU", "samples of 0 %, or dry", seen, None)
}

/// The newest stamp of each poll that returned one, and that poll's end on the boot clock.
fn served(all: &Raw) -> Vec<(u64, u64)> {
    let first = |poll: &super::Poll| Some((poll.2.iter().map(|s| s.0).max()?, all.from_boot_us + poll.0 + poll.1));
    // The first read returns samples from before it.
    all.polls.iter().skip(1).filter_map(first).collect()
}

fn clock(gpu: &RecordedGpu, all: &Raw) -> Finding {
    let (wall, end) = gpu.wall_less_boot_us;
    let served = served(all);
    let Some((stamp, boot)) = served.first().copied() else {
        return finding("clock of the stamps", "its own", "no sample".into(), None);
    };
    const DAY: u64 = 86_400_000_000;
    let distance = |base: u64, clock: &str| {
        let ms = stamp as f64 / 1e3 - (boot + base) as f64 / 1e3;
        format!("{:.1} ms {} the {clock} clock when first served", ms.abs(), if ms < 0.0 { "before" } else { "after" })
    };
    let seen = if stamp.abs_diff(boot + wall) < DAY {
        format!("since the epoch, {}", distance(wall, "wall"))
    } else if stamp.abs_diff(boot) < DAY {
        format!("since boot, {}", distance(0, "boot"))
    } else {
        format!("neither since the epoch nor since boot: {stamp}")
    };
    let set = end as i64 - wall as i64;
    let seen = if set.abs() > 1_000 { format!("{seen}; the wall clock moved by {set} us meanwhile") } else { seen };
    finding("clock of the stamps", "its own", seen, None)
}

/// The clock's offset is unknown, so the finding is only how much the age varies.
fn age(gpu: &RecordedGpu, all: &Raw) -> Finding {
    let delays = sorted(served(all).iter().map(|(stamp, boot)| *boot as i64 - *stamp as i64).collect());
    let (Some(least), Some(most)) = (delays.first(), delays.last()) else {
        return finding("age of a sample when served", "up to a period", "no sample".into(), None);
    };
    let spread = |part: f64| (at(&delays, part) - least) as f64 / 1e3;
    let agreed = (least + gpu.wall_less_boot_us.0 as i64) as f64 / 1e3;
    let agreed = if agreed.abs() < 5_000.0 { format!("; {agreed:.1} ms if its clock is the wall clock") } else { String::new() };
    let seen = format!(
        "varies by {:.1} ms (95 % within {:.1}), including the poll interval{agreed}",
        (most - least) as f64 / 1e3,
        spread(0.95)
    );
    finding("age of a sample when served", "up to a period", seen, (delays.len() as f64 > ENOUGH).then_some(spread(0.95) < 200.0))
}

fn garbage(samples: &[RecordedSample], all: &Raw) -> Finding {
    let processes: Vec<RecordedProcess> = all.process_samples().collect();
    let above = processes.iter().filter(|p| p.2.iter().any(|p| *p > 100)).count() + samples.iter().filter(|s| s.1 > 100).count();
    let no_pid = processes.iter().filter(|p| p.1 == 0 || p.1 == u32::MAX).count();
    let (of_samples, of_processes) = (samples.len(), processes.len());
    let seen = format!("{above} above 100 %, {no_pid} with no pid, of {of_samples} samples and {of_processes} process samples");
    finding("invalid values", "counted and rejected", seen, None)
}

fn process_list(gpu: &RecordedGpu) -> Finding {
    let list = gpu.calls.get("GetComputeRunningProcesses").copied().unwrap_or_default();
    let (most, unknown) = gpu.listed;
    let seen = format!(
        "50 % {:.2} ms, most {:.2} ms, {most} processes at most, memory unknown of {unknown}",
        ms(list.p50_us),
        ms(list.max_us)
    );
    finding("the process list", "slow: about 4.5 ms", seen, None)
}
