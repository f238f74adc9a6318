//! Which process is on one GPU: a time-slice model as plain data, which processes share.
//!
//! One process is on the GPU at a time. Processes with queued work take turns, each for a slice; when its work ends before, the rest of the
//! slice is left to the next. Work of a stream runs in the order of its submission. The streams of a process share its slices: each slice
//! begins with the next stream, and continues with others when that one has no more work.
//!
//! A stream is two sums: the work that was submitted and the work that is done. A position in a stream is a value of the first, and is
//! reached once the second is as large. Neither is ever reset, so that positions stay valid when a slot is used again.
//!
//! The state is a function of the submissions and their times. No IO, no clock; nothing here may panic on values that a killed writer left.

/// Most processes that use a GPU at the same time.
pub const MAX_CLIENTS: usize = 64;
/// Most streams of a process on a GPU, the default stream included.
pub const MAX_STREAMS: usize = 64;
/// Spans that wait to be written to the log: at the shortest slice, several intervals between two writes.
pub const MAX_PENDING: usize = 512;

pub const DEFAULT_SLICE_NS: u64 = 2_000_000;
pub const DEFAULT_STREAM: StreamSlot = StreamSlot(0);

/// The number of a process's slot on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientSlot(pub usize);

/// The number of a stream's slot within its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamSlot(pub usize);

/// The sum of work submitted to a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position(pub u64);

const FREE: u64 = 0;
const OPEN: u64 = 1;
/// Destroyed with work in it: the work is done, then the slot is free.
const CLOSING: u64 = 2;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Stream {
    state: u64,
    submitted_ns: u64,
    done_ns: u64,
}

impl Stream {
    fn queued_ns(&self) -> u64 {
        self.submitted_ns.saturating_sub(self.done_ns)
    }
}

/// A process on the GPU. A PID of 0 is a free slot.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Client {
    pub pid: u64,
    /// Clock ticks since boot, as in /proc.
    pub start_time: u64,
    /// The id of its load in the log of the simulated NVML.
    pub load: u64,
    /// When its library last used the GPU or ran its thread.
    pub seen_ns: u64,
    /// Number of stream slots that were ever open.
    high: u64,
    /// The stream that had the GPU last.
    stream: u64,
    streams: [Stream; MAX_STREAMS],
}

impl Client {
    fn used(&self) -> &[Stream] {
        self.streams.get(..self.high as usize).unwrap_or(&self.streams)
    }

    pub fn queued_ns(&self) -> u64 {
        if self.pid == 0 { 0 } else { self.used().iter().fold(0, |sum, stream| sum.saturating_add(stream.queued_ns())) }
    }

    /// The first stream with work, from this slot on.
    fn stream_from(&self, first: u64) -> Option<usize> {
        let used = self.used();
        let mut order = (0..used.len()).map(|n| (first as usize).wrapping_add(n) % used.len());
        order.find(|slot| used.get(*slot).is_some_and(|stream| stream.queued_ns() > 0))
    }
}

/// A span of time in which one process was on the GPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The id of the load in the log.
    pub load: u64,
    pub from_ns: u64,
    pub to_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    Reached,
    /// There are [`MAX_PENDING`] spans: take them and continue.
    SpansFull,
}

/// All-zero bytes are valid: a GPU without processes.
#[repr(C)]
#[cfg_attr(test, derive(Clone))]
pub struct Schedule {
    pub layout: u64,
    /// The schedule is computed up to this time.
    pub now_ns: u64,
    pub slice_ns: u64,
    /// When the processes were last checked for whether they live.
    pub checked_ns: u64,
    /// The client that is on the GPU, or was last.
    turn: u64,
    slice_left_ns: u64,
    pending_count: u64,
    pending: [Span; MAX_PENDING],
    clients: [Client; MAX_CLIENTS],
}

impl Schedule {
    pub fn client(&self, slot: ClientSlot) -> Option<&Client> {
        self.clients.get(slot.0).filter(|client| client.pid != 0)
    }

    pub fn client_mut(&mut self, slot: ClientSlot) -> Option<&mut Client> {
        self.clients.get_mut(slot.0).filter(|client| client.pid != 0)
    }

    pub fn clients(&self) -> impl Iterator<Item = (ClientSlot, &Client)> {
        self.clients.iter().enumerate().filter(|(_, client)| client.pid != 0).map(|(n, client)| (ClientSlot(n), client))
    }

    /// Gives the process a slot with its default stream; `None` if all slots are in use.
    pub fn attach(&mut self, pid: u32, start_time: u64, load: u64) -> Option<ClientSlot> {
        let slot = self.clients.iter().position(|client| client.pid == 0)?;
        let client = self.clients.get_mut(slot)?;
        for stream in &mut client.streams {
            *stream = Stream { state: FREE, done_ns: stream.submitted_ns, ..*stream };
        }
        (client.start_time, client.load, client.seen_ns, client.high, client.stream) = (start_time, load, self.now_ns, 0, 0);
        // Last: only a complete client has a pid.
        client.pid = u64::from(pid);
        self.open_stream(ClientSlot(slot)).map(|_default| ClientSlot(slot))
    }

    /// Frees the slot; its queued work is dropped.
    pub fn detach(&mut self, slot: ClientSlot) {
        if let Some(client) = self.client_mut(slot) {
            client.pid = 0;
        }
    }

