//! HTTP GET over a Unix socket. The connection of a complete response is kept for [`KEPT_FOR`] where that is wanted: on a busy node a
//! connection costs more than its query. A request that fails on a kept connection is repeated on a new one, and one that hangs takes its
//! connection with it, so that a runtime that hung or was replaced does not affect later requests.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::HeaderValue;
use hyper_util::rt::TokioIo;
use sampler_labels::ABSENT;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::task::JoinSet;

use super::file::is_absent;
use super::reply::SourceReply;
use crate::error::display_chain;
use crate::labels::activation::{ActivationGuard, ConnectError, Dormant};

/// The inspect record of a container with a thousand labels is 100 KiB.
pub const MAX_BODY_BYTES: usize = 4 << 20;
/// Longer texts of errors are truncated.
const MAX_ERROR_CHARS: usize = 200;
/// How long an engine holds a connection for nothing.
const KEPT_FOR: Duration = Duration::from_secs(2);

/// The failure of a request.
#[derive(Debug, Error)]
pub enum HttpClientError {
    /// The socket does not exist, or was removed since it was last seen; not a failure of a server.
    #[error(transparent)]
    NoSocket(io::Error),
    #[error("{0}")]
    Dormant(Dormant),
    /// Connection refused or permission denied.
    #[error(transparent)]
    Connect(io::Error),
    /// The connection failed during the request, or the response is invalid or too large.
    #[error(transparent)]
    Exchange(Box<dyn Error + Send + Sync>),
    #[error("no such object")]
    NotFound,
    #[error("HTTP {status} {text}")]
    Status { status: u16, text: String },
    #[error("invalid record in the response")]
    Record(#[source] serde_json::Error),
}

impl From<HttpClientError> for SourceReply {
    fn from(error: HttpClientError) -> Self {
        match error {
            HttpClientError::NoSocket(_) => SourceReply::not_queried(ABSENT),
            HttpClientError::Dormant(dormant) => SourceReply::not_queried(dormant),
            HttpClientError::NotFound => SourceReply::not_found(),
            error => SourceReply::error(display_chain(&error)),
        }
    }
}

/// An open connection to the server.
struct EngineConnection {
    sender: SendRequest<Empty<Bytes>>,
    /// The connection's task; ends on drop, also if the request is cancelled.
    _task: JoinSet<hyper::Result<()>>,
}

impl EngineConnection {
    async fn new(stream: UnixStream) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        let mut task = JoinSet::new();
        task.spawn(connection);
        Ok(Self { sender, _task: task })
    }

    /// Returns status and body. `is_last`: the server is asked to close the connection afterwards.
    async fn get(&mut self, path: &str, is_last: bool) -> Result<(u16, Bytes), Box<dyn Error + Send + Sync>> {
        let connection = HeaderValue::from_static(if is_last { "close" } else { "keep-alive" });
        let request = hyper::Request::get(path).header("Host", "localhost").header("Connection", connection);
        let response = self.sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), MAX_BODY_BYTES).collect().await?;
        Ok((status, body.to_bytes()))
    }
}

/// The connection without a request.
#[derive(Default)]
struct KeptConnection {
    connection: Option<EngineConnection>,
    idle_since: Option<Instant>,
    /// A task closes the connection when its time is over.
    is_watched: bool,
}

type SharedKept = Arc<Mutex<KeptConnection>>;

fn lock(kept: &SharedKept) -> MutexGuard<'_, KeptConnection> {
    // Poisoning is ignored: nothing that runs with the lock held can panic half way.
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A client of one socket.
pub struct HttpClient {
    guard: Arc<ActivationGuard>,
    socket: PathBuf,
    /// `None` if no connection is to be kept.
    kept: Option<SharedKept>,
}

impl HttpClient {
    /// Each request has a connection of its own.
    pub fn new(guard: &Arc<ActivationGuard>, socket: &Path) -> Self {
        Self { guard: Arc::clone(guard), socket: socket.to_owned(), kept: None }
    }

    /// Connections are kept for a moment. Not for an engine that ends when it has no client.
    pub fn keeping(guard: &Arc<ActivationGuard>, socket: &Path) -> Self {
        Self { kept: Some(SharedKept::default()), ..Self::new(guard, socket) }
    }

