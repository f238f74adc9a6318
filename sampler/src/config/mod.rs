//! Combines flags, environment and file into one validated [`Config`]. A flag overrides its variable, which overrides the file, which
//! overrides the default. Every error names the key and the remedy.

mod values;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use sampler_labels::Source;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::collectors::Selection;
use crate::engine_rules::EngineRules;
use crate::host_name::HostName;
use crate::objects::StoreUrl;
use crate::privileges::CapabilitySet;
use crate::security::error::SecurityError;
use crate::security::{Rules, SecurityFiles};
use crate::wait_selector::WaitSelector;

pub const DEFAULT_LISTEN: &str = "127.0.0.1:9836";
pub const DEFAULT_GPU_BUDGET_PERCENT: f64 = 1.0;
pub const DEFAULT_GPU_WAIT_PERCENT: f64 = 2.0;
pub const DEFAULT_SESSION_DIR: &str = "/var/lib/gpu-sampler/sessions";
/// Where experiments keep their lock and the file of a guard.
pub const DEFAULT_RUNTIME_DIR: &str = "/run/gpu-sampler";
pub const DEFAULT_SESSION_DIR_MAX_BYTES: u64 = 1 << 30;
/// Bytes of the ring of process events. 4 MiB hold 70,000 of them: several seconds at the highest rate observed.
pub const DEFAULT_KERNEL_RING_BYTES: u32 = 4 << 20;
/// A page, which is the least that the kernel accepts.
pub const MIN_KERNEL_RING_BYTES: u32 = 4096;
pub const DEFAULT_SESSION_RING_BYTES: usize = 8 << 20;

/// How processes and cgroups are tracked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum KernelMode {
    /// eBPF if the program loads, else inotify, else procfs.
    #[default]
    Auto,
    /// eBPF; the agent does not start without it.
    RawTracepoint,
    /// inotify on cgroup directories, and /proc for processes that the driver reports.
    Inotify,
    /// /proc and cgroupfs once a second; short processes are missed.
    Procfs,
}

/// Where samples of GPU use are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum SampleSource {
    /// The driver's own buffer while it matches NVML, else NVML.
    #[default]
    Auto,
    Nvml,
}

/// The generation of pod labels of the cAdvisor families: Kubernetes 1.14 and 1.15 had both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum PodLabels {
    /// pod and container, pod_name and container_name.
    #[default]
    Both,
    /// pod_name and container_name, used before Kubernetes 1.16.
    Old,
    /// pod and container, used since Kubernetes 1.16.
    New,
}

