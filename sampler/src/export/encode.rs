//! Families of the [catalogue](super::catalogue) with their series, as text.

use prometheus::TextEncoder;
use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};

use super::catalogue::Family;
use super::series_starts::{SeriesId, SeriesStarts};

pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// Families in the order in which they were begun. A family without series is left out.
pub struct Families<'a> {
    families: Vec<MetricFamily>,
    pub starts: &'a mut SeriesStarts,
}

pub struct FamilyWriter<'a> {
    family: &'static Family,
    series: &'a mut MetricFamily,
    starts: &'a mut SeriesStarts,
}

/// A histogram's state: `cumulative` has a count for each of `bounds`.
#[derive(Clone, Copy)]
pub struct HistogramValue<'a> {
    pub bounds: &'a [f64],
    pub cumulative: &'a [u64],
    pub sum: f64,
    pub count: u64,
}

impl<'a> Families<'a> {
    pub fn new(starts: &'a mut SeriesStarts) -> Self {
        Self { families: Vec::new(), starts }
    }

    pub fn family(&mut self, family: &'static Family) -> FamilyWriter<'_> {
        let mut series = MetricFamily::default();
        series.set_name(family.name.to_owned());
        series.set_help(family.full_help());
        series.set_field_type(family.kind);
        self.families.push(series);
        let series = self.families.last_mut().expect("one was just pushed");
        FamilyWriter { family, series, starts: self.starts }
    }

    /// Adds the family with a series for each value of `label`.
    pub fn add_each<P: AsRef<str>>(&mut self, family: &'static Family, label: &str, series: impl IntoIterator<Item = (P, f64)>) {
        let mut family = self.family(family);
        for (part, value) in series {
            family.add(&[(label, part.as_ref())], value);
        }
    }

    /// Ends the scrape.
    pub fn text(mut self) -> Result<String, prometheus::Error> {
        self.starts.finish_scrape();
        self.families.retain(|family| !family.get_metric().is_empty());
        TextEncoder::new().encode_to_string(&self.families)
    }
}

impl FamilyWriter<'_> {
    fn metric(&self, labels: Labels<'_>) -> Metric {
        let undeclared = labels.iter().find(|(name, _)| !self.family.labels.contains(name));
        debug_assert_eq!(undeclared, None, "{} does not declare this label", self.family.name);
        let pair = |(name, value): &(&str, &str)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value((*value).to_owned());
            pair
        };
        Metric::from_label(labels.iter().map(pair).collect())
    }

    fn push_value(&mut self, labels: Labels<'_>, value: f64) {
        let mut metric = self.metric(labels);
        debug_assert_ne!(self.family.kind, MetricType::HISTOGRAM, "{}", self.family.name);
        if self.family.kind == MetricType::COUNTER {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        self.series.mut_metric().push(metric);
    }

    fn push_histogram(&mut self, labels: Labels<'_>, value: HistogramValue<'_>) {
        let mut metric = self.metric(labels);
        debug_assert_eq!(self.family.kind, MetricType::HISTOGRAM, "{}", self.family.name);
        let bucket = |(bound, count): (&f64, &u64)| {
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(*bound);
            bucket.set_cumulative_count(*count);
            bucket
        };
        let mut histogram = Histogram::default();
        histogram.set_bucket(value.bounds.iter().zip(value.cumulative).map(bucket).collect());
        histogram.set_sample_sum(value.sum);
        histogram.set_sample_count(value.count);
        metric.set_histogram(histogram);
        self.series.mut_metric().push(metric);
    }

    fn is_start(&mut self, series: SeriesId<'_>) -> bool {
        debug_assert!(self.family.starts_at_zero, "{} does not start at zero", self.family.name);
        self.starts.is_start(self.family.name, series)
    }

    pub fn add(&mut self, labels: Labels<'_>, value: f64) {
        debug_assert!(!self.family.starts_at_zero, "{} starts at zero", self.family.name);
        self.push_value(labels, value);
    }

    /// Adds no series if the value is unknown: missing is not zero.
    pub fn add_known(&mut self, labels: Labels<'_>, value: Option<f64>) {
        if let Some(value) = value {
            self.add(labels, value);
        }
    }

    /// 0 in the first exposition of the series.
    pub fn add_from_zero(&mut self, series: SeriesId<'_>, labels: Labels<'_>, value: f64) {
        let value = if self.is_start(series) { 0.0 } else { value };
        self.push_value(labels, value);
    }

    pub fn add_histogram(&mut self, labels: Labels<'_>, value: HistogramValue<'_>) {
        debug_assert!(!self.family.starts_at_zero, "{} starts at zero", self.family.name);
        self.push_histogram(labels, value);
    }

    /// Empty in the first exposition of the series.
    pub fn add_histogram_from_zero(&mut self, series: SeriesId<'_>, labels: Labels<'_>, value: HistogramValue<'_>) {
        if self.is_start(series) {
            let zeros = vec![0; value.cumulative.len()];
            self.push_histogram(labels, HistogramValue { cumulative: &zeros, sum: 0.0, count: 0, ..value });
        } else {
            self.push_histogram(labels, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalogue::{agent, containers};
    use super::*;

    #[test]
    fn a_family_without_series_is_left_out() {
        let mut starts = SeriesStarts::default();
        let mut all = Families::new(&mut starts);
        all.family(&agent::RESYNCS);
        all.family(&agent::CONTAINERS).add(&[("state", "settled"), ("runtime", "docker")], 2.0);
        let text = all.text().unwrap();
        assert!(text.starts_with("# HELP gpu_sampler_containers Number of "), "{text}");
        assert!(
            text.ends_with(
                "# TYPE gpu_sampler_containers gauge\ngpu_sampler_containers{state=\"settled\",runtime=\"docker\"} 2\n"
            )
        );
    }

    /// In release builds the label is exported; a scrape does not fail because of it.
    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "gpu_sampler_resyncs_total does not declare this label")]
    fn a_label_that_the_catalogue_does_not_declare_is_rejected() {
        Families::new(&mut SeriesStarts::default()).family(&agent::RESYNCS).add(&[("uuid", "GPU-1")], 1.0);
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "container_gpu_seconds_total starts at zero")]
    fn a_series_that_starts_at_zero_is_not_added_without_its_identity() {
        Families::new(&mut SeriesStarts::default()).family(&containers::SECONDS).add(&[], 1.0);
    }
}
