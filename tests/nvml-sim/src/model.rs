//! The truth: who is on the engine in each 2 ms slice. And what the driver makes of it: one sample per period, with one pid.
//!
//! Stateless. A slice draws one number in [0,1) from (seed, GPU, slice); the loads in force own adjoining parts of that interval as
//! wide as their demands (scaled down when they want more than the whole), the rest is idle. So every client, at any time, in any
//! process, sees the same past.

use crate::loads::Load;
use crate::world::{PidRule, World};

pub const SLICE_US: u64 = 2_000;
/// No sample is served younger than this: a load that begins or ends must be in the log by then.
pub const SERVED_AFTER_US: u64 = 20_000;

/// The timeline is walked in parts of this many slices, each with the few loads that overlap it.
const CHUNK: u64 = 1_000_000 / SLICE_US;

/// One number from three, well mixed (splitmix64).
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

/// One sample as the driver records it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    pub at_us: u64,
    /// Busy share of the period that ends at `at_us`, percent.
    pub util: u32,
    pub pid: Option<u32>,
}

pub struct Model<'a> {
    pub world: &'a World,
    pub gpu: usize,
    /// Of any GPU; others are skipped.
    pub loads: &'a [Load],
}

impl<'a> Model<'a> {
    /// The GPU's loads that are in force in a slice of `first..=last`, each with its place among all.
    fn overlapping(&self, first: u64, last: u64) -> Vec<(usize, &'a Load)> {
        let (first, last) = (first * SLICE_US, last * SLICE_US);
        let overlaps = |l: &Load| l.gpu == self.gpu && l.begin_us <= last && l.end_us.is_none_or(|end| first < end);
        self.loads.iter().enumerate().filter(|(_, l)| overlaps(l)).collect()
    }

