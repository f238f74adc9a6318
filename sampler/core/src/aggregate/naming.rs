//! The rule by which the driver names the process of a sample, learned from the samples.
//!
//! ```text
//!  instant   the process on the engine when the sample is taken; none where the engine is idle then
//!  last      the process that was on the engine last, also where it is idle by then (measured on an H200 with driver 580.159.04).
//!            Only a process that has ended by the time of the read is not named
//! ```
//! Under the first rule a user is named in proportion to its busy time. Under the second one, partly busy samples name a user in proportion
//! to how often it is the last to leave the engine idle, which also depends on how its work is distributed: a user with few long bursts is
//! named as often as one with as many short ones. No sample shows that, so the stated error includes it.

/// Samples without a pid that the rule of the instant predicts, for the rule to be known.
const EXPECTED: f64 = 5.0;
/// Older samples are halved in weight when this many were expected.
const FORGET_AT: f64 = 60.0;
/// Fraction of them below which the driver names the last process. With the rule of the instant, 5 expected ones are fewer than that by
/// chance once in 25 times, and 20 practically never.
const FEW: f64 = 0.25;
/// A sample this busy has no idle instant, so every rule names a process.
const SURELY_NAMED_RATIO: f64 = 0.99;
/// Error of a share of one half, in the idle part of a partly busy sample. Measured: two users with 0.30 and 0.10 of the time, in bursts of
/// 12 and 3 ms, were named in 53 and 47 % of the samples, so that 0.75 appeared as 0.53; equal bursts have no such error.
const DISTRIBUTION_RATIO: f64 = 0.3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    Instant,
    Last,
}

#[derive(Debug, Default)]
pub struct Naming {
    /// Samples without a pid that the rule of the instant predicts.
    expected: f64,
    unnamed: f64,
}

impl Naming {
    /// Adds a queried busy sample, unless a process ended around it.
    pub fn add(&mut self, busy_ratio: f64, is_named: bool) {
        self.expected += 1.0 - busy_ratio.min(1.0);
        self.unnamed += f64::from(u8::from(!is_named));
        if self.expected > FORGET_AT {
            self.expected /= 2.0;
            self.unnamed /= 2.0;
        }
    }

    fn rule(&self) -> Option<Rule> {
        let rule = if self.unnamed < FEW * self.expected { Rule::Last } else { Rule::Instant };
        (self.expected >= EXPECTED).then_some(rule)
    }

    /// Whether a busy sample without a pid is one of a process that has ended since.
    pub fn only_ended_are_unnamed(&self, busy_ratio: f64) -> bool {
        busy_ratio >= SURELY_NAMED_RATIO || self.names_the_last()
    }

    /// Whether the driver is known to name the last process of a period.
    pub fn names_the_last(&self) -> bool {
        self.rule() == Some(Rule::Last)
    }

    /// Standard error of the credits of a user with that share, from the unknown distribution of the work over the time. `partly_ns`: the
    /// sum of the busy time of samples, each times the idle part of its period.
    pub fn distribution_error_ns(&self, share: f64, partly_ns: f64) -> f64 {
        if self.rule() == Some(Rule::Instant) {
            return 0.0;
        }
        DISTRIBUTION_RATIO * 2.0 * (share * (1.0 - share)).max(0.0).sqrt() * partly_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_is_learned_from_partly_busy_samples() {
        let mut naming = Naming::default();
        for _ in 0..50 {
            naming.add(1.0, true);
        }
        assert_eq!(naming.rule(), None, "saturated samples do not distinguish the rules");
        assert!(naming.only_ended_are_unnamed(1.0) && !naming.only_ended_are_unnamed(0.5));
        for _ in 0..10 {
            naming.add(0.4, true);
        }
        assert_eq!(naming.rule(), Some(Rule::Last));
        // The driver was replaced.
        for n in 0..200 {
            naming.add(0.4, n % 5 < 2);
        }
        assert_eq!(naming.rule(), Some(Rule::Instant));
        assert_eq!(naming.distribution_error_ns(0.5, 1e9), 0.0);
    }

    #[test]
    fn only_shared_and_partly_busy_time_has_an_error_of_distribution() {
        let naming = Naming::default();
        let seconds = |share, partly: f64| naming.distribution_error_ns(share, partly * 1e9) * 1e-9;
        assert_eq!((seconds(1.0, 3.0), seconds(0.0, 3.0), seconds(0.5, 0.0)), (0.0, 0.0, 0.0));
        assert!((seconds(0.5, 1.0) - DISTRIBUTION_RATIO).abs() < 1e-9);
    }
}
