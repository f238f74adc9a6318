//! Metrics by OTLP, received by servers of the protocol: gRPC, and protobuf over HTTP.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::kernel::Layout;
use gpu_sampler_tests::{Agent, Docker, Sim, free_port, sum, wait_for};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{MetricsService, MetricsServiceServer};
use opentelemetry_proto::tonic::collector::metrics::v1::{ExportMetricsServiceRequest, ExportMetricsServiceResponse};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1::{NumberDataPoint, metric, number_data_point};
use prost::Message as _;
use tonic::codec::CompressionEncoding;

/// What a receiver has received, newest last.
#[derive(Clone, Default)]
struct Received {
    requests: Arc<Mutex<Vec<ExportMetricsServiceRequest>>>,
    authorization: Arc<Mutex<String>>,
}

/// A point with the name of its metric.
struct Point {
    metric: String,
    is_monotonic: bool,
    unit: String,
    point: NumberDataPoint,
}

fn text<'a>(attributes: &'a [KeyValue], key: &str) -> &'a str {
    let value =
        attributes.iter().find(|attribute| attribute.key == key).and_then(|attribute| attribute.value.as_ref()?.value.as_ref());
    match value {
        Some(any_value::Value::StringValue(text)) => text,
        _ => "",
    }
}

impl Point {
    fn value(&self) -> f64 {
        match self.point.value {
            Some(number_data_point::Value::AsDouble(value)) => value,
            _ => f64::NAN,
        }
    }

    fn text(&self, key: &str) -> &str {
        text(&self.point.attributes, key)
    }
}

/// The state stays usable after a panic of another thread.
fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Received {
    /// The points of the newest request.
    fn points(&self) -> Vec<Point> {
        let requests = locked(&self.requests);
        let scopes = requests
            .last()
            .into_iter()
            .flat_map(|request| &request.resource_metrics)
            .flat_map(|resource| &resource.scope_metrics);
        let points = scopes.flat_map(|scope| &scope.metrics).flat_map(|found| {
            let (points, is_monotonic) = match &found.data {
                Some(metric::Data::Sum(sum)) => (&sum.data_points[..], sum.is_monotonic),
                Some(metric::Data::Gauge(gauge)) => (&gauge.data_points[..], false),
                _ => (&[][..], false),
            };
            points.iter().map(move |point| Point {
                metric: found.name.clone(),
                unit: found.unit.clone(),
                is_monotonic,
                point: point.clone(),
            })
        });
        points.collect()
    }

    fn resource(&self, key: &str) -> String {
        let requests = locked(&self.requests);
        let resource = requests.last().and_then(|request| request.resource_metrics.first()?.resource.as_ref());
        resource.map_or_else(String::new, |resource| text(&resource.attributes, key).to_owned())
    }
}

#[tonic::async_trait]
impl MetricsService for Received {
    async fn export(
        &self,
        request: tonic::Request<ExportMetricsServiceRequest>,
    ) -> Result<tonic::Response<ExportMetricsServiceResponse>, tonic::Status> {
        let authorization = request.metadata().get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
        *locked(&self.authorization) = authorization.to_owned();
        locked(&self.requests).push(request.into_inner());
        Ok(tonic::Response::new(ExportMetricsServiceResponse::default()))
    }
}

/// A gRPC receiver on a thread of its own, for as long as the test runs.
fn grpc(port: u16) -> Received {
    let received = Received::default();
    let service = MetricsServiceServer::new(received.clone()).accept_compressed(CompressionEncoding::Gzip);
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let address = ([127, 0, 0, 1], port).into();
        runtime.block_on(tonic::transport::Server::builder().add_service(service).serve(address))
    });
    received
}

/// One request over HTTP; its body has a length.
fn receive(stream: &mut TcpStream, received: &Received, status: u16) -> Result<()> {
    let mut bytes = Vec::new();
    let end = loop {
        let mut part = [0; 4096];
        let read = stream.read(&mut part)?;
        ensure!(read > 0, "the request is incomplete");
        bytes.extend_from_slice(&part[..read]);
        if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
    ensure!(head.starts_with("post /v1/metrics ") && head.contains("content-type: application/x-protobuf"), "{head}");
    let length =
        head.lines().find_map(|line| line.strip_prefix("content-length: ")).context("no length")?.trim().parse::<usize>()?;
    let mut body = bytes.split_off(end);
    let have = body.len();
    body.resize(length, 0);
    stream.read_exact(&mut body[have..])?;
    let authorization = head.lines().find_map(|line| line.strip_prefix("authorization: ")).unwrap_or_default();
    *locked(&received.authorization) = authorization.to_owned();
    locked(&received.requests).push(ExportMetricsServiceRequest::decode(&body[..])?);
    let text = if status == 200 { "" } else { "the quota is used up" };
    Ok(write!(stream, "HTTP/1.1 {status} -\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{text}", text.len())?)
}

/// A receiver over HTTP that returns this status.
fn http(status: u16) -> Result<(u16, Received)> {
    let (listener, received) = (TcpListener::bind("127.0.0.1:0")?, Received::default());
    let (port, to) = (listener.local_addr()?.port(), received.clone());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            if let Err(error) = receive(&mut stream, &to, status) {
                eprintln!("receiver: {error:#}");
            }
        }
    });
    Ok((port, received))
}

fn agent(sim: &Sim, variables: &[(&str, &str)]) -> Result<Agent> {
    let mut command = Agent::command(Some(sim))?;
    command.envs(variables.iter().copied()).env("OTEL_METRIC_EXPORT_INTERVAL", "500");
    Agent::start_as(Layout::Machine, command, &[])
}