    /// Returns status and body.
    async fn get(&self, path: &str) -> Result<(u16, Bytes), HttpClientError> {
        let kept = self.kept.as_ref().and_then(|kept| lock(kept).connection.take());
        if let Some(mut connection) = kept.filter(|connection| !connection.sender.is_closed())
            && let Ok(reply) = connection.get(path, false).await
        {
            self.keep(connection);
            return Ok(reply);
        }
        let stream = match self.guard.connect(&self.socket).await {
            Ok(stream) => stream,
            Err(ConnectError::Dormant(dormant)) => return Err(HttpClientError::Dormant(dormant)),
            Err(ConnectError::Io(error)) if is_absent(&error) => return Err(HttpClientError::NoSocket(error)),
            Err(ConnectError::Io(error)) => return Err(HttpClientError::Connect(error)),
        };
        let mut connection = EngineConnection::new(stream).await.map_err(HttpClientError::Exchange)?;
        let reply = connection.get(path, self.kept.is_none()).await.map_err(HttpClientError::Exchange)?;
        self.keep(connection);
        Ok(reply)
    }

    /// Keeps one connection, if any is to be kept.
    fn keep(&self, connection: EngineConnection) {
        let Some(kept) = &self.kept else { return };
        let mut state = lock(kept);
        (state.connection, state.idle_since) = (Some(connection), Some(Instant::now()));
        if !std::mem::replace(&mut state.is_watched, true) {
            tokio::spawn(close_idle(Arc::clone(kept)));
        }
    }

    /// Gets and decodes a record. Any status other than 200, and an invalid record, is an error.
    pub async fn record<T: DeserializeOwned>(&self, path: &str) -> Result<T, HttpClientError> {
        match self.get(path).await? {
            (200, body) => serde_json::from_slice(&body).map_err(HttpClientError::Record),
            (404, _) => Err(HttpClientError::NotFound),
            (status, body) => {
                let text = String::from_utf8_lossy(&body).trim().chars().take(MAX_ERROR_CHARS).collect();
                Err(HttpClientError::Status { status, text })
            }
        }
    }

    /// Checks that the server responds with a status other than 5xx.
    pub async fn check_responds(&self, path: &str) -> Result<(), String> {
        match self.get(path).await {
            Ok((status, _)) if status < 500 => Ok(()),
            Ok((status, _)) => Err(format!("HTTP {status}")),
            Err(error) => Err(display_chain(&error)),
        }
    }
}

/// Closes the connection once it has been idle for [`KEPT_FOR`]. Ends when there is none.
async fn close_idle(kept: SharedKept) {
    let mut wait = KEPT_FOR;
    loop {
        tokio::time::sleep(wait).await;
        let mut state = lock(&kept);
        let idle_for = state.idle_since.map_or(KEPT_FOR, |since| since.elapsed());
        if state.connection.is_none() || idle_for >= KEPT_FOR {
            (state.connection, state.is_watched) = (None, false);
            return;
        }
        wait = KEPT_FOR - idle_for;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::sync::mpsc;

    use super::*;
    use crate::labels::root::Root;

    /// Answers one request; returns whether the client wants to keep the connection. `None` if it was closed.
    fn answer(stream: &mut UnixStream, body: &str) -> Option<bool> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            if stream.read(&mut byte).unwrap() == 0 {
                return None;
            }
            head.push(byte[0]);
        }
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        Some(String::from_utf8(head).unwrap().contains("keep-alive"))
    }

    fn client(dir: &Path, of: fn(&Arc<ActivationGuard>, &Path) -> HttpClient) -> HttpClient {
        let guard = Arc::new(ActivationGuard::new(Path::new("/proc"), Root::new(Path::new("/"))));
        of(&guard, &dir.join("s"))
    }

    async fn get(client: &HttpClient) -> u32 {
        client.record::<u32>("/").await.unwrap()
    }

    #[tokio::test]
    async fn a_connection_is_kept_for_a_moment_and_replaced_when_it_fails() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let (to, seen) = mpsc::channel();
        std::thread::spawn(move || {
            // Two on the first connection, which then ends as that of a server that was replaced.
            let (mut first, _) = listener.accept().unwrap();
            to.send(answer(&mut first, "1")).unwrap();
            to.send(answer(&mut first, "2")).unwrap();
            drop(first);
            // The client closes the second one.
            let (mut second, _) = listener.accept().unwrap();
            to.send(answer(&mut second, "3")).unwrap();
            to.send(answer(&mut second, "-")).unwrap();
        });
        let client = client(dir.path(), HttpClient::keeping);
        for n in 1..=3 {
            assert_eq!(get(&client).await, n);
        }
        tokio::time::sleep(KEPT_FOR * 2).await;
        assert_eq!(seen.iter().collect::<Vec<_>>(), [Some(true), Some(true), Some(true), None]);
    }

    #[tokio::test]
    async fn other_clients_close_their_connection() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            (answer(&mut stream, "1"), answer(&mut stream, "-"))
        });
        assert_eq!(get(&client(dir.path(), HttpClient::new)).await, 1);
        assert_eq!(server.join().unwrap(), (Some(false), None));
    }
}
