//! What the driver knows at one moment: its sample rings, its faults, the processes with memory on a GPU. Plain data, no C.
//!
//! [`crate::answers`] and [`crate::processes`] make of it what calls are told.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};

use crate::clock::GpuClock;
use crate::faults::{Effect, Held};
use crate::follow::Follower;
use crate::loads;
use crate::model::{Model, Tick};
use crate::tally::Tally;
use crate::world::{Unit, World};

/// What the driver itself holds of every GPU's memory.
pub const RESERVED_BYTES: u64 = 300 << 20;

/// Distance between the pids of two kernels, for a world of which the driver's kernel is another: no pid of Linux is as large.
const FOREIGN_PIDS: u32 = 5_000_000;

/// How often the log's dead are looked for.
const LOOK_EVERY_US: u64 = 1_000_000;

pub struct Driver {
    pub world: World,
    dir: PathBuf,
    pub(crate) log: Follower,
    clocks: Vec<GpuClock>,
    pub(crate) rings: Vec<VecDeque<Tick>>,
    pub(crate) tallies: BTreeMap<Unit, Tally>,
    looked_us: u64,
    /// Instead of the time, for tests.
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
        return Ok(Self { world, dir, log, clocks, rings, tallies, looked_us: 0, fixed_us: None });
        #[cfg(not(test))]
        Ok(Self { world, dir, log, clocks, rings, tallies, looked_us: 0 })
    }

    #[cfg(test)]
    pub fn now(&self) -> u64 {
        self.fixed_us.unwrap_or_else(loads::now_us)
    }

    #[cfg(test)]
    pub fn never_look_for_the_dead(&mut self) {
        self.looked_us = u64::MAX;
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

    /// Takes in the log; the time that was taken before: what is served is older than both.
    pub fn look(&mut self) -> anyhow::Result<u64> {
        let now = self.now();
        self.log.read()?;
        Ok(now)
    }

    /// Also notices the dead, every second; up to when samples are served.
    pub(crate) fn settle(&mut self) -> anyhow::Result<u64> {
        let now = self.look()?;
        let served = now.saturating_sub(self.world.delay_us);
        if now.saturating_sub(self.looked_us) > LOOK_EVERY_US {
            self.looked_us = now;
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

    /// Takes in the log and the time.
    pub(crate) fn sync(&mut self, gpu: usize) -> anyhow::Result<u64> {
        let served = self.settle()?;
        let from = self.recorded_us(gpu, served);
        let (depth, oldest) = (*self.world.ring(gpu), self.oldest_us(gpu, served));
        let unit = gpu.into();
        let model = Model { world: &self.world, unit, loads: self.log.loads.of(unit), faults: &self.log.faults };
        let Some(ring) = self.rings.get_mut(gpu) else { return Ok(served) };
        for span in model.grid(from, served) {
            ring.push_back(model.tick(span));
            if ring.len() > depth {
                ring.pop_front();
            }
        }
        while ring.front().is_some_and(|t| t.at_us <= oldest) {
            ring.pop_front();
        }
        Ok(served)
    }

    /// The ring holds what is newer.
    fn oldest_us(&self, gpu: usize, served_us: u64) -> u64 {
        let ring_us = self.world.period_us(gpu) * *self.world.ring(gpu) as u64;
        let faults = &self.log.faults;
        let (reaches, begins) = (faults.reaches_back(gpu, served_us, ring_us), faults.ring_begins(gpu, served_us));
        reaches.max(begins).max(self.world.begun_us)
    }

    /// Up to here every tick is in the ring or too old for it.
    fn recorded_us(&self, gpu: usize, served_us: u64) -> u64 {
        let oldest = self.oldest_us(gpu, served_us);
        self.rings.get(gpu).and_then(|ring| ring.back()).map_or(oldest, |tick| tick.at_us.max(oldest))
    }

    /// Drops the loads that can be in no tick or sum that is still to be made.
    fn forget(&mut self, served_us: u64) {
        for unit in self.world.units() {
            let until = match unit.mig {
                // Its last period is looked at, no ring is kept.
                Some(_) => self.model(unit).needless_until(served_us),
                None => self.model(unit).needless_until(self.recorded_us(unit.gpu, served_us)),
            };
            let until = self.tallies.get(&unit).map_or(until, |tally| until.min(tally.upto_us));
            self.log.loads.forget(unit, until);
        }
    }

    /// What a call meets now.
    pub fn effect(&mut self, call: &str, gpu: Option<usize>) -> anyhow::Result<Effect> {
        let now = self.look()?;
        Ok(self.log.faults.effect(call, gpu, now))
    }

    /// The GPUs that are there, by which NVML numbers them.
    pub fn present(&mut self) -> anyhow::Result<Vec<usize>> {
        let now = self.look()?;
        Ok((0..self.world.gpus.len()).filter(|gpu| !self.log.faults.absent(*gpu, now)).collect())
    }

    /// What the GPU's clock says at a time of the model.
    pub fn stamp(&self, gpu: usize, at_us: u64) -> u64 {
        self.clocks.get(gpu).map_or(at_us, |clock| clock.stamp(at_us))
    }

    pub fn latest(&mut self, gpu: usize) -> anyhow::Result<Option<Tick>> {
        self.sync(gpu)?;
        Ok(self.rings.get(gpu).and_then(|r| r.back()).copied())
    }

    /// Busy share now, 0 to 1; in MIG mode that of its devices, each as large as its slices.
    pub fn busy(&mut self, gpu: usize) -> anyhow::Result<f64> {
        if self.world.gpus.get(gpu).is_none_or(|g| g.mig.is_empty()) {
            return Ok(self.latest(gpu)?.map_or(0.0, |t| f64::from(t.util[0]) / 100.0));
        }
        let served = self.settle()?;
        let from = served.saturating_sub(*self.world.period_us(gpu));
        let of = |unit: Unit| {
            let seconds: f64 = self.model(unit).truth(from, served).iter().map(|s| s.seconds[0]).sum();
            seconds * 1e6 / (served - from).max(1) as f64 * self.part(unit)
        };
        Ok(self.world.units().into_iter().filter(|u| u.gpu == gpu && u.mig.is_some()).map(of).sum())
    }

    /// What a throttle that is in force leaves of power, the SM clock and temperature.
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

    /// A world that began long ago and its log; the times are before now.
    fn driver(toml: &str, loads: &[(u64, Option<u64>)]) -> (tempfile::TempDir, Driver) {
        let dir = tempfile::tempdir().unwrap();
        let own = loads::start_time(std::process::id()).unwrap();
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
    fn samples_are_served_when_they_are_as_old_as_the_delay() {
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
    fn what_is_forgotten_is_in_no_tick_nor_listed() {
        let now = loads::now_us();
        // One every 10 ms of the last minute, 30 to 330 ms long; two of them do not end.
        let ends = |n: u64, begin: u64| (n < 5_998).then_some(begin + 30_000 + n % 11 * 30_000);
        let loads: Vec<_> =
            (0..6_000).map(|n| (now - 61_000_000 + n * 10_000, n)).map(|(begin, n)| (begin, ends(n, begin))).collect();
        let (dir, mut driver) = driver("", &loads);
        let mut all = Follower::new(dir.path(), &driver.world).unwrap();
        all.read().unwrap();
        for _ in 0..2 {
            for gpu in 0..2 {
                driver.sync(gpu).unwrap();
                let ticks: Vec<Tick> = driver.rings[gpu].iter().copied().collect();
                let model =
                    Model { world: &driver.world, unit: gpu.into(), loads: all.loads.of(gpu.into()), faults: &all.faults };
                assert_eq!(ticks.len(), 72);
                let spans: Vec<_> = model.grid(ticks[0].at_us - 1, ticks[71].at_us).collect();
                assert!(ticks.iter().zip(spans).all(|(tick, span)| *tick == model.tick(span)));
                let process = Process { pid: std::process::id(), bytes: 5, gi: NO_INSTANCE, ci: NO_INSTANCE };
                assert_eq!(driver.processes(gpu.into(), List::Compute).unwrap(), [process]);
            }
            // Of the first GPU the ring is full by the second time, of the other what a ring can need stayed too.
            let kept = driver.log.loads.iter().count();
            assert!((2..3_000).contains(&kept), "{kept}");
            driver.looked_us = 0;
        }
        assert_eq!(driver.log.loads.iter().count(), 2);
    }
}
