//! Families of the [catalogue](super::catalogue) with their series, as text.
//!
//! A page has thousands of series with labels that stay the same for hours. They are written from blocks that are escaped once: those of
//! containers are kept, those of the few GPUs are made for each page. The series of all families are added pair by pair; each family has
//! a text of its own, and the page is their sequence in the order of the families.

use std::fmt::Write as _;
use std::sync::Arc;

use sampler_core::units::WallTime;

use super::catalogue::{Family, Kind};
use super::series_starts::OwnedSeries;
use crate::collectors::{Collector, Selection};

/// The formats that Prometheus negotiates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TextFormat {
    /// The text format 0.0.4 of Prometheus.
    #[default]
    Prometheus,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl TextFormat {
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// The format that an `Accept` header prefers.
    pub fn negotiated(accept: &str) -> Self {
        let quality = |media_type: &str| {
            let ranges = accept.split(',').filter_map(|range| {
                let mut parameters = range.split(';').map(str::trim);
                let is_wanted = parameters.next() == Some(media_type);
                let quality = parameters.find_map(|parameter| parameter.strip_prefix("q=")?.parse::<f64>().ok());
                is_wanted.then(|| quality.unwrap_or(1.0))
            });
            ranges.fold(0.0, f64::max)
        };
        if quality("application/openmetrics-text") > quality("text/plain") { Self::OpenMetrics } else { Self::Prometheus }
    }
}

/// The labels of a series: blocks from [`label_block`], of which any may be empty, and more.
#[derive(Clone, Copy)]
pub struct Labels<'a> {
    pub blocks: [&'a str; 2],
    pub more: &'a [(&'a str, &'a str)],
}

impl<'a> From<&'a str> for Labels<'a> {
    fn from(block: &'a str) -> Self {
        Self { blocks: [block, ""], more: &[] }
    }
}

impl<'a> From<[&'a str; 2]> for Labels<'a> {
    fn from(blocks: [&'a str; 2]) -> Self {
        Self { blocks, more: &[] }
    }
}

impl<'a> From<&'a [(&'a str, &'a str)]> for Labels<'a> {
    fn from(more: &'a [(&'a str, &'a str)]) -> Self {
        Self { blocks: [""; 2], more }
    }
}

impl<'a, const N: usize> From<&'a [(&'a str, &'a str); N]> for Labels<'a> {
    fn from(more: &'a [(&'a str, &'a str); N]) -> Self {
        Self { blocks: [""; 2], more }
    }
}

/// A histogram's state: `cumulative` has a count for each of `bounds`.
#[derive(Clone, Copy)]
pub struct HistogramValue<'a> {
    pub bounds: &'a [f64],
    pub cumulative: &'a [u64],
    pub sum: f64,
    pub count: u64,
}

/// A family of one page.
#[derive(Clone, Copy, Debug)]
pub struct FamilyId(usize);

struct FamilyText {
    family: &'static Family,
    is_selected: bool,
    format: TextFormat,
    /// The time of a page with `_created`.
    created_until: Option<WallTime>,
    /// Bytes of the text in an earlier page.
    expected: usize,
    /// Empty without series.
    text: String,
}

