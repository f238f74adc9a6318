//! Single HTTP requests to the agent, to container engines and to other servers of this machine, over TCP or a Unix socket.
//!
//! Every request has a connection of its own. Proxies from the environment are ignored, redirections are not followed. A response is
//! returned with any status; [`Response::ok`] requires success. Requests that have to be invalid or unfinished are written by the tests
//! that need them.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use ureq::Agent;
use ureq::config::Config;
use ureq::http::Request;
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, DefaultConnector, LazyBuffers, NextTimeout, Transport,
};

/// Longer than any response takes; a server that is silent for this long is stuck.
const PATIENCE: Duration = Duration::from_secs(30);
/// Limit for connecting, also for checks whether a server exists.
const CONNECT: Duration = Duration::from_secs(2);

/// A server, with the time that it may be silent while a response is read.
#[derive(Clone, Debug)]
pub struct Server {
    endpoint: Endpoint,
    patience: Duration,
    total: Option<Duration>,
}

#[derive(Clone, Debug)]
enum Endpoint {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

#[derive(Debug)]
pub struct Response {
    /// For messages.
    request: String,
    pub status: u16,
    pub body: Vec<u8>,
}

impl Response {
    /// The body of a response that reports success.
    pub fn ok(self) -> Result<Vec<u8>> {
        match self.status {
            200..=299 => Ok(self.body),
            status => bail!("{}: {status} {}", self.request, String::from_utf8_lossy(&self.body).trim()),
        }
    }
}

impl Server {
    pub fn tcp(address: SocketAddr) -> Self {
        Self { endpoint: Endpoint::Tcp(address), patience: PATIENCE, total: None }
    }

    pub fn unix(socket: &Path) -> Self {
        Self { endpoint: Endpoint::Unix(socket.to_owned()), patience: PATIENCE, total: None }
    }

    /// With another limit than 30 s.
    pub fn patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// With a limit for a whole request; there is none by default.
    pub fn within(self, total: Duration) -> Self {
        Self { total: Some(total), ..self }
    }

    pub fn get(&self, path: &str) -> Result<Response> {
        self.request("GET", path, "", &[])
    }

    /// `accept`: the header of this name.
    pub fn get_accepting(&self, path: &str, accept: &str) -> Result<Response> {
        self.send("GET", path, &[("accept", accept)], &[])
    }

    /// `body_type` is the type of the body; without one it may be empty.
    pub fn request(&self, method: &str, path: &str, body_type: &str, body: &[u8]) -> Result<Response> {
        if body_type.is_empty() {
            self.send(method, path, &[], body)
        } else {
            self.send(method, path, &[("content-type", body_type)], body)
        }
    }

    fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Response> {
        let (agent, authority) = self.agent();
        let request = format!("{method} {path}");
        let mut head = Request::builder().method(method).uri(format!("http://{authority}{path}")).header("connection", "close");
        for (name, value) in headers {
            head = head.header(*name, *value);
        }
        // An empty body has a length too where the method has a body.
        let response = if body.is_empty() && method != "POST" {
            head.body(()).map(|request| agent.run(request))
        } else {
            head.body(body).map(|request| agent.run(request))
        };
        let mut response = response.with_context(|| request.clone())?.with_context(|| format!("{request} at {self}"))?;
        let body = response.body_mut().with_config().limit(u64::MAX).read_to_vec();
        let body = body.with_context(|| format!("{request} at {self}"))?;
        Ok(Response { request, status: response.status().as_u16(), body })
    }

    /// A client for one request, and the name of the server in the request.
    fn agent(&self) -> (Agent, String) {
        let config = Config::builder()
            .proxy(None)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(self.patience))
            .timeout_global(self.total)
            .build();
        match &self.endpoint {
            Endpoint::Tcp(address) => {
                (Agent::with_parts(config, DefaultConnector::new(), DefaultResolver::default()), address.to_string())
            }
            // The address is not used; as a literal, it is not looked up either.
            Endpoint::Unix(path) => {
                (Agent::with_parts(config, UnixConnector(path.clone()), DefaultResolver::default()), "127.0.0.1".into())
            }
        }
    }
}

impl std::fmt::Display for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.endpoint {
            Endpoint::Tcp(address) => address.fmt(f),
            Endpoint::Unix(path) => path.display().fmt(f),
        }
    }
}

/// Connects to a Unix socket, whatever the address of the request is.
#[derive(Debug)]
struct UnixConnector(PathBuf);

impl Connector for UnixConnector {
    type Out = UnixTransport;

    fn connect(&self, details: &ConnectionDetails<'_>, _: Option<()>) -> Result<Option<UnixTransport>, ureq::Error> {
        let buffers = LazyBuffers::new(details.config.input_buffer_size(), details.config.output_buffer_size());
        Ok(Some(UnixTransport { stream: UnixStream::connect(&self.0)?, buffers }))
    }
}

