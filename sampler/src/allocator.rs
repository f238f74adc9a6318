//! Settings of the C library's allocator, which keep the memory of the process close to what it uses.

/// Allocations of this size and above get pages of their own, which return to the system when they are freed: pages of /metrics, snapshots
/// of many users. By default the limit rises to the largest of them, and what they leave in the heap is kept.
#[cfg(target_env = "gnu")]
const OWN_PAGES_BYTES: libc::c_int = 256 << 10;

/// Makes all threads allocate from one heap, and sets [`OWN_PAGES_BYTES`]. By default each thread gets a heap of its own, and memory that is
/// freed in one is not used by the others: each batch of samples and each snapshot is made by one thread and dropped by another.
pub fn configure() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, OWN_PAGES_BYTES)] {
        // SAFETY: mallopt takes no pointers; no other thread exists yet. If it refuses, the default stays.
        let _accepted = unsafe { libc::mallopt(parameter, value) };
    }
}

/// Returns freed memory to the system.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes no pointers.
    unsafe {
        libc::malloc_trim(0)
    };
}
