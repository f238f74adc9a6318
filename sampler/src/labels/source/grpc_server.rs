//! A small gRPC server for tests: HTTP/2 and protobuf over a Unix socket, with all kinds of failures.
//!
//! Messages are built from field numbers by hand, so that a wrong number in a client is not repeated here.

use std::convert::Infallible;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

#[derive(Clone, Debug)]
pub enum ServerReply {
    Message(Vec<u8>),
    /// A gRPC status, by number.
    Status(u32, String),
    Hang,
    /// Announces a message and closes the stream within it.
    CutOff,
    /// A complete message without a status.
    NoTrailers,
}

pub struct Server {
    pub path: PathBuf,
    folder: TempDir,
    accepting: JoinHandle<()>,
}

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

impl Server {
    /// `reply` receives the path (`/package.Service/Method`) and the request's message.
    pub fn start(reply: impl Fn(&str, &[u8]) -> ServerReply + Clone + Send + Sync + 'static) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), reply)
    }

    /// As [`Server::start`], in place of a server that was stopped.
    pub fn start_in(folder: TempDir, reply: impl Fn(&str, &[u8]) -> ServerReply + Clone + Send + Sync + 'static) -> Self {
        let (path, listener) = listen(&folder);
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let reply = reply.clone();
                let service = hyper::service::service_fn(move |request| respond(reply.clone(), request));
                let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                tokio::spawn(server.serve_connection(TokioIo::new(stream), service));
            }
        });
        Self { path, folder, accepting }
    }

    /// Sends these bytes to every client, and closes the connection.
    pub fn raw(bytes: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (path, listener) = listen(&folder);
        let bytes = bytes.to_vec();
        let accepting = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                // Reads the client's first bytes: otherwise closing would reset the connection and discard the bytes sent.
                let _received = stream.read(&mut [0; 4096]).await;
                let _sent = stream.write_all(&bytes).await;
            }
        });
        Self { path, folder, accepting }
    }

    /// Stops the server; the socket's file remains, as after a crash.
    pub fn stop(self) -> TempDir {
        self.accepting.abort();
        self.folder
    }

    /// Waits until only the accepting task runs: connections of finished clients must end without help.
    pub async fn settle(&self) {
        for _ in 0..200 {
            if tokio::runtime::Handle::current().metrics().num_alive_tasks() == 1 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{} tasks are left", tokio::runtime::Handle::current().metrics().num_alive_tasks());
    }
}

fn listen(folder: &TempDir) -> (PathBuf, UnixListener) {
    let path = folder.path().join("s.sock");
    let _old = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    (path, listener)
}

async fn respond(reply: impl Fn(&str, &[u8]) -> ServerReply, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path().to_owned();
    let body = request.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
    let reply = reply(&path, body.get(5..).unwrap_or_default());
    let trailers = |code: u32, text: &str| {
        let mut map = HeaderMap::new();
        map.insert("grpc-status", code.into());
        map.insert("grpc-message", text.parse().unwrap());
        Frame::trailers(map)
    };
    let frames: Vec<Result<Frame<Bytes>, std::io::Error>> = match reply {
        ServerReply::Message(message) => vec![Ok(framed(&message)), Ok(trailers(0, ""))],
        ServerReply::Status(code, text) => vec![Ok(trailers(code, &text))],
        ServerReply::Hang => std::future::pending().await,
        ServerReply::CutOff => {
            vec![Ok(Frame::data(Bytes::from_static(&[0, 0, 0, 1, 0, 7]))), Err(std::io::Error::other("cut off"))]
        }
        ServerReply::NoTrailers => vec![Ok(framed(&[]))],
    };
    let body = StreamBody::new(stream::iter(frames).boxed()).boxed_unsync();
    Ok(Response::builder().header("content-type", "application/grpc").body(body).unwrap())
}

fn framed(message: &[u8]) -> Frame<Bytes> {
    let mut bytes = vec![0];
    bytes.extend((message.len() as u32).to_be_bytes());
    bytes.extend(message);
    Frame::data(bytes.into())
}

fn varint(mut value: u64, to: &mut Vec<u8>) {
    while value >= 0x80 {
        to.push(value as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}

/// A length-delimited field: a string, bytes, or a message.
pub fn field(number: u64, value: impl AsRef<[u8]>) -> Vec<u8> {
    let value = value.as_ref();
    let mut bytes = Vec::new();
    varint(number << 3 | 2, &mut bytes);
    varint(value.len() as u64, &mut bytes);
    bytes.extend(value);
    bytes
}

/// A varint field: an integer or an enum.
pub fn number(number: u64, value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    varint(number << 3, &mut bytes);
    varint(value, &mut bytes);
    bytes
}

/// An entry of a `map<string, string>`.
pub fn entry(number: u64, key: &str, value: &str) -> Vec<u8> {
    field(number, [field(1, key), field(2, value)].concat())
}
