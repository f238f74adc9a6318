//! Unary gRPC calls over a Unix socket. The calls of one query share a connection, and no two queries do.
//!
//! Nothing is opened at construction, so an endpoint may appear, restart or move at any time. On a connection that all queries share, a
//! server that hung once would block all later calls. The connection's tasks end with it, also if the future of a call is dropped, so a
//! caller's timeout leaves no task behind.
//!
//! The caller sets the timeout. There are no retries and no streams.

use std::error::Error as _;
use std::fmt::Debug;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::client::conn::http2::SendRequest;
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use tokio::task::JoinSet;
use tonic::Code;

use super::file::is_absent;
use crate::labels::activation::{ActivationGuard, ConnectError, Dormant};

/// The longest expected response of most servers: some hundred bytes for each pod of the node.
const MAX_RESPONSE_BYTES: usize = 4 << 20;

/// A server behind a Unix socket.
#[derive(Debug)]
pub struct GrpcSocket {
    pub path: PathBuf,
    guard: Arc<ActivationGuard>,
    max_response_bytes: usize,
}

/// A response with one object in field 1.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ObjectResponse<T: prost::Message + Debug + Default> {
    #[prost(message, optional, tag = "1")]
    pub object: Option<T>,
}

/// A response with a list in field 1.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ListResponse<T: prost::Message + Debug + Default> {
    #[prost(message, repeated, tag = "1")]
    pub items: Vec<T>,
}

/// The failure of a call. Each message names the endpoint, and the method if a call was made.
#[derive(Debug, thiserror::Error)]
pub enum GrpcError {
    /// The socket does not exist; not a failure of a server.
    #[error("unix://{}: no such socket", path.display())]
    NoSocket { path: PathBuf },
    #[error("unix://{}: {reason}", path.display())]
    Dormant { path: PathBuf, reason: Dormant },
    /// Connection refused or permission denied. A socket without a server counts as failing.
    #[error("unix://{}: cannot connect", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("unix://{} {method}: no response within {} ms", path.display(), after.as_millis())]
    Timeout { path: PathBuf, method: String, after: Duration },
    #[error("unix://{} {method}: {:?}: {}", path.display(), status.code(), status_text(status))]
    Status { path: PathBuf, method: String, status: Box<tonic::Status> },
}

impl GrpcError {
    pub fn code(&self) -> Option<Code> {
        match self {
            GrpcError::Status { status, .. } => Some(status.code()),
            _ => None,
        }
    }

    /// The server does not implement the service or method.
    pub fn is_unimplemented(&self) -> bool {
        self.code() == Some(Code::Unimplemented)
    }

    /// The error is about the request, so the server implements the method. Other errors may come from the transport, from a proxy, or from
    /// a server that is starting.
    pub fn shows_method(&self) -> bool {
        let is_about_request = |code| matches!(code, Code::InvalidArgument | Code::FailedPrecondition | Code::ResourceExhausted);
        self.is_not_found() || self.code().is_some_and(is_about_request)
    }

    /// The server does not have the requested object. Early CRI servers report this only in the text of the message.
    pub fn is_not_found(&self) -> bool {
        let GrpcError::Status { status, .. } = self else { return false };
        let in_message = || {
            let message = status.message().to_ascii_lowercase();
            ["not found", "does not exist", "no such container"].iter().any(|text| message.contains(text))
        };
        match status.code() {
            Code::NotFound => true,
            // With an error as its source, the message is the transport's.
            Code::Unknown => status.source().is_none() && in_message(),
            _ => false,
        }
    }
}

/// The status's message with the causes of a transport error, since "http2 error" alone is not useful.
fn status_text(status: &tonic::Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = status.source().and_then(|error| error.source());
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

impl GrpcSocket {
    pub fn new(path: impl Into<PathBuf>, guard: Arc<ActivationGuard>) -> Self {
        Self { path: path.into(), guard, max_response_bytes: MAX_RESPONSE_BYTES }
    }

    pub fn with_responses_of(self, max_response_bytes: usize) -> Self {
        Self { max_response_bytes, ..self }
    }

    /// A connection for successive calls.
    pub fn connection(&self) -> GrpcConnection<'_> {
        GrpcConnection { socket: self, open: tokio::sync::Mutex::default() }
    }

    /// A call on its own connection, as [`GrpcConnection::call`].
    pub async fn call<Q, A>(&self, method: &str, request: Q, header: Option<(&'static str, &str)>) -> Result<A, GrpcError>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        self.connection().call(method, request, header).await
    }
}

/// A connection that the first call opens, and the next call after it was closed.
pub struct GrpcConnection<'a> {
    socket: &'a GrpcSocket,
    open: tokio::sync::Mutex<Option<SharedConnection>>,
}

