//! A function that may hang, in a thread of its own: it opens and reads files of other users, which may be on a file system that does not
//! respond.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Runs one request at a time. When this is dropped, its thread ends after the request that it may be in.
pub struct Patient<Q, A> {
    requests: Sender<Q>,
    answers: Receiver<A>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unanswered {
    /// Not in time. The thread is still in the request: its next answer would be that of this one.
    Late,
    /// The thread has ended.
    Ended,
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
        Ok(Self { requests, answers })
    }

    /// The answer, or this again; without an answer it is dropped.
    pub fn ask(self, request: Q, patience: Duration) -> Result<(A, Self), Unanswered> {
        self.requests.send(request).map_err(|_| Unanswered::Ended)?;
        match self.answers.recv_timeout(patience) {
            Ok(answer) => Ok((answer, self)),
            Err(RecvTimeoutError::Timeout) => Err(Unanswered::Late),
            Err(RecvTimeoutError::Disconnected) => Err(Unanswered::Ended),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const LATE: Duration = Duration::from_secs(30);

    #[test]
    fn a_request_that_hangs_is_left_to_its_thread_which_ends_after_it() {
        let (release, wait) = channel::<()>();
        let living = Arc::new(());
        let lives = Arc::clone(&living);
        let answer = move |n: u32| {
            let _lives = &lives;
            if n == 0 {
                let _released = wait.recv();
            }
            n
        };
        let patient = Patient::new("patient", answer).unwrap();
        let (answer, patient) = patient.ask(1, LATE).unwrap();
        assert_eq!(answer, 1);
        assert_eq!(patient.ask(0, Duration::from_millis(20)).err(), Some(Unanswered::Late));
        assert_eq!(Arc::strong_count(&living), 2);
        release.send(()).unwrap();
        let until = std::time::Instant::now() + LATE;
        while Arc::strong_count(&living) > 1 {
            assert!(std::time::Instant::now() < until, "the thread does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_thread_that_ended_is_not_a_late_answer() {
        let patient = Patient::new("patient", |_: u32| -> u32 { panic!("expected by this test") }).unwrap();
        assert_eq!(patient.ask(1, LATE).err(), Some(Unanswered::Ended));
    }
}
