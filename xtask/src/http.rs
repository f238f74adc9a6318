//! Single HTTP/1.0 requests over TCP or a Unix socket: enough for /metrics and for Docker's API.

use anyhow::{Context, Result, bail};
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// Longer than any response takes; a server that is silent for this long is stuck.
const PATIENCE: Duration = Duration::from_secs(30);
/// Limit for connecting, also for checks whether a server exists.
const CONNECT: Duration = Duration::from_secs(2);

pub struct HttpResponse {
    pub status: u16,
    pub body: Vec<u8>,
}

impl HttpResponse {
    pub fn ok(self) -> Result<Vec<u8>> {
        match self.status {
            200..=299 => Ok(self.body),
            status => bail!("HTTP {status}: {}", String::from_utf8_lossy(&self.body).trim()),
        }
    }
}

pub fn get(server: SocketAddr, path: &str) -> Result<HttpResponse> {
    let stream = TcpStream::connect_timeout(&server, CONNECT).with_context(|| server.to_string())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    exchange(stream, &server.to_string(), "GET", path, "text/plain", &[])
}

/// A request to an engine behind a Unix socket.
pub fn unix(socket: &Path, method: &str, path: &str, body_type: &str, body: &[u8]) -> Result<HttpResponse> {
    let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    exchange(stream, "localhost", method, path, body_type, body).with_context(|| format!("{method} {path}"))
}

fn exchange(
    mut stream: impl Read + Write,
    host: &str,
    method: &str,
    path: &str,
    body_type: &str,
    body: &[u8],
) -> Result<HttpResponse> {
    write!(stream, "{method} {path} HTTP/1.0\r\nHost: {host}\r\n")?;
    if !body.is_empty() {
        write!(stream, "Content-Type: {body_type}\r\nContent-Length: {}\r\n", body.len())?;
    }
    write!(stream, "\r\n")?;
    stream.write_all(body)?;
    let mut response = Vec::new();
    stream.read_to_end(&mut response)?;
    parse(&response).context("not an HTTP response")
}

fn parse(response: &[u8]) -> Option<HttpResponse> {
    let end = response.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(response.get(..end)?).ok()?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    Some(HttpResponse { status, body: response.get(end + 4..)?.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn responses_are_parsed_and_other_protocols_rejected() {
        let response = parse(b"HTTP/1.0 200 OK\r\nA: b\r\n\r\nbody").unwrap();
        assert_eq!((response.status, response.body.as_slice()), (200, &b"body"[..]));
        assert_eq!(parse(b"HTTP/1.1 404 Not Found\r\n\r\n").unwrap().status, 404);
        assert!(parse(b"").is_none());
        assert!(parse(b"SSH-2.0\r\n\r\n").is_none());
    }
}
