//! Accepts connections, with TLS where it is configured, and serves each in its own task.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt as _;

use super::connections::{Connections, OpenConnection};
use super::guard::Connection;
use super::http::router;
use super::rejections::RejectionReason;
use super::state::AppState;
use super::timed_stream::{StreamLimits, TimedStream};
use crate::security::Rules;
use crate::security::tls::PLAIN_HTTP;

/// Interval at which the ledger adds credits without scrapes: far less than the minute for which ended containers are kept.
const LEDGER_EVERY: Duration = Duration::from_secs(5);
/// Memory of a connection for heads; those of scrapers have less than 1 KiB.
const MAX_HEAD_BYTES: usize = 32 << 10;
/// Pause after a failed accept; the likely cause is a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Time limit for responses in flight when the agent stops.
const GRACE: Duration = Duration::from_secs(2);
/// From the start of a connection to the end of its TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The first byte of every TLS connection: a handshake record.
const TLS_HANDSHAKE: u8 = 0x16;

#[derive(Debug, Error)]
pub enum HttpError {
    #[error("cannot listen on {listen}; choose a free address of this machine with --listen")]
    Bind { listen: SocketAddr, source: io::Error },
    #[error("the HTTP server failed")]
    Serve(#[source] io::Error),
}

/// A listening socket that does not block.
pub fn bind(listen: SocketAddr) -> Result<std::net::TcpListener, HttpError> {
    let bound = std::net::TcpListener::bind(listen).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    bound.map_err(|source| HttpError::Bind { listen, source })
}

pub async fn serve(listener: TcpListener, state: Arc<AppState>, stop: impl Future<Output = ()>) -> Result<(), HttpError> {
    let router = router(&state);
    let (end, ended) = oneshot::channel::<()>();
    let served = tokio::spawn(accept(listener, router, Arc::clone(&state), ended));
    let ledger_updates = tokio::spawn(async move {
        let mut interval = tokio::time::interval(LEDGER_EVERY);
        loop {
            interval.tick().await;
            // A scraper that keeps its connection finds it closed then, not its request rejected.
            state.security.current().await;
            let mut ledger = state.ledger();
            let (snapshot, labels) = (state.snapshot.load_full(), state.labels.view());
            ledger.update(&snapshot, &labels);
        }
    });
    stop.await;
    drop(end);
    ledger_updates.abort();
    // A client that keeps its connection open must not keep the agent running.
    match tokio::time::timeout(GRACE, served).await {
        Ok(Err(join)) => Err(HttpError::Serve(io::Error::other(join))),
        Ok(Ok(())) | Err(_) => Ok(()),
    }
}

/// Serves each connection in its own task until `ended`, then waits for responses in flight.
async fn accept(listener: TcpListener, router: Router, state: Arc<AppState>, mut ended: oneshot::Receiver<()>) {
    let (open, connections) = (Connections::default(), GracefulShutdown::new());
    let mut generations = state.security.generations();
    loop {
        let accepted = tokio::select! {
            // Sent or dropped: both mean stop.
            _ = &mut ended => break,
            // Those with a request end after its response.
            changed = generations.changed() => {
                if changed.is_ok() {
                    open.end_idle(*generations.borrow_and_update());
                }
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept an HTTP connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let this = open.open(peer.ip(), Instant::now());
        let served = ConnectionTask {
            router: router.clone(),
            state: Arc::clone(&state),
            open: open.clone(),
            watcher: connections.watcher(),
        };
        tokio::spawn(async move {
            let (id, end) = (this.id, Arc::clone(&this.end));
            let state = Arc::clone(&served.state);
            tokio::select! {
                () = served.run(stream, &this) => {}
                () = end.notified() => tracing::debug!(peer = %this.peer, "HTTP connection gives its place to another, or has to be renewed"),
            }
            state.ledger().scrapers.closed(id);
        });
    }
    connections.shutdown().await;
}

struct ConnectionTask {
    router: Router,
    state: Arc<AppState>,
    open: Connections,
    watcher: Watcher,
}

impl ConnectionTask {
    async fn run(self, stream: TcpStream, this: &OpenConnection) {
        let rules = self.state.security.current().await;
        self.open.set_generation(this.id, rules.generation);
        let of_request =
            Connection { id: this.id, peer: this.peer, is_tls: false, certificates: None, generation: rules.generation };
        if rules.tls().is_none() {
            return self.serve(stream, of_request).await;
        }
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(stream, &rules)).await {
            Ok(Ok(stream)) => {
                let certificates =
                    stream.get_ref().1.peer_certificates().filter(|_| rules.tls().is_some_and(|tls| tls.verifies_clients));
                let certificates = certificates.map(Into::into);
                self.serve(stream, Connection { is_tls: true, certificates, ..of_request }).await;
            }
            Ok(Err(HandshakeFailure::Closed)) => {}
            Ok(Err(HandshakeFailure::PlainHttp(mut stream))) => {
                let message = "plain HTTP, but this port has TLS: use https://";
                self.state.rejections.record(RejectionReason::PlainHttp, this.peer, message);
                refuse_plain_http(&mut stream).await;
            }
            Ok(Err(HandshakeFailure::Tls(error))) => {
                let message = format!("the TLS handshake failed: {error}");
                self.state.rejections.record(RejectionReason::TlsHandshake, this.peer, &message);
            }
            Err(_) => {
                let message = format!("no TLS handshake within {} s", HANDSHAKE_TIMEOUT.as_secs());
                self.state.rejections.record(RejectionReason::TlsHandshake, this.peer, &message);
            }
        }
    }

    async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self, stream: S, of_request: Connection) {
        let (stream, phase) = TimedStream::new(stream, StreamLimits::SERVER);
        let id = of_request.id;
        let service = self.router.map_request(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(of_request.clone());
            request
        });
        let open = self.open;
        let service = tower::service_fn(move |request| {
            let (in_progress, service) = ((open.begin_request(id), phase.begin_request()), service.clone());
            async move {
                let response = service.oneshot(request).await?;
                // Until the last part of the body was taken.
                Ok::<_, Infallible>(response.map(|body| {
                    Body::new(body.map_frame(move |frame| {
                        let _held = &in_progress;
                        frame
                    }))
                }))
            }
        });
        let mut server = http1::Builder::new();
        // A client that never completes its request must not hold a file descriptor forever: the stream has the time limits.
        server.header_read_timeout(None).max_buf_size(MAX_HEAD_BYTES);
        let connection = server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
        if let Err(error) = self.watcher.watch(connection).await {
            tracing::debug!(%error, "HTTP connection failed");
        }
    }
}

