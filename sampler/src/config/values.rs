//! Checks of single settings: each error names the setting, its value, and what is expected.

use std::path::PathBuf;
use std::sync::Arc;

use sampler_labels::Source;

use super::{ConfigError, DEFAULT_KERNEL_RING_BYTES, MIN_KERNEL_RING_BYTES};
use crate::collectors::Selection;
use crate::engine_rules::{self, EngineRules, MAX_RULES, RuleError};
use crate::host_name::HostName;
use crate::objects::{ObjectError, StoreUrl};
use crate::privileges::{self, CapabilitySet};
use crate::wait_selector::{SELECTIONS, WaitSelector};

/// Of KAI since 0.6, and of Run:ai and earlier KAI.
pub(super) const RESERVATION_NAMESPACES: [&str; 2] = ["kai-resource-reservation", "runai-reservation"];
/// Two probes of a call take some microseconds (`cargo xtask bench waits`), so at this rate some percent of a processor at most.
pub(super) const DEFAULT_WAIT_PROBE_BUDGET: u64 = 2_000;
pub(super) const DEFAULT_GPU_SATURATION_PERCENT: u8 = 90;

pub(super) fn node_name(name: String) -> Result<String, ConfigError> {
    if name.trim().is_empty() || name.contains(|c: char| c.is_control() || c == '/') {
        let remedy = "expected the name of the node, without slashes; omit it to use the host name".into();
        return Err(ConfigError::Value { key: "node_name", value: name, remedy });
    }
    Ok(name)
}

pub(super) fn session_store(url: &str) -> Result<StoreUrl, ConfigError> {
    url.parse().map_err(|error| match error {
        ObjectError::Url { url, remedy } => ConfigError::Value { key: "session_store", value: url, remedy },
        other => ConfigError::Value { key: "session_store", value: String::new(), remedy: other.to_string() },
    })
}

pub(super) fn allowed_host(name: String) -> Result<HostName, ConfigError> {
    HostName::new(&name).map_err(|remedy| ConfigError::Value { key: "allowed_host", value: name, remedy: remedy.into() })
}

/// An empty list has none.
pub(super) fn reservation_namespaces(names: Option<Vec<String>>) -> Result<Arc<[String]>, ConfigError> {
    let Some(names) = names else { return Ok(RESERVATION_NAMESPACES.map(str::to_owned).into()) };
    let is_name = |name: &&String| name.bytes().all(|b| b == b'-' || b.is_ascii_lowercase() || b.is_ascii_digit());
    if let Some(name) = names.iter().find(|name| !is_name(name)) {
        let (value, remedy) = (name.clone(), "expected the name of a Kubernetes namespace".into());
        return Err(ConfigError::Value { key: "reservation_namespace", value, remedy });
    }
    Ok(names.into_iter().filter(|name| !name.is_empty()).collect())
}

pub(super) fn collect(names: Option<Vec<String>>) -> Result<Selection, ConfigError> {
    let Some(names) = names else { return Ok(Selection::default()) };
    Selection::new(names.iter().map(String::as_str), Selection::default()).map_err(|error| ConfigError::Value {
        key: "collect",
        value: error.name.clone(),
        remedy: error.to_string(),
    })
}

pub(super) fn kept_capabilities(names: Option<Vec<String>>) -> Result<CapabilitySet, ConfigError> {
    let names = names.unwrap_or_default();
    privileges::kept(names.iter().map(|name| name.trim()).filter(|name| !name.is_empty())).map_err(|name| ConfigError::Value {
        key: "keep_capability",
        value: name,
        remedy: "expected the name of a capability, such as sys_admin, or all".into(),
    })
}

pub(super) fn engine_rules(rules: Option<Vec<String>>) -> Result<Vec<Arc<EngineRules>>, ConfigError> {
    let key = "engine_rules";
    let rules: Vec<String> = rules.into_iter().flatten().filter(|rule| !rule.trim().is_empty()).collect();
    if rules.len() > MAX_RULES {
        let remedy = format!("expected at most {MAX_RULES} rules");
        return Err(ConfigError::Value { key, value: rules.len().to_string(), remedy });
    }
    let parsed = |text: String| match text.parse() {
        Ok(rules) => Ok(Arc::new(rules)),
        Err(error) => Err(ConfigError::Value { key, value: text, remedy: RuleError::to_string(&error) }),
    };
    let rules: Vec<Arc<EngineRules>> = rules.into_iter().map(parsed).collect::<Result<_, _>>()?;
    match engine_rules::check_names(&rules) {
        Ok(()) => Ok(rules),
        Err(conflict) => {
            let value = rules.iter().map(ToString::to_string).collect::<Vec<_>>().join(";");
            Err(ConfigError::Value { key, value, remedy: conflict.to_string() })
        }
    }
}

pub(super) fn existing(key: &'static str, path: PathBuf, what: &'static str) -> Result<PathBuf, ConfigError> {
    if path.exists() { Ok(path) } else { Err(ConfigError::NoSuchPath { key, path, what }) }
}

pub(super) fn folder(
    key: &'static str,
    path: Option<PathBuf>,
    default: &str,
    what: &'static str,
) -> Result<PathBuf, ConfigError> {
    path.map_or_else(|| Ok(PathBuf::from(default)), |path| existing(key, path, what))
}

/// Makes the path absolute, because it is used later, possibly with another current directory.
pub(super) fn absolute(key: &'static str, path: PathBuf) -> Result<PathBuf, ConfigError> {
    if !path.as_os_str().is_empty()
        && let Ok(path) = std::path::absolute(&path)
    {
        return Ok(path);
    }
    let remedy = "expected the path of a folder".into();
    Err(ConfigError::Value { key, value: path.display().to_string(), remedy })
}

