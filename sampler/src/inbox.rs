//! What the core thread waits for beside the kernel: observations from the GPU threads and questions from people. A channel with
//! a descriptor, so that one `poll` waits for everything.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::event::{EventfdFlags, eventfd};
use sampler_core::observation::Observation;
use tokio::sync::oneshot;

use crate::query::{KnownSubject, LivingProcess, Subject};

pub enum Message {
    Observation(Observation),
    Question(Question),
}

pub enum Question {
    Explain(Subject, oneshot::Sender<Option<KnownSubject>>),
    /// Ids of containers that begin so.
    Ids(String, oneshot::Sender<Vec<String>>),
    Processes(oneshot::Sender<Vec<LivingProcess>>),
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
        // Full means that it rings already.
        let _rings = rustix::io::write(&*self.wakeup, &1u64.to_ne_bytes());
        Ok(())
    }

    pub fn observe(&self, observation: Observation) -> Result<(), Closed> {
        self.send(Message::Observation(observation))
    }

    pub async fn explain(&self, subject: Subject) -> Option<KnownSubject> {
        let (answer, answered) = oneshot::channel();
        self.send(Message::Question(Question::Explain(subject, answer))).ok()?;
        answered.await.ok().flatten()
    }

    pub async fn ids(&self, begin: String) -> Vec<String> {
        let (answer, answered) = oneshot::channel();
        if self.send(Message::Question(Question::Ids(begin, answer))).is_err() {
            return Vec::new();
        }
        answered.await.unwrap_or_default()
    }

    pub async fn processes(&self) -> Option<Vec<LivingProcess>> {
        let (answer, answered) = oneshot::channel();
        self.send(Message::Question(Question::Processes(answer))).ok()?;
        answered.await.ok()
    }
}

impl Inbox {
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.wakeup.as_fd()
    }

    /// The next message that is there.
    pub fn take(&self) -> Option<Message> {
        self.from.try_recv().ok()
    }

    /// Before taking, so that what comes after rings again.
    pub fn silence(&self) {
        let mut count = [0u8; 8];
        let _was = rustix::io::read(&*self.wakeup, &mut count);
    }
}
