//! One probed process: what was read of it last, and what that adds.

use std::sync::Arc;

use sampler_common::WaitSums;
use sampler_core::fact::User;
use sampler_core::observation::WaitReading;
use sampler_core::pipeline::GpuProcess;
use sampler_core::units::{BootNs, Tgid};

use super::programs::AttachedProbes;

pub struct ProbedProcess {
    pub tgid: Tgid,
    pub start: BootNs,
    pub user: User,
    read_at: BootNs,
    before: WaitSums,
    some_ns: u64,
    /// Generation of the requests in which uncounted calls were reported.
    reported_uncounted: Option<u64>,
    _probes: Option<Arc<AttachedProbes>>,
}

impl ProbedProcess {
    pub fn new(process: &GpuProcess, at: BootNs, probes: Option<Arc<AttachedProbes>>) -> Self {
        let GpuProcess { tgid, start, user } = *process;
        Self { tgid, start, user, read_at: at, before: WaitSums::ZERO, some_ns: 0, reported_uncounted: None, _probes: probes }
    }

    /// Whether these sums have calls that were not counted, and that is not reported for this generation of requests yet. Before `take`.
    pub fn has_new_uncounted(&mut self, sums: &WaitSums, generation: u64) -> bool {
        sums.lost > self.before.lost && self.reported_uncounted.replace(generation) != Some(generation)
    }

    /// What these sums add to the last ones.
    pub fn take(&mut self, sums: &WaitSums, at: BootNs) -> WaitReading {
        // A call that returns between the reads of two fields would count twice; a sum never shrinks, and does not exceed the time.
        let span_ns = at.saturating_since(self.read_at);
        let some_ns = sums.some_ns_at(at.0).saturating_sub(self.some_ns).min(span_ns);
        let more = |now: u64, before: u64| now.saturating_sub(before);
        let durations = sums.durations.iter().zip(self.before.durations).enumerate();
        let durations = durations.map(|(bucket, (now, before))| (bucket as u8, more(*now, before))).filter(|(_, n)| *n > 0);
        let reading = WaitReading {
            tgid: self.tgid,
            start: self.start,
            from: self.read_at,
            to: at,
            some_ns,
            total_ns: more(sums.total_ns, self.before.total_ns),
            calls: more(sums.calls, self.before.calls),
            durations: durations.collect(),
        };
        (self.read_at, self.before, self.some_ns) = (at, *sums, self.some_ns + some_ns);
        reading
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;
    const BEGIN: u64 = 100 * S;

    fn process() -> ProbedProcess {
        let user = User::Unattributed(sampler_core::device::Reason::PidUnknown);
        ProbedProcess::new(&GpuProcess { tgid: Tgid(7), start: BootNs(1), user }, BootNs(BEGIN), None)
    }

    fn sums(some_ns: u64, inside: u64, calls: u64) -> WaitSums {
        let mut sums = WaitSums { some_ns, inside, calls, total_ns: some_ns, ..WaitSums::ZERO };
        sums.durations[20] = calls;
        sums
    }

    #[test]
    fn uncounted_calls_are_reported_once_to_each_generation_of_requests() {
        let mut process = process();
        let mut reported = Vec::new();
        for (n, (lost, generation)) in [(0, 1), (3, 1), (5, 1), (5, 2), (6, 2)].into_iter().enumerate() {
            let sums = WaitSums { lost, ..WaitSums::ZERO };
            reported.push(process.has_new_uncounted(&sums, generation));
            process.take(&sums, BootNs(BEGIN + S * (n as u64 + 1)));
        }
        assert_eq!(reported, [false, true, false, false, true]);
    }

    #[test]
    fn readings_add_up_to_the_sums() {
        let (begin, mut process) = (BEGIN, process());
        let one_inside = |since: u64| (1 << WaitSums::THREADS_SHIFT) | since;
        let first = process.take(&sums(S / 2, 0, 3), BootNs(begin + S));
        assert_eq!((first.some_ns, first.calls, first.durations), (S / 2, 3, vec![(20, 3)]));
        // A call that has not returned counts up to now, and is not counted again when it returns.
        let second = process.take(&sums(S / 2, one_inside(begin + S), 3), BootNs(begin + 2 * S));
        assert_eq!((second.some_ns, second.calls, second.durations), (S, 0, Vec::new()));
        let third = process.take(&sums(2 * S, 0, 4), BootNs(begin + 3 * S));
        assert_eq!((third.from, third.some_ns, third.calls), (BootNs(begin + 2 * S), S / 2, 1));
        // Never more than the time between two reads.
        let fourth = process.take(&sums(9 * S, 0, 5), BootNs(begin + 4 * S));
        assert_eq!(fourth.some_ns, S);
        let fifth = process.take(&sums(S, 0, 1), BootNs(begin + 5 * S));
        assert_eq!((fifth.some_ns, fifth.calls), (0, 0));
    }
}
