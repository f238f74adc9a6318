//! What the driver knows at one moment: its sample rings and the processes with memory on a GPU. Plain data, no C.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use crate::loads::{self, Load};
use crate::model::{Model, SERVED_AFTER_US, Tick};
use crate::world::World;

/// What the driver itself holds of every GPU's memory.
pub const RESERVED_BYTES: u64 = 300 << 20;

pub struct Driver {
    pub world: World,
    dir: PathBuf,
    loads: Vec<Load>,
    log_bytes: u64,
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
        Ok(Self { world, dir: dir.to_owned(), loads: Vec::new(), log_bytes: u64::MAX, rings, looked_us: 0 })
    }

    /// Takes in the log and the time.
    fn sync(&mut self, gpu: usize) -> anyhow::Result<()> {
        let now = loads::now_us();
        if now.saturating_sub(self.looked_us) > 1_000_000 {
            self.looked_us = now;
            loads::close_dead(&self.dir, &self.loads)?;
        }
        // The time is taken before the log is read: what is served is older than both.
        let bytes = std::fs::metadata(self.dir.join(loads::FILE))?.len();
        if bytes != self.log_bytes {
            self.loads = loads::read(&self.dir)?;
            self.log_bytes = bytes;
        }
        let served = now - SERVED_AFTER_US;
        let depth = self.world.ring;
        let model = Model { world: &self.world, gpu, loads: &self.loads };
        let Some(ring) = self.rings.get_mut(gpu) else { return Ok(()) };
        let oldest = served.saturating_sub(self.world.period_us(gpu) * depth as u64).max(self.world.begun_us);
        let from = ring.back().map_or(oldest, |t| t.at_us.max(oldest));
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
        for load in self.loads.iter().filter(|l| l.gpu == gpu && l.end_us.is_none()) {
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
}
