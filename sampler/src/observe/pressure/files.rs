//! Reads the pressure and quota files of one container's cgroups. A missing file or field is unknown, never 0.
//!
//! Files that are read every second are kept open: a read at offset 0 makes the kernel write the content again, and takes a fraction of
//! the time of an open, a read and a close.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sampler_core::observation::CpuQuota;
use strum::EnumCount as _;

use super::place::PressurePaths;

/// Maximum bytes read of a file; the longest known (cpu.stat of v1 and v2) has less than 500.
const MAX_BYTES: usize = 4096;
/// How often quotas are read. They rarely change, and the files of v1 that hold them are two.
const LIMIT_EVERY: Duration = Duration::from_secs(10);

/// Determines the files of a cgroup and their units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupVersion {
    /// `cpu.stat` with `throttled_time` in ns, `cpu.cfs_quota_us`, `cpu.cfs_period_us` (kernel/sched/core.c, `cpu_legacy_files`).
    V1,
    /// `cpu.stat` with `throttled_usec`, `cpu.max` (the same file, `cpu_files`).
    V2,
}

/// The outcome of reading a file. The names are the `outcome` label of `gpu_sampler_pressure_reads_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::EnumCount, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Outcome {
    Ok,
    Absent,
    Error,
    Timeout,
}

impl Outcome {
    pub fn name(self) -> &'static str {
        self.into()
    }
}

pub type OutcomeCounts = [u64; Outcome::COUNT];

/// Counts of outcomes and the first problem.
#[derive(Debug, Default)]
pub struct ReadOutcomes {
    pub counts: OutcomeCounts,
    pub problem: Option<String>,
}

/// A file that may be kept open between reads.
#[derive(Debug)]
struct KeptFile {
    path: PathBuf,
    open: Option<File>,
}

/// The quota of a cgroup: its counters, and its limit as last read.
#[derive(Debug)]
struct QuotaFiles {
    version: CgroupVersion,
    cgroup: PathBuf,
    stat: KeptFile,
    limit: Option<(Instant, Limit)>,
}

/// The files of one container.
#[derive(Debug)]
pub struct PressureFiles {
    pub paths: PressurePaths,
    /// Files stay open after a read.
    keep_open: bool,
    quotas: Vec<QuotaFiles>,
    /// `None` if it has no cgroup on v2.
    pressure: Option<[KeptFile; RESOURCES.len()]>,
    outcomes: ReadOutcomes,
}

/// Resources with PSI, in the order of [`PressureFiles::some_ns`].
const RESOURCES: [&str; 3] = ["cpu", "memory", "io"];

/// Whether the file does not exist, or no longer: the cgroup was removed between open and read, or the kernel was booted with psi=0.
fn absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EOPNOTSUPP))
}

