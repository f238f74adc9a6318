//! Follows the log of loads, faults and XIDs: parses only new lines; an incomplete last line is parsed once it is complete.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::faults::{Faults, Xid};
use crate::loads::{FILE, Line, Load, Ran};
use crate::world::{Unit, World};

/// The loads of the log as far as it was read: for each unit in the order of their begin lines.
#[derive(Default)]
pub struct Loads {
    units: BTreeMap<Unit, Vec<Load>>,
    /// Unit and index of the load with this id.
    positions: HashMap<u64, (Unit, usize)>,
    /// Pids by which the driver names processes, where they differ from the processes' own; also of ended processes.
    shown: HashMap<u32, u32>,
}

impl Loads {
    pub fn of(&self, unit: Unit) -> &[Load] {
        self.units.get(&unit).map_or(&[], Vec::as_slice)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Load> {
        self.units.values().flatten()
    }

    /// The pid by which the driver names the process, if it differs from its own.
    pub fn shown(&self, pid: u32) -> Option<u32> {
        self.shown.get(&pid).copied()
    }

    fn begin(&mut self, load: Load) {
        match load.ways.shown_as {
            Some(shown) => self.shown.insert(load.pid, shown),
            None => self.shown.remove(&load.pid),
        };
        let unit = load.unit();
        let loads = self.units.entry(unit).or_default();
        self.positions.entry(load.id).or_insert((unit, loads.len()));
        loads.push(load);
    }

    fn end(&mut self, id: u64, end_us: u64) {
        // The first end counts; later ones are of other readers that noticed the same end.
        let position = self.positions.get(&id);
        if let Some(load) = position.and_then(|(unit, at)| self.units.get_mut(unit)?.get_mut(*at)) {
            load.end_us.get_or_insert(end_us);
        }
    }

    fn ran(&mut self, id: u64, spans: Vec<Ran>) {
        let position = self.positions.get(&id);
        if let Some(load) = position.and_then(|(unit, at)| self.units.get_mut(unit)?.get_mut(*at)) {
            load.add_spans(spans);
        }
    }

    /// Drops the unit's loads that ended at `until_us` or before, and spans of others.
    pub fn forget(&mut self, unit: Unit, until_us: u64) {
        let Some(loads) = self.units.get_mut(&unit) else { return };
        let positions = &mut self.positions;
        loads.retain(|load| {
            let kept = load.end_us.is_none_or(|end| end > until_us);
            if !kept {
                positions.remove(&load.id);
            }
            kept
        });
        for (at, load) in loads.iter_mut().enumerate() {
            load.ways.ran.drain(..load.ways.ran.partition_point(|ran| ran.1 <= until_us));
            positions.insert(load.id, (unit, at));
        }
    }
}

pub struct Follower {
    path: PathBuf,
    /// Offset of the first line that was not complete.
    offset: u64,
    pub loads: Loads,
    /// The world's faults come first.
    pub faults: Faults,
    pub xids: Vec<Xid>,
    world: (Faults, Vec<Xid>),
}

impl Follower {
    pub fn new(dir: &Path, world: &World) -> anyhow::Result<Self> {
        let (faults, xids) = (world.faults()?, world.xids()?);
        let world = (faults.clone(), xids.clone());
        Ok(Self { path: dir.join(FILE), offset: 0, loads: Loads::default(), faults, xids, world })
    }

    /// Reads the complete lines that were added.
    pub fn read(&mut self) -> anyhow::Result<()> {
        self.read_new().with_context(|| self.path.display().to_string())
    }

