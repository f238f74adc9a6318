//! `docs`: rewrites the files that are generated: from the metric catalogue docs/metrics.md and the expected text of /metrics, and the
//! Grafana dashboards.

use crate::{dashboards, tools};
use anyhow::Result;

/// The tests that compare these files; with UPDATE=1 they write them.
const TESTS: [&str; 2] = ["export::tests::", "export::catalogue::"];

/// `dashboards` alone needs no build of the agent.
pub fn verb(args: &[String]) -> Result<()> {
    match args {
        [word] if word == "dashboards" => {}
        _ => {
            tools::no_arguments(args)?;
            let mut cargo = tools::cargo(&["test", "--locked", "--package", "gpu-sampler", "--bin", "gpu-sampler", "--"])?;
            tools::run(cargo.args(TESTS).env("UPDATE", "1"))?;
        }
    }
    // Descriptions name the collectors of docs/metrics.md.
    dashboards::write()
}
