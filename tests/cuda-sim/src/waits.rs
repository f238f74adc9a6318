//! The true waiting of this process: when at least one of its threads was inside a blocking call. Pure.
//!
//! A record is a span of time in which that was so without a break, or, if calls are shorter than [`SHORT_NS`], one span around many of
//! them with the sum of their times. Records are cut at each write, so that a killed process loses a few milliseconds only.

/// Most GPUs of a world with CUDA.
pub const MAX_GPUS: usize = 16;
/// Waits that are shorter share a record: 20,000 calls a second are 200 records.
const SHORT_NS: u64 = 50_000;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    pub from_ns: u64,
    pub to_ns: u64,
    /// Time with at least one thread inside a call.
    pub some_ns: u64,
    /// The sum over threads.
    pub total_ns: u64,
    /// Calls that returned.
    pub calls: u64,
    /// A bit for each GPU that was waited for.
    pub gpus: u64,
}

impl Record {
    pub fn line(&self) -> String {
        let Self { from_ns, to_ns, some_ns, total_ns, calls, gpus } = self;
        format!("{from_ns} {to_ns} {some_ns} {total_ns} {calls} {gpus}\n")
    }

    pub fn parse(line: &str) -> Option<Self> {
        let numbers: Vec<u64> = line.split(' ').map(str::parse).collect::<Result<_, _>>().ok()?;
        let [from_ns, to_ns, some_ns, total_ns, calls, gpus] = numbers[..] else { return None };
        Some(Self { from_ns, to_ns, some_ns, total_ns, calls, gpus })
    }

    fn add(&mut self, later: &Self) {
        self.to_ns = later.to_ns;
        self.some_ns += later.some_ns;
        self.total_ns += later.total_ns;
        self.calls += later.calls;
        self.gpus |= later.gpus;
    }
}

/// What the threads of this process do, and the records since the last [`Meter::take`].
#[derive(Debug, Default)]
pub struct Meter {
    /// Threads inside a call, by GPU.
    inside: [u64; MAX_GPUS],
    updated_ns: u64,
    open: Option<Record>,
    short: Option<Record>,
    records: Vec<Record>,
}

impl Meter {
    fn threads(&self) -> u64 {
        self.inside.iter().sum()
    }

    fn waited_for(&self) -> u64 {
        self.inside.iter().enumerate().filter(|(_, threads)| **threads > 0).fold(0, |bits, (gpu, _)| bits | 1 << gpu)
    }

    fn advance(&mut self, now_ns: u64) {
        let (passed_ns, threads) = (now_ns.saturating_sub(self.updated_ns), self.threads());
        if let Some(open) = &mut self.open {
            open.some_ns += passed_ns;
            open.total_ns += passed_ns * threads;
        }
        self.updated_ns = now_ns;
    }

    /// A thread enters a blocking call.
    pub fn enter(&mut self, gpu: usize, now_ns: u64) {
        self.advance(now_ns);
        if let Some(threads) = self.inside.get_mut(gpu) {
            *threads += 1;
        }
        let gpus = self.waited_for();
        let open = self.open.get_or_insert(Record { from_ns: now_ns, ..Record::default() });
        open.gpus |= gpus;
    }

    /// The call returns.
    pub fn leave(&mut self, gpu: usize, now_ns: u64) {
        self.advance(now_ns);
        if let Some(threads) = self.inside.get_mut(gpu) {
            *threads = threads.saturating_sub(1);
        }
        if let Some(open) = &mut self.open {
            open.calls += 1;
        }
        if self.threads() == 0 {
            self.close(now_ns);
        }
    }

    fn close(&mut self, now_ns: u64) {
        let Some(mut record) = self.open.take() else { return };
        record.to_ns = now_ns.max(record.from_ns);
        if record.some_ns >= SHORT_NS {
            self.records.extend(self.short.take());
            self.records.push(record);
        } else if let Some(short) = &mut self.short {
            short.add(&record);
        } else {
            self.short = Some(record);
        }
    }

    /// The records up to now; calls that have not returned continue in the next ones.
    pub fn take(&mut self, now_ns: u64) -> Vec<Record> {
        self.advance(now_ns);
        self.close(now_ns);
        let gpus = self.waited_for();
        if gpus != 0 {
            self.open = Some(Record { from_ns: now_ns, gpus, ..Record::default() });
        }
        self.records.extend(self.short.take());
        std::mem::take(&mut self.records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn some_is_the_union_of_calls_and_total_their_sum() {
        let mut meter = Meter::default();
        meter.enter(0, 10 * MS);
        meter.enter(1, 12 * MS);
        meter.leave(0, 15 * MS);
        meter.leave(1, 20 * MS);
        meter.enter(0, 30 * MS);
        let first = Record { from_ns: 10 * MS, to_ns: 20 * MS, some_ns: 10 * MS, total_ns: 13 * MS, calls: 2, gpus: 3 };
        let cut = Record { from_ns: 30 * MS, to_ns: 31 * MS, some_ns: MS, total_ns: MS, calls: 0, gpus: 1 };
        assert_eq!(meter.take(31 * MS), [first, cut]);
        meter.leave(0, 33 * MS);
        let rest = Record { from_ns: 31 * MS, to_ns: 33 * MS, some_ns: 2 * MS, total_ns: 2 * MS, calls: 1, gpus: 1 };
        assert_eq!(meter.take(40 * MS), [rest]);
        assert_eq!(meter.take(50 * MS), []);
    }

    #[test]
    fn short_calls_share_a_record() {
        let mut meter = Meter::default();
        for n in 0..1_000 {
            meter.enter(0, n * 50_000);
            meter.leave(0, n * 50_000 + 2_000);
        }
        let all = Record { from_ns: 0, to_ns: 999 * 50_000 + 2_000, some_ns: 2 * MS, total_ns: 2 * MS, calls: 1_000, gpus: 1 };
        assert_eq!(meter.take(60 * MS), [all]);
        // A long call ends the shared record, so that records stay in order and do not overlap.
        meter.enter(0, 70 * MS);
        meter.leave(0, 70 * MS + 1);
        meter.enter(0, 71 * MS);
        meter.leave(0, 75 * MS);
        let records = meter.take(76 * MS);
        assert_eq!(records.iter().map(|record| (record.from_ns, record.calls)).collect::<Vec<_>>(), [(70 * MS, 1), (71 * MS, 1)]);
    }

    #[test]
    fn lines_round_trip_and_incomplete_ones_are_rejected() {
        let record = Record { from_ns: 1, to_ns: 2, some_ns: 3, total_ns: 4, calls: 5, gpus: 6 };
        assert_eq!(Record::parse(record.line().trim_end()), Some(record));
        for wrong in ["", "1 2 3 4 5", "1 2 3 4 5 x", "1 2 3 4 5 6 7"] {
            assert_eq!(Record::parse(wrong), None, "{wrong:?}");
        }
    }
}
