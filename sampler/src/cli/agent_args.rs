//! Which agent a command talks to.

use std::path::PathBuf;

use clap::Args;

use super::access::{AccessArgs, AgentAccess};
use crate::config::{Config, Settings};

#[derive(Args)]
pub struct AgentArgs {
    /// Agent to query [default: the one at --listen]
    #[arg(long, value_name = "URL")]
    agent: Option<String>,
    /// Configuration file (TOML) of the agent, for its address and credentials
    #[arg(long, value_name = "FILE", env = "GPU_SAMPLER_CONFIG")]
    config: Option<PathBuf>,
    /// Listen address of the agent [default: 127.0.0.1:9836]
    #[arg(long, value_name = "ADDR:PORT", env = "GPU_SAMPLER_LISTEN")]
    listen: Option<String>,
    /// File with a token of the agent, if it requires one
    #[arg(long, value_name = "PATH", env = "GPU_SAMPLER_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// Web configuration of the agent, for its certificate
    #[arg(long = "web.config.file", value_name = "PATH", env = "GPU_SAMPLER_WEB_CONFIG_FILE")]
    web_config_file: Option<PathBuf>,
    #[command(flatten)]
    access: AccessArgs,
}

impl AgentArgs {
    pub fn resolve(&self) -> anyhow::Result<AgentAccess> {
        self.access.resolve(self.agent.as_deref(), &self.configuration()?)
    }

    /// For paths that are open to everyone: the token file is not read, which may be empty or of another user.
    pub fn resolve_without_token(&self) -> anyhow::Result<AgentAccess> {
        let configuration = Config { token_file: None, ..self.configuration()? };
        self.access.resolve(self.agent.as_deref(), &configuration)
    }

    fn configuration(&self) -> anyhow::Result<Config> {
        let (listen, token_file) = (self.listen.clone(), self.token_file.clone());
        let settings = Settings { listen, token_file, web_config_file: self.web_config_file.clone(), ..Settings::default() };
        Ok(settings.validate(self.config.as_deref())?)
    }
}
