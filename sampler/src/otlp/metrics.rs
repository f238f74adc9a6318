//! The exposition in the names of OpenTelemetry's semantic conventions: `hw.*` for GPUs, `k8s.*` and `container.*` for users. What has no
//! convention begins with `gpu_sampler.`. Sums are cumulative.

use std::collections::BTreeMap;

use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Gauge, Metric, NumberDataPoint, ResourceMetrics, ScopeMetrics, Sum, metric, number_data_point,
};
use opentelemetry_proto::tonic::resource::v1::Resource;
use sampler_core::device::Reason;
use sampler_core::units::WallTime;
use sampler_labels::Label;
use strum::VariantArray as _;

use crate::export::exposition::{ExportedGpu, ExportedPair, Exposition};

/// The version of the conventions.
const SCHEMA_URL: &str = "https://opentelemetry.io/schemas/1.44.0";

/// How the values of a metric behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Instrument {
    Counter,
    UpDownCounter,
    Gauge,
}

/// A metric's description. Its name comes first in the table.
type Description = (&'static str, Instrument, &'static str, &'static str);

const GPU_UTILIZATION: Description = ("hw.gpu.utilization", Instrument::Gauge, "1", "Busy share of the last 10 s.");
const MEMORY_USAGE: Description = ("hw.gpu.memory.usage", Instrument::UpDownCounter, "By", "GPU memory in use.");
const MEMORY_LIMIT: Description = ("hw.gpu.memory.limit", Instrument::UpDownCounter, "By", "Size of the GPU memory.");
const GPU_IO: Description = ("hw.gpu.io", Instrument::Counter, "By", "Bytes that the GPU received and transmitted over PCIe.");
const ENERGY: Description = ("hw.energy", Instrument::Counter, "J", "Energy that the GPU consumed.");
const POWER: Description = ("hw.power", Instrument::Gauge, "W", "Power that the GPU draws.");
const TEMPERATURE: Description = ("hw.temperature", Instrument::Gauge, "Cel", "Temperature of the GPU.");
const ERRORS: Description =
    ("hw.errors", Instrument::Counter, "{error}", "Errors of the GPU: XID errors, and memory errors by kind.");
const GPU_TIME: Description =
    ("gpu_sampler.gpu.time", Instrument::Counter, "s", "Wall time of the GPU by state: busy, idle, unobserved, unsupported.");
const UNATTRIBUTED_TIME: Description =
    ("gpu_sampler.unattributed.time", Instrument::Counter, "s", "Busy time that is not attributed to a user, by reason.");
const USER_TIME: Description = ("gpu_sampler.user.time", Instrument::Counter, "s", "GPU time attributed to the user.");
const USER_UTILIZATION: Description =
    ("gpu_sampler.user.utilization", Instrument::Gauge, "1", "Share of the last 10 s in which the user kept the GPU busy.");
const USER_MEMORY: Description =
    ("gpu_sampler.user.memory.usage", Instrument::UpDownCounter, "By", "GPU memory held by the user's processes.");
const USER_ENERGY: Description =
    ("gpu_sampler.user.energy", Instrument::Counter, "J", "Energy of the GPU attributed to the user.");
const USER_CONTENTION: Description = (
    "gpu_sampler.user.contention.time",
    Instrument::Counter,
    "s",
    "GPU time of other users while this one was active and the GPU was saturated.",
);

fn attribute(key: &str, value: &str) -> KeyValue {
    let value = Some(AnyValue { value: Some(any_value::Value::StringValue(value.to_owned())) });
    KeyValue { key: key.to_owned(), value, ..KeyValue::default() }
}

/// Metrics by name, with their points.
#[derive(Default)]
struct MetricSet {
    points: BTreeMap<&'static str, (Description, Vec<NumberDataPoint>)>,
    now: u64,
}

impl MetricSet {
    /// `since`: when a counter was 0.
    fn add(&mut self, of: Description, attributes: &[KeyValue], more: &[(&str, &str)], since: u64, value: Option<f64>) {
        let Some(value) = value else { return };
        let more = more.iter().map(|(key, value)| attribute(key, value));
        let start = if of.1 == Instrument::Gauge { 0 } else { since };
        let point = NumberDataPoint {
            attributes: attributes.iter().cloned().chain(more).collect(),
            start_time_unix_nano: start,
            time_unix_nano: self.now,
            value: Some(number_data_point::Value::AsDouble(value)),
            ..NumberDataPoint::default()
        };
        self.points.entry(of.0).or_insert_with(|| (of, Vec::new())).1.push(point);
    }

    fn metrics(self) -> Vec<Metric> {
        let metric = |((name, instrument, unit, description), data_points): (Description, Vec<NumberDataPoint>)| {
            let is_monotonic = instrument == Instrument::Counter;
            let aggregation_temporality = AggregationTemporality::Cumulative as i32;
            let data = match instrument {
                Instrument::Gauge => metric::Data::Gauge(Gauge { data_points }),
                _ => metric::Data::Sum(Sum { data_points, aggregation_temporality, is_monotonic }),
            };
            let (name, unit, description) = (name.to_owned(), unit.to_owned(), description.to_owned());
            Metric { name, unit, description, data: Some(data), ..Metric::default() }
        };
        self.points.into_values().map(metric).collect()
    }
}

/// Attributes of a GPU or MIG device.
fn of_gpu(gpu: &ExportedGpu) -> Vec<KeyValue> {
    let info = &gpu.view.info;
    let mut attributes = vec![
        attribute("hw.id", &info.uuid.0),
        attribute("hw.type", "gpu"),
        attribute("hw.name", &info.model),
        attribute("hw.model", &info.model),
        attribute("hw.vendor", "NVIDIA"),
        attribute("hw.driver_version", &info.driver_version),
    ];
    attributes.extend(info.parent.as_ref().map(|parent| attribute("hw.parent", &parent.0)));
    attributes
}

fn gpu(gpu: &ExportedGpu, since: u64, to: &mut MetricSet) {
    let (view, attributes) = (&gpu.view, of_gpu(gpu));
    let attributes = attributes.as_slice();
    let readings = &view.readings;
    let number = |value: Option<u64>| value.map(|value| value as f64);
    if view.info.is_leaf() {
        to.add(GPU_UTILIZATION, attributes, &[], since, view.utilization_ratio);
        to.add(MEMORY_USAGE, attributes, &[], since, number(readings.memory_used_bytes));
        to.add(MEMORY_LIMIT, attributes, &[], since, number(readings.memory_total_bytes));
        let time = view.time;
        for (state, seconds) in
            [("busy", gpu.busy_seconds), ("idle", time.idle), ("unobserved", time.unobserved), ("unsupported", time.unsupported)]
        {
            to.add(GPU_TIME, attributes, &[("gpu_sampler.state", state)], since, Some(seconds));
        }
        for (reason, seconds) in Reason::VARIANTS.iter().zip(view.unattributed) {
            to.add(UNATTRIBUTED_TIME, attributes, &[("gpu_sampler.reason", reason.name())], since, Some(seconds));
        }
    }
    if view.gone.is_some() {
        return;
    }
    to.add(ENERGY, attributes, &[], since, readings.energy_joules);
    to.add(POWER, attributes, &[], since, readings.power_watts);
    to.add(TEMPERATURE, attributes, &[], since, readings.temperature_celsius);
    for (direction, bytes) in ["transmit", "receive"].into_iter().zip(view.hardware.pcie_bytes) {
        to.add(GPU_IO, attributes, &[("network.io.direction", direction)], since, number(bytes));
    }
    for (kind, count) in ["corrected", "uncorrected"].into_iter().zip(view.hardware.ecc_errors) {
        to.add(ERRORS, attributes, &[("error.type", kind)], since, number(count));
    }
    for (xid, count) in &view.xids {
        to.add(ERRORS, attributes, &[("error.type", &format!("xid_{xid}"))], since, Some(*count as f64));
    }
}

/// Attributes of a user; what is not known is absent.
fn of_user(pair: &ExportedPair) -> Vec<KeyValue> {
    let labels = &pair.labels;
    let mut attributes = vec![attribute("hw.id", &pair.gpu().0), attribute("gpu_sampler.user.kind", labels.kind.user_kind())];
    if pair.is_host_user() {
        attributes.push(attribute("gpu_sampler.user.name", &pair.container_id));
        return attributes;
    }
    let texts = [
        ("k8s.namespace.name", labels.text(Label::Namespace)),
        ("k8s.pod.name", labels.text(Label::Pod)),
        ("k8s.pod.uid", labels.pod_uid.as_deref().unwrap_or_default()),
        ("k8s.container.name", labels.text(Label::Container)),
        ("container.id", &pair.container_id),
        ("container.name", labels.text(Label::Name)),
        ("container.image.name", labels.text(Label::Image)),
        ("container.runtime.name", labels.runtime.map_or("", |runtime| runtime.name())),
    ];
    attributes.extend(texts.into_iter().filter(|(_, text)| !text.is_empty()).map(|(key, text)| attribute(key, text)));
    attributes
}

fn user(pair: &ExportedPair, since: u64, to: &mut MetricSet) {
    let (usage, attributes) = (&pair.usage, of_user(pair));
    let attributes = attributes.as_slice();
    to.add(USER_TIME, attributes, &[], since, Some(usage.seconds));
    to.add(USER_UTILIZATION, attributes, &[], since, usage.duty_cycle_percent.map(|percent| percent / 100.0));
    to.add(USER_MEMORY, attributes, &[], since, usage.memory_used_bytes.map(|bytes| bytes as f64));
    to.add(USER_ENERGY, attributes, &[], since, usage.energy_joules);
    let contention: f64 = usage.contention.iter().map(|contention| contention.seconds).sum();
    to.add(USER_CONTENTION, attributes, &[], since, Some(contention));
}

/// `started`: when counters of the agent were 0. `resource`: attributes of the resource, which take precedence.
pub fn request(
    page: &Exposition,
    started: WallTime,
    node: Option<&str>,
    resource: &[(String, String)],
) -> ExportMetricsServiceRequest {
    let mut set = MetricSet { now: page.at.0, ..MetricSet::default() };
    for each in &page.gpus {
        gpu(each, each.created.unwrap_or(started).0, &mut set);
    }
    for pair in &page.pairs {
        user(pair, pair.created.unwrap_or(started).0, &mut set);
    }
    let version = env!("CARGO_PKG_VERSION");
    let own = [("service.name", Some("gpu-sampler")), ("service.version", Some(version)), ("host.name", node)];
    let own = own.into_iter().filter(|(key, _)| !resource.iter().any(|(configured, _)| configured == key));
    let own = own.filter_map(|(key, value)| value.map(|value| attribute(key, value)));
    let attributes = own.chain(resource.iter().map(|(key, value)| attribute(key, value))).collect();
    let scope = InstrumentationScope { name: "gpu-sampler".into(), version: version.into(), ..InstrumentationScope::default() };
    let scope = ScopeMetrics { scope: Some(scope), metrics: set.metrics(), schema_url: SCHEMA_URL.into() };
    let resource = Some(Resource { attributes, ..Resource::default() });
    let resource = ResourceMetrics { resource, scope_metrics: vec![scope], schema_url: SCHEMA_URL.into() };
    ExportMetricsServiceRequest { resource_metrics: vec![resource] }
}
