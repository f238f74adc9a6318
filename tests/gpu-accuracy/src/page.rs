//! Pages of the exporter, read at an interval as Prometheus reads them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use devkit::http::{Response, Server};

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

/// The samples of a page in Prometheus' text format, or in OpenMetrics.
pub fn parse(text: &str) -> Result<Vec<Sample>> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| sample(line).with_context(|| format!("not a sample: {line}"))).collect()
}

fn sample(line: &str) -> Option<Sample> {
    let end = line.find(|c: char| c == '{' || c.is_whitespace())?;
    let (metric, mut rest) = line.split_at(end);
    let is_name = metric.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':');
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.trim_start().strip_prefix('{') {
        (labels, rest) = braces(inside)?;
    }
    let value = rest.split_whitespace().next()?.parse().ok()?;
    (is_name && !metric.is_empty()).then(|| Sample { metric: metric.to_owned(), labels, value })
}

/// The labels up to the closing brace, and what follows it.
fn braces(mut rest: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_whitespace() || c == ',');
        if let Some(after) = rest.strip_prefix('}') {
            return Some((labels, after));
        }
        let (name, after) = rest.split_once('=')?;
        let (value, after) = quoted(after.trim_start().strip_prefix('"')?)?;
        labels.insert(name.trim().to_owned(), value);
        rest = after;
    }
}

/// The value up to the closing quote, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match characters.next()?.1 {
                'n' => value.push('\n'),
                escaped => value.push(escaped),
            },
            _ => value.push(c),
        }
    }
    None
}

pub fn get(port: u16, path: &str) -> Result<String> {
    let server = Server::tcp(([127, 0, 0, 1], port).into()).within(TIMEOUT);
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
                // A page that cannot be parsed is a failed scrape, as for Prometheus.
                let page = get(port, &path).and_then(|text| Ok((text.len(), parse(&text)?)));
                let (took, at) = (from.elapsed().as_secs_f64(), (from - begun).as_secs_f64());
                let (bytes, samples) = page.unwrap_or_default();
                pages.push(Page { at, took, bytes, samples });
                // Scrapes that are missed while one takes long are left out.
                while next <= Instant::now() {
                    next += interval;
                }
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
    fn labels_and_values_are_parsed_as_written() {
        let text = "# TYPE a counter\na{x=\"1\",y=\"p \\\"q\\\", r}=\\\\\\n\"} 2.5 1700000000000\ng:g NaN\nu{ a = \"1\", b=\"\", } 1e3 # {} 1\n# EOF\n";
        let samples = parse(text).unwrap();
        let [a, g, u] = samples.as_slice() else { panic!("{samples:?}") };
        assert_eq!((a.labels["x"].as_str(), a.labels["y"].as_str(), a.value), ("1", "p \"q\", r}=\\\n", 2.5));
        assert!(g.metric == "g:g" && g.value.is_nan());
        assert_eq!((u.labels["a"].as_str(), u.labels["b"].as_str(), u.value), ("1", "", 1000.0));
        for wrong in ["<html>", "a{x=\"1\" 2", "a{x=1} 2", "a", "a b"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
