//! Executes the queries to sources that read files: usually one thread reads for all sources, and a read that hangs delays no other source.
//!
//! ```text
//!  task --queries--> waiting --> worker (a blocking thread of the runtime; ends when nothing waits) --replies, together--> task
//!                       |          in a read for longer than STALLED_AFTER: the task starts another worker
//!                       |          in a read for longer than TIMEOUT: the task gets a timeout, and the reply is dropped
//!                       '-- of a source with MAX_STALLED stalled reads: an error at once
//! ```
//! A worker prefers queries to sources without a stalled read. The threads are bounded by the stalled reads of all sources, and one.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sampler_labels::{FILES_IN_FLIGHT, Query, Source};
use tokio::sync::mpsc::Sender;

use super::message::LabelMessage;
use super::source::reply::{SourceReply, TIMEOUT};

/// A read of a local file takes microseconds; this long a read delays others without being noticed.
const STALLED_AFTER: Duration = Duration::from_millis(50);
/// A read that hangs keeps its thread even after its query timed out. As many as the resolver has in progress at a source.
const MAX_STALLED: usize = FILES_IN_FLIGHT;
/// Replies are sent together, but none waits for longer than this, or until the next read has stalled.
const REPLIES_WITHIN: Duration = Duration::from_millis(1);

struct ActiveRead {
    number: u64,
    query: Query,
    since: Instant,
    timed_out: bool,
}

impl ActiveRead {
    fn is_stalled(&self) -> bool {
        self.since.elapsed() >= STALLED_AFTER
    }
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Query>,
    active: Vec<ActiveRead>,
    /// Replies that are not sent yet. Not the worker's own, since its next read may hang.
    replies: Vec<(Query, SourceReply)>,
    /// Including those in a read.
    workers: usize,
    /// Reads so far.
    count: u64,
}

/// The next thing that a worker has to do.
enum Work {
    Read(u64, Query),
    Refuse(Query),
}

impl Queue {
    fn stalled(&self, source: Source) -> usize {
        self.active.iter().filter(|read| read.query.source == source && read.is_stalled()).count()
    }

    /// Takes the next query; `None` ends the worker.
    fn next(&mut self) -> Option<Work> {
        let preferred = self.waiting.iter().position(|query| self.stalled(query.source) == 0).unwrap_or(0);
        let Some(query) = self.waiting.remove(preferred) else {
            self.workers -= 1;
            return None;
        };
        if self.stalled(query.source) >= MAX_STALLED {
            return Some(Work::Refuse(query));
        }
        self.count += 1;
        self.active.push(ActiveRead { number: self.count, query: query.clone(), since: Instant::now(), timed_out: false });
        Some(Work::Read(self.count, query))
    }

    /// The end of a read. The reply is dropped if the read has timed out.
    fn finished(&mut self, number: u64, query: Query, reply: SourceReply) {
        let position = self.active.iter().position(|read| read.number == number);
        if position.is_some_and(|position| !self.active.swap_remove(position).timed_out) {
            self.replies.push((query, reply));
        }
    }

    /// Whether another worker has to start.
    fn needs_worker(&self) -> bool {
        !self.waiting.is_empty() && self.workers == self.active.iter().filter(|read| read.is_stalled()).count()
    }
}

/// Executes a query.
type Read = dyn Fn(&Query) -> SourceReply + Send + Sync;

pub(super) struct FileReader {
    queue: Arc<Mutex<Queue>>,
    read: Arc<Read>,
    replies: Sender<LabelMessage>,
}

impl FileReader {
    pub fn new(read: Arc<Read>, replies: Sender<LabelMessage>) -> Self {
        Self { queue: Arc::default(), read, replies }
    }

    /// Adds queries; [`FileReader::supervise`] must follow.
    pub fn add(&self, queries: impl IntoIterator<Item = Query>) {
        lock(&self.queue).waiting.extend(queries);
    }

    /// Starts a worker if one is needed. Returns replies, timeouts among them, and the time until the next call.
    pub fn supervise(&self) -> (Vec<(Query, SourceReply)>, Duration) {
        let mut queue = lock(&self.queue);
        if queue.needs_worker() {
            queue.workers += 1;
            let (queue, read, replies) = (Arc::clone(&self.queue), Arc::clone(&self.read), self.replies.clone());
            tokio::task::spawn_blocking(move || work(&queue, &*read, &replies));
        }
        let late = queue.active.iter_mut().filter(|read| !read.timed_out && read.since.elapsed() >= TIMEOUT);
        let timeouts = late.map(|read| {
            read.timed_out = true;
            let reply = SourceReply::timeout(format!("no response within {} s", TIMEOUT.as_secs()));
            (read.query.clone(), reply)
        });
        let mut replies: Vec<_> = timeouts.collect();
        // A worker that continues sends its replies itself.
        if queue.active.iter().any(ActiveRead::is_stalled) {
            replies.append(&mut queue.replies);
        }
        let left = |limit: Duration, read: &ActiveRead| limit.saturating_sub(read.since.elapsed());
        let timeout = queue.active.iter().filter(|read| !read.timed_out).map(|read| left(TIMEOUT, read)).min();
        let stall = queue.active.iter().filter(|read| !read.is_stalled()).map(|read| left(STALLED_AFTER, read)).max();
        // A worker that is not in a read is about to begin one.
        let is_waiting = !queue.waiting.is_empty() || !queue.replies.is_empty();
        let stall = is_waiting.then(|| stall.unwrap_or(STALLED_AFTER));
        (replies, timeout.into_iter().chain(stall).min().unwrap_or(Duration::MAX))
    }
}

/// Ignores poisoning: nothing that runs with the lock held can panic half way.
fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

