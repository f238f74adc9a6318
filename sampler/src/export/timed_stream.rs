//! The time limits of a connection. hyper has one limit for a head and for the wait before it together, so they are kept here, at the
//! stream that it reads:
//!
//! ```text
//!  Idle --a byte--> Head --complete: the service is called--> Request --the last part of the response was taken--> Idle
//!   |                |                                          \--and bytes had arrived beyond its head--> Head
//!   | idle           | head                                    while the client takes nothing of the response: write
//!   v                v
//!  the read fails, and hyper closes the connection
//! ```
//! The body of a request is part of the request: the handler that reads it limits its time. Bytes beyond a head may be a body or the next
//! head; both get the limit of a head, so a connection that has sent a body is closed sooner when it is idle.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

#[derive(Clone, Copy, Debug)]
pub struct StreamLimits {
    /// From the start of the connection, or the end of a response, to the first byte of the next head.
    pub idle: Duration,
    /// From the first byte of a head to its last.
    pub head: Duration,
    /// Time in which the client takes nothing of a response.
    pub write: Duration,
}

impl StreamLimits {
    /// A scraper that scrapes every two minutes keeps its connection; an idle one costs little, and gives its place to a new one when
    /// there are many. A head has less than 1 KiB and arrives in one or two packets. Scrapers give up a page after their timeout, which is
    /// at most their interval.
    pub const SERVER: Self =
        Self { idle: Duration::from_secs(150), head: Duration::from_secs(10), write: Duration::from_secs(60) };
}

#[derive(Clone, Copy, Debug)]
enum RequestPhase {
    Idle { since: Instant },
    Head { since: Instant },
    Request { has_more: bool },
}

#[derive(Debug)]
struct PhaseState {
    phase: RequestPhase,
    /// The newest bytes that were read outside a request.
    last: [u8; 3],
}

/// The phase of one connection, as its stream and its service see it.
#[derive(Clone, Debug)]
pub struct ConnectionPhase(Arc<Mutex<PhaseState>>);

/// A request that has no complete response yet.
#[derive(Debug)]
pub struct OpenRequest(ConnectionPhase);

impl ConnectionPhase {
    fn state(&self) -> MutexGuard<'_, PhaseState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A head is complete.
    pub fn begin_request(&self) -> OpenRequest {
        let mut state = self.state();
        // A head ends with an empty line. With anything after it, hyper may have the beginning of the next one in its buffer.
        let has_more = !(state.last.ends_with(b"\n\n") || state.last.ends_with(b"\n\r\n"));
        state.phase = RequestPhase::Request { has_more };
        drop(state);
        OpenRequest(self.clone())
    }

    fn received(&self, bytes: &[u8]) {
        let mut state = self.state();
        match &mut state.phase {
            RequestPhase::Request { has_more } => *has_more |= !bytes.is_empty(),
            RequestPhase::Idle { .. } if !bytes.is_empty() => state.phase = RequestPhase::Head { since: Instant::now() },
            RequestPhase::Idle { .. } | RequestPhase::Head { .. } => {}
        }
        if !matches!(state.phase, RequestPhase::Request { .. }) {
            for byte in &bytes[bytes.len().saturating_sub(3)..] {
                state.last = [state.last[1], state.last[2], *byte];
            }
        }
    }

    fn read_deadline(&self, limits: &StreamLimits) -> Option<Instant> {
        match self.state().phase {
            RequestPhase::Idle { since } => Some(since + limits.idle),
            RequestPhase::Head { since } => Some(since + limits.head),
            RequestPhase::Request { .. } => None,
        }
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        let mut state = self.0.state();
        let since = Instant::now();
        state.phase = match state.phase {
            RequestPhase::Request { has_more: true } => RequestPhase::Head { since },
            _ => RequestPhase::Idle { since },
        };
    }
}

