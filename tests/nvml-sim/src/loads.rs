//! The log of declared loads: one line when a load begins, one when it ends; each line is written by a single append.
//!
//! A load is in force from the time of its begin line to that of its end line. Both times are taken just before the line is appended,
//! under a lock on the file, and readers serve nothing younger than [`crate::model::SERVED_AFTER_US`]: what was served stays true if
//! taking the time and appending take less than that. A load without an end line counts as ended once a reader notices that its process
//! has ended; that reader writes the line. This happens only if `load` itself was killed. [`crate::follow`] reads the log.

use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use devkit::process::start_time;
use serde::{Deserialize, Serialize};

use crate::faults::{Clear, Fault, Xid};
use crate::world::Unit;

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
    #[serde(default, skip_serializing_if = "Ways::are_plain")]
    pub ways: Ways,
}

/// Options of how a load uses its GPU.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ways {
    /// Demand for the memory interface; by default half of its compute share is used, at the same time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<f64>,
    pub enc: f64,
    pub dec: f64,
    pub jpeg: f64,
    pub ofa: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pattern: Option<Pattern>,
    /// Length of the bursts in which it works; without it, each slice is decided separately.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst_us: Option<u64>,
    /// Schedule of compute demands from the load's begin, in place of one; the load's own demand is the largest of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
    /// Start of the schedule instead of the load's begin; until then the first demand applies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps_from_us: Option<u64>,
    /// Number of the MIG device on the GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mig: Option<usize>,
    pub mps: bool,
    pub graphics: bool,
    /// The pid by which the driver names the process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shown_as: Option<u32>,
    /// It computes in the spans of its lines `ran`, and its demand is not used: the simulated CUDA driver decides when.
    #[serde(skip_serializing_if = "is_false")]
    pub scheduled: bool,
    /// The spans of a scheduled load, in the order of time.
    #[serde(skip)]
    pub ran: Vec<Ran>,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// A span in which a scheduled load was on the compute engine, from and to, microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ran(pub u64, pub u64);

/// The demands apply only in the first `on_us` of each `every_us`, counted from `phase_us` after the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pattern {
    pub every_us: u64,
    pub on_us: u64,
    pub phase_us: u64,
}

/// A step of a schedule. Only the last one may have no end; if it has one, the schedule repeats.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    pub demand: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lasts_us: Option<u64>,
}

impl Ways {
    fn are_plain(&self) -> bool {
        *self == Self::default()
    }
}

impl Load {
    pub fn unit(&self) -> Unit {
        Unit { gpu: self.gpu, mig: self.ways.mig }
    }

    pub fn ended_by(&self, us: u64) -> bool {
        self.end_us.is_some_and(|end| end <= us)
    }

    /// The spans of a scheduled load that lie in [from, to), or their parts.
    pub fn ran_within(&self, from_us: u64, to_us: u64) -> impl DoubleEndedIterator<Item = Ran> {
        let ran = &self.ways.ran;
        let first = ran.partition_point(|ran| ran.1 <= from_us);
        let end = ran.partition_point(|ran| ran.0 < to_us).max(first);
        ran[first..end].iter().map(move |ran| Ran(ran.0.max(from_us), ran.1.min(to_us)))
    }

    /// Adds spans in the order of time: processes that write at once may append their lines in another one.
    pub(crate) fn add_spans(&mut self, spans: Vec<Ran>) {
        for span in spans.into_iter().filter(|span| span.0 < span.1) {
            let next = self.ways.ran.partition_point(|ran| ran.1 <= span.0);
            if self.ways.ran.get(next).is_none_or(|ran| span.1 <= ran.0) {
                self.ways.ran.insert(next, span);
            }
        }
    }

    /// Whether the load is in force and has a demand at this time.
    pub fn wants_at(&self, us: u64) -> bool {
        let on = |p: &Pattern| (us + p.every_us - p.phase_us % p.every_us) % p.every_us < p.on_us;
        self.begin_us <= us && !self.ended_by(us) && self.ways.pattern.as_ref().is_none_or(on)
    }
}