/// The value of a field; an error if it is not a number.
fn field(text: &str, name: &str) -> Result<Option<u64>, ()> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map(|value| value.trim().parse().map_err(|_| ())).transpose()
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=94617545`, in µs (Documentation/accounting/psi.rst).
fn some_total_ns(text: &str) -> Result<Option<u64>, ()> {
    let Some(line) = text.lines().find_map(|line| line.strip_prefix("some ")) else { return Ok(None) };
    let Some(total) = line.split(' ').find_map(|word| word.strip_prefix("total=")) else { return Ok(None) };
    total.parse::<u64>().ok().and_then(|us| us.checked_mul(1000)).map(Some).ok_or(())
}

/// Periods, throttled periods, and total throttled time in ns.
fn throttled(version: CgroupVersion, text: &str) -> Result<Option<(u64, u64, u64)>, ()> {
    let (time, ns) = match version {
        CgroupVersion::V1 => ("throttled_time", 1),
        CgroupVersion::V2 => ("throttled_usec", 1000),
    };
    let all = (field(text, "nr_periods")?, field(text, "nr_throttled")?, field(text, time)?);
    let (Some(periods), Some(throttled), Some(time)) = all else { return Ok(None) };
    Ok(Some((periods, throttled, time.checked_mul(ns).ok_or(())?)))
}

/// Quota and period in ns; `None` if there is no limit.
type Limit = Option<(u64, u64)>;

fn limit(quota: &str, period: &str, none: &str) -> Result<Limit, ()> {
    let ns = |text: &str| text.trim().parse::<u64>().ok().and_then(|us| us.checked_mul(1000)).filter(|ns| *ns > 0).ok_or(());
    let period = ns(period)?;
    if quota.trim() == none { Ok(None) } else { Ok(Some((ns(quota)?, period))) }
}

impl ReadOutcomes {
    fn count(&mut self, outcome: Outcome) {
        self.counts[outcome as usize] += 1;
    }

    fn failed(&mut self, path: &Path, error: &dyn std::fmt::Display) {
        self.count(Outcome::Error);
        self.problem.get_or_insert_with(|| format!("{}: {error}", path.display()));
    }

    /// Reads a file and parses its content.
    fn parsed<T>(&mut self, file: &mut KeptFile, keep: bool, parse: impl FnOnce(&str) -> Result<Option<T>, ()>) -> Option<T> {
        let mut bytes = [0; MAX_BYTES];
        let length = match file.read(&mut bytes, keep) {
            Ok(length) => length,
            Err(error) if absent(&error) => {
                self.count(Outcome::Absent);
                return None;
            }
            Err(error) => {
                self.failed(&file.path, &error);
                return None;
            }
        };
        let Ok(found) = std::str::from_utf8(&bytes[..length]).map_err(drop).and_then(parse) else {
            self.failed(&file.path, &"unexpected format");
            return None;
        };
        self.count(if found.is_some() { Outcome::Ok } else { Outcome::Absent });
        found
    }
}

impl KeptFile {
    fn new(path: PathBuf) -> Self {
        Self { path, open: None }
    }

    fn read(&mut self, bytes: &mut [u8], keep: bool) -> io::Result<usize> {
        // Fails if the cgroup was removed since; another one may have its path.
        if let Some(length) = self.open.take().and_then(|file| self.read_from(file, bytes, keep).ok()) {
            return Ok(length);
        }
        self.read_from(File::open(&self.path)?, bytes, keep)
    }

    /// A file of cgroupfs is returned whole by one read.
    fn read_from(&mut self, file: File, bytes: &mut [u8], keep: bool) -> io::Result<usize> {
        let length = file.read_at(bytes, 0)?;
        self.open = keep.then_some(file);
        Ok(length)
    }
}

impl QuotaFiles {
    fn read_limit(&self, outcomes: &mut ReadOutcomes) -> Option<Limit> {
        let file = |name| KeptFile::new(self.cgroup.join(name));
        match self.version {
            CgroupVersion::V1 => {
                let period = outcomes.parsed(&mut file("cpu.cfs_period_us"), false, |text| Ok(Some(text.to_owned())))?;
                outcomes.parsed(&mut file("cpu.cfs_quota_us"), false, |quota| limit(quota, &period, "-1").map(Some))
            }
            CgroupVersion::V2 => outcomes.parsed(&mut file("cpu.max"), false, |text| {
                let (quota, period) = text.split_once(' ').ok_or(())?;
                limit(quota, period, "max").map(Some)
            }),
        }
    }

    /// `None` also if the cpu controller is not enabled: `cpu.stat` then has no throttling fields.
    fn read(&mut self, keep: bool, outcomes: &mut ReadOutcomes) -> Option<CpuQuota> {
        let version = self.version;
        let (periods, throttled_periods, throttled_ns) =
            outcomes.parsed(&mut self.stat, keep, |text| throttled(version, text))?;
        if self.limit.is_none_or(|(at, _)| at.elapsed() >= LIMIT_EVERY) {
            self.limit = self.read_limit(outcomes).map(|limit| (Instant::now(), limit));
        }
        let (_, limit_ns) = self.limit?;
        Some(CpuQuota { limit_ns, periods, throttled_periods, throttled_ns })
    }
}

impl PressureFiles {
    pub fn new(paths: PressurePaths) -> Self {
        let stat = |cgroup: &PathBuf| KeptFile::new(cgroup.join("cpu.stat"));
        let version = paths.version;
        let quota = |cgroup: &PathBuf| QuotaFiles { version, cgroup: cgroup.clone(), stat: stat(cgroup), limit: None };
        let quotas = paths.levels.iter().map(quota).collect();
        let file = |cgroup: &Path, resource| KeptFile::new(cgroup.join(format!("{resource}.pressure")));
        let pressure = paths.v2.as_deref().map(|cgroup| RESOURCES.map(|resource| file(cgroup, resource)));
        Self { paths, keep_open: false, quotas, pressure, outcomes: ReadOutcomes::default() }
    }

    pub fn keep_open(&mut self, keep_open: bool) {
        self.keep_open = keep_open;
    }

    /// By level, from the container up.
    pub fn quotas(&mut self) -> Vec<Option<CpuQuota>> {
        let (keep, outcomes) = (self.keep_open, &mut self.outcomes);
        self.quotas.iter_mut().map(|quota| quota.read(keep, outcomes)).collect()
    }

    /// The PSI `some` totals of cpu, memory and io, in ns.
    pub fn some_ns(&mut self) -> [Option<u64>; RESOURCES.len()] {
        let (keep, outcomes) = (self.keep_open, &mut self.outcomes);
        match &mut self.pressure {
            Some(files) => files.each_mut().map(|file| outcomes.parsed(file, keep, some_total_ns)),
            None => [None; RESOURCES.len()],
        }
    }

    pub fn take_outcomes(&mut self) -> ReadOutcomes {
        std::mem::take(&mut self.outcomes)
    }
}

#[cfg(test)]
mod tests {
    use strum::VariantArray as _;

    use super::*;

    fn files_of(version: CgroupVersion, dir: &Path) -> PressureFiles {
        PressureFiles::new(PressurePaths { version, levels: vec![dir.to_path_buf()], v2: Some(dir.to_path_buf()) })
    }

    /// The quota of a cgroup with these files, and whether there was a problem.
    fn quota(version: CgroupVersion, files: &[(&str, &str)]) -> (Option<CpuQuota>, bool) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let mut files = files_of(version, dir.path());
        let found = files.quotas();
        (found[0], files.take_outcomes().problem.is_some())
    }

    const V1_STAT: &str = "nr_periods 40\nnr_throttled 30\nthrottled_time 5000000000\nwait_sum 7\n";
    const V2_STAT: &str = "usage_usec 9\nuser_usec 8\nsystem_usec 1\nnr_periods 40\nnr_throttled 30\nthrottled_usec 5000000\n";
    const LIMITED: CpuQuota =
        CpuQuota { limit_ns: Some((20_000_000, 100_000_000)), periods: 40, throttled_periods: 30, throttled_ns: 5_000_000_000 };
    const UNLIMITED: CpuQuota = CpuQuota { limit_ns: None, ..LIMITED };

    #[test]
    fn quotas_of_cgroup_v1_files() {
        let check = |stat: Option<&str>, quota_us: Option<&str>, period_us: Option<&str>, expect: (Option<CpuQuota>, bool)| {
            let files = [("cpu.stat", stat), ("cpu.cfs_quota_us", quota_us), ("cpu.cfs_period_us", period_us)];
            let files: Vec<_> = files.into_iter().filter_map(|(name, text)| Some((name, text?))).collect();
            assert_eq!(quota(CgroupVersion::V1, &files), expect, "{files:?}");
        };
        check(Some(V1_STAT), Some("20000\n"), Some("100000\n"), (Some(LIMITED), false));
        check(Some(V1_STAT), Some("-1\n"), Some("100000\n"), (Some(UNLIMITED), false));
        check(None, Some("-1\n"), Some("100000\n"), (None, false));
        check(Some(V1_STAT), None, Some("100000\n"), (None, false));
        check(Some(V1_STAT), Some("-1\n"), None, (None, false));
        check(Some("nr_periods 1\nnr_throttled 0\n"), Some("-1\n"), Some("100000\n"), (None, false));
        check(Some(V1_STAT), Some("-2\n"), Some("100000\n"), (None, true));
        check(Some(V1_STAT), Some("20000\n"), Some("0\n"), (None, true));
        check(Some("nr_periods x\n"), Some("-1\n"), Some("100000\n"), (None, true));
        // The field of v2 has another unit.
        check(Some(V2_STAT), Some("-1\n"), Some("100000\n"), (None, false));
    }

    #[test]
    fn quotas_of_cgroup_v2_files() {
        let check = |stat: &str, max: Option<&str>, expect: (Option<CpuQuota>, bool)| {
            let files: Vec<_> = std::iter::once(("cpu.stat", stat)).chain(max.map(|max| ("cpu.max", max))).collect();
            assert_eq!(quota(CgroupVersion::V2, &files), expect, "{files:?}");
        };
        check(V2_STAT, Some("20000 100000\n"), (Some(LIMITED), false));
        check(V2_STAT, Some("max 100000\n"), (Some(UNLIMITED), false));
        check(V2_STAT, None, (None, false));
        // Without the controller, as in v2 on a hybrid host where v1 has it.
        check("usage_usec 9\nuser_usec 8\nsystem_usec 1\n", Some("max 100000\n"), (None, false));
        check(V2_STAT, Some("max\n"), (None, true));
        check(V2_STAT, Some("-1 100000\n"), (None, true));
        check(V2_STAT, Some("\n"), (None, true));
        check(&V2_STAT.replace("5000000", "18446744073709551615"), Some("max 100000\n"), (None, true));
    }

    #[test]
    fn pressure_files_are_parsed_or_counted_as_absent_or_error() {
        let check = |text: Option<&[u8]>, expect: (Option<u64>, Outcome)| {
            let dir = tempfile::tempdir().unwrap();
            if let Some(text) = text {
                std::fs::write(dir.path().join("io.pressure"), text).unwrap();
            }
            let mut outcomes = ReadOutcomes::default();
            let found = outcomes.parsed(&mut KeptFile::new(dir.path().join("io.pressure")), false, some_total_ns);
            let outcome =
                Outcome::VARIANTS.iter().copied().find(|o| outcomes.counts[*o as usize] == 1).expect("one outcome is counted");
            assert_eq!((found, outcome), expect, "{text:?}");
            assert_eq!(outcomes.problem.is_some(), outcome == Outcome::Error);
        };
        let both = b"some avg10=0.00 avg60=1.21 avg300=0.15 total=1234\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=99\n";
        check(Some(both), (Some(1_234_000), Outcome::Ok));
        check(None, (None, Outcome::Absent));
        check(Some(b""), (None, Outcome::Absent));
        check(Some(b"full avg10=0.00 avg60=0.00 avg300=0.00 total=99\n"), (None, Outcome::Absent));
        check(Some(b"some avg10=0.00\n"), (None, Outcome::Absent));
        check(Some(b"some avg10=0.00 total=-5\n"), (None, Outcome::Error));
        check(Some(b"some total=18446744073709551615\n"), (None, Outcome::Error));
        check(Some(b"some total=1\xff\n"), (None, Outcome::Error));
    }

    #[test]
    fn a_folder_in_place_of_a_file_is_a_problem() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("cpu.pressure")).unwrap();
        let mut files = files_of(CgroupVersion::V2, dir.path());
        assert_eq!(files.some_ns(), [None; 3]);
        assert!(files.take_outcomes().problem.is_some_and(|p| p.contains("cpu.pressure")));
    }

    #[test]
    fn a_kept_file_is_read_again_and_replaced_when_its_cgroup_is() {
        let (dir, some) = (tempfile::tempdir().unwrap(), |total| format!("some avg10=0.00 total={total}\n"));
        let path = dir.path().join("cpu.pressure");
        let mut files = files_of(CgroupVersion::V2, dir.path());
        files.keep_open(true);
        let mut read = |total: Option<u64>| {
            if let Some(total) = total {
                std::fs::write(&path, some(total)).unwrap();
            }
            files.some_ns()[0]
        };
        assert_eq!((read(Some(100)), read(Some(7)), read(None)), (Some(100_000), Some(7_000), Some(7_000)));
        let kept = files.pressure.as_ref().map(|files| files.each_ref().map(|file| file.open.is_some()));
        assert_eq!(kept, Some([true, false, false]));
        // Reading a folder fails, as reading a file of a removed cgroup does.
        let removed = File::open(dir.path()).unwrap();
        files.pressure.as_mut().unwrap()[0].open = Some(removed);
        assert_eq!(files.some_ns()[0], Some(7_000));
        files.keep_open(false);
        assert_eq!(files.some_ns()[0], Some(7_000));
        assert!(files.pressure.unwrap().iter().all(|file| file.open.is_none()));
    }
}
