//! All maps of the program, and the increment of the loss counter.

use aya_ebpf::{
    Global,
    macros::map,
    maps::{Array, PerCpuArray, RingBuf},
};
use sampler_common::{Offsets, kind};

/// Sizes here are minimums; user space sets the actual sizes before loading. There are two rings, so that a fork storm cannot displace
/// container events.
#[map]
pub static CGROUP_EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
#[map]
pub static PROCESS_EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// By kind: number of events that were lost because the ring was full or a field could not be read.
#[map]
pub static LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(kind::COUNT, 0);

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
        unsafe { increment(count) }
    }
}

/// Atomic, because where tracepoint programs can be preempted, two of them may use the slot of the same processor. The instruction set has
/// an atomic addition, but core does not provide it for this target.
///
/// # Safety
/// `count` must be valid and aligned.
#[cfg(target_arch = "bpf")]
#[inline(always)]
unsafe fn increment(count: *mut u64) {
    // SAFETY: adds 1 at a valid address and accesses no other memory.
    unsafe { core::arch::asm!("lock *(u64 *)({count} + 0) += {one}", count = in(reg) count, one = in(reg) 1u64) }
}

#[cfg(not(target_arch = "bpf"))]
unsafe fn increment(count: *mut u64) {
    // SAFETY: guaranteed by the caller.
    unsafe { core::sync::atomic::AtomicU64::from_ptr(count) }.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
}
