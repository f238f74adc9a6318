//! The log of declared loads: one line when a load begins, one when it ends, whole lines by single appends.
//!
//! A load is in force from its begin line's time up to its end line's. Both times are taken just before the line is appended,
//! under a lock on the file, and readers serve nothing younger than [`crate::model::SERVED_AFTER_US`]: what was served stays true
//! as long as taking the time and appending take less than that. A load without an end line whose process is gone counts as
//! ended when a reader first notices, who then writes the line; `load` itself must have been killed for that to happen.

use std::fs;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

pub const FILE: &str = "loads";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Load {
    pub id: u64,
    pub pid: u32,
    /// Field 22 of /proc/PID/stat, clock ticks.
    pub start_time: u64,
    pub gpu: usize,
    pub demand: f64,
    pub memory_bytes: u64,
    pub begin_us: u64,
    #[serde(default)]
    pub end_us: Option<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Begin { begin: Load },
    End { end: u64, end_us: u64 },
}

pub fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64)
}

/// Appends the line that `line` makes of the present time.
fn append(dir: &Path, line: impl FnOnce(u64) -> Line) -> anyhow::Result<u64> {
    let path = dir.join(FILE);
    let mut file = fs::OpenOptions::new().append(true).open(&path).with_context(|| path.display().to_string())?;
    // SAFETY: a plain call on a descriptor that is open for the whole call; closing the file unlocks it.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } != 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| path.display().to_string());
    }
    let now = now_us();
    let mut text = serde_json::to_string(&line(now))?;
    text.push('\n');
    file.write_all(text.as_bytes()).with_context(|| path.display().to_string())?;
    Ok(now)
}

pub fn begin(dir: &Path, mut load: Load) -> anyhow::Result<u64> {
    let mut id = 0;
    append(dir, |now| {
        load.begin_us = now;
        load.id = now << 16 | u64::from(load.pid) & 0xffff;
        id = load.id;
        Line::Begin { begin: load }
    })?;
    Ok(id)
}

pub fn end(dir: &Path, id: u64) -> anyhow::Result<()> {
    append(dir, |now| Line::End { end: id, end_us: now }).map(|_| ())
}

/// Every load so far, in the order of their begin. A torn last line is not yet written.
pub fn read(dir: &Path) -> anyhow::Result<Vec<Load>> {
    let path = dir.join(FILE);
    Ok(parse(&fs::read_to_string(&path).with_context(|| path.display().to_string())?))
}

pub fn parse(text: &str) -> Vec<Load> {
    let mut loads: Vec<Load> = Vec::new();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    for line in whole.lines() {
        match serde_json::from_str(line) {
            Ok(Line::Begin { begin }) => loads.push(begin),
            Ok(Line::End { end, end_us }) => {
                // The first end counts: later ones are of readers that noticed the same death.
                if let Some(load) = loads.iter_mut().find(|l| l.id == end) {
                    load.end_us.get_or_insert(end_us);
                }
            }
            // Only this program writes here; a foreign line is nobody's load.
            Err(_) => {}
        }
    }
    loads
}

/// Ends the loads whose process is gone and whose `load` command, having been killed, did not say so.
pub fn close_dead(dir: &Path, loads: &[Load]) -> anyhow::Result<()> {
    for load in loads.iter().filter(|l| l.end_us.is_none() && start_time(l.pid) != Some(l.start_time)) {
        end(dir, load.id)?;
    }
    Ok(())
}

/// Start time of a process, clock ticks; `None` when it does not exist or is a zombie.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_back_and_a_torn_one_waits() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "").unwrap();
        let load = Load { id: 0, pid: 7, start_time: 9, gpu: 0, demand: 0.5, memory_bytes: 1, begin_us: 0, end_us: None };
        let first = begin(dir.path(), load.clone()).unwrap();
        begin(dir.path(), Load { pid: 8, ..load }).unwrap();
        end(dir.path(), first).unwrap();
        let loads = read(dir.path()).unwrap();
        assert_eq!(loads.len(), 2);
        assert!(loads[0].end_us >= Some(loads[0].begin_us) && loads[1].end_us.is_none());
        let text = fs::read_to_string(dir.path().join(FILE)).unwrap();
        assert!(parse(&text[..text.len() - 1])[0].end_us.is_none());
    }

    #[test]
    fn we_have_a_start_time() {
        assert!(start_time(std::process::id()).is_some_and(|t| t > 0));
        assert_eq!(start_time(u32::MAX), None);
    }
}
