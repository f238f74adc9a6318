//! The input of the core thread in addition to kernel events: observations from the GPU threads and queries. A channel with a
//! descriptor, so that one `poll` waits for everything.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use sampler_core::observation::Observation;
use sampler_core::pipeline::GpuProcess;
use tokio::sync::oneshot;

use crate::query::{KnownSubject, LivingProcess, Subject};

/// How often the core takes its input if nothing wakes it. A sample waits longer than that for its process sample, and a batch for a read of
/// the loss counters, so it is not attributed later; to wake the core for each of a hundred batches a second costs more than all its work.
pub const TAKE_EVERY: Duration = Duration::from_millis(100);

pub enum Message {
    Observation(Observation),
    Query(Query),
}

pub enum Query {
    Explain(Subject, oneshot::Sender<Option<KnownSubject>>),
    /// Container ids with this prefix.
    Ids(String, oneshot::Sender<Vec<String>>),
    Processes(oneshot::Sender<Vec<LivingProcess>>),
    GpuProcesses(oneshot::Sender<Vec<GpuProcess>>),
    /// A snapshot of now.
    Publish(oneshot::Sender<()>),
}

#[derive(Clone)]
pub struct CoreSender {
    to: Sender<Message>,
    wakeup: Arc<OwnedFd>,
}

pub struct Inbox {
    from: Receiver<Message>,
    wakeup: Arc<OwnedFd>,
}

/// The core thread has ended.
#[derive(Debug)]
pub struct Closed;

pub fn inbox() -> std::io::Result<(CoreSender, Inbox)> {
    let wakeup = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
    let (to, from) = channel();
    Ok((CoreSender { to, wakeup: Arc::clone(&wakeup) }, Inbox { from, wakeup }))
}

impl CoreSender {
    pub fn send(&self, message: Message) -> Result<(), Closed> {
        self.to.send(message).map_err(|_| Closed)?;
        self.wake();
        Ok(())
    }

    /// Sends several observations that wake the core once.
    pub fn observe_all(&self, observations: impl Iterator<Item = Observation>) -> Result<(), Closed> {
        let mut sent = false;
        for observation in observations {
            self.observe_later(observation)?;
            sent = true;
        }
        if sent {
            self.wake();
        }
        Ok(())
    }

    fn wake(&self) {
        // Fails only if the counter is at its maximum, and then the descriptor is readable already.
        let _written = rustix::io::write(&*self.wakeup, &1u64.to_ne_bytes());
    }

    /// Sends without waking the core, which takes its input at least every [`TAKE_EVERY`].
    pub fn observe_later(&self, observation: Observation) -> Result<(), Closed> {
        self.to.send(Message::Observation(observation)).map_err(|_| Closed)
    }

    pub fn observe(&self, observation: Observation) -> Result<(), Closed> {
        self.send(Message::Observation(observation))
    }

    /// `None` if the core thread has ended.
    async fn ask<T>(&self, query: impl FnOnce(oneshot::Sender<T>) -> Query) -> Option<T> {
        let (reply, replied) = oneshot::channel();
        self.send(Message::Query(query(reply))).ok()?;
        replied.await.ok()
    }

    pub async fn explain(&self, subject: Subject) -> Option<KnownSubject> {
        self.ask(|reply| Query::Explain(subject, reply)).await.flatten()
    }

    pub async fn ids(&self, prefix: String) -> Vec<String> {
        self.ask(|reply| Query::Ids(prefix, reply)).await.unwrap_or_default()
    }

    /// Returns once the published snapshot is of now, or after `patience`.
    pub async fn publish(&self, patience: Duration) {
        let _late = tokio::time::timeout(patience, self.ask(Query::Publish)).await;
    }

    /// For a thread of its own; `None` if the core thread has ended.
    pub fn gpu_processes(&self) -> Option<Vec<GpuProcess>> {
        let (reply, replied) = oneshot::channel();
        self.send(Message::Query(Query::GpuProcesses(reply))).ok()?;
        replied.blocking_recv().ok()
    }

    pub async fn processes(&self) -> Option<Vec<LivingProcess>> {
        self.ask(Query::Processes).await
    }
}

impl Inbox {
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.wakeup.as_fd()
    }

    /// The next available message.
    pub fn take(&self) -> Option<Message> {
        self.from.try_recv().ok()
    }

    /// Must be called before taking messages, so that a message sent afterwards makes the descriptor readable again.
    pub fn clear_wakeup(&self) {
        let mut count = [0u8; 8];
        let _count = rustix::io::read(&*self.wakeup, &mut count);
    }
}