fn work(queue: &Mutex<Queue>, read: &Read, to: &Sender<LabelMessage>) {
    let mut sent_at = Instant::now();
    loop {
        let next = lock(queue).next();
        let is_last = next.is_none();
        match next {
            Some(Work::Read(number, query)) => {
                // A panic must not leave the query pending forever.
                let reply = catch_unwind(AssertUnwindSafe(|| read(&query)));
                let reply = reply.unwrap_or_else(|_| SourceReply::error("the read panicked"));
                lock(queue).finished(number, query, reply);
            }
            Some(Work::Refuse(query)) => {
                lock(queue).replies.push((query, SourceReply::error("earlier reads of this source still hang")));
            }
            None => {}
        }
        if is_last || sent_at.elapsed() >= REPLIES_WITHIN {
            let replies = std::mem::take(&mut lock(queue).replies);
            if !replies.is_empty() {
                // The task ends only with the process.
                let _ended = to.blocking_send(LabelMessage::FilesRead(replies));
            }
            sent_at = Instant::now();
        }
        if is_last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use sampler_core::cgroup_path::parse;
    use sampler_core::identity::ContainerRecord;
    use sampler_core::units::{BootNs, ContainerKey};
    use sampler_labels::TargetId;
    use tokio::sync::mpsc::{Receiver, channel};

    use super::*;

    fn query(n: u64, source: Source) -> Query {
        let cgroup_path = format!("/docker/{n:064x}");
        let (key, identity, created) = (ContainerKey(n), parse(&cgroup_path), BootNs(0));
        let record = ContainerRecord { key, cgroup_path, identity, created, creation_seen: true };
        Query::unscheduled(Arc::new(record), TargetId(0), source, None)
    }

    /// A reader in which reads of the logs block while this is set.
    fn reader(hang: &Arc<AtomicBool>) -> (FileReader, Receiver<LabelMessage>) {
        let (to, inbox) = channel(1_024);
        let hang = Arc::clone(hang);
        let read = move |query: &Query| {
            while query.source == Source::Logs && hang.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_ne!(query.key.0, PANICS, "the panic of a test");
            SourceReply::not_found_because(query.key.0)
        };
        (FileReader::new(Arc::new(read), to), inbox)
    }

    const PANICS: u64 = 13;
    /// Long enough for a machine with other work.
    const DEADLINE: Duration = Duration::from_secs(60);

    /// Supervises until there are so many replies; returns key and detail of each, sorted.
    async fn replies(reader: &FileReader, inbox: &mut Receiver<LabelMessage>, count: usize) -> Vec<(u64, String)> {
        let (mut all, from) = (Vec::new(), Instant::now());
        while all.len() < count {
            assert!(from.elapsed() < DEADLINE, "{all:?}");
            let (more, wait) = reader.supervise();
            all.extend(more.into_iter().map(|(query, reply)| (query.key.0, reply.detail)));
            match tokio::time::timeout(wait.min(Duration::from_millis(5)), inbox.recv()).await {
                Ok(Some(LabelMessage::FilesRead(replies))) => {
                    all.extend(replies.into_iter().map(|(query, reply)| (query.key.0, reply.detail)));
                }
                Ok(_) => panic!("only replies are sent"),
                Err(_) => {}
            }
        }
        all.sort();
        all
    }

    /// Waits until all workers have ended.
    async fn idle(reader: &FileReader) {
        let from = Instant::now();
        while lock(&reader.queue).workers > 0 {
            assert!(from.elapsed() < DEADLINE);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(lock(&reader.queue).active.is_empty() && reader.supervise().1 == Duration::MAX);
    }

    #[tokio::test]
    async fn every_query_gets_one_reply_from_one_worker() {
        let (reader, mut inbox) = reader(&Arc::default());
        for n in 0..100 {
            reader.add([query(n, Source::Bundle), query(n + 100, Source::DockerFile)]);
            reader.supervise();
        }
        assert!(lock(&reader.queue).workers <= 1);
        let expect = |n: u64| (n, if n == PANICS { "the read panicked".to_owned() } else { n.to_string() });
        assert_eq!(replies(&reader, &mut inbox, 200).await, (0..200).map(expect).collect::<Vec<_>>());
        idle(&reader).await;
        assert!(inbox.try_recv().is_err());
    }

    #[tokio::test]
    async fn a_source_that_hangs_delays_no_other_source() {
        let hang = Arc::new(AtomicBool::new(true));
        let (reader, mut inbox) = reader(&hang);
        let (first, second) = (1_000 + MAX_STALLED as u64, 1_001 + MAX_STALLED as u64);
        reader.add((1_000..=second).map(|n| query(n, Source::Logs)));
        reader.add([query(1, Source::Bundle)]);
        assert_eq!(replies(&reader, &mut inbox, 1).await, [(1, "1".to_owned())]);
        // All threads of the source hang: further queries to it fail at once, and others continue.
        let hangs = "earlier reads of this source still hang".to_owned();
        assert_eq!(replies(&reader, &mut inbox, 2).await, [(first, hangs.clone()), (second, hangs)]);
        assert!(lock(&reader.queue).workers >= MAX_STALLED);
        reader.add([query(2, Source::Bundle)]);
        assert_eq!(replies(&reader, &mut inbox, 1).await, [(2, "2".to_owned())]);
        // The others time out, once each, and their late replies are dropped.
        let timed_out = |n| (n, "no response within 5 s".to_owned());
        assert_eq!(replies(&reader, &mut inbox, MAX_STALLED).await, (1_000..first).map(timed_out).collect::<Vec<_>>());
        hang.store(false, Ordering::Relaxed);
        idle(&reader).await;
        assert!(inbox.try_recv().is_err());
    }
}