/// The settings, as flags; each can also be set as `GPU_SAMPLER_<NAME>` and in the file.
#[derive(Args, Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Listen address; other than loopback requires --token-file, --web.config.file or --open-metrics [default: 127.0.0.1:9836]
    #[arg(long, value_name = "ADDR:PORT", env = "GPU_SAMPLER_LISTEN")]
    pub listen: Option<String>,
    /// Host name under which a proxy on this machine passes requests to an agent on loopback; repeatable or comma-separated
    #[arg(long, value_name = "NAME", value_delimiter = ',', env = "GPU_SAMPLER_ALLOWED_HOST")]
    pub allowed_host: Option<Vec<String>>,
    /// Path of the NVIDIA driver library [default: libnvidia-ml.so.1, searched in many places]
    #[arg(long, value_name = "PATH", env = "GPU_SAMPLER_NVML_LIB")]
    pub nvml_lib: Option<PathBuf>,
    /// Path of the host's /proc [default: /proc]
    #[arg(long, value_name = "DIR", env = "GPU_SAMPLER_PATH_PROCFS")]
    pub path_procfs: Option<PathBuf>,
    /// Path of the host's /sys [default: /sys]
    #[arg(long, value_name = "DIR", env = "GPU_SAMPLER_PATH_SYSFS")]
    pub path_sysfs: Option<PathBuf>,
    /// Path of the host's device nodes, for the check that the driver's PIDs are this machine's
    /// [default: dev below path_rootfs if it contains NVIDIA device nodes, else /dev]
    #[arg(long, value_name = "DIR", env = "GPU_SAMPLER_PATH_DEVFS")]
    pub path_devfs: Option<PathBuf>,
    /// Path of the host's file system, which contains the files and sockets of runtimes and kubelet [default: /]
    #[arg(long, value_name = "DIR", env = "GPU_SAMPLER_PATH_ROOTFS")]
    pub path_rootfs: Option<PathBuf>,
    /// Socket of Docker Engine, instead of discovered ones [default: those of running engines, and unix:///run/docker.sock]
    #[arg(long, value_name = "URL", env = "GPU_SAMPLER_DOCKER_ENDPOINT")]
    pub docker_endpoint: Option<String>,
    /// CRI socket (containerd, CRI-O, cri-dockerd), instead of discovered ones; repeatable or comma-separated
    #[arg(long, value_name = "URL", value_delimiter = ',', env = "GPU_SAMPLER_CRI_ENDPOINT")]
    pub cri_endpoint: Option<Vec<String>>,
    /// Socket of Podman, instead of discovered ones [default: unix:///run/podman/podman.sock]
    #[arg(long, value_name = "URL", env = "GPU_SAMPLER_PODMAN_ENDPOINT")]
    pub podman_endpoint: Option<String>,
    /// Label sources, such as bundle,docker,cri; `config --default` lists all of them [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',', env = "GPU_SAMPLER_LABEL_SOURCES")]
    pub label_sources: Option<Vec<String>>,
    /// Namespace of pods that reserve GPUs for others, which hold them; repeatable or comma-separated
    /// [default: kai-resource-reservation,runai-reservation]
    #[arg(long, value_name = "NAME", value_delimiter = ',', env = "GPU_SAMPLER_RESERVATION_NAMESPACE")]
    pub reservation_namespace: Option<Vec<String>>,
    /// Pod labels of the container_accelerator families: pod and container, pod_name and container_name, or both [default: both]
    #[arg(long, value_name = "WHICH", env = "GPU_SAMPLER_POD_LABELS")]
    pub pod_labels: Option<PodLabels>,
    /// Families of /metrics for requests without collect[]: default, all, or collectors such as default,contenders [default: default]
    #[arg(long, value_name = "LIST", value_delimiter = ',', env = "GPU_SAMPLER_COLLECT")]
    pub collect: Option<Vec<String>>,
    /// How processes and cgroups are tracked [default: auto]
    #[arg(long, value_name = "MODE", env = "GPU_SAMPLER_KERNEL_MODE")]
    pub kernel_mode: Option<KernelMode>,
    /// Size of the ring of process events, a power of two, at least 4096; that of cgroup events has half [default: 4194304]
    #[arg(long, value_name = "BYTES", env = "GPU_SAMPLER_KERNEL_RING_BYTES")]
    pub kernel_ring_bytes: Option<u32>,
    /// Processor time limit for reading one GPU, in percent of one processor; 0.01 to 100 [default: 1]
    #[arg(long, value_name = "PERCENT", env = "GPU_SAMPLER_GPU_BUDGET_PERCENT")]
    pub gpu_budget_percent: Option<f64>,
    /// Limit for time spent in driver calls for one GPU, in percent of time; 0.01 to 100 [default: 2]
    #[arg(long, value_name = "PERCENT", env = "GPU_SAMPLER_GPU_WAIT_PERCENT")]
    pub gpu_wait_percent: Option<f64>,
    /// Where samples are read: auto (the driver's own buffer while it matches NVML, else NVML) or nvml [default: auto]
    #[arg(long, value_name = "SOURCE", env = "GPU_SAMPLER_SAMPLE_SOURCE")]
    pub sample_source: Option<SampleSource>,
    /// Utilization from which a GPU counts as saturated in a second, so that sharing it is contention; 50 to 100 [default: 90]
    #[arg(long, value_name = "PERCENT", env = "GPU_SAMPLER_GPU_SATURATION_PERCENT")]
    pub gpu_saturation_percent: Option<u8>,
    /// Processes of which the waiting for the GPU is always measured, by probes on the blocking calls of the driver library: all,
    /// container=NAME, namespace=NAME, job=ID or pid=NUMBER; of `record`, for the session [default: none]
    #[arg(
        long,
        value_name = "SELECTION",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "all",
        env = "GPU_SAMPLER_WAIT_PROBES"
    )]
    pub wait_probes: Option<String>,
    /// Blocking calls a second from which a process loses its wait probes, which then would slow it down [default: 2000]
    #[arg(long, value_name = "CALLS", env = "GPU_SAMPLER_WAIT_PROBE_BUDGET")]
    pub wait_probe_budget: Option<u64>,
    /// Name of the node in sessions, on the page and by OTLP; in a pod, the node's [default: the host name]
    #[arg(long, value_name = "NAME", env = "GPU_SAMPLER_NODE_NAME")]
    pub node_name: Option<String>,
    /// Directory for sessions; created for the first session [default: /var/lib/gpu-sampler/sessions]
    #[arg(long, value_name = "DIR", env = "GPU_SAMPLER_SESSION_DIR")]
    pub session_dir: Option<PathBuf>,
    /// Maximum total size of sessions; above it the oldest ended sessions are removed [default: 1073741824]
    #[arg(long, value_name = "BYTES", env = "GPU_SAMPLER_SESSION_DIR_MAX_BYTES")]
    pub session_dir_max_bytes: Option<u64>,
    /// Memory for the last minutes, which is the maximum lookback of sessions [default: 8388608]
    #[arg(long, value_name = "BYTES", env = "GPU_SAMPLER_SESSION_RING_BYTES")]
    pub session_ring_bytes: Option<usize>,
    /// Object store to which sessions are uploaded when they end: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or
    /// file:///DIR [default: none]
    #[arg(long, value_name = "URL", env = "GPU_SAMPLER_SESSION_STORE")]
    pub session_store: Option<String>,
    /// Directory in which experiments note what they freeze, so that the agent thaws it if they are killed [default: /run/gpu-sampler]
    #[arg(long, value_name = "DIR", env = "GPU_SAMPLER_RUNTIME_DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// Capability to keep in addition to those that the agent needs, such as sys_admin, or all; repeatable or comma-separated
    #[arg(long, value_name = "NAME", value_delimiter = ',', env = "GPU_SAMPLER_KEEP_CAPABILITY")]
    pub keep_capability: Option<Vec<String>>,
    /// Refuse system calls that the agent never needs, such as execve, with a seccomp filter [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", env = "GPU_SAMPLER_SECCOMP")]
    pub seccomp: Option<bool>,
    /// Allow sessions to read the metrics of serving engines in containers, by a helper process that keeps CAP_SYS_ADMIN [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", env = "GPU_SAMPLER_ENGINE_ACCESS")]
    pub engine_access: Option<bool>,
    /// Metrics of a serving engine, as NAME=PATH,METRIC=MEANING,..; repeatable or separated by semicolons [default: those of known ones]
    #[arg(long = "engine-rule", value_name = "RULE", value_delimiter = ';', env = "GPU_SAMPLER_ENGINE_RULE")]
    pub engine_rules: Option<Vec<String>>,
    /// File with the bearer tokens required from clients other than loopback, one a line; read again when it changes
    #[arg(long, value_name = "PATH", env = "GPU_SAMPLER_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
    /// Web configuration (YAML) with TLS, client certificates and basic authentication, in the format of Prometheus'
    /// exporter-toolkit; read again when it changes
    #[arg(long = "web.config.file", value_name = "PATH", env = "GPU_SAMPLER_WEB_CONFIG_FILE")]
    pub web_config_file: Option<PathBuf>,
    /// Serve /metrics without credentials to clients other than loopback
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", env = "GPU_SAMPLER_OPEN_METRICS")]
    pub open_metrics: Option<bool>,
}