    fn read_new(&mut self) -> std::io::Result<()> {
        let bytes = fs::metadata(&self.path)?.len();
        if bytes < self.offset {
            // The log only grows, so a smaller file is another log.
            (self.offset, self.loads) = (0, Loads::default());
            (self.faults, self.xids) = self.world.clone();
        }
        if bytes == self.offset {
            return Ok(());
        }
        let mut file = fs::File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.offset))?;
        let mut new = Vec::new();
        file.read_to_end(&mut new)?;
        let whole = new.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
        for line in new[..whole].split(|b| *b == b'\n') {
            self.take(line);
        }
        self.offset += whole as u64;
        Ok(())
    }

    fn take(&mut self, line: &[u8]) {
        match serde_json::from_slice(line) {
            Ok(Line::Begin { begin }) => self.loads.begin(begin),
            Ok(Line::End { end, end_us }) => self.loads.end(end, end_us),
            Ok(Line::Ran { ran, spans }) => self.loads.ran(ran, spans),
            Ok(Line::Fault { fault }) => self.faults.add(fault),
            Ok(Line::Clear { clear }) => self.faults.clear(&clear),
            Ok(Line::Xid { xid }) => self.xids.push(xid),
            // Only this program writes the log; an unknown line is ignored.
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::loads::Ways;

    fn begin(id: u64, gpu: usize) -> String {
        let load = Load {
            id,
            pid: id as u32,
            start_time: 9,
            gpu,
            demand: 0.5,
            memory_bytes: 1,
            begin_us: id,
            end_us: None,
            ways: Ways::default(),
        };
        serde_json::to_string(&Line::Begin { begin: load }).unwrap() + "\n"
    }

    fn end(id: u64, end_us: u64) -> String {
        serde_json::to_string(&Line::End { end: id, end_us }).unwrap() + "\n"
    }

    fn seen(loads: &Loads, gpu: usize) -> Vec<(u64, Option<u64>)> {
        loads.of(gpu.into()).iter().map(|l| (l.id, l.end_us)).collect()
    }

    #[test]
    fn loads_do_not_depend_on_how_the_log_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        // An end before its begin, a second end, ends of unknown loads, foreign lines, begins that are not in the order of their times.
        let text = [
            &end(5, 50)[..],
            &begin(5, 0),
            &begin(3, 1),
            "\n",
            &begin(4, 0),
            &end(4, 60),
            "{\"end\":\"4\"}\n\u{e9}\n",
            &end(4, 61),
            &begin(2, 0),
            &end(77, 70),
            &end(3, 80),
            &begin(9, 7),
        ]
        .concat();
        let expect = [vec![(5, None), (4, Some(60)), (2, None)], vec![(3, Some(80))], vec![], vec![(9, None)]];
        for step in 1..=text.len() {
            fs::write(&path, "").unwrap();
            let mut follower = Follower::new(dir.path(), &World::default()).unwrap();
            let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
            for part in text.as_bytes().chunks(step) {
                file.write_all(part).unwrap();
                follower.read().unwrap();
            }
            for (gpu, expect) in [0, 1, 2, 7].into_iter().zip(&expect) {
                assert_eq!(&seen(&follower.loads, gpu), expect, "GPU {gpu} in steps of {step}");
            }
            assert_eq!(follower.offset, text.len() as u64);
        }
    }

    #[test]
    fn spans_are_added_to_their_load_and_forgotten_with_time() {
        let mut follower = Follower::new(Path::new("/"), &World::default()).unwrap();
        let lines = [begin(1, 0), r#"{"ran":1,"spans":[[10,20],[30,40]]}"#.into(), r#"{"ran":9,"spans":[[1,2]]}"#.into()];
        lines.iter().for_each(|line| follower.take(line.trim_end().as_bytes()));
        let ran = |loads: &Loads| loads.of(0.into())[0].ways.ran.clone();
        assert_eq!(ran(&follower.loads), [Ran(10, 20), Ran(30, 40)]);
        follower.loads.forget(0.into(), 20);
        assert_eq!(ran(&follower.loads), [Ran(30, 40)]);
    }

    #[test]
    fn an_incomplete_line_waits_and_only_it_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let (first, last) = (begin(1, 0), end(1, 5));
        let mut follower = Follower::new(dir.path(), &World::default()).unwrap();
        fs::write(&path, format!("{first}{}", last.trim_end())).unwrap();
        for _ in 0..2 {
            follower.read().unwrap();
            assert_eq!((seen(&follower.loads, 0), follower.offset), (vec![(1, None)], first.len() as u64));
        }
        fs::write(&path, format!("{first}{last}")).unwrap();
        follower.read().unwrap();
        assert_eq!(seen(&follower.loads, 0), [(1, Some(5))]);
        // Another log at the same path.
        fs::write(&path, begin(2, 0)).unwrap();
        follower.read().unwrap();
        assert_eq!(seen(&follower.loads, 0), [(2, None)]);
        fs::remove_file(&path).unwrap();
        assert!(format!("{:#}", follower.read().unwrap_err()).contains("loads: No such file"));
    }

    #[test]
    fn forgetting_loads_keeps_the_others_addressable() {
        let mut follower = Follower::new(Path::new("/"), &World::default()).unwrap();
        let lines = [begin(1, 0), begin(2, 0), begin(3, 1), begin(4, 0), begin(5, 0), end(1, 10), end(3, 10), end(4, 11)];
        lines.iter().for_each(|line| follower.take(line.trim_end().as_bytes()));
        follower.loads.forget(0.into(), 10);
        follower.loads.forget(7.into(), 10);
        for line in [end(1, 20), end(5, 20), begin(6, 0), end(6, 21)] {
            follower.take(line.trim_end().as_bytes());
        }
        assert_eq!(seen(&follower.loads, 0), [(2, None), (4, Some(11)), (5, Some(20)), (6, Some(21))]);
        assert_eq!(seen(&follower.loads, 1), [(3, Some(10))]);
    }
}
