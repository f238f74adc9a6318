//! `fuzz`: runs the fuzz harnesses with libFuzzer, which looks for inputs that reach new code.
//!
//! ```text
//!  fn fuzz_NAME, a unit test --cargo test--> kept inputs, and changed copies of them (devkit/src/fuzz)
//!                            --this verb---> instrumented build -> libFuzzer, NAME after NAME
//!
//!  sampler/../__fuzz__/NAME/corpus    kept inputs, in git
//!  sampler/../__fuzz__/NAME/crashes   findings: from then on `cargo test` fails on them until they are mended
//!  target/fuzz/corpus/NAME            inputs of earlier runs that reach more code; grows
//! ```
//! The packages of this workspace are instrumented, by this program as cargo's `RUSTC_WORKSPACE_WRAPPER`, and with them what they make of
//! generic code of others (serde, prost). So all other crates are those of `cargo test` of the same packages. The flags are stable ones.
//! There is no sanitizer: the code under test is safe Rust, in which a wrong access is a panic. Overflow checks and debug assertions are
//! on.

mod outcome;
mod targets;

use crate::{
    sys,
    tools::{self, Usage, progress},
};
use anyhow::{Context, Result, bail};
use outcome::FuzzOutcome;
use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};
use targets::Target;

/// Set for the compiler runs of this verb, in which this program is cargo's `RUSTC_WORKSPACE_WRAPPER`.
pub const WRAPPER: &str = "XTASK_FUZZ_RUSTC";
/// Of each target. All together take some minutes.
const DEFAULT_TIME: Duration = Duration::from_secs(10);
/// One input may take so long.
const INPUT_SECONDS: u32 = 5;
/// Memory of a whole run, in MiB; harnesses keep nothing between inputs.
const MEMORY_MIB: u32 = 1024;
/// Longest input, in bytes.
const INPUT_BYTES: u32 = 32 << 10;

/// Coverage counters, their places, and the operands of comparisons.
const INSTRUMENTED: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];
/// Crates of which the coverage says nothing about an input; `___` is a question of cargo.
const PLAIN: [&str; 3] = ["build_script_build", "devkit", "___"];

struct FuzzOptions {
    names: Vec<String>,
    lasts: Duration,
    list: bool,
}

impl FuzzOptions {
    fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self { names: Vec::new(), lasts: DEFAULT_TIME, list: false };
        let mut words = args.iter();
        while let Some(word) = words.next() {
            let (name, given) = tools::option(word);
            let mut value = || given.or_else(|| words.next().map(String::as_str)).unwrap_or_default();
            match name {
                "--for" => options.lasts = tools::duration(value())?,
                "--list" if given.is_none() => options.list = true,
                _ if word.starts_with('-') => return Err(tools::unknown(word)),
                _ => options.names.push(word.clone()),
            }
        }
        if options.lasts < Duration::from_secs(1) {
            return Err(Usage("--for must be at least 1s".into()).into());
        }
        Ok(options)
    }

    /// The targets that are named, in the order of the list; all without a name.
    fn chosen(&self, all: Vec<Target>) -> Result<Vec<Target>> {
        if let Some(unknown) = self.names.iter().find(|name| all.iter().all(|target| target.name != **name)) {
            return Err(Usage(format!("unknown target '{unknown}'; `cargo xtask fuzz --list` has all")).into());
        }
        Ok(all.into_iter().filter(|target| self.names.is_empty() || self.names.contains(&target.name)).collect())
    }
}

pub fn verb(args: &[String]) -> Result<()> {
    let options = FuzzOptions::parse(args)?;
    let chosen = options.chosen(targets::all()?)?;
    if options.list {
        chosen.iter().for_each(|target| println!("{:<18} {:<16} {}", target.name, target.package, target.file));
        return Ok(());
    }
    sys::catch_signals();
    let programs = build(&chosen)?;
    let mut failed = Vec::new();
    println!("{}", FuzzOutcome::HEAD);
    for target in &chosen {
        let program = programs.get(&target.package).with_context(|| format!("cargo built no tests of {}", target.package))?;
        let outcome = run(target, program, options.lasts)?;
        println!("{}", outcome.line(&target.name));
        if let Some(signal) = sys::interrupted() {
            bail!("interrupted by signal {signal}");
        }
        if !outcome.found.is_empty() || outcome.failed || !outcome.has_run() {
            report(target, &outcome);
            failed.push(target.name.as_str());
        }
    }
    match failed.as_slice() {
        [] => Ok(()),
        names => bail!("failed: {}", names.join(", ")),
    }
}

