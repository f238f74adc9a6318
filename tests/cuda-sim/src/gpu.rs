//! One GPU as this process uses it: the shared schedule, brought up to the time before each use, and its spans written to NVML's log.
//!
//! No process drives the schedule: each computes it up to the present when it uses the GPU, and its library's thread does so every few
//! milliseconds. A process that has ended is noticed in the same way: its work ends soon after its library was last seen.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use devkit::process::start_time;

use crate::error::Error;
use crate::nvml_log::{Entry, NvmlLog};
use crate::schedule::{ClientSlot, Position, Progress, Schedule, StreamSlot};
use crate::shared::{Locked, Shared};
use crate::waits::MAX_GPUS;

/// Folder of this library's files in the world's folder.
pub const FOLDER: &str = "cuda";

/// Interval at which it is checked which processes live.
const CHECK_NS: u64 = 10_000_000;
/// The work of a process that ended goes on for this long after its library was last seen, unless its end is noticed before.
const OUTLASTS_NS: u64 = 20_000_000;
/// Age of a span at which it is written. The simulated NVML serves samples that are 20 ms old.
const WRITE_AFTER_NS: u64 = 4_000_000;
/// A wait checks after this time at the latest, since another process may have ended.
const LONGEST_SLEEP: Duration = Duration::from_millis(5);
const SHORTEST_SLEEP: Duration = Duration::from_micros(20);

pub struct Gpu {
    pub index: usize,
    shared: Shared,
    log: NvmlLog,
}

pub fn path(dir: &Path, index: usize) -> PathBuf {
    dir.join(FOLDER).join(format!("gpu{index}"))
}

pub fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

fn advance(schedule: &mut Schedule, to_ns: u64, entries: &mut Vec<Entry>) {
    while schedule.advance(to_ns) == Progress::SpansFull {
        take_spans(schedule, entries);
    }
}

fn take_spans(schedule: &mut Schedule, entries: &mut Vec<Entry>) {
    entries.extend(schedule.pending().iter().copied().map(Entry::Ran));
    schedule.clear_pending();
}

fn detach(schedule: &mut Schedule, slot: ClientSlot, entries: &mut Vec<Entry>) {
    take_spans(schedule, entries);
    if let Some(load) = schedule.client(slot).map(|client| client.load) {
        schedule.detach(slot);
        entries.push(Entry::End { load, at_ns: schedule.now_ns });
    }
}

impl Gpu {
    /// The GPUs that were installed, in their order.
    pub fn open_all(dir: &Path) -> Result<Vec<Self>, Error> {
        let installed = (0..MAX_GPUS).take_while(|index| path(dir, *index).exists());
        installed.map(|index| Ok(Self { index, shared: Shared::open(&path(dir, index))?, log: NvmlLog::new(dir) })).collect()
    }

    /// Uses the schedule at the present.
    pub fn with<T>(&self, f: impl FnOnce(&mut Schedule) -> T) -> Result<T, Error> {
        self.with_entries(|schedule, _entries| f(schedule))
    }

    /// As above; `f` may add entries of the log. They are written without the lock: a process that is stopped or frozen while it holds the
    /// lock stops all others, so nothing slow is done under it.
    fn with_entries<T>(&self, f: impl FnOnce(&mut Schedule, &mut Vec<Entry>) -> T) -> Result<T, Error> {
        let mut entries = Vec::new();
        let result = {
            let mut schedule = self.lock_without_ended(&mut entries)?;
            // A clock that was set back does not move the schedule back.
            let now_ns = now_ns().max(schedule.now_ns);
            advance(&mut schedule, now_ns, &mut entries);
            if schedule.pending().first().is_some_and(|span| now_ns.saturating_sub(span.from_ns) >= WRITE_AFTER_NS) {
                take_spans(&mut schedule, &mut entries);
            }
            f(&mut schedule, &mut entries)
        };
        self.log.write(&entries)?;
        Ok(result)
    }

