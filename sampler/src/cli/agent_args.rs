//! Which agent a command talks to.

use std::path::PathBuf;

use clap::Args;

use super::client::agent_at;
use crate::config::Settings;

#[derive(Args)]
pub struct AgentArgs {
    /// Agent to query [default: the one at --listen]
    #[arg(long, value_name = "URL")]
    agent: Option<String>,
    /// Configuration file (TOML) of the agent, for its address and token
    #[arg(long, value_name = "FILE", env = "GPU_SAMPLER_CONFIG")]
    config: Option<PathBuf>,
    /// Listen address of the agent [default: 127.0.0.1:9836]
    #[arg(long, value_name = "ADDR:PORT", env = "GPU_SAMPLER_LISTEN")]
    listen: Option<String>,
    /// File with the token of an agent that listens on a non-loopback address
    #[arg(long, value_name = "PATH", env = "GPU_SAMPLER_TOKEN_FILE")]
    token_file: Option<PathBuf>,
}

impl AgentArgs {
    /// The agent's URL and token.
    pub fn resolve(&self) -> anyhow::Result<(String, Option<String>)> {
        let (listen, token_file) = (self.listen.clone(), self.token_file.clone());
        // The command does not serve: a listen address without a token is valid here.
        let settings = Settings { listen, token_file, open_metrics: Some(true), ..Settings::default() };
        let config = settings.validate(self.config.as_deref())?;
        Ok((self.agent.clone().unwrap_or_else(|| agent_at(config.listen)), config.token))
    }
}