fn report(target: &Target, outcome: &FuzzOutcome) {
    let shown = |path: &Path| path.strip_prefix(tools::root()).unwrap_or(path).display().to_string();
    if !outcome.has_run() && !outcome.failed && outcome.found.is_empty() {
        eprintln!("{}: libFuzzer ran no input, or reached no code", target.name);
    }
    for file in &outcome.found {
        eprintln!("{}: {}", target.name, shown(file));
    }
    eprintln!("{}: output in {}", target.name, shown(&outcome.log));
    eprintln!("{}: to replay: cargo test --package {} fuzz_{}", target.name, target.package, target.name);
}

fn folder() -> Result<PathBuf> {
    Ok(tools::target_dir()?.join("fuzz"))
}

/// Builds the instrumented tests of the packages. Returns their programs by package.
fn build(chosen: &[Target]) -> Result<BTreeMap<String, PathBuf>> {
    let mut cargo = tools::cargo(&["test", "--locked", "--no-run", "--package", "devkit", "--features", "devkit/libfuzzer"])?;
    let packages: BTreeSet<&str> = chosen.iter().map(|target| target.package.as_str()).collect();
    packages.iter().for_each(|package| {
        cargo.args(["--package", package]);
    });
    // Messages of panics have their lines without it.
    cargo.args(["--config", "profile.dev.package.gpu-sampler.debug=0"]);
    cargo.args(["--message-format", "json-render-diagnostics"]).stderr(Stdio::inherit());
    cargo.env("RUSTC_WORKSPACE_WRAPPER", env::current_exe()?).env(WRAPPER, "1");
    progress(tools::shown(&cargo));
    let output = cargo.output()?;
    if !output.status.success() {
        bail!("`{}` failed ({})", tools::shown(&cargo), output.status);
    }
    Ok(programs(&String::from_utf8(output.stdout)?, &packages))
}

/// The programs of tests in cargo's messages. A package of this workspace has one.
fn programs(messages: &str, packages: &BTreeSet<&str>) -> BTreeMap<String, PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let program = |message: serde_json::Value| {
        let name = message["target"]["name"].as_str()?.replace('_', "-");
        let executable = message["executable"].as_str().filter(|_| message["profile"]["test"] == true)?;
        packages.contains(name.as_str()).then(|| (name, PathBuf::from(executable)))
    };
    messages.filter_map(program).collect()
}

/// Runs one target for this time.
fn run(target: &Target, program: &Path, lasts: Duration) -> Result<FuzzOutcome> {
    let test = test_of(target, program)?;
    let (work, crashes) = (folder()?.join("corpus").join(&target.name), target.folder().join("crashes"));
    let kept = target.folder().join("corpus");
    for folder in [&work, &crashes, &kept] {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let before = files(&crashes)?;
    let log = folder()?.join(format!("{}.log", target.name));
    // libFuzzer writes new inputs to the first folder.
    let args = [
        work.display().to_string(),
        kept.display().to_string(),
        crashes.display().to_string(),
        format!("-artifact_prefix={}/", crashes.display()),
        format!("-max_total_time={}", lasts.as_secs()),
        format!("-timeout={INPUT_SECONDS}"),
        format!("-rss_limit_mb={MEMORY_MIB}"),
        format!("-max_len={INPUT_BYTES}"),
        "-use_value_profile=1".into(),
        "-print_final_stats=1".into(),
    ];
    let mut command = Command::new(program);
    let to = fs::File::create(&log).with_context(|| log.display().to_string())?;
    command.args([&test, "--exact", "--nocapture", "--test-threads", "1"]).current_dir(tools::root());
    command.env(devkit::ARGUMENTS, args.join("\n"));
    command.stdin(Stdio::null()).stdout(to.try_clone()?).stderr(to);
    let status = sys::dies_with_us(&mut command, libc::SIGKILL).status().with_context(|| tools::shown(&command))?;
    let found: Vec<PathBuf> = files(&crashes)?.difference(&before).cloned().collect();
    // Only if it is empty.
    let _kept_with_findings = fs::remove_dir(&crashes);
    Ok(FuzzOutcome::of(&fs::read(&log)?, log, found, !status.success()))
}

fn files(folder: &Path) -> Result<BTreeSet<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    Ok(entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?)
}