struct SharedConnection {
    sender: SendRequest<tonic::body::Body>,
    _end: EndOnDrop,
}

impl GrpcConnection<'_> {
    async fn sender(&self, method: &str) -> Result<SendRequest<tonic::body::Body>, GrpcError> {
        let mut open = self.open.lock().await;
        if let Some(open) = open.as_ref().filter(|open| !open.sender.is_closed()) {
            return Ok(open.sender.clone());
        }
        let path = || self.socket.path.clone();
        let stream = self.socket.guard.connect(&self.socket.path).await.map_err(|error| match error {
            ConnectError::Dormant(reason) => GrpcError::Dormant { path: path(), reason },
            ConnectError::Io(source) if is_absent(&source) => GrpcError::NoSocket { path: path() },
            ConnectError::Io(source) => GrpcError::Connect { path: path(), source },
        })?;
        let tasks = Tasks::default();
        let end = EndOnDrop(tasks.clone());
        let handshake = hyper::client::conn::http2::handshake(tasks.clone(), TokioIo::new(stream)).await;
        let (sender, connection) = handshake.map_err(|error| {
            let status = Box::new(tonic::Status::from_error(error.into()));
            GrpcError::Status { path: path(), method: method.to_owned(), status }
        })?;
        // An error of the connection is reported by the request.
        tasks.spawn(async { drop(connection.await) });
        *open = Some(SharedConnection { sender: sender.clone(), _end: end });
        Ok(sender)
    }

    /// Calls `method`, such as `/runtime.v1.RuntimeService/Version`. An invalid value of the metadata header is an error of the call.
    pub async fn call<Q, A>(&self, method: &str, request: Q, header: Option<(&'static str, &str)>) -> Result<A, GrpcError>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let failed = |status: tonic::Status| {
            let (path, method) = (self.socket.path.clone(), method.to_owned());
            GrpcError::Status { path, method, status: Box::new(status) }
        };
        let sender = self.sender(method).await?;
        let service = tower::service_fn(move |request: Request<tonic::body::Body>| {
            let mut sender = sender.clone();
            async move {
                sender.ready().await?;
                sender.send_request(request).await
            }
        });
        let mut client = tonic::client::Grpc::with_origin(service, Uri::from_static("http://localhost"))
            .max_decoding_message_size(self.socket.max_response_bytes);
        let path = method.parse().map_err(|error| failed(tonic::Status::internal(format!("{error}"))))?;
        client.ready().await.map_err(|error| failed(tonic::Status::from_error(error.into())))?;
        let codec = tonic_prost::ProstCodec::<Q, A>::default();
        let mut request = tonic::Request::new(request);
        if let Some((name, value)) = header {
            let value = value.parse().map_err(|error| failed(tonic::Status::invalid_argument(format!("{name}: {error}"))))?;
            request.metadata_mut().insert(name, value);
        }
        let response = client.unary(request, path, codec).await.map_err(failed)?;
        Ok(response.into_inner())
    }
}

/// The tasks that hyper spawns for one connection.
#[derive(Clone, Default)]
struct Tasks(Arc<Mutex<JoinSet<()>>>);

impl Tasks {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).spawn(task);
    }
}

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Tasks {
    fn execute(&self, task: F) {
        self.spawn(task);
    }
}

