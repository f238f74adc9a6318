//! `lint`: the checks that a change must pass before it is tested. Runs every check, then fails if one failed.

mod families;
mod imports;
mod monitoring;
mod type_names;
mod unit;
mod words;

use crate::tools::{self, on_path, progress, run};
use anyhow::{Result, bail};

type Check = fn() -> Result<()>;

const CHECKS: [(&str, Check); 10] = [
    ("format", format),
    ("imports", imports::check),
    ("type-names", type_names::check),
    ("families", families::check),
    ("monitoring", monitoring::check),
    ("words", words::check),
    ("unit", unit::check),
    ("clippy", clippy),
    ("licences", licences),
    ("home-paths", home_paths),
];

/// Runs all checks, or those that are named.
pub fn verb(args: &[String]) -> Result<()> {
    let known = |name: &String| CHECKS.iter().any(|(check, _)| check == name);
    if let Some(unknown) = args.iter().find(|name| !known(name)) {
        bail!("unknown check {unknown:?}; choose from {}", CHECKS.map(|(name, _)| name).join(", "));
    }
    let chosen = CHECKS.iter().filter(|(name, _)| args.is_empty() || args.iter().any(|arg| arg == name));
    let mut failed = Vec::new();
    for (name, check) in chosen {
        if let Err(problem) = check() {
            eprintln!("xtask lint: {problem:#}");
            failed.push(*name);
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    progress("lint: passed");
    Ok(())
}

fn format() -> Result<()> {
    run(&mut tools::cargo(&["fmt", "--all", "--check"])?)
}

fn clippy() -> Result<()> {
    run(&mut tools::cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"])?)
}

fn licences() -> Result<()> {
    if on_path("cargo-deny").is_none() {
        progress("lint: cargo-deny is not installed, so licences and sources are not checked (`cargo install cargo-deny`)");
        return Ok(());
    }
    // Without `advisories`, which needs a database that is not reachable everywhere.
    run(&mut tools::cargo(&["deny", "--locked", "check", "licenses", "bans", "sources"])?)
}

/// A home directory in a tracked file is a path that exists on one machine only.
fn home_paths() -> Result<()> {
    progress("home directories in tracked files");
    let mut found = 0;
    for (name, text) in tools::tracked_texts()? {
        for (number, line) in text.lines().enumerate().filter(|(_, line)| names_a_home(line)) {
            eprintln!("{name}:{}: {}", number + 1, line.trim());
            found += 1;
        }
    }
    match found {
        0 => Ok(()),
        _ => bail!("{found} lines name a home directory"),
    }
}

fn names_a_home(line: &str) -> bool {
    // In parts, so that this file passes its own check.
    let starts = [concat!("/ho", "me/"), concat!("/Use", "rs/"), concat!("/ro", "ot/.")];
    starts.iter().any(|start| {
        line.match_indices(start).any(|(at, _)| {
            let before = line[..at].chars().next_back();
            let rest = &line[at + start.len()..];
            let after = rest.chars().next();
            // `/proc/1/root/.x` and `{dir}/home/` are parts of longer paths.
            let begins = before.is_none_or(|c| !c.is_alphanumeric() && !"}/.-_*>".contains(c));
            // Google's Container-Optimized OS has the driver there.
            begins && after.is_some_and(char::is_alphanumeric) && !rest.starts_with("kubernetes/")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::names_a_home;

    #[test]
    fn only_absolute_paths_into_a_home_are_found() {
        let home = concat!("/ho", "me");
        for (line, expect) in [
            (format!("let x = \"{home}/kim/x\""), true),
            (format!("{home}/kim/x"), true),
            (format!("{home}/"), false),
            (format!("{home}/kubernetes/bin"), false),
            (format!("{home}/$USER"), false),
            (format!("/proc/1/root{home}/kim"), false),
            (concat!("/ro", "ot/.cargo").to_owned(), true),
            (concat!("/proc/1/ro", "ot/.dockerenv").to_owned(), false),
        ] {
            assert_eq!(names_a_home(&line), expect, "{line}");
        }
    }
}
