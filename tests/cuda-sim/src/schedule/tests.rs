use std::collections::BTreeMap;

use super::*;

const MS: u64 = 1_000_000;

/// A GPU with clients of the loads 1, 2 and so on, and what it ran.
struct TestGpu {
    schedule: Box<Schedule>,
    spans: Vec<Span>,
}

impl TestGpu {
    fn new(clients: usize) -> Self {
        let client =
            Client { pid: 0, start_time: 0, load: 0, seen_ns: 0, high: 0, stream: 0, streams: [Stream::default(); MAX_STREAMS] };
        let mut schedule = Box::new(Schedule {
            layout: 0,
            now_ns: 0,
            slice_ns: 2 * MS,
            checked_ns: 0,
            turn: 0,
            slice_left_ns: 0,
            pending_count: 0,
            pending: [Span { load: 0, from_ns: 0, to_ns: 0 }; MAX_PENDING],
            clients: [client; MAX_CLIENTS],
        });
        for n in 0..clients {
            assert_eq!(schedule.attach(100 + n as u32, 1, n as u64 + 1), Some(ClientSlot(n)));
        }
        Self { schedule, spans: Vec::new() }
    }

    fn submit(&mut self, client: usize, stream: StreamSlot, ms: u64) -> Position {
        self.schedule.submit(ClientSlot(client), stream, ms * MS).unwrap()
    }

    fn until(&mut self, ms: u64) {
        while self.schedule.advance(ms * MS) == Progress::SpansFull {
            self.take();
        }
        self.take();
    }

    fn take(&mut self) {
        self.spans.extend(self.schedule.pending());
        self.schedule.clear_pending();
    }

    /// Load, from and to, milliseconds.
    fn ran(&self) -> Vec<(u64, u64, u64)> {
        self.spans.iter().map(|span| (span.load, span.from_ns / MS, span.to_ns / MS)).collect()
    }

    fn least_wait_ms(&self, client: usize, stream: StreamSlot, position: Position) -> u64 {
        self.schedule.least_wait_ns(ClientSlot(client), stream, position).unwrap() / MS
    }
}

#[test]
fn processes_take_turns_and_leave_the_rest_of_a_slice() {
    let mut gpu = TestGpu::new(3);
    gpu.submit(0, DEFAULT_STREAM, 5);
    gpu.until(1);
    // The first one finishes its slice before those that came later.
    gpu.submit(1, DEFAULT_STREAM, 1);
    gpu.submit(2, DEFAULT_STREAM, 3);
    gpu.until(20);
    assert_eq!(gpu.ran(), [(1, 0, 1), (1, 1, 2), (2, 2, 3), (3, 3, 5), (1, 5, 7), (3, 7, 8), (1, 8, 9)]);
    assert_eq!(gpu.schedule.now_ns, 20 * MS);
}

#[test]
fn a_process_alone_keeps_the_gpu() {
    let mut gpu = TestGpu::new(2);
    gpu.submit(1, DEFAULT_STREAM, 50);
    gpu.until(60);
    assert_eq!(gpu.ran(), [(2, 0, 50)]);
}

#[test]
fn streams_are_in_order_and_share_the_slices_of_their_process() {
    let mut gpu = TestGpu::new(2);
    let other = gpu.schedule.open_stream(ClientSlot(0)).unwrap();
    let (first, second) = (gpu.submit(0, DEFAULT_STREAM, 3), gpu.submit(0, DEFAULT_STREAM, 2));
    let third = gpu.submit(0, other, 3);
    gpu.submit(1, DEFAULT_STREAM, 100);
    let mut reached: BTreeMap<Position, u64> = BTreeMap::new();
    for ms in 0..40 {
        gpu.until(ms);
        for (stream, position) in [(DEFAULT_STREAM, first), (DEFAULT_STREAM, second), (other, Position(third.0 + 1))] {
            let end = if stream == other { third } else { position };
            if gpu.least_wait_ms(0, stream, end) == 0 {
                reached.entry(position).or_insert(ms);
            }
        }
    }
    // The process has half of the time, and its 8 ms end after 4 slices of its own.
    let own: u64 = gpu.spans.iter().filter(|span| span.load == 1).map(|span| span.to_ns - span.from_ns).sum();
    assert_eq!(own, 8 * MS);
    assert!(reached[&first] < reached[&second] && reached.values().all(|ms| *ms <= 16), "{reached:?}");
}