/// Bytes of the families of a page: the next one has about the same, and its texts do not have to grow.
#[derive(Debug, Default)]
pub struct PageSizes(Vec<(&'static str, usize)>);

/// The selected families in the order in which they were declared. A family without series is left out.
#[derive(Default)]
pub struct Page {
    families: Vec<FamilyText>,
    selection: Selection,
    format: TextFormat,
    times: Option<PageTimes>,
    expected: Arc<PageSizes>,
}

/// When the counts of the agent were 0, and the time of the page.
#[derive(Clone, Copy, Debug)]
pub struct PageTimes {
    pub started: WallTime,
    pub now: WallTime,
}

/// Labels as they stand between the braces.
pub fn label_block(labels: &[(&str, &str)]) -> String {
    let mut text = String::new();
    write_labels(&mut text, labels);
    text
}

/// Characters with an escape in the value of a label.
const ESCAPED: [char; 3] = ['\\', '"', '\n'];

fn write_labels(to: &mut String, labels: &[(&str, &str)]) {
    for (name, value) in labels {
        if to.ends_with('"') {
            to.push(',');
        }
        to.push_str(name);
        to.push_str("=\"");
        for part in value.split_inclusive(ESCAPED) {
            let plain = part.trim_end_matches(ESCAPED);
            to.push_str(plain);
            to.push_str(match &part[plain.len()..] {
                "\\" => "\\\\",
                "\"" => "\\\"",
                "\n" => "\\n",
                _ => "",
            });
        }
        to.push('"');
    }
}

/// Every integer below it is a float.
const EXACT_INTEGERS: f64 = 9_007_199_254_740_992.0;

fn write_value(to: &mut String, value: f64) {
    // Writing to a String cannot fail.
    let _ok = if value == f64::INFINITY {
        to.write_str("+Inf")
    } else if value == f64::NEG_INFINITY {
        to.write_str("-Inf")
    } else if value.fract() == 0.0 && value.abs() < EXACT_INTEGERS {
        // The same digits, in a tenth of the time.
        write!(to, "{}", value as i64)
    } else {
        write!(to, "{value}")
    };
    to.push('\n');
}

impl Page {
    pub fn new(selection: Selection, format: TextFormat) -> Self {
        Self { selection, format, ..Self::default() }
    }

    /// Families that follow have room for as much as they had in an earlier page.
    pub fn expect(&mut self, sizes: Arc<PageSizes>) {
        self.expected = sizes;
    }

    pub fn selects(&self, collector: Collector) -> bool {
        self.selection.has(collector)
    }

    pub fn sizes(&self) -> PageSizes {
        let with_series = self.families.iter().filter(|family| !family.text.is_empty());
        PageSizes(with_series.map(|family| (family.family.name, family.text.len())).collect())
    }

    /// Families that follow have `_created`, if the page is to have it.
    pub fn set_times(&mut self, times: PageTimes) {
        let is_wanted = self.format == TextFormat::OpenMetrics && self.selection.has(Collector::Created);
        self.times = is_wanted.then_some(times);
    }

    pub fn family(&mut self, family: &'static Family) -> FamilyId {
        let is_selected = self.selection.has(family.collector);
        let created_until = self.times.filter(|_| family.has_created).map(|times| times.now);
        let expected = self.expected.0.iter().find(|(name, _)| std::ptr::eq(*name, family.name)).map_or(0, |(_, bytes)| *bytes);
        let (format, text) = (self.format, String::new());
        self.families.push(FamilyText { family, is_selected, format, created_until, expected, text });
        FamilyId(self.families.len() - 1)
    }

    /// One series for each value of a label.
    pub fn add_each<V: AsRef<str>>(&mut self, family: &'static Family, label: &str, values: impl IntoIterator<Item = (V, f64)>) {
        let id = self.family(family);
        for (name, value) in values {
            self.add(id, &[(label, name.as_ref())], value);
        }
    }

    /// The only series of a family.
    pub fn add_one(&mut self, family: &'static Family, value: f64) {
        let id = self.family(family);
        self.add(id, "", value);
    }

    pub fn add<'a>(&mut self, id: FamilyId, labels: impl Into<Labels<'a>>, value: f64) {
        self.add_since(id, labels, value, self.started());
    }

    fn started(&self) -> Option<WallTime> {
        self.times.map(|times| times.started)
    }

    /// A count that was 0 at `created`, not when the agent started.
    pub fn add_since<'a>(&mut self, id: FamilyId, labels: impl Into<Labels<'a>>, value: f64, created: Option<WallTime>) {
        debug_assert!(!self.families[id.0].family.starts_at_zero, "{} starts at zero", self.families[id.0].family.name);
        self.families[id.0].add(labels.into(), value, created);
    }

    /// Adds no series if the value is unknown: missing is not zero.
    pub fn add_known<'a>(&mut self, id: FamilyId, labels: impl Into<Labels<'a>>, value: Option<f64>) {
        if let Some(value) = value {
            self.add(id, labels, value);
        }
    }

    /// 0 in the first exposition of the series to a scraper. `part` distinguishes the series of the family and the owner.
    pub fn add_from_zero<'a>(
        &mut self,
        id: FamilyId,
        (series, part): (&mut OwnedSeries<'_>, &str),
        labels: impl Into<Labels<'a>>,
        value: f64,
    ) {
        let is_start = self.families[id.0].is_start(series, part);
        self.families[id.0].add(labels.into(), if is_start { 0.0 } else { value }, series.created);
    }

    pub fn add_histogram<'a>(&mut self, id: FamilyId, labels: impl Into<Labels<'a>>, value: HistogramValue<'_>) {
        self.add_histogram_since(id, labels, value, self.started());
    }

    /// A histogram that was empty at `created`, not when the agent started.
    pub fn add_histogram_since<'a>(
        &mut self,
        id: FamilyId,
        labels: impl Into<Labels<'a>>,
        value: HistogramValue<'_>,
        created: Option<WallTime>,
    ) {
        debug_assert!(!self.families[id.0].family.starts_at_zero, "{} starts at zero", self.families[id.0].family.name);
        self.families[id.0].add_histogram(labels.into(), value, created);
    }

    /// Empty in the first exposition of the series to a scraper.
    pub fn add_histogram_from_zero<'a>(
        &mut self,
        id: FamilyId,
        series: &mut OwnedSeries<'_>,
        labels: impl Into<Labels<'a>>,
        value: HistogramValue<'_>,
    ) {
        if self.families[id.0].is_start(series, "") {
            let zeros = vec![0; value.cumulative.len()];
            let empty = HistogramValue { cumulative: &zeros, sum: 0.0, count: 0, ..value };
            self.families[id.0].add_histogram(labels.into(), empty, series.created);
        } else {
            self.families[id.0].add_histogram(labels.into(), value, series.created);
        }
    }

    pub fn format(&self) -> TextFormat {
        self.format
    }

    /// The parts of the page in their order: a page of a large node is a megabyte, and is not copied into one text.
    pub fn into_parts(self) -> impl Iterator<Item = String> {
        let end = (self.format == TextFormat::OpenMetrics).then(|| "# EOF\n".to_owned());
        self.families.into_iter().map(|family| family.text).filter(|text| !text.is_empty()).chain(end)
    }

    #[cfg(test)]
    pub fn text(self) -> String {
        self.into_parts().collect()
    }
}

