//! `health`: whether an agent responds, for images and probes without a shell.

use anyhow::{Context as _, bail};
use clap::Args;
use hyper::Method;

use super::agent_args::AgentArgs;
use super::client::Client;
use super::request::unreachable;
use crate::cli::output::print;

#[derive(Args)]
pub struct HealthArgs {
    /// Also require that the first scan of processes and cgroups is complete
    #[arg(long)]
    ready: bool,
    #[command(flatten)]
    agent: AgentArgs,
}

impl HealthArgs {
    /// An error if the agent does not respond, or is not ready.
    pub fn run(self) -> anyhow::Result<()> {
        let access = self.agent.resolve_without_token()?;
        let path = if self.ready { "/readyz" } else { "/healthz" };
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the IO runtime")?;
        runtime.block_on(async {
            let reply = match Client::new(&access)?.send(Method::GET, path, Vec::new()).await {
                Ok(Ok(mut reply)) => reply.success().await,
                Ok(Err(error)) => bail!("{}: {error}", unreachable(&access.url)),
                Err(error) => Err(error),
            };
            match reply {
                Ok(text) => print(&String::from_utf8_lossy(&text)),
                // Its server works, and asks for a certificate that a probe does not have.
                Err(error) if !self.ready && wants_certificate(&error) => print("ok, and requires a client certificate\n"),
                Err(error) => Err(error),
            }
        })
    }
}

fn wants_certificate(error: &anyhow::Error) -> bool {
    let alert = rustls::AlertDescription::CertificateRequired;
    error.chain().any(|cause| cause.to_string().contains(&format!("{alert:?}")))
}