    pub fn open_stream(&mut self, slot: ClientSlot) -> Option<StreamSlot> {
        let client = self.client_mut(slot)?;
        let free = |stream: &Stream| stream.state == FREE || stream.state == CLOSING && stream.queued_ns() == 0;
        let number = client.streams.iter().position(free)?;
        client.streams.get_mut(number)?.state = OPEN;
        client.high = client.high.max(number as u64 + 1);
        Some(StreamSlot(number))
    }

    pub fn close_stream(&mut self, slot: ClientSlot, stream: StreamSlot) {
        if let Some(stream) = self.stream_mut(slot, stream) {
            stream.state = CLOSING;
        }
    }

    fn stream_mut(&mut self, slot: ClientSlot, stream: StreamSlot) -> Option<&mut Stream> {
        self.client_mut(slot)?.streams.get_mut(stream.0)
    }

    fn stream(&self, slot: ClientSlot, stream: StreamSlot) -> Option<&Stream> {
        self.client(slot)?.streams.get(stream.0)
    }

    /// Queues work of this length. Returns the position at its end; `None` if the client is detached.
    pub fn submit(&mut self, slot: ClientSlot, stream: StreamSlot, length_ns: u64) -> Option<Position> {
        let stream = self.stream_mut(slot, stream)?;
        stream.submitted_ns = stream.submitted_ns.saturating_add(length_ns);
        Some(Position(stream.submitted_ns))
    }

    /// The least time until the stream reaches the position; 0 when it has. Exact if no work is submitted meanwhile, the rest fits in one
    /// slice and the process has no other stream with work.
    pub fn least_wait_ns(&self, slot: ClientSlot, stream: StreamSlot, position: Position) -> Option<u64> {
        let own_ns = position.0.saturating_sub(self.stream(slot, stream)?.done_ns);
        if own_ns == 0 {
            return Some(0);
        }
        let mut ahead_ns = 0u64;
        for n in 0..MAX_CLIENTS {
            let number = (self.turn as usize).wrapping_add(n) % MAX_CLIENTS;
            let slice_ns = if n == 0 { self.slice_left_ns } else { self.slice_ns };
            // After the end of its slice a client has its turn after all others.
            if number == slot.0 && slice_ns > 0 {
                break;
            }
            let queued_ns = self.clients.get(number).map_or(0, Client::queued_ns);
            ahead_ns = ahead_ns.saturating_add(queued_ns.min(slice_ns));
        }
        Some(ahead_ns.saturating_add(own_ns))
    }

    /// Computes the schedule up to this time.
    pub fn advance(&mut self, to_ns: u64) -> Progress {
        while self.now_ns < to_ns {
            if self.pending_count as usize >= MAX_PENDING {
                return Progress::SpansFull;
            }
            match self.next_on_gpu() {
                Some(number) => self.run(number, to_ns - self.now_ns),
                None => self.now_ns = to_ns,
            }
        }
        Progress::Reached
    }

    fn has_work(&self, number: usize) -> bool {
        self.clients.get(number).is_some_and(|client| client.queued_ns() > 0)
    }

    /// The client that is on the GPU next, with the rest of its slice or a new one.
    fn next_on_gpu(&mut self) -> Option<usize> {
        let last = self.turn as usize % MAX_CLIENTS;
        if self.slice_left_ns > 0 && self.has_work(last) {
            return Some(last);
        }
        self.slice_left_ns = 0;
        let next = (1..=MAX_CLIENTS).map(|n| (last + n) % MAX_CLIENTS).find(|number| self.has_work(*number))?;
        (self.turn, self.slice_left_ns) = (next as u64, self.slice_ns.max(1));
        if let Some(client) = self.clients.get_mut(next) {
            client.stream = client.stream.wrapping_add(1);
        }
        Some(next)
    }

    /// Lets one stream of the client run for at most this long and to the end of the slice.
    fn run(&mut self, number: usize, most_ns: u64) {
        let most_ns = most_ns.min(self.slice_left_ns);
        let Some(client) = self.clients.get_mut(number) else { return };
        let Some(slot) = client.stream_from(client.stream) else { return };
        let Some(stream) = client.streams.get_mut(slot) else { return };
        let run_ns = most_ns.min(stream.queued_ns());
        stream.done_ns += run_ns;
        client.stream = slot as u64;
        let (load, ended) = (client.load, client.queued_ns() == 0);
        let from_ns = self.now_ns;
        self.now_ns += run_ns;
        self.slice_left_ns = if ended { 0 } else { self.slice_left_ns - run_ns };
        self.record(Span { load, from_ns, to_ns: self.now_ns });
    }

    fn record(&mut self, span: Span) {
        let count = (self.pending_count as usize).min(MAX_PENDING);
        let last = count.checked_sub(1).and_then(|last| self.pending.get_mut(last));
        match last {
            Some(last) if last.load == span.load && last.to_ns == span.from_ns => last.to_ns = span.to_ns,
            _ => {
                if let Some(free) = self.pending.get_mut(count) {
                    *free = span;
                    self.pending_count = count as u64 + 1;
                }
            }
        }
    }

    /// The spans since [`Self::clear_pending`], in the order of time.
    pub fn pending(&self) -> &[Span] {
        self.pending.get(..self.pending_count as usize).unwrap_or(&self.pending)
    }

    pub fn clear_pending(&mut self) {
        self.pending_count = 0;
    }
}

#[cfg(test)]
mod tests;