#[derive(Clone, Debug)]
pub struct Config {
    pub listen: SocketAddr,
    /// Hosts that an agent on loopback accepts in addition to those of loopback.
    pub allowed_hosts: Vec<HostName>,
    pub nvml_lib: Option<PathBuf>,
    pub path_procfs: PathBuf,
    pub path_sysfs: PathBuf,
    /// If configured; see [`Config::devfs_candidates`].
    pub path_devfs: Option<PathBuf>,
    pub path_rootfs: PathBuf,
    /// Configured sockets; a source with a configured socket is not queried elsewhere.
    pub label_endpoints: Vec<(Source, PathBuf)>,
    pub label_sources: Vec<Source>,
    pub reservation_namespaces: Arc<[String]>,
    pub pod_labels: PodLabels,
    pub collect: Selection,
    pub kernel_mode: KernelMode,
    pub kernel_ring_bytes: u32,
    pub gpu_budget_percent: f64,
    pub gpu_wait_percent: f64,
    pub sample_source: SampleSource,
    pub gpu_saturation_percent: u8,
    pub wait_probes: Option<WaitSelector>,
    pub wait_probe_budget: u64,
    pub node_name: Option<String>,
    pub session_dir: PathBuf,
    pub session_dir_max_bytes: u64,
    pub session_ring_bytes: usize,
    pub session_store: Option<StoreUrl>,
    pub runtime_dir: PathBuf,
    pub kept_capabilities: CapabilitySet,
    pub seccomp: bool,
    pub engine_access: bool,
    /// In addition to those of known engines.
    pub engine_rules: Vec<Arc<EngineRules>>,
    pub token_file: Option<PathBuf>,
    pub web_config_file: Option<PathBuf>,
    pub open_metrics: bool,
}

