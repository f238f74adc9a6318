//! Shared by several verbs: paths, running commands, progress messages.

use crate::sys;
use anyhow::{Context, Result, bail};
use std::{
    env,
    ffi::OsString,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

/// Folders that may be missing in PATH.
const DAEMONS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// An error in the command line: exit code 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// A command that this tool ran for its caller failed: this tool exits with its status.
#[derive(Debug)]
pub struct Ended {
    pub what: String,
    pub status: u8,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` ended with status {}", self.what, self.status)
    }
}

impl std::error::Error for Ended {}

pub fn unknown(word: &str) -> anyhow::Error {
    Usage(format!("unexpected argument '{word}'; see `cargo xtask help`")).into()
}

/// The name of an option, and its value in `--name=value`.
pub fn option(word: &str) -> (&str, Option<&str>) {
    word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)))
}

pub fn no_arguments(args: &[String]) -> Result<()> {
    match args.first() {
        Some(word) => Err(unknown(word)),
        None => Ok(()),
    }
}

pub fn progress(what: impl std::fmt::Display) {
    eprintln!("xtask: {what}");
}

pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// The files that git tracks, as paths from the root, with their texts; none, with a message, outside a checkout. A deleted file is
/// still tracked, and a binary file has no text: both are skipped.
pub fn tracked_texts() -> Result<Vec<(String, String)>> {
    let root = root();
    let path = root.to_str().context("the path of this checkout is UTF-8")?;
    let Some(list) = output("git", &["-C", path, "ls-files", "-z"]) else {
        progress("not a git checkout, so there are no tracked files to read");
        return Ok(Vec::new());
    };
    let read = |name: &str| std::fs::read_to_string(root.join(name)).ok().map(|text| (name.to_owned(), text));
    Ok(list.split_terminator('\0').filter_map(read).collect())
}

/// Cargo's target folder of this workspace.
pub fn target_dir() -> Result<PathBuf> {
    Ok(match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => env::current_dir()?.join(dir),
        None => root().join("target"),
    })
}

/// Removes the variables that a cargo sets for its children; a second cargo must not get them.
pub fn forget_cargo(command: &mut Command) -> &mut Command {
    const NAMES: [&str; 4] = ["CARGO", "LD_LIBRARY_PATH", "RUST_RECURSION_COUNT", "OUT_DIR"];
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let of_package = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"];
        if of_package.iter().any(|start| text.starts_with(start)) || NAMES.contains(&&*text) {
            command.env_remove(&name);
        }
    }
    command
}

/// This workspace's cargo, at its root, with the kernel program's object declared.
pub fn cargo(args: &[&str]) -> Result<Command> {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    forget_cargo(&mut command).current_dir(root()).env("CARGO_TARGET_DIR", target_dir()?).args(args);
    Ok(command)
}

/// The command as typed, for messages.
pub fn shown(command: &Command) -> String {
    let name = Path::new(command.get_program()).file_name().unwrap_or_default();
    let words = std::iter::once(name).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Prints and runs a command; its failure is an error.
pub fn run(command: &mut Command) -> Result<()> {
    progress(shown(command));
    let status = command.status().with_context(|| shown(command))?;
    if !status.success() {
        bail!("`{}` failed ({status})", shown(command));
    }
    Ok(())
}

/// Standard output of a command, if it can be run and succeeds.
pub fn output(program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).env("LC_ALL", "C").output().ok()?;
    if !output.status.success() {
        return None;
    }
    String::from_utf8(output.stdout).ok()
}

/// The first executable of that name on PATH or in the folders of daemons.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(DAEMONS.map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0))
}

/// PATH, with the folders of daemons and administrators' tools.
pub fn path_with_daemons() -> OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    path.push(format!(":{}", DAEMONS.join(":")));
    path
}

/// A command with the full path of its program; the program finds its own helpers in the same folders.
pub fn program(name: &str) -> Result<Command> {
    let file = on_path(name).with_context(|| format!("{name} is not installed"))?;
    let mut command = Command::new(file);
    command.env("PATH", path_with_daemons());
    Ok(command)
}

/// The last lines of a log.
pub fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// Parses a duration; a bare number is seconds.
pub fn duration(text: &str) -> Result<Duration> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor = match unit {
        "ms" => 0.001,
        "s" | "" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => f64::NAN,
    };
    let seconds = number.parse::<f64>().map_or(f64::NAN, |number| number * factor);
    let parsed = Duration::try_from_secs_f64(seconds).ok().filter(|duration| !duration.is_zero());
    parsed.ok_or_else(|| Usage(format!("'{text}' is not a duration, such as 30s, 5m or 1500ms")).into())
}

/// A child that is ended and reaped when this is dropped.
pub struct Running {
    pub name: String,
    child: Child,
}

impl Running {
    /// Starts the child so that it dies with this process in any case.
    pub fn start(name: impl Into<String>, command: &mut Command) -> Result<Self> {
        let child = sys::dies_with_us(command, libc::SIGKILL).spawn();
        let child = child.with_context(|| format!("starting `{}`", shown(command)))?;
        Ok(Self { name: name.into(), child })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The exit status, if the child has ended.
    pub fn ended(&mut self) -> Result<Option<std::process::ExitStatus>> {
        self.child.try_wait().with_context(|| self.name.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The child has not been waited for, so its id cannot have been reused.
        if let Ok(None) = self.child.try_wait() {
            sys::kill(self.child.id() as i32, libc::SIGTERM);
            let patience = Duration::from_secs(3);
            let child = &mut self.child;
            if !wait_until(patience, || !matches!(child.try_wait(), Ok(None))) {
                let _already_ended = child.kill();
            }
            let _reaped = child.wait();
        }
    }
}

/// Polls until `done` or the time is over. Returns the last result.
pub fn wait_until(patience: Duration, mut done: impl FnMut() -> bool) -> bool {
    let from = Instant::now();
    loop {
        if done() {
            return true;
        }
        if from.elapsed() >= patience {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units_and_bare_numbers_are_seconds() {
        for (text, expect) in [
            ("30s", Some(30_000)),
            ("1.5m", Some(90_000)),
            ("1500ms", Some(1_500)),
            ("7", Some(7_000)),
            ("", None),
            ("0s", None),
            ("s", None),
            ("3d", None),
            ("-1s", None),
        ] {
            assert_eq!(duration(text).ok(), expect.map(Duration::from_millis), "{text}");
        }
    }
}
