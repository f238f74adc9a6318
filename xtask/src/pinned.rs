//! Programs of other projects that this tool runs, in pinned versions: built by cargo into `target/tools` when a verb first needs them.

use crate::tools::{self, progress, run};
use anyhow::{Context, Result, bail};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// A program of crates.io, which is named as its package.
#[derive(Clone, Copy)]
pub struct Program {
    pub name: &'static str,
    pub version: &'static str,
}

pub fn folder() -> PathBuf {
    tools::root().join("target/tools")
}

/// This workspace's cargo, without the settings of its caller that would change what it installs.
pub fn cargo() -> Result<Command> {
    let mut cargo = tools::cargo(&[])?;
    for name in ["CARGO_TARGET_DIR", "CARGO_BUILD_TARGET", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"] {
        cargo.env_remove(name);
    }
    Ok(cargo)
}

impl Program {
    /// Its path; it is built if this version is not installed.
    pub fn ensure(self) -> Result<PathBuf> {
        let Self { name, version } = self;
        let program = folder().join("bin").join(name);
        let installed = folder().join(".crates.toml");
        if program.exists() && has(&fs::read_to_string(&installed).unwrap_or_default(), self) {
            return Ok(program);
        }
        progress(format_args!("building {name} {version} from source, once; this takes a minute or two"));
        run(cargo()?.args(["install", name, "--version", version, "--locked", "--force", "--root"]).arg(folder()))?;
        if !program.exists() {
            bail!("{name} {version} has no program of that name");
        }
        Ok(program)
    }
}

/// Whether cargo's list of what it installed has this version.
fn has(installed: &str, Program { name, version }: Program) -> bool {
    installed.lines().any(|line| line.starts_with(&format!("\"{name} {version} (")))
}

/// A program of packages from PyPI, in a Python environment of its own.
pub fn of_pypi(packages: &[&str], program: &str) -> Result<PathBuf> {
    let bin = devkit::venv(&folder(), packages).with_context(|| packages.join(" "))?;
    Ok(Path::new(&bin).join(program))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pinned_version_counts_as_installed() {
        let list = "[v1]\n\"bpf-linker 0.13.0 (registry+https://example.org)\" = [\"bpf-linker\"]\n";
        assert!(has(list, Program { name: "bpf-linker", version: "0.13.0" }));
        assert!(!has(list, Program { name: "bpf-linker", version: "0.13" }));
        assert!(!has(list, Program { name: "linker", version: "0.13.0" }));
        assert!(!has("", Program { name: "bpf-linker", version: "0.13.0" }));
    }
}
