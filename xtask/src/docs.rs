//! `docs`: rewrites the files that are generated from the metric catalogue: docs/metrics.md and the expected text of /metrics.

use crate::tools;
use anyhow::Result;

/// The tests that compare these files; with UPDATE=1 they write them.
const TESTS: [&str; 2] = ["export::tests::", "export::catalogue::"];

pub fn verb(args: &[String]) -> Result<()> {
    tools::no_arguments(args)?;
    let mut cargo = tools::cargo(&["test", "--locked", "--package", "gpu-sampler", "--bin", "gpu-sampler", "--"])?;
    tools::run(cargo.args(TESTS).env("UPDATE", "1"))
}