#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("cannot read {what} {path}; it must exist and be readable", path = path.display())]
    Read { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("the configuration file {path} is invalid; `gpu-sampler config --default` prints every key", path = path.display())]
    File { path: PathBuf, source: Box<toml::de::Error> },
    #[error("{key} = {value:?} is invalid: {remedy}")]
    Value { key: &'static str, value: String, remedy: String },
    #[error("{key} = {path} does not exist; set it to the path of {what}", path = path.display())]
    NoSuchPath { key: &'static str, path: PathBuf, what: &'static str },
    #[error(
        "listen = {0} accepts connections from other machines, but no credentials are configured: set --token-file, or --web.config.file \
         with users or client certificates, or --open-metrics to serve /metrics without credentials"
    )]
    NoCredentials(SocketAddr),
    #[error(transparent)]
    Security(#[from] SecurityError),
}

impl Config {
    /// The type information of the running kernel.
    pub fn btf(&self) -> PathBuf {
        self.path_sysfs.join("kernel/btf/vmlinux")
    }

    /// Folders that may contain NVIDIA device nodes; the first that does is used. A container often has them only in its own /dev.
    pub fn devfs_candidates(&self) -> Vec<PathBuf> {
        match &self.path_devfs {
            Some(configured) => vec![configured.clone()],
            None => vec![self.path_rootfs.join("dev"), PathBuf::from("/dev")],
        }
    }

    pub fn security_files(&self) -> SecurityFiles {
        SecurityFiles { token_file: self.token_file.clone(), web_config_file: self.web_config_file.clone() }
    }

    /// Whether a web configuration without users and client certificates, and without a token file, is refused.
    pub fn needs_credentials(&self) -> bool {
        !self.listen.ip().is_loopback() && !self.open_metrics
    }

    /// Reads the files with credentials and certificates. Commands that do not serve need not be able to.
    pub fn check_security(&self) -> Result<(), ConfigError> {
        let rules = Rules::load(&self.security_files())?;
        if self.needs_credentials() && !rules.have_credentials() {
            return Err(ConfigError::NoCredentials(self.listen));
        }
        Ok(())
    }

    /// The name of the node in session files and in the object store.
    pub fn node_of_sessions(&self) -> String {
        self.node().unwrap_or_else(|| "unknown".into())
    }

