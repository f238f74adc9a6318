//! Self-check of the offsets. It is never attached, but run once through BPF_PROG_TEST_RUN before all other programs. A read at a wrong
//! offset returns plausible garbage instead of failing, so the fields of the current task are compared with the results of the helpers.

use aya_ebpf::{
    helpers::{bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_ktime_get_boot_ns},
    macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use aya_log_ebpf::{error, info};
use sampler_common::self_check::{CGROUP, FLAGS, PID, RAN, READ, START, TGID};

use crate::{
    maps::{OFFSETS, SELF_CHECK},
    process::current,
    read::{Kernel, field, task_cgroups},
};

#[raw_tracepoint(tracepoint = "self_check")]
pub fn self_check(ctx: RawTracePointContext) -> i32 {
    let bad = compare().unwrap_or(READ);
    if bad == 0 {
        info!(&ctx, "self-check: the offsets agree with the helpers");
    } else {
        error!(&ctx, "self-check: the offsets disagree with the helpers, mask {}", bad);
    }
    let _written = SELF_CHECK.set(0, RAN | bad, 0);
    0
}

#[inline(always)]
fn compare() -> Result<u32, i32> {
    let o = OFFSETS.load();
    let task = current();
    let tgid: u32 = field(task, o.task_tgid)?;
    let pid: u32 = field(task, o.task_pid)?;
    let leader: Kernel = field(task, o.task_group_leader)?;
    let leader_pid: u32 = field(leader, o.task_pid)?;
    let start: u64 = field(leader, o.task_start_boottime)?;
    let (v2, _) = task_cgroups(task, &o)?;
    let both = bpf_get_current_pid_tgid();
    // SAFETY: the helpers take no arguments.
    let (cgroup, now) = unsafe { (bpf_get_current_cgroup_id(), bpf_ktime_get_boot_ns()) };
    let mut bad = 0;
    if tgid != (both >> 32) as u32 || leader_pid != tgid {
        bad |= TGID;
    }
    if pid != both as u32 {
        bad |= PID;
    }
    if v2 != cgroup {
        bad |= CGROUP;
    }
    if start == 0 || start > now {
        bad |= START;
    }
    // The current task is a user process that is not exiting: PF_EXITING and PF_KTHREAD are both clear.
    let flags: u32 = field(task, o.task_flags)?;
    if flags & 0x0020_0004 != 0 {
        bad |= FLAGS;
    }
    Ok(bad)
}
