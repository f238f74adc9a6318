//! Reads the pressure and quota files of one container's cgroups. A missing file or field is unknown, never 0.
//!
//! Files that are read every second are kept open: a read at offset 0 makes the kernel write the content again, and takes a fraction of
//! the time of an open, a read and a close.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use sampler_core::observation::CpuQuota;
use strum::EnumCount as _;

use super::place::PressurePaths;

/// Maximum bytes read of a file; the longest known (cpu.stat of v1 and v2) has less than 500.
const MAX_BYTES: usize = 4096;
/// How often limits are read, and the counters of a level without one. Limits rarely change, and the files of v1 that hold them are two.
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

/// A file of a cgroup that stays open between reads, while it is open.
type KeptFile = Option<File>;

/// What is kept of one level: its open counters, its limit as last read, and both as last returned.
#[derive(Debug, Default)]
struct KeptQuota {
    stat: KeptFile,
    limit: Option<(Instant, Limit)>,
    last: Option<CpuQuota>,
}

impl KeptQuota {
    fn limit_is_due(&self) -> bool {
        self.limit.is_none_or(|(at, _)| at.elapsed() >= LIMIT_EVERY)
    }

    /// The counters of a level without a limit, which do not change: the kernel counts the periods of limits.
    fn unchanged(&self) -> Option<CpuQuota> {
        self.last.filter(|last| last.limit_ns.is_none() && !self.limit_is_due())
    }
}

/// The files of one container.
#[derive(Debug)]
pub struct PressureFiles {
    pub paths: PressurePaths,
    /// Files stay open after a read.
    keep_open: bool,
    /// In the order of the levels.
    quotas: Vec<KeptQuota>,
    /// In the order of [`PSI_FILES`].
    pressure: [KeptFile; PSI_FILES.len()],
    outcomes: ReadOutcomes,
}

/// Files with PSI, in the order of [`PressureFiles::some_ns`].
const PSI_FILES: [&str; 3] = ["cpu.pressure", "memory.pressure", "io.pressure"];

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

    /// Reads the file of this name in a cgroup, keeps it open if `kept` is given, and parses its content.
    fn parsed<T>(
        &mut self,
        kept: Option<&mut KeptFile>,
        (cgroup, name): (&Path, &str),
        parse: impl FnOnce(&str) -> Result<Option<T>, ()>,
    ) -> Option<T> {
        let mut bytes = [0; MAX_BYTES];
        let length = match read(kept, (cgroup, name), &mut bytes) {
            Ok(length) => length,
            Err(error) if absent(&error) => {
                self.count(Outcome::Absent);
                return None;
            }
            Err(error) => {
                self.failed(&cgroup.join(name), &error);
                return None;
            }
        };
        let Ok(found) = std::str::from_utf8(&bytes[..length]).map_err(drop).and_then(parse) else {
            self.failed(&cgroup.join(name), &"unexpected format");
            return None;
        };
        self.count(if found.is_some() { Outcome::Ok } else { Outcome::Absent });
        found
    }

    fn limit(&mut self, version: CgroupVersion, cgroup: &Path) -> Option<Limit> {
        match version {
            CgroupVersion::V1 => {
                let period = self.parsed(None, (cgroup, "cpu.cfs_period_us"), |text| Ok(Some(text.to_owned())))?;
                self.parsed(None, (cgroup, "cpu.cfs_quota_us"), |quota| limit(quota, &period, "-1").map(Some))
            }
            CgroupVersion::V2 => self.parsed(None, (cgroup, "cpu.max"), |text| {
                let (quota, period) = text.split_once(' ').ok_or(())?;
                limit(quota, period, "max").map(Some)
            }),
        }
    }

    /// `None` also if the cpu controller is not enabled: `cpu.stat` then has no throttling fields.
    fn quota(&mut self, kept: &mut KeptQuota, keep_open: bool, version: CgroupVersion, cgroup: &Path) -> Option<CpuQuota> {
        if let Some(unchanged) = kept.unchanged() {
            return Some(unchanged);
        }
        // Before the counters, so that the last ones of a limit that was removed are read.
        if kept.limit_is_due() {
            kept.limit = self.limit(version, cgroup).map(|limit| (Instant::now(), limit));
        }
        kept.last = None;
        let (_, limit_ns) = kept.limit?;
        // The counters of a level without a limit are read once in a while, so they are not kept open.
        let stat = keeps(&mut kept.stat, keep_open && limit_ns.is_some());
        let (periods, throttled_periods, throttled_ns) =
            self.parsed(stat, (cgroup, "cpu.stat"), |text| throttled(version, text))?;
        kept.last = Some(CpuQuota { limit_ns, periods, throttled_periods, throttled_ns });
        kept.last
    }
}

