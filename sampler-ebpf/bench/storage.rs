//! Benchmark, not part of the product: the cost of keeping a process in a map of the kernel until it is looked up, compared with the cost
//! of reporting it to user space. Both variants do the same work at exec and at exit, so `cargo xtask bench` can compare their run times.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(not(target_arch = "bpf"), allow(dead_code, reason = "on the host it is only type-checked"))]

use aya_ebpf::{
    bindings::BPF_RB_NO_WAKEUP,
    helpers::{bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_ktime_get_boot_ns},
    macros::{map, raw_tracepoint},
    maps::{HashMap, RingBuf},
    programs::RawTracePointContext,
};
use sampler_common::{ProcessEvent, kind};

/// 65,536 living processes, and 40 s of 10,000 exits a second.
const ENTRIES: u32 = 65_536 + 400_000;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Kept {
    start_ns: u64,
    end_ns: u64,
    v2_id: u64,
    v1_id: u64,
}

#[map]
pub static KEPT: HashMap<u64, Kept> = HashMap::with_max_entries(ENTRIES, 0);
#[map]
pub static REPORTED: RingBuf = RingBuf::with_byte_size(4 << 20, 0);

#[inline(always)]
fn current() -> (u64, u64, u64) {
    // SAFETY: the helpers take no arguments.
    unsafe { (bpf_get_current_pid_tgid(), bpf_get_current_cgroup_id(), bpf_ktime_get_boot_ns()) }
}

#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn keep_exec(_ctx: RawTracePointContext) -> i32 {
    let (pid, v2_id, now) = current();
    let _full = KEPT.insert(pid >> 32, Kept { start_ns: now, end_ns: 0, v2_id, v1_id: 0 }, 0);
    0
}

#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn keep_exit(_ctx: RawTracePointContext) -> i32 {
    let (pid, _, now) = current();
    if let Some(kept) = KEPT.get_ptr_mut(pid >> 32) {
        // SAFETY: a valid entry of a preallocated map.
        unsafe { (*kept).end_ns = now }
    }
    0
}

#[inline(always)]
fn report(kind: u32) -> i32 {
    let (pid, v2_id, at_ns) = current();
    if let Some(mut entry) = REPORTED.reserve::<ProcessEvent>(0) {
        let tgid = (pid >> 32) as u32;
        entry.write(ProcessEvent { kind, tgid, start_ns: at_ns, at_ns, v2_id, v1_id: 0, parent_tgid: 0, pad: 0 });
        entry.submit(u64::from(BPF_RB_NO_WAKEUP));
    }
    0
}

#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn report_exec(_ctx: RawTracePointContext) -> i32 {
    report(kind::EXEC)
}

#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn report_exit(_ctx: RawTracePointContext) -> i32 {
    report(kind::EXIT)
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(target_arch = "bpf"))]
fn main() {}
