//! Results of the utilization calls: the sample buffer, folded into process samples or sample by sample, with the world's quirks.

use std::collections::HashMap;

use crate::driver::Driver;
use crate::loads::Load;
use crate::model::{DriverSample, ENGINES, mix};
use crate::world::{Average, ExitedPids, Garbage, IdleRing, RowOrder, RowStamps};

/// Largest distance of a process sample's stamp before its sample's: less than the smallest gap between samples.
const EARLY_US: u64 = 5_000;
/// As reported by users.
const ABSURD_UTIL: u32 = 808_334_905;
const ZOMBIES: [u32; 2] = [4_194_301, 4_194_302];
const ZOMBIE_SAMPLES: u32 = 300;

/// One entry of a process-utilization result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessSample {
    pub pid: u32,
    /// On the GPU's clock.
    pub stamp_us: u64,
    pub util: [u32; ENGINES],
}

/// The buffers that GetSamples reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingKind {
    Utilization(usize),
    Power,
    Clock,
    MemoryClock,
}

impl RingKind {
    /// The buffer for an nvmlSamplingType_t.
    pub fn of(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Power,
            1..=4 => Self::Utilization(number as usize - 1),
            5 => Self::Clock,
            6 => Self::MemoryClock,
            8 | 9 => Self::Utilization(number as usize - 4),
            _ => return None,
        })
    }

    fn value(self, sample: &DriverSample, shown_util: [u32; ENGINES]) -> u32 {
        match self {
            Self::Utilization(engine) => shown_util[engine],
            Self::Power => power_mw(f64::from(sample.util[0]) / 100.0),
            Self::Clock => clock_mhz(f64::from(sample.util[0])),
            Self::MemoryClock => MEMORY_CLOCK_MHZ,
        }
    }
}

pub const MEMORY_CLOCK_MHZ: u32 = 877;

pub fn power_mw(busy: f64) -> u32 {
    40_000 + (220_000.0 * busy) as u32
}

pub fn clock_mhz(busy: f64) -> u32 {
    if busy > 0.0 { 1_530 } else { 135 }
}

/// The part of a sample that becomes part of a process sample: one engine.
struct Piece {
    pid: u32,
    at_us: u64,
    stamp_us: u64,
    engine: usize,
    util: u32,
}

impl Driver {
    /// The device's own buffer: (stamp, value) of every sample with a stamp later than `after_us`.
    pub fn samples(&mut self, gpu: usize, kind: RingKind, after_us: u64) -> anyhow::Result<Vec<(u64, u32)>> {
        self.sync(gpu)?;
        let after_us = after_us.saturating_add(*self.world.newer_by_us(gpu));
        let dry = *self.world.idle_ring(gpu) == IdleRing::Dry && matches!(kind, RingKind::Utilization(_));
        let ring = self.rings.get(gpu).into_iter().flatten();
        let with_util = ring.map(|t| (t, self.shown_util(gpu, t)));
        let shown = with_util.filter(|(_, util)| !dry || util.iter().any(|u| *u > 0));
        let stamped = shown.map(|(t, util)| (self.stamp(gpu, t.at_us), kind.value(t, util)));
        Ok(stamped.filter(|(stamp, _)| *stamp > after_us).collect())
    }

    /// Folds the buffer as the driver does: one entry per pid, with the average on each engine and the newest stamp.
    pub fn process_samples(&mut self, gpu: usize, after_us: u64) -> anyhow::Result<Vec<ProcessSample>> {
        self.sync(gpu)?;
        let pieces = self.pieces(gpu);
        let asked_us = after_us;
        let after_us = after_us.saturating_add(*self.world.newer_by_us(gpu));
        let newer: Vec<&Piece> = pieces.iter().filter(|p| p.stamp_us > after_us).collect();
        let all = match self.world.average(gpu) {
            Average::OverNamed => None,
            Average::OverAll => {
                let ring = self.rings.get(gpu).into_iter().flatten();
                Some(ring.filter(|sample| self.stamp(gpu, sample.at_us) > after_us).count() as u32)
            }
        };
        let mut samples = fold(&newer, all);
        self.add_garbage(gpu, asked_us, &pieces, &mut samples);
        if *self.world.row_order(gpu) == RowOrder::Shuffled {
            let now = self.now();
            samples.sort_by_key(|sample| mix(now, u64::from(sample.pid), sample.stamp_us));
        }
        Ok(samples)
    }

