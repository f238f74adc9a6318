//! The values of a serving engine from its metrics page, in the text format of Prometheus.
//!
//! A tenant controls the page. It is parsed while it arrives, in memory for one line; only lines of the wanted metrics are parsed. A line
//! that cannot be parsed, and a value that is not a finite number of at least 0, counts as absent. Series of one metric (models, replicas,
//! ranks) are summed. Buckets of histograms, exemplars and timestamps are not read.

use sampler_core::observation::LatencySum;

use crate::engine_rules::{EngineLatency, EngineRules, LatencyPart, MetricMeaning};

/// A longer line has labels that no engine writes.
const MAX_LINE_BYTES: usize = 64 << 10;

/// `None`: the page does not have it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineValues {
    pub waiting: Option<f64>,
    pub running: Option<f64>,
    pub time_to_first_token: Option<LatencySum>,
    pub time_per_output_token: Option<LatencySum>,
    pub queue_time: Option<LatencySum>,
}

impl EngineValues {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The sums of the series of one rule's metric: its own, `_sum` and `_count`.
#[derive(Clone, Copy, Debug, Default)]
struct SeriesSums {
    plain: Option<f64>,
    sum: Option<f64>,
    count: Option<f64>,
}

fn add(total: &mut Option<f64>, value: f64) {
    *total = Some(total.unwrap_or(0.0) + value);
}

/// A sum of finite values may not be finite.
fn finite(total: Option<f64>) -> Option<f64> {
    total.filter(|total| total.is_finite())
}

/// Parses a page in the parts in which it arrives.
pub struct PageParser<'a> {
    rules: &'a EngineRules,
    sums: Vec<SeriesSums>,
    /// The beginning of a line of which the end has not arrived.
    line: Vec<u8>,
    /// The line is too long: the rest of it is not kept.
    is_skipped: bool,
}

impl<'a> PageParser<'a> {
    pub fn new(rules: &'a EngineRules) -> Self {
        Self { rules, sums: vec![SeriesSums::default(); rules.metrics.len()], line: Vec::new(), is_skipped: false }
    }

    pub fn push(&mut self, part: &[u8]) {
        let mut lines = part.split(|b| *b == b'\n');
        // What follows the last line feed is the beginning of a line.
        let rest = lines.next_back().unwrap_or_default();
        for line in lines {
            self.end_line(line);
        }
        self.begin_line(rest);
    }

    pub fn end(mut self) -> EngineValues {
        self.end_line(&[]);
        values(self.rules, &self.sums)
    }

    fn begin_line(&mut self, part: &[u8]) {
        self.is_skipped |= self.line.len() + part.len() > MAX_LINE_BYTES;
        if self.is_skipped { self.line.clear() } else { self.line.extend_from_slice(part) }
    }

    fn end_line(&mut self, part: &[u8]) {
        // Most lines are in one part, and are not copied.
        if self.line.is_empty() && !self.is_skipped {
            return self.parse_line(part);
        }
        self.begin_line(part);
        let mut line = std::mem::take(&mut self.line);
        if !self.is_skipped {
            self.parse_line(&line);
        }
        line.clear();
        (self.line, self.is_skipped) = (line, false);
    }

    fn parse_line(&mut self, line: &[u8]) {
        if line.len() > MAX_LINE_BYTES {
            return;
        }
        let name_bytes = line.iter().position(|b| matches!(b, b'{' | b' ' | b'\t')).unwrap_or(line.len());
        let (name, rest) = line.split_at(name_bytes);
        for (rule, sums) in self.rules.metrics.iter().zip(&mut self.sums) {
            let Some(end) = name.strip_prefix(rule.metric.as_bytes()) else { continue };
            let total = match end {
                b"" => &mut sums.plain,
                b"_sum" => &mut sums.sum,
                b"_count" => &mut sums.count,
                // Counters are exposed with this suffix where the rule may omit it.
                b"_total" => &mut sums.plain,
                _ => continue,
            };
            if let Some(value) = value(rest) {
                add(total, value);
            }
        }
    }
}

/// The value of a line, after the name of its metric.
fn value(rest: &[u8]) -> Option<f64> {
    let text = std::str::from_utf8(&rest[labels_bytes(rest)?..]).ok()?;
    let value: f64 = text.split_ascii_whitespace().next()?.parse().ok()?;
    (value.is_finite() && value >= 0.0).then_some(value)
}

