//! Pages of the exporter, read at an interval as Prometheus reads them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;
use devkit::http::{Response, Server};
use prometheus_parse::{Scrape, Value};

/// A scrape that takes longer has failed, as with Prometheus' default.
const TIMEOUT: Duration = Duration::from_secs(10);

/// One sample line.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub metric: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

/// One scrape; without samples if it failed.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// Seconds since the reader's start.
    pub at: f64,
    pub took: f64,
    pub bytes: usize,
    pub samples: Vec<Sample>,
}

/// The counters, gauges and untyped samples of a page.
pub fn parse(text: &str) -> Result<Vec<Sample>> {
    let scrape = Scrape::parse(text.lines().map(|line| Ok(line.to_owned())))?;
    let sample = |sample: prometheus_parse::Sample| {
        let (Value::Counter(value) | Value::Gauge(value) | Value::Untyped(value)) = sample.value else { return None };
        let labels = sample.labels.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        Some(Sample { metric: sample.metric, labels, value })
    };
    Ok(scrape.samples.into_iter().filter_map(sample).collect())
}

pub fn get(port: u16, path: &str) -> Result<String> {
    let server = Server::tcp(([127, 0, 0, 1], port).into()).patience(TIMEOUT);
    Ok(String::from_utf8(server.get(path).and_then(Response::ok)?)?)
}

/// A thread that scrapes.
pub struct Reader {
    begun: Instant,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Page>>,
}

impl Reader {
    pub fn start(port: u16, path: &str, interval: Duration) -> Self {
        let (begun, stop) = (Instant::now(), Arc::new(AtomicBool::new(false)));
        let (path, until) = (path.to_owned(), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let (mut pages, mut next) = (Vec::new(), begun);
            while !until.load(Ordering::Relaxed) {
                let from = Instant::now();
                let text = get(port, &path).unwrap_or_default();
                let (took, at) = (from.elapsed().as_secs_f64(), (from - begun).as_secs_f64());
                // A page that cannot be parsed has no samples, as for Prometheus.
                pages.push(Page { at, took, bytes: text.len(), samples: parse(&text).unwrap_or_default() });
                next += interval;
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            pages
        });
        Self { begun, stop, thread }
    }

    /// Seconds since the start.
    pub fn now(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    pub fn end(self) -> Result<Vec<Page>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the thread that scrapes panicked"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_with_escapes_and_values_of_each_type_are_parsed() {
        let text = "# HELP a b\n# TYPE a counter\na{x=\"1\",y=\"p \\\"q\\\", r\"} 2.5\n# TYPE g gauge\ng NaN\nu 1e3\n";
        let samples = parse(text).unwrap();
        assert_eq!(samples.len(), 3, "{samples:?}");
        assert_eq!((samples[0].labels["x"].as_str(), samples[0].value), ("1", 2.5));
        assert!(samples[0].labels["y"].contains("q"), "{samples:?}");
        assert!(samples[1].value.is_nan() && samples[2].value == 1000.0);
    }
}
