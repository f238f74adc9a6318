//! Events for which the kernel did not run the program.
//!
//! A raw tracepoint program is skipped while another task on the same processor runs it, which happens where tracepoint programs can
//! be preempted. The kernel counts skips in `bpf_prog_info.recursion_misses` of the program (Linux 5.12 and newer) and prints the
//! count in the `/proc/self/fdinfo` file of the descriptor. That file stays open; each read at offset 0 returns the current count.
//!
//! What a skip means for the tables is decided elsewhere. A skipped run may have been for a thread, which the program would have dropped.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use sampler_common::kind;
use thiserror::Error;

/// Bytes read of an fdinfo file; the kernel prints about 300.
const FDINFO_BYTES: usize = 4096;

#[derive(Debug, Error)]
#[error(
    "cannot read the count of skipped eBPF programs from {path}; mount /proc for the agent, otherwise these losses are not counted"
)]
pub struct MissesError {
    path: PathBuf,
    source: io::Error,
}

struct Counter {
    /// Index into [`kind::NAMES`].
    kind: u32,
    path: PathBuf,
    fdinfo: File,
}

/// The skip counters of all attached programs.
pub struct Misses {
    counters: Vec<Counter>,
}

impl Misses {
    /// Opens the counters of these programs. The descriptors must stay open while the counters are read.
    pub fn open<'a>(programs: impl Iterator<Item = (u32, BorrowedFd<'a>)>) -> Result<Self, MissesError> {
        let open = |(kind, fd): (u32, BorrowedFd<'_>)| {
            let path = PathBuf::from(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()));
            match File::open(&path) {
                Ok(fdinfo) => Ok(Counter { kind, path, fdinfo }),
                Err(source) => Err(MissesError { path, source }),
            }
        };
        programs.map(open).collect::<Result<_, _>>().map(|counters| Self { counters })
    }

    /// Skipped runs so far, per event kind; 0 if the kernel does not count them.
    pub fn read(&self) -> Result<[u64; kind::COUNT as usize], MissesError> {
        let mut missed = [0; kind::COUNT as usize];
        for counter in &self.counters {
            if let Some(missed) = missed.get_mut(counter.kind as usize) {
                *missed += counter.read()?.unwrap_or(0);
            }
        }
        Ok(missed)
    }

    /// Whether the kernel counts skipped runs.
    pub fn counted(&self) -> Result<bool, MissesError> {
        self.counters.first().map_or(Ok(false), |counter| Ok(counter.read()?.is_some()))
    }
}

impl Counter {
    fn read(&self) -> Result<Option<u64>, MissesError> {
        let mut text = [0; FDINFO_BYTES];
        match self.fdinfo.read_at(&mut text, 0) {
            Ok(len) => Ok(recursion_misses(text.get(..len).unwrap_or_default())),
            Err(source) => Err(MissesError { path: self.path.clone(), source }),
        }
    }
}

/// The count in the fdinfo of a program; `None` if the kernel does not print it.
fn recursion_misses(fdinfo: &[u8]) -> Option<u64> {
    let value = fdinfo.split(|b| *b == b'\n').find_map(|line| line.strip_prefix(b"recursion_misses:"))?;
    std::str::from_utf8(value).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd as _;

    /// Linux 6.18.
    const NEW: &str = "pos:\t0\nflags:\t02000002\nmnt_id:\t17\nino:\t1057\nprog_type:\t17\nprog_jited:\t1\n\
                       prog_tag:\t2bcf1fcb4a04b8b4\nmemlock:\t4096\nprog_id:\t137\nrun_time_ns:\t0\nrun_cnt:\t0\n\
                       recursion_misses:\t135\nverified_insns:\t377\n";
    /// Linux 5.10.
    const OLD: &str = "pos:\t0\nflags:\t02000002\nmnt_id:\t13\nprog_type:\t17\nprog_jited:\t1\n\
                       prog_tag:\t2bcf1fcb4a04b8b4\nmemlock:\t4096\nprog_id:\t9\nrun_time_ns:\t0\nrun_cnt:\t0\n";

    #[test]
    fn the_skip_count_is_parsed_from_fdinfo_of_old_and_new_kernels() {
        let check = |text: &str, expect: Option<u64>| assert_eq!(recursion_misses(text.as_bytes()), expect, "{text:?}");
        check(NEW, Some(135));
        check(OLD, None);
        check("", None);
        check("recursion_misses:\t18446744073709551615", Some(u64::MAX));
        check("recursion_misses:\t\n", None);
        check("recursion_misses:\t-1\n", None);
        check("no_recursion_misses:\t7\n", None);
    }

    #[test]
    fn a_descriptor_that_is_not_a_program_has_no_count() {
        let file = File::open("/proc/self/stat").unwrap();
        let misses = Misses::open([(kind::EXIT, file.as_fd())].into_iter()).unwrap();
        assert_eq!(misses.read().unwrap(), [0; kind::COUNT as usize]);
        assert!(!misses.counted().unwrap());
    }
}
