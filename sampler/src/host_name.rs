//! Names of hosts in Host and Origin headers, and those that the operator allows.

use std::net::{IpAddr, Ipv6Addr};

/// Maximum length of a DNS name.
const MAX_NAME_BYTES: usize = 253;

/// A host without its port; names are in lower case and without the root's dot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostName {
    Name(String),
    Address(IpAddr),
}

/// The host and the port of a Host header, or of an Origin without its scheme.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority {
    pub host: HostName,
    pub port: Option<u16>,
}

impl HostName {
    /// Parses a name or an IP address; that of IPv6 may be in brackets.
    ///
    /// # Errors
    /// The remedy for a value that is not a host: with a scheme, path, port or wildcard.
    pub fn new(text: &str) -> Result<Self, &'static str> {
        if text.is_empty() {
            return Err("expected a host name or IP address; omit the setting if there is none");
        }
        if text.contains("://") {
            return Err("expected the host name alone: omit the scheme");
        }
        if text.contains('*') {
            return Err("wildcards would admit other sites' pages: give every name");
        }
        if text.contains(['/', '?', '#', '@']) {
            return Err("expected the host name alone: omit path, query and user");
        }
        if let Some(inner) = text.strip_prefix('[') {
            let Some((address, rest)) = inner.split_once(']') else {
                return Err("the closing bracket of the address is missing");
            };
            if !rest.is_empty() {
                return Err("every port of the host is accepted: omit the port");
            }
            let address = address.parse::<Ipv6Addr>().map_err(|_| "expected an IPv6 address in the brackets")?;
            return Ok(Self::Address(address.into()));
        }
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        if text.contains(':') {
            return Err("every port of the host is accepted: omit the port");
        }
        let name = text.strip_suffix('.').unwrap_or(text);
        let is_character = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        let is_label = |label: &str| !label.is_empty() && label.bytes().all(is_character);
        if name.len() > MAX_NAME_BYTES || !name.split('.').all(is_label) {
            return Err("expected a host name of letters, digits, hyphens and dots, such as gpu.example.com");
        }
        Ok(Self::Name(name.to_ascii_lowercase()))
    }

    /// Whether it names this machine to its own programs.
    pub fn is_loopback(&self) -> bool {
        match self {
            Self::Name(name) => name == "localhost",
            Self::Address(address) => address.is_loopback(),
        }
    }
}

impl Authority {
    /// Parses `HOST[:PORT]`, in which an IPv6 address is in brackets.
    pub fn new(text: &str) -> Option<Self> {
        let end_of_host = if text.starts_with('[') { text.find(']')? + 1 } else { text.find(':').unwrap_or(text.len()) };
        let (host, rest) = text.split_at(end_of_host);
        let port = match rest.strip_prefix(':') {
            // An empty port is valid in a URI and means the default one.
            Some("") => None,
            Some(port) if port.bytes().all(|byte| byte.is_ascii_digit()) => Some(port.parse().ok()?),
            None if rest.is_empty() => None,
            _ => return None,
        };
        Some(Self { host: HostName::new(host).ok()?, port })
    }

    /// Whether both mean the same server under a scheme with this default port.
    pub fn is_same(&self, other: &Self, default_port: u16) -> bool {
        self.host == other.host && self.port.unwrap_or(default_port) == other.port.unwrap_or(default_port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_names_and_addresses_without_scheme_path_port_and_wildcard() {
        let name = |name: &str| Ok(HostName::Name(name.into()));
        let address = |address: &str| Ok(HostName::Address(address.parse().unwrap()));
        for (text, expect) in [
            ("gpu.example.com", name("gpu.example.com")),
            ("GPU.Example.com.", name("gpu.example.com")),
            ("node_1", name("node_1")),
            ("10.0.0.1", address("10.0.0.1")),
            ("fd00::1", address("fd00::1")),
            ("[FD00:0::1]", address("fd00::1")),
        ] {
            assert_eq!(HostName::new(text), expect, "{text}");
        }
        for (text, remedy) in [
            ("", "omit the setting"),
            ("https://gpu.example.com", "omit the scheme"),
            ("gpu.example.com/metrics", "omit path"),
            ("me@gpu.example.com", "omit path, query and user"),
            ("gpu.example.com:443", "omit the port"),
            ("[fd00::1]:443", "omit the port"),
            ("[fd00::1", "closing bracket"),
            ("[gpu]", "IPv6 address"),
            ("*", "give every name"),
            ("*.example.com", "give every name"),
            ("gpu..example", "expected a host name of letters"),
            ("gpu example", "expected a host name of letters"),
            (&"a".repeat(254), "expected a host name of letters"),
        ] {
            let error = HostName::new(text).unwrap_err();
            assert!(error.contains(remedy), "{text}: {error}");
        }
    }

    #[test]
    fn authorities_have_a_host_and_perhaps_a_port() {
        let check = |text: &str, expect: Option<(&str, Option<u16>)>| {
            let expect = expect.map(|(host, port)| Authority { host: HostName::new(host).unwrap(), port });
            assert_eq!(Authority::new(text), expect, "{text}");
        };
        check("localhost:9836", Some(("localhost", Some(9836))));
        check("GPU.example.com", Some(("gpu.example.com", None)));
        check("gpu.example.com:", Some(("gpu.example.com", None)));
        check("[::1]:80", Some(("::1", Some(80))));
        check("[::1]", Some(("::1", None)));
        check("::1", None);
        check("[::1]evil.example", None);
        check("[::1", None);
        check("gpu:80:80", None);
        check("gpu:+80", None);
        check("gpu:99999", None);
        check("", None);
        check("localhost/x", None);
    }
}