/// The length of the labels, with their braces; `None` if they do not end. Quoted values may contain braces.
fn labels_bytes(rest: &[u8]) -> Option<usize> {
    if rest.first() != Some(&b'{') {
        return Some(0);
    }
    let (mut is_quoted, mut is_escaped) = (false, false);
    for (n, byte) in rest.iter().enumerate() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if is_quoted => is_escaped = true,
            b'"' => is_quoted = !is_quoted,
            b'}' if !is_quoted => return Some(n + 1),
            _ => {}
        }
    }
    None
}

fn values(rules: &EngineRules, sums: &[SeriesSums]) -> EngineValues {
    let all = || rules.metrics.iter().zip(sums);
    let gauge = |wanted: MetricMeaning| all().filter(|(rule, _)| rule.meaning == wanted).find_map(|(_, sums)| finite(sums.plain));
    EngineValues {
        waiting: gauge(MetricMeaning::Waiting),
        running: gauge(MetricMeaning::Running),
        time_to_first_token: latency(all(), EngineLatency::TimeToFirstToken),
        time_per_output_token: latency(all(), EngineLatency::TimePerOutputToken),
        queue_time: latency(all(), EngineLatency::Queue),
    }
}

/// The first metric with a sum and a count, or else the first sum and the first count.
fn latency<'a>(
    all: impl Iterator<Item = (&'a crate::engine_rules::MetricRule, &'a SeriesSums)>,
    wanted: EngineLatency,
) -> Option<LatencySum> {
    let (mut total, mut count) = (None, None);
    for (rule, sums) in all {
        let MetricMeaning::Latency { latency, part, per_second } = rule.meaning else { continue };
        if latency != wanted {
            continue;
        }
        let seconds = |value: f64| value / f64::from(per_second);
        match part {
            LatencyPart::Both => {
                if let (Some(sum), Some(count)) = (finite(sums.sum), finite(sums.count)) {
                    return Some(LatencySum { sum_seconds: seconds(sum), count });
                }
            }
            LatencyPart::Sum => total = total.or(finite(sums.plain).map(seconds)),
            LatencyPart::Count => count = count.or(finite(sums.plain)),
        }
    }
    Some(LatencySum { sum_seconds: total?, count: count? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine_rules::known;

    fn parse_parts<'a>(parts: impl Iterator<Item = &'a [u8]>, rules: &EngineRules) -> EngineValues {
        let mut parser = PageParser::new(rules);
        parts.for_each(|part| parser.push(part));
        parser.end()
    }

    fn parse(page: &[u8], rules: &EngineRules) -> EngineValues {
        parse_parts([page].into_iter(), rules)
    }

    fn parsed(engine: &str, page: &str) -> EngineValues {
        let rules = known();
        parse(page.as_bytes(), rules.iter().find(|rules| rules.name == engine).unwrap())
    }

    fn sum(sum_seconds: f64, count: f64) -> Option<LatencySum> {
        Some(LatencySum { sum_seconds, count })
    }

    #[test]
    fn series_of_all_models_are_summed_and_renamed_metrics_are_read_once() {
        let values = parsed(
            "vllm",
            "# HELP vllm:num_requests_waiting Number of requests waiting.\n\
             # TYPE vllm:num_requests_waiting gauge\n\
             vllm:num_requests_waiting{model_name=\"a}\\\"b\"} 3.0\n\
             vllm:num_requests_waiting{model_name=\"c\"} 4.0 1700000000000\n\
             vllm:num_requests_running 2\n\
             vllm:time_to_first_token_seconds_bucket{le=\"0.1\",model_name=\"a\"} 9.0\n\
             vllm:time_to_first_token_seconds_sum{model_name=\"a\"} 1.5\n\
             vllm:time_to_first_token_seconds_count{model_name=\"a\"} 10.0\n\
             vllm:time_to_first_token_seconds_created{model_name=\"a\"} 1.7e9\n\
             vllm:inter_token_latency_seconds_sum 2\n\
             vllm:inter_token_latency_seconds_count 100\n\
             vllm:time_per_output_token_seconds_sum 2\n\
             vllm:time_per_output_token_seconds_count 100\n",
        );
        assert_eq!((values.waiting, values.running), (Some(7.0), Some(2.0)));
        assert_eq!((values.time_to_first_token, values.time_per_output_token), (sum(1.5, 10.0), sum(2.0, 100.0)));
        assert_eq!(values.queue_time, None);
    }

    #[test]
    fn units_and_separate_sums_and_counts_are_converted() {
        let values = parsed(
            "triton",
            "nv_inference_request_success{model=\"m\",version=\"1\"} 20\n\
             nv_inference_queue_duration_us{model=\"m\",version=\"1\"} 5000000\n\
             nv_inference_first_response_histogram_ms_sum{model=\"m\"} 1200\n\
             nv_inference_first_response_histogram_ms_count{model=\"m\"} 4\n\
             nv_inference_pending_request_count{model=\"m\"} 6\n",
        );
        assert_eq!((values.queue_time, values.time_to_first_token), (sum(5.0, 20.0), sum(1.2, 4.0)));
        assert_eq!(values.waiting, Some(6.0));
        let values = parsed(
            "tgi",
            "tgi_queue_size 0\ntgi_request_mean_time_per_token_duration_sum 0.5\ntgi_request_mean_time_per_token_duration_count 25\n",
        );
        assert_eq!((values.waiting, values.time_per_output_token), (Some(0.0), sum(0.5, 25.0)));
    }

    #[test]
    fn what_is_not_a_value_is_absent() {
        for line in [
            "vllm:num_requests_waiting NaN",
            "vllm:num_requests_waiting +Inf",
            "vllm:num_requests_waiting -1",
            "vllm:num_requests_waiting{a=\"b 3",
            "vllm:num_requests_waiting",
            "vllm:num_requests_waiting_x 3",
            "xvllm:num_requests_waiting 3",
            "<html>vllm:num_requests_waiting 3</html>",
            "vllm:time_to_first_token_seconds_sum 3",
        ] {
            assert!(parsed("vllm", line).is_empty(), "{line}");
        }
        assert!(parsed("vllm", &format!("vllm:num_requests_waiting{{a=\"{}\"}} 3", "x".repeat(MAX_LINE_BYTES))).is_empty());
        assert_eq!(parsed("vllm", &"vllm:num_requests_waiting 1e308\n".repeat(3)).waiting, None, "the sum overflows");
    }

    #[test]
    fn a_page_has_the_same_values_in_any_parts_and_memory_for_one_line() {
        let long = format!("vllm:num_requests_waiting{{a=\"{}\"}} 3\n", "x".repeat(2 * MAX_LINE_BYTES));
        let page = format!(
            "{long}vllm:num_requests_waiting 3\n\nvllm:num_requests_running{{a=\"b\"}} 2\n{long}vllm:num_requests_waiting 4"
        );
        let rules = known();
        let expect = EngineValues { waiting: Some(7.0), running: Some(2.0), ..EngineValues::default() };
        for bytes in [1, 2, 7, 1000, MAX_LINE_BYTES, page.len()] {
            assert_eq!(parse_parts(page.as_bytes().chunks(bytes), &rules[0]), expect, "in parts of {bytes} bytes");
        }
        let mut parser = PageParser::new(&rules[0]);
        page.as_bytes().chunks(1000).for_each(|part| parser.push(part));
        assert!(parser.line.capacity() <= 2 * MAX_LINE_BYTES, "{}", parser.line.capacity());
    }

    /// Whatever the page: values are finite and not negative, comments change nothing, nor do the parts in which it arrives.
    #[test]
    fn fuzz_engine_page() {
        let all = known();
        devkit::fuzz(file!(), "engine_page", move |bytes| {
            for rules in &all {
                let values = parse(bytes, rules);
                let is_valid = |value: f64| value.is_finite() && value >= 0.0;
                assert!(values.waiting.into_iter().chain(values.running).all(is_valid), "{values:?}");
                let latencies = [values.time_to_first_token, values.time_per_output_token, values.queue_time];
                assert!(latencies.iter().flatten().all(|sum| is_valid(sum.sum_seconds) && is_valid(sum.count)), "{values:?}");
                // Comments and blank lines do not matter.
                let commented = [b"# HELP x y\n\n".as_slice(), bytes, b"\n# EOF\n"].concat();
                assert_eq!(parse(&commented, rules), values);
                assert_eq!(parse_parts(bytes.chunks(1 + bytes.len() / 3), rules), values);
            }
        });
    }
}
