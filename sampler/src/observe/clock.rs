//! The two clocks that observations carry.

use std::time::{SystemTime, UNIX_EPOCH};

use sampler_core::units::{BootNs, WallTime};

pub fn boot_now() -> BootNs {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a valid timespec; CLOCK_BOOTTIME exists since Linux 2.6.39, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut t) };
    BootNs(t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64)
}

pub fn wall_now() -> WallTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    WallTime(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}