impl Load {
    /// The demand for the compute engine at this time, while the load is in force.
    pub fn demand_at(&self, us: u64) -> f64 {
        let Some(last) = self.ways.steps.last() else { return self.demand };
        let round_us: u64 = self.ways.steps.iter().filter_map(|step| step.lasts_us).sum();
        let mut into = us.saturating_sub(self.ways.steps_from_us.unwrap_or(self.begin_us));
        if last.lasts_us.is_some() && round_us > 0 {
            into %= round_us;
        }
        for step in &self.ways.steps {
            match step.lasts_us {
                Some(lasts) if into >= lasts => into -= lasts,
                _ => return step.demand,
            }
        }
        last.demand
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Line {
    Begin { begin: Load },
    End { end: u64, end_us: u64 },
    Ran { ran: u64, spans: Vec<Ran> },
    Fault { fault: Fault },
    Clear { clear: Clear },
    Xid { xid: Xid },
}

pub fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64)
}

/// The log, open for appending.
pub struct Log {
    path: PathBuf,
    file: fs::File,
}

impl Log {
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join(FILE);
        let file = fs::OpenOptions::new().append(true).open(&path).with_context(|| path.display().to_string())?;
        Ok(Self { path, file })
    }

    /// Declares a load. Returns the id and the begin in its line.
    pub fn begin(&mut self, mut load: Load) -> anyhow::Result<(u64, u64)> {
        let mut id = 0;
        let now = self.append(|now| {
            load.begin_us = now;
            load.id = now << 16 | u64::from(load.pid) & 0xffff;
            id = load.id;
            Line::Begin { begin: load }
        })?;
        Ok((id, now))
    }

    /// Ends a load. Returns the end in its line.
    pub fn end(&mut self, id: u64) -> anyhow::Result<u64> {
        self.append(|now| Line::End { end: id, end_us: now })
    }

    /// Declares a fault from now on, for this duration or without end.
    pub fn fault(&mut self, mut fault: Fault, lasts_us: Option<u64>) -> anyhow::Result<u64> {
        self.append(|now| {
            (fault.from_us, fault.until_us) = (now, lasts_us.map(|us| now + us));
            Line::Fault { fault }
        })
    }

    pub fn clear(&mut self, mut clear: Clear) -> anyhow::Result<u64> {
        self.append(|now| {
            clear.at_us = now;
            Line::Clear { clear }
        })
    }

    pub fn xid(&mut self, gpu: usize, xid: u64, count: u64) -> anyhow::Result<u64> {
        self.append(|now| Line::Xid { xid: Xid { gpu, at_us: now, xid, count } })
    }

    /// Appends the line that `line` makes for the current time.
    fn append(&mut self, line: impl FnOnce(u64) -> Line) -> anyhow::Result<u64> {
        self.lock(libc::LOCK_EX)?;
        let written = self.write(line);
        // Explicit, since the file may stay open and children may share it.
        self.lock(libc::LOCK_UN)?;
        written
    }

    fn write(&mut self, line: impl FnOnce(u64) -> Line) -> anyhow::Result<u64> {
        let now = now_us();
        let mut text = serde_json::to_string(&line(now))?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).with_context(|| self.path.display().to_string())?;
        Ok(now)
    }

    fn lock(&self, how: libc::c_int) -> anyhow::Result<()> {
        // SAFETY: a plain call on a descriptor that is open for the whole call.
        while unsafe { libc::flock(self.file.as_raw_fd(), how) } != 0 {
            let error = std::io::Error::last_os_error();
            if error.kind() != std::io::ErrorKind::Interrupted {
                return Err(error).with_context(|| self.path.display().to_string());
            }
        }
        Ok(())
    }
}

pub fn begin(dir: &Path, load: Load) -> anyhow::Result<(u64, u64)> {
    Log::open(dir)?.begin(load)
}

pub fn end(dir: &Path, id: u64) -> anyhow::Result<u64> {
    Log::open(dir)?.end(id)
}

