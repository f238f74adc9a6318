//! `release`: asks a running agent to let go of GPUs for a while.

use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use hyper::Method;

use super::agent_args::AgentArgs;
use super::client::Client;
use super::request::{document, unreachable};
use crate::cli::output::{self, print};
use crate::cli::text::terminal_safe;
use crate::export::release::ReleaseBody;
use crate::observe::gpu::{GpuSelector, MOST_SECONDS, Released};

const EXAMPLES: &str = "\
Examples:
  gpu-sampler release && nvidia-smi -i 0 -mig 1              all GPUs, for a minute
  gpu-sampler release --gpu 0 --for 5m && nvidia-smi --gpu-reset -i 0
  gpu-sampler release --for 2m && modprobe -r nvidia_uvm nvidia";

const PATH: &str = "/api/v1/gpus/release";
/// Longer than the agent waits for driver calls that hang.
const TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct ReleaseArgs {
    /// GPU to release, by index or UUID [default: all]
    #[arg(long, value_name = "GPU")]
    gpu: Option<String>,
    /// Time until the agent uses the GPUs again, whole seconds from 1s to 1h
    #[arg(long = "for", value_name = "TIME", default_value = "60s", value_parser = lasting)]
    lasting: Duration,
    /// Print the agent's response as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    agent: AgentArgs,
}

fn lasting(text: &str) -> Result<Duration, String> {
    let lasting = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if lasting.subsec_nanos() != 0 || !(1..=MOST_SECONDS).contains(&lasting.as_secs()) {
        return Err("expected whole seconds from 1s to 1h".into());
    }
    Ok(lasting)
}

impl ReleaseArgs {
    pub fn run(self) -> anyhow::Result<()> {
        let access = self.agent.resolve()?;
        let agent = &access.url;
        let body = ReleaseBody { gpu: self.gpu.map(GpuSelector::Name), seconds: Some(self.lasting.as_secs()) };
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the IO runtime")?;
        let body = runtime.block_on(async {
            let client = Client::new(&access)?;
            match client.send_within(TIMEOUT, Method::POST, PATH, serde_json::to_vec(&body)?).await? {
                Ok(mut reply) => reply.success().await.with_context(|| format!("the agent at {agent} did not release")),
                Err(error) => bail!("{}: {error}", unreachable(agent)),
            }
        })?;
        if self.json {
            return print(&output::json(&document::<serde_json::Value>(agent, &body)?)?);
        }
        print(&text(&document(agent, &body)?))
    }
}

fn text(released: &Released) -> String {
    let mut text = String::new();
    for gpu in &released.released {
        text += &format!("GPU {} {} is released\n", gpu.index, terminal_safe(&gpu.uuid));
    }
    if released.released.is_empty() {
        text += "no GPU was in use\n";
    }
    for node in &released.closed {
        text += &format!("closed {}\n", terminal_safe(&node.to_string_lossy()));
    }
    text + &format!("the agent samples again at {}\n", terminal_safe(&released.resumes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_whole_seconds_within_the_bounds() {
        for (time, expect) in
            [("1s", true), ("5m", true), ("1h", true), ("0s", false), ("61m", false), ("1500ms", false), ("x", false)]
        {
            assert_eq!(lasting(time).is_ok(), expect, "{time}");
        }
    }
}
