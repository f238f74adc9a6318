//! A proxy in front of a daemon's socket that injects faults: a client gets the daemon's responses, or less, or garbage.
//!
//! HTTP/1 is parsed request by request, each on an upstream connection of its own. A connection that begins as HTTP/2 (gRPC) is passed as
//! bytes: there only [`Fault::Pass`], `Refuse`, `Hang`, `Garbage` and `CloseHalfWay` have an effect, and the others pass.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::http::{self, Request};

/// Changes the JSON of a response; it gets the request's path.
pub type Change = Box<dyn Fn(&str, Value) -> Value + Send + Sync>;

pub enum Fault {
    Pass,
    /// The socket's file stays, nothing listens, and open connections end: a daemon that died.
    Refuse,
    /// Connects and reads, but does not respond: a stopped daemon. Pending requests are served according to the next fault.
    Hang,
    /// Every request gets this status, on a connection that stays open.
    Status(u16),
    /// Random bytes, then the end.
    Garbage,
    /// 200 with JSON of [`HUGE`] bytes, without a length in the header.
    Huge,
    /// The first half of the daemon's response.
    CloseHalfWay,
    /// JSON bodies are changed; `/events`, which is endless, passes.
    Rewrite(Change),
}

pub const HUGE: usize = 100_000_000;
const GARBAGE: usize = 4096;
/// A response that is not complete by then is endless.
const RESPONSE_TIMEOUT: Duration = Duration::from_millis(500);

pub struct Proxy {
    shared: Arc<Shared>,
    place: Mutex<ProxyTarget>,
}

struct ProxyTarget {
    path: PathBuf,
    listening: Option<(Arc<UnixListener>, JoinHandle<()>)>,
    wanted: bool,
}

struct Shared {
    upstream: PathBuf,
    state: Mutex<ProxyState>,
    changed: Condvar,
}

struct ProxyState {
    fault: Arc<Fault>,
    over: bool,
    seen: u64,
    paths: Vec<String>,
    connections: Vec<Weak<UnixStream>>,
}

/// A thread that panicked has failed its connection; the state is still valid.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Proxy {
    /// Listens on `path`, which must not exist, and passes everything.
    pub fn start(upstream: &Path, path: &Path) -> Result<Self> {
        let state = ProxyState { fault: Arc::new(Fault::Pass), over: false, seen: 0, paths: Vec::new(), connections: Vec::new() };
        let shared = Shared { upstream: upstream.into(), state: Mutex::new(state), changed: Condvar::new() };
        let place = ProxyTarget { path: path.into(), listening: None, wanted: true };
        let proxy = Self { shared: Arc::new(shared), place: Mutex::new(place) };
        proxy.listen(&mut lock(&proxy.place))?;
        Ok(proxy)
    }

    /// Sets the fault from now on, also for open connections.
    pub fn set(&self, fault: Fault) -> Result<()> {
        let refuse = matches!(fault, Fault::Refuse);
        lock(&self.shared.state).fault = Arc::new(fault);
        self.shared.changed.notify_all();
        let mut place = lock(&self.place);
        if refuse {
            self.close(&mut place);
        } else if place.wanted && place.listening.is_none() {
            unlink(&place.path)?;
            self.listen(&mut place)?;
        }
        Ok(())
    }

    /// Requests so far, of both protocols.
    pub fn count(&self) -> u64 {
        lock(&self.shared.state).seen
    }

    /// The paths of HTTP/1 requests, in order.
    pub fn paths(&self) -> Vec<String> {
        lock(&self.shared.state).paths.clone()
    }

    /// Removes the socket, with its connections.
    pub fn disappear(&self) -> Result<()> {
        let mut place = lock(&self.place);
        place.wanted = false;
        unlink(&place.path)?;
        self.close(&mut place);
        Ok(())
    }

    /// Creates a new socket at the old path.
    pub fn appear(&self) -> Result<()> {
        let mut place = lock(&self.place);
        place.wanted = true;
        if place.listening.is_none() && !matches!(*self.shared.fault(), Fault::Refuse) {
            self.listen(&mut place)?;
        }
        Ok(())
    }

    pub fn move_to(&self, path: &Path) -> Result<()> {
        self.disappear()?;
        lock(&self.place).path = path.into();
        self.appear()
    }

    fn listen(&self, place: &mut ProxyTarget) -> Result<()> {
        let listener = Arc::new(UnixListener::bind(&place.path).with_context(|| place.path.display().to_string())?);
        let (shared, accepting) = (self.shared.clone(), listener.clone());
        let thread = std::thread::spawn(move || {
            while let Ok((client, _)) = accepting.accept() {
                let (client, shared) = (Arc::new(client), shared.clone());
                shared.remember(&client);
                std::thread::spawn(move || {
                    // A peer that disconnects in the middle is part of the test.
                    let _ended = shared.serve(&client);
                    let _closed = client.shutdown(Shutdown::Both);
                });
            }
        });
        place.listening = Some((listener, thread));
        Ok(())
    }

    fn close(&self, place: &mut ProxyTarget) {
        if let Some((listener, thread)) = place.listening.take() {
            // SAFETY: an open descriptor; this wakes the thread that accepts on it.
            unsafe { libc::shutdown(listener.as_raw_fd(), libc::SHUT_RDWR) };
            let _ended = thread.join();
        }
        for connection in lock(&self.shared.state).connections.drain(..).filter_map(|c| c.upgrade()) {
            let _closed = connection.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        lock(&self.shared.state).over = true;
        self.shared.changed.notify_all();
        if let Err(error) = self.disappear() {
            eprintln!("{error:#}");
        }
    }
}

