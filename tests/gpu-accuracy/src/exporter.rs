//! The exporter under test: started in a cgroup of its own, and watched until it ends.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::mapping::Mapping;
use crate::node::{Node, Running, inside, sleep_until};
use crate::page::{get, parse};

const STARTS_WITHIN: Duration = Duration::from_secs(60);
/// Lines of its standard error that are kept for messages.
const LINES: usize = 5;
/// A program that has ended has written its last lines by then, also if a descendant of it keeps the pipe open.
const LAST_LINES: Duration = Duration::from_millis(200);

pub struct Exporter {
    process: Running,
    lines: Arc<Mutex<VecDeque<String>>>,
}

impl Exporter {
    /// Starts the command, in which names in braces stand for values of this node.
    pub fn start(command: &[String], node: &Node, port: u16) -> Result<Self> {
        let values = [
            ("{port}", port.to_string()),
            ("{library}", node.library().display().to_string()),
            ("{root}", node.root().display().to_string()),
            ("{gpus}", node.gpus().display().to_string()),
            ("{containers}", node.containers_file().display().to_string()),
        ];
        let filled = |word: &String| values.iter().fold(word.clone(), |word, (name, value)| word.replace(name, value));
        let words: Vec<String> = command.iter().map(filled).collect();
        let library = node.library();
        let mut folders = vec![library.parent().unwrap_or(&library).to_owned()];
        folders.extend(std::env::var_os("LD_LIBRARY_PATH").iter().flat_map(std::env::split_paths));
        let mut command = inside(&node.exporter_cgroup(), &words);
        command.env("LD_LIBRARY_PATH", std::env::join_paths(folders)?);
        command.env("NVML_SIM_DIR", node.gpus()).env("NVML_SIM_COST_FILE", node.cost_folder());
        let mut process = Running::start(command.stdout(Stdio::null()).stderr(Stdio::piped()))?;
        let lines = Arc::<Mutex<VecDeque<String>>>::default();
        if let Some(stderr) = process.0.stderr.take() {
            let kept = Arc::clone(&lines);
            std::thread::spawn(move || keep_lines(BufReader::new(stderr), &kept));
        }
        Ok(Self { process, lines })
    }

    /// Waits for the first page with the family that is scored.
    pub fn wait_for_page(&mut self, mapping: &Mapping, port: u16) -> Result<()> {
        let end = Instant::now() + STARTS_WITHIN;
        // Users appear with the loads.
        let wanted = mapping.device.as_ref().map(|family| &*family.metric);
        loop {
            let found = match get(port, &mapping.path).and_then(|page| parse(&page)) {
                Ok(samples) if samples.iter().any(|sample| wanted.is_none_or(|wanted| sample.metric == wanted)) => return Ok(()),
                Ok(samples) => format!("the page has {} samples, none of {}", samples.len(), wanted.unwrap_or("any family")),
                Err(error) => format!("{error:#}"),
            };
            self.check()?;
            if Instant::now() > end {
                bail!("no page at 127.0.0.1:{port}{} within {STARTS_WITHIN:?}: {found}{}", mapping.path, self.last_lines());
            }
            sleep_until(Instant::now() + Duration::from_millis(200), &mut || self.check())?;
        }
    }

    /// Fails if it has ended.
    pub fn check(&mut self) -> Result<()> {
        if let Some(status) = self.process.0.try_wait()? {
            std::thread::sleep(LAST_LINES);
            bail!("the exporter ended ({status}){}", self.last_lines());
        }
        Ok(())
    }

    fn last_lines(&self) -> String {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(|line| format!("\n    {line}")).collect()
    }
}

/// Reads to the end, so that the exporter never waits for a full pipe.
fn keep_lines(mut from: BufReader<impl std::io::Read>, kept: &Mutex<VecDeque<String>>) {
    let mut line = Vec::new();
    while from.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back(String::from_utf8_lossy(&line).trim_end().to_owned());
        if kept.len() > LINES {
            kept.pop_front();
        }
        line.clear();
    }
}
