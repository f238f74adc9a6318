//! Access control by request headers.

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use subtle::ConstantTimeEq as _;

/// Compares in constant time, apart from the length.
pub fn authorized(headers: &HeaderMap, token: Option<&str>) -> bool {
    let sent = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()).and_then(|v| v.strip_prefix("Bearer "));
    sent.zip(token).is_some_and(|(sent, token)| sent.as_bytes().ct_eq(token.as_bytes()).into())
}

/// The rejection of a request to an agent on loopback because of its Host or Origin; `None` if it is accepted.
pub fn foreign(headers: &HeaderMap, listen: IpAddr) -> Option<(StatusCode, String)> {
    for (name, what) in [(header::HOST, "Host"), (header::ORIGIN, "Origin")] {
        let Some(value) = headers.get(&name) else { continue };
        let text = value.to_str().unwrap_or("(not text)");
        let authority = text.split_once("://").map_or(text, |(_, rest)| rest);
        let is_local = host(authority)
            .is_some_and(|host| host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip == listen || ip.is_loopback()));
        if !is_local {
            let message = format!(
                "request rejected: {what} {text:?} is not the loopback of this machine; use http://localhost, or another --listen address\n"
            );
            return Some((StatusCode::FORBIDDEN, message));
        }
    }
    None
}

/// Browsers send the Origin of the page with requests that change something.
pub fn from_another_page(method: &Method, headers: &HeaderMap) -> Option<(StatusCode, String)> {
    let origin = headers.get(header::ORIGIN).filter(|_| !method.is_safe())?.as_bytes();
    let host = headers.get(header::HOST).map(HeaderValue::as_bytes).unwrap_or_default();
    let is_own = origin.strip_prefix(b"http://").is_some_and(|authority| authority == host);
    let message = format!("request rejected: {method} from a page of another server ({})\n", String::from_utf8_lossy(origin));
    (!is_own).then_some((StatusCode::FORBIDDEN, message))
}

/// `host[:port]` without the port and without an IPv6 address's brackets.
fn host(authority: &str) -> Option<&str> {
    match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map(|(host, _)| host),
        None => authority.split(':').next(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_for_other_hosts_are_rejected() {
        let is_rejected = |name: header::HeaderName, value: &str| {
            let headers = HeaderMap::from_iter([(name, value.parse().unwrap())]);
            foreign(&headers, "127.0.0.1".parse().unwrap()).is_some()
        };
        for (value, expect) in
            [("localhost:9836", false), ("127.0.0.1", false), ("[::1]:9836", false), ("evil.example:9836", true)]
        {
            assert_eq!(is_rejected(header::HOST, value), expect, "{value}");
        }
        for (value, expect) in [("http://localhost:9836", false), ("https://evil.example", true), ("null", true)] {
            assert_eq!(is_rejected(header::ORIGIN, value), expect, "{value}");
        }
    }

    #[test]
    fn only_the_configured_token_is_accepted() {
        let is_accepted =
            |sent: &str, token| authorized(&HeaderMap::from_iter([(header::AUTHORIZATION, sent.parse().unwrap())]), token);
        assert!(is_accepted("Bearer abc", Some("abc")));
        assert!(
            !is_accepted("Bearer abd", Some("abc"))
                && !is_accepted("Bearer ab", Some("abc"))
                && !is_accepted("abc", Some("abc"))
                && !is_accepted("Bearer ", None)
        );
    }
}
