//! Ctrl-C: the run ends early and in order, so that everything it made is removed.

use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

static CAUGHT: AtomicI32 = AtomicI32::new(0);

extern "C" fn remember(signal: libc::c_int) {
    CAUGHT.store(signal, Ordering::Relaxed);
}

/// From here on SIGINT, SIGTERM and SIGHUP only set the value of [`caught`].
pub fn catch() {
    let handler = remember as extern "C" fn(libc::c_int) as libc::sighandler_t;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only stores to an atomic.
        unsafe { libc::signal(signal, handler) };
    }
}

/// The signal that asked this process to end, if one has arrived.
pub fn caught() -> Option<i32> {
    Some(CAUGHT.load(Ordering::Relaxed)).filter(|signal| *signal != 0)
}

/// Fails if a signal has arrived.
pub fn check() -> Result<()> {
    match caught() {
        Some(signal) => bail!("interrupted by signal {signal}"),
        None => Ok(()),
    }
}

/// Sleeps, or fails as soon as a signal arrives.
pub fn pause(duration: Duration) -> Result<()> {
    let until = Instant::now() + duration;
    loop {
        check()?;
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(Duration::from_millis(50)));
    }
}
