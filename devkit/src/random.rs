//! Pseudo-random numbers for tests and benches.

/// A linear congruential generator with Knuth's MMIX constants. Equal seeds give equal numbers on every machine and with every version of
/// the dependencies, so that a failure can be repeated and bounds that hold once hold always. Not for statistics: the low bits of its
/// state are weak, and only the upper ones are returned.
pub struct Random(pub u64);

impl Random {
    fn step(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0
    }

    /// A number from 0 to 1, without 1.
    pub fn unit(&mut self) -> f64 {
        (self.step() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number below `bound`, which is at most 2^31.
    pub fn below(&mut self, bound: u64) -> u64 {
        debug_assert!(bound <= 1 << 31, "the generator returns 31 bits");
        (self.step() >> 33) % bound
    }
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn equal_seeds_give_these_numbers() {
        let mut random = Random(1);
        assert_eq!([(); 4].map(|()| random.below(100)), [74, 53, 96, 70]);
        let mut random = Random(1);
        let units = [(); 1000].map(|()| random.unit());
        assert!(units.iter().all(|unit| (0.0..1.0).contains(unit)));
        let mean = units.iter().sum::<f64>() / units.len() as f64;
        assert!((mean - 0.5).abs() < 0.05, "{mean}");
    }
}
