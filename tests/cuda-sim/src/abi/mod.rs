//! The C ABI: symbols of CUDA's driver API. No panic crosses it; every pointer is checked for NULL.
//!
//! The signatures are cuda.h's. A function that blocks has its own body, so that a probe on its symbol sees its entry and its return: it
//! shares no address with another one and does not end in a jump.

mod context;
mod event;
mod graph;
mod library;
mod stream;
mod transfer;

use std::cell::Cell;
use std::ffi::{CStr, OsStr, c_int, c_void};
use std::os::unix::ffi::OsStrExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use crate::error::Error;
use crate::gpu::Gpu;
use crate::process::{Handle, Process, Queue, report};

pub const INVALID_VALUE: c_int = 1;
pub const OUT_OF_MEMORY: c_int = 2;
pub const NOT_INITIALIZED: c_int = 3;
pub const NO_DEVICE: c_int = 100;
pub const INVALID_DEVICE: c_int = 101;
pub const INVALID_CONTEXT: c_int = 201;
pub const INVALID_HANDLE: c_int = 400;
pub const NOT_READY: c_int = 600;
pub const SYSTEM_NOT_READY: c_int = 802;
pub const UNKNOWN: c_int = 999;

/// Special handles of cuda.h: the legacy default stream, and the default stream of the calling thread.
const STREAM_LEGACY: Handle = 1;
const STREAM_PER_THREAD: Handle = 2;

type CallResult = Result<(), c_int>;

/// The instance of the process that called cuInit, which may be this one's parent.
static PROCESS: AtomicPtr<Process> = AtomicPtr::new(std::ptr::null_mut());
static LAST_THREAD: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static CONTEXT: Cell<Handle> = const { Cell::new(0) };
    /// The number of this thread, as a key of its default stream.
    static THREAD: u64 = LAST_THREAD.fetch_add(1, Ordering::Relaxed);
}

/// `None` before cuInit, and in a forked child until it calls cuInit.
fn process() -> Option<&'static Process> {
    // SAFETY: NULL, or an instance that was leaked on purpose.
    let process = unsafe { PROCESS.load(Ordering::Acquire).as_ref() };
    process.filter(|process| process.pid == std::process::id())
}

fn init() -> CallResult {
    if process().is_some() {
        return Ok(());
    }
    let earlier = PROCESS.load(Ordering::Acquire);
    let dir = dir().ok_or(SYSTEM_NOT_READY)?;
    let opened = Process::open(&dir).map_err(|error| {
        report(&error);
        if matches!(error, Error::NoGpu { .. }) { NO_DEVICE } else { SYSTEM_NOT_READY }
    })?;
    let new = Box::into_raw(Box::new(opened));
    match PROCESS.compare_exchange(earlier, new, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => start_thread(),
        // Another thread was faster. The instance is leaked: closing its files would release the locks that the other one holds on them.
        Err(_) => Ok(()),
    }
}

/// Starts the library's thread with all signals blocked, so that they reach the program's threads.
fn start_thread() -> CallResult {
    let process = process().ok_or(NOT_INITIALIZED)?;
    // SAFETY: plain data; sigfillset and pthread_sigmask write to it and to nothing else.
    let earlier = unsafe {
        let (mut all, mut earlier): (libc::sigset_t, libc::sigset_t) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut earlier);
        earlier
    };
    let started = std::thread::Builder::new().name("cuda-sim".into()).spawn(|| process.keep_up());
    // SAFETY: the mask that was in force before.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const earlier, std::ptr::null_mut()) };
    started.map(|_thread| ()).map_err(|error| {
        eprintln!("cuda-sim: cannot start a thread: {error}");
        SYSTEM_NOT_READY
    })
}