    /// The configured name of the node, or the host name, which in a container is its own unless it has the host's UTS namespace.
    pub fn node(&self) -> Option<String> {
        if self.node_name.is_some() {
            return self.node_name.clone();
        }
        let name = std::fs::read_to_string(self.path_procfs.join("sys/kernel/hostname")).ok()?;
        Some(name.trim().to_owned()).filter(|name| !name.is_empty())
    }
}

impl Settings {
    /// Merges two sets of settings; those of `self` take precedence.
    pub fn over(self, under: Settings) -> Settings {
        Settings {
            listen: self.listen.or(under.listen),
            allowed_host: self.allowed_host.or(under.allowed_host),
            nvml_lib: self.nvml_lib.or(under.nvml_lib),
            path_procfs: self.path_procfs.or(under.path_procfs),
            path_sysfs: self.path_sysfs.or(under.path_sysfs),
            path_devfs: self.path_devfs.or(under.path_devfs),
            path_rootfs: self.path_rootfs.or(under.path_rootfs),
            docker_endpoint: self.docker_endpoint.or(under.docker_endpoint),
            cri_endpoint: self.cri_endpoint.or(under.cri_endpoint),
            podman_endpoint: self.podman_endpoint.or(under.podman_endpoint),
            label_sources: self.label_sources.or(under.label_sources),
            reservation_namespace: self.reservation_namespace.or(under.reservation_namespace),
            pod_labels: self.pod_labels.or(under.pod_labels),
            collect: self.collect.or(under.collect),
            kernel_mode: self.kernel_mode.or(under.kernel_mode),
            kernel_ring_bytes: self.kernel_ring_bytes.or(under.kernel_ring_bytes),
            gpu_budget_percent: self.gpu_budget_percent.or(under.gpu_budget_percent),
            gpu_wait_percent: self.gpu_wait_percent.or(under.gpu_wait_percent),
            sample_source: self.sample_source.or(under.sample_source),
            gpu_saturation_percent: self.gpu_saturation_percent.or(under.gpu_saturation_percent),
            wait_probes: self.wait_probes.or(under.wait_probes),
            wait_probe_budget: self.wait_probe_budget.or(under.wait_probe_budget),
            session_dir: self.session_dir.or(under.session_dir),
            session_dir_max_bytes: self.session_dir_max_bytes.or(under.session_dir_max_bytes),
            session_ring_bytes: self.session_ring_bytes.or(under.session_ring_bytes),
            node_name: self.node_name.or(under.node_name),
            session_store: self.session_store.or(under.session_store),
            runtime_dir: self.runtime_dir.or(under.runtime_dir),
            keep_capability: self.keep_capability.or(under.keep_capability),
            seccomp: self.seccomp.or(under.seccomp),
            engine_access: self.engine_access.or(under.engine_access),
            engine_rules: self.engine_rules.or(under.engine_rules),
            token_file: self.token_file.or(under.token_file),
            web_config_file: self.web_config_file.or(under.web_config_file),
            open_metrics: self.open_metrics.or(under.open_metrics),
        }
    }

