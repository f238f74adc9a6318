//! The result of a privileged test, from the output of its runner.

use std::{fs, time::Duration};

/// Lines of a failure in the summary; the whole output stands above it.
const LINES_MOST: usize = 20;

#[derive(Debug)]
pub struct Outcome {
    pub name: String,
    pub took: Duration,
    /// What the test printed, if it failed, without a backtrace; the assertion stands at the end.
    pub failure: Option<Vec<String>>,
    /// The share of the processors' time that the host gave to other machines during the test. `None` if it cannot be read.
    pub stolen: Option<f64>,
}

/// What a test itself printed, from the output of its runner, which ran it alone.
pub fn printed<'o>(name: &str, output: &'o str) -> Vec<&'o str> {
    let heading = format!("---- {name} stdout ----");
    let lines = output.lines().skip_while(|line| *line != heading).skip(1);
    lines.take_while(|line| !matches!(*line, "successes:" | "failures:")).filter(|line| !line.trim().is_empty()).collect()
}

/// The end of what a failed test printed, without a backtrace. What a test lacks that did not end by itself is everything.
pub fn message(name: &str, output: &str) -> Vec<String> {
    let own = printed(name, output);
    let lines = if own.is_empty() { output.lines().collect() } else { own };
    let lines: Vec<&str> = lines.into_iter().take_while(|line| !line.eq_ignore_ascii_case("stack backtrace:")).collect();
    lines[lines.len().saturating_sub(LINES_MOST)..].iter().map(|line| (*line).to_owned()).collect()
}

/// Clock ticks of all processors since boot.
#[derive(Clone, Copy, Debug)]
pub struct CpuTime {
    all: u64,
    stolen: u64,
}

impl CpuTime {
    pub fn now() -> Option<Self> {
        Self::in_stat(&fs::read_to_string("/proc/stat").ok()?)
    }

    /// proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal; what follows is contained in user and nice.
    fn in_stat(stat: &str) -> Option<Self> {
        let fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().take(8);
        let ticks: Vec<u64> = fields.map(str::parse).collect::<Result<_, _>>().ok()?;
        Some(Self { all: ticks.iter().sum(), stolen: *ticks.get(7)? })
    }

    pub fn stolen_since(self, before: Self) -> Option<f64> {
        let all = self.all.checked_sub(before.all).filter(|all| *all > 0)?;
        Some(self.stolen.checked_sub(before.stolen)? as f64 / all as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAILED: &str = "
running 1 test
test c::breaks ... nvml-sim: no such file
FAILED

failures:

---- c::breaks stdout ----
0.3 s
thread 'c::breaks' panicked at tests/c.rs:7:
second
stack backtrace:
   0: main

failures:
    c::breaks

test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 9 filtered out; finished in 1.00s
";

    #[test]
    fn a_failed_test_has_its_message_without_the_backtrace() {
        assert_eq!(message("c::breaks", FAILED), ["0.3 s", "thread 'c::breaks' panicked at tests/c.rs:7:", "second"]);
    }

    #[test]
    fn a_test_that_did_not_end_has_all_of_its_output() {
        assert_eq!(message("a::hangs", "running 1 test\ntest a::hangs ... "), ["running 1 test", "test a::hangs ... "]);
    }

    #[test]
    fn what_a_passed_test_printed_is_kept() {
        let output = "running 1 test\ntest a::b ... ok\n\nsuccesses:\n\n---- a::b stdout ----\n5 s\n\n\nsuccesses:\n    a::b\n";
        assert_eq!(printed("a::b", output), ["5 s"]);
        assert_eq!(printed("a::b", "running 1 test\ntest a::b ... ok\n\nsuccesses:\n\nsuccesses:\n    a::b\n"), [""; 0]);
    }

    #[test]
    fn stolen_time_is_the_eighth_number() {
        let cpu = CpuTime::in_stat("cpu  40 10 20 900 5 0 5 20 7 7\ncpu0 1 2 3\n").unwrap();
        assert_eq!((cpu.all, cpu.stolen), (1000, 20));
        assert!(CpuTime::in_stat("intr 1").is_none() && CpuTime::in_stat("cpu  1 2").is_none());
    }
}
