//! One process that has called cuInit: its GPUs, its handles, and its thread, which keeps schedule and records up to date.
//!
//! A forked child gets an instance of its own when it calls cuInit. The parent's instance stays in the child's memory and is never used.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::thread::Thread;
use std::time::Duration;

use crate::error::Error;
use crate::gpu::{FOLDER, Gpu, now_ns};
use crate::schedule::{ClientSlot, DEFAULT_STREAM, Position, StreamSlot};
use crate::wait_log::{OF_LIBRARY, WaitLog, locked};

/// Interval of the thread while there is work or waiting, and without.
const BUSY_INTERVAL: Duration = Duration::from_millis(4);
const IDLE_INTERVAL: Duration = Duration::from_millis(50);

/// For this long the least wait is trusted: the end of another process makes it shorter.
const TRUSTED_NS: u64 = 1_000_000;

/// A handle of a context, stream, event or graph; NULL is not one.
pub type Handle = usize;

/// A stream that was resolved: where its work is queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    pub gpu: usize,
    pub client: ClientSlot,
    pub stream: StreamSlot,
}

impl Queue {
    fn key(self) -> StreamKey {
        StreamKey { gpu: self.gpu, stream: self.stream.0 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct StreamKey {
    gpu: usize,
    stream: usize,
}

/// What the process knows of a stream without the schedule. So calls without work, and most queries, do not take the lock of the GPU.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    submitted: Position,
    reached: Position,
    /// A position that is not reached before this time.
    not_before: (Position, u64),
}

/// A place in a queue that can be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    pub queue: Queue,
    pub position: Position,
}

/// The process's slot on a GPU, for all its contexts there.
#[derive(Clone, Copy, Debug)]
struct Attached {
    client: ClientSlot,
    contexts: u64,
}

#[derive(Default)]
pub struct Handles {
    /// The GPU of each context.
    pub contexts: BTreeMap<Handle, usize>,
    attached: BTreeMap<usize, Attached>,
    pub streams: BTreeMap<Handle, Queue>,
    /// The default streams of threads, by the threads' numbers and GPUs.
    pub thread_streams: BTreeMap<(u64, usize), Queue>,
    /// The mark of each event; an event that was not recorded has none.
    pub events: BTreeMap<Handle, Option<Mark>>,
    /// The length of the work of each graph and of each executable graph.
    pub graphs_ns: BTreeMap<Handle, u64>,
    pub launchable_ns: BTreeMap<Handle, u64>,
    last: Handle,
}

impl Handles {
    /// Handles look like addresses: aligned, and not small.
    pub fn new_handle(&mut self) -> Handle {
        self.last += 1;
        0x1000 + self.last * 0x10
    }

    /// The default stream of the process on the GPU.
    pub fn default_queue(&self, gpu: usize) -> Option<Queue> {
        self.attached.get(&gpu).map(|attached| Queue { gpu, client: attached.client, stream: DEFAULT_STREAM })
    }
}

pub struct Process {
    pub pid: u32,
    start_time: u64,
    pub gpus: Vec<Gpu>,
    handles: Mutex<Handles>,
    known: Mutex<BTreeMap<StreamKey, Known>>,
    waits: WaitLog,
    thread: OnceLock<Thread>,
    /// Whether the thread sleeps for the idle interval.
    rests: AtomicBool,
}

impl Process {
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let pid = std::process::id();
        let start_time = devkit::process::start_time(pid).ok_or(Error::NoStartTime { pid })?;
        let gpus = Gpu::open_all(dir)?;
        if gpus.is_empty() {
            return Err(Error::NoGpu { dir: dir.join(FOLDER) });
        }
        Ok(Self {
            pid,
            start_time,
            gpus,
            handles: Mutex::default(),
            known: Mutex::default(),
            waits: WaitLog::open(dir, OF_LIBRARY, pid, start_time)?,
            thread: OnceLock::new(),
            rests: AtomicBool::new(false),
        })
    }

