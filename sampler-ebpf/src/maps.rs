//! All maps of the program, and the increment of the loss counter.

use aya_ebpf::{
    Global,
    macros::map,
    maps::{Array, HashMap, PerCpuArray, RingBuf},
};
use sampler_common::{Offsets, WaitSums, WaitingCall, kind};

/// Sizes here are minimums; user space sets the actual sizes before loading. There are two rings, so that a fork storm cannot displace
/// container events.
#[map]
pub static CGROUP_EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
#[map]
pub static PROCESS_EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// By kind: number of events that were lost because the ring was full or a field could not be read.
#[map]
pub static LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(kind::COUNT, 0);

/// Only filled by the wait probes, which are loaded separately: otherwise user space creates these with one entry.
#[map]
pub static WAITS: HashMap<u32, WaitSums> = HashMap::with_max_entries(1, 0);
#[map]
pub static WAITING: HashMap<u64, WaitingCall> = HashMap::with_max_entries(1, 0);

/// Processes that called cuInit, with the time (CLOCK_BOOTTIME) of the first call.
#[map]
pub static CLIENTS: HashMap<u32, u64> = HashMap::with_max_entries(1, 0);

/// Calls of a process in 2^30 ns up to which they are counted.
#[unsafe(no_mangle)]
pub static WAIT_BUDGET: Global<u64> = Global::new(0);

#[map]
pub static SELF_CHECK: Array<u32> = Array::with_max_entries(1, 0);

#[unsafe(no_mangle)]
pub static OFFSETS: Global<Offsets> = Global::new(Offsets {
    task_pid: 0,
    task_tgid: 0,
    task_group_leader: 0,
    task_start_boottime: 0,
    task_cgroups: 0,
    task_signal: 0,
    task_flags: 0,
    signal_live: 0,
    css_set_subsys: 0,
    css_set_dfl_cgrp: 0,
    css_cgroup: 0,
    css_parent: 0,
    cgroup_kn: 0,
    cgroup_root: 0,
    kn_id: 0,
    kn_name: 0,
    root_hierarchy_id: 0,
    v1_subsys_index: u32::MAX,
    v1_hierarchy: 0,
});

#[inline(always)]
pub fn lost(kind: u32) {
    if let Some(count) = LOST.get_ptr_mut(kind) {
        // SAFETY: a slot of the map, aligned and valid for as long as the program.
        unsafe { add(count, 1) }
    }
}

/// Atomic, because where tracepoint programs can be preempted, two of them may use the slot of the same processor. The instruction set has
/// atomic operations, but core does not provide them for this target.
///
/// # Safety
/// `sum` must be valid and aligned.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub unsafe fn add(sum: *mut u64, value: u64) {
    // SAFETY: adds at a valid address and accesses no other memory.
    unsafe { core::arch::asm!("lock *(u64 *)({sum} + 0) += {value}", sum = in(reg) sum, value = in(reg) value) }
}

#[cfg(not(target_arch = "bpf"))]
pub unsafe fn add(sum: *mut u64, value: u64) {
    // SAFETY: guaranteed by the caller.
    unsafe { core::sync::atomic::AtomicU64::from_ptr(sum) }.fetch_add(value, core::sync::atomic::Ordering::Relaxed);
}

/// Replaces `old` by `new`; returns what was there. Linux 5.12 and newer.
///
/// # Safety
/// `value` must be valid and aligned.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub unsafe fn compare_exchange(value: *mut u64, old: u64, new: u64) -> u64 {
    let seen;
    // SAFETY: changes the number at a valid address and accesses no other memory.
    unsafe {
        core::arch::asm!("r0 = cmpxchg_64({value} + 0, r0, {new})", value = in(reg) value, new = in(reg) new, inout("r0") old => seen);
    }
    seen
}

#[cfg(not(target_arch = "bpf"))]
pub unsafe fn compare_exchange(value: *mut u64, old: u64, new: u64) -> u64 {
    use core::sync::atomic::Ordering::Relaxed;
    // SAFETY: guaranteed by the caller.
    let value = unsafe { core::sync::atomic::AtomicU64::from_ptr(value) };
    value.compare_exchange(old, new, Relaxed, Relaxed).unwrap_or_else(|seen| seen)
}
