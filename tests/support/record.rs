//! The simulator's record of which process used which GPU, compared with what the agent credited.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{Running, Sample, Sim, sum, var};

/// A slice belongs entirely to the process that is on the engine at its begin.
const SLICE_US: u64 = 2_000;

/// A busy sample that names a process, as the driver recorded it.
#[derive(Clone, Debug)]
pub struct NamedSample {
    pub gpu: usize,
    pub uuid: String,
    pub pid: u32,
    pub at_us: u64,
    /// The same instant by the clock of the GPU, as the driver stamps it.
    pub stamp_us: u64,
}

/// One process of `nvml-sim lives`.
#[derive(Clone, Debug)]
pub struct RecordedLife {
    pub pid: u32,
    pub cgroup: String,
    pub gpu: usize,
    pub begin_us: u64,
    pub end_us: u64,
    /// When the process had been reaped.
    pub gone_us: u64,
}

/// Samples per (container id, GPU uuid).
pub type Samples = BTreeMap<(String, String), u64>;

/// Samples that the agent credited, from its metrics page.
pub fn credited(page: &[Sample]) -> Samples {
    let ours = page.iter().filter(|s| s.name == "container_gpu_samples_total" && s.value > 0.0);
    ours.map(|s| ((s.labels["container_id"].clone(), s.labels["uuid"].clone()), s.value as u64)).collect()
}

pub fn id_of(cgroup: &str) -> String {
    Path::new(cgroup).file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The utilization of a recorded sample in percent, with the mean of what the driver cuts from it.
pub fn busy_percent(sample: &Value) -> f64 {
    let percent = sample["util"]["sm"].as_f64().unwrap_or_default();
    percent + if (1.0..100.0).contains(&percent) { 0.5 } else { 0.0 }
}

impl Sim {
    /// Recorded samples from which the driver makes process samples.
    pub fn samples(&self) -> Result<Vec<NamedSample>> {
        let all = self.truth(&["--samples"])?;
        let named = |s: &Value| {
            let pid = s["pid"]["sm"].as_u64()? as u32;
            let busy = s["util"]["sm"].as_u64()? > 0;
            let uuid = s["uuid"].as_str()?.to_owned();
            let (at_us, stamp_us) = (s["time_us"].as_u64()?, s["gpu_time_us"].as_u64()?);
            busy.then_some(NamedSample { gpu: s["gpu"].as_u64()? as usize, uuid, pid, at_us, stamp_us })
        };
        Ok(all.as_array().context("an array of samples")?.iter().filter_map(named).collect())
    }

    /// `nvml-sim lives` in the background: many processes, each with a load from its first instant.
    pub fn lives(&self, cgroups: &[&Path], args: &[&str]) -> Result<Lives> {
        let mut command = Command::new(var("NVML_SIM_BIN")?);
        command.arg("lives").arg("--dir").arg(self.dir.path()).args(args);
        for cgroup in cgroups {
            command.arg("--cgroup").arg(cgroup);
        }
        let child = command.stdout(std::process::Stdio::piped()).spawn()?;
        Ok(Lives(Running(child)))
    }
}

pub struct Lives(Running);

impl Lives {
    /// Waits until all processes have ended.
    pub fn all(mut self) -> Result<Vec<RecordedLife>> {
        let mut stdout = Vec::new();
        let mut pipe = self.0.0.stdout.take().context("stdout is a pipe")?;
        std::io::Read::read_to_end(&mut pipe, &mut stdout)?;
        let output = Output { status: self.0.0.wait()?, stdout, stderr: Vec::new() };
        ensure!(output.status.success(), "nvml-sim lives failed");
        let life = |line: &str| {
            let v: Value = serde_json::from_str(line)?;
            let number = |key: &str| v[key].as_u64().with_context(|| format!("{key} in {line}"));
            let cgroup = v["cgroup"].as_str().context("cgroup")?.to_owned();
            let (pid, gpu) = (number("pid")? as u32, number("gpu")? as usize);
            Ok(RecordedLife {
                pid,
                cgroup,
                gpu,
                begin_us: number("begin_us")?,
                end_us: number("end_us")?,
                gone_us: number("gone_us")?,
            })
        };
        String::from_utf8(output.stdout)?.lines().map(life).collect()
    }
}

/// It writes its record when it is ended; one that is not read must not stop it.
impl Drop for Lives {
    fn drop(&mut self) {
        drop(self.0.0.stdout.take());
    }
}

/// The recorded lives by process and GPU.
pub struct RecordedProcesses {
    by_process: BTreeMap<(u32, usize), Vec<RecordedLife>>,
    period_us: u64,
}

impl RecordedProcesses {
    /// `period_us`: the longest one of a GPU.
    pub fn new(lives: &[RecordedLife], period_us: u64) -> Self {
        let mut by_process: BTreeMap<(u32, usize), Vec<RecordedLife>> = BTreeMap::new();
        for life in lives {
            by_process.entry((life.pid, life.gpu)).or_default().push(life.clone());
        }
        Self { by_process, period_us }
    }

    /// The process that a sample belongs to: the one that was on that GPU within the period before it.
    pub fn owner(&self, sample: &NamedSample) -> Option<&RecordedLife> {
        let within = |l: &&RecordedLife| l.begin_us <= sample.at_us && l.end_us + self.period_us + SLICE_US >= sample.at_us;
        self.by_process.get(&(sample.pid, sample.gpu))?.iter().filter(within).max_by_key(|l| l.begin_us)
    }
}

/// The samples to be credited, when each one names one of these processes.
pub fn expected(lives: &[RecordedLife], samples: &[NamedSample], period_us: u64) -> Result<Samples> {
    expected_by(lives, samples, period_us, id_of)
}

/// `user_of`: the user of a process, by its cgroup.
pub fn expected_by(
    lives: &[RecordedLife],
    samples: &[NamedSample],
    period_us: u64,
    user_of: impl Fn(&str) -> String,
) -> Result<Samples> {
    let (processes, mut counts) = (RecordedProcesses::new(lives, period_us), Samples::new());
    for sample in samples {
        let life = processes.owner(sample).with_context(|| format!("no recorded process for {sample:?}"))?;
        *counts.entry((user_of(&life.cgroup), sample.uuid.clone())).or_default() += 1;
    }
    Ok(counts)
}

/// Asserts that each pair of container and GPU was credited the expected samples: none too many, and at most as many missing as a late
/// poll left without a query of their process.
pub fn assert_same(page: &[Sample], got: &Samples, want: &Samples) {
    let keys: std::collections::BTreeSet<_> = got.keys().chain(want.keys()).collect();
    let count = |samples: &Samples, key: &(String, String)| samples.get(key).copied().unwrap_or_default();
    let differ = |key: &&&(String, String)| count(got, key) != count(want, key);
    let wrong: Vec<_> = keys.iter().filter(differ).map(|key| (key, count(got, key), count(want, key))).collect();
    let (too_many, missing) =
        (wrong.iter().any(|(_, got, want)| got > want), wrong.iter().map(|(_, got, want)| want.saturating_sub(*got)));
    let total = |name: &str| sum(page, name, &[]).unwrap_or_default() as u64;
    let unqueried = total("gpu_sampler_samples_total") - total("gpu_sampler_queried_samples_total");
    let missing: u64 = missing.sum();
    let few = want.values().sum::<u64>() / 200 + 2;
    assert!(
        !too_many && missing <= unqueried && missing <= few,
        "(container, GPU), credited, recorded: {wrong:?}; {unqueried} samples had no query"
    );
}
