//! A thread that a signal ends inside a blocking call, while its process goes on. Correct programs do not do this; the call never returns.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};

use crate::driver::{Cuda, Object};

const KERNEL_US: u64 = 200_000;

extern "C" fn end_thread(_signal: libc::c_int) {
    // SAFETY: ends this thread at once, without its destructors; its stack stays mapped.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
}

/// Whether this thread, and those that it starts, receive SIGUSR1.
fn receive(how: libc::c_int) -> anyhow::Result<()> {
    // SAFETY: the set is initialised by sigemptyset.
    let code = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGUSR1);
        libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut())
    };
    ensure!(code == 0, "pthread_sigmask: error {code}");
    Ok(())
}

/// Before the library starts a thread: only the one of [`start`] receives the signal.
pub fn prepare() -> anyhow::Result<()> {
    receive(libc::SIG_BLOCK)?;
    let handler = end_thread as extern "C" fn(libc::c_int);
    // SAFETY: the handler only makes a system call.
    let before = unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
    ensure!(before != libc::SIG_ERR, "signal: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Starts the thread, which waits for one kernel after the other.
pub fn start(library: PathBuf, context: Object) -> anyhow::Result<()> {
    let work = move || -> anyhow::Result<()> {
        receive(libc::SIG_UNBLOCK)?;
        let cuda = Cuda::open(&library)?;
        cuda.use_context(context)?;
        let stream = cuda.create_stream()?;
        loop {
            cuda.launch(stream, KERNEL_US)?;
            cuda.synchronize_stream(stream)?;
        }
    };
    let report = move || {
        if let Err(error) = work() {
            eprintln!("cuda-work: the thread that is to be ended: {error:#}");
        }
    };
    // Never joined: it does not return.
    std::thread::Builder::new().spawn(report).context("cannot start a thread").map(|_thread| ())
}