    pub fn from_file(path: &Path) -> Result<Settings, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            what: "the configuration file",
            path: path.to_owned(),
            source,
        })?;
        toml::from_str(&text).map_err(|source| ConfigError::File { path: path.to_owned(), source: Box::new(source) })
    }

    pub fn validate(self, file: Option<&Path>) -> Result<Config, ConfigError> {
        let s = match file {
            Some(path) => self.over(Self::from_file(path)?),
            None => self,
        };
        let listen = s.listen.unwrap_or_else(|| DEFAULT_LISTEN.to_owned());
        let listen: SocketAddr = listen.parse().map_err(|_| ConfigError::Value {
            key: "listen",
            value: listen,
            remedy: "expected ADDRESS:PORT, such as 127.0.0.1:9836 or [::]:9836".into(),
        })?;
        Ok(Config {
            listen,
            allowed_hosts: s.allowed_host.into_iter().flatten().map(values::allowed_host).collect::<Result<_, _>>()?,
            nvml_lib: s.nvml_lib.map(|path| values::existing("nvml_lib", path, "libnvidia-ml.so.1")).transpose()?,
            path_procfs: values::procfs(values::folder("path_procfs", s.path_procfs, "/proc", "the host's /proc")?)?,
            path_sysfs: values::folder("path_sysfs", s.path_sysfs, "/sys", "the host's /sys")?,
            path_devfs: s.path_devfs.map(|path| values::existing("path_devfs", path, "the host's /dev")).transpose()?,
            path_rootfs: values::folder("path_rootfs", s.path_rootfs, "/", "the host's file system")?,
            label_endpoints: values::endpoints(s.docker_endpoint, s.cri_endpoint, s.podman_endpoint)?,
            label_sources: values::sources(s.label_sources)?,
            reservation_namespaces: values::reservation_namespaces(s.reservation_namespace)?,
            pod_labels: s.pod_labels.unwrap_or_default(),
            collect: values::collect(s.collect)?,
            kernel_mode: s.kernel_mode.unwrap_or_default(),
            kernel_ring_bytes: values::ring_bytes(s.kernel_ring_bytes)?,
            gpu_budget_percent: values::budget("gpu_budget_percent", s.gpu_budget_percent, DEFAULT_GPU_BUDGET_PERCENT)?,
            gpu_wait_percent: values::budget("gpu_wait_percent", s.gpu_wait_percent, DEFAULT_GPU_WAIT_PERCENT)?,
            sample_source: s.sample_source.unwrap_or_default(),
            gpu_saturation_percent: values::saturation(s.gpu_saturation_percent)?,
            wait_probes: s.wait_probes.map(|text| values::wait_probes(&text)).transpose()?,
            wait_probe_budget: values::wait_probe_budget(s.wait_probe_budget)?,
            session_dir: values::absolute("session_dir", s.session_dir.unwrap_or_else(|| PathBuf::from(DEFAULT_SESSION_DIR)))?,
            session_dir_max_bytes: values::size(
                "session_dir_max_bytes",
                s.session_dir_max_bytes,
                DEFAULT_SESSION_DIR_MAX_BYTES,
                1 << 20,
            )?,
            session_ring_bytes: values::size("session_ring_bytes", s.session_ring_bytes, DEFAULT_SESSION_RING_BYTES, 64 << 10)?,
            node_name: s.node_name.map(values::node_name).transpose()?,
            session_store: s.session_store.map(|url| values::session_store(&url)).transpose()?,
            runtime_dir: values::absolute("runtime_dir", s.runtime_dir.unwrap_or_else(|| PathBuf::from(DEFAULT_RUNTIME_DIR)))?,
            kept_capabilities: values::kept_capabilities(s.keep_capability)?,
            seccomp: s.seccomp.unwrap_or(true),
            engine_access: s.engine_access.unwrap_or(false),
            engine_rules: values::engine_rules(s.engine_rules)?,
            token_file: s.token_file,
            web_config_file: s.web_config_file,
            open_metrics: s.open_metrics.unwrap_or(false),
        })
    }
}

/// The output of `config --default`; a test parses it.
pub const REFERENCE: &str = include_str!("../../config.toml");

#[cfg(test)]
mod tests {
    use super::*;

    /// The reference as a file with every key.
    fn uncommented() -> String {
        REFERENCE.lines().filter_map(|line| line.strip_prefix("#: ")).map(|line| format!("{line}\n")).collect()
    }

    fn check(toml: &str, expect: &str) {
        let text = match toml::from_str::<Settings>(toml) {
            Err(error) => error.to_string(),
            Ok(settings) => {
                let checked = settings.validate(None).and_then(|config| config.check_security());
                checked.map_or_else(|e| e.to_string(), |()| "ok".into())
            }
        };
        assert!(text.contains(expect), "{toml}: {text}");
    }

