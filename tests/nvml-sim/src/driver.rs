//! The driver's state at one moment: its sample buffers, its faults, the processes with memory on a GPU. Plain data, no C.
//!
//! [`crate::answers`] and [`crate::processes`] derive the results of calls from it.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};

use crate::clock::GpuClock;
use crate::faults::{Effect, Held};
use crate::follow::Follower;
use crate::kernel_files;
use crate::loads;
use crate::model::{DriverSample, ENGINES, Engine, Model};
use crate::tally::Tally;
use crate::world::{Unit, World};

/// The driver's own part of every GPU's memory.
pub const RESERVED_BYTES: u64 = 300 << 20;

/// Distance between the pids of two kernels, in a world with foreign pids: no pid of Linux is as large.
const FOREIGN_PIDS: u32 = 5_000_000;

/// Interval of checks for ended processes in the log.
const CHECK_EVERY_US: u64 = 1_000_000;

pub struct Driver {
    pub world: World,
    pub(crate) dir: PathBuf,
    pub(crate) log: Follower,
    clocks: Vec<GpuClock>,
    pub(crate) rings: Vec<VecDeque<DriverSample>>,
    pub(crate) tallies: BTreeMap<Unit, Tally>,
    checked_us: u64,
    /// Replaces the time, for tests.
    #[cfg(test)]
    pub(crate) fixed_us: Option<u64>,
}