    fn pieces(&self, gpu: usize) -> Vec<Piece> {
        let early = *self.world.row_stamps(gpu) == RowStamps::Process;
        let mut pieces = Vec::new();
        for sample in self.rings.get(gpu).into_iter().flatten() {
            let stamp = self.stamp(gpu, sample.at_us);
            for (engine, util) in sample.util.into_iter().enumerate().filter(|(_, util)| *util > 0) {
                let Some(pid) = self.named(gpu, sample, engine) else { continue };
                let before = if early { mix(self.world.seed, pid.into(), sample.at_us) % EARLY_US } else { 0 };
                pieces.push(Piece { pid, at_us: sample.at_us, stamp_us: stamp.saturating_sub(before), engine, util });
            }
        }
        pieces
    }

    /// The pid by which the driver names the sample's process on the engine now.
    pub fn named(&self, gpu: usize, sample: &DriverSample, engine: usize) -> Option<u32> {
        let pid = sample.pid[engine]?;
        let now = self.now();
        // Ended loads may be forgotten; a load that began later may be of another process with the pid.
        let lives = |load: &Load| load.pid == pid && load.begin_us <= sample.at_us && !load.ended_by(now);
        let kept = *self.world.exited_pids(gpu) == ExitedPids::Kept;
        (kept || self.log.loads.of(gpu.into()).iter().any(lives)).then(|| self.shown(pid))
    }

    fn add_garbage(&self, gpu: usize, after_us: u64, pieces: &[Piece], samples: &mut Vec<ProcessSample>) {
        let kinds = self.world.garbage(gpu);
        if kinds.is_empty() || !mix(self.world.seed ^ 17, gpu as u64, self.now()).is_multiple_of(*self.world.garbage_every(gpu)) {
            return;
        }
        let Some(stamp_us) = self.rings.get(gpu).and_then(|r| r.back()).map(|t| self.stamp(gpu, t.at_us)) else { return };
        let pid = pieces.last().map_or(1, |p| p.pid);
        let garbage = |pid, stamp_us, sm| ProcessSample { pid, stamp_us, util: [sm, 0, 0, 0, 0, 0] };
        for kind in kinds {
            match kind {
                Garbage::Util => samples.push(garbage(pid, stamp_us, ABSURD_UTIL)),
                Garbage::PidZero => samples.push(garbage(0, stamp_us, 37)),
                Garbage::PidMax => samples.push(garbage(u32::MAX, stamp_us, 37)),
                // For a client that reads from the beginning nothing can be stale.
                Garbage::Stale if after_us > 0 => samples.push(garbage(pid, after_us, 37)),
                Garbage::Stale => {}
                Garbage::Exited => samples.extend(fold(&self.exited(gpu, after_us, pieces), None)),
                Garbage::Zombies => {
                    samples.extend((0..ZOMBIE_SAMPLES).map(|n| garbage(ZOMBIES[n as usize % 2], stamp_us, 1 + n % 3)));
                }
            }
        }
    }

    /// The samples of ended processes that were already served, unchanged.
    fn exited<'p>(&self, gpu: usize, after_us: u64, pieces: &'p [Piece]) -> Vec<&'p Piece> {
        let mut gone: HashMap<u32, bool> = HashMap::new();
        let loads = self.log.loads.of(gpu.into());
        let mut is_gone =
            |pid| *gone.entry(pid).or_insert_with(|| loads.iter().all(|l| self.shown(l.pid) != pid || l.end_us.is_some()));
        pieces.iter().filter(|p| p.stamp_us <= after_us && is_gone(p.pid)).collect()
    }

    pub fn stamped_latest(&mut self, gpu: usize) -> anyhow::Result<Option<(u64, DriverSample)>> {
        Ok(self.latest(gpu)?.map(|sample| (self.stamp(gpu, sample.at_us), sample)))
    }
}

/// Folds into process samples, in the order of their newest samples. `all`: the number of samples, if the average is over all of them.
fn fold(pieces: &[&Piece], all: Option<u32>) -> Vec<ProcessSample> {
    struct Sum {
        sample: ProcessSample,
        at_us: u64,
        counts: [u32; ENGINES],
    }
    let mut sums: Vec<Sum> = Vec::new();
    let mut indices: HashMap<u32, usize> = HashMap::new();
    for piece in pieces {
        let index = *indices.entry(piece.pid).or_insert_with(|| {
            let sample = ProcessSample { pid: piece.pid, stamp_us: 0, util: [0; ENGINES] };
            sums.push(Sum { sample, at_us: 0, counts: [0; ENGINES] });
            sums.len() - 1
        });
        let sum = &mut sums[index];
        sum.sample.util[piece.engine] += piece.util;
        sum.counts[piece.engine] += 1;
        (sum.sample.stamp_us, sum.at_us) = (piece.stamp_us, piece.at_us);
    }
    sums.sort_by_key(|sum| sum.at_us);
    let mean = |mut sum: Sum| {
        sum.sample.util.iter_mut().zip(sum.counts).for_each(|(util, n)| *util /= all.unwrap_or(n).max(1));
        sum.sample
    };
    sums.into_iter().map(mean).collect()
}
