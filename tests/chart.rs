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

/// The flags and variables of the objects are those of the program.
#[test]
fn rendered_settings_are_accepted_by_the_agent() -> Result<()> {
    let commands = ["run", "health"];
    let help = |command: &str| anyhow::Ok(run_cli(&[command, "--help"])?.1);
    let helps = [help("run")?, help("health")?];
    let mut seen = 0;
    for entry in std::fs::read_dir(helm()?.join("snapshots"))? {
        let path = entry?.path();
        let text = std::fs::read_to_string(&path)?;
        // Of the command before it.
        let mut command = None;
        for item in text.lines().filter_map(|line| line.trim().strip_prefix("- ")) {
            command = commands.iter().position(|name| *name == item).or(command);
            if let Some(variable) = item.strip_prefix("name: ").filter(|name| name.starts_with("GPU_SAMPLER_")) {
                ensure!(
                    helps[0].contains(&format!("[env: {variable}=")),
                    "{}: {variable} is not a variable of run",
                    path.display()
                );
                seen += 1;
            }
            let Some(flag) = item.strip_prefix("--") else { continue };
            let flag = flag.split('=').next().unwrap_or(flag);
            let command = command.context("a flag without a command")?;
            let shown = format!("{}: --{flag} is not a flag of {}", path.display(), commands[command]);
            ensure!(helps[command].contains(&format!("--{flag} ")), "{shown}");
            seen += 1;
        }
    }
    ensure!(seen > 12, "only {seen} flags and variables");
    Ok(())
}
