//! A server on one Unix socket: gRPC for whoever begins with HTTP/2, plain HTTP for the others. CRI-O's socket is such a one.

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

/// What the server says; both are asked from the server's thread.
pub trait Service: Send + Sync + 'static {
    /// The message that answers one call, both without framing.
    fn grpc(&self, service: &str, method: &str, request: &[u8]) -> Result<Vec<u8>, Status>;

    /// Status, content type and body that answer a GET.
    fn http(&self, _path: &str) -> (u16, &'static str, String) {
        (404, "text/plain; charset=utf-8", "404 page not found\n".into())
    }
}

type GrpcResponse = Response<UnsyncBoxBody<Bytes, Infallible>>;
type Calls = Arc<Mutex<Vec<String>>>;

/// Removed with its socket when dropped.
pub struct GrpcServer {
    path: PathBuf,
    calls: Calls,
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

fn header(value: &str) -> HeaderValue {
    HeaderValue::from_str(value).unwrap_or_else(|_| HeaderValue::from_static("?"))
}

fn answer(status: u16, kind: &str, body: Bytes) -> GrpcResponse {
    let mut answer = Response::new(Full::new(body).boxed_unsync());
    *answer.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    answer.headers_mut().insert(CONTENT_TYPE, header(kind));
    answer
}

/// A message behind its five bytes of framing, then the status as trailers; a failure is a status alone.
fn framed(result: Result<Vec<u8>, Status>) -> GrpcResponse {
    match result {
        Ok(message) => {
            let length = (message.len() as u32).to_be_bytes();
            let body = Full::new(Bytes::from([&[0][..], &length, &message].concat()));
            let trailers = HeaderMap::from_iter([(HeaderName::from_static("grpc-status"), header("0"))]);
            let mut answer = Response::new(body.with_trailers(std::future::ready(Some(Ok(trailers)))).boxed_unsync());
            answer.headers_mut().insert(CONTENT_TYPE, header("application/grpc"));
            answer
        }
        Err(status) => {
            let mut answer = answer(200, "application/grpc", Bytes::new());
            answer.headers_mut().insert("grpc-status", header(&(status.code() as i32).to_string()));
            answer.headers_mut().insert("grpc-message", header(status.message()));
            answer
        }
    }
}

async fn serve(service: Arc<dyn Service>, calls: Calls, request: Request<Incoming>) -> Result<GrpcResponse, hyper::Error> {
    let path = request.uri().path().to_owned();
    calls.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
    let grpc = request.headers().get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    if !grpc {
        let (status, kind, body) = service.http(&path);
        return Ok(answer(status, kind, body.into()));
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
            // Whoever goes away in the middle is the test's subject.
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

    /// The paths that were asked for, in order; of gRPC `/service/method`.
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