pub(super) fn size<T: PartialOrd + std::fmt::Display>(
    key: &'static str,
    configured: Option<T>,
    default: T,
    least: T,
) -> Result<T, ConfigError> {
    match configured {
        Some(bytes) if bytes < least => {
            Err(ConfigError::Value { key, value: bytes.to_string(), remedy: format!("expected at least {least} bytes") })
        }
        Some(bytes) => Ok(bytes),
        None => Ok(default),
    }
}

/// Rejects other folders, which would look like a machine without processes.
pub(super) fn procfs(path: PathBuf) -> Result<PathBuf, ConfigError> {
    if path.join("stat").exists() && path.join("self").symlink_metadata().is_ok() {
        return Ok(path);
    }
    let remedy = "there is no procfs; set it to the folder where the host's /proc is mounted".into();
    Err(ConfigError::Value { key: "path_procfs", value: path.display().to_string(), remedy })
}

pub(super) fn endpoints(
    docker: Option<String>,
    cri: Option<Vec<String>>,
    podman: Option<String>,
) -> Result<Vec<(Source, PathBuf)>, ConfigError> {
    let cri = cri.into_iter().flatten();
    let all = docker.into_iter().map(|e| ("docker_endpoint", Source::Docker, e));
    let all = all.chain(cri.map(|e| ("cri_endpoint", Source::Cri, e)));
    let all = all.chain(podman.into_iter().map(|e| ("podman_endpoint", Source::Podman, e)));
    // An empty endpoint counts as none, so that a variable can override the file.
    let all = all.filter(|(_, _, endpoint)| !endpoint.is_empty());
    all.map(|(key, source, endpoint)| Ok((source, socket(key, &endpoint)?))).collect()
}

fn socket(key: &'static str, endpoint: &str) -> Result<PathBuf, ConfigError> {
    match endpoint.strip_prefix("unix://") {
        Some(path) if path.starts_with('/') => Ok(PathBuf::from(path)),
        _ => Err(ConfigError::Value {
            key,
            value: endpoint.to_owned(),
            remedy: "expected a Unix socket with an absolute path, such as unix:///run/docker.sock".into(),
        }),
    }
}

pub(super) fn ring_bytes(configured: Option<u32>) -> Result<u32, ConfigError> {
    let bytes = configured.unwrap_or(DEFAULT_KERNEL_RING_BYTES);
    if bytes.is_power_of_two() && (MIN_KERNEL_RING_BYTES..=1 << 30).contains(&bytes) {
        return Ok(bytes);
    }
    let remedy = "expected a power of two from 4096 to 1073741824".into();
    Err(ConfigError::Value { key: "kernel_ring_bytes", value: bytes.to_string(), remedy })
}

pub(super) fn budget(key: &'static str, configured: Option<f64>, default: f64) -> Result<f64, ConfigError> {
    let percent = configured.unwrap_or(default);
    if (0.01..=100.0).contains(&percent) {
        return Ok(percent);
    }
    let remedy = format!("expected a percentage from 0.01 to 100, such as {default}");
    Err(ConfigError::Value { key, value: percent.to_string(), remedy })
}

/// At least 50: below that, most of the GPU is idle, and its users do not wait for each other.
pub(super) fn saturation(configured: Option<u8>) -> Result<u8, ConfigError> {
    let percent = configured.unwrap_or(DEFAULT_GPU_SATURATION_PERCENT);
    if (50..=100).contains(&percent) {
        return Ok(percent);
    }
    let remedy = "expected a whole percentage from 50 to 100, such as 90".into();
    Err(ConfigError::Value { key: "gpu_saturation_percent", value: percent.to_string(), remedy })
}

pub(super) fn wait_probes(text: &str) -> Result<WaitSelector, ConfigError> {
    let invalid = |_| {
        let remedy = format!("expected {SELECTIONS}");
        ConfigError::Value { key: "wait_probes", value: text.to_owned(), remedy }
    };
    text.parse().map_err(invalid)
}

pub(super) fn wait_probe_budget(configured: Option<u64>) -> Result<u64, ConfigError> {
    let calls = configured.unwrap_or(DEFAULT_WAIT_PROBE_BUDGET);
    if (10..=1_000_000).contains(&calls) {
        return Ok(calls);
    }
    let remedy = "expected 10 to 1000000 calls a second".into();
    Err(ConfigError::Value { key: "wait_probe_budget", value: calls.to_string(), remedy })
}

pub(super) fn sources(list: Option<Vec<String>>) -> Result<Vec<Source>, ConfigError> {
    let Some(list) = list else { return Ok(Source::QUERIED.to_vec()) };
    let mut chosen = Vec::new();
    for name in list {
        let known = Source::QUERIED.into_iter().find(|source| source.name() == name.trim());
        match (name.trim(), known) {
            ("all", _) => chosen.extend(Source::QUERIED),
            (_, Some(source)) => chosen.push(source),
            (other, None) => {
                let names: Vec<&str> = Source::QUERIED.iter().map(|s| s.name()).collect();
                return Err(ConfigError::Value {
                    key: "label_sources",
                    value: other.to_owned(),
                    remedy: format!("choose from all, {}", names.join(", ")),
                });
            }
        }
    }
    chosen.sort_unstable();
    chosen.dedup();
    Ok(chosen)
}
