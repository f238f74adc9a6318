//! System calls that std does not offer. The only unsafe code of this tool.

use std::{
    io,
    os::unix::process::CommandExt as _,
    process::Command,
    sync::atomic::{AtomicI32, Ordering},
};

static CAUGHT: AtomicI32 = AtomicI32::new(0);

extern "C" fn remember(signal: libc::c_int) {
    CAUGHT.store(signal, Ordering::Relaxed);
}

fn on(signal: libc::c_int, handler: libc::sighandler_t) {
    // SAFETY: `handler` is SIG_IGN or `remember`, which only stores to an atomic.
    unsafe { libc::signal(signal, handler) };
}

/// From here on SIGINT, SIGTERM and SIGHUP only set the value of [`interrupted`].
pub fn catch_signals() {
    let handler = remember as extern "C" fn(libc::c_int) as libc::sighandler_t;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        on(signal, handler);
    }
}

/// For a process that must survive the terminal's Ctrl-C.
pub fn ignore_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGPIPE] {
        on(signal, libc::SIG_IGN);
    }
}

/// The signal that asked this process to end, if one has arrived.
pub fn interrupted() -> Option<u8> {
    u8::try_from(CAUGHT.load(Ordering::Relaxed)).ok().filter(|signal| *signal != 0)
}

pub fn is_root() -> bool {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// A negative `pid` is a process group.
pub fn kill(pid: i32, signal: libc::c_int) -> bool {
    // SAFETY: plain integers.
    unsafe { libc::kill(pid, signal) == 0 }
}

/// Detaches the topmost mount at `path`.
pub fn unmount(path: &std::path::Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt as _;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: a NUL-terminated string that lives through the call.
    match unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The child gets `signal` when this thread ends, for any reason.
pub fn dies_with_us(command: &mut Command, signal: libc::c_int) -> &mut Command {
    let parent = std::process::id();
    // SAFETY: the closure calls prctl, getppid and raise only, all async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_ulong, 0, 0, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
            if libc::getppid() as u32 != parent {
                libc::raise(signal);
            }
            Ok(())
        })
    }
}

/// The child leaves the terminal's process group and session.
pub fn own_session(command: &mut Command) -> &mut Command {
    // SAFETY: setsid is async-signal-safe.
    unsafe {
        command.pre_exec(|| match libc::setsid() {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        })
    }
}
