//! The truth: which process is on which engine in each 2 ms slice. And what the driver records of it: one sample per period, with one pid.
//!
//! Stateless. Each slice has one random number in [0,1) from (seed, unit, engine, slice). The loads with a demand for that engine own
//! adjoining parts of that interval, as wide as their demands (scaled down when these sum above 1); the rest is idle. So every client, at
//! any time, in any process, gets the same past. Loads under MPS are one owner together, and several of them run in one of its slices.
//!
//! Scheduled loads, of the simulated CUDA driver, come first on the compute engine, in exactly their spans. The owner of a slice has the rest
//! of it.
//!
//! Where a load with bursts is live, each load decides by itself, for each of its bursts, whether it works; those that work take turns on
//! the compute engine, slice by slice.

use crate::faults::Faults;
use crate::loads::{Load, Ran};
use crate::world::{PidRule, Rounding, Unit, World};

pub const SLICE_US: u64 = 2_000;
/// No sample is served younger than this: by then a load's begin or end must be in the log.
pub const SERVED_AFTER_US: u64 = 20_000;

/// The timeline is processed in parts of this many slices, each with the few loads that overlap it.
const CHUNK: u64 = 1_000_000 / SLICE_US;

/// Random draws until some member of the MPS group runs; with demands that are not tiny the first or second succeeds.
const MPS_DRAWS: u64 = 64;

pub const ENGINES: usize = 6;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Sm,
    Mem,
    Enc,
    Dec,
    Jpg,
    Ofa,
}

impl Engine {
    pub const ALL: [Engine; ENGINES] = [Self::Sm, Self::Mem, Self::Enc, Self::Dec, Self::Jpg, Self::Ofa];
    pub const NAMES: [&str; ENGINES] = ["sm", "mem", "enc", "dec", "jpg", "ofa"];

    /// A load's demand for this engine at a time. The default use of the memory follows the compute engine and is not a demand.
    fn demand(self, load: &Load, at_us: u64) -> f64 {
        match self {
            Self::Sm => load.demand_at(at_us),
            _ => self.most(load),
        }
    }

    /// The part of the engine that a scheduled load uses while it runs: the default use of the memory is half of it.
    fn part_of_scheduled(self) -> f64 {
        match self {
            Self::Sm => 1.0,
            Self::Mem => 0.5,
            Self::Enc | Self::Dec | Self::Jpg | Self::Ofa => 0.0,
        }
    }

    /// A load's largest demand for this engine.
    fn most(self, load: &Load) -> f64 {
        match self {
            Self::Sm if load.ways.scheduled => 1.0,
            Self::Sm => load.demand,
            Self::Mem => load.ways.memory.unwrap_or(0.0),
            Self::Enc => load.ways.enc,
            Self::Dec => load.ways.dec,
            Self::Jpg => load.ways.jpeg,
            Self::Ofa => load.ways.ofa,
        }
    }
}

/// Mixes three numbers into one (splitmix64).
pub fn mix(a: u64, b: u64, c: u64) -> u64 {
    let mut z =
        a.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b.wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ c.wrapping_mul(0x94d0_49bb_1331_11eb);
    for _ in 0..2 {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
    }
    z
}

/// Maps to [0,1).
fn unit_interval(mixed: u64) -> f64 {
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}

/// The time that a sample covers: from the one before to its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub from_us: u64,
    pub at_us: u64,
}

/// One sample as the driver records it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriverSample {
    pub at_us: u64,
    /// Per engine, the busy share of the time since the sample before, in percent.
    pub util: [u32; ENGINES],
    pub pid: [Option<u32>; ENGINES],
}

/// The time that a load had on the engines.
#[derive(Clone, Debug)]
pub struct Spent<'a> {
    pub load: &'a Load,
    /// Seconds on each engine; where several loads run at once under MPS, its part of them.
    pub seconds: [f64; ENGINES],
    /// Seconds on the compute engine, alone or not.
    pub active: f64,
}

/// What scheduled loads ran within one slice.
struct RanInSlice {
    us: u64,
    /// The part of the engine that they used meanwhile.
    part: f64,
    /// The last one that ran.
    pid: Option<u32>,
    /// Whether it ran up to the end.
    at_end: bool,
}

#[derive(Clone, Copy)]
pub struct Model<'a> {
    pub world: &'a World,
    pub unit: Unit,
    /// Loads of any unit; those of other units are skipped.
    pub loads: &'a [Load],
    pub faults: &'a Faults,
}

