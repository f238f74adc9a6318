//! Sums over a unit's whole timeline, for cumulative values: energy, accounting, GPM. They are advanced with the time, so that loads that
//! are already counted can be dropped.

use std::collections::BTreeMap;

use crate::answers::power_mw;
use crate::driver::Driver;
use crate::model::ENGINES;
use crate::world::{MIG_SLICES, Unit};

/// Interval at which the energy counter advances.
const ENERGY_STEP_US: u64 = 100_000;

#[derive(Clone, Debug)]
pub struct Tally {
    pub begun_us: u64,
    pub upto_us: u64,
    pub seconds: [f64; ENGINES],
    /// The sums at the last step of the energy counter.
    at_step: Reading,
    /// By pid and start time.
    pub accounts: BTreeMap<(u32, u64), Account>,
}

/// The accounting of a process.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Account {
    pub seconds: [f64; ENGINES],
    pub begin_us: u64,
    pub end_us: Option<u64>,
    pub memory_bytes: u64,
}

/// The engines' seconds at one time; two readings can be compared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reading {
    pub at_us: u64,
    pub seconds: [f64; ENGINES],
}

impl Tally {
    pub fn from(begun_us: u64) -> Self {
        let (seconds, accounts) = ([0.0; ENGINES], BTreeMap::new());
        Self { begun_us, upto_us: begun_us, seconds, at_step: Reading { at_us: begun_us, seconds }, accounts }
    }
}

impl Driver {
    /// The unit's share of its GPU.
    pub fn part(&self, unit: Unit) -> f64 {
        self.world.mig(unit).map_or(1.0, |mig| f64::from(mig.slices) / f64::from(MIG_SLICES))
    }

    pub(crate) fn tally(&mut self, unit: Unit, upto_us: u64) -> &Tally {
        let mut tally = self.tallies.remove(&unit).unwrap_or_else(|| Tally::from(upto_us));
        let since_step = upto_us.saturating_sub(tally.begun_us) % ENERGY_STEP_US;
        let step_us = upto_us - since_step;
        if tally.upto_us < step_us {
            self.advance(&mut tally, unit, step_us);
            tally.at_step = Reading { at_us: step_us, seconds: tally.seconds };
        }
        if tally.upto_us < upto_us {
            self.advance(&mut tally, unit, upto_us);
        }
        self.tallies.entry(unit).or_insert(tally)
    }

    fn advance(&self, tally: &mut Tally, unit: Unit, upto_us: u64) {
        let accounting = *self.world.accounting(unit.gpu);
        for spent in self.model(unit).truth(tally.upto_us, upto_us) {
            let load = spent.load;
            tally.seconds.iter_mut().zip(spent.seconds).for_each(|(all, seconds)| *all += seconds);
            if !accounting || load.begin_us > upto_us {
                continue;
            }
            let new = || Account { begin_us: load.begin_us, ..Account::default() };
            let account = tally.accounts.entry((load.pid, load.start_time)).or_insert_with(new);
            account.seconds.iter_mut().zip(spent.seconds).for_each(|(all, seconds)| *all += seconds);
            account.end_us = load.end_us;
            account.memory_bytes = account.memory_bytes.max(load.memory_bytes);
        }
        tally.upto_us = upto_us;
    }

    /// The unit's sums up to now; two readings of one instance can be compared.
    pub fn reading(&mut self, unit: Unit) -> anyhow::Result<Reading> {
        let served = self.settle()?;
        let tally = self.tally(unit, served);
        Ok(Reading { at_us: tally.upto_us, seconds: tally.seconds })
    }

    /// Readings of the GPU, or of one GPU instance, with their shares of the GPU.
    pub fn readings(&mut self, gpu: usize, gi: Option<u32>) -> anyhow::Result<Vec<(f64, Reading)>> {
        let wanted = |u: &Unit| u.gpu == gpu && gi.is_none_or(|gi| self.world.mig(*u).is_some_and(|mig| mig.gi == gi));
        let units: Vec<Unit> = self.world.units().into_iter().filter(wanted).collect();
        units.into_iter().map(|unit| Ok((self.part(unit), self.reading(unit)?))).collect()
    }

    /// Energy from the world's begin to the counter's last step, millijoules.
    pub fn energy_mj(&mut self, gpu: usize) -> anyhow::Result<u64> {
        self.readings(gpu, None)?;
        let of_gpu = || self.tallies.iter().filter(|(unit, _)| unit.gpu == gpu);
        let busy: f64 = of_gpu().map(|(unit, tally)| self.part(*unit) * tally.at_step.seconds[0]).sum();
        let all = of_gpu().next().map_or(0, |(_, tally)| tally.at_step.at_us - tally.begun_us) as f64 / 1e6;
        let (idle, full) = (f64::from(power_mw(0.0)), f64::from(power_mw(1.0)));
        Ok((all * idle + busy * (full - idle)) as u64)
    }

    pub fn accounts(&mut self, gpu: usize) -> anyhow::Result<Vec<((u32, u64), Account)>> {
        self.readings(gpu, None)?;
        let of_gpu = self.tallies.iter().filter(|(unit, _)| unit.gpu == gpu);
        Ok(of_gpu.flat_map(|(_, tally)| tally.accounts.clone()).collect())
    }
}
