//! Metric families from plain rows, and their text.

use prometheus::TextEncoder;
use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};

pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// Families in the order they were begun; one without samples is left out.
#[derive(Default)]
pub struct Families(Vec<MetricFamily>);

pub struct Family<'a> {
    family: &'a mut MetricFamily,
    kind: MetricType,
}

impl Families {
    fn begin(&mut self, kind: MetricType, name: &str, help: &str) -> Family<'_> {
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        self.0.push(family);
        let family = self.0.last_mut().expect("one was just pushed");
        Family { family, kind }
    }

    pub fn gauge(&mut self, name: &str, help: &str) -> Family<'_> {
        self.begin(MetricType::GAUGE, name, help)
    }

    pub fn counter(&mut self, name: &str, help: &str) -> Family<'_> {
        self.begin(MetricType::COUNTER, name, help)
    }

    pub fn histogram(&mut self, name: &str, help: &str) -> Family<'_> {
        self.begin(MetricType::HISTOGRAM, name, help)
    }

    pub fn text(mut self) -> Result<String, prometheus::Error> {
        self.0.retain(|family| !family.get_metric().is_empty());
        TextEncoder::new().encode_to_string(&self.0)
    }
}

fn metric(labels: Labels<'_>) -> Metric {
    let pair = |(name, value): &(&str, &str)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    };
    Metric::from_label(labels.iter().map(pair).collect())
}

impl Family<'_> {
    fn push(&mut self, metric: Metric) {
        let mut all = self.family.take_metric();
        all.push(metric);
        self.family.set_metric(all);
    }

    pub fn add(&mut self, labels: Labels<'_>, value: f64) {
        let mut metric = metric(labels);
        if self.kind == MetricType::COUNTER {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        self.push(metric);
    }

    /// Nothing at all where the value is unknown: missing is not zero.
    pub fn add_known(&mut self, labels: Labels<'_>, value: Option<f64>) {
        if let Some(value) = value {
            self.add(labels, value);
        }
    }

    pub fn add_histogram(&mut self, labels: Labels<'_>, bounds: &[f64], cumulative: &[u64], sum: f64, count: u64) {
        let bucket = |(bound, count): (&f64, &u64)| {
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(*bound);
            bucket.set_cumulative_count(*count);
            bucket
        };
        let mut histogram = Histogram::default();
        histogram.set_bucket(bounds.iter().zip(cumulative).map(bucket).collect());
        histogram.set_sample_sum(sum);
        histogram.set_sample_count(count);
        let mut metric = metric(labels);
        metric.set_histogram(histogram);
        self.push(metric);
    }
}