/// A stream of which reads fail when a client exceeds the limits of its phase, and writes when it takes nothing.
pub struct TimedStream<S> {
    inner: S,
    limits: StreamLimits,
    phase: ConnectionPhase,
    read_timer: Timer,
    write_timer: Timer,
    /// When the client last stopped taking bytes.
    stalled: Option<Instant>,
}

#[derive(Default)]
struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    fn poll(&mut self, deadline: Instant, cx: &mut Context<'_>) -> Poll<()> {
        let deadline = deadline.into();
        let sleep = self.0.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if sleep.deadline() != deadline {
            sleep.as_mut().reset(deadline);
        }
        sleep.as_mut().poll(cx)
    }
}

impl<S> TimedStream<S> {
    pub fn new(inner: S, limits: StreamLimits) -> (Self, ConnectionPhase) {
        let idle = RequestPhase::Idle { since: Instant::now() };
        let phase = ConnectionPhase(Arc::new(Mutex::new(PhaseState { phase: idle, last: [0; 3] })));
        let (read_timer, write_timer) = (Timer::default(), Timer::default());
        (Self { inner, limits, phase: phase.clone(), read_timer, write_timer, stalled: None }, phase)
    }

    /// The result of a write, or an error if writes have been pending for too long.
    fn limited_write(&mut self, written: Poll<io::Result<usize>>, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let since = *self.stalled.get_or_insert_with(Instant::now);
        self.write_timer.poll(since + self.limits.write, cx).map(|()| Err(timed_out("a client takes nothing of its response")))
    }
}

fn timed_out(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, what)
}

