//! Reads the metrics page of a serving engine: one HTTP request on a connection of its own, from inside the network namespace of its
//! container.
//!
//! A tenant controls the other side. Time, the head and the body are bounded, the body is parsed while it arrives, in memory for one line
//! (so that slow servers need not take turns, in which one would delay others), only status 200 counts, a redirect is not followed, no name is
//! resolved, and nothing of the container's is sent elsewhere.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper::body::{Body as _, Bytes};
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, CONNECTION, HOST, USER_AGENT};
use hyper_util::rt::TokioIo;
use sampler_core::units::BootNs;
use thiserror::Error;
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::page::{EngineValues, PageParser};
use super::sockets::{NamespaceError, NamespaceSockets, SocketFamily};
use crate::engine_rules::EngineRules;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// From the connection to the last byte.
const TIMEOUT: Duration = Duration::from_secs(2);
/// A page of vLLM with ten models is 300 KiB. It bounds the processor time, which the agent spends once for each byte.
const MAX_PAGE_BYTES: usize = 1 << 20;
/// Bound of the head of a response.
const MAX_HEAD_BYTES: usize = 64 << 10;

#[derive(Debug, Error)]
pub enum ReadPageError {
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error("no connection within {} s", CONNECT_TIMEOUT.as_secs())]
    ConnectTimeout,
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    #[error("no complete page within {} s", TIMEOUT.as_secs())]
    Timeout,
    #[error("the response is not valid HTTP")]
    Exchange(#[source] hyper::Error),
    #[error("HTTP {0}; the server redirects, which is not followed")]
    Redirect(u16),
    #[error("HTTP {0}")]
    Status(u16),
    #[error("the page has more than {MAX_PAGE_BYTES} bytes")]
    TooLarge,
    #[error("the page cannot be received")]
    Receive(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the page has none of the metrics of {0}; some engines need a flag for them, such as --enable-metrics of SGLang")]
    NoMetrics(String),
    #[error("the agent is stopping")]
    Stopping,
}

/// The values of the page of a server in the network namespace of a process.
pub async fn read(
    sockets: &Arc<NamespaceSockets>,
    process: (u32, BootNs),
    address: SocketAddr,
    rules: &EngineRules,
) -> Result<EngineValues, ReadPageError> {
    let family = if address.is_ipv4() { SocketFamily::V4 } else { SocketFamily::V6 };
    let sockets = Arc::clone(sockets);
    // Reads /proc, and waits for the helper.
    let socket = tokio::task::spawn_blocking(move || sockets.make(process.0, process.1, family));
    let socket = socket.await.map_err(|_| ReadPageError::Stopping)??;
    let exchange = async {
        let socket = TcpSocket::from_std_stream(std::net::TcpStream::from(socket));
        let connected = timeout(CONNECT_TIMEOUT, socket.connect(address)).await;
        let stream = connected.map_err(|_| ReadPageError::ConnectTimeout)?.map_err(ReadPageError::Connect)?;
        get(stream, address, rules).await
    };
    timeout(TIMEOUT, exchange).await.unwrap_or(Err(ReadPageError::Timeout))
}

async fn get(stream: TcpStream, address: SocketAddr, rules: &EngineRules) -> Result<EngineValues, ReadPageError> {
    let mut client = http1::Builder::new();
    client.max_buf_size(MAX_HEAD_BYTES);
    let (mut sender, connection) = client.handshake(TokioIo::new(stream)).await.map_err(ReadPageError::Exchange)?;
    // The connection's task ends on drop, also after a timeout.
    let mut task = JoinSet::new();
    task.spawn(connection);
    let request = hyper::Request::get(&*rules.path)
        .header(HOST, address.to_string())
        .header(USER_AGENT, concat!("gpu-sampler/", env!("CARGO_PKG_VERSION")))
        .header(ACCEPT, "text/plain;version=0.0.4")
        .header(CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| ReadPageError::Receive(error.into()))?;
    let response = sender.send_request(request).await.map_err(ReadPageError::Exchange)?;
    match response.status().as_u16() {
        200 => {}
        status @ 300..400 => return Err(ReadPageError::Redirect(status)),
        status => return Err(ReadPageError::Status(status)),
    }
    // The length that its head states.
    if response.body().size_hint().lower() > MAX_PAGE_BYTES as u64 {
        return Err(ReadPageError::TooLarge);
    }
    let mut body = Limited::new(response.into_body(), MAX_PAGE_BYTES);
    let mut parser = PageParser::new(rules);
    while let Some(frame) = body.frame().await {
        match frame {
            // Trailers are not part of the page.
            Ok(frame) => parser.push(frame.data_ref().map_or(&[][..], |data| &data[..])),
            Err(error) if error.is::<LengthLimitError>() => return Err(ReadPageError::TooLarge),
            Err(error) => return Err(ReadPageError::Receive(error)),
        }
    }
    let values = parser.end();
    if values.is_empty() { Err(ReadPageError::NoMetrics(rules.name.clone())) } else { Ok(values) }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::time::Instant;

    use super::*;
    use crate::error::display_chain;
    use crate::observe::kernel::proc::living_thread;

    /// What is read from a server that answers with these bytes, again and again if `repeated`.
    fn page(response: &'static str, repeated: bool) -> Result<EngineValues, ReadPageError> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            let _request = stream.read(&mut request);
            while stream.write_all(response.as_bytes()).is_ok() && repeated {}
            // Until the other side closes.
            let _end = stream.read(&mut request);
        });
        let sockets = Arc::new(NamespaceSockets { procfs: "/proc".into(), helper: None });
        let (_, start) = living_thread(std::path::Path::new("/proc/self")).unwrap().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let rules = "x=/metrics,a=waiting".parse().unwrap();
        runtime.block_on(read(&sockets, (std::process::id(), start), address, &rules))
    }

    fn fails(response: &'static str, repeated: bool, expect: &str) {
        let begun = Instant::now();
        let error = display_chain(&page(response, repeated).unwrap_err());
        assert!(error.contains(expect), "{response}: {error}");
        assert!(begun.elapsed() < TIMEOUT + CONNECT_TIMEOUT, "{response}");
    }

    #[test]
    fn a_page_is_read_and_every_other_response_is_an_error() {
        let read = page("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\na 1\n", false).unwrap();
        assert_eq!(read.waiting, Some(1.0));
        let parts =
            page("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\na \r\n3\r\n2\na\r\n2\r\n 3\r\n0\r\n\r\n", false);
        assert_eq!(parts.unwrap().waiting, Some(5.0));
        fails("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nb 1\n", false, "none of the metrics of x");
        fails("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", false, "HTTP 500");
        fails("HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n", false, "not followed");
        fails("HTTP/1.1 200 OK\r\nContent-Length: 4294967296\r\n\r\n", false, "more than 1048576 bytes");
        fails("SSH-2.0-OpenSSH_9.6\r\n", false, "not valid HTTP");
        fails("HTTP/1.1 200 OK\r\nX: y\r\n", false, "no complete page within");
    }

    #[test]
    fn an_endless_body_and_an_endless_head_end_at_their_bounds() {
        fails("HTTP/1.1 200 OK\r\n\r\nxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", true, "more than");
        fails("HTTP/1.1 200 OK\r\nX: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy", true, "not valid HTTP");
    }
}
