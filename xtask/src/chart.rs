//! `chart`: renders the Helm chart and what is derived from it, or checks that both agree.

use crate::{pinned, tools};
use anyhow::Result;
use std::process::Command;

/// `--check` compares instead of writing.
pub fn verb(args: &[String]) -> Result<()> {
    if let Some(word) = args.iter().find(|word| *word != "--check") {
        return Err(tools::unknown(word));
    }
    let python = pinned::of_pypi(&devkit::CHART_PACKAGES, "python")?;
    tools::run(Command::new(python).arg(tools::root().join("deploy/helm/chart.py")).args(args))
}