#[test]
fn equal_demands_get_equal_time() {
    let mut gpu = TestGpu::new(4);
    for client in 0..4 {
        gpu.submit(client, DEFAULT_STREAM, 10_000);
    }
    gpu.until(4_000);
    for load in 1..=4 {
        let spans = gpu.spans.iter().filter(|span| span.load == load);
        assert_eq!(spans.map(|span| span.to_ns - span.from_ns).sum::<u64>(), 1_000 * MS);
    }
}

#[test]
fn the_least_wait_is_never_later_than_the_end() {
    let mut random = devkit::Random(7);
    for round in 0..200 {
        let mut gpu = TestGpu::new(3);
        let marks: Vec<Position> =
            (0..3).map(|client| gpu.submit(client, DEFAULT_STREAM, 1 + random.below(9) + round % 2)).collect();
        for ms in 0..60 {
            gpu.until(ms);
            let waits: Vec<u64> = (0..3).map(|client| gpu.least_wait_ms(client, DEFAULT_STREAM, marks[client])).collect();
            for (client, wait) in waits.into_iter().enumerate().filter(|(_, wait)| *wait > 0) {
                let mut later = TestGpu { schedule: gpu.schedule.clone(), spans: Vec::new() };
                later.until(ms + wait - 1);
                assert!(later.least_wait_ms(client, DEFAULT_STREAM, marks[client]) > 0, "{client} at {ms}");
            }
        }
        assert!((0..3).all(|client| gpu.least_wait_ms(client, DEFAULT_STREAM, marks[client]) == 0));
    }
}

#[test]
fn a_detached_process_stops_and_its_slot_is_used_again() {
    let mut gpu = TestGpu::new(2);
    gpu.submit(0, DEFAULT_STREAM, 1_000);
    gpu.until(1);
    gpu.submit(1, DEFAULT_STREAM, 4);
    gpu.schedule.detach(ClientSlot(0));
    assert_eq!(gpu.schedule.submit(ClientSlot(0), DEFAULT_STREAM, 1), None);
    gpu.until(10);
    assert_eq!(gpu.schedule.attach(200, 1, 9), Some(ClientSlot(0)));
    gpu.until(20);
    // The dropped work does not continue.
    assert_eq!(gpu.spans.iter().map(|span| span.to_ns - span.from_ns).sum::<u64>(), 5 * MS);
    let position = gpu.submit(0, DEFAULT_STREAM, 1);
    assert_eq!(gpu.least_wait_ms(0, DEFAULT_STREAM, position), 1);
    gpu.until(30);
    assert_eq!(gpu.ran().last(), Some(&(9, 20, 21)));
}

#[test]
fn slots_of_streams_and_processes_are_bounded() {
    let mut gpu = TestGpu::new(MAX_CLIENTS);
    assert_eq!(gpu.schedule.attach(999, 1, 999), None);
    let open = |gpu: &mut TestGpu| gpu.schedule.open_stream(ClientSlot(0));
    let opened: Vec<StreamSlot> = std::iter::from_fn(|| open(&mut gpu)).collect();
    assert_eq!(opened.len(), MAX_STREAMS - 1);
    // A destroyed stream keeps its slot until its work is done.
    gpu.submit(0, opened[3], 5);
    gpu.schedule.close_stream(ClientSlot(0), opened[3]);
    assert_eq!(open(&mut gpu), None);
    gpu.until(5);
    assert_eq!(open(&mut gpu), Some(opened[3]));
}

#[test]
fn many_spans_are_taken_in_parts() {
    let mut gpu = TestGpu::new(2);
    gpu.submit(0, DEFAULT_STREAM, 5_000);
    gpu.submit(1, DEFAULT_STREAM, 5_000);
    assert_eq!(gpu.schedule.advance(10_000 * MS), Progress::SpansFull);
    gpu.until(11_000);
    assert_eq!(gpu.spans.len(), 5_000);
    assert!(gpu.spans.windows(2).all(|pair| pair[0].to_ns == pair[1].from_ns && pair[0].load != pair[1].load));
}
