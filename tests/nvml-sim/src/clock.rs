//! A GPU's own clock: the stamp that it gives to a time of the model.

use crate::world::{Clock, World};

pub struct GpuClock {
    zero_us: u64,
    begun_us: u64,
    offset_us: i64,
    drift_ppm: f64,
    steps: Vec<(u64, i64)>,
}

impl GpuClock {
    pub fn new(world: &World, gpu: usize) -> anyhow::Result<Self> {
        let zero_us = match world.clock(gpu) {
            Clock::Epoch => 0,
            Clock::Boot => world.booted_us,
        };
        let (offset_us, drift_ppm) = (*world.clock_offset_us(gpu), *world.clock_drift_ppm(gpu));
        Ok(Self { zero_us, begun_us: world.begun_us, offset_us, drift_ppm, steps: world.clock_steps_us(gpu)? })
    }

    /// The driver's stamp for this time; the drift grows from the world's begin.
    pub fn stamp(&self, at_us: u64) -> u64 {
        let drift = (at_us as f64 - self.begun_us as f64) * self.drift_ppm / 1e6;
        let steps: i64 = self.steps.iter().filter(|(at, _)| *at <= at_us).map(|(_, by)| by).sum();
        (at_us as i64 - self.zero_us as i64 + self.offset_us + steps + drift as i64).max(0) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_follow_zero_offset_drift_and_steps() {
        let check = |keys: &str, at_us: u64, expect: u64| {
            let world = World { begun_us: 1_000_000, booted_us: 400_000, ..World::parse(keys).unwrap() };
            assert_eq!(GpuClock::new(&world, 0).unwrap().stamp(at_us), expect, "{keys} at {at_us}");
        };
        check("", 5_000_000, 5_000_000);
        check("clock = 'boot'", 5_000_000, 4_600_000);
        check("clock_offset_us = -12000000", 50_000_000, 38_000_000);
        check("clock_offset_us = 12000000\nclock = 'boot'", 5_000_000, 16_600_000);
        check("clock_drift_ppm = 100.0", 21_000_000, 21_002_000);
        check("clock_drift_ppm = -100.0", 21_000_000, 20_998_000);
        let stepped = "[[gpus]]\n[[gpus.clock_steps]]\nat = '20s'\nby_us = -3000000\n[[gpus.clock_steps]]\nat = '30s'\nby_us = 5";
        check(stepped, 20_999_999, 20_999_999);
        check(stepped, 21_000_000, 18_000_000);
        check(stepped, 31_000_000, 28_000_005);
        // A stamp before the clock's zero is 0.
        check("clock_offset_us = -12000000", 5_000_000, 0);
    }
}
