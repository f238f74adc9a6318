//! The records that the kernel program sends to user space, and the field offsets that user space passes to the kernel program.
//!
//! Both sides compile this file, with different compilers: the types are `repr(C)`, have no implicit padding, and their sizes and offsets
//! are asserted below.
#![no_std]

/// Kinds of [`ProcessEvent`] and [`CgroupEvent`]. The values are stable, because they also index the counters by kind.
pub mod kind {
    pub const FORK: u32 = 0;
    pub const EXEC: u32 = 1;
    pub const EXIT: u32 = 2;
    pub const MKDIR: u32 = 3;
    pub const RMDIR: u32 = 4;
    pub const RENAME: u32 = 5;
    pub const ATTACH: u32 = 6;
    pub const COUNT: u32 = 7;
    /// A living process from the task iterator; not an event, so it is not counted.
    pub const SEEN: u32 = COUNT;
    /// Values of the `kind` label of `gpu_sampler_kernel_events_total`.
    pub const NAMES: [&str; COUNT as usize] = ["fork", "exec", "exit", "mkdir", "rmdir", "rename", "attach"];
}

/// The longest cgroup directory name that the kernel accepts (NAME_MAX), plus its NUL.
pub const NAME_BYTES: usize = 256;

/// A cgroup was created, removed or renamed. The record has the parent's id and the leaf name instead of a path, because the path of the
/// tracepoint is silently truncated at 1,023 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CgroupEvent {
    pub kind: u32,
    /// 0 is cgroup v2; ids are unique only within a hierarchy.
    pub hierarchy: u32,
    /// Id of the cgroup (inode number of its directory).
    pub id: u64,
    /// 0 if it has no parent.
    pub parent_id: u64,
    /// CLOCK_BOOTTIME.
    pub at_ns: u64,
    /// Length of `name` without its NUL.
    pub name_len: u32,
    pub pad: u32,
    pub name: [u8; NAME_BYTES],
}

/// A thread group was forked, called exec, ended, or was moved to another cgroup; or, with [`kind::SEEN`], exists.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ProcessEvent {
    pub kind: u32,
    /// Process id in the initial PID namespace.
    pub tgid: u32,
    /// `task_struct.start_boottime` of the group leader, ns.
    pub start_ns: u64,
    /// CLOCK_BOOTTIME.
    pub at_ns: u64,
    /// Cgroups of the process in v2, and in the v1 hierarchy selected in [`Offsets`] (0 for none).
    pub v2_id: u64,
    pub v1_id: u64,
    /// For fork: tgid of the parent.
    pub parent_tgid: u32,
    pub pad: u32,
}

/// Byte offsets of kernel fields, from the BTF of the running kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    pub task_pid: u32,
    pub task_tgid: u32,
    pub task_group_leader: u32,
    pub task_start_boottime: u32,
    pub task_cgroups: u32,
    pub task_signal: u32,
    pub task_flags: u32,
    pub signal_live: u32,
    pub css_set_subsys: u32,
    pub css_set_dfl_cgrp: u32,
    pub css_cgroup: u32,
    pub css_parent: u32,
    pub cgroup_kn: u32,
    pub cgroup_root: u32,
    pub kn_id: u32,
    pub kn_name: u32,
    pub root_hierarchy_id: u32,
    /// Index into `css_set.subsys` of the v1 controller to follow; `u32::MAX` for none.
    pub v1_subsys_index: u32,
    /// Id of its hierarchy; 0 for none.
    pub v1_hierarchy: u32,
}

/// Buckets of [`WaitSums::durations`]: bucket `n` counts calls of at least 2^n ns, and less than twice that; the last one all longer calls.
pub const WAIT_BUCKETS: usize = 36;

/// Waiting of one process in blocking calls of the CUDA driver library: the value of the map `WAITS`, by process id. User
/// space creates it with zeros; the kernel program adds to it, and ignores processes without it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitSums {
    /// How many threads are inside a call (the upper 12 bits), and since when at least one is (the lower 52 of CLOCK_BOOTTIME in ns).
    pub inside: u64,
    /// Time in which at least one thread was inside a call, up to the last instant at which none was.
    pub some_ns: u64,
    /// Time of all calls, each for itself.
    pub total_ns: u64,
    /// Calls that have returned.
    pub calls: u64,
    /// The present span of 2^30 ns, and the calls that began in it.
    pub span: u64,
    pub span_calls: u64,
    /// Set once a span had more calls than the budget: from then on the program does nothing for this process.
    pub over_budget: u64,
    /// Calls that could not be counted.
    pub lost: u64,
    pub durations: [u64; WAIT_BUCKETS],
}

impl WaitSums {
    pub const ZERO: Self = Self {
        inside: 0,
        some_ns: 0,
        total_ns: 0,
        calls: 0,
        span: 0,
        span_calls: 0,
        over_budget: 0,
        lost: 0,
        durations: [0; WAIT_BUCKETS],
    };
    /// Position of the number of threads in `inside`.
    pub const THREADS_SHIFT: u32 = 52;
    pub const SINCE_MASK: u64 = (1 << Self::THREADS_SHIFT) - 1;
    /// Threads of one process that are counted at a time; calls of more are lost. So one process cannot fill the table of calls, which all
    /// share.
    pub const MAX_THREADS: u32 = 64;

    /// `some_ns` as of `now_ns`, with the calls that have not returned.
    pub fn some_ns_at(&self, now_ns: u64) -> u64 {
        self.some_ns.wrapping_add(elapsed_ns(self.inside, now_ns))
    }
}

/// The time since a thread was first inside; 0 if none is. A time that seems to be in the future is one of another processor that is a
/// moment ahead.
#[inline(always)]
pub const fn elapsed_ns(inside: u64, now_ns: u64) -> u64 {
    if inside >> WaitSums::THREADS_SHIFT == 0 {
        return 0;
    }
    let elapsed = now_ns.wrapping_sub(inside) & WaitSums::SINCE_MASK;
    if elapsed > WaitSums::SINCE_MASK / 2 { 0 } else { elapsed }
}

/// A call that a thread is inside; the value of the map `WAITING`, by process and thread id.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct WaitingCall {
    pub since_ns: u64,
    /// The stack pointer at its begin: a call from within it has a lower one.
    pub stack: u64,
    /// Calls from within it that have not returned.
    pub nested: u64,
}

/// Result of the kernel program's self-check: bits of the value in its map.
pub mod self_check {
    pub const RAN: u32 = 1 << 31;
    pub const TGID: u32 = 1;
    pub const PID: u32 = 2;
    pub const CGROUP: u32 = 4;
    pub const START: u32 = 8;
    pub const READ: u32 = 16;
    pub const FLAGS: u32 = 32;
}

const _: () = {
    assert!(size_of::<CgroupEvent>() == 40 + NAME_BYTES);
    assert!(core::mem::offset_of!(CgroupEvent, name) == 40);
    assert!(size_of::<ProcessEvent>() == 48);
    assert!(core::mem::offset_of!(ProcessEvent, parent_tgid) == 40);
    assert!(size_of::<Offsets>() == 19 * 4);
    assert!(size_of::<WaitSums>() == (8 + WAIT_BUCKETS) * 8);
    assert!(size_of::<WaitingCall>() == 24);
};

#[cfg(feature = "user")]
mod user {
    // SAFETY: only integers, no padding (asserted above), every bit pattern is valid.
    unsafe impl aya::Pod for super::Offsets {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::WaitSums {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::WaitingCall {}
}
