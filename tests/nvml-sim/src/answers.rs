//! What utilization calls are told: the ring, folded into rows or sample by sample, with the quirks that the world has.

use std::collections::HashMap;

use crate::driver::Driver;
use crate::model::{ENGINES, Tick, mix};
use crate::world::{Garbage, IdleRing, RowOrder, RowStamps};

/// By so much a process's stamp lies before its sample's, at most: less than the least gap between samples.
const EARLY_US: u64 = 5_000;
/// As reported from the field.
const ABSURD_UTIL: u32 = 808_334_905;
const ZOMBIES: [u32; 2] = [4_194_301, 4_194_302];
const ZOMBIE_ROWS: u32 = 300;

/// One row of a process-utilization answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub pid: u32,
    /// By the GPU's clock.
    pub stamp_us: u64,
    pub util: [u32; ENGINES],
}

/// What GetSamples has rings of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingKind {
    Utilization(usize),
    Power,
    Clock,
    MemoryClock,
}

impl RingKind {
    /// By nvmlSamplingType_t.
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

    fn value(self, tick: &Tick) -> u32 {
        match self {
            Self::Utilization(engine) => tick.util[engine],
            Self::Power => power_mw(f64::from(tick.util[0]) / 100.0),
            Self::Clock => clock_mhz(f64::from(tick.util[0])),
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

/// A part of a tick that becomes part of a row.
struct Piece {
    pid: u32,
    at_us: u64,
    stamp_us: u64,
    engine: usize,
    util: u32,
}

impl Driver {
    /// The device's own ring: (stamp, value) of every sample that is stamped later than `after_us`.
    pub fn samples(&mut self, gpu: usize, kind: RingKind, after_us: u64) -> anyhow::Result<Vec<(u64, u32)>> {
        self.sync(gpu)?;
        let dry = *self.world.idle_ring(gpu) == IdleRing::Dry && matches!(kind, RingKind::Utilization(_));
        let ring = self.rings.get(gpu).into_iter().flatten();
        let shown = ring.filter(|t| !dry || t.util.iter().any(|u| *u > 0));
        let stamped = shown.map(|t| (self.stamp(gpu, t.at_us), kind.value(t)));
        Ok(stamped.filter(|(stamp, _)| *stamp > after_us).collect())
    }

    /// As the driver folds its ring: a row per pid, utilization averaged over the pid's samples on each engine, stamp of its newest.
    pub fn rows(&mut self, gpu: usize, after_us: u64) -> anyhow::Result<Vec<Row>> {
        self.sync(gpu)?;
        let pieces = self.pieces(gpu);
        let newer: Vec<&Piece> = pieces.iter().filter(|p| p.stamp_us > after_us).collect();
        let mut rows = fold(&newer);
        self.add_garbage(gpu, after_us, &pieces, &mut rows);
        if *self.world.row_order(gpu) == RowOrder::Shuffled {
            let now = self.now();
            rows.sort_by_key(|row| mix(now, u64::from(row.pid), row.stamp_us));
        }
        Ok(rows)
    }

    fn pieces(&self, gpu: usize) -> Vec<Piece> {
        let early = *self.world.row_stamps(gpu) == RowStamps::Process;
        let mut pieces = Vec::new();
        for tick in self.rings.get(gpu).into_iter().flatten() {
            let stamp = self.stamp(gpu, tick.at_us);
            for (engine, util) in tick.util.into_iter().enumerate().filter(|(_, util)| *util > 0) {
                let Some(pid) = tick.pid[engine].map(|pid| self.shown(pid)) else { continue };
                let before = if early { mix(self.world.seed, pid.into(), tick.at_us) % EARLY_US } else { 0 };
                pieces.push(Piece { pid, at_us: tick.at_us, stamp_us: stamp.saturating_sub(before), engine, util });
            }
        }
        pieces
    }

    fn add_garbage(&self, gpu: usize, after_us: u64, pieces: &[Piece], rows: &mut Vec<Row>) {
        let kinds = self.world.garbage(gpu);
        if kinds.is_empty() || !mix(self.world.seed ^ 17, gpu as u64, self.now()).is_multiple_of(*self.world.garbage_every(gpu)) {
            return;
        }
        let Some(stamp_us) = self.rings.get(gpu).and_then(|r| r.back()).map(|t| self.stamp(gpu, t.at_us)) else { return };
        let pid = pieces.last().map_or(1, |p| p.pid);
        let row = |pid, stamp_us, sm| Row { pid, stamp_us, util: [sm, 0, 0, 0, 0, 0] };
        for kind in kinds {
            match kind {
                Garbage::Util => rows.push(row(pid, stamp_us, ABSURD_UTIL)),
                Garbage::PidZero => rows.push(row(0, stamp_us, 37)),
                Garbage::PidMax => rows.push(row(u32::MAX, stamp_us, 37)),
                // Whoever reads from the beginning has seen nothing that could be stale.
                Garbage::Stale if after_us > 0 => rows.push(row(pid, after_us, 37)),
                Garbage::Stale => {}
                Garbage::Exited => rows.extend(fold(&self.exited(gpu, after_us, pieces))),
                Garbage::Zombies => {
                    rows.extend((0..ZOMBIE_ROWS).map(|n| row(ZOMBIES[n as usize % 2], stamp_us, 1 + n % 3)));
                }
            }
        }
    }

    /// What was already served of processes that are gone, as it was.
    fn exited<'p>(&self, gpu: usize, after_us: u64, pieces: &'p [Piece]) -> Vec<&'p Piece> {
        let mut gone: HashMap<u32, bool> = HashMap::new();
        let loads = self.log.loads.of(gpu.into());
        let mut is_gone =
            |pid| *gone.entry(pid).or_insert_with(|| loads.iter().all(|l| self.shown(l.pid) != pid || l.end_us.is_some()));
        pieces.iter().filter(|p| p.stamp_us <= after_us && is_gone(p.pid)).collect()
    }

    pub fn stamped_latest(&mut self, gpu: usize) -> anyhow::Result<Option<(u64, Tick)>> {
        Ok(self.latest(gpu)?.map(|tick| (self.stamp(gpu, tick.at_us), tick)))
    }
}

/// Rows in the order of their newest samples.
fn fold(pieces: &[&Piece]) -> Vec<Row> {
    struct Sum {
        row: Row,
        at_us: u64,
        counts: [u32; ENGINES],
    }
    let mut sums: Vec<Sum> = Vec::new();
    let mut places: HashMap<u32, usize> = HashMap::new();
    for piece in pieces {
        let place = *places.entry(piece.pid).or_insert_with(|| {
            let row = Row { pid: piece.pid, stamp_us: 0, util: [0; ENGINES] };
            sums.push(Sum { row, at_us: 0, counts: [0; ENGINES] });
            sums.len() - 1
        });
        let sum = &mut sums[place];
        sum.row.util[piece.engine] += piece.util;
        sum.counts[piece.engine] += 1;
        (sum.row.stamp_us, sum.at_us) = (piece.stamp_us, piece.at_us);
    }
    sums.sort_by_key(|sum| sum.at_us);
    let mean = |mut sum: Sum| {
        sum.row.util.iter_mut().zip(sum.counts).for_each(|(util, n)| *util /= n.max(1));
        sum.row
    };
    sums.into_iter().map(mean).collect()
}
