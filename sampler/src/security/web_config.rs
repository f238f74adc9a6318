//! The web configuration file, in the format of Prometheus' exporter-toolkit (`--web.config.file`): every key of that format is read. A key
//! that this server cannot honour is an error, never ignored.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use serde::Deserialize;

use super::credentials::Users;
use super::error::{InvalidKey, SecurityError, read_file};
use super::file_states::FileStates;
use super::rate_limit::RateLimit;
use super::tls::{Tls, TlsSettings};

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WebConfigFile {
    tls_server_config: Option<TlsSettings>,
    http_server_config: HttpSettings,
    rate_limit: RateLimitSettings,
    basic_auth_users: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct HttpSettings {
    /// Accepted and without effect: this server offers HTTP/1.1 alone, which every client of HTTP/2 speaks as well.
    #[serde(rename = "http2")]
    _http2: Option<bool>,
    headers: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RateLimitSettings {
    /// Time for one request, as a Go duration such as `10ms`; zero means no limit.
    interval: Option<String>,
    burst: Option<u32>,
}

/// The headers that the format allows.
const HEADERS: [&str; 5] =
    ["Content-Security-Policy", "Strict-Transport-Security", "X-Content-Type-Options", "X-Frame-Options", "X-XSS-Protection"];

/// What the file says, ready for use.
#[derive(Debug, Default)]
pub struct WebRules {
    pub tls: Option<Tls>,
    pub users: Users,
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub rate_limit: Option<RateLimit>,
}

impl WebRules {
    /// Reads the file and those that it names. `read` gets every file, also if one of them is invalid.
    pub fn load(path: &Path, read: &mut FileStates) -> Result<Self, SecurityError> {
        read.add(path);
        Self::of(parse(path)?, path, read)
    }

    fn of(file: WebConfigFile, path: &Path, read: &mut FileStates) -> Result<Self, SecurityError> {
        let invalid = |key: &str, remedy: String| SecurityError::Key { path: path.to_owned(), key: key.to_owned(), remedy };
        let tls = file.tls_server_config.map(|settings| Tls::new(settings, folder(path), read, &invalid)).transpose()?;
        let users = Users::new(file.basic_auth_users).map_err(|user| {
            invalid(
                "basic_auth_users",
                format!("the value of {user:?} is not a bcrypt hash with a cost of 4 to 14; make one with `htpasswd -nB {user}`"),
            )
        })?;
        let headers = file
            .http_server_config
            .headers
            .into_iter()
            .map(|(name, value)| header(&name, &value, &invalid))
            .collect::<Result<_, _>>()?;
        let rate_limit = rate_limit(file.rate_limit, &invalid)?;
        Ok(Self { tls, users, headers, rate_limit })
    }
}

fn parse(path: &Path) -> Result<WebConfigFile, SecurityError> {
    parse_text(&read_file("the web configuration", path)?, path)
}

fn parse_text(text: &str, path: &Path) -> Result<WebConfigFile, SecurityError> {
    if text.trim().is_empty() {
        return Ok(WebConfigFile::default());
    }
    let syntax =
        |error: serde_saphyr::Error| SecurityError::Syntax { path: path.to_owned(), message: first_line(&error.to_string()) };
    serde_saphyr::from_str(text).map_err(syntax)
}

/// The certificate of the server as PEM, if it has TLS: for clients on the same machine, which need not be able to read the key.
pub fn server_certificate(path: &Path) -> Result<Option<String>, SecurityError> {
    let tls = parse(path)?.tls_server_config;
    Ok(tls.map(|tls| tls.certificate(folder(path))).transpose()?.flatten())
}

/// Relative paths are below the folder of the file.
fn folder(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

fn header(name: &str, value: &str, invalid: InvalidKey<'_>) -> Result<(HeaderName, HeaderValue), SecurityError> {
    let key = format!("http_server_config.headers.{name}");
    if !HEADERS.iter().any(|known| known.eq_ignore_ascii_case(name)) {
        return Err(invalid(&key, format!("choose from {}", HEADERS.join(", "))));
    }
    let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) else {
        return Err(invalid(&key, "expected the value of a header".into()));
    };
    Ok((name, value))
}

fn rate_limit(settings: RateLimitSettings, invalid: InvalidKey<'_>) -> Result<Option<RateLimit>, SecurityError> {
    let Some(interval) = settings.interval else { return Ok(None) };
    let every = match interval.trim() {
        "0" => Duration::ZERO,
        text => humantime::parse_duration(text)
            .map_err(|_| invalid("rate_limit.interval", format!("{text:?} is not a duration; expected one such as 10ms")))?,
    };
    Ok((!every.is_zero()).then(|| RateLimit::new(every, settings.burst.unwrap_or(1).max(1))))
}

/// The library's message goes on with a drawing of the place.
fn first_line(message: &str) -> String {
    message.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// A web configuration, without the files that it names: errors name the file in one line, and the rules work.
    #[test]
    fn fuzz_web_config() {
        let path = Path::new("web.yml");
        devkit::fuzz(file!(), "web_config", move |bytes| {
            let Ok(text) = std::str::from_utf8(bytes) else { return };
            let rules = parse_text(text, path).and_then(|file| {
                WebRules::of(WebConfigFile { tls_server_config: None, ..file }, path, &mut FileStates::default())
            });
            match rules {
                Ok(rules) => {
                    let is_known = |name: &HeaderName| HEADERS.iter().any(|known| name.as_str().eq_ignore_ascii_case(known));
                    assert!(rules.headers.iter().all(|(name, _)| is_known(name)));
                    assert!(rules.rate_limit.is_none_or(|limit| limit.admits(Instant::now())), "the first request");
                }
                Err(error) => assert!(error.to_string().contains("web.yml"), "{error}"),
            }
        });
    }
}
