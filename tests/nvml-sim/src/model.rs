//! The truth: who is on the engine in each 2 ms slice. And what the driver makes of it: one sample per period, with one pid.
//!
//! Stateless. A slice draws one number in [0,1) from (seed, GPU, slice); the loads in force own adjoining parts of that interval as
//! wide as their demands (scaled down when they want more than the whole), the rest is idle. So every client, at any time, in any
//! process, sees the same past.

use crate::loads::Load;
use crate::world::{PidRule, World};

pub const SLICE_US: u64 = 2_000;
/// A sample is served when it is this old: a load that begins or ends must be in the log by then.
pub const SERVED_AFTER_US: u64 = 20_000;

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
    /// The load on the engine in the slice.
    pub fn owner(&self, slice: u64) -> Option<&'a Load> {
        let at = slice * SLICE_US;
        let live =
            || self.loads.iter().filter(move |l| l.gpu == self.gpu && l.begin_us <= at && l.end_us.is_none_or(|end| at < end));
        let wanted: f64 = live().map(|l| l.demand).sum();
        if wanted <= 0.0 {
            return None;
        }
        let drawn = (mix(self.world.seed, self.gpu as u64 + 1, slice) >> 11) as f64 / (1u64 << 53) as f64 * wanted.max(1.0);
        let mut to = 0.0;
        live().find(|l| {
            to += l.demand;
            drawn < to
        })
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
        let (mut busy_us, mut last) = (0, None);
        for slice in from / SLICE_US..=at_us / SLICE_US {
            let (begins, ends) = (slice * SLICE_US, (slice + 1) * SLICE_US);
            let within = ends.min(at_us).saturating_sub(begins.max(from));
            if within > 0
                && let Some(load) = self.owner(slice)
            {
                busy_us += within;
                last = Some(load.pid);
            }
        }
        let pid = match self.world.pid_rule(self.gpu) {
            PidRule::Instant => self.owner(at_us / SLICE_US).map(|l| l.pid),
            PidRule::Last => last,
        };
        let util = (busy_us as f64 * 100.0 / (at_us - from).max(1) as f64).round() as u32;
        Tick { at_us, util, pid }
    }

    /// Seconds on the engine in [from, to), per load.
    pub fn truth(&self, from_us: u64, to_us: u64) -> Vec<(&'a Load, f64)> {
        let mut seconds: Vec<(&Load, u64)> = self.loads.iter().filter(|l| l.gpu == self.gpu).map(|l| (l, 0)).collect();
        for slice in from_us / SLICE_US..to_us.div_ceil(SLICE_US) {
            let within = ((slice + 1) * SLICE_US).min(to_us).saturating_sub((slice * SLICE_US).max(from_us));
            if let Some(owner) = self.owner(slice)
                && let Some((_, us)) = seconds.iter_mut().find(|(l, _)| l.id == owner.id)
            {
                *us += within;
            }
        }
        seconds.into_iter().map(|(load, us)| (load, us as f64 / 1e6)).collect()
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
}