#[test]
fn receivers_of_both_protocols_get_gpus_and_users_in_the_names_of_the_conventions() -> Result<()> {
    let (sim, docker) = (Sim::new("[[gpus]]")?, Docker::new()?);
    let (id, pid) = docker.pod("prod", "trainer-0", 120)?;
    let _load = sim.load(pid, 0, 0.4, &[])?;
    let port = free_port()?;
    let by_grpc = grpc(port);
    let (http_port, by_http) = http(200)?;
    let header = ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20secret");
    let resource = ("OTEL_RESOURCE_ATTRIBUTES", "k8s.node.name=node-7");
    let (grpc_endpoint, http_endpoint) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{http_port}"));
    let protocol = [("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")];
    let _by_grpc = agent(&sim, &[&[("OTEL_EXPORTER_OTLP_ENDPOINT", &*grpc_endpoint), header, resource], &protocol[..]].concat())?;
    let agent = agent(&sim, &[("OTEL_EXPORTER_OTLP_ENDPOINT", &http_endpoint), header, resource])?;
    for (name, received) in [("grpc", &by_grpc), ("http", &by_http)] {
        let points = wait_for(&format!("the user's time arrives by {name}"), Duration::from_secs(30), || {
            let points = received.points();
            let is_ours = |p: &Point| p.metric == "gpu_sampler.user.time" && p.text("container.id") == id && p.value() > 0.5;
            Ok(points.iter().any(is_ours).then_some(points))
        })?;
        let user =
            points.iter().find(|p| p.metric == "gpu_sampler.user.time" && p.text("container.id") == id).context("no user")?;
        for (key, expect) in [
            ("k8s.namespace.name", "prod"),
            ("k8s.pod.name", "trainer-0"),
            ("k8s.container.name", "main"),
            ("gpu_sampler.user.kind", "container"),
            ("container.runtime.name", "docker"),
        ] {
            ensure!(user.text(key) == expect, "{name}: {key} is {:?}", user.text(key));
        }
        ensure!(user.is_monotonic && user.unit == "s" && user.point.start_time_unix_nano > 0);
        ensure!(user.point.start_time_unix_nano < user.point.time_unix_nano);
        for (metric, unit) in
            [("hw.gpu.utilization", "1"), ("hw.gpu.memory.limit", "By"), ("hw.power", "W"), ("hw.temperature", "Cel")]
        {
            let point = points.iter().find(|p| p.metric == metric).with_context(|| format!("{name}: no {metric}"))?;
            ensure!(
                point.unit == unit && !point.is_monotonic && point.text("hw.type") == "gpu" && !point.text("hw.id").is_empty()
            );
        }
        // Busy time is what is attributed and what is not.
        let total = |metric: &str, key: &str, value: &str| {
            points
                .iter()
                .filter(|p| p.metric == metric && (key.is_empty() || p.text(key) == value))
                .map(Point::value)
                .sum::<f64>()
        };
        let busy = total("gpu_sampler.gpu.time", "gpu_sampler.state", "busy");
        let parts = total("gpu_sampler.user.time", "", "") + total("gpu_sampler.unattributed.time", "", "");
        ensure!((busy - parts).abs() < 1e-3, "{name}: busy {busy} s, parts {parts} s");
        ensure!(received.resource("service.name") == "gpu-sampler" && received.resource("k8s.node.name") == "node-7");
        ensure!(*locked(&received.authorization) == if name == "grpc" { "Bearer secret" } else { "bearer secret" });
    }
    let page = agent.scrape()?;
    ensure!(sum(&page, "gpu_sampler_otlp_exports_total", &[("outcome", "ok")]).is_some_and(|n| n > 0.0));
    ensure!(sum(&page, "gpu_sampler_otlp_exports_total", &[("outcome", "error")]) == Some(0.0));
    Ok(())
}

#[test]
fn a_receiver_that_fails_is_reported_once_and_changes_nothing_else() -> Result<()> {
    let sim = Sim::new("[[gpus]]")?;
    let (port, received) = http(429)?;
    let endpoint = format!("http://127.0.0.1:{port}");
    let agent = agent(&sim, &[("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)])?;
    wait_for("three requests failed", Duration::from_secs(20), || {
        let failed = sum(&agent.scrape()?, "gpu_sampler_otlp_exports_total", &[("outcome", "error")]);
        Ok(failed.filter(|n| *n >= 3.0))
    })?;
    let log = agent.log()?;
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("cannot export metrics by OTLP")).collect();
    ensure!(lines.len() == 1 && lines[0].contains("HTTP 429") && lines[0].contains("the quota is used up"), "{lines:#?}");
    ensure!(locked(&received.requests).len() >= 3);
    // Off by default.
    let plain = Agent::start(Some(&sim), &[])?;
    ensure!(sum(&plain.scrape()?, "gpu_sampler_otlp_exports_total", &[]).is_none());
    Ok(())
}

#[test]
fn an_invalid_variable_is_refused_at_the_start() -> Result<()> {
    let mut command = Agent::command(None)?;
    let refused = command.args(["--listen", "127.0.0.1:0"]).env("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318").output()?;
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(
        refused.status.code() == Some(1)
            && error.contains("OTEL_EXPORTER_OTLP_ENDPOINT")
            && error.contains("http://collector:4318"),
        "{error}"
    );
    Ok(())
}
