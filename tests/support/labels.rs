//! A container's labels as the agent reports them through `/api/v1/explain`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::{Agent, Sample, get, parse, sum, wait_for};

/// Ten times the target, since machines are shared and noisy. Benches measure the targets themselves.
pub const AT_ONCE: Duration = Duration::from_secs(5);
pub const SOON: Duration = Duration::from_secs(20);

/// UID of the tests' pods.
pub const UID: &str = "8bb25662-de9a-11e9-84e7-f8f21e04010c";

/// Writes the bundle that containerd would leave for a pod's container `main`, below a root of its own.
pub fn bundle(root: &Path, id: &str, pod: &str, uid: &str) -> Result<PathBuf> {
    let folder = root.join("run/containerd/io.containerd.runtime.v2.task/k8s.io").join(id);
    std::fs::create_dir_all(&folder)?;
    let cri = |name: &str| format!("io.kubernetes.cri.{name}");
    let annotations = json!({cri("container-type"): "container", cri("container-name"): "main", cri("sandbox-name"): pod,
        cri("sandbox-namespace"): "prod", cri("sandbox-uid"): uid, cri("image-name"): "registry.example/i:1"});
    std::fs::write(folder.join("config.json"), json!({"ociVersion": "1.0.2", "annotations": annotations}).to_string())?;
    Ok(folder)
}

/// Labels by name; `missing` and `not_applicable` are left out.
pub type Labels = BTreeMap<String, String>;

impl Agent {
    /// `/api/v1/explain?container=`; `None` if the container is unknown.
    pub fn container(&self, id: &str) -> Result<Option<Value>> {
        match get(self.port, &format!("/api/v1/explain?container={id}")) {
            Ok(text) => Ok(Some(serde_json::from_str(&text)?)),
            Err(error) if error.to_string().contains(" 404 ") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits until no label is missing. Returns the explanation and the time that took.
    pub fn complete(&self, id: &str, patience: Duration) -> Result<(Value, Duration)> {
        let (from, mut last) = (Instant::now(), None);
        let complete = |explained: &Value| explained["missing"].as_array().is_some_and(Vec::is_empty);
        let explained = wait_for("its labels are complete", patience, || {
            last = self.container(id)?;
            Ok(last.clone().filter(complete))
        });
        let explained = explained
            .with_context(|| format!("{id}: {}", last.map_or("unknown".into(), |explained| format!("{explained:#}"))))?;
        Ok((explained, from.elapsed()))
    }

    /// The number of queries to runtimes.
    pub fn runtime_calls(&self) -> Result<f64> {
        Ok(sum(&self.scrape()?, "gpu_sampler_runtime_calls_total", &[]).unwrap_or_default())
    }

    /// Whether the agent knows no more containers than these of the test. Others have their own queries; says so.
    pub fn knows_only(&self, own: f64) -> Result<bool> {
        let all = sum(&self.scrape()?, "gpu_sampler_containers", &[]).unwrap_or_default();
        if all > own {
            println!("{} containers of others are on this machine, so queries are not counted", all - own);
        }
        Ok(all <= own)
    }
}

/// One field of every label in an explanation: `value` or `source`.
pub fn label_fields(explained: &Value, field: &str) -> Labels {
    let all = explained["labels"].as_object().into_iter().flatten();
    all.map(|(name, label)| (name.clone(), label[field].as_str().unwrap_or_default().to_owned())).collect()
}

/// `namespace/pod/container name image`, with `-` for an empty label.
pub fn summary(explained: &Value) -> String {
    let labels = label_fields(explained, "value");
    let label = |name: &str| labels.get(name).filter(|v| !v.is_empty()).map_or("-", String::as_str);
    format!("{}/{}/{} {} {}", label("namespace"), label("pod"), label("container"), label("name"), label("image"))
}

/// Scrapes continuously and records blank labels and the longest scrape.
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Seen>>>,
}

#[derive(Debug, Default)]
pub struct Seen {
    pub scrapes: usize,
    pub longest: Duration,
    /// Containers with a series that had a blank label, which a later scrape filled.
    pub filled: BTreeSet<String>,
    /// Containers that had a series.
    pub shown: BTreeMap<String, Labels>,
}

impl Watch {
    pub fn start(agent: &Agent) -> Self {
        let (stop, port) = (Arc::new(AtomicBool::new(false)), agent.port);
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut seen = Seen::default();
            while !stopped.load(Ordering::Relaxed) {
                let from = Instant::now();
                let page = get(port, "/metrics")?;
                seen.longest = seen.longest.max(from.elapsed());
                seen.scrapes += 1;
                for sample in parse(&page) {
                    seen.record(&sample);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(seen)
        });
        Self { stop, thread: Some(thread) }
    }

    pub fn end(mut self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("the watch is ended once")?;
        thread.join().map_err(|_| anyhow::anyhow!("the watching thread panicked"))?
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Seen {
    fn record(&mut self, sample: &Sample) {
        let key = match sample.name.as_str() {
            "container_accelerator_duty_cycle" => "id",
            "container_gpu_seconds_total" | "container_gpu_info" => "container_id",
            _ => return,
        };
        let Some(id) = sample.labels.get(key) else { return };
        let known = self.shown.entry(format!("{} {id}", sample.name)).or_default();
        if known.iter().any(|(name, value)| value.is_empty() && sample.labels.get(name).is_some_and(|now| !now.is_empty())) {
            self.filled.insert(id.clone());
        }
        known.clone_from(&sample.labels);
    }

    /// Fails if a later scrape filled a blank label, or if a scrape took long.
    pub fn check(&self) -> Result<()> {
        ensure!(!self.shown.is_empty(), "no container had a series, so none could be blank");
        ensure!(self.filled.is_empty(), "blank labels were filled later: {:?}", self.filled);
        self.check_speed()
    }

    /// Fails if a scrape took long.
    pub fn check_speed(&self) -> Result<()> {
        ensure!(self.scrapes > 0, "nothing was scraped");
        // Forty times the target: thousands of scrapes on a machine that runs container engines at the same time.
        ensure!(self.longest < Duration::from_secs(2), "a scrape took {:?}", self.longest);
        Ok(())
    }
}
