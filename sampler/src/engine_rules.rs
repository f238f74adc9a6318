//! Which metrics of which serving engines are read, and what they mean: a table for the known ones, and rules as text for others.
//!
//! ```text
//!  NAME=PATH,METRIC=MEANING,..      lmdeploy=/metrics,lmdeploy:waiting_reqs=waiting,lmdeploy:ttft_seconds=ttft
//!  MEANING: waiting | running | ttft | tpot | queue, the last three with _sum or _count, and _ms or _us
//! ```
//! Several metrics may have one meaning, because engines rename them: the first one that a page has is read. A rule of the
//! agent's configuration with the name of a known engine replaces what is read of it, not how it is found; one of a session must not.
//!
//! docs/serving-engines.md says where the names were checked.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

/// Limits of a rule that is given as text.
const MAX_NAME_BYTES: usize = 64;
const MAX_PATH_BYTES: usize = 128;
const MAX_METRIC_BYTES: usize = 256;
const MAX_METRICS: usize = 32;
/// Rules of the configuration, or of one request.
pub const MAX_RULES: usize = 16;
/// A path ends with one of these segments: a request for a session must not reach other functions of a server in a container, such as
/// `/metrics/reset`.
const PATH_SEGMENTS: [&str; 2] = ["metrics", "prometheus"];

/// The latency of an engine that a metric belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineLatency {
    TimeToFirstToken,
    TimePerOutputToken,
    Queue,
}

/// Which part of a sum and a count a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LatencyPart {
    /// A histogram or summary, which has both: `METRIC_sum` and `METRIC_count`.
    Both,
    Sum,
    Count,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricMeaning {
    Waiting,
    Running,
    /// `per_second`: how many units of the metric are a second.
    Latency {
        latency: EngineLatency,
        part: LatencyPart,
        per_second: u32,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricRule {
    pub metric: String,
    pub meaning: MetricMeaning,
}

/// The rules for one serving engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineRules {
    pub name: String,
    pub path: String,
    pub metrics: Vec<MetricRule>,
}

/// A rule given as text is invalid.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("invalid engine rule {rule:?}: {remedy}")]
pub struct RuleError {
    rule: String,
    remedy: &'static str,
}

const SYNTAX: &str =
    "expected NAME=PATH,METRIC=MEANING,.. such as my-engine=/metrics,my_engine_waiting=waiting,my_engine_ttft_seconds=ttft";
const MEANINGS: &str =
    "a meaning is waiting, running, ttft, tpot or queue, the last three with _sum or _count, and _ms or _us for their unit";

/// Metric and meaning, as in the text form.
type KnownMetric = (&'static str, &'static str);

const VLLM: [KnownMetric; 6] = [
    ("vllm:num_requests_waiting", "waiting"),
    ("vllm:num_requests_running", "running"),
    ("vllm:time_to_first_token_seconds", "ttft"),
    // It replaced the next one; some versions have both, with the same values.
    ("vllm:inter_token_latency_seconds", "tpot"),
    ("vllm:time_per_output_token_seconds", "tpot"),
    ("vllm:request_queue_time_seconds", "queue"),
];
const SGLANG: [KnownMetric; 6] = [
    ("sglang:num_queue_reqs", "waiting"),
    ("sglang:num_running_reqs", "running"),
    ("sglang:time_to_first_token_seconds", "ttft"),
    ("sglang:inter_token_latency_seconds", "tpot"),
    ("sglang:time_per_output_token_seconds", "tpot"),
    ("sglang:queue_time_seconds", "queue"),
];
/// TGI has no time to first token. The mean time per token is one value for each request.
const TGI: [KnownMetric; 4] = [
    ("tgi_queue_size", "waiting"),
    ("tgi_batch_current_size", "running"),
    ("tgi_request_mean_time_per_token_duration", "tpot"),
    ("tgi_request_queue_duration", "queue"),
];
/// The histogram is of first responses, which a model that does not stream gives at its end; it is off by default in Triton.
const TRITON: [KnownMetric; 4] = [
    ("nv_inference_pending_request_count", "waiting"),
    ("nv_inference_first_response_histogram_ms", "ttft_ms"),
    ("nv_inference_queue_duration_us", "queue_sum_us"),
    ("nv_inference_request_success", "queue_count"),
];

/// The rules of the known engines.
pub fn known() -> Vec<Arc<EngineRules>> {
    let tables: [(&str, &[KnownMetric]); 4] = [("vllm", &VLLM), ("sglang", &SGLANG), ("triton", &TRITON), ("tgi", &TGI)];
    let rules = |(name, table): (&str, &[KnownMetric])| {
        let metric = |(metric, meaning): &KnownMetric| MetricRule {
            metric: (*metric).to_owned(),
            meaning: meaning.parse().expect("the table has valid meanings"),
        };
        Arc::new(EngineRules { name: name.to_owned(), path: "/metrics".to_owned(), metrics: table.iter().map(metric).collect() })
    };
    tables.into_iter().map(rules).collect()
}

/// The known rules with these in addition; one with the name of a known one replaces it.
pub fn merged<'a>(more: impl Iterator<Item = &'a Arc<EngineRules>>) -> Vec<Arc<EngineRules>> {
    let mut all = known();
    for rules in more {
        match all.iter_mut().find(|known| known.name == rules.name) {
            Some(known) => *known = Arc::clone(rules),
            None => all.push(Arc::clone(rules)),
        }
    }
    all
}

