//! Access control by request headers.

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};

use crate::host_name::{Authority, HostName};

/// The rejection of a request to an agent on loopback because of its Host or Origin; `None` if it is accepted.
///
/// Under a Host of loopback the Origin must be on loopback. Under an allowed Host, which a proxy passes on, it must be that very server:
/// `allowed` contains no other site.
pub fn foreign(headers: &HeaderMap, listen: IpAddr, allowed: &[HostName]) -> Option<(StatusCode, String)> {
    let is_local = |host: &HostName| host.is_loopback() || *host == HostName::Address(listen);
    let host = match headers.get(header::HOST) {
        None => None,
        Some(value) => match Authority::new(text(value)).filter(|a| is_local(&a.host) || allowed.contains(&a.host)) {
            None => return Some((StatusCode::FORBIDDEN, foreign_host(text(value)))),
            host => host,
        },
    };
    let origin = text(headers.get(header::ORIGIN)?);
    let is_accepted = match host.filter(|host| !is_local(&host.host)) {
        None => split_origin(origin).is_some_and(|(_, authority)| is_local(&authority.host)),
        Some(host) => is_same_origin(origin, &host),
    };
    let message =
        format!("request rejected: Origin {origin:?} is a page of another server; open the page of this agent instead\n");
    (!is_accepted).then_some((StatusCode::FORBIDDEN, message))
}

fn foreign_host(host: &str) -> String {
    let remedy = match Authority::new(host) {
        Some(Authority { host: HostName::Name(name), .. }) => format!("--allowed-host {name}"),
        Some(Authority { host: HostName::Address(address), .. }) => format!("--allowed-host {address}"),
        None => "--allowed-host".into(),
    };
    format!(
        "request rejected: Host {host:?} is neither loopback nor allowed; use http://localhost, or, for a proxy on this machine that keeps \
         the Host of its clients, set {remedy}\n"
    )
}

/// Browsers send the Origin of the page with requests that change something. With `is_tls` only that scheme is the agent's own page, except
/// for an allowed Host, in front of which a proxy may end TLS; without it both schemes are.
pub fn from_another_page(
    method: &Method,
    headers: &HeaderMap,
    allowed: &[HostName],
    is_tls: Option<bool>,
) -> Option<(StatusCode, String)> {
    let origin = text(headers.get(header::ORIGIN).filter(|_| !method.is_safe())?);
    let host = headers.get(header::HOST).and_then(|value| Authority::new(text(value)));
    let is_own = host.is_some_and(|host| {
        let is_scheme_possible =
            allowed.contains(&host.host) || is_tls.is_none_or(|is_tls| origin.starts_with("https://") == is_tls);
        is_scheme_possible && is_same_origin(origin, &host)
    });
    let message = format!("request rejected: {method} from a page of another server ({origin})\n");
    (!is_own).then_some((StatusCode::FORBIDDEN, message))
}

fn text(value: &HeaderValue) -> &str {
    value.to_str().unwrap_or("(not text)")
}

/// The default port of an Origin's scheme, and its authority; `None` for an opaque origin ("null") and other schemes.
fn split_origin(origin: &str) -> Option<(u16, Authority)> {
    let (port, authority) = match origin.split_once("://")? {
        ("http", authority) => (80, authority),
        ("https", authority) => (443, authority),
        _ => return None,
    };
    Some((port, Authority::new(authority)?))
}

