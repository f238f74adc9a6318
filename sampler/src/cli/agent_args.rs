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

/// Whether a URL has an address of loopback.
fn is_on_this_machine(agent: &str) -> bool {
    let Ok(url) = url::Url::parse(agent) else { return false };
    match url.host() {
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

impl AgentArgs {
    /// The token of the configuration file is for the agent on this machine: another one gets the token that the command names.
    pub fn resolve(&self) -> anyhow::Result<AgentAccess> {
        let mut configuration = self.configuration()?;
        if self.token_file.is_none() && self.agent.as_deref().is_some_and(|agent| !is_on_this_machine(agent)) {
            configuration.token_file = None;
        }
        self.access.resolve(self.agent.as_deref(), &configuration)
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct AgentCommand {
        #[command(flatten)]
        agent: AgentArgs,
    }

    #[test]
    fn the_configured_token_stays_on_this_machine() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        std::fs::write(path("token"), "configured").unwrap();
        std::fs::write(path("other"), "other").unwrap();
        std::fs::write(path("config.toml"), format!("token_file = {:?}", path("token"))).unwrap();
        let config = ["--config", &path("config.toml")];
        let authorization = |args: &[&str]| {
            let args = [&["gpu-sampler"], &config[..], args].concat();
            AgentCommand::try_parse_from(args).unwrap().agent.resolve().unwrap().authorization
        };
        let configured = Some("Bearer configured".to_owned());
        assert_eq!(authorization(&[]), configured);
        assert_eq!(authorization(&["--agent", "http://127.0.0.1:9836"]), configured);
        assert_eq!(authorization(&["--agent", "http://[::1]:9836"]), configured);
        assert_eq!(authorization(&["--agent", "http://localhost:9836"]), configured);
        for other in ["http://192.0.2.7:9836", "http://node-b:9836", "http://localhost.example.com:9836"] {
            assert_eq!(authorization(&["--agent", other]), None, "{other}");
        }
        let named = authorization(&["--agent", "http://node-b:9836", "--token-file", &path("other")]);
        assert_eq!(named.as_deref(), Some("Bearer other"));
    }
}