    #[test]
    fn invalid_settings_are_rejected_with_the_key_and_the_remedy() {
        check("", "ok");
        check("listen = '127.0.0.1:1'", "ok");
        check("listen = 'here'", "listen = \"here\" is invalid: expected ADDRESS:PORT");
        check("lisen = 'x'", "unknown field `lisen`");
        check("listen = '0.0.0.0:1'", "set --token-file");
        check("keep_capability = ['sys_admin', 'CAP_MKNOD']", "ok");
        check("keep_capability = ['admin']", "keep_capability = \"admin\" is invalid: expected the name of a capability");
        check("web_config_file = '/no/such.yml'", "cannot read the web configuration /no/such.yml");
        check("token_file = '/no/such'", "cannot read the token file /no/such");
        check("listen = '0.0.0.0:1'\nopen_metrics = true", "ok");
        check("docker_endpoint = 'tcp://x'", "expected a Unix socket");
        check("cri_endpoint = ['unix:///a', 'b']", "cri_endpoint = \"b\" is invalid: expected a Unix socket");
        check("label_sources = ['bundel']", "label_sources = \"bundel\" is invalid: choose from");
        check("reservation_namespace = []", "ok");
        check("reservation_namespace = ['a/b']", "reservation_namespace = \"a/b\" is invalid: expected the name of a Kubernetes");
        check("collect = ['default', 'contenders']", "ok");
        check("collect = ['contender']", "collect = \"contender\" is invalid: expected default, all or one of accelerators, ");
        check("nvml_lib = '/does/not/exist.so'", "nvml_lib = /does/not/exist.so does not exist");
        check("path_devfs = '/no/such/dev'", "path_devfs = /no/such/dev does not exist; set it to the path of the host's /dev");
        check("kernel_mode = 'fast'", "unknown variant `fast`");
        check("sample_source = 'rm'", "unknown variant `rm`");
        check("kernel_ring_bytes = 5000", "kernel_ring_bytes = \"5000\" is invalid: expected a power of two");
        check("gpu_saturation_percent = 100", "ok");
        check("gpu_saturation_percent = 49", "gpu_saturation_percent = \"49\" is invalid: expected a whole percentage");
        check("gpu_budget_percent = 0.01", "ok");
        check("gpu_budget_percent = 0", "gpu_budget_percent = \"0\" is invalid: expected a percentage");
        check("gpu_budget_percent = 101.0", "gpu_budget_percent = \"101\" is invalid: expected a percentage");
        check("wait_probes = 'container=trainer'\nwait_probe_budget = 500", "ok");
        check("wait_probes = 'image=x'", "wait_probes = \"image=x\" is invalid: expected all, container=NAME");
        check("wait_probe_budget = 5", "wait_probe_budget = \"5\" is invalid: expected 10 to 1000000");
        check("session_dir = ''", "session_dir = \"\" is invalid: expected the path");
        check("session_dir_max_bytes = 1000", "session_dir_max_bytes = \"1000\" is invalid: expected at least 1048576 bytes");
        check("session_ring_bytes = 1", "session_ring_bytes = \"1\" is invalid: expected at least 65536");
        check("node_name = 'gpu-7.example.com'", "ok");
        check("node_name = ' '", "node_name = \" \" is invalid: expected the name of the node");
        check("node_name = 'a/b'", "node_name = \"a/b\" is invalid: expected the name of the node");
        check("session_store = 's3://bucket/sessions'", "ok");
        check("session_store = 'bucket'", "session_store = \"bucket\" is invalid: ");
        check("session_store = 's3://a:b@c/d'", "session_store = \"s3://...\" is invalid: credentials and options belong into");
        check("gpu_budget_percent = nan", "is invalid: expected a percentage");
        check("allowed_host = ['gpu.example.com', '[fd00::1]']", "ok");
        check("allowed_host = ['']", "allowed_host = \"\" is invalid: expected a host name or IP address");
        check("allowed_host = ['a', 'https://b']", "allowed_host = \"https://b\" is invalid: expected the host name alone: omit");
        check("allowed_host = ['*.example.com']", "allowed_host = \"*.example.com\" is invalid: wildcards");
        check(
            "allowed_host = ['b:443']",
            "allowed_host = \"b:443\" is invalid: every port of the host is accepted: omit the port",
        );
        check("engine_rules = ['a=/metrics,b=waiting']", "ok");
        check("engine_rules = ['a=/metrics,b=waiting', 'a=/metrics,c=waiting']", "the engine rule a is given twice");
        check("engine_rules = ['a=/stop,b=waiting']", "engine_rules = \"a=/stop,b=waiting\" is invalid: invalid engine rule");
        check("gpu_wait_percent = 0", "gpu_wait_percent = \"0\" is invalid: expected a percentage");
    }