    pub fn handles(&self) -> MutexGuard<'_, Handles> {
        locked(&self.handles)
    }

    pub fn gpu(&self, queue: Queue) -> Option<&Gpu> {
        self.gpus.get(queue.gpu)
    }

    /// A new context on the GPU; `None` if too many processes use it.
    pub fn create_context(&self, gpu: &Gpu) -> Result<Option<Handle>, Error> {
        let mut handles = self.handles();
        match handles.attached.get_mut(&gpu.index) {
            Some(attached) => attached.contexts += 1,
            None => {
                let Some(client) = gpu.attach(self.pid, self.start_time)? else { return Ok(None) };
                handles.attached.insert(gpu.index, Attached { client, contexts: 1 });
            }
        }
        let handle = handles.new_handle();
        handles.contexts.insert(handle, gpu.index);
        drop(handles);
        self.wake();
        Ok(Some(handle))
    }

    /// Destroys a context. With the last one on a GPU the process's work there ends. `false` if there is no such context.
    pub fn destroy_context(&self, handle: Handle) -> Result<bool, Error> {
        let mut handles = self.handles();
        let Some(gpu) = handles.contexts.remove(&handle) else { return Ok(false) };
        let Some(attached) = handles.attached.get_mut(&gpu) else { return Ok(true) };
        attached.contexts -= 1;
        if attached.contexts == 0 {
            let client = attached.client;
            handles.attached.remove(&gpu);
            handles.streams.retain(|_, queue| queue.gpu != gpu);
            handles.thread_streams.retain(|(_, of), _| *of != gpu);
            drop(handles);
            locked(&self.known).retain(|key, _| key.gpu != gpu);
            self.waits.write()?;
            self.gpus.get(gpu).map_or(Ok(()), |gpu| gpu.release(client))?;
        }
        Ok(true)
    }

    /// Opens a stream; `None` if the process has too many.
    pub fn open_stream(&self, gpu: usize) -> Result<Option<Queue>, Error> {
        let (Some(default), Some(shared)) = (self.handles().default_queue(gpu), self.gpus.get(gpu)) else { return Ok(None) };
        let stream = shared.with(|schedule| schedule.open_stream(default.client))?;
        Ok(stream.map(|stream| Queue { stream, ..default }))
    }

    /// Queues work of this length; `None` if the process has no context on the GPU any more.
    pub fn submit(&self, queue: Queue, length_ns: u64) -> Result<Option<Mark>, Error> {
        let Some(gpu) = self.gpu(queue) else { return Ok(None) };
        let Some(position) = gpu.submit(queue.client, queue.stream, length_ns)? else { return Ok(None) };
        let mut known = locked(&self.known);
        let one = known.entry(queue.key()).or_default();
        one.submitted = one.submitted.max(position);
        drop(known);
        self.wake();
        Ok(Some(Mark { queue, position }))
    }

    /// The marks after all work so far: of one stream, or of all streams of the process on the GPU. Only this process submits to its
    /// streams, so the schedule is not needed.
    pub fn ends(&self, queue: Queue, all_streams: bool) -> Vec<Mark> {
        let known = locked(&self.known);
        let wanted = |key: &StreamKey| key.gpu == queue.gpu && (all_streams || key.stream == queue.stream.0);
        let unreached = known.iter().filter(|(key, one)| wanted(key) && one.reached < one.submitted);
        let mark = |(key, one): (&StreamKey, &Known)| Mark {
            queue: Queue { stream: StreamSlot(key.stream), ..queue },
            position: one.submitted,
        };
        unreached.map(mark).collect()
    }

    fn known(&self, queue: Queue) -> Known {
        locked(&self.known).get(&queue.key()).copied().unwrap_or_default()
    }

    fn reached(&self, mark: Mark) {
        let mut known = locked(&self.known);
        let one = known.entry(mark.queue.key()).or_default();
        one.reached = one.reached.max(mark.position);
    }

    pub fn is_reached(&self, mark: Mark) -> Result<bool, Error> {
        let (known, now_ns) = (self.known(mark.queue), now_ns());
        if known.reached >= mark.position {
            return Ok(true);
        }
        let (position, not_before_ns) = known.not_before;
        let Some(gpu) = self.gpu(mark.queue).filter(|_| mark.position < position || now_ns >= not_before_ns) else {
            return Ok(false);
        };
        match gpu.least_wait_ns(mark.queue.client, mark.queue.stream, mark.position)? {
            0 => {
                self.reached(mark);
                Ok(true)
            }
            wait_ns => {
                let not_before = (mark.position, now_ns + wait_ns.min(TRUSTED_NS));
                locked(&self.known).entry(mark.queue.key()).or_default().not_before = not_before;
                Ok(false)
            }
        }
    }

    /// Runs the body of a blocking call on a GPU, and counts its time as waiting.
    pub fn blocking<T>(&self, gpu: usize, body: impl FnOnce() -> T) -> T {
        self.waits.enter(gpu);
        self.wake();
        let result = body();
        self.waits.leave(gpu);
        result
    }

    /// Blocks until all marks are reached.
    pub fn wait(&self, marks: &[Mark]) -> Result<(), Error> {
        for mark in marks {
            if let Some(gpu) = self.gpu(mark.queue).filter(|_| self.known(mark.queue).reached < mark.position) {
                gpu.wait(mark.queue.client, mark.queue.stream, mark.position)?;
                self.reached(*mark);
            }
        }
        Ok(())
    }

    fn wake(&self) {
        if self.rests.swap(false, Ordering::Relaxed)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }

    /// The body of the library's thread.
    pub fn keep_up(&self) {
        let _first = self.thread.set(std::thread::current());
        let mut reported = false;
        loop {
            let busy = self.update().unwrap_or_else(|error| {
                // Once: the folder of a world may be removed while the process lives.
                if !std::mem::replace(&mut reported, true) {
                    report(&error);
                }
                false
            });
            self.rests.store(!busy, Ordering::Relaxed);
            std::thread::park_timeout(if busy { BUSY_INTERVAL } else { IDLE_INTERVAL });
        }
    }

    /// Returns whether there is work or waiting.
    fn update(&self) -> Result<bool, Error> {
        let attached: Vec<(usize, ClientSlot)> = self.handles().attached.iter().map(|(gpu, one)| (*gpu, one.client)).collect();
        let mut busy = self.waits.write()?;
        for (gpu, client) in attached {
            if let Some(gpu) = self.gpus.get(gpu) {
                busy |= gpu.seen(client)? > 0;
            }
        }
        Ok(busy)
    }
}

/// Prints an error that the caller of the library cannot receive in full.
pub fn report(error: &dyn std::error::Error) {
    match error.source() {
        Some(source) => eprintln!("cuda-sim: {error}: {source}"),
        None => eprintln!("cuda-sim: {error}"),
    }
}