/// NVML_SIM_DIR, or the folder of this library: DIR/lib/libcuda.so.1.
fn dir() -> Option<PathBuf> {
    if let Some(dir) = std::env::var_os("NVML_SIM_DIR").filter(|dir| !dir.is_empty()) {
        return Some(dir.into());
    }
    // SAFETY: all-zero is a valid Dl_info, and dladdr fills it for an address of this library.
    let info = unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        (libc::dladdr((&raw const PROCESS).cast(), &raw mut info) != 0).then_some(info)?
    };
    // SAFETY: dladdr's name is NUL-terminated and lives as long as the library.
    let path = unsafe { CStr::from_ptr(info.dli_fname) };
    let path = PathBuf::from(OsStr::from_bytes(path.to_bytes()));
    Some(path.parent()?.parent()?.to_owned())
}

fn guard(f: impl FnOnce() -> CallResult) -> c_int {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(())) => 0,
        Ok(Err(code)) => code,
        Err(_) => UNKNOWN,
    }
}

fn initialized(f: impl FnOnce(&'static Process) -> CallResult) -> c_int {
    guard(|| f(process().ok_or(NOT_INITIALIZED)?))
}

fn failed(error: Error) -> c_int {
    report(&error);
    UNKNOWN
}

fn put<T>(to: *mut T, value: T) -> CallResult {
    if to.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: not NULL, and CUDA's contract makes the caller pass memory for one T.
    unsafe { to.write(value) };
    Ok(())
}

fn get<T: Copy>(from: *const T) -> Result<T, c_int> {
    if from.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: not NULL, and CUDA's contract makes the caller pass an initialised T.
    Ok(unsafe { from.read() })
}

/// The length of a kernel, in the first of its parameters: microseconds as u64.
fn kernel_ns(parameters: *const *const c_void) -> Result<u64, c_int> {
    let first = get(parameters)?;
    // SAFETY: not NULL is checked; the first parameter of every kernel is a u64, perhaps not aligned.
    let length_us = if first.is_null() { Err(INVALID_VALUE) } else { Ok(unsafe { first.cast::<u64>().read_unaligned() }) }?;
    length_us.checked_mul(1_000).ok_or(INVALID_VALUE)
}

/// The GPU of the calling thread's context.
fn current_gpu(process: &Process) -> Result<&Gpu, c_int> {
    let gpu = process.handles().contexts.get(&CONTEXT.get()).copied().ok_or(INVALID_CONTEXT)?;
    process.gpus.get(gpu).ok_or(INVALID_CONTEXT)
}

fn default_queue(process: &Process) -> Result<Queue, c_int> {
    let gpu = current_gpu(process)?.index;
    process.handles().default_queue(gpu).ok_or(INVALID_CONTEXT)
}

/// The default stream of the calling thread, which its first use opens.
fn thread_queue(process: &Process) -> Result<Queue, c_int> {
    let (gpu, thread) = (current_gpu(process)?.index, THREAD.with(|thread| *thread));
    let known = process.handles().thread_streams.get(&(thread, gpu)).copied();
    if let Some(queue) = known {
        return Ok(queue);
    }
    let queue = process.open_stream(gpu).map_err(failed)?.ok_or(OUT_OF_MEMORY)?;
    process.handles().thread_streams.insert((thread, gpu), queue);
    Ok(queue)
}

/// Which stream a NULL handle means.
#[derive(Clone, Copy, PartialEq, Eq)]
enum NullStream {
    Legacy,
    PerThread,
}

fn queue(process: &Process, stream: *mut c_void, default: NullStream) -> Result<Queue, c_int> {
    match (stream as Handle, default) {
        (0, NullStream::Legacy) | (STREAM_LEGACY, _) => default_queue(process),
        (0, NullStream::PerThread) | (STREAM_PER_THREAD, _) => thread_queue(process),
        (handle, _) => process.handles().streams.get(&handle).copied().ok_or(INVALID_HANDLE),
    }
}

/// Exports functions. Each has a name of its own in its body and does something after the body.
macro_rules! cuda {
    ($(fn $name:ident($($arg:ident: $type:ty),*) $body:block)*) => {$(
        /// As in cuda.h.
        /// # Safety
        /// Pointers are NULL or point to what cuda.h requires.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> std::ffi::c_int {
            // Equal bodies would be merged into one address.
            std::hint::black_box(stringify!($name));
            let code: std::ffi::c_int = $body;
            std::hint::black_box(code)
        }
    )*};
}
use cuda;