/// A load with its index among all loads.
type Indexed<'a> = (usize, &'a Load);

impl<'a> Model<'a> {
    /// The unit's loads that are in force in a slice of `first..=last`.
    fn overlapping(&self, first: u64, last: u64) -> Vec<Indexed<'a>> {
        let (first, last) = (first * SLICE_US, last * SLICE_US);
        let overlaps = |l: &Load| l.unit() == self.unit && l.begin_us <= last && l.end_us.is_none_or(|end| first < end);
        self.loads.iter().enumerate().filter(|(_, l)| overlaps(l)).collect()
    }

    /// The slice's random number; GPUs, MIG devices and engines have independent ones.
    fn draw(&self, engine: Engine, slice: u64) -> f64 {
        let mig = self.unit.mig.map_or(0, |mig| mig as u64 + 1);
        let unit = (mig << 16) + self.unit.gpu as u64 + 1;
        unit_interval(mix(self.world.seed, unit | (engine as u64) << 32, slice))
    }

    /// The overlapping loads that are on the engine in the slice: one, or several under MPS. Their order decides which part each owns.
    fn owners(&self, engine: Engine, overlapping: &[Indexed<'a>], slice: u64, owners: &mut Vec<Indexed<'a>>) {
        owners.clear();
        let at = slice * SLICE_US;
        let live = || overlapping.iter().filter(move |(_, l)| !l.ways.scheduled && l.wants_at(at));
        let shared = |l: &Load| engine == Engine::Sm && l.ways.mps;
        if engine == Engine::Sm && live().any(|(_, l)| l.ways.burst_us.is_some()) && !self.faults.down(self.unit.gpu, at) {
            owners.extend(self.turn(live(), slice));
            return;
        }
        let (mut wanted, mut none_of_mps) = (0.0, 1.0);
        for (_, load) in live() {
            if shared(load) {
                none_of_mps *= 1.0 - engine.demand(load, at);
            } else {
                wanted += engine.demand(load, at);
            }
        }
        let mps: f64 = 1.0 - none_of_mps;
        let all = wanted + mps;
        if all <= 0.0 || self.faults.down(self.unit.gpu, at) {
            return;
        }
        let drawn = self.draw(engine, slice) * all.max(1.0);
        let mut to = 0.0;
        let owner = live().filter(|(_, l)| !shared(l)).find(|(_, l)| {
            to += engine.demand(l, at);
            drawn < to
        });
        match owner {
            Some(owner) => owners.push(*owner),
            None if drawn >= wanted && drawn < all => self.mps_owners(live, slice, owners),
            None => {}
        }
    }

    /// What scheduled loads ran in [from, to), which lies in one slice.
    fn scheduled<'l>(
        &self,
        overlapping: &'l [Indexed<'a>],
        from_us: u64,
        to_us: u64,
    ) -> impl Iterator<Item = (Indexed<'a>, Ran)> + 'l {
        let down = self.faults.down(self.unit.gpu, from_us / SLICE_US * SLICE_US);
        let scheduled = overlapping.iter().filter(move |(_, l)| l.ways.scheduled && !down);
        scheduled.flat_map(move |(index, load)| load.ran_within(from_us, to_us).map(move |ran| ((*index, *load), ran)))
    }

    /// The load that has the slice, of those that work in it. A load works in each of its bursts with the probability of its demand.
    fn turn<'l>(&self, live: impl Iterator<Item = &'l Indexed<'a>>, slice: u64) -> Option<Indexed<'a>>
    where
        'a: 'l,
    {
        let works = |load: &Load| {
            let slices = (load.ways.burst_us.unwrap_or(SLICE_US) / SLICE_US).max(1);
            // Bursts of different loads do not begin together.
            let burst = (slice + load.id % slices) / slices;
            unit_interval(mix(self.world.seed ^ load.id, 23, burst)) < load.demand_at(slice * SLICE_US)
        };
        let working: Vec<Indexed<'a>> = live.filter(|(_, load)| works(load)).copied().collect();
        let turn = self.draw(Engine::Sm, slice) * working.len() as f64;
        working.get(turn as usize).copied()
    }

    /// Each member runs with the probability of its demand, given that one runs at all: so each gets the share of time that it demands.
    fn mps_owners<'l, I>(&self, live: impl Fn() -> I, slice: u64, owners: &mut Vec<Indexed<'a>>)
    where
        I: Iterator<Item = &'l Indexed<'a>>,
        'a: 'l,
    {
        let at = slice * SLICE_US;
        for round in 0..MPS_DRAWS {
            for (index, load) in live().filter(|(_, l)| l.ways.mps && l.demand > 0.0) {
                if unit_interval(mix(self.world.seed ^ load.id, slice, round)) < load.demand_at(at) {
                    owners.push((*index, *load));
                }
            }
            if !owners.is_empty() {
                return;
            }
        }
    }

    /// The pid that a sample in this slice names, of the loads on the engine.
    fn named(&self, owners: &[Indexed<'a>], slice: u64) -> Option<u32> {
        let pick = mix(self.world.seed, 11, slice) as usize % owners.len().max(1);
        owners.get(pick).map(|(_, l)| l.pid)
    }

    /// The time at which the driver takes the sample with this number.
    fn sampled_us(&self, number: u64) -> u64 {
        let (seed, gpu) = (self.world.seed, self.unit.gpu);
        let (period, jitter) = (*self.world.period_us(gpu), *self.world.jitter_us(gpu));
        // GPUs do not sample at the same instant.
        let on_grid = number * period + mix(seed, gpu as u64, 7) % period;
        if jitter == 0 {
            return on_grid;
        }
        (on_grid + mix(seed ^ 13, gpu as u64, number) % (2 * jitter + 1)).saturating_sub(jitter)
    }

    /// The samples in (from, to] that the driver records.
    pub fn grid(self, from_us: u64, to_us: u64) -> impl Iterator<Item = Span> + use<'a> {
        let period = *self.world.period_us(self.unit.gpu);
        // The phase is less than a period, and so is the jitter.
        let first = (from_us / period).saturating_sub(2).max(1);
        let span = move |n: u64| Span { from_us: self.sampled_us(n - 1), at_us: self.sampled_us(n) };
        let spans = (first..).map(span).skip_while(move |s| s.at_us <= from_us).take_while(move |s| s.at_us <= to_us);
        spans.filter(move |s| self.faults.recorded(self.unit.gpu, s.at_us))
    }

    pub fn sample(&self, span: Span) -> DriverSample {
        let (first, last) = (span.from_us / SLICE_US, span.at_us / SLICE_US);
        let loads = self.overlapping(first, last);
        let mut sample = DriverSample { at_us: span.at_us, util: [0; ENGINES], pid: [None; ENGINES] };
        for engine in Engine::ALL.into_iter().filter(|e| loads.iter().any(|(_, l)| e.most(l) > 0.0)) {
            (sample.util[engine as usize], sample.pid[engine as usize]) = self.engine_sample(engine, &loads, span);
        }
        if sample.util[Engine::Mem as usize] == 0 && loads.iter().all(|(_, l)| l.ways.memory.is_none()) {
            sample.util[Engine::Mem as usize] = sample.util[Engine::Sm as usize] / 2;
            sample.pid[Engine::Mem as usize] = sample.pid[Engine::Sm as usize];
        }
        sample
    }

    /// Utilization and pid of one engine.
    fn engine_sample(&self, engine: Engine, loads: &[Indexed<'a>], span: Span) -> (u32, Option<u32>) {
        let (first, last_slice) = (span.from_us / SLICE_US, span.at_us / SLICE_US);
        let mut owners = Vec::new();
        let (mut busy_us, mut last) = (0.0, None);
        for slice in first..=last_slice {
            let (begins, ends) = (slice * SLICE_US, (slice + 1) * SLICE_US);
            let within = ends.min(span.at_us).saturating_sub(begins.max(span.from_us));
            if within == 0 {
                continue;
            }
            let part = self.on(engine, loads, slice, &mut owners);
            let ran = self.ran(engine, loads, begins.max(span.from_us), ends.min(span.at_us));
            busy_us += (within - ran.us) as f64 * part + ran.us as f64 * ran.part;
            if part > 0.0 && within > ran.us {
                last = self.named(&owners, slice);
            }
            // At the end of the slice, or of the period; or the only one in the slice.
            if ran.at_end || part == 0.0 {
                last = ran.pid.or(last);
            }
        }
        let pid = match self.world.pid_rule(self.unit.gpu) {
            PidRule::Instant => {
                self.on(engine, loads, last_slice, &mut owners);
                let ran = self.ran(engine, loads, span.at_us, span.at_us + 1);
                ran.pid.or_else(|| self.named(&owners, last_slice))
            }
            PidRule::Last => last,
        };
        let percent = busy_us * 100.0 / (span.at_us - span.from_us).max(1) as f64;
        let percent = match self.world.rounding(self.unit.gpu) {
            Rounding::Nearest => percent.round(),
            Rounding::Down => percent.floor(),
        };
        (percent as u32, pid)
    }

    /// Sums what scheduled loads ran in [from, to), which lies in one slice.
    fn ran(&self, engine: Engine, loads: &[Indexed<'a>], from_us: u64, to_us: u64) -> RanInSlice {
        let mut ran = RanInSlice { us: 0, part: engine.part_of_scheduled(), pid: None, at_end: false };
        if ran.part == 0.0 {
            return ran;
        }
        let mut latest_us = 0;
        for ((_, load), span) in self.scheduled(loads, from_us, to_us) {
            ran.us += span.1 - span.0;
            if span.1 > latest_us {
                (latest_us, ran.pid, ran.at_end) = (span.1, Some(load.pid), span.1 == to_us);
            }
        }
        ran
    }

    /// The part of the engine that is used in the slice, and its owners. Loads without a demand for the memory use half of it while they
    /// compute, unless a load with such a demand is on it.
    fn on(&self, engine: Engine, loads: &[Indexed<'a>], slice: u64, owners: &mut Vec<Indexed<'a>>) -> f64 {
        self.owners(engine, loads, slice, owners);
        if engine == Engine::Mem && owners.is_empty() {
            self.owners(Engine::Sm, loads, slice, owners);
            owners.retain(|(_, l)| l.ways.memory.is_none());
            return if owners.is_empty() { 0.0 } else { 0.5 };
        }
        if owners.is_empty() { 0.0 } else { 1.0 }
    }

    /// A load that ended at the returned time or before is in no sample after `after_us`.
    pub fn needless_until(&self, after_us: u64) -> u64 {
        let (period, jitter) = (self.world.period_us(self.unit.gpu), self.world.jitter_us(self.unit.gpu));
        after_us.saturating_sub(period + 2 * jitter) / SLICE_US * SLICE_US
    }

    /// The time that each load had in [from, to).
    pub fn truth(&self, from_us: u64, to_us: u64) -> Vec<Spent<'a>> {
        let mut us = vec![([0.0; ENGINES], 0.0); self.loads.len()];
        let to_slice = to_us.div_ceil(SLICE_US);
        let mut owners = Vec::new();
        for first in (from_us / SLICE_US..to_slice).step_by(CHUNK as usize) {
            let end = (first + CHUNK).min(to_slice);
            let loads = self.overlapping(first, end - 1);
            let used = |e: Engine| e == Engine::Mem || loads.iter().any(|(_, l)| e.most(l) > 0.0);
            for engine in Engine::ALL.into_iter().filter(|e| !loads.is_empty() && used(*e)) {
                for slice in first..end {
                    let (begins, ends) = ((slice * SLICE_US).max(from_us), ((slice + 1) * SLICE_US).min(to_us));
                    let mut within = ends.saturating_sub(begins) as f64;
                    let part_of_scheduled = engine.part_of_scheduled();
                    let ran = self.scheduled(&loads, begins, ends).filter(|_| part_of_scheduled > 0.0);
                    for ((at, _), span) in ran {
                        let ran_us = (span.1 - span.0) as f64;
                        within -= ran_us;
                        us[at].0[engine as usize] += ran_us * part_of_scheduled;
                        us[at].1 += if engine == Engine::Sm { ran_us } else { 0.0 };
                    }
                    let part = self.on(engine, &loads, slice, &mut owners);
                    for (at, _) in &owners {
                        us[*at].0[engine as usize] += within * part / owners.len() as f64;
                        us[*at].1 += if engine == Engine::Sm { within } else { 0.0 };
                    }
                }
            }
        }
        let of_unit = self.loads.iter().zip(us).filter(|(l, _)| l.unit() == self.unit);
        of_unit.map(|(load, (us, active))| Spent { load, seconds: us.map(|us| us / 1e6), active: active / 1e6 }).collect()
    }
}

#[cfg(test)]
mod tests;
