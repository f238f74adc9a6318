//! A real Prometheus with the shipped scrape settings.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{Running, free_port, get, wait_for};

const SETTINGS: &str = include_str!("../../deploy/prometheus/scrape.yml");

pub struct PrometheusServer {
    pub port: u16,
    _process: Running,
    _dir: tempfile::TempDir,
}

impl PrometheusServer {
    /// The shipped settings with another interval, path and collectors, and target labels as a Kubernetes pod monitor adds them.
    pub fn start(agent: u16, interval: &str, path: &str, collectors: &str) -> Result<Self> {
        Self::with_rules(agent, interval, path, collectors, "groups: []")
    }

    /// As [`PrometheusServer::start`], with the text of a rule file.
    pub fn with_rules(agent: u16, interval: &str, path: &str, collectors: &str, rules: &str) -> Result<Self> {
        let target =
            format!("[\"127.0.0.1:{agent}\"]\n      labels: {{namespace: monitoring, pod: gpu-sampler-x, container: agent}}");
        let is_params = |line: &&str| line.trim_start().starts_with("params:");
        let params = SETTINGS.lines().find(is_params).context("the shipped settings have no collectors")?;
        let job = SETTINGS
            .replace(params, &format!("  params: {{\"collect[]\": [{collectors}]}}"))
            .replace("15s", &format!("{interval}\n  metrics_path: {path}"))
            .replace("[\"127.0.0.1:9836\"]", &target);
        ensure!(job.contains("gpu-sampler-x") && job.contains(path), "the shipped settings changed their shape");
        let global = "global: {evaluation_interval: 1s}\nrule_files: [rules.yml]\n";
        Self::configured(&format!("{global}scrape_configs:\n{job}"), rules)
    }

    /// With this configuration, and the text of a rule file next to it.
    pub fn configured(configuration: &str, rules: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        std::fs::write(dir.path().join("rules.yml"), rules)?;
        std::fs::write(dir.path().join("p.yml"), configuration)?;
        let port = free_port()?;
        let process = Command::new("prometheus")
            .arg(format!("--config.file={}", dir.path().join("p.yml").display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stderr(Stdio::null())
            .spawn()
            .context("starting prometheus")?;
        let server = Self { port, _process: Running(process), _dir: dir };
        wait_for("Prometheus is ready", Duration::from_secs(60), || Ok(get(port, "/-/ready").ok()))?;
        Ok(server)
    }

    /// The result of an instant query; an invalid one is an error.
    pub fn query(&self, query: &str) -> Result<Vec<Value>> {
        let escaped: String = query.bytes().map(|b| format!("%{b:02X}")).collect();
        let response: Value = serde_json::from_str(&get(self.port, &format!("/api/v1/query?query={escaped}"))?)?;
        response["data"]["result"].as_array().cloned().with_context(|| response.to_string())
    }

    pub fn number(&self, query: &str) -> Result<f64> {
        let result = self.query(query)?;
        let value = result.first().and_then(|r| r["value"][1].as_str()).with_context(|| format!("{query}: nothing"))?;
        Ok(value.parse()?)
    }

    /// The rules of all groups, with their states.
    pub fn rules(&self) -> Result<Vec<Value>> {
        let response: Value = serde_json::from_str(&get(self.port, "/api/v1/rules")?)?;
        let groups = response["data"]["groups"].as_array().with_context(|| response.to_string())?;
        Ok(groups.iter().filter_map(|group| group["rules"].as_array()).flatten().cloned().collect())
    }
}
