//! The result of one run, from libFuzzer's output.

use std::path::PathBuf;

#[derive(Debug, PartialEq)]
pub struct FuzzOutcome {
    /// Inputs that were tried, and in a second.
    executions: u64,
    per_second: u64,
    /// Places in the code that were reached.
    covered: u64,
    /// Inputs that reach different code.
    inputs: u64,
    pub log: PathBuf,
    /// New files of findings.
    pub found: Vec<PathBuf>,
    /// The run ended with an error.
    pub failed: bool,
}

impl FuzzOutcome {
    pub const HEAD: &str = "target               executions        /s   covered  inputs  findings";

    pub fn of(log: &[u8], path: PathBuf, found: Vec<PathBuf>, failed: bool) -> Self {
        let text = String::from_utf8_lossy(log);
        let statistic = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix("stat::")?.strip_prefix(name)?.strip_prefix(':'));
            value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
        };
        // The last line of progress: `#7 DONE cov: 25 ft: 99 corp: 3/15b ..`.
        let last = text.lines().rfind(|line| line.starts_with('#') && line.contains(" cov: ")).unwrap_or_default();
        let number = |after: &str| {
            let rest = last.split_once(after).map_or("", |(_, rest)| rest);
            rest.split(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
        };
        Self {
            executions: statistic("number_of_executed_units"),
            per_second: statistic("average_exec_per_sec"),
            covered: number(" cov: "),
            inputs: number(" corp: "),
            log: path,
            found,
            failed,
        }
    }

    /// Whether the code was fuzzed: without its instrumentation, libFuzzer runs and covers nothing.
    pub fn has_run(&self) -> bool {
        self.executions > 0 && self.covered > 0
    }

    pub fn line(&self, name: &str) -> String {
        let Self { executions, per_second, covered, inputs, found, .. } = self;
        format!("{name:<18} {executions:>12} {per_second:>9} {covered:>9} {inputs:>7} {:>9}", found.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_a_run_are_read_from_its_output() {
        let log = "INFO: Loaded 1 modules   (2718 inline 8-bit counters): 2718 [0x1, 0x2), \n#2\tINITED cov: 25 ft: 25 corp: 1/1b exec/s: 0\n\
            #14081549\tDONE   cov: 27 ft: 30 corp: 3/15b lim: 4096 exec/s: 670549 rss: 27Mb\n\
            stat::number_of_executed_units: 14081549\nstat::average_exec_per_sec:     670549\n";
        let outcome = FuzzOutcome::of(log.as_bytes(), "log".into(), vec!["crash-1".into()], true);
        let expect = FuzzOutcome {
            executions: 14_081_549,
            per_second: 670_549,
            covered: 27,
            inputs: 3,
            log: "log".into(),
            found: vec!["crash-1".into()],
            failed: true,
        };
        assert_eq!(outcome, expect);
        assert_eq!(outcome.line("btf"), "btf                    14081549    670549        27       3         1");
        let nothing = FuzzOutcome::of(b"\xff", "log".into(), Vec::new(), false);
        assert_eq!((nothing.executions, nothing.covered, nothing.inputs), (0, 0, 0));
        assert!(outcome.has_run() && !nothing.has_run());
    }
}
