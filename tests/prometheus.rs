//! A real Prometheus with the shipped scrape settings, and promtool.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::prometheus::PrometheusServer;
use gpu_sampler_tests::{Agent, Docker, Sample, Sim, get, wait_for};
use serde_json::Value;

#[test]
fn each_of_several_scrapers_counts_short_containers_completely() -> Result<()> {
    let sim = Sim::new("[[gpus]]")?;
    let docker = Docker::new()?;
    let agent = Agent::start(Some(&sim), &[])?;
    // The last one takes no start of a counter from the others.
    let _of_kubelet = PrometheusServer::start(agent.port, "1s", "/metrics/cadvisor", "default")?;
    let early = PrometheusServer::start(agent.port, "1s", "/metrics", "default")?;
    // One container starts before the range begins, so that every series of the sums exists by then.
    let (_, first) = docker.pod("batch", "first", 5)?;
    let _first_load = sim.load(first, 0, 0.2, &[])?;
    wait_for("the namespace is in Prometheus", Duration::from_secs(30), || {
        Ok(early.query("gpu_credited_seconds_total{namespace=\"batch\"} > 0")?.pop())
    })?;
    let late = PrometheusServer::start(agent.port, "2s", "/metrics", "default")?;
    wait_for("the second server has scraped", Duration::from_secs(30), || Ok(late.query("gpu_sampler_build_info")?.pop()))?;
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
    let counted: Vec<Sample> = agent.scrape()?;
    let is_short = |s: &&Sample| s.name == "container_gpu_seconds_total" && s.labels["pod"].starts_with("short-");
    let of_pods: BTreeMap<String, f64> = counted.iter().filter(is_short).map(|s| (s.labels["pod"].clone(), s.value)).collect();
    ensure!(of_pods.len() == 20, "{} of 20 containers have a series: {of_pods:?}", of_pods.len());
    let range = from.elapsed().as_secs();
    for (name, server) in [("early", &early), ("late", &late)] {
        let increase = |series: &str| server.number(&format!("sum(increase({series}[{range}s]))"));
        let busy = increase("gpu_time_seconds_total{state=\"busy\"}")?;
        let credited = increase("gpu_credited_seconds_total")?;
        let unattributed = increase("gpu_unattributed_seconds_total")?;
        println!("{name}: over {range} s: busy {busy:.3}, credited {credited:.3}, unattributed {unattributed:.3}");
        // Twenty containers of 5 s at a demand of 0.2 are 20 GPU-seconds.
        assert!((14.0..26.0).contains(&busy), "{busy}");
        assert!(credited > 0.9 * busy, "{credited} of {busy}");
        // increase() extrapolates each series by itself to the ends of the range.
        assert!((credited + unattributed - busy).abs() < 0.02 * busy, "{credited} + {unattributed} is not {busy}");
        let raw =
            "sum(gpu_time_seconds_total{state=\"busy\"}) - sum(gpu_credited_seconds_total) - sum(gpu_unattributed_seconds_total)";
        assert!(server.number(raw)?.abs() < 1e-6);
        for (pod, seconds) in &of_pods {
            // The increase from the first to the last scrape, without the extrapolation: the counter began at 0.
            let series = format!("container_gpu_seconds_total{{pod=\"{pod}\"}}");
            let seen = server.number(&format!("max_over_time({series}[{range}s]) - min_over_time({series}[{range}s])"))?;
            assert!((seen - seconds).abs() < 1e-6, "{name}: {pod} has {seconds} s, and increased by {seen} s");
            // The last scrape may be an interval before the end of the range, to which the increase is extrapolated.
            let extrapolated = increase(&series)?;
            assert!((extrapolated - seconds).abs() < 0.2 * seconds + 0.01, "{name}: {pod} has {seconds} s, not {extrapolated} s");
        }
        assert_eq!(server.query("{__name__=~\".+\",exported_namespace!=\"\"}")?, Vec::<Value>::new());
        assert_eq!(server.query("{__name__=~\".+\",exported_pod!=\"\"}")?, Vec::<Value>::new());
    }
    let found =
        early.query("container_gpu_info * on(container_id) group_right container_gpu_seconds_total{pod=\"short-4-3\"}")?;
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0]["metric"]["namespace"], "batch");
    assert_eq!(found[0]["metric"]["container"], "main");
    promtool_accepts(&agent.page_with_all_families()?)
}

fn promtool_accepts(page: &str) -> Result<()> {
    let mut promtool =
        Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    promtool.stdin.take().context("stdin")?.write_all(page.as_bytes())?;
    let output = promtool.wait_with_output()?;
    ensure!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Passes one request of a scraper on to the agent; returns the heads of the request and of the response.
fn relay(listener: &TcpListener, agent: u16) -> Result<(String, String)> {
    let head = |stream: &mut TcpStream| -> Result<Vec<u8>> {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        Ok(head)
    };
    let (mut scraper, _) = listener.accept()?;
    let request = head(&mut scraper)?;
    let mut server = TcpStream::connect(("127.0.0.1", agent))?;
    server.write_all(&request)?;
    let response = head(&mut server)?;
    scraper.write_all(&response)?;
    server.set_read_timeout(Some(Duration::from_secs(2)))?;
    // The connection stays open; the body is complete when nothing more comes.
    let mut part = [0; 4096];
    while let Ok(n @ 1..) = server.read(&mut part) {
        scraper.write_all(&part[..n])?;
    }
    Ok((String::from_utf8(request)?.to_lowercase(), String::from_utf8(response)?.to_lowercase()))
}

#[test]
fn prometheus_negotiates_openmetrics_and_gzip() -> Result<()> {
    let sim = Sim::new("[[gpus]]")?;
    let agent = Agent::start(Some(&sim), &[])?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let server = PrometheusServer::start(listener.local_addr()?.port(), "5s", "/metrics", "default")?;
    let (request, response) = relay(&listener, agent.port)?;
    ensure!(request.contains("accept-encoding: gzip") && request.contains("application/openmetrics-text"), "{request}");
    ensure!(response.contains("content-encoding: gzip"), "{response}");
    ensure!(response.contains("content-type: application/openmetrics-text; version=1.0.0"), "{response}");
    drop(server);

    let direct = PrometheusServer::start(agent.port, "1s", "/metrics", "all")?;
    wait_for("Prometheus has units", Duration::from_secs(30), || {
        let metadata: Value = serde_json::from_str(&get(direct.port, "/api/v1/targets/metadata?metric=gpu_time_seconds")?)?;
        let of_gpu = &metadata["data"][0];
        Ok((of_gpu["unit"] == "seconds" && of_gpu["type"] == "counter").then_some(()))
    })?;
    // Metadata are known before the samples of the same scrape can be queried.
    wait_for("Prometheus has samples", Duration::from_secs(30), || {
        let idle = direct.number("gpu_time_seconds_total{state=\"idle\"}").is_ok_and(|seconds| seconds >= 0.0);
        Ok((idle && direct.number("up").is_ok_and(|up| up == 1.0)).then_some(()))
    })
}

#[test]
fn the_shipped_alerts_fire_when_labels_are_missing_and_not_before() -> Result<()> {
    let rules = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/prometheus/rules.test.yml");
    let output = Command::new("promtool").args(["test", "rules", rules]).output().context("promtool")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&[output.stdout, output.stderr].concat()));
    Ok(())
}