enum HandshakeFailure {
    /// Without a byte from the client, as a port check does.
    Closed,
    PlainHttp(TcpStream),
    Tls(io::Error),
}

/// The stream within TLS.
async fn handshake(stream: TcpStream, rules: &Rules) -> Result<tokio_rustls::server::TlsStream<TcpStream>, HandshakeFailure> {
    let Some(tls) = rules.tls() else { return Err(HandshakeFailure::PlainHttp(stream)) };
    let mut first = [0];
    match stream.peek(&mut first).await {
        Ok(0) | Err(_) => return Err(HandshakeFailure::Closed),
        Ok(_) if first[0] != TLS_HANDSHAKE => return Err(HandshakeFailure::PlainHttp(stream)),
        Ok(_) => {}
    }
    TlsAcceptor::from(Arc::clone(&tls.server)).accept(stream).await.map_err(HandshakeFailure::Tls)
}

async fn refuse_plain_http(stream: &mut TcpStream) {
    let answered = async {
        stream.write_all(PLAIN_HTTP.as_bytes()).await?;
        stream.shutdown().await?;
        // With unread bytes the kernel would reset the connection, and the client might lose the answer.
        let mut rest = [0; 4096];
        let mut left = MAX_HEAD_BYTES;
        while left > 0 {
            match stream.read(&mut rest).await? {
                0 => break,
                read => left = left.saturating_sub(read),
            }
        }
        io::Result::Ok(())
    };
    // The client may be gone, or send on forever.
    let _ended = tokio::time::timeout(GRACE, answered).await;
}
