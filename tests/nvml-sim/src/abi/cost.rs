//! The processor time that the calls of this library take. It runs in its client's threads, so a bench that measures a client subtracts
//! it: with `NVML_SIM_COST_FILE` the total so far, in nanoseconds as 8 bytes in the machine's order, is written after each call. If it
//! names a folder, each process has a file there, with its PID as its name.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

static FILE: OnceLock<Option<File>> = OnceLock::new();
static TOTAL_NS: AtomicU64 = AtomicU64::new(0);

/// A call in progress that is measured.
pub struct Cost(u64);

impl Cost {
    /// `None` if costs are not measured.
    pub fn begin() -> Option<Self> {
        file().map(|_| Self(thread_ns()))
    }
}

impl Drop for Cost {
    fn drop(&mut self) {
        let before_write = thread_ns();
        let spent_ns = before_write.saturating_sub(self.0);
        let total_ns = TOTAL_NS.fetch_add(spent_ns, Ordering::Relaxed) + spent_ns;
        // Two threads may write in the other order; the next call corrects it. A full disk costs the bench its figure.
        let _written = file().map(|file| file.write_all_at(&total_ns.to_ne_bytes(), 0));
        // Without a measurement there would be no write.
        TOTAL_NS.fetch_add(thread_ns().saturating_sub(before_write), Ordering::Relaxed);
    }
}

fn file() -> Option<&'static File> {
    FILE.get_or_init(|| {
        let path = PathBuf::from(std::env::var_os("NVML_SIM_COST_FILE")?);
        let path = if path.is_dir() { path.join(std::process::id().to_string()) } else { path };
        File::create(path).ok()
    })
    .as_ref()
}

/// Processor time of this thread.
fn thread_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid for the call, which cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
