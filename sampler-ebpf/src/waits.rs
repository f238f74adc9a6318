//! Wait probes: the time that processes spend inside blocking calls of the CUDA driver library. Only sums leave the kernel, and only of
//! processes that user space has entered in the map.
//!
//! ```text
//!  begin of a call   threads inside 0 -> 1: the span of waiting begins
//!  its return        threads inside 1 -> 0: its length is added to `some_ns`
//!  end of a thread   as its return; the call does not count as one that returned
//! ```
//! The number of threads and the begin of the span are one word, so that they change together on every processor.

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_boot_ns},
    macros::{raw_tracepoint, uprobe, uretprobe},
    programs::{ProbeContext, RawTracePointContext, RetProbeContext},
};
use sampler_common::{WAIT_BUCKETS, WaitSums, WaitingCall, elapsed_ns};

use crate::maps::{CLIENTS, WAIT_BUDGET, WAITING, WAITS, add, compare_exchange};

/// Attempts to change the word: each failure means that another processor has changed it.
const ATTEMPTS: u32 = 16;
/// Two links report the begin of one call within this time.
const SAME_CALL_NS: u64 = 50_000;
const ONE_THREAD: u64 = 1 << WaitSums::THREADS_SHIFT;
const SPAN_SHIFT: u32 = 30;
/// `BPF_ANY`, `BPF_NOEXIST`.
const ANY: u64 = 0;
const ONLY_NEW: u64 = 1;

#[cfg(any(bpf_target_arch = "aarch64", target_arch = "aarch64"))]
macro_rules! stack_pointer {
    ($regs:expr) => {
        (*$regs).sp
    };
}
#[cfg(not(any(bpf_target_arch = "aarch64", target_arch = "aarch64")))]
macro_rules! stack_pointer {
    ($regs:expr) => {
        (*$regs).rsp
    };
}

#[inline(always)]
fn now_ns() -> u64 {
    // SAFETY: the helper takes no arguments.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// The sums of the current process, if it is probed and within its budget.
#[inline(always)]
fn probed(thread: u64) -> Option<*mut WaitSums> {
    let sums = WAITS.get_ptr_mut((thread >> 32) as u32)?;
    // SAFETY: an entry of the map, valid for as long as the program runs.
    (unsafe { (*sums).over_budget } == 0).then_some(sums)
}

#[uprobe]
pub fn wait_begin(ctx: ProbeContext) -> u32 {
    let thread = bpf_get_current_pid_tgid();
    let Some(sums) = probed(thread) else { return 0 };
    // SAFETY: the context has the registers of the thread.
    let stack: u64 = unsafe { stack_pointer!(ctx.as_ptr().cast::<aya_ebpf::bindings::pt_regs>()) };
    if let Some(call) = WAITING.get_ptr_mut(thread) {
        // SAFETY: an entry of the map, which only this thread changes.
        let call = unsafe { &mut *call };
        if stack < call.stack {
            call.nested += 1;
            return 0;
        }
        let now = now_ns();
        // A process with a link of its own is also in that of its library.
        if stack == call.stack && now.saturating_sub(call.since_ns) < SAME_CALL_NS {
            return 0;
        }
        // The call before did not return: it was left by a long jump or an exception.
        leave(sums, now);
    }
    let now = now_ns();
    if !is_within_budget(sums, now) {
        return 0;
    }
    let call = WaitingCall { since_ns: now, stack, nested: 0 };
    if WAITING.insert(thread, call, ANY).is_err() || !enter(sums, now) {
        let _absent = WAITING.remove(thread);
        // SAFETY: an entry of the map.
        unsafe { add(&raw mut (*sums).lost, 1) };
    }
    0
}

#[uretprobe]
pub fn wait_end(_ctx: RetProbeContext) -> u32 {
    let thread = bpf_get_current_pid_tgid();
    let Some(call) = WAITING.get_ptr_mut(thread) else { return 0 };
    // SAFETY: an entry of the map, which only this thread changes.
    let call = unsafe { &mut *call };
    if call.nested > 0 {
        call.nested -= 1;
        return 0;
    }
    let since = call.since_ns;
    let _absent = WAITING.remove(thread);
    let Some(sums) = probed(thread) else { return 0 };
    let now = now_ns();
    leave(sums, now);
    let took = now.saturating_sub(since);
    // SAFETY: an entry of the map; the bucket is below the length of the array.
    unsafe {
        add(&raw mut (*sums).total_ns, took);
        add(&raw mut (*sums).calls, 1);
        add((&raw mut (*sums).durations).cast::<u64>().add(bucket(took)), 1);
    }
    0
}

/// A thread that is ended inside a call does not return from it, and the others of its process go on.
#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn wait_thread_exit(_ctx: RawTracePointContext) -> i32 {
    let thread = bpf_get_current_pid_tgid();
    if WAITING.remove(thread).is_ok()
        && let Some(sums) = probed(thread)
    {
        leave(sums, now_ns());
    }
    0
}

