//! The simulator's record of who was on which GPU, against what the agent credited.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{Running, Sample, Sim, sum, var};

/// Whoever is on the engine when a slice begins has all of it.
const SLICE_US: u64 = 2_000;

/// One tick that names a process and is busy, as the driver recorded it.
#[derive(Clone, Debug)]
pub struct NamedSample {
    pub gpu: usize,
    pub uuid: String,
    pub pid: u32,
    pub at_us: u64,
}

/// One process of `nvml-sim lives`.
#[derive(Clone, Debug)]
pub struct RecordedLife {
    pub pid: u32,
    pub cgroup: String,
    pub gpu: usize,
    pub begin_us: u64,
    pub end_us: u64,
    /// When it had been reaped.
    pub gone_us: u64,
}

/// Samples per (container id, GPU uuid).
pub type Samples = BTreeMap<(String, String), u64>;

/// What the agent says it credited.
pub fn credited(page: &[Sample]) -> Samples {
    let ours = page.iter().filter(|s| s.name == "container_gpu_samples_total" && s.value > 0.0);
    ours.map(|s| ((s.labels["container_id"].clone(), s.labels["uuid"].clone()), s.value as u64)).collect()
}

pub fn id_of(cgroup: &str) -> String {
    Path::new(cgroup).file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

impl Sim {
    /// Ticks that the driver turns into process rows.
    pub fn ticks(&self) -> Result<Vec<NamedSample>> {
        let all = self.truth(&["--samples"])?;
        let tick = |t: &Value| {
            let pid = t["pid"]["sm"].as_u64()? as u32;
            let busy = t["util"]["sm"].as_u64()? > 0;
            let uuid = t["uuid"].as_str()?.to_owned();
            busy.then_some(NamedSample { gpu: t["gpu"].as_u64()? as usize, uuid, pid, at_us: t["time_us"].as_u64()? })
        };
        Ok(all.as_array().context("an array of ticks")?.iter().filter_map(tick).collect())
    }

    /// `nvml-sim lives` in the background: many processes, each loaded from its first instant.
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
    /// Waits for the last of them.
    pub fn all(mut self) -> Result<Vec<RecordedLife>> {
        let mut stdout = Vec::new();
        let mut pipe = self.0.0.stdout.take().context("a pipe was asked for")?;
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

/// Whose tick it is: the life that was on that GPU within the period before it.
pub fn owner<'a>(lives: &'a [RecordedLife], tick: &NamedSample, period_us: u64) -> Option<&'a RecordedLife> {
    let within = |l: &&RecordedLife| l.begin_us <= tick.at_us && l.end_us + period_us + SLICE_US >= tick.at_us;
    lives.iter().filter(|l| l.pid == tick.pid && l.gpu == tick.gpu).filter(within).max_by_key(|l| l.begin_us)
}

/// What should be credited, when every tick names one of these lives.
pub fn expected(lives: &[RecordedLife], ticks: &[NamedSample], period_us: u64) -> Result<Samples> {
    let mut samples = Samples::new();
    for tick in ticks {
        let life = owner(lives, tick, period_us).with_context(|| format!("{tick:?} is of no recorded life"))?;
        *samples.entry((id_of(&life.cgroup), tick.uuid.clone())).or_default() += 1;
    }
    Ok(samples)
}

/// That each pair of container and GPU was credited what it should be: no sample too many, and as few less as a late poll left without a
/// query of their process.
pub fn assert_same(page: &[Sample], got: &Samples, want: &Samples) {
    let keys: std::collections::BTreeSet<_> = got.keys().chain(want.keys()).collect();
    let of = |samples: &Samples, key: &(String, String)| samples.get(key).copied().unwrap_or_default();
    let differ = |key: &&&(String, String)| of(got, key) != of(want, key);
    let wrong: Vec<_> = keys.iter().filter(differ).map(|key| (key, of(got, key), of(want, key))).collect();
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