    /// Locks the schedule. If a check is due, the work of processes that have ended is ended first, each at its time.
    fn lock_without_ended(&self, entries: &mut Vec<Entry>) -> Result<Locked<'_>, Error> {
        let mut schedule = self.shared.lock()?;
        let now_ns = now_ns();
        if now_ns.saturating_sub(schedule.checked_ns) < CHECK_NS {
            return Ok(schedule);
        }
        schedule.checked_ns = now_ns;
        let clients: Vec<(ClientSlot, u64, Option<u32>, u64)> = schedule
            .clients()
            .map(|(slot, client)| (slot, client.load, u32::try_from(client.pid).ok(), client.start_time))
            .collect();
        drop(schedule);
        // Reads /proc, so without the lock.
        let ended = clients.into_iter().filter(|(_, _, pid, start)| pid.and_then(start_time) != Some(*start));
        let ended: Vec<(ClientSlot, u64)> = ended.map(|(slot, load, ..)| (slot, load)).collect();
        let mut schedule = self.shared.lock()?;
        // Another process may have noticed the same end, and a new one may have the slot.
        let still = |(slot, load): &(ClientSlot, u64)| schedule.client(*slot).filter(|client| client.load == *load);
        let ends = ended.iter().filter_map(|one| still(one).map(|client| (client.seen_ns.saturating_add(OUTLASTS_NS), one.0)));
        let mut ends: Vec<(u64, ClientSlot)> = ends.collect();
        ends.sort_unstable_by_key(|(end_ns, slot)| (*end_ns, slot.0));
        for (end_ns, slot) in ends {
            advance(&mut schedule, end_ns.min(now_ns), entries);
            detach(&mut schedule, slot, entries);
        }
        Ok(schedule)
    }

    /// Writes what is known up to now.
    pub fn flush(&self) -> Result<(), Error> {
        self.with_entries(take_spans)
    }

    /// The process has a context from now on; `None` if all slots are in use.
    pub fn attach(&self, pid: u32, start_time: u64) -> Result<Option<ClientSlot>, Error> {
        let load = self.log.begin(pid, start_time, self.index, now_ns())?;
        self.with_entries(|schedule, entries| {
            let slot = schedule.attach(pid, start_time, load);
            if slot.is_none() {
                entries.push(Entry::End { load, at_ns: schedule.now_ns });
            }
            slot
        })
    }

    /// The process's last context is destroyed; its queued work ends.
    pub fn release(&self, slot: ClientSlot) -> Result<(), Error> {
        self.with_entries(|schedule, entries| detach(schedule, slot, entries))
    }

    /// Queues work; `None` if the client is detached.
    pub fn submit(&self, slot: ClientSlot, stream: StreamSlot, length_ns: u64) -> Result<Option<Position>, Error> {
        self.with(|schedule| {
            let now_ns = schedule.now_ns;
            schedule.client_mut(slot)?.seen_ns = now_ns;
            schedule.submit(slot, stream, length_ns)
        })
    }

    /// The least time until the stream reaches the position; 0 when it has. A detached client has no work.
    pub fn least_wait_ns(&self, slot: ClientSlot, stream: StreamSlot, position: Position) -> Result<u64, Error> {
        self.with(|schedule| schedule.least_wait_ns(slot, stream, position).unwrap_or(0))
    }

    /// Blocks until the stream has reached the position.
    pub fn wait(&self, slot: ClientSlot, stream: StreamSlot, position: Position) -> Result<(), Error> {
        loop {
            match self.least_wait_ns(slot, stream, position)? {
                0 => return Ok(()),
                wait_ns => std::thread::sleep(Duration::from_nanos(wait_ns).clamp(SHORTEST_SLEEP, LONGEST_SLEEP)),
            }
        }
    }

    /// Notes that the process lives. Returns its queued work.
    pub fn seen(&self, slot: ClientSlot) -> Result<u64, Error> {
        self.with(|schedule| {
            let now_ns = schedule.now_ns;
            schedule.client_mut(slot).map_or(0, |client| {
                client.seen_ns = now_ns;
                client.queued_ns()
            })
        })
    }
}