fn unlink(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).with_context(|| path.display().to_string()),
        _ => Ok(()),
    }
}

fn garbage(mut client: &UnixStream) -> Result<()> {
    let mut bytes = [0; GARBAGE];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(client.write_all(&bytes)?)
}

fn huge(mut client: &UnixStream) -> Result<()> {
    let head = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
    client.write_all(head.as_bytes())?;
    let (begin, end, pad) = (br#"{"Padding":""#, br#""}"#, vec![b'a'; 64 * 1024]);
    let mut chunk = |bytes: &[u8]| {
        write!(client, "{:x}\r\n", bytes.len())?;
        client.write_all(bytes)?;
        client.write_all(b"\r\n")
    };
    chunk(begin)?;
    let mut left = HUGE - begin.len() - end.len();
    while left > 0 {
        let now = left.min(pad.len());
        chunk(&pad[..now])?;
        left -= now;
    }
    chunk(end)?;
    Ok(chunk(b"")?)
}

impl Shared {
    fn fault(&self) -> Arc<Fault> {
        lock(&self.state).fault.clone()
    }

    /// Waits until the fault is not `Hang`, and returns it; `None` when the proxy ends.
    fn no_hang(&self) -> Option<Arc<Fault>> {
        let hangs = |state: &mut ProxyState| !state.over && matches!(*state.fault, Fault::Hang);
        let state = self.changed.wait_while(lock(&self.state), hangs).unwrap_or_else(PoisonError::into_inner);
        (!state.over).then(|| state.fault.clone())
    }

    fn remember(&self, connection: &Arc<UnixStream>) {
        let mut state = lock(&self.state);
        state.connections.retain(|c| c.strong_count() > 0);
        state.connections.push(Arc::downgrade(connection));
    }

    fn connect(&self) -> Result<Arc<UnixStream>> {
        let upstream = Arc::new(UnixStream::connect(&self.upstream)?);
        self.remember(&upstream);
        Ok(upstream)
    }

    fn serve(self: &Arc<Self>, client: &Arc<UnixStream>) -> Result<()> {
        let mut read = Vec::new();
        while let Some(request) = Request::read(&mut &**client, &mut read)? {
            if request.is_http2() {
                return self.bytes(client, request.head);
            }
            {
                let mut state = lock(&self.state);
                state.seen += 1;
                state.paths.push(request.path.clone());
            }
            if !self.respond(client, &request)? {
                break;
            }
        }
        Ok(())
    }

    /// Responds to a request; returns whether the connection stays open.
    fn respond(&self, client: &UnixStream, request: &Request) -> Result<bool> {
        let Some(fault) = self.no_hang() else { return Ok(false) };
        match &*fault {
            Fault::Refuse => {}
            Fault::Status(status) => {
                http::respond(client, *status, "keep-alive", "application/json", br#"{"message":"a fault of the tests"}"#)?;
                return Ok(true);
            }
            Fault::Garbage => garbage(client)?,
            Fault::Huge => huge(client)?,
            Fault::Rewrite(change) if !request.path.contains("/events") => self.rewrite(client, request, change)?,
            Fault::CloseHalfWay => {
                let whole = self.whole(&request.forwarded("HTTP/1.1"))?;
                (&mut &*client).write_all(&whole[..whole.len() / 2])?;
            }
            Fault::Pass | Fault::Hang | Fault::Rewrite(_) => {
                let upstream = self.connect()?;
                (&mut &*upstream).write_all(&request.forwarded("HTTP/1.1"))?;
                self.pump(&upstream, client, client, |_| {})?;
            }
        }
        Ok(false)
    }

    /// The daemon's response, to its end or for as long as a response may take.
    fn whole(&self, request: &[u8]) -> Result<Vec<u8>> {
        let upstream = self.connect()?;
        (&mut &*upstream).write_all(request)?;
        upstream.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
        let mut whole = Vec::new();
        match (&mut &*upstream).read_to_end(&mut whole) {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error.into()),
            _ => Ok(whole),
        }
    }

    fn rewrite(&self, mut client: &UnixStream, request: &Request, change: &Change) -> Result<()> {
        // HTTP/1.0 has no chunks.
        let whole = self.whole(&request.forwarded("HTTP/1.0"))?;
        let (status, body) = http::split(&whole)?;
        match serde_json::from_slice(body) {
            Ok(json) => {
                let body = change(&request.path, json).to_string();
                http::respond(client, status, "close", "application/json", body.as_bytes())
            }
            Err(_) => Ok(client.write_all(&whole)?),
        }
    }

    /// Copies until either side ends or a fault ends the connection. `watch` gets the bytes.
    fn pump(&self, mut from: &UnixStream, mut to: &UnixStream, client: &UnixStream, mut watch: impl FnMut(&[u8])) -> Result<()> {
        let to_client = std::ptr::eq(to, client);
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let length = from.read(&mut buffer)?;
            if length == 0 {
                return Ok(());
            }
            let bytes = &buffer[..length];
            watch(bytes);
            let Some(fault) = self.no_hang() else { return Ok(()) };
            match &*fault {
                Fault::Refuse => return Ok(()),
                Fault::Garbage => return garbage(client),
                Fault::CloseHalfWay if to_client => return Ok(to.write_all(&bytes[..length / 2])?),
                _ => to.write_all(bytes)?,
            }
        }
    }

    fn bytes(self: &Arc<Self>, client: &Arc<UnixStream>, preface: Vec<u8>) -> Result<()> {
        let Some(fault) = self.no_hang() else { return Ok(()) };
        if matches!(*fault, Fault::Garbage) {
            return garbage(client);
        }
        let upstream = self.connect()?;
        (&mut &*upstream).write_all(&preface)?;
        let mut frames = http::Frames::default();
        let mut count = |bytes: &[u8]| lock(&self.state).seen += frames.requests(bytes);
        count(&preface[http::PREFACE.len()..]);
        let (back, answers, to) = (self.clone(), upstream.clone(), client.clone());
        let answering = std::thread::spawn(move || {
            let _ended = back.pump(&answers, &to, &to, |_| {});
            let _closed = (to.shutdown(Shutdown::Both), answers.shutdown(Shutdown::Both));
        });
        let ended = self.pump(client, &upstream, client, count);
        let _closed = (client.shutdown(Shutdown::Both), upstream.shutdown(Shutdown::Both));
        let _joined = answering.join();
        ended
    }
}
