//! The part of HTTP that the doubles and the proxy need: request heads, responses, HTTP/2 frames.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, bail, ensure};

/// The first bytes of every HTTP/2 client.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Size limit of a request's head.
const HEAD: usize = 64 * 1024;

pub struct Request {
    pub method: String,
    pub path: String,
    /// With everything read so far if the request is HTTP/2.
    pub head: Vec<u8>,
    body: Vec<u8>,
}

fn end_of_head(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4)
}

/// The status and the body of a complete response.
pub fn split(response: &[u8]) -> Result<(u16, &[u8])> {
    let end = end_of_head(response).context("no HTTP response")?;
    let head = String::from_utf8_lossy(&response[..end]);
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).context("no HTTP status")?;
    Ok((status, &response[end..]))
}

/// Writes a complete response; `connection` is `close` or `keep-alive`.
pub fn respond(mut to: &UnixStream, status: u16, connection: &str, kind: &str, body: &[u8]) -> Result<()> {
    let length = body.len();
    let head =
        format!("HTTP/1.1 {status} -\r\nConnection: {connection}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n");
    Ok(to.write_all(&[head.as_bytes(), body].concat())?)
}

impl Request {
    /// Reads the next request; `read` keeps bytes that follow it. `None` at the end.
    pub fn read(from: &mut impl Read, read: &mut Vec<u8>) -> Result<Option<Self>> {
        let mut more = |read: &mut Vec<u8>| -> Result<bool> {
            let mut buffer = [0; 4096];
            let length = from.read(&mut buffer)?;
            read.extend_from_slice(&buffer[..length]);
            Ok(length > 0)
        };
        let end = loop {
            if read.starts_with(PREFACE) {
                return Ok(Some(Self { method: "PRI".into(), path: "*".into(), head: std::mem::take(read), body: Vec::new() }));
            }
            if let Some(end) = end_of_head(read).filter(|_| !PREFACE.starts_with(read)) {
                break end;
            }
            ensure!(read.len() < HEAD, "a request's head is too long");
            if !more(read)? {
                return Ok(None);
            }
        };
        let text = String::from_utf8_lossy(&read[..end]).into_owned();
        let mut words = text.split(' ');
        let (Some(method), Some(path)) = (words.next(), words.next()) else { bail!("not a request: {text}") };
        let length = text.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
        });
        let whole = end + length.unwrap_or_default();
        while read.len() < whole {
            ensure!(more(read)?, "a request's body is cut short");
        }
        let rest = read.split_off(whole);
        let body = read.split_off(end);
        let head = std::mem::replace(read, rest);
        Ok(Some(Self { method: method.into(), path: path.into(), head, body }))
    }

    pub fn is_http2(&self) -> bool {
        self.method == "PRI"
    }

    /// The request in this version of HTTP, for a connection that is closed after the response.
    pub fn forwarded(&self, version: &str) -> Vec<u8> {
        let head = String::from_utf8_lossy(&self.head);
        let kept = head.lines().skip(1).filter(|line| !line.is_empty());
        let kept = kept.filter(|line| !line.to_ascii_lowercase().starts_with("connection:"));
        let mut bytes = format!("{} {} {version}\r\n", self.method, self.path);
        for line in kept.chain(["Connection: close", ""]) {
            bytes.push_str(line);
            bytes.push_str("\r\n");
        }
        [bytes.as_bytes(), &self.body].concat()
    }
}

/// Counts the requests of an HTTP/2 client: each begins with one HEADERS frame.
#[derive(Default)]
pub struct Frames {
    head: Vec<u8>,
    skip: usize,
}

impl Frames {
    /// The number of requests in the bytes that follow those of earlier calls.
    pub fn requests(&mut self, mut bytes: &[u8]) -> u64 {
        const HEADERS: u8 = 1;
        let mut seen = 0;
        while !bytes.is_empty() {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            let wanted = (9 - self.head.len()).min(bytes.len());
            self.head.extend_from_slice(&bytes[..wanted]);
            bytes = &bytes[wanted..];
            if let [a, b, c, kind, _, _, _, _, _] = self.head[..] {
                self.skip = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                seen += u64::from(kind == HEADERS);
                self.head.clear();
            }
        }
        seen
    }
}