impl<S: AsyncRead + Unpin> AsyncRead for TimedStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        if let Poll::Ready(result) = Pin::new(&mut self.inner).poll_read(cx, buf) {
            self.phase.received(&buf.filled()[before..]);
            return Poll::Ready(result);
        }
        let Some(deadline) = self.phase.read_deadline(&self.limits) else { return Poll::Pending };
        self.read_timer.poll(deadline, cx).map(|()| Err(timed_out("no complete request arrived in time")))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TimedStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.limited_write(written, cx)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, parts: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(cx, parts);
        self.limited_write(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use axum::body::Body;
    use axum::http::{Request, Response};
    use http_body_util::BodyExt as _;
    use hyper::body::Incoming;
    use hyper::server::conn::http1;
    use hyper_util::rt::TokioIo;
    use tokio::net::UnixStream;
    use tokio::task::JoinHandle;

    use super::*;

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    const BODY: &[u8] = b"the body";
    const NEVER: Duration = Duration::from_secs(3600);
    const SOON: Duration = Duration::from_millis(50);
    /// Far more than `SOON`.
    const LATER: Duration = Duration::from_millis(400);
    const PATIENCE: Duration = Duration::from_secs(20);
    const NO_LIMITS: StreamLimits = StreamLimits { idle: NEVER, head: NEVER, write: NEVER };

    struct TestClient {
        stream: UnixStream,
        server: JoinHandle<hyper::Result<()>>,
    }

    /// A connection to a server that responds to each request with `body`.
    fn connect(limits: StreamLimits, body: &'static [u8]) -> TestClient {
        let (stream, served) = UnixStream::pair().unwrap();
        let (served, phase) = TimedStream::new(served, limits);
        let service = hyper::service::service_fn(move |_: Request<Incoming>| {
            let open = phase.begin_request();
            async move {
                Ok::<_, Infallible>(Response::new(Body::new(Body::from(body).map_frame(move |frame| {
                    let _held = &open;
                    frame
                }))))
            }
        });
        let server = tokio::spawn(async move { http1::Builder::new().serve_connection(TokioIo::new(served), service).await });
        TestClient { stream, server }
    }

    impl TestClient {
        async fn send(&self, mut bytes: &[u8]) {
            while !bytes.is_empty() {
                self.stream.writable().await.unwrap();
                match self.stream.try_write(bytes) {
                    Ok(n) => bytes = &bytes[n..],
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                }
            }
        }

        /// Reads to the end of a response.
        async fn response(&self) {
            let mut read = Vec::new();
            // The last chunk.
            while !read.ends_with(b"\r\n0\r\n\r\n") {
                self.stream.readable().await.unwrap();
                let mut part = [0; 4096];
                match self.stream.try_read(&mut part) {
                    Ok(0) => panic!("closed after {:?}", String::from_utf8_lossy(&read)),
                    Ok(n) => read.extend(&part[..n]),
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                }
            }
        }

        /// Waits until the server has closed the connection, without a byte of a response.
        async fn closed(self) {
            // Not an error if the connection was idle.
            let _ended = tokio::time::timeout(PATIENCE, self.server).await.expect("the connection stays open").unwrap();
            loop {
                self.stream.readable().await.unwrap();
                match self.stream.try_read(&mut [0; 1]) {
                    Ok(read) => break assert_eq!(read, 0),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    // With bytes that the server has not read.
                    Err(error) => break assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
                }
            }
        }

        async fn is_open_later(&self) -> bool {
            tokio::time::sleep(LATER).await;
            !self.server.is_finished()
        }
    }

    #[tokio::test]
    async fn a_head_that_does_not_end_is_given_up_and_an_idle_connection_is_not() {
        let limits = StreamLimits { head: SOON, ..NO_LIMITS };
        let (idle, between, begun) = (connect(limits, BODY), connect(limits, BODY), connect(limits, BODY));
        between.send(REQUEST).await;
        between.response().await;
        begun.send(b"GET / HT").await;
        begun.closed().await;
        assert!(idle.is_open_later().await && between.is_open_later().await);
        // They can be used after this time, more than once.
        for client in [&idle, &between, &between] {
            client.send(REQUEST).await;
            client.response().await;
        }
        assert!(between.is_open_later().await);
        between.send(b"G").await;
        between.closed().await;
    }

    #[tokio::test]
    async fn a_head_that_arrives_byte_by_byte_has_the_same_limit() {
        let client = connect(StreamLimits { head: LATER, ..NO_LIMITS }, BODY);
        let from = Instant::now();
        client.send(b"GET / HTTP/1.1\r\n").await;
        while !client.server.is_finished() {
            assert!(from.elapsed() < PATIENCE, "the connection stays open");
            if client.stream.try_write(b"A:b\r\n").is_err() {
                break;
            }
            tokio::time::sleep(LATER / 20).await;
        }
        client.closed().await;
        assert!(from.elapsed() >= LATER);
    }

    #[tokio::test]
    async fn a_head_that_begins_behind_another_request_has_the_same_limit() {
        let limits = StreamLimits { head: SOON, ..NO_LIMITS };
        let (half, whole) = (connect(limits, BODY), connect(limits, BODY));
        half.send(&[REQUEST, b"GET / HTTP/1.1\r\n"].concat()).await;
        half.response().await;
        half.closed().await;
        whole.send(&[REQUEST, REQUEST].concat()).await;
        whole.response().await;
        assert!(whole.is_open_later().await);
    }

    #[tokio::test]
    async fn an_idle_connection_is_closed_after_its_limit() {
        let limits = StreamLimits { idle: SOON, ..NO_LIMITS };
        let (unused, used) = (connect(limits, BODY), connect(limits, BODY));
        used.send(REQUEST).await;
        used.response().await;
        used.closed().await;
        unused.closed().await;
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_of_its_response_is_given_up() {
        static LARGE: [u8; 8 << 20] = [b'x'; 8 << 20];
        let client = connect(StreamLimits { write: SOON, ..NO_LIMITS }, &LARGE);
        client.send(REQUEST).await;
        let ended = tokio::time::timeout(PATIENCE, client.server).await.expect("the connection stays open");
        assert!(ended.unwrap().is_err());
    }
}
