//! The settings of the exporter: the environment variables that the OpenTelemetry specification names.

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
const DEFAULT_INTERVAL: Duration = Duration::from_secs(60);
const HTTP_PATH: &str = "/v1/metrics";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Grpc,
    HttpProtobuf,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtlpSettings {
    /// For HTTP with its path.
    pub endpoint: String,
    pub protocol: Protocol,
    pub headers: Vec<(String, String)>,
    pub timeout: Duration,
    pub interval: Duration,
    /// PEM of the CA that signed the receiver's certificate; else those of the system.
    pub ca_file: Option<PathBuf>,
    /// PEM of the client's certificate and its key.
    pub client: Option<(PathBuf, PathBuf)>,
    pub is_compressed: bool,
    /// Attributes of the resource.
    pub resource: Vec<(String, String)>,
}

#[derive(Debug, Error, PartialEq, Eq)]
#[error("{variable} = {value:?} is invalid: {remedy}")]
pub struct InvalidVariable {
    variable: String,
    value: String,
    remedy: String,
}

/// Reads variables; those for metrics take precedence over those for all signals.
struct OtelEnvironment<F>(F);

impl<F: Fn(&str) -> Option<String>> OtelEnvironment<F> {
    /// An empty variable counts as unset.
    fn get(&self, name: &str) -> Option<String> {
        (self.0)(name).filter(|value| !value.trim().is_empty())
    }

    /// The value, and the name of the variable that has it.
    fn signal(&self, name: &str) -> Option<(String, String)> {
        ["OTEL_EXPORTER_OTLP_METRICS_", "OTEL_EXPORTER_OTLP_"].into_iter().find_map(|prefix| {
            let variable = format!("{prefix}{name}");
            self.get(&variable).map(|value| (value, variable))
        })
    }
}

impl OtlpSettings {
    /// `None` unless an endpoint is set: then nothing is exported.
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, InvalidVariable> {
        let environment = OtelEnvironment(get);
        let is_off = environment.get("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"))
            || environment.get("OTEL_METRICS_EXPORTER").is_some_and(|value| value == "none");
        let Some((endpoint, variable)) = environment.signal("ENDPOINT").filter(|_| !is_off) else { return Ok(None) };
        let invalid = |variable: &str, value: &str, remedy: &str| InvalidVariable {
            variable: variable.to_owned(),
            value: value.to_owned(),
            remedy: remedy.to_owned(),
        };
        if !(endpoint.starts_with("http://") || endpoint.starts_with("https://")) {
            return Err(invalid(&variable, &endpoint, "expected an address such as http://collector:4318"));
        }
        let protocol = match environment.signal("PROTOCOL") {
            None => Protocol::HttpProtobuf,
            Some((value, _)) if value == "http/protobuf" => Protocol::HttpProtobuf,
            Some((value, _)) if value == "grpc" => Protocol::Grpc,
            Some((value, variable)) => return Err(invalid(&variable, &value, "choose http/protobuf or grpc")),
        };
        // The variable for metrics alone has the whole address.
        let has_path = protocol == Protocol::Grpc || variable.contains("METRICS");
        let endpoint = if has_path { endpoint } else { format!("{}{HTTP_PATH}", endpoint.trim_end_matches('/')) };
        let milliseconds = |found: Option<(String, String)>, default: Duration| match found {
            None => Ok(default),
            Some((value, variable)) => match value.trim().parse() {
                Ok(ms) if ms > 0 => Ok(Duration::from_millis(ms)),
                _ => Err(invalid(&variable, &value, "expected a number of milliseconds")),
            },
        };
        let interval = "OTEL_METRIC_EXPORT_INTERVAL";
        let interval = environment.get(interval).map(|value| (value, interval.to_owned()));
        let pairs = |found: Option<(String, String)>| match found {
            None => Ok(Vec::new()),
            Some((value, variable)) => pairs(&value)
                .ok_or_else(|| invalid(&variable, &value, "expected key=value,key=value with percent-encoded values")),
        };
        let resource = "OTEL_RESOURCE_ATTRIBUTES";
        let mut attributes = pairs(environment.get(resource).map(|value| (value, resource.to_owned())))?;
        if let Some(name) = environment.get("OTEL_SERVICE_NAME") {
            attributes.retain(|(key, _)| key != "service.name");
            attributes.push(("service.name".to_owned(), name));
        }
        let path = |name: &str| environment.signal(name).map(|(value, _)| PathBuf::from(value));
        let client = path("CLIENT_CERTIFICATE").zip(path("CLIENT_KEY"));
        let is_compressed = match environment.signal("COMPRESSION") {
            None => false,
            Some((value, _)) if value == "none" => false,
            Some((value, _)) if value == "gzip" => true,
            Some((value, variable)) => return Err(invalid(&variable, &value, "choose gzip or none")),
        };
        Ok(Some(Self {
            endpoint,
            protocol,
            headers: pairs(environment.signal("HEADERS"))?,
            timeout: milliseconds(environment.signal("TIMEOUT"), DEFAULT_TIMEOUT)?,
            interval: milliseconds(interval, DEFAULT_INTERVAL)?,
            ca_file: path("CERTIFICATE"),
            client,
            is_compressed,
            resource: attributes,
        }))
    }
}

