//! Two scrapers with different intervals. The first asks for all families and checks every page, the second for those that Prometheus
//! gets, as OpenMetrics.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::accounts::{Problem, TimedPage};
use super::board::{Board, LifeAddress, Scrape, lock};
use super::interrupt;
use crate::parse;

/// Limit of the latency of a scrape, outside of times in which the agent cannot run.
pub const LATENCY_SECONDS: f64 = 1.0;
/// A stopped agent does not respond for as long.
const SILENT: Duration = Duration::from_secs(30);

/// A connection that is kept between scrapes, as Prometheus keeps it: the agent distinguishes scrapers by it.
struct KeptConnection {
    port: u16,
    stream: BufReader<TcpStream>,
}

impl KeptConnection {
    fn new(port: u16) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(SILENT))?;
        Ok(Self { port, stream: BufReader::new(stream) })
    }

    fn get(&mut self, path: &str, accept: &str) -> Result<String> {
        let port = self.port;
        let request = format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: {accept}\r\nUser-Agent: soak\r\n\r\n");
        self.stream.get_mut().write_all(request.as_bytes())?;
        let (mut status, mut length) = (String::new(), None);
        self.stream.read_line(&mut status)?;
        loop {
            let mut line = String::new();
            ensure!(self.stream.read_line(&mut line)? > 0, "the connection ended");
            let line = line.trim_end().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            length = length.or_else(|| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
        }
        let mut body = vec![0; length.context("a response without a length")?];
        self.stream.read_exact(&mut body)?;
        ensure!(status.starts_with("HTTP/1.1 200"), "GET {path}: {}", status.trim_end());
        Ok(String::from_utf8(body)?)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scraper {
    Parsing,
    OpenMetrics,
}

impl Scraper {
    pub fn name(self) -> &'static str {
        match self {
            Scraper::Parsing => "all families",
            Scraper::OpenMetrics => "default families",
        }
    }

    fn every(self) -> Duration {
        match self {
            Scraper::Parsing => Duration::from_millis(1000),
            Scraper::OpenMetrics => Duration::from_millis(2300),
        }
    }

    /// Uses the connection of the scrape before, if it was to the same agent and is still open.
    fn fetch(self, address: LifeAddress, kept: &mut Option<KeptConnection>) -> Result<String> {
        let mut connection = match kept.take().filter(|kept| kept.port == address.port) {
            Some(connection) => connection,
            None => KeptConnection::new(address.port)?,
        };
        let page = match self {
            Scraper::Parsing => connection.get("/metrics?collect%5B%5D=all", "text/plain"),
            Scraper::OpenMetrics => connection.get("/metrics", "application/openmetrics-text;version=1.0.0"),
        }?;
        *kept = Some(connection);
        Ok(page)
    }

    /// Scrapes until the run is over.
    pub fn run(self, board: &Board) {
        let mut connection = None;
        while !board.is_over() {
            let address = lock(&board.state).agent;
            if let Some(address) = address {
                self.scrape(board, address, &mut connection);
            }
            let _interrupted = interrupt::pause(self.every());
        }
    }

    fn scrape(self, board: &Board, address: LifeAddress, connection: &mut Option<KeptConnection>) {
        let begun = board.now();
        let page = self.fetch(address, connection);
        let ended = board.now();
        {
            let mut state = lock(&board.state);
            let excused = state.is_excused(begun) || state.agent != Some(address);
            let scrape = Scrape { begun, took: ended - begun, excused };
            state.scrapes.entry(self.name()).or_default().push(scrape);
            match &page {
                Err(error) if !excused => state.report(Problem::new("scrape failed", format!("at {begun:.1} s: {error:#}"))),
                Ok(text) if self == Scraper::OpenMetrics && !text.ends_with("# EOF\n") => {
                    state.report(Problem::new("page incomplete", format!("at {begun:.1} s: it ends without # EOF")));
                }
                Ok(_) if scrape.took > LATENCY_SECONDS && !excused => {
                    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
                    let text = format!("at {begun:.1} s: {:.2} s; load of the machine {}", scrape.took, load.trim_end());
                    state.report(Problem::new("slow scrape", text));
                }
                _ => {}
            }
        }
        if let (Scraper::Parsing, Ok(text)) = (self, page) {
            board.take(address, TimedPage { begun, ended, samples: parse(&text) });
        }
    }
}