/// Rules of one session that contradict others.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RuleConflict {
    #[error("the engine rule {0} is given twice with different contents; give one of them")]
    Twice(String),
    #[error("the engine rule {0} differs from the one that the agent has; choose another name, or set engine_rules of the agent")]
    OfAgent(String),
    #[error(
        "the engine rule {0} differs from that of another session that is active; choose another name, or stop that session first"
    )]
    OfSession(String),
}

/// The first of these rules of which `others` has another version.
fn changed<'a>(rules: &'a [Arc<EngineRules>], others: &[Arc<EngineRules>]) -> Option<&'a EngineRules> {
    let is_other = |rule: &EngineRules| others.iter().any(|other| other.name == rule.name && **other != *rule);
    rules.iter().map(|rule| &**rule).find(|rule| is_other(rule))
}

/// Whether each name has one rule.
pub fn check_names(rules: &[Arc<EngineRules>]) -> Result<(), RuleConflict> {
    changed(rules, rules).map_or(Ok(()), |rule| Err(RuleConflict::Twice(rule.name.clone())))
}

/// Whether a session may have these rules: all sessions share the readings, so a rule must not change what the agent or another session
/// reads. `configured`: those of the agent, in addition to the known ones.
pub fn check_session(rules: &[Arc<EngineRules>], configured: &[Arc<EngineRules>]) -> Result<(), RuleConflict> {
    if let Some(rule) = changed(rules, &merged(configured.iter())) {
        return Err(RuleConflict::OfAgent(rule.name.clone()));
    }
    check_names(rules)
}

/// Whether a session may have these rules while another session has `others`.
pub fn check_sessions(rules: &[Arc<EngineRules>], others: &[Arc<EngineRules>]) -> Result<(), RuleConflict> {
    changed(rules, others).map_or(Ok(()), |rule| Err(RuleConflict::OfSession(rule.name.clone())))
}

/// Not a meaning.
#[derive(Debug, PartialEq, Eq)]
pub struct UnknownMeaning;

impl FromStr for MetricMeaning {
    type Err = UnknownMeaning;

    fn from_str(text: &str) -> Result<Self, UnknownMeaning> {
        match text {
            "waiting" => return Ok(Self::Waiting),
            "running" => return Ok(Self::Running),
            _ => {}
        }
        let (text, per_second) = [("_ms", 1_000), ("_us", 1_000_000)]
            .into_iter()
            .find_map(|(end, per_second)| Some((text.strip_suffix(end)?, per_second)))
            .unwrap_or((text, 1));
        let (text, part) = [("_sum", LatencyPart::Sum), ("_count", LatencyPart::Count)]
            .into_iter()
            .find_map(|(end, part)| Some((text.strip_suffix(end)?, part)))
            .unwrap_or((text, LatencyPart::Both));
        let latency = match text {
            "ttft" => EngineLatency::TimeToFirstToken,
            "tpot" => EngineLatency::TimePerOutputToken,
            "queue" => EngineLatency::Queue,
            _ => return Err(UnknownMeaning),
        };
        Ok(Self::Latency { latency, part, per_second })
    }
}

impl fmt::Display for MetricMeaning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Latency { latency, part, per_second } = self else {
            return f.write_str(if *self == Self::Waiting { "waiting" } else { "running" });
        };
        f.write_str(match latency {
            EngineLatency::TimeToFirstToken => "ttft",
            EngineLatency::TimePerOutputToken => "tpot",
            EngineLatency::Queue => "queue",
        })?;
        f.write_str(match part {
            LatencyPart::Both => "",
            LatencyPart::Sum => "_sum",
            LatencyPart::Count => "_count",
        })?;
        f.write_str(match per_second {
            1_000 => "_ms",
            1_000_000 => "_us",
            _ => "",
        })
    }
}

impl fmt::Display for EngineRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.path)?;
        self.metrics.iter().try_for_each(|rule| write!(f, ",{}={}", rule.metric, rule.meaning))
    }
}

fn is_path(path: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"/_-.".contains(&b);
    path.starts_with('/')
        && path.len() <= MAX_PATH_BYTES
        && path.bytes().all(is_plain)
        && !path.split('/').any(|segment| segment == "..")
        && path.rsplit('/').next().is_some_and(|last| PATH_SEGMENTS.contains(&last))
}

