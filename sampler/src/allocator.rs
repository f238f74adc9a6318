//! Settings of the C library's allocator, which keep the memory of the process close to what it uses.

/// Makes all threads allocate from one heap. By default each thread gets a heap of its own, and memory that is freed in one is not used by
/// the others: each batch of samples and each snapshot is made by one thread and dropped by another.
pub fn use_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes no pointers; no other thread exists yet. If it refuses, the default stays.
    let _accepted = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Returns freed memory to the system.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes no pointers.
    unsafe {
        libc::malloc_trim(0)
    };
}
