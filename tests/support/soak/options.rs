//! The command line of `soak`.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::faults::{FaultKind, INJECTED};

pub const USAGE: &str = "usage: soak [--for 30m] [--seed N] [--faults NAME,..]";

/// Shorter than this, a run has no time for a fault and its convergence.
const SHORTEST: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, PartialEq)]
pub struct SoakOptions {
    pub lasts: Duration,
    pub seed: u64,
    /// Kinds that the schedule draws from.
    pub kinds: Vec<FaultKind>,
}

impl SoakOptions {
    /// `seed`: that of a run without `--seed`.
    pub fn parse(args: &[String], seed: u64) -> Result<Self> {
        let mut options = Self { lasts: Duration::from_secs(30 * 60), seed, kinds: INJECTED.to_vec() };
        let mut words = args.iter();
        while let Some(name) = words.next() {
            let value = words.next().with_context(|| format!("{name} needs a value; {USAGE}"))?;
            match name.as_str() {
                "--for" => options.lasts = humantime::parse_duration(value).with_context(|| format!("--for {value}"))?,
                "--seed" => options.seed = value.parse().with_context(|| format!("--seed {value}"))?,
                "--faults" => options.kinds = value.split(',').map(kind).collect::<Result<_>>()?,
                _ => bail!("unknown option {name}; {USAGE}"),
            }
        }
        ensure!(options.lasts >= SHORTEST, "--for must be at least {SHORTEST:?}");
        Ok(options)
    }
}

fn kind(name: &str) -> Result<FaultKind> {
    let names = || INJECTED.map(FaultKind::name).join(", ");
    INJECTED
        .into_iter()
        .find(|kind| kind.name() == name)
        .with_context(|| format!("unknown fault {name}: choose from {}", names()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<SoakOptions> {
        SoakOptions::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>(), 7)
    }

    #[test]
    fn a_command_line_is_parsed() {
        let options = parse("--for 3m --seed 5 --faults kill,gpu-lost").unwrap();
        assert_eq!((options.lasts.as_secs(), options.seed), (180, 5));
        assert_eq!(options.kinds, [FaultKind::Kill, FaultKind::GpuLost]);
        assert_eq!((parse("").unwrap().seed, parse("").unwrap().kinds.len()), (7, INJECTED.len()));
    }

    #[test]
    fn invalid_arguments_are_errors_that_name_them() {
        for (line, words) in [
            ("--for", "--for needs a value"),
            ("--for 3x", "--for 3x"),
            ("--for 5s", "at least"),
            ("--faults fire", "unknown fault fire"),
            ("--storm 1", "unknown option --storm"),
        ] {
            let error = format!("{:#}", parse(line).unwrap_err());
            assert!(error.contains(words), "{line}: {error}");
        }
    }
}