    /// The one of the loads that overlap the slice that is on the engine in it. Their order decides who owns which part.
    fn owner(&self, overlapping: &[(usize, &'a Load)], slice: u64) -> Option<(usize, &'a Load)> {
        let at = slice * SLICE_US;
        let live = || overlapping.iter().filter(move |(_, l)| l.begin_us <= at && l.end_us.is_none_or(|end| at < end));
        let wanted: f64 = live().map(|(_, l)| l.demand).sum();
        if wanted <= 0.0 {
            return None;
        }
        let drawn = (mix(self.world.seed, self.gpu as u64 + 1, slice) >> 11) as f64 / (1u64 << 53) as f64 * wanted.max(1.0);
        let mut to = 0.0;
        let owner = live().find(|(_, l)| {
            to += l.demand;
            drawn < to
        });
        owner.copied()
    }

    /// The grid's points in (from, to].
    pub fn grid(&self, from_us: u64, to_us: u64) -> impl Iterator<Item = u64> + use<> {
        let period = self.world.period_us(self.gpu);
        // GPUs do not sample at the same instant.
        let phase = mix(self.world.seed, self.gpu as u64, 7) % period;
        let first = from_us.saturating_sub(phase) / period + u64::from(from_us >= phase);
        (first..).map(move |n| n * period + phase).take_while(move |at| *at <= to_us)
    }

    pub fn tick(&self, at_us: u64) -> Tick {
        let from = at_us.saturating_sub(self.world.period_us(self.gpu));
        let (first_slice, last_slice) = (from / SLICE_US, at_us / SLICE_US);
        let loads = self.overlapping(first_slice, last_slice);
        let (mut busy_us, mut last) = (0, None);
        for slice in first_slice..=last_slice {
            let (begins, ends) = (slice * SLICE_US, (slice + 1) * SLICE_US);
            let within = ends.min(at_us).saturating_sub(begins.max(from));
            if within > 0
                && let Some((_, load)) = self.owner(&loads, slice)
            {
                busy_us += within;
                last = Some(load.pid);
            }
        }
        let pid = match self.world.pid_rule(self.gpu) {
            PidRule::Instant => self.owner(&loads, last_slice).map(|(_, l)| l.pid),
            PidRule::Last => last,
        };
        let util = (busy_us as f64 * 100.0 / (at_us - from).max(1) as f64).round() as u32;
        Tick { at_us, util, pid }
    }

    /// A load that ended then or before is in none of the ticks after `after_us`.
    pub fn needless_until(&self, after_us: u64) -> u64 {
        after_us.saturating_sub(self.world.period_us(self.gpu)) / SLICE_US * SLICE_US
    }

    /// Seconds on the engine in [from, to), per load.
    pub fn truth(&self, from_us: u64, to_us: u64) -> Vec<(&'a Load, f64)> {
        let mut us = vec![0; self.loads.len()];
        let to_slice = to_us.div_ceil(SLICE_US);
        for first in (from_us / SLICE_US..to_slice).step_by(CHUNK as usize) {
            let end = (first + CHUNK).min(to_slice);
            let loads = self.overlapping(first, end - 1);
            for slice in first..end {
                if let Some((at, _)) = self.owner(&loads, slice) {
                    us[at] += ((slice + 1) * SLICE_US).min(to_us).saturating_sub((slice * SLICE_US).max(from_us));
                }
            }
        }
        let of_gpu = self.loads.iter().zip(us).filter(|(l, _)| l.gpu == self.gpu);
        of_gpu.map(|(load, us)| (load, us as f64 / 1e6)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 1_000_000_000_000;
    const MINUTE: u64 = 60_000_000;

    fn world(rule: PidRule) -> World {
        World { pid_rule: rule, ..World::parse("[[gpus]]").unwrap() }
    }

    fn loads(demands: &[f64]) -> Vec<Load> {
        let load = |(i, demand): (usize, &f64)| {
            let (id, pid) = (i as u64, 100 + i as u32);
            Load {
                id,
                pid,
                start_time: 1,
                gpu: 0,
                demand: *demand,
                memory_bytes: 0,
                begin_us: START,
                end_us: Some(START + MINUTE),
            }
        };
        demands.iter().enumerate().map(load).collect()
    }

    #[test]
    fn demands_are_met_over_a_minute() {
        for (demands, expect) in [(&[0.6, 0.3, 0.1][..], &[36.0, 18.0, 6.0][..]), (&[0.1], &[6.0]), (&[1.0, 1.0], &[30.0, 30.0])]
        {
            let (world, loads) = (world(PidRule::Instant), loads(demands));
            let model = Model { world: &world, gpu: 0, loads: &loads };
            // Beyond their end they own nothing.
            for ((_, got), want) in model.truth(START, START + 2 * MINUTE).iter().zip(expect) {
                assert!((got - want).abs() < 1.0, "{demands:?}: {got} for {want}");
            }
        }
    }

    #[test]
    fn ticks_add_up_to_the_truth_and_name_only_who_was_there() {
        for rule in [PidRule::Instant, PidRule::Last] {
            let (world, loads) = (world(rule), loads(&[0.3, 0.1]));
            let model = Model { world: &world, gpu: 0, loads: &loads };
            let ticks: Vec<Tick> = model.grid(START + 10_000_000, START + 50_000_000).map(|at| model.tick(at)).collect();
            assert!(ticks.windows(2).all(|w| w[1].at_us - w[0].at_us == world.period_us));
            let busy: f64 = ticks.iter().map(|t| f64::from(t.util) / 100.0 * world.period_us as f64 / 1e6).sum();
            let (from, to) = (ticks[0].at_us - world.period_us, ticks[ticks.len() - 1].at_us);
            let truth: f64 = model.truth(from, to).iter().map(|(_, s)| s).sum();
            assert!((busy - truth).abs() < 0.1, "{busy} for {truth}");
            let named = ticks.iter().filter(|t| t.pid.is_some()).count() as f64 / ticks.len() as f64;
            assert!(if rule == PidRule::Last { named > 0.95 } else { (named - 0.4).abs() < 0.15 }, "{rule:?} {named}");
        }
    }

    /// As the definition says it, with every load looked at in every slice.
    fn naive_owner<'a>(model: &Model<'a>, slice: u64) -> Option<&'a Load> {
        let at = slice * SLICE_US;
        let in_force = |l: &&Load| l.gpu == model.gpu && l.begin_us <= at && l.end_us.is_none_or(|end| at < end);
        let live: Vec<&Load> = model.loads.iter().filter(in_force).collect();
        let wanted: f64 = live.iter().map(|l| l.demand).sum();
        let drawn = (mix(model.world.seed, model.gpu as u64 + 1, slice) >> 11) as f64 / (1u64 << 53) as f64 * wanted.max(1.0);
        let mut to = 0.0;
        live.into_iter().find(|l| {
            to += l.demand;
            drawn < to
        })
    }

    fn naive_tick(model: &Model<'_>, at_us: u64) -> Tick {
        let from = at_us - model.world.period_us(model.gpu);
        let (mut busy_us, mut last) = (0, None);
        // Owners change at slices only.
        for us in (from..at_us).filter(|us| *us == from || us % SLICE_US == 0) {
            if let Some(load) = naive_owner(model, us / SLICE_US) {
                (busy_us, last) = (busy_us + ((us / SLICE_US + 1) * SLICE_US).min(at_us) - us, Some(load.pid));
            }
        }
        let instant = naive_owner(model, at_us / SLICE_US).map(|l| l.pid);
        let util = (busy_us as f64 * 100.0 / (at_us - from) as f64).round() as u32;
        Tick { at_us, util, pid: if model.world.pid_rule(model.gpu) == PidRule::Last { last } else { instant } }
    }

    /// Some 300 loads of two GPUs over 4 s, of all lengths from less than a slice, their begins out of order, some without end.
    fn crowd(seed: u64) -> Vec<Load> {
        let load = |id: u64| {
            let draw = |what, below| mix(seed, id, what) % below;
            let begin_us = START + id / 2 * 25_000 + draw(1, 60_000);
            let end_us =
                (draw(2, 50) > 0).then(|| begin_us + [3_000, 60_000, 700_000][draw(3, 3) as usize] * draw(4, 1000) / 1000);
            let (pid, gpu, demand) = (100 + draw(5, 40) as u32, draw(6, 2) as usize, (1 + draw(7, 900)) as f64 / 1000.0);
            Load { id, pid, start_time: 1, gpu, demand, memory_bytes: 0, begin_us, end_us }
        };
        (0..300).map(load).collect()
    }

    #[test]
    fn narrowed_to_what_overlaps_nothing_changes() {
        for (rule, seed) in [(PidRule::Instant, 1), (PidRule::Last, 2)] {
            let world = World { pid_rule: rule, seed, ..World::parse("[[gpus]]\n[[gpus]]\nperiod_us = 20001").unwrap() };
            let loads = crowd(seed);
            for gpu in 0..2 {
                let model = Model { world: &world, gpu, loads: &loads };
                let (from, to) = (START + 150_001, START + 3_700_777);
                for at in model.grid(from, to) {
                    assert_eq!(model.tick(at), naive_tick(&model, at));
                    // Nor without the loads that are said to be needless.
                    let until = model.needless_until(at - 1);
                    let needed: Vec<Load> = loads.iter().filter(|l| l.end_us.is_none_or(|end| end > until)).cloned().collect();
                    assert!(at < START + 1_000_000 || needed.len() < loads.len());
                    assert_eq!(model.tick(at), Model { loads: &needed, ..model }.tick(at));
                }
                let mut us: Vec<u64> = vec![0; loads.len()];
                for slice in from / SLICE_US..to.div_ceil(SLICE_US) {
                    if let Some(load) = naive_owner(&model, slice) {
                        us[load.id as usize] += ((slice + 1) * SLICE_US).min(to) - (slice * SLICE_US).max(from);
                    }
                }
                let expect: Vec<(u64, f64)> =
                    loads.iter().filter(|l| l.gpu == gpu).map(|l| (l.id, us[l.id as usize] as f64 / 1e6)).collect();
                let truth: Vec<(u64, f64)> = model.truth(from, to).iter().map(|(l, seconds)| (l.id, *seconds)).collect();
                assert_eq!(truth, expect);
                assert!(truth.iter().filter(|(_, seconds)| *seconds > 0.0).count() > 50);
            }
        }
    }
}