    #[test]
    fn the_reference_is_accepted_and_names_every_key() {
        check(REFERENCE, "ok");
        let read: Settings = toml::from_str(&uncommented()).unwrap();
        assert!(read.listen.is_some() && read.nvml_lib.is_some() && read.path_procfs.is_some() && read.path_sysfs.is_some());
        assert!(
            read.path_devfs.is_some()
                && read.path_rootfs.is_some()
                && read.docker_endpoint.is_some()
                && read.label_sources.is_some()
        );
        assert!(read.cri_endpoint.is_some() && read.podman_endpoint.is_some() && read.pod_labels.is_some());
        assert!(read.collect.is_some() && read.allowed_host.is_some());
        let reserved: Vec<String> = values::RESERVATION_NAMESPACES.map(str::to_owned).into();
        assert_eq!(read.reservation_namespace, Some(reserved));
        assert!(
            read.sample_source.is_some()
                && read.kernel_ring_bytes.is_some()
                && read.kernel_mode.is_some()
                && read.gpu_budget_percent == Some(DEFAULT_GPU_BUDGET_PERCENT)
                && read.gpu_wait_percent == Some(DEFAULT_GPU_WAIT_PERCENT)
                && read.wait_probes.is_some()
                && read.wait_probe_budget == Some(values::DEFAULT_WAIT_PROBE_BUDGET)
                && read.gpu_saturation_percent == Some(values::DEFAULT_GPU_SATURATION_PERCENT)
                && read.session_dir == Some(DEFAULT_SESSION_DIR.into())
                && read.session_dir_max_bytes == Some(DEFAULT_SESSION_DIR_MAX_BYTES)
                && read.session_ring_bytes == Some(DEFAULT_SESSION_RING_BYTES)
                && read.session_store.is_some()
                && read.runtime_dir == Some(DEFAULT_RUNTIME_DIR.into())
                && read.node_name.is_some()
                && read.keep_capability.is_some()
                && read.seccomp == Some(true)
                && read.engine_access == Some(false)
                && read.engine_rules.is_some()
                && read.token_file.is_some()
                && read.web_config_file.is_some()
                && read.open_metrics.is_some()
        );
    }

    /// A file of settings: a value that is refused is named with its key, and an accepted file is written and read again as the same one.
    #[test]
    fn fuzz_config() {
        let known = toml::Table::try_from(toml::from_str::<Settings>(&uncommented()).unwrap()).unwrap();
        devkit::fuzz(file!(), "config", move |bytes| {
            let Ok(text) = std::str::from_utf8(bytes) else { return };
            let settings = match toml::from_str::<Settings>(text) {
                Ok(settings) => settings,
                Err(error) => return assert!(!error.message().is_empty()),
            };
            let written = toml::to_string(&settings).unwrap();
            assert_eq!(toml::to_string(&toml::from_str::<Settings>(&written).unwrap()).unwrap(), written);
            match settings.validate(None) {
                Ok(config) => {
                    assert!(
                        (0.01..=100.0).contains(&config.gpu_budget_percent)
                            && (50..=100).contains(&config.gpu_saturation_percent)
                    );
                    assert!(config.kernel_ring_bytes >= MIN_KERNEL_RING_BYTES && config.session_dir.is_absolute());
                }
                Err(ConfigError::Value { key, .. } | ConfigError::NoSuchPath { key, .. }) => {
                    assert!(known.contains_key(key) && written.contains(key), "{key}");
                }
                Err(error) => panic!("{error}"),
            }
        });
    }
}
