//! The two clocks that observations carry, and processor time.

use std::time::{Duration, SystemTime};

use rustix::time::{ClockId, clock_gettime};
use sampler_core::units::{BootNs, WallTime};

pub fn boot_now() -> BootNs {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a valid timespec; CLOCK_BOOTTIME exists since Linux 2.6.39, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut t) };
    BootNs(t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64)
}

/// Processor time of this thread: unlike the time that passes, it does not include waiting for a processor.
pub fn cpu_now() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

pub fn wall_now() -> WallTime {
    SystemTime::now().into()
}
