//! The records that cross from the kernel program to user space, and the field offsets that go the other way.
//!
//! Both sides compile this file, with different compilers: `repr(C)`, no implicit padding, sizes and offsets asserted below.
#![no_std]

/// What a [`ProcessEvent`] or [`CgroupEvent`] reports. Values are stable: they index the per-kind counters too.
pub mod kind {
    pub const FORK: u32 = 0;
    pub const EXEC: u32 = 1;
    pub const EXIT: u32 = 2;
    pub const MKDIR: u32 = 3;
    pub const RMDIR: u32 = 4;
    pub const RENAME: u32 = 5;
    pub const ATTACH: u32 = 6;
    pub const COUNT: u32 = 7;
    /// A living process as the task iterator shows it; no event, so it is not counted.
    pub const SEEN: u32 = COUNT;
    /// Names as in the `kind` label of `gpu_sampler_kernel_events_total`.
    pub const NAMES: [&str; COUNT as usize] = ["fork", "exec", "exit", "mkdir", "rmdir", "rename", "attach"];
}

/// Longest cgroup directory name the kernel accepts (NAME_MAX), with room for its NUL.
pub const NAME_BYTES: usize = 256;

/// A cgroup appeared, went or was renamed. Parent id and leaf name, not a path: the tracepoint's own path stops silently at 1,023 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CgroupEvent {
    pub kind: u32,
    /// 0 is cgroup v2; ids are unique only within a hierarchy.
    pub hierarchy: u32,
    /// The cgroup's id (its directory's inode number).
    pub id: u64,
    /// 0 when it has no parent.
    pub parent_id: u64,
    /// CLOCK_BOOTTIME.
    pub at_ns: u64,
    /// Bytes of `name` before its NUL.
    pub name_len: u32,
    pub pad: u32,
    pub name: [u8; NAME_BYTES],
}

/// A thread group was forked, called exec, ended, or was moved to another cgroup; or is there.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ProcessEvent {
    pub kind: u32,
    /// Process id in the initial pid namespace.
    pub tgid: u32,
    /// `task_struct.start_boottime` of the group leader, ns.
    pub start_ns: u64,
    /// CLOCK_BOOTTIME.
    pub at_ns: u64,
    /// The process's cgroup on v2, and on the v1 hierarchy chosen in [`Offsets`] (0 when there is none).
    pub v2_id: u64,
    pub v1_id: u64,
    /// For fork, the parent's tgid.
    pub parent_tgid: u32,
    pub pad: u32,
}

/// Byte offsets of kernel fields, read from the running kernel's BTF.
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
    /// Its hierarchy's id; 0 for none.
    pub v1_hierarchy: u32,
}

/// What the kernel program's self-check found; bits of the value it leaves in its map.
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
};

#[cfg(feature = "user")]
mod user {
    // SAFETY: plain integers and arrays of them, no padding (asserted above), every bit pattern is valid.
    unsafe impl aya::Pod for super::Offsets {}
}
