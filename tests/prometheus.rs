//! A real Prometheus with the shipped scrape settings, and promtool.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::{Agent, Docker, Running, Sim, free_port, get, wait_for};
use serde_json::Value;

const SETTINGS: &str = include_str!("../deploy/prometheus/scrape.yml");

struct PrometheusServer {
    port: u16,
    _process: Running,
    _dir: tempfile::TempDir,
}

impl PrometheusServer {
    /// The shipped settings with a scrape every second, and target labels as a Kubernetes pod monitor adds them.
    fn start(agent: u16) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let target =
            format!("[\"127.0.0.1:{agent}\"]\n      labels: {{namespace: monitoring, pod: gpu-sampler-x, container: agent}}");
        let job = SETTINGS.replace("15s", "1s").replace("[\"127.0.0.1:9836\"]", &target);
        ensure!(job.contains("gpu-sampler-x") && job.contains("1s"), "the shipped settings changed their shape");
        std::fs::write(dir.path().join("p.yml"), format!("scrape_configs:\n{job}"))?;
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

    fn query(&self, query: &str) -> Result<Vec<Value>> {
        let escaped: String = query.bytes().map(|b| format!("%{b:02X}")).collect();
        let response: Value = serde_json::from_str(&get(self.port, &format!("/api/v1/query?query={escaped}"))?)?;
        response["data"]["result"].as_array().cloned().with_context(|| response.to_string())
    }

    fn number(&self, query: &str) -> Result<f64> {
        let result = self.query(query)?;
        let value = result.first().and_then(|r| r["value"][1].as_str()).with_context(|| format!("{query}: nothing"))?;
        Ok(value.parse()?)
    }
}

#[test]
fn short_containers_are_counted_and_labels_are_those_of_the_workloads() -> Result<()> {
    let sim = Sim::new("[[gpus]]")?;
    let docker = Docker::new()?;
    let agent = Agent::start(Some(&sim), &[])?;
    let server = PrometheusServer::start(agent.port)?;
    // One container starts before the range begins, so that every series of the sums exists by then.
    let (_, first) = docker.pod("batch", "first", 5)?;
    let _first_load = sim.load(first, 0, 0.2, &[])?;
    wait_for("the namespace is in Prometheus", Duration::from_secs(30), || {
        Ok(server.query("gpu_credited_seconds_total{namespace=\"batch\"} > 0")?.pop())
    })?;
    let from = Instant::now();
    let mut loads = Vec::new();
    for group in 0..5 {
        for i in 0..4 {
            let (_, pid) = docker.pod("batch", &format!("short-{group}-{i}"), 5)?;
            loads.push(sim.load(pid, 0, 0.2, &[])?);
        }
        std::thread::sleep(Duration::from_secs(5));
    }
    for load in &mut loads {
        assert!(load.0.wait()?.success());
    }
    std::thread::sleep(Duration::from_secs(14));
    let range = from.elapsed().as_secs();
    let increase = |series: &str| server.number(&format!("sum(increase({series}[{range}s]))"));
    let busy = increase("gpu_time_seconds_total{state=\"busy\"}")?;
    let credited = increase("gpu_credited_seconds_total")?;
    let unattributed = increase("gpu_unattributed_seconds_total")?;
    println!("over {range} s: busy {busy:.3}, credited {credited:.3}, unattributed {unattributed:.3}");
    // Twenty containers of 5 s at a demand of 0.2 are 20 GPU-seconds.
    assert!((14.0..26.0).contains(&busy), "{busy}");
    assert!(credited > 0.9 * busy, "{credited} of {busy}");
    // increase() extrapolates each series by itself to the ends of the range.
    assert!((credited + unattributed - busy).abs() < 0.02 * busy, "{credited} + {unattributed} is not {busy}");
    let raw =
        "sum(gpu_time_seconds_total{state=\"busy\"}) - sum(gpu_credited_seconds_total) - sum(gpu_unattributed_seconds_total)";
    assert!(server.number(raw)?.abs() < 1e-6);
    let found =
        server.query("container_gpu_info * on(container_id) group_right container_gpu_seconds_total{pod=\"short-4-3\"}")?;
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0]["metric"]["namespace"], "batch");
    assert_eq!(found[0]["metric"]["container"], "main");
    assert_eq!(server.query("{__name__=~\".+\",exported_namespace!=\"\"}")?, Vec::<Value>::new());
    assert_eq!(server.query("{__name__=~\".+\",exported_pod!=\"\"}")?, Vec::<Value>::new());

    let mut promtool =
        Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    promtool.stdin.take().context("stdin")?.write_all(agent.page()?.as_bytes())?;
    let output = promtool.wait_with_output()?;
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn the_shipped_alerts_fire_when_labels_are_missing_and_not_before() -> Result<()> {
    let rules = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/prometheus/rules.test.yml");
    let output = Command::new("promtool").args(["test", "rules", rules]).output().context("promtool")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&[output.stdout, output.stderr].concat()));
    Ok(())
}