impl FamilyText {
    /// What no scrape has exposed is not born.
    fn is_start(&self, series: &mut OwnedSeries<'_>, part: &str) -> bool {
        debug_assert!(self.family.starts_at_zero, "{} does not start at zero", self.family.name);
        self.is_selected && series.is_start(self.family, part)
    }

    /// The head of a family stands before its first series.
    fn begin(&mut self) {
        if !self.text.is_empty() {
            return;
        }
        let (name, kind, help) = (self.family.name_in(self.format), self.family.kind.name(), self.family.full_help());
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        // A few more series than in the earlier page do not make it grow.
        self.text.reserve(self.expected + self.expected / 16);
        // Writing to a String cannot fail.
        let _ok = match self.format {
            TextFormat::Prometheus => write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n"),
            TextFormat::OpenMetrics => {
                let unit = self.family.unit_in_name().map_or(String::new(), |unit| format!("# UNIT {name} {unit}\n"));
                write!(self.text, "# HELP {name} {}\n# TYPE {name} {kind}\n{unit}", help.replace('"', "\\\""))
            }
        };
    }

    fn check(&self, labels: Labels<'_>) {
        let of_blocks = labels
            .blocks
            .iter()
            .flat_map(|block| block.split("\",").filter_map(|label| label.split_once("=\"")).map(|(name, _)| name));
        let undeclared =
            of_blocks.chain(labels.more.iter().map(|(name, _)| *name)).find(|name| !self.family.labels.contains(name));
        debug_assert_eq!(undeclared, None, "{} does not declare this label", self.family.name);
    }

    fn write_series(&mut self, name: &str, suffix: &str, labels: Labels<'_>, le: Option<f64>) {
        let text = &mut self.text;
        text.push_str(name);
        text.push_str(suffix);
        let [first, second] = labels.blocks;
        if !first.is_empty() || !second.is_empty() || !labels.more.is_empty() || le.is_some() {
            text.push('{');
            text.push_str(first);
            if !first.is_empty() && !second.is_empty() {
                text.push(',');
            }
            text.push_str(second);
            write_labels(text, labels.more);
            if let Some(le) = le {
                let bound = match self.format {
                    _ if le == f64::INFINITY => "+Inf".to_owned(),
                    TextFormat::Prometheus => le.to_string(),
                    // A bound is a float in every case: 1.0.
                    TextFormat::OpenMetrics => format!("{le:?}"),
                };
                write_labels(text, &[("le", &bound)]);
            }
            text.push('}');
        }
        text.push(' ');
    }

    /// Directly after the values of the same labels, as OpenMetrics groups them. A time that the clock of the machine has not reached
    /// again is left out: it cannot change, and a parser rejects it.
    fn write_created(&mut self, labels: Labels<'_>, created: Option<WallTime>) {
        if let (Some(until), Some(created)) = (self.created_until, created)
            && created <= until
        {
            self.write_series(self.family.name_in(TextFormat::OpenMetrics), "_created", labels, None);
            // Prometheus has milliseconds. Rounded down, it is never after the first value.
            write_value(&mut self.text, (created.0 / 1_000_000) as f64 / 1e3);
        }
    }

