//! Wait probes: what they cost the process that is probed and the agent, and how often the evidence from them is right.

mod cost;
mod scenarios;

use anyhow::Result;
use gpu_sampler_benches::wanted;

fn main() -> Result<()> {
    if wanted("waits-scenarios") {
        scenarios::run();
    }
    if wanted("waits-cost") {
        cost::run()?;
    }
    Ok(())
}
