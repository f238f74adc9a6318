//! The Helm chart, rendered by Helm's own engine, and the program that its objects start.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::{clients, run_cli};

fn helm() -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the tests are below the root")?;
    Ok(root.join("deploy/helm"))
}

#[test]
fn the_chart_renders_valid_objects_and_what_is_derived_from_it_is_current() -> Result<()> {
    let python = clients::venv(&devkit::CHART_PACKAGES)?.join("python");
    let checked = Command::new(python).arg(helm()?.join("chart.py")).arg("--check").output()?;
    let (out, error) = (String::from_utf8_lossy(&checked.stdout), String::from_utf8_lossy(&checked.stderr));
    ensure!(checked.status.success(), "{out}{error}");
    println!("{out}");
    Ok(())
}

/// The flags of the objects are those of the program.
#[test]
fn rendered_arguments_are_accepted_by_the_agent() -> Result<()> {
    let (_, run, _) = run_cli(&["run", "--help"])?;
    let (_, health, _) = run_cli(&["health", "--help"])?;
    let mut seen = 0;
    for entry in std::fs::read_dir(helm()?.join("snapshots"))? {
        let path = entry?.path();
        let text = std::fs::read_to_string(&path)?;
        let flags = text.lines().filter_map(|line| line.trim().strip_prefix("- --"));
        for flag in flags.map(|flag| flag.split('=').next().unwrap_or(flag)) {
            let is_known = [&run, &health].iter().any(|help| help.contains(&format!("--{flag} ")));
            ensure!(is_known, "{}: --{flag} is not a flag", path.display());
            seen += 1;
        }
    }
    ensure!(seen > 12, "only {seen} flags");
    Ok(())
}