/// `key=value,key=value`, with percent-encoded values.
fn pairs(text: &str) -> Option<Vec<(String, String)>> {
    let pair = |pair: &str| {
        let (key, value) = pair.split_once('=')?;
        let key = key.trim();
        (!key.is_empty()).then(|| (key.to_owned(), decoded(value.trim())))
    };
    text.split(',').filter(|part| !part.trim().is_empty()).map(pair).collect()
}

/// A `+` stays: the specification has percent-encoding, not that of forms.
fn decoded(value: &str) -> String {
    let form = format!("v={}", value.replace('+', "%2B"));
    form_urlencoded::parse(form.as_bytes()).next().map(|(_, value)| value.into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<OtlpSettings>, String> {
        let get = |name: &str| variables.iter().find(|(variable, _)| *variable == name).map(|(_, value)| (*value).to_owned());
        OtlpSettings::read(get).map_err(|error| error.to_string())
    }

    #[test]
    fn without_an_endpoint_nothing_is_exported() {
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318");
        assert_eq!(read(&[]), Ok(None));
        assert_eq!(read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "")]), Ok(None));
        assert_eq!(read(&[endpoint, ("OTEL_SDK_DISABLED", "true")]), Ok(None));
        assert_eq!(read(&[endpoint, ("OTEL_METRICS_EXPORTER", "none")]), Ok(None));
    }

    #[test]
    fn variables_for_metrics_take_precedence() {
        let of = |variables: &[(&str, &str)]| read(variables).unwrap().unwrap();
        let all = of(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318/")]);
        assert_eq!((all.endpoint.as_str(), all.protocol), ("http://c:4318/v1/metrics", Protocol::HttpProtobuf));
        assert_eq!((all.timeout, all.interval), (DEFAULT_TIMEOUT, DEFAULT_INTERVAL));
        let own = of(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318"),
            ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "https://m/metrics"),
            ("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "500"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "1000"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20a+b, x = y"),
            ("OTEL_RESOURCE_ATTRIBUTES", "k8s.node.name=n1,service.name=other"),
            ("OTEL_SERVICE_NAME", "gpus"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
        ]);
        assert_eq!(own.endpoint, "https://m/metrics");
        assert_eq!((own.timeout, own.interval), (Duration::from_millis(500), Duration::from_secs(1)));
        let owned = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Vec<_>>();
        assert_eq!(own.headers, owned(&[("authorization", "Bearer a+b"), ("x", "y")]));
        assert_eq!(own.resource, owned(&[("k8s.node.name", "n1"), ("service.name", "gpus")]));
        assert!(own.is_compressed);
        let grpc = of(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4317"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]);
        assert_eq!((grpc.endpoint.as_str(), grpc.protocol), ("http://c:4317", Protocol::Grpc));
    }

    #[test]
    fn invalid_variables_are_named_with_the_remedy() {
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318");
        for (variables, expect) in [
            (
                &[("OTEL_EXPORTER_OTLP_ENDPOINT", "c:4318")][..],
                "OTEL_EXPORTER_OTLP_ENDPOINT = \"c:4318\" is invalid: expected an address",
            ),
            (&[endpoint, ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")], "choose http/protobuf or grpc"),
            (&[endpoint, ("OTEL_METRIC_EXPORT_INTERVAL", "1s")], "expected a number of milliseconds"),
            (&[endpoint, ("OTEL_EXPORTER_OTLP_HEADERS", "a")], "expected key=value"),
            (&[endpoint, ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd")], "choose gzip or none"),
        ] {
            let error = read(variables).unwrap_err();
            assert!(error.contains(expect), "{error}");
        }
    }
}
