//! Python environments with pinned packages from PyPI, kept between runs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// Helm's engine and the schemas of Kubernetes, for the chart.
pub const CHART_PACKAGES: [&str; 2] = ["helm-python-sdk==0.2.2", "kubernetes-validate==1.37.0"];

/// A server of the S3 protocol.
pub const S3_PACKAGES: [&str; 1] = ["moto[s3,server]==5.1.22"];

/// A Python environment with exactly these packages, made in a folder of `tools` if it is missing; its `bin` folder. Other
/// processes wait meanwhile.
pub fn venv(tools: &Path, packages: &[&str]) -> Result<PathBuf> {
    let (all, name) = (tools.join("venvs"), packages.join(","));
    let (folder, lock) = (all.join(&name), all.join(format!("{name}.lock")));
    let complete = folder.join("complete");
    fs::create_dir_all(&all).with_context(|| all.display().to_string())?;
    // Tests run at the same time, each in a process of its own. The lock ends with the file.
    let locked = File::create(&lock).and_then(|file| file.lock().map(|()| file)).with_context(|| lock.display().to_string())?;
    if !complete.exists() {
        let made = Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder).status()?;
        ensure!(made.success(), "python3 -m venv failed");
        let pip = Command::new(folder.join("bin/pip")).args(["install", "--quiet"]).args(packages).status()?;
        ensure!(pip.success(), "pip install {} failed", packages.join(" "));
        fs::write(complete, "")?;
    }
    drop(locked);
    Ok(folder.join("bin"))
}
