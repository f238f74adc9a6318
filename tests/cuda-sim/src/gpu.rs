//! One GPU as this process uses it: the shared schedule, brought up to the time before each use, and its spans written to NVML's log.
//!
//! No process drives the schedule: each computes it up to the present when it uses the GPU, and its library's thread does so every few
//! milliseconds. A process that has ended is noticed in the same way: its work ends soon after its library was last seen.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use devkit::process::start_time;

use crate::error::Error;
use crate::nvml_log::NvmlLog;
use crate::schedule::{Client, ClientSlot, Position, Progress, Schedule, StreamSlot};
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

impl Gpu {
    /// The GPUs that were installed, in their order.
    pub fn open_all(dir: &Path) -> Result<Vec<Self>, Error> {
        let installed = (0..MAX_GPUS).take_while(|index| path(dir, *index).exists());
        installed.map(|index| Ok(Self { index, shared: Shared::open(&path(dir, index))?, log: NvmlLog::new(dir) })).collect()
    }

    /// Uses the schedule at the present.
    pub fn with<T>(&self, f: impl FnOnce(&mut Schedule) -> T) -> Result<T, Error> {
        let mut schedule = self.shared.lock()?;
        // A clock that was set back does not move the schedule back.
        let now_ns = now_ns().max(schedule.now_ns);
        self.drop_ended(&mut schedule, now_ns)?;
        self.advance(&mut schedule, now_ns)?;
        if schedule.pending().first().is_some_and(|span| now_ns.saturating_sub(span.from_ns) >= WRITE_AFTER_NS) {
            self.write(&mut schedule)?;
        }
        Ok(f(&mut schedule))
    }

    fn advance(&self, schedule: &mut Locked<'_>, to_ns: u64) -> Result<(), Error> {
        while schedule.advance(to_ns) == Progress::SpansFull {
            self.write(schedule)?;
        }
        Ok(())
    }

    fn write(&self, schedule: &mut Locked<'_>) -> Result<(), Error> {
        // A writer that is killed between these two lets the spans be written again; the reader skips what it has.
        self.log.ran(schedule.pending())?;
        schedule.clear_pending();
        Ok(())
    }

    /// Ends the work of processes that have ended, each at its time.
    fn drop_ended(&self, schedule: &mut Locked<'_>, now_ns: u64) -> Result<(), Error> {
        if now_ns.saturating_sub(schedule.checked_ns) < CHECK_NS {
            return Ok(());
        }
        schedule.checked_ns = now_ns;
        let lives = |client: &Client| u32::try_from(client.pid).ok().and_then(start_time) == Some(client.start_time);
        let ended = schedule.clients().filter(|(_, client)| !lives(client));
        let mut ended: Vec<(u64, ClientSlot, u64)> =
            ended.map(|(slot, client)| (client.seen_ns.saturating_add(OUTLASTS_NS).min(now_ns), slot, client.load)).collect();
        ended.sort_unstable_by_key(|(end_ns, slot, _)| (*end_ns, slot.0));
        for (end_ns, slot, load) in ended {
            self.advance(schedule, end_ns)?;
            self.detach(schedule, slot, load)?;
        }
        Ok(())
    }

    fn detach(&self, schedule: &mut Locked<'_>, slot: ClientSlot, load: u64) -> Result<(), Error> {
        self.write(schedule)?;
        schedule.detach(slot);
        self.log.end(load, schedule.now_ns)
    }

    /// Writes what is known up to now.
    pub fn flush(&self) -> Result<(), Error> {
        self.with(|_| ())?;
        self.write(&mut self.shared.lock()?)
    }

    /// The process has a context from now on; `None` if all slots are in use.
    pub fn attach(&self, pid: u32, start_time: u64) -> Result<Option<ClientSlot>, Error> {
        self.with(|schedule| {
            let load = self.log.begin(pid, start_time, self.index, schedule.now_ns)?;
            let slot = schedule.attach(pid, start_time, load);
            if slot.is_none() {
                self.log.end(load, schedule.now_ns)?;
            }
            Ok(slot)
        })?
    }

    /// The process's last context is destroyed; its queued work ends.
    pub fn release(&self, slot: ClientSlot) -> Result<(), Error> {
        self.with(|_| ())?;
        let mut schedule = self.shared.lock()?;
        match schedule.client(slot).map(|client| client.load) {
            Some(load) => self.detach(&mut schedule, slot, load),
            None => Ok(()),
        }
    }

    /// Queues work; `None` if the client is detached.
    pub fn submit(&self, slot: ClientSlot, stream: StreamSlot, length_ns: u64) -> Result<Option<Position>, Error> {
        self.with(|schedule| {
            let now_ns = schedule.now_ns;
            schedule.client_mut(slot)?.seen_ns = now_ns;
            schedule.submit(slot, stream, length_ns)
        })
    }

    /// Whether the stream has reached the position. A detached client has no work.
    pub fn is_reached(&self, slot: ClientSlot, stream: StreamSlot, position: Position) -> Result<bool, Error> {
        self.with(|schedule| schedule.least_wait_ns(slot, stream, position).is_none_or(|wait_ns| wait_ns == 0))
    }

    /// Blocks until the stream has reached the position.
    pub fn wait(&self, slot: ClientSlot, stream: StreamSlot, position: Position) -> Result<(), Error> {
        loop {
            match self.with(|schedule| schedule.least_wait_ns(slot, stream, position))? {
                None | Some(0) => return Ok(()),
                Some(wait_ns) => std::thread::sleep(Duration::from_nanos(wait_ns).clamp(SHORTEST_SLEEP, LONGEST_SLEEP)),
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
