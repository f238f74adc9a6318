//! A server on one Unix socket: gRPC for clients that begin with HTTP/2, plain HTTP for the others, as on CRI-O's socket.

use std::convert::Infallible;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::sync::oneshot;
use tonic::Status;

/// The responses of a server; both methods run on the server's thread.
pub trait Service: Send + Sync + 'static {
    /// The response message of one call; request and response are without framing.
    fn grpc(&self, service: &str, method: &str, request: &[u8]) -> Result<Vec<u8>, Status>;

    /// Status, content type and body of the response to a GET.
    fn http(&self, _path: &str) -> (u16, &'static str, String) {
        (404, "text/plain; charset=utf-8", "404 page not found\n".into())
    }
}

type GrpcResponse = Response<UnsyncBoxBody<Bytes, Infallible>>;
type Calls = Arc<Mutex<Vec<String>>>;

/// A running server; its socket is removed when it is dropped.
pub struct GrpcServer {
    path: PathBuf,
    calls: Calls,
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

fn header(value: &str) -> HeaderValue {
    HeaderValue::from_str(value).unwrap_or_else(|_| HeaderValue::from_static("?"))
}

fn plain(status: u16, kind: &str, body: Bytes) -> GrpcResponse {
    let mut response = Response::new(Full::new(body).boxed_unsync());
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, header(kind));
    response
}

/// A message after its five bytes of framing, then the status as trailers; a failure is a status alone.
fn framed(result: Result<Vec<u8>, Status>) -> GrpcResponse {
    match result {
        Ok(message) => {
            let length = (message.len() as u32).to_be_bytes();
            let body = Full::new(Bytes::from([&[0][..], &length, &message].concat()));
            let trailers = HeaderMap::from_iter([(HeaderName::from_static("grpc-status"), header("0"))]);
            let mut response = Response::new(body.with_trailers(std::future::ready(Some(Ok(trailers)))).boxed_unsync());
            response.headers_mut().insert(CONTENT_TYPE, header("application/grpc"));
            response
        }
        Err(status) => {
            let mut response = plain(200, "application/grpc", Bytes::new());
            response.headers_mut().insert("grpc-status", header(&(status.code() as i32).to_string()));
            response.headers_mut().insert("grpc-message", header(status.message()));
            response
        }
    }
}

async fn serve(service: Arc<dyn Service>, calls: Calls, request: Request<Incoming>) -> Result<GrpcResponse, hyper::Error> {
    let path = request.uri().path().to_owned();
    calls.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
    let grpc = request.headers().get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    if !grpc {
        let (status, kind, body) = service.http(&path);
        return Ok(plain(status, kind, body.into()));
    }
    let body = request.into_body().collect().await?.to_bytes();
    let called = path.trim_start_matches('/').split_once('/').zip(body.get(5..));
    Ok(framed(match called {
        Some(((name, method), message)) => service.grpc(name, method, message),
        None => Err(Status::unimplemented("malformed method name or message")),
    }))
}

async fn accept(
    listener: std::os::unix::net::UnixListener,
    service: Arc<dyn Service>,
    calls: Calls,
) -> std::io::Result<Infallible> {
    let listener = tokio::net::UnixListener::from_std(listener)?;
    loop {
        let (stream, _) = listener.accept().await?;
        let (service, calls) = (service.clone(), calls.clone());
        tokio::spawn(async move {
            let respond = hyper::service::service_fn(move |request| serve(service.clone(), calls.clone(), request));
            let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            // A peer that disconnects in the middle is part of the test.
            let _ended = builder.serve_connection(TokioIo::new(stream), respond).await;
        });
    }
}

async fn either(one: impl Future, other: impl Future) {
    tokio::select! { _ = one => {}, _ = other => {} }
}

impl GrpcServer {
    pub fn start(path: &Path, service: Arc<dyn Service>) -> Result<Self> {
        let listener = std::os::unix::net::UnixListener::bind(path).with_context(|| path.display().to_string())?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let calls = Calls::default();
        let recorded = calls.clone();
        let thread = std::thread::spawn(move || runtime.block_on(either(accept(listener, service, recorded), stopped)));
        Ok(Self { path: path.into(), calls, running: Some((stop, thread)) })
    }

    /// The requested paths, in order; for gRPC `/service/method`.
    pub fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for GrpcServer {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            drop(stop);
            let _ended = thread.join();
        }
        let _removed = std::fs::remove_file(&self.path);
    }
}