/// The Host does not show the scheme, so either of both is accepted; the port of neither may differ.
fn is_same_origin(origin: &str, host: &Authority) -> bool {
    split_origin(origin).is_some_and(|(port, authority)| authority.is_same(host, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(host: &str, origin: Option<&str>) -> HeaderMap {
        let host = (header::HOST, host.parse().unwrap());
        HeaderMap::from_iter([host].into_iter().chain(origin.map(|origin| (header::ORIGIN, origin.parse().unwrap()))))
    }

    #[test]
    fn requests_for_other_hosts_are_rejected() {
        let rejection = |allowed: &[&str], host: &str, origin| {
            let allowed: Vec<HostName> = allowed.iter().map(|name| HostName::new(name).unwrap()).collect();
            foreign(&headers(host, origin), "127.0.0.1".parse().unwrap(), &allowed)
        };
        for (allowed, host, expect) in [
            (&[][..], "localhost:9836", false),
            (&[], "LOCALHOST", false),
            (&[], "127.0.0.1", false),
            (&[], "[::1]:9836", false),
            (&[], "evil.example:9836", true),
            (&[], "[::1]evil.example", true),
            (&["gpu.example.com"], "gpu.example.com", false),
            (&["gpu.example.com"], "GPU.example.com:8443", false),
            (&["GPU.EXAMPLE.COM"], "gpu.example.com.", false),
            (&["gpu.example.com"], "localhost", false),
            (&["gpu.example.com"], "evil.gpu.example.com", true),
            (&["gpu.example.com"], "example.com", true),
            (&["gpu.example.com"], "gpu.example.com.evil.example", true),
            (&["gpu.example.com"], "gpu.example.com:x", true),
            (&["gpu.example.com"], "", true),
            (&["10.0.0.7", "fd00::7"], "10.0.0.7:10250", false),
            (&["10.0.0.7", "fd00::7"], "[fd00:0::7]:10250", false),
            (&["10.0.0.7", "fd00::7"], "[fd00::8]", true),
        ] {
            assert_eq!(rejection(allowed, host, None).is_some(), expect, "{allowed:?} {host}");
        }
        let (_, message) = rejection(&[], "evil.example:9836", None).unwrap();
        assert!(message.contains("\"evil.example:9836\"") && message.contains("--allowed-host evil.example\n"), "{message}");
        for (host, origin, expect) in [
            ("localhost:9836", "http://localhost:9836", false),
            ("localhost:9836", "https://evil.example", true),
            ("localhost:9836", "null", true),
            // An allowed page is not the page of loopback, nor the reverse.
            ("localhost:9836", "https://gpu.example.com", true),
            ("gpu.example.com", "http://localhost:9836", true),
            ("gpu.example.com", "https://gpu.example.com", false),
            ("gpu.example.com", "http://gpu.example.com", false),
            ("GPU.example.com:443", "https://gpu.example.com", false),
            ("gpu.example.com", "https://gpu.example.com:443", false),
            ("gpu.example.com:8443", "https://gpu.example.com:8443", false),
            // Another server of that machine, and other sites.
            ("gpu.example.com:8443", "https://gpu.example.com", true),
            ("gpu.example.com", "http://gpu.example.com:8080", true),
            ("gpu.example.com", "https://other.example.com", true),
            ("gpu.example.com", "https://evil.example", true),
            ("gpu.example.com", "null", true),
            ("gpu.example.com", "ftp://gpu.example.com", true),
            ("other.example.com", "https://evil.example", true),
        ] {
            let rejected = rejection(&["gpu.example.com", "other.example.com"], host, Some(origin)).is_some();
            assert_eq!(rejected, expect, "{host} {origin}");
        }
    }

    #[test]
    fn only_the_own_page_may_change_something() {
        let allowed = [HostName::new("gpu.example.com").unwrap()];
        for (host, origin, expect) in [
            ("localhost:9836", "http://localhost:9836", false),
            ("localhost:9836", "http://127.0.0.1:9836", true),
            ("localhost:9836", "http://localhost:8888", true),
            ("localhost:9836", "https://localhost:9836", true),
            ("gpu.example.com", "https://gpu.example.com", false),
            ("gpu.example.com", "https://gpu.example.com:8443", true),
            ("gpu.example.com", "https://evil.example", true),
        ] {
            let headers = headers(host, Some(origin));
            assert_eq!(from_another_page(&Method::POST, &headers, &allowed, Some(false)).is_some(), expect, "{host} {origin}");
            assert!(from_another_page(&Method::GET, &headers, &allowed, Some(false)).is_none());
        }
    }
}
