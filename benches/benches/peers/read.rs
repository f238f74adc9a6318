//! Reads every client's page once a second, as Prometheus would, and keeps all pages.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gpu_sampler_tests::{Sample, get, parse};

use crate::clients::Client;

pub const EVERY: Duration = Duration::from_secs(1);

/// One page: when it was requested, in seconds after the first, and its contents; empty if the request failed.
pub struct Page {
    pub at_s: f64,
    pub text: String,
    pub samples: Vec<Sample>,
}

/// Pages per client, in the order of the clients.
pub type Seen = Vec<Vec<Page>>;

pub struct Reader {
    begun: Instant,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Vec<Page>>>,
}

impl Reader {
    pub fn start(clients: &[Client]) -> Self {
        let (begun, stop) = (Instant::now(), Arc::new(AtomicBool::new(false)));
        let thread = |client: &Client| {
            let (port, stop) = (client.port, Arc::clone(&stop));
            std::thread::spawn(move || read(port, begun, &stop))
        };
        Self { begun, threads: clients.iter().map(thread).collect(), stop }
    }

    /// Seconds since the first page.
    pub fn mark(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    pub fn until(&self, end: Instant) {
        std::thread::sleep(end.saturating_duration_since(Instant::now()));
    }

    pub fn end(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().map(|thread| thread.join().unwrap_or_default()).collect()
    }
}

fn read(port: u16, begun: Instant, stop: &AtomicBool) -> Vec<Page> {
    let mut pages = Vec::new();
    let mut next = begun;
    while !stop.load(Ordering::Relaxed) {
        let at_s = begun.elapsed().as_secs_f64();
        let text = get(port, "/metrics").unwrap_or_default();
        pages.push(Page { at_s, samples: parse(&text), text });
        next += EVERY;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    pages
}