/// Aborts the tasks on drop: they hold a reference to their own set, so dropping the set would not end them.
struct EndOnDrop(Tasks);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labels::source::grpc_server::{Server, ServerReply, field};
    use crate::labels::stamp::stamp;

    #[derive(Clone, PartialEq, prost::Message)]
    struct Text {
        #[prost(string, tag = "1")]
        text: String,
    }

    async fn echo_call(socket: &GrpcSocket, text: &str) -> Result<String, GrpcError> {
        let response: Text = socket.call("/test.Echo/Say", Text { text: text.to_owned() }, None).await?;
        Ok(response.text)
    }

    fn echo_server() -> Server {
        Server::start(|_, request| ServerReply::Message(request.to_vec()))
    }

    #[tokio::test]
    async fn calls_return_and_leave_no_task() {
        let server = echo_server();
        let socket = GrpcSocket::new(&server.path, Arc::default());
        for n in 0..20 {
            assert_eq!(echo_call(&socket, &format!("{n}")).await.unwrap(), format!("{n}"));
        }
        server.settle().await;
    }

    #[tokio::test]
    async fn successive_calls_share_a_connection_until_it_is_closed() {
        let server = echo_server();
        let socket = GrpcSocket::new(&server.path, Arc::default());
        let connection = socket.connection();
        let say = async |text: &str| -> Result<String, GrpcError> {
            let response: Text = connection.call("/test.Echo/Say", Text { text: text.to_owned() }, None).await?;
            Ok(response.text)
        };
        assert_eq!((say("a").await.unwrap(), say("b").await.unwrap()), ("a".to_owned(), "b".to_owned()));
        let folder = server.stop();
        std::fs::remove_file(&socket.path).unwrap();
        // The connection is still open, so the missing socket is not noticed.
        assert_eq!(say("c").await.unwrap(), "c");
        *connection.open.lock().await = None;
        assert!(matches!(say("d").await, Err(GrpcError::NoSocket { .. })));
        let _again = Server::start_in(folder, |_, request| ServerReply::Message(request.to_vec()));
        assert_eq!(say("e").await.unwrap(), "e");
    }

    #[tokio::test]
    async fn a_socket_may_be_absent_refuse_or_be_replaced() {
        let server = echo_server();
        let socket = GrpcSocket::new(&server.path, Arc::default());
        echo_call(&socket, "a").await.unwrap();
        let before = stamp(&socket.path);
        let folder = server.stop();
        // The socket's file still exists: the connection is refused.
        assert!(matches!(echo_call(&socket, "a").await, Err(GrpcError::Connect { .. })));
        let again = Server::start_in(folder, |_, _| ServerReply::Message(field(1, b"another")));
        assert_eq!(echo_call(&socket, "a").await.unwrap(), "another");
        assert_ne!(stamp(&socket.path), before);
        let folder = again.stop();
        std::fs::remove_file(&socket.path).unwrap();
        assert!(matches!(echo_call(&socket, "a").await, Err(GrpcError::NoSocket { .. })));
        assert_eq!(stamp(&socket.path), None);
        drop(folder);
    }

    #[tokio::test]
    async fn a_hung_server_does_not_block_later_calls() {
        let server = Server::start(
            |_, request| if request == field(1, b"hang") { ServerReply::Hang } else { ServerReply::Message(vec![]) },
        );
        let socket = GrpcSocket::new(&server.path, Arc::default());
        for _ in 0..5 {
            let result = tokio::time::timeout(Duration::from_millis(20), echo_call(&socket, "hang")).await;
            assert!(result.is_err());
        }
        assert_eq!(echo_call(&socket, "go on").await.unwrap(), "");
        server.settle().await;
    }

    #[tokio::test]
    async fn invalid_responses_are_errors() {
        for (response, expect) in [
            (ServerReply::Message(vec![0xff; 64]), "Internal"),
            (ServerReply::Message(field(1, vec![b'x'; 5 << 20])), "OutOfRange"),
            (ServerReply::CutOff, "http2 error: stream error"),
            (ServerReply::NoTrailers, "missing grpc-status"),
            (ServerReply::Status(5, "no".into()), "NotFound: no"),
        ] {
            let shown = format!("{response:?}");
            let server = Server::start(move |_, _| response.clone());
            let error = echo_call(&GrpcSocket::new(&server.path, Arc::default()), "a").await.unwrap_err().to_string();
            let shown = &shown[..shown.len().min(40)];
            assert!(error.contains(expect) && error.contains("/test.Echo/Say"), "{shown}: {error}");
        }
        for bytes in [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], b"", &[0x5a; 4096], b"\0\0\0\x04\0\0\0\0\0"] {
            let server = Server::raw(bytes);
            let error = echo_call(&GrpcSocket::new(&server.path, Arc::default()), "a").await.unwrap_err();
            assert!(matches!(error, GrpcError::Status { .. }), "{error}");
        }
    }

    #[test]
    fn not_found_is_detected_by_code_and_text() {
        let error = |code, text: &str| {
            let status = Box::new(tonic::Status::new(code, text));
            GrpcError::Status { path: "/s".into(), method: "/m".into(), status }.is_not_found()
        };
        assert!(error(Code::NotFound, ""));
        assert!(error(Code::Unknown, "container with ID starting with 73e1 not found: ID does not exist"));
        assert!(error(Code::Unknown, "Error: No such container: 73e1"));
        assert!(!error(Code::Unknown, "the disk is full"));
        assert!(!error(Code::Unimplemented, "method not found"));
    }

    #[test]
    fn an_error_about_the_request_shows_that_the_method_exists() {
        let shows = |code, text: &str| {
            let status = Box::new(tonic::Status::new(code, text));
            GrpcError::Status { path: "/s".into(), method: "/m".into(), status }.shows_method()
        };
        assert!(shows(Code::NotFound, "") && shows(Code::Unknown, "no such container") && shows(Code::InvalidArgument, ""));
        // A proxy, a server that is starting, or the transport.
        for code in
            [Code::Unimplemented, Code::Unavailable, Code::Unknown, Code::Internal, Code::DeadlineExceeded, Code::Cancelled]
        {
            assert!(!shows(code, "x"), "{code:?}");
        }
    }
}
