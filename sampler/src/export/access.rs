//! Which requests are accepted, by their headers.

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};

/// Compares in constant time.
pub fn authorized(headers: &HeaderMap, token: Option<&str>) -> bool {
    let sent = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()).and_then(|v| v.strip_prefix("Bearer "));
    match (sent, token) {
        (Some(sent), Some(token)) => {
            sent.len() == token.len() && sent.bytes().zip(token.bytes()).fold(0, |bits, (a, b)| bits | (a ^ b)) == 0
        }
        _ => false,
    }
}

/// Why a request to an agent on loopback is refused by its Host or Origin.
pub fn foreign(headers: &HeaderMap, listen: IpAddr) -> Option<(StatusCode, String)> {
    for (name, what) in [(header::HOST, "Host"), (header::ORIGIN, "Origin")] {
        let Some(value) = headers.get(&name) else { continue };
        let text = value.to_str().unwrap_or("(not text)");
        let authority = text.split_once("://").map_or(text, |(_, rest)| rest);
        let ours = host(authority).is_some_and(|h| h == "localhost" || h.parse() == Ok(listen) || is_loopback(h));
        if !ours {
            let said = format!("{what} {text:?} is not this machine's loopback; ask for http://localhost, or listen elsewhere\n");
            return Some((StatusCode::FORBIDDEN, said));
        }
    }
    None
}

/// Browsers send the Origin of a page with whatever that page changes.
pub fn from_another_page(method: &Method, headers: &HeaderMap) -> Option<(StatusCode, String)> {
    let origin = headers.get(header::ORIGIN).filter(|_| !method.is_safe())?.as_bytes();
    let host = headers.get(header::HOST).map(HeaderValue::as_bytes).unwrap_or_default();
    let ours = origin.strip_prefix(b"http://").is_some_and(|authority| authority == host);
    let said = format!("{method} from the page of another server ({}) is refused\n", String::from_utf8_lossy(origin));
    (!ours).then_some((StatusCode::FORBIDDEN, said))
}

fn is_loopback(host: &str) -> bool {
    host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
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
    fn hosts() {
        let refused = |name: header::HeaderName, value: &str| {
            let headers = HeaderMap::from_iter([(name, value.parse().unwrap())]);
            foreign(&headers, "127.0.0.1".parse().unwrap()).is_some()
        };
        for (value, expect) in
            [("localhost:9836", false), ("127.0.0.1", false), ("[::1]:9836", false), ("evil.example:9836", true)]
        {
            assert_eq!(refused(header::HOST, value), expect, "{value}");
        }
        for (value, expect) in [("http://localhost:9836", false), ("https://evil.example", true), ("null", true)] {
            assert_eq!(refused(header::ORIGIN, value), expect, "{value}");
        }
    }

    #[test]
    fn tokens() {
        let ok = |sent: &str, token| authorized(&HeaderMap::from_iter([(header::AUTHORIZATION, sent.parse().unwrap())]), token);
        assert!(ok("Bearer abc", Some("abc")));
        assert!(
            !ok("Bearer abd", Some("abc")) && !ok("Bearer ab", Some("abc")) && !ok("abc", Some("abc")) && !ok("Bearer ", None)
        );
    }
}