fn is_name(name: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"_-.".contains(&b);
    (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(is_plain)
}

fn is_metric(metric: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"_:".contains(&b);
    (1..=MAX_METRIC_BYTES).contains(&metric.len()) && metric.bytes().all(is_plain)
}

impl FromStr for EngineRules {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let invalid = |remedy| RuleError { rule: text.chars().take(MAX_METRIC_BYTES).collect(), remedy };
        let mut parts = text.split(',').map(str::trim);
        let (name, path) = parts.next().and_then(|first| first.split_once('=')).ok_or_else(|| invalid(SYNTAX))?;
        if !is_name(name) {
            return Err(invalid("a name has up to 64 letters, digits and _-."));
        }
        if !is_path(path) {
            return Err(invalid(
                "a path such as /metrics ends with the segment metrics or prometheus, and has only letters, digits and /_-.",
            ));
        }
        let metric = |part: &str| {
            let (metric, meaning) =
                part.split_once('=').filter(|(metric, _)| is_metric(metric)).ok_or_else(|| invalid(SYNTAX))?;
            let meaning = meaning.parse().map_err(|UnknownMeaning| invalid(MEANINGS))?;
            Ok(MetricRule { metric: metric.to_owned(), meaning })
        };
        let metrics: Vec<MetricRule> = parts.take(MAX_METRICS + 1).map(metric).collect::<Result<_, _>>()?;
        match metrics.len() {
            0 => Err(invalid(SYNTAX)),
            n if n > MAX_METRICS => Err(invalid("a rule has at most 32 metrics")),
            _ => Ok(Self { name: name.to_owned(), path: path.to_owned(), metrics }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: &str) {
        let result = text.parse::<EngineRules>().map_or_else(|error| error.to_string(), |rules| rules.to_string());
        assert!(result.contains(expect), "{text}: {result}");
    }

    #[test]
    fn rules_are_validated_and_printed_as_they_are_given() {
        let whole = "my-engine=/metrics,a:waiting=waiting,b=running,c=ttft_ms,d=tpot,e=queue_sum_us,f=queue_count";
        check(whole, whole);
        check("a=/v1/metrics, b=ttft", "a=/v1/metrics,b=ttft");
        check("a=/actuator/prometheus,b=ttft", "a=/actuator/prometheus,b=ttft");
        check("a=/metrics", "expected NAME=PATH");
        check("a", "expected NAME=PATH");
        for path in
            ["/shutdown", "/metrics?x=1", "/metrics/../shutdown", "/metrics/reset", "/metrics/", "/x/../metrics", "metrics"]
        {
            check(&format!("a={path},b=waiting"), "ends with the segment metrics or prometheus");
        }
        check("a b=/metrics,b=waiting", "a name has");
        check("a=/metrics,b=latency", "a meaning is waiting");
        check("a=/metrics,b{x=waiting", "expected NAME=PATH");
        check(&format!("a=/metrics{}", ",b=waiting".repeat(33)), "at most 32 metrics");
    }

    #[test]
    fn a_rule_replaces_the_known_one_of_its_name() {
        assert_eq!(known().iter().map(|rules| &*rules.name).collect::<Vec<_>>(), ["vllm", "sglang", "triton", "tgi"]);
        let rules = ["vllm=/metrics,x=waiting", "other=/metrics,y=running"].map(|text| Arc::new(text.parse().unwrap()));
        let all = merged(rules.iter());
        assert_eq!((all.len(), &all[0], &all[4]), (5, &rules[0], &rules[1]));
    }

    #[test]
    fn a_session_must_not_change_the_rules_of_the_agent_or_of_another_session() {
        let rules = |texts: &[&str]| texts.iter().map(|text| Arc::new(text.parse().unwrap())).collect::<Vec<Arc<EngineRules>>>();
        let configured = rules(&["vllm=/metrics,own=waiting", "lmdeploy=/metrics,a=waiting"]);
        let check = |texts: &[&str]| check_session(&rules(texts), &configured);
        assert_eq!(check(&["vllm=/metrics,own=waiting", "mine=/metrics,a=waiting", "mine=/metrics,a=waiting"]), Ok(()));
        for text in ["vllm=/metrics,x=waiting", "sglang=/metrics,x=waiting", "lmdeploy=/metrics,b=waiting"] {
            let name = text.split('=').next().unwrap();
            assert_eq!(check(&[text]), Err(RuleConflict::OfAgent(name.into())), "{text}");
        }
        assert_eq!(check(&["a=/metrics,x=waiting", "a=/metrics,y=waiting"]), Err(RuleConflict::Twice("a".into())));
        let (mine, other) = (rules(&["a=/metrics,x=waiting"]), rules(&["a=/metrics,y=waiting"]));
        assert_eq!(
            (check_sessions(&mine, &mine), check_sessions(&mine, &other)),
            (Ok(()), Err(RuleConflict::OfSession("a".into())))
        );
    }

    /// A rule that is accepted is printed in a form that is accepted as the same rule; an error is short.
    #[test]
    fn fuzz_engine_rule() {
        devkit::fuzz(file!(), "engine_rule", move |bytes| match String::from_utf8_lossy(bytes).parse::<EngineRules>() {
            Ok(rules) => {
                assert!(rules.path.starts_with('/') && rules.metrics.len() <= MAX_METRICS && rules.name.len() <= MAX_NAME_BYTES);
                assert_eq!(rules.to_string().parse(), Ok(rules));
            }
            // It quotes the rule, of which a character takes up to ten.
            Err(error) => assert!(error.to_string().len() < 4000, "{error}"),
        });
    }
}