impl Driver {
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        let world = World::read(dir)?;
        let rings = vec![VecDeque::new(); world.gpus.len()];
        let clocks = (0..world.gpus.len()).map(|gpu| GpuClock::new(&world, gpu)).collect::<anyhow::Result<_>>()?;
        let log = Follower::new(dir, &world)?;
        let counted = world.units().into_iter().filter(|u| *world.energy(u.gpu) || *world.accounting(u.gpu));
        let tallies = counted.map(|u| (u, Tally::from(world.begun_us))).collect();
        let dir = dir.to_owned();
        #[cfg(test)]
        return Ok(Self { world, dir, log, clocks, rings, tallies, checked_us: 0, fixed_us: None });
        #[cfg(not(test))]
        Ok(Self { world, dir, log, clocks, rings, tallies, checked_us: 0 })
    }

    #[cfg(test)]
    pub fn now(&self) -> u64 {
        self.fixed_us.unwrap_or_else(loads::now_us)
    }

    #[cfg(test)]
    pub fn never_check_for_ended_processes(&mut self) {
        self.checked_us = u64::MAX;
    }

    #[cfg(not(test))]
    pub fn now(&self) -> u64 {
        loads::now_us()
    }

    /// The pid by which the driver names the process.
    pub fn shown(&self, pid: u32) -> u32 {
        let other = if self.world.foreign_pids { pid.saturating_add(FOREIGN_PIDS) } else { pid };
        self.log.loads.shown(pid).unwrap_or(other)
    }

    /// Reads the log. Returns the time taken before that; only samples older than both are served.
    pub fn read_log(&mut self) -> anyhow::Result<u64> {
        let now = self.now();
        self.log.read()?;
        Ok(now)
    }

    /// Reads the log and closes loads of ended processes, every second. Returns the time up to which samples are served.
    pub(crate) fn settle(&mut self) -> anyhow::Result<u64> {
        let now = self.read_log()?;
        let served = now.saturating_sub(self.world.delay_us);
        if now.saturating_sub(self.checked_us) > CHECK_EVERY_US {
            self.checked_us = now;
            if loads::close_dead(&self.dir, self.log.loads.iter())? > 0 {
                self.log.read()?;
            }
            for unit in self.tallies.keys().copied().collect::<Vec<_>>() {
                self.tally(unit, served);
            }
            self.forget(served);
        }
        Ok(served)
    }

    pub(crate) fn model(&self, unit: Unit) -> Model<'_> {
        Model { world: &self.world, unit, loads: self.log.loads.of(unit), faults: &self.log.faults }
    }

    /// Advances the GPU's sample buffer to the current time. Returns the time up to which samples are served.
    pub(crate) fn sync(&mut self, gpu: usize) -> anyhow::Result<u64> {
        let served = self.settle()?;
        let from = self.recorded_us(gpu, served);
        let (depth, oldest) = (*self.world.ring(gpu), self.oldest_us(gpu, served));
        let unit = gpu.into();
        let model = Model { world: &self.world, unit, loads: self.log.loads.of(unit), faults: &self.log.faults };
        let Some(ring) = self.rings.get_mut(gpu) else { return Ok(served) };
        for span in model.grid(from, served) {
            ring.push_back(model.sample(span));
            if ring.len() > depth {
                ring.pop_front();
            }
        }
        while ring.front().is_some_and(|t| t.at_us <= oldest) {
            ring.pop_front();
        }
        Ok(served)
    }

    /// The sample buffer contains nothing older than this.
    fn oldest_us(&self, gpu: usize, served_us: u64) -> u64 {
        let ring_us = self.world.period_us(gpu) * *self.world.ring(gpu) as u64;
        let faults = &self.log.faults;
        let (reaches, begins) = (faults.reaches_back(gpu, served_us, ring_us), faults.ring_begins(gpu, served_us));
        reaches.max(begins).max(self.world.begun_us)
    }

    /// Up to this time every sample is in the sample buffer or too old for it.
    fn recorded_us(&self, gpu: usize, served_us: u64) -> u64 {
        let oldest = self.oldest_us(gpu, served_us);
        self.rings.get(gpu).and_then(|ring| ring.back()).map_or(oldest, |sample| sample.at_us.max(oldest))
    }

    /// Drops loads that can be in no sample or sum that is still to be computed.
    fn forget(&mut self, served_us: u64) {
        for unit in self.world.units() {
            let until = match unit.mig {
                // Only its last period is read; it has no sample buffer.
                Some(_) => self.model(unit).needless_until(served_us),
                None => self.model(unit).needless_until(self.recorded_us(unit.gpu, served_us)),
            };
            let until = self.tallies.get(&unit).map_or(until, |tally| until.min(tally.upto_us));
            self.log.loads.forget(unit, until);
        }
    }

    /// The effect of faults on a call now.
    pub fn effect(&mut self, call: &str, gpu: Option<usize>) -> anyhow::Result<Effect> {
        let now = self.read_log()?;
        Ok(self.log.faults.effect(call, gpu, now))
    }

    /// The GPUs that exist, in the order of NVML's indices.
    pub fn present(&mut self) -> anyhow::Result<Vec<usize>> {
        let now = self.read_log()?;
        let exists = |gpu: &usize| !self.log.faults.absent(*gpu, now) && kernel_files::is_listed(&self.world, &self.dir, *gpu);
        Ok((0..self.world.gpus.len()).filter(exists).collect())
    }

    /// The stamp of the GPU's clock for a time of the model.
    pub fn stamp(&self, gpu: usize, at_us: u64) -> u64 {
        self.clocks.get(gpu).map_or(at_us, |clock| clock.stamp(at_us))
    }

    pub fn latest(&mut self, gpu: usize) -> anyhow::Result<Option<DriverSample>> {
        self.sync(gpu)?;
        Ok(self.rings.get(gpu).and_then(|r| r.back()).copied())
    }

    /// The utilization that a sample shows: the one that was measured, unless the counter is latched.
    pub fn shown_util(&self, gpu: usize, sample: &DriverSample) -> [u32; ENGINES] {
        let mut util = sample.util;
        if self.log.faults.latched(gpu, sample.at_us) {
            util[Engine::Sm as usize] = 100;
        }
        util
    }

    /// Busy share now, 0 to 1; in MIG mode that of its devices, each weighted by its slices.
    pub fn busy(&mut self, gpu: usize) -> anyhow::Result<f64> {
        if self.world.gpus.get(gpu).is_none_or(|g| g.mig.is_empty()) {
            return Ok(self.latest(gpu)?.map_or(0.0, |t| f64::from(t.util[0]) / 100.0));
        }
        let served = self.settle()?;
        let from = served.saturating_sub(*self.world.period_us(gpu));
        let share = |unit: Unit| {
            let seconds: f64 = self.model(unit).truth(from, served).iter().map(|s| s.seconds[0]).sum();
            seconds * 1e6 / (served - from).max(1) as f64 * self.part(unit)
        };
        Ok(self.world.units().into_iter().filter(|u| u.gpu == gpu && u.mig.is_some()).map(share).sum())
    }

    /// Limits of the throttles in force on power, the SM clock and temperature.
    pub fn held(&self, gpu: usize) -> Held {
        self.log.faults.held(gpu, self.now())
    }

    /// Bits of nvmlClocksEventReasons.
    pub fn reasons(&mut self, gpu: usize) -> anyhow::Result<u64> {
        let idle = self.busy(gpu)? == 0.0;
        let now = self.now();
        Ok(self.log.faults.reasons(gpu, now) | u64::from(idle))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answers::RingKind;
    use crate::processes::{List, NO_INSTANCE, Process};

    /// A world that began long ago, and its log; loads begin and end before now.
    fn driver(toml: &str, loads: &[(u64, Option<u64>)]) -> (tempfile::TempDir, Driver) {
        let dir = tempfile::tempdir().unwrap();
        let own = devkit::process::start_time(std::process::id()).unwrap();
        let mut text = String::new();
        for (n, (begin_us, end_us)) in loads.iter().enumerate() {
            let (pid, id) = (std::process::id(), n as u64);
            text += &format!(
                "{{\"begin\":{{\"id\":{id},\"pid\":{pid},\"start_time\":{own},\"gpu\":{},\"demand\":0.4,\"memory_bytes\":5,\
                 \"begin_us\":{begin_us}}}}}\n",
                n % 2
            );
            text += &end_us.map_or_else(String::new, |end_us| format!("{{\"end\":{id},\"end_us\":{end_us}}}\n"));
        }
        std::fs::write(dir.path().join(loads::FILE), text).unwrap();
        std::fs::write(dir.path().join(crate::world::FILE), format!("begun_us = 1\n{toml}[[gpus]]\n[[gpus]]\n")).unwrap();
        let driver = Driver::open(dir.path()).unwrap();
        (dir, driver)
    }

    #[test]
    fn samples_are_served_once_they_are_as_old_as_the_delay() {
        for delay_us in [20_000, 3_000_000] {
            let (_dir, mut driver) = driver(&format!("delay_us = {delay_us}\nring = 9\n"), &[]);
            let before = loads::now_us();
            let newest = driver.latest(0).unwrap().unwrap().at_us;
            let age = (before.saturating_sub(newest), loads::now_us() - newest);
            let period = driver.world.period_us;
            assert!(age.1 >= delay_us && age.0 <= delay_us + period, "{age:?} for {delay_us}");
            assert_eq!(driver.samples(0, RingKind::Utilization(0), 0).unwrap().len(), 9);
        }
    }

    #[test]
    fn samples_stay_blank_after_their_loads_are_forgotten_and_their_pid_is_reused() {
        let now = loads::now_us();
        let ended = (now - 30_000_000, Some(now - 3_000_000));
        for (key, expect) in [("kept", true), ("blank", false)] {
            let key = format!("exited_pids = '{key}'\npid_rule = 'last'\n");
            let (_dir, mut driver) = driver(&key, &[ended, ended, (now - 1_000, None)]);
            for kept in [2, 1] {
                assert_eq!(!driver.process_samples(0, 0).unwrap().is_empty(), expect, "{key}");
                assert!(driver.rings[0].iter().any(|sample| sample.pid[0].is_some()));
                driver.sync(1).unwrap();
                assert!(driver.log.loads.of(0.into()).len() <= kept);
                driver.checked_us = 0;
            }
        }
    }

    #[test]
    fn forgotten_loads_are_in_no_sample_and_no_list() {
        let now = loads::now_us();
        // One load every 10 ms of the last minute, 30 to 330 ms long; two of them do not end.
        let ends = |n: u64, begin: u64| (n < 5_998).then_some(begin + 30_000 + n % 11 * 30_000);
        let loads: Vec<_> =
            (0..6_000).map(|n| (now - 61_000_000 + n * 10_000, n)).map(|(begin, n)| (begin, ends(n, begin))).collect();
        let (dir, mut driver) = driver("", &loads);
        let mut all = Follower::new(dir.path(), &driver.world).unwrap();
        all.read().unwrap();
        for _ in 0..2 {
            for gpu in 0..2 {
                driver.sync(gpu).unwrap();
                let samples: Vec<DriverSample> = driver.rings[gpu].iter().copied().collect();
                let model =
                    Model { world: &driver.world, unit: gpu.into(), loads: all.loads.of(gpu.into()), faults: &all.faults };
                assert_eq!(samples.len(), 72);
                let spans: Vec<_> = model.grid(samples[0].at_us - 1, samples[71].at_us).collect();
                assert!(samples.iter().zip(spans).all(|(sample, span)| *sample == model.sample(span)));
                let process = Process { pid: std::process::id(), bytes: 5, gi: NO_INSTANCE, ci: NO_INSTANCE };
                assert_eq!(driver.processes(gpu.into(), List::Compute).unwrap(), [process]);
            }
            // By the second round the first GPU's buffer is full; for the other one, what its buffer may need was kept, too.
            let kept = driver.log.loads.iter().count();
            assert!((2..3_000).contains(&kept), "{kept}");
            driver.checked_us = 0;
        }
        assert_eq!(driver.log.loads.iter().count(), 2);
    }
}