/// Ends the loads of ended processes that their killed `load` command did not end. Returns their number.
pub fn close_dead<'a>(dir: &Path, loads: impl Iterator<Item = &'a Load>) -> anyhow::Result<usize> {
    // Start times by pid; a reused pid has another start time than the load.
    let mut now: HashMap<u32, Option<u64>> = HashMap::new();
    // A mount of /proc may hide the processes of other users, and so those of loads.
    let hides_others = start_time(1).is_none();
    let dead = |l: &&Load| match *now.entry(l.pid).or_insert_with(|| start_time(l.pid)) {
        Some(start_time) => start_time != l.start_time,
        None => !hides_others,
    };
    let dead: Vec<u64> = loads.filter(|l| l.end_us.is_none()).filter(dead).map(|l| l.id).collect();
    if dead.is_empty() {
        return Ok(0);
    }
    let mut log = Log::open(dir)?;
    for id in &dead {
        log.end(*id)?;
    }
    Ok(dead.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(pid: u32, start_time: u64) -> Load {
        Load { id: 0, pid, start_time, gpu: 0, demand: 0.5, memory_bytes: 1, begin_us: 0, end_us: None, ways: Ways::default() }
    }

    #[test]
    fn a_pattern_counts_from_its_phase_after_the_epoch() {
        let on = |every_us, on_us, phase_us, at: u64| {
            let ways = Ways { pattern: Some(Pattern { every_us, on_us, phase_us }), ..Ways::default() };
            Load { ways, ..load(1, 1) }.wants_at(at)
        };
        let wanted_at = |every, long, phase| (0..20).filter(|at| on(every, long, phase, *at)).collect::<Vec<u64>>();
        assert_eq!(wanted_at(10, 3, 0), [0, 1, 2, 10, 11, 12]);
        assert_eq!(wanted_at(10, 3, 4), [4, 5, 6, 14, 15, 16]);
        assert_eq!(wanted_at(10, 3, 18), [0, 8, 9, 10, 18, 19]);
        assert_eq!(wanted_at(10, 10, 7).len(), 20);
    }

    #[test]
    fn steps_count_from_the_loads_begin() {
        let check = |steps: &[(f64, Option<u64>)], expect: &[(u64, f64)]| {
            let steps = steps.iter().map(|(demand, lasts_us)| Step { demand: *demand, lasts_us: *lasts_us }).collect();
            let load = Load { begin_us: 1_000, ways: Ways { steps, ..Ways::default() }, ..load(1, 1) };
            for (after, demand) in expect {
                assert_eq!(load.demand_at(1_000 + after), *demand, "{:?} after {after}", load.ways.steps);
            }
        };
        check(&[], &[(0, 0.5), (u64::MAX / 2, 0.5)]);
        check(&[(1.0, Some(20)), (0.0, Some(10))], &[(0, 1.0), (19, 1.0), (20, 0.0), (29, 0.0), (30, 1.0), (50, 0.0), (60, 1.0)]);
        check(&[(1.0, Some(20)), (0.25, None)], &[(19, 1.0), (20, 0.25), (1 << 40, 0.25)]);
        check(&[(0.75, None)], &[(0, 0.75), (1 << 40, 0.75)]);
        let steps = [(0.5, Some(20)), (0.0, None)].map(|(demand, lasts_us)| Step { demand, lasts_us }).to_vec();
        let ways = Ways { steps, steps_from_us: Some(1_500), ..Ways::default() };
        let load = Load { begin_us: 1_000, ways, ..load(1, 1) };
        assert_eq!([1_000, 1_499, 1_519, 1_520].map(|at| load.demand_at(at)), [0.5, 0.5, 0.5, 0.0]);
    }

    #[test]
    fn options_of_loads_and_faults_survive_the_log() {
        let pattern = Some(Pattern { every_us: 167_000, on_us: 80_000, phase_us: 20_000 });
        let steps = vec![Step { demand: 0.5, lasts_us: Some(9) }, Step { demand: 0.0, lasts_us: None }];
        let burst_us = Some(12_000);
        let ways = Ways { memory: Some(0.5), enc: 0.2, pattern, burst_us, steps, mig: Some(1), mps: true, ..Ways::default() };
        let before = Load { ways, ..load(7, 9) };
        let text = serde_json::to_string(&Line::Begin { begin: before.clone() }).unwrap();
        assert!(matches!(serde_json::from_str(&text).unwrap(), Line::Begin { begin } if begin == before));
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "").unwrap();
        let mut log = Log::open(dir.path()).unwrap();
        let kind = crate::faults::FaultKind::Stall;
        let fault = Fault { gpu: Some(1), call: Some("a".into()), ..Fault::of_kind(kind) };
        let at = log.fault(fault, Some(5)).unwrap();
        log.clear(Clear { gpu: None, kind: Some(kind), at_us: 0 }).unwrap();
        log.xid(1, 79, 3).unwrap();
        let text = fs::read_to_string(dir.path().join(FILE)).unwrap();
        let lines: Vec<Line> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert!(matches!(&lines[0], Line::Fault { fault } if fault.until_us == Some(at + 5) && fault.from_us == at));
        assert!(matches!(&lines[1], Line::Clear { clear } if clear.kind == Some(kind) && clear.at_us >= at));
        assert!(matches!(&lines[2], Line::Xid { xid } if (xid.gpu, xid.xid, xid.count) == (1, 79, 3)));
    }

    #[test]
    fn spans_of_a_scheduled_load_are_kept_in_order() {
        let mut load = load(7, 9);
        load.add_spans(vec![Ran(10, 20), Ran(20, 30), Ran(40, 40)]);
        load.add_spans(vec![Ran(50, 60), Ran(55, 70)]);
        load.add_spans(vec![Ran(30, 31), Ran(5, 9)]);
        assert_eq!(load.ways.ran, [Ran(5, 9), Ran(10, 20), Ran(20, 30), Ran(30, 31), Ran(50, 60)]);
        let check = |from, to, expect: &[Ran]| assert_eq!(load.ran_within(from, to).collect::<Vec<_>>(), expect, "{from} {to}");
        check(0, 100, &load.ways.ran);
        check(15, 55, &[Ran(15, 20), Ran(20, 30), Ran(30, 31), Ran(50, 55)]);
        check(31, 50, &[]);
        check(60, 60, &[]);
    }

    #[test]
    fn returned_ids_and_times_equal_those_in_the_log() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "").unwrap();
        let (id, begin_us) = begin(dir.path(), load(7, 9)).unwrap();
        let end_us = end(dir.path(), id).unwrap();
        let text = fs::read_to_string(dir.path().join(FILE)).unwrap();
        let expect = format!(
            "{{\"begin\":{{\"id\":{id},\"pid\":7,\"start_time\":9,\"gpu\":0,\"demand\":0.5,\"memory_bytes\":1,\
             \"begin_us\":{begin_us},\"end_us\":null}}}}\n{{\"end\":{id},\"end_us\":{end_us}}}\n"
        );
        assert_eq!(text, expect);
        assert!(begin_us <= end_us);
    }

    #[test]
    fn loads_of_ended_processes_are_closed_but_not_those_of_living_ones() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "").unwrap();
        let (pid, born) = (std::process::id(), start_time(std::process::id()).unwrap());
        let loads = [(pid, born - 1, None), (pid, born, None), (u32::MAX, 1, None), (u32::MAX, 1, Some(5))];
        let loads: Vec<Load> = (1..).zip(loads).map(|(id, (p, t, end_us))| Load { id, end_us, ..load(p, t) }).collect();
        assert_eq!(close_dead(dir.path(), loads.iter()).unwrap(), 2);
        let text = fs::read_to_string(dir.path().join(FILE)).unwrap();
        let ends: Vec<&str> = text.lines().map(|l| l.split_once(',').unwrap().0).collect();
        assert_eq!(ends, ["{\"end\":1", "{\"end\":3"]);
        assert_eq!(close_dead(dir.path(), loads[1..2].iter()).unwrap(), 0);
    }
}