/// Closes a file that is not to be kept open.
fn keeps(file: &mut KeptFile, keep_open: bool) -> Option<&mut KeptFile> {
    if keep_open {
        return Some(file);
    }
    *file = None;
    None
}

/// A file of cgroupfs is returned whole by one read.
fn read(kept: Option<&mut KeptFile>, (cgroup, name): (&Path, &str), bytes: &mut [u8]) -> io::Result<usize> {
    let open = || File::open(cgroup.join(name));
    let Some(kept) = kept else { return open()?.read_at(bytes, 0) };
    // Fails if the cgroup was removed since; another one may have its path.
    if let Some(length) = kept.as_ref().and_then(|file| file.read_at(bytes, 0).ok()) {
        return Ok(length);
    }
    *kept = None;
    let file = open()?;
    let length = file.read_at(bytes, 0)?;
    *kept = Some(file);
    Ok(length)
}

impl PressureFiles {
    pub fn new(paths: PressurePaths) -> Self {
        let quotas = paths.levels.iter().map(|_| KeptQuota::default()).collect();
        Self { paths, keep_open: false, quotas, pressure: Default::default(), outcomes: ReadOutcomes::default() }
    }

    pub fn keep_open(&mut self, keep_open: bool) {
        self.keep_open = keep_open;
    }

    /// By level, from the container up.
    pub fn quotas(&mut self) -> Vec<Option<CpuQuota>> {
        let (keep_open, version, outcomes) = (self.keep_open, self.paths.version, &mut self.outcomes);
        let levels = self.paths.levels.iter().zip(&mut self.quotas);
        levels.map(|(cgroup, kept)| outcomes.quota(kept, keep_open, version, cgroup)).collect()
    }

    /// The PSI `some` totals of cpu, memory and io, in ns.
    pub fn some_ns(&mut self) -> [Option<u64>; PSI_FILES.len()] {
        let Some(cgroup) = &self.paths.v2 else { return [None; PSI_FILES.len()] };
        let (keep_open, outcomes) = (self.keep_open, &mut self.outcomes);
        let kept = &mut self.pressure;
        std::array::from_fn(|n| outcomes.parsed(keeps(&mut kept[n], keep_open), (cgroup, PSI_FILES[n]), some_total_ns))
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
            let found = outcomes.parsed(None, (dir.path(), "io.pressure"), some_total_ns);
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
        assert_eq!(files.pressure.each_ref().map(Option::is_some), [true, false, false]);
        // Reading a folder fails, as reading a file of a removed cgroup does.
        let removed = File::open(dir.path()).unwrap();
        files.pressure[0] = Some(removed);
        assert_eq!(files.some_ns()[0], Some(7_000));
        files.keep_open(false);
        assert_eq!(files.some_ns()[0], Some(7_000));
        assert!(files.pressure.iter().all(Option::is_none));
    }

    #[test]
    fn the_counters_of_a_level_without_a_limit_are_read_with_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let stat = |periods: u64| {
            let text = format!("nr_periods {periods}\nnr_throttled 0\nthrottled_usec 0\n");
            std::fs::write(dir.path().join("cpu.stat"), text).unwrap();
        };
        let write_limit = |text: &str| std::fs::write(dir.path().join("cpu.max"), text).unwrap();
        let mut files = files_of(CgroupVersion::V2, dir.path());
        let periods = |files: &mut PressureFiles| files.quotas()[0].map(|quota| quota.periods);
        stat(5);
        write_limit("max 100000\n");
        assert_eq!(periods(&mut files), Some(5));
        stat(6);
        assert_eq!(periods(&mut files), Some(5));
        // The limit is due again, and has been set.
        files.quotas[0].limit = None;
        write_limit("50000 100000\n");
        assert_eq!(periods(&mut files), Some(6));
        stat(7);
        assert_eq!(periods(&mut files), Some(7));
        std::fs::remove_file(dir.path().join("cpu.stat")).unwrap();
        assert_eq!(periods(&mut files), None);
    }

    /// Files of a cgroup: a number that is returned is one of the text.
    #[test]
    fn fuzz_cgroup_files() {
        devkit::fuzz(file!(), "cgroup_files", move |bytes| {
            let Ok(text) = std::str::from_utf8(bytes) else { return };
            if let Ok(Some(ns)) = some_total_ns(text) {
                assert!(text.contains("some ") && ns % 1000 == 0);
            }
            for version in [CgroupVersion::V1, CgroupVersion::V2] {
                if let Ok(Some((periods, ..))) = throttled(version, text) {
                    assert!(text.contains(&periods.to_string()) && text.contains("nr_periods"));
                }
            }
            let (quota, period) = text.split_once(' ').unwrap_or((text, "100000"));
            for none in ["max", "-1"] {
                if let Ok(Some((quota, period))) = limit(quota, period, none) {
                    assert!(quota >= 1000 && period >= 1000);
                }
            }
        });
    }
}