/// The full name of the test.
fn test_of(target: &Target, program: &Path) -> Result<String> {
    let list = tools::output(program, &["--list", "--format", "terse"]).with_context(|| program.display().to_string())?;
    let mut tests = list.lines().filter_map(|line| line.strip_suffix(": test"));
    let is_it = |test: &&str| test.rsplit("::").next().and_then(|name| name.strip_prefix("fuzz_")) == Some(target.name.as_str());
    let found = tests.find(is_it);
    found.map(str::to_owned).with_context(|| format!("{} has no test fuzz_{}", program.display(), target.name))
}

/// This program as the wrapper of a compiler: adds the instrumentation where it is due. `args`: the compiler and its arguments.
pub fn rustc(args: &[String]) -> ExitCode {
    let Some((compiler, rest)) = args.split_first() else { return ExitCode::FAILURE };
    let mut command = Command::new(compiler);
    command.args(rest);
    if is_instrumented(rest) {
        command.args(INSTRUMENTED);
    }
    match command.status() {
        Ok(status) => ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)),
        Err(error) => {
            eprintln!("xtask fuzz: {compiler}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn is_instrumented(args: &[String]) -> bool {
    let name = args.iter().position(|arg| arg == "--crate-name").and_then(|at| args.get(at + 1));
    name.is_some_and(|name| !PLAIN.contains(&name.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn options_are_parsed_and_validated() {
        let none = FuzzOptions::parse(&[]).unwrap();
        assert!(none.names.is_empty() && none.lasts == DEFAULT_TIME && !none.list);
        let all = FuzzOptions::parse(&words("btf --for 2m cri --list")).unwrap();
        assert_eq!((all.names, all.lasts, all.list), (words("btf cri"), Duration::from_secs(120), true));
        assert_eq!(FuzzOptions::parse(&words("--for=90s")).unwrap().lasts, Duration::from_secs(90));
        for wrong in ["--for", "--for soon", "--for 1ms", "--list=x", "--until"] {
            assert!(FuzzOptions::parse(&words(wrong)).is_err_and(|error| error.is::<Usage>()), "{wrong}");
        }
    }

    #[test]
    fn targets_are_chosen_by_their_whole_name() {
        let all = || ["a", "b", "ab"].map(|name| Target { name: name.into(), package: "p".into(), file: "f".into() }).to_vec();
        let chosen = |text: &str| {
            let chosen = FuzzOptions::parse(&words(text)).unwrap().chosen(all())?;
            anyhow::Ok(chosen.into_iter().map(|target| target.name).collect::<Vec<_>>())
        };
        assert_eq!(chosen("").unwrap(), ["a", "b", "ab"]);
        assert_eq!(chosen("ab a").unwrap(), ["a", "ab"]);
        assert!(chosen("a x").is_err_and(|error| error.to_string().contains("unknown target 'x'")));
    }

    #[test]
    fn build_scripts_and_the_engine_are_not_instrumented() {
        for (args, expect) in [
            ("--crate-name sampler_core --edition=2024", true),
            ("--crate-name build_script_build", false),
            ("--crate-name devkit", false),
            ("- --crate-name ___ --print=file-names", false),
            ("-vV", false),
        ] {
            assert_eq!(is_instrumented(&words(args)), expect, "{args}");
        }
    }

    #[test]
    fn programs_of_tests_are_found_in_the_messages_of_cargo() {
        let messages = r#"{"target":{"name":"sampler_core"},"profile":{"test":true},"executable":"/t/core-1"}
            {"target":{"name":"gpu-sampler"},"profile":{"test":true},"executable":"/t/gpu-sampler-1"}
            {"target":{"name":"gpu-sampler"},"profile":{"test":false},"executable":"/t/gpu-sampler"}
            {"target":{"name":"other"},"profile":{"test":true},"executable":"/t/other"}
            {"target":{"name":"sampler_core"},"profile":{"test":true},"executable":null}"#;
        let packages = BTreeSet::from(["sampler-core", "gpu-sampler"]);
        let expect = [("gpu-sampler", "/t/gpu-sampler-1"), ("sampler-core", "/t/core-1")];
        assert_eq!(programs(messages, &packages), BTreeMap::from(expect.map(|(name, path)| (name.into(), path.into()))));
    }
}
