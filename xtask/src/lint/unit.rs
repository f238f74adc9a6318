//! Checks the systemd unit that packages install: every setting is known, and the exposure stays where it was measured.

use crate::tools::{self, on_path, progress};
use anyhow::{Context as _, Result, bail};
use std::{fs, process::Command};

const UNIT: &str = "deploy/systemd/gpu-sampler.service";
/// Of 100; `systemd-analyze security` prints a tenth of it: 2.3 with systemd 252, and newer versions add checks. docs/install-host.md has the
/// parts.
const MOST_EXPOSED: &str = "25";

pub fn check() -> Result<()> {
    progress("the systemd unit");
    if on_path("systemd-analyze").is_none() {
        progress("lint: systemd is not installed, so the unit is not checked (`cargo xtask setup`)");
        return Ok(());
    }
    let text = fs::read_to_string(tools::root().join(UNIT)).context(UNIT)?;
    let folder = tools::target_dir()?.join("lint-unit");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let unit = folder.join("gpu-sampler.service");
    // A program that exists on this machine.
    fs::write(&unit, runs_true(&text)).with_context(|| unit.display().to_string())?;
    for args in [
        &["verify", "--man=no", "--recursive-errors=no"][..],
        &["security", "--offline=true", "--no-pager", &format!("--threshold={MOST_EXPOSED}")],
    ] {
        let output =
            Command::new("systemd-analyze").args(args).arg(&unit).env("LC_ALL", "C.UTF-8").output().context("systemd-analyze")?;
        let (table, problems) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        // An unknown setting is a warning only.
        if !output.status.success() || problems.contains("gpu-sampler.service:") {
            bail!("systemd-analyze {}: {UNIT}:\n{table}{problems}", args.join(" "));
        }
    }
    Ok(())
}

fn runs_true(unit: &str) -> String {
    let line = |line: &str| if line.starts_with("ExecStart=") { "ExecStart=/bin/true\n".to_owned() } else { format!("{line}\n") };
    unit.lines().map(line).collect()
}