    fn add(&mut self, labels: Labels<'_>, value: f64, created: Option<WallTime>) {
        if !self.is_selected {
            return;
        }
        debug_assert_ne!(self.family.kind, Kind::Histogram, "{}", self.family.name);
        if cfg!(debug_assertions) {
            self.check(labels);
        }
        self.begin();
        self.write_series(self.family.name, "", labels, None);
        write_value(&mut self.text, value);
        self.write_created(labels, created);
    }

    fn add_histogram(&mut self, labels: Labels<'_>, value: HistogramValue<'_>, created: Option<WallTime>) {
        if !self.is_selected {
            return;
        }
        debug_assert_eq!(self.family.kind, Kind::Histogram, "{}", self.family.name);
        if cfg!(debug_assertions) {
            self.check(labels);
        }
        self.begin();
        let buckets = value.bounds.iter().zip(value.cumulative).map(|(bound, count)| (*bound, *count));
        for (bound, count) in buckets.chain([(f64::INFINITY, value.count)]) {
            self.write_series(self.family.name, "_bucket", labels, Some(bound));
            write_value(&mut self.text, count as f64);
        }
        self.write_series(self.family.name, "_sum", labels, None);
        write_value(&mut self.text, value.sum);
        self.write_series(self.family.name, "_count", labels, None);
        write_value(&mut self.text, value.count as f64);
        self.write_created(labels, created);
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalogue::{agent, containers};
    use super::super::scrapers::tests::scrape;
    use super::super::series_starts::{SeriesOwner, SeriesStarts};
    use super::*;

    #[test]
    fn a_family_without_series_is_left_out() {
        let mut page = Page::new(Selection::ALL, TextFormat::Prometheus);
        page.family(&agent::RESYNCS);
        let id = page.family(&agent::CONTAINERS);
        page.add(id, &[("state", "settled"), ("runtime", "docker")], 2.0);
        let text = page.text();
        assert!(text.starts_with("# HELP gpu_sampler_containers Number of "), "{text}");
        assert!(
            text.ends_with(
                "# TYPE gpu_sampler_containers gauge\ngpu_sampler_containers{state=\"settled\",runtime=\"docker\"} 2\n"
            )
        );
    }

    #[test]
    fn blocks_and_further_labels_are_joined_and_escaped() {
        let block = label_block(&[("uuid", "GPU-\"1\"\\"), ("pod", "a\nb")]);
        assert_eq!(block, r#"uuid="GPU-\"1\"\\",pod="a\nb""#);
        let mut page = Page::new(Selection::ALL, TextFormat::Prometheus);
        let id = page.family(&containers::UTILIZATION);
        page.add(id, &*block, 0.25);
        page.add(id, Labels { blocks: [&block, ""], more: &[("container", "c")] }, f64::INFINITY);
        let text = page.text();
        let lines: Vec<&str> = text.lines().skip(2).collect();
        let name = containers::UTILIZATION.name;
        assert_eq!(lines, [format!("{name}{{{block}}} 0.25"), format!("{name}{{{block},container=\"c\"}} +Inf")]);
    }

    /// In release builds the label is exported; a scrape does not fail because of it.
    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "gpu_sampler_resyncs_total does not declare this label")]
    fn a_label_that_the_catalogue_does_not_declare_is_rejected() {
        let mut page = Page::new(Selection::ALL, TextFormat::Prometheus);
        let id = page.family(&agent::RESYNCS);
        page.add(id, &[("uuid", "GPU-1")], 1.0);
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "container_gpu_seconds_total starts at zero")]
    fn a_series_that_starts_at_zero_is_not_added_without_its_identity() {
        let mut page = Page::new(Selection::ALL, TextFormat::Prometheus);
        let id = page.family(&containers::SECONDS);
        page.add(id, "", 1.0);
    }

    #[test]
    fn openmetrics_has_units_float_bounds_and_an_end() {
        let mut page = Page::new(Selection::ALL, TextFormat::OpenMetrics);
        let resolved = page.family(&agent::RESOLVE_SECONDS);
        page.add_histogram(resolved, "", HistogramValue { bounds: &[1.0], cumulative: &[1], sum: 0.5, count: 1 });
        page.add_one(&agent::RESYNCS, 3.0);
        let text = page.text();
        let shown: Vec<&str> = text.lines().filter(|line| !line.starts_with("# HELP")).collect();
        let expect = [
            "# TYPE gpu_sampler_resolve_seconds histogram",
            "# UNIT gpu_sampler_resolve_seconds seconds",
            "gpu_sampler_resolve_seconds_bucket{le=\"1.0\"} 1",
            "gpu_sampler_resolve_seconds_bucket{le=\"+Inf\"} 1",
            "gpu_sampler_resolve_seconds_sum 0.5",
            "gpu_sampler_resolve_seconds_count 1",
            "# TYPE gpu_sampler_resyncs counter",
            "gpu_sampler_resyncs_total 3",
            "# EOF",
        ];
        assert_eq!(shown, expect);
    }

    #[test]
    fn created_times_follow_the_values_of_their_labels() {
        let selection = Selection::of_query("collect[]=agent&collect[]=created", Selection::default()).unwrap();
        let mut page = Page::new(selection, TextFormat::OpenMetrics);
        let at = |ms: u64| WallTime(ms * 1_000_000 + 999_999);
        page.set_times(PageTimes { started: at(1_700_000_000_250), now: at(1_700_000_001_000) });
        let resolved = page.family(&agent::RESOLVE_SECONDS);
        page.add_histogram(resolved, "", HistogramValue { bounds: &[], cumulative: &[], sum: 0.5, count: 1 });
        let calls = page.family(&agent::RUNTIME_CALLS);
        for (outcome, created) in [("ok", 1_700_000_000_250), ("error", 1_700_000_000_500), ("late", 1_700_000_002_000)] {
            page.add_since(calls, &[("source", "cri"), ("outcome", outcome)], 2.0, Some(at(created)));
        }
        page.add_one(&agent::KERNEL_MODE, 1.0);
        let text = page.text();
        let shown: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        let expect = [
            "gpu_sampler_resolve_seconds_bucket{le=\"+Inf\"} 1",
            "gpu_sampler_resolve_seconds_sum 0.5",
            "gpu_sampler_resolve_seconds_count 1",
            "gpu_sampler_resolve_seconds_created 1700000000.25",
            "gpu_sampler_runtime_calls_total{source=\"cri\",outcome=\"ok\"} 2",
            "gpu_sampler_runtime_calls_created{source=\"cri\",outcome=\"ok\"} 1700000000.25",
            "gpu_sampler_runtime_calls_total{source=\"cri\",outcome=\"error\"} 2",
            "gpu_sampler_runtime_calls_created{source=\"cri\",outcome=\"error\"} 1700000000.5",
            "gpu_sampler_runtime_calls_total{source=\"cri\",outcome=\"late\"} 2",
            "gpu_sampler_kernel_mode 1",
        ];
        assert_eq!(shown, expect);
    }

    #[test]
    fn the_format_is_the_one_that_the_scraper_prefers() {
        let of_prometheus =
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        assert_eq!(TextFormat::negotiated(of_prometheus), TextFormat::OpenMetrics);
        for accept in ["", "*/*", "text/plain", "text/plain, application/openmetrics-text;q=0.9", "text/html"] {
            assert_eq!(TextFormat::negotiated(accept), TextFormat::Prometheus, "{accept}");
        }
    }

    #[test]
    fn a_family_of_a_collector_that_is_not_selected_is_left_out() {
        let mut page = Page::new(Selection::of_query("collect[]=gpus", Selection::default()).unwrap(), TextFormat::Prometheus);
        page.add_one(&agent::RESYNCS, 1.0);
        assert_eq!(page.text(), "");
    }

    #[test]
    fn a_histogram_is_empty_where_it_starts() {
        let mut starts = SeriesStarts::default();
        scrape(&mut starts);
        scrape(&mut starts);
        let value = HistogramValue { bounds: &[0.1, 1.0], cumulative: &[1, 2], sum: 1.5, count: 3 };
        let mut page = Page::new(Selection::ALL, TextFormat::Prometheus);
        let id = page.family(&containers::WINDOW_SHARE);
        let mut series = starts.of(SeriesOwner::Gpu(sampler_core::units::GpuUuid("GPU-1".into())));
        page.add_histogram_from_zero(id, &mut series, "pod=\"p\"", value);
        let text = page.text();
        let expect = ["_bucket{pod=\"p\",le=\"0.1\"} 0", "_bucket{pod=\"p\",le=\"1\"} 0", "_bucket{pod=\"p\",le=\"+Inf\"} 0"];
        for (line, expect) in text.lines().skip(2).zip(expect.into_iter().chain(["_sum{pod=\"p\"} 0", "_count{pod=\"p\"} 0"])) {
            assert_eq!(line, format!("{}{expect}", containers::WINDOW_SHARE.name));
        }
    }
}
