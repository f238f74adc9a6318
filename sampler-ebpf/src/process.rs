//! Hooks of fork, exec, exit and attach. Events of threads are dropped here: user space receives events of thread groups only.

use aya_ebpf::{
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, BPF_RB_RING_SIZE},
    helpers::{bpf_get_current_task, bpf_ktime_get_boot_ns},
    macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use sampler_common::{Offsets, ProcessEvent, kind};

use crate::{
    maps::{OFFSETS, PROCESS_EVENTS, lost},
    read::{Kernel, cgroup_id, field, task_cgroups},
};

/// Describes a thread group. The cgroups are those of `task` itself, because a leader that has ended stays in its last cgroup.
#[inline(always)]
pub fn describe(kind: u32, task: Kernel, parent_tgid: u32, o: &Offsets) -> Result<ProcessEvent, i32> {
    // Before the cgroups are read: a move in between then has a later time too.
    // SAFETY: the helper takes no arguments.
    let at_ns = unsafe { bpf_ktime_get_boot_ns() };
    let tgid: u32 = field(task, o.task_tgid)?;
    let leader: Kernel = field(task, o.task_group_leader)?;
    let start_ns: u64 = field(leader, o.task_start_boottime)?;
    let (v2_id, v1_id) = task_cgroups(task, o)?;
    Ok(ProcessEvent { kind, tgid, start_ns, at_ns, v2_id, v1_id, parent_tgid, pad: 0 })
}

#[inline(always)]
fn submit(event: ProcessEvent) -> Result<(), i32> {
    let Some(mut entry) = PROCESS_EVENTS.reserve::<ProcessEvent>(0) else {
        return Err(-1);
    };
    entry.write(event);
    entry.submit(wakeup());
    Ok(())
}

#[inline(always)]
fn report(kind: u32, task: Kernel, parent_tgid: u32) -> Result<(), i32> {
    submit(describe(kind, task, parent_tgid, &OFFSETS.load())?)
}

/// Process events can wait, so user space is not woken for each of them, but only when a quarter of the ring is full. User space reads the
/// ring every quarter of a second, and before it attributes samples.
#[inline(always)]
fn wakeup() -> u64 {
    let full = PROCESS_EVENTS.query(u64::from(BPF_RB_AVAIL_DATA));
    let size = PROCESS_EVENTS.query(u64::from(BPF_RB_RING_SIZE));
    if full > size / 4 { u64::from(BPF_RB_FORCE_WAKEUP) } else { u64::from(BPF_RB_NO_WAKEUP) }
}

#[inline(always)]
fn counted(kind: u32, result: Result<(), i32>) -> i32 {
    if result.is_err() {
        lost(kind);
    }
    0
}

/// Reads the css_set of the child, not of the parent: CLONE_INTO_CGROUP starts the child in another cgroup without an attach event.
#[raw_tracepoint(tracepoint = "sched_process_fork")]
pub fn sched_process_fork(ctx: RawTracePointContext) -> i32 {
    counted(kind::FORK, try_fork(&ctx))
}

#[inline(always)]
fn try_fork(ctx: &RawTracePointContext) -> Result<(), i32> {
    let o = OFFSETS.load();
    let parent: Kernel = ctx.arg(0);
    let child: Kernel = ctx.arg(1);
    let pid: u32 = field(child, o.task_pid)?;
    let tgid: u32 = field(child, o.task_tgid)?;
    if pid != tgid {
        return Ok(());
    }
    let parent_tgid: u32 = field(parent, o.task_tgid)?;
    report(kind::FORK, child, parent_tgid)
}

#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn sched_process_exec(ctx: RawTracePointContext) -> i32 {
    counted(kind::EXEC, report(kind::EXEC, ctx.arg(0), 0))
}

/// The group has ended when none of its threads is alive. This holds on kernels before and after 6.16; duplicate events are harmless.
#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn sched_process_exit(ctx: RawTracePointContext) -> i32 {
    counted(kind::EXIT, try_exit(&ctx))
}

#[inline(always)]
fn try_exit(ctx: &RawTracePointContext) -> Result<(), i32> {
    let o = OFFSETS.load();
    let task: Kernel = ctx.arg(0);
    let signal: Kernel = field(task, o.task_signal)?;
    let live: i32 = field(signal, o.signal_live)?;
    if live != 0 {
        return Ok(());
    }
    report(kind::EXIT, task, 0)
}

/// `(dst_cgroup, path, task, threadgroup)`. The cgroup in the hierarchy of the move is the destination: a leader that has ended is not
/// moved itself, but its threads are.
#[raw_tracepoint(tracepoint = "cgroup_attach_task")]
pub fn cgroup_attach_task(ctx: RawTracePointContext) -> i32 {
    counted(kind::ATTACH, try_attach(&ctx))
}

#[inline(always)]
fn try_attach(ctx: &RawTracePointContext) -> Result<(), i32> {
    let o = OFFSETS.load();
    let task: Kernel = ctx.arg(2);
    let pid: u32 = field(task, o.task_pid)?;
    let tgid: u32 = field(task, o.task_tgid)?;
    if pid != tgid {
        return Ok(());
    }
    let mut event = describe(kind::ATTACH, task, 0, &o)?;
    let to: Kernel = ctx.arg(0);
    let root: Kernel = field(to, o.cgroup_root)?;
    let hierarchy: u32 = field(root, o.root_hierarchy_id)?;
    if hierarchy == 0 {
        event.v2_id = cgroup_id(to, &o)?;
    } else if hierarchy == o.v1_hierarchy {
        event.v1_id = cgroup_id(to, &o)?;
    }
    submit(event)
}

#[inline(always)]
pub fn current() -> Kernel {
    // SAFETY: the helper takes no arguments.
    unsafe { bpf_get_current_task() as Kernel }
}
