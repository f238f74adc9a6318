//! A function that may hang, in a thread of its own: it opens and reads files of other users, which may be on a file system that does not
//! respond.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// Runs one request at a time. When this is dropped, its thread ends after the request that it may be in.
pub struct Patient<Q, A> {
    requests: Sender<Q>,
    answers: Receiver<A>,
    /// The answer to an earlier request has not arrived.
    is_late: bool,
}

impl<Q: Send + 'static, A: Send + 'static> Patient<Q, A> {
    pub fn new(thread: &str, mut answer: impl FnMut(Q) -> A + Send + 'static) -> io::Result<Self> {
        let (requests, asked) = channel();
        let (replies, answers) = channel();
        let run = move || {
            for request in asked {
                if replies.send(answer(request)).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name(thread.into()).spawn(run)?;
        Ok(Self { requests, answers, is_late: false })
    }

    /// `None` if there is no answer within this time, or if that of an earlier request has not arrived: it is dropped when it does.
    pub fn ask(&mut self, request: Q, patience: Duration) -> Option<A> {
        if self.is_late {
            self.is_late = self.answers.try_recv().is_err();
        }
        if self.is_late || self.requests.send(request).is_err() {
            return None;
        }
        let answer = self.answers.recv_timeout(patience).ok();
        self.is_late = answer.is_none();
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_hangs_delays_no_later_one_and_its_answer_is_dropped() {
        let (release, wait) = channel::<()>();
        let answer = move |n: u32| {
            if n == 0 {
                let _released = wait.recv();
            }
            n
        };
        let mut patient = Patient::new("patient", answer).unwrap();
        let (soon, late) = (Duration::from_millis(20), Duration::from_secs(30));
        assert_eq!(patient.ask(1, late), Some(1));
        assert_eq!((patient.ask(0, soon), patient.ask(2, late)), (None, None));
        release.send(()).unwrap();
        let until = std::time::Instant::now() + late;
        let answer = loop {
            match patient.ask(3, late) {
                None if std::time::Instant::now() < until => std::thread::sleep(soon),
                answer => break answer,
            }
        };
        assert_eq!(answer, Some(3));
    }
}