struct UnixTransport {
    stream: UnixStream,
    buffers: LazyBuffers,
}

impl std::fmt::Debug for UnixTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.stream.fmt(f)
    }
}

impl Transport for UnixTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, _: NextTimeout) -> Result<(), ureq::Error> {
        Ok(self.stream.write_all(&self.buffers.output()[..amount])?)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        let timeout = timeout.for_read();
        self.stream.set_read_timeout(timeout.not_zero().map(|limit| *limit))?;
        let length = loop {
            match self.stream.read(self.buffers.input_append_buf()) {
                Ok(length) => break length,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(ureq::Error::Timeout(timeout.reason)),
                Err(error) => return Err(error.into()),
            }
        };
        self.buffers.input_appended(length);
        Ok(length > 0)
    }

    /// Connections are not used twice.
    fn is_open(&mut self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread;

    /// Serves one request with these bytes, over TCP or a Unix socket. Returns the request.
    fn exchange(
        over_tcp: bool,
        method: &str,
        body: &'static [u8],
        reply: &'static str,
        patience: Duration,
    ) -> (String, Result<Response>) {
        fn serve(mut stream: impl std::io::Read + std::io::Write, reply: &str, patience: Duration) -> String {
            let (mut request, mut byte) = (String::new(), [0]);
            let is_whole = |request: &str| match request.contains("content-length: 4\r\n") {
                true => request.ends_with("\r\n\r\nbody"),
                false => request.ends_with("\r\n\r\n"),
            };
            while !is_whole(&request) {
                stream.read_exact(&mut byte).unwrap();
                request.push(byte[0].into());
            }
            stream.write_all(reply.as_bytes()).unwrap();
            if reply.is_empty() {
                thread::sleep(2 * patience);
            }
            request
        }
        let (server, served) = if over_tcp {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let server = Server::tcp(listener.local_addr().unwrap());
            (server, thread::spawn(move || serve(listener.accept().unwrap().0, reply, patience)))
        } else {
            let path = std::env::temp_dir().join(format!("devkit-{}-{:?}", std::process::id(), thread::current().id()));
            let listener = UnixListener::bind(&path).unwrap();
            let (server, path) = (Server::unix(&path), path);
            let served = thread::spawn(move || {
                let stream = listener.accept().unwrap().0;
                std::fs::remove_file(path).unwrap();
                serve(stream, reply, patience)
            });
            (server, served)
        };
        let response = server.patience(patience).request(method, "/a?b=c", "text/x", body);
        (served.join().unwrap(), response)
    }

    #[test]
    fn responses_are_read_over_tcp_and_unix_sockets() {
        for over_tcp in [true, false] {
            for (reply, status, body) in [
                ("HTTP/1.0 200 OK\r\nA: b\r\n\r\nbody", 200, "body"),
                ("HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", 404, "no"),
                ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n", 200, "abcd"),
                ("HTTP/1.1 302 Found\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n", 302, ""),
                ("HTTP/1.1 204 No Content\r\n\r\n", 204, ""),
            ] {
                let (request, response) = exchange(over_tcp, "GET", b"", reply, PATIENCE);
                let response = response.unwrap();
                assert_eq!((response.status, response.body.as_slice()), (status, body.as_bytes()), "{reply:?}");
                assert!(request.starts_with("GET /a?b=c HTTP/1.1\r\n"), "{request}");
                assert_eq!(response.ok().is_ok(), status < 300);
            }
        }
    }

    #[test]
    fn requests_have_the_length_and_type_of_their_body() {
        let reply = "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\n\r\nfull";
        let (request, response) = exchange(false, "POST", b"body", reply, PATIENCE);
        assert!(request.contains("content-length: 4\r\n") && request.contains("content-type: text/x\r\n"), "{request}");
        assert_eq!(response.unwrap().ok().unwrap_err().to_string(), "POST /a?b=c: 500 full");
        for method in ["POST", "DELETE"] {
            let reply = "HTTP/1.1 204 No Content\r\n\r\n";
            let (request, response) = exchange(false, method, b"", reply, PATIENCE);
            assert_eq!(request.contains("content-length: 0\r\n"), method == "POST", "{request}");
            assert_eq!(response.unwrap().status, 204);
        }
    }

    #[test]
    fn other_protocols_short_bodies_and_silence_are_errors() {
        for over_tcp in [true, false] {
            for reply in ["SSH-2.0\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbody", ""] {
                let (_, response) = exchange(over_tcp, "GET", b"", reply, Duration::from_millis(200));
                assert!(response.is_err(), "{reply:?}: {response:?}");
            }
        }
        assert!(Server::unix(Path::new("/nonexistent")).get("/").is_err());
    }
}
