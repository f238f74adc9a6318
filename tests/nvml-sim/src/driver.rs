//! What the driver knows at one moment: its sample rings and the processes with memory on a GPU. Plain data, no C.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use crate::follow::Follower;
use crate::loads;
use crate::model::{Model, Tick};
use crate::world::World;

/// What the driver itself holds of every GPU's memory.
pub const RESERVED_BYTES: u64 = 300 << 20;

pub struct Driver {
    pub world: World,
    dir: PathBuf,
    log: Follower,
    rings: Vec<VecDeque<Tick>>,
    looked_us: u64,
}

/// One row of a process-utilization answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub pid: u32,
    pub at_us: u64,
    pub util: u32,
}

impl Driver {
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        let world = World::read(dir)?;
        let rings = vec![VecDeque::new(); world.gpus.len()];
        Ok(Self { world, dir: dir.to_owned(), log: Follower::new(dir), rings, looked_us: 0 })
    }

    /// Takes in the log and the time.
    fn sync(&mut self, gpu: usize) -> anyhow::Result<()> {
        // The time is taken before the log is read: what is served is older than both.
        let now = loads::now_us();
        self.log.read()?;
        let served = now.saturating_sub(self.world.delay_us);
        if now.saturating_sub(self.looked_us) > 1_000_000 {
            self.looked_us = now;
            if loads::close_dead(&self.dir, self.log.loads.iter())? > 0 {
                self.log.read()?;
            }
            self.forget(served);
        }
        let from = self.recorded_us(gpu, served);
        let (depth, oldest) = (self.world.ring, self.oldest_us(gpu, served));
        let model = Model { world: &self.world, gpu, loads: self.log.loads.of(gpu) };
        let Some(ring) = self.rings.get_mut(gpu) else { return Ok(()) };
        for at in model.grid(from, served) {
            ring.push_back(model.tick(at));
            if ring.len() > depth {
                ring.pop_front();
            }
        }
        while ring.front().is_some_and(|t| t.at_us <= oldest) {
            ring.pop_front();
        }
        Ok(())
    }

    /// The ring holds what is newer.
    fn oldest_us(&self, gpu: usize, served_us: u64) -> u64 {
        let ring_us = self.world.period_us(gpu) * self.world.ring as u64;
        served_us.saturating_sub(ring_us).max(self.world.begun_us)
    }

    /// Up to here every tick is in the ring or too old for it.
    fn recorded_us(&self, gpu: usize, served_us: u64) -> u64 {
        let oldest = self.oldest_us(gpu, served_us);
        self.rings.get(gpu).and_then(|ring| ring.back()).map_or(oldest, |tick| tick.at_us.max(oldest))
    }

    /// Drops the loads that can be in no tick that is still to be recorded.
    fn forget(&mut self, served_us: u64) {
        for gpu in 0..self.rings.len() {
            let model = Model { world: &self.world, gpu, loads: &[] };
            let until = model.needless_until(self.recorded_us(gpu, served_us));
            self.log.loads.forget(gpu, until);
        }
    }

    /// The device's own ring: every sample newer than `after_us`, idle ones included.
    pub fn samples(&mut self, gpu: usize, after_us: u64) -> anyhow::Result<Vec<Tick>> {
        self.sync(gpu)?;
        Ok(self.rings.get(gpu).into_iter().flatten().filter(|t| t.at_us > after_us).copied().collect())
    }

    /// As the driver folds its ring: a row per pid, utilization averaged over the pid's samples, time of its newest.
    pub fn rows(&mut self, gpu: usize, after_us: u64) -> anyhow::Result<Vec<Row>> {
        Ok(fold(&self.samples(gpu, after_us)?))
    }

    pub fn latest(&mut self, gpu: usize) -> anyhow::Result<Option<Tick>> {
        self.sync(gpu)?;
        Ok(self.rings.get(gpu).and_then(|r| r.back()).copied())
    }

    /// (pid, bytes) of processes that are on the GPU now.
    pub fn processes(&mut self, gpu: usize) -> anyhow::Result<Vec<(u32, u64)>> {
        self.sync(gpu)?;
        let mut list: Vec<(u32, u64)> = Vec::new();
        for load in self.log.loads.of(gpu).iter().filter(|l| l.end_us.is_none()) {
            match list.iter_mut().find(|(pid, _)| *pid == load.pid) {
                Some((_, bytes)) => *bytes += load.memory_bytes,
                None => list.push((load.pid, load.memory_bytes)),
            }
        }
        Ok(list)
    }
}

fn fold(ticks: &[Tick]) -> Vec<Row> {
    let mut rows: Vec<(Row, u32)> = Vec::new();
    for tick in ticks.iter().filter(|t| t.util > 0) {
        let Some(pid) = tick.pid else { continue };
        match rows.iter_mut().find(|(row, _)| row.pid == pid) {
            Some((row, n)) => {
                row.util += tick.util;
                row.at_us = tick.at_us;
                *n += 1;
            }
            None => rows.push((Row { pid, at_us: tick.at_us, util: tick.util }, 1)),
        }
    }
    rows.into_iter().map(|(row, n)| Row { util: row.util / n, ..row }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_averaged_per_pid() {
        let tick = |at_us, util, pid| Tick { at_us, util, pid };
        let ticks = [tick(1, 50, Some(7)), tick(2, 30, None), tick(3, 100, Some(8)), tick(4, 71, Some(7)), tick(5, 0, Some(9))];
        let row = |pid, at_us, util| Row { pid, at_us, util };
        assert_eq!(fold(&ticks), [row(7, 4, 60), row(8, 3, 100)]);
        assert!(fold(&ticks[1..2]).is_empty());
    }

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
            assert_eq!(driver.samples(0, 0).unwrap().len(), 9);
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
        let mut all = Follower::new(dir.path());
        all.read().unwrap();
        for _ in 0..2 {
            for gpu in 0..2 {
                let ticks = driver.samples(gpu, 0).unwrap();
                let model = Model { world: &driver.world, gpu, loads: all.loads.of(gpu) };
                assert_eq!(ticks.len(), 72);
                assert!(ticks.iter().all(|tick| *tick == model.tick(tick.at_us)));
                assert_eq!(driver.processes(gpu).unwrap(), [(std::process::id(), 5)]);
            }
            // Of the first GPU the ring is full by the second time, of the other what a ring can need stayed too.
            let kept = driver.log.loads.iter().count();
            assert!((2..3_000).contains(&kept), "{kept}");
            driver.looked_us = 0;
        }
        assert_eq!(driver.log.loads.iter().count(), 2);
    }
}