/// On cuInit: the process is a client of a GPU from now on, before the driver lists it.
#[uprobe]
pub fn client_begin(_ctx: ProbeContext) -> u32 {
    let process = (bpf_get_current_pid_tgid() >> 32) as u32;
    // Exists already, or the map is full: the driver's list names it later.
    let _kept = CLIENTS.insert(process, now_ns(), ONLY_NEW);
    0
}

#[inline(always)]
fn is_within_budget(sums: *mut WaitSums, now: u64) -> bool {
    let span = now >> SPAN_SHIFT;
    // SAFETY: an entry of the map. Calls that begin at the same time on two processors may count as one, which a budget tolerates.
    unsafe {
        if (*sums).span != span {
            (*sums).span = span;
            (*sums).span_calls = 0;
        }
        (*sums).span_calls += 1;
        if (*sums).span_calls > WAIT_BUDGET.load() {
            (*sums).over_budget = 1;
            return false;
        }
    }
    true
}

#[inline(always)]
fn enter(sums: *mut WaitSums, now: u64) -> bool {
    // SAFETY: the first field of an entry of the map.
    let word = unsafe { &raw mut (*sums).inside };
    for _ in 0..ATTEMPTS {
        // SAFETY: as above.
        let old = unsafe { word.read_volatile() };
        if old >> WaitSums::THREADS_SHIFT >= WaitSums::MAX_THREADS as u64 {
            return false;
        }
        let new = if old < ONE_THREAD { ONE_THREAD | (now & WaitSums::SINCE_MASK) } else { old.wrapping_add(ONE_THREAD) };
        // SAFETY: as above.
        if unsafe { compare_exchange(word, old, new) } == old {
            return true;
        }
    }
    false
}

#[inline(always)]
fn leave(sums: *mut WaitSums, now: u64) {
    // SAFETY: the first field of an entry of the map.
    let word = unsafe { &raw mut (*sums).inside };
    for _ in 0..ATTEMPTS {
        // SAFETY: as above.
        let old = unsafe { word.read_volatile() };
        if old < ONE_THREAD {
            return;
        }
        let last = old >> WaitSums::THREADS_SHIFT == 1;
        let new = if last { 0 } else { old.wrapping_sub(ONE_THREAD) };
        // SAFETY: as above.
        if unsafe { compare_exchange(word, old, new) } == old {
            if last {
                // SAFETY: an entry of the map.
                unsafe { add(&raw mut (*sums).some_ns, elapsed_ns(old, now)) };
            }
            return;
        }
    }
    // SAFETY: an entry of the map.
    unsafe { add(&raw mut (*sums).lost, 1) };
}

/// The position of the highest bit, by halves: the instruction set has no instruction for it.
#[inline(always)]
fn bucket(ns: u64) -> usize {
    let (mut rest, mut bucket) = (ns, 0);
    for shift in [32, 16, 8, 4, 2, 1] {
        if rest >> shift != 0 {
            rest >>= shift;
            bucket += shift;
        }
    }
    if bucket < WAIT_BUCKETS { bucket } else { WAIT_BUCKETS - 1 }
}
