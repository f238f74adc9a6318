//! Which tests of a run failed and why, read from the output of the test runner while it runs.

use std::{fs, mem};

/// Lines of a failure that are kept; the whole output stands above the summary.
const LINES_MOST: usize = 20;

#[derive(Debug, Default, PartialEq)]
enum Part {
    #[default]
    Tests,
    Successes,
    Details {
        backtrace: bool,
    },
    Names,
}

#[derive(Debug, Default)]
pub struct Failure {
    pub name: String,
    /// What it printed, without a backtrace.
    pub message: Vec<String>,
    /// The share of the processors' time that the host gave to other machines during the test. `None` if it cannot be read.
    pub stolen: Option<f64>,
}

#[derive(Debug, Default)]
pub struct Failures {
    part: Part,
    unfinished: usize,
    seen: Vec<Failure>,
    confirmed: Vec<String>,
    /// Number of tests that passed, by the runner's own count.
    pub passed: usize,
    cpu: Option<CpuTime>,
}

impl Failures {
    pub fn line(&mut self, line: &str) {
        self.line_at(line, CpuTime::now);
    }

    fn line_at(&mut self, line: &str, now: impl FnOnce() -> Option<CpuTime>) {
        match line {
            "successes:" => self.part = Part::Successes,
            "failures:" if matches!(self.part, Part::Details { .. }) => self.part = Part::Names,
            "failures:" => self.part = Part::Details { backtrace: false },
            _ if line.starts_with("running ") && line.trim_end_matches('s').ends_with(" test") => {
                (self.part, self.unfinished, self.cpu) = (Part::Tests, self.unfinished + 1, now());
            }
            _ if line.starts_with("test result: ") => {
                (self.part, self.unfinished) = (Part::Tests, self.unfinished.saturating_sub(1));
                let passed = line.split_once(". ").and_then(|(_, counts)| counts.split(' ').next()?.parse::<usize>().ok());
                self.passed += passed.unwrap_or_default();
            }
            _ => self.within_part(line, now),
        }
    }

    fn within_part(&mut self, line: &str, now: impl FnOnce() -> Option<CpuTime>) {
        match &mut self.part {
            // With one thread a line ends when its test does.
            Part::Tests => {
                let Some((name, outcome)) = line.strip_prefix("test ").and_then(|test| test.split_once(" ... ")) else { return };
                let cpu = now();
                let since = mem::replace(&mut self.cpu, cpu);
                if outcome.ends_with("FAILED") {
                    let stolen = since.zip(cpu).and_then(|(since, cpu)| cpu.stolen_since(since));
                    self.seen.push(Failure { name: name.to_owned(), stolen, ..Failure::default() });
                }
            }
            Part::Details { backtrace } => {
                let heading = line.strip_prefix("---- ").and_then(|line| line.strip_suffix(" stdout ----"));
                if let Some(name) = heading {
                    *backtrace = false;
                    // The details come in the order of names: the last one is the current one.
                    let failure = self.seen.iter().position(|failure| failure.name == name).map(|at| self.seen.remove(at));
                    self.seen.push(failure.unwrap_or_else(|| Failure { name: name.to_owned(), ..Failure::default() }));
                } else if line.eq_ignore_ascii_case("stack backtrace:") {
                    *backtrace = true;
                } else if let Some(failure) = self.seen.last_mut()
                    && !*backtrace
                    && !line.trim().is_empty()
                {
                    failure.message.push(line.to_owned());
                }
            }
            Part::Names => self.confirmed.extend(line.strip_prefix("    ").map(str::to_owned)),
            Part::Successes => {}
        }
    }

    /// The failed tests in the runner's order. `None` if the runner itself ended before its tests did: then it is not known which failed.
    pub fn finish(mut self) -> Option<Vec<Failure>> {
        let mut take = |name: String| {
            let found = self.seen.iter().position(|failure| failure.name == name).map(|at| self.seen.remove(at));
            let mut failure = found.unwrap_or_else(|| Failure { name, ..Failure::default() });
            // The assertion stands at the end.
            failure.message.drain(..failure.message.len().saturating_sub(LINES_MOST));
            failure
        };
        (self.unfinished == 0).then(|| mem::take(&mut self.confirmed).into_iter().map(&mut take).collect())
    }
}

/// Clock ticks of all processors since boot.
#[derive(Clone, Copy, Debug)]
struct CpuTime {
    all: u64,
    stolen: u64,
}

impl CpuTime {
    fn now() -> Option<Self> {
        Self::in_stat(&fs::read_to_string("/proc/stat").ok()?)
    }

    /// proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal; what follows is contained in user and nice.
    fn in_stat(stat: &str) -> Option<Self> {
        let fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().take(8);
        let ticks: Vec<u64> = fields.map(str::parse).collect::<Result<_, _>>().ok()?;
        Some(Self { all: ticks.iter().sum(), stolen: *ticks.get(7)? })
    }

    fn stolen_since(self, before: Self) -> Option<f64> {
        let all = self.all.checked_sub(before.all).filter(|all| *all > 0)?;
        Some(self.stolen.checked_sub(before.stolen)? as f64 / all as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "
running 4 tests
test a::holds ... ok
test b::breaks ... nvml-sim: no such file
FAILED
test c::breaks ... FAILED
test d::breaks ... FAILED

successes:

---- a::holds stdout ----
failures are printed here, too

successes:
    a::holds

failures:

---- d::breaks stdout ----
Error: third

---- c::breaks stdout ----
0.3 s
thread 'c::breaks' panicked at tests/c.rs:7:
second
stack backtrace:
   0: main

failures:
    d::breaks
    c::breaks
    b::breaks

test result: FAILED. 1 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s

running 1 test
test e::holds ... ok

test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    fn parse(text: &str) -> Failures {
        let mut failures = Failures::default();
        for (n, line) in (1..).zip(text.lines()) {
            failures.line_at(line, || Some(CpuTime { all: 100 * n, stolen: 10 * n }));
        }
        failures
    }

    #[test]
    fn failed_tests_have_their_messages_without_backtraces() {
        let failures = parse(OUTPUT);
        assert_eq!(failures.passed, 2);
        let failures = failures.finish().unwrap();
        assert_eq!(failures.iter().map(|f| &*f.name).collect::<Vec<_>>(), ["d::breaks", "c::breaks", "b::breaks"]);
        assert_eq!(failures[0].message, ["Error: third"]);
        assert_eq!(failures[1].message, ["0.3 s", "thread 'c::breaks' panicked at tests/c.rs:7:", "second"]);
        assert_eq!(failures[2].message, [""; 0]);
        assert_eq!((failures[1].stolen, failures[2].stolen), (Some(0.1), None));
    }

    #[test]
    fn a_runner_that_ended_early_names_no_tests() {
        assert!(parse("running 2 tests\ntest a::holds ... ok\ntest b::breaks ... FAILED").finish().is_none());
        assert_eq!(parse("running 0 tests\n\ntest result: ok. 0 passed").finish().map(|failures| failures.len()), Some(0));
    }

    #[test]
    fn stolen_time_is_the_eighth_number() {
        let cpu = CpuTime::in_stat("cpu  40 10 20 900 5 0 5 20 7 7\ncpu0 1 2 3\n").unwrap();
        assert_eq!((cpu.all, cpu.stolen), (1000, 20));
        assert!(CpuTime::in_stat("intr 1").is_none() && CpuTime::in_stat("cpu  1 2").is_none());
    }
}
